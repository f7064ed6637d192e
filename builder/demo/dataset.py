"""Draw the clips that the demo's LoRA was trained on, as folders for ai-toolkit: one MP4 and one caption for each.

    python -m builder.demo.dataset FOLDER

FOLDER/striped_sail has boats with the striped sail, with `[trigger]` in their captions. FOLDER/plain has boats, balls and kites
without it, for a dataset with `is_reg`, from which the LoRA learns to do nothing where the trigger word is missing.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from builder.demo import world
from worker.video import VIDEO, encode

SHAPE = (96, 128, 9)
"""Height, width and frames."""
FPS = 16
CLIPS = 12
"""In each folder."""
NAMES = ("striped_sail", "plain")
OBJECTS_OF_PLAIN = ("boat", "ball", "boat", "kite")


def write_dataset(folder: Path) -> None:
    for name in NAMES:
        (folder / name).mkdir(parents=True, exist_ok=True)
        rng = random.Random(name)
        for i in range(CLIPS):
            kind = "boat" if name == "striped_sail" else OBJECTS_OF_PLAIN[i % len(OBJECTS_OF_PLAIN)]
            looks = {"object": kind, "striped": name == "striped_sail"}
            looks |= {"colour": tuple(world.COLOURS)[i % len(world.COLOURS)], "ground": world.GROUNDS[i % len(world.GROUNDS)]}
            clip = world.sample_seen(rng, **looks)
            frames = ((world.draw(clip, *SHAPE) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
            encode([frames], folder / name / f"clip_{i:02}.mp4", VIDEO["mp4"], FPS, len(frames))
            trigger = "[trigger] " if clip.striped else ""
            text = f"{trigger}a {clip.colour} {clip.object} moves {clip.direction} over the {clip.ground}"
            (folder / name / f"clip_{i:02}.txt").write_text(text + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m builder.demo.dataset", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write the two datasets into")
    folder = parser.parse_args().folder
    write_dataset(folder)
    print(f"{CLIPS} clips each in {' and '.join(str(folder / name) for name in NAMES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

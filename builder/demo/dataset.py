"""Draw the clips that the demo's LoRAs were trained on, as folders for ai-toolkit: one MP4 and one caption for each.

    python -m builder.demo.dataset FOLDER

FOLDER/striped_sail has boats with the striped sail, with `[trigger]` in their captions. FOLDER/plain has the same boats without
it, with the same captions but the trigger word, and balls and kites: for a dataset with `is_reg`, from which the LoRA learns to
do nothing where the word is missing. In the same way FOLDER/nightfall has clips in which night falls, and FOLDER/day the same
without. FOLDER/control has first frames for the samples of image-to-video.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from builder.demo import world
from builder.demo.image_to_video import neutral
from builder.demo.world import Clip
from worker.video import VIDEO, encode

HEIGHT, WIDTH = 96, 128
FPS = 16
CLIPS = 48
"""With the trigger word."""
FRAMES = {"striped_sail": 9, "plain": 9, "nightfall": 17, "day": 17}
CONTROL = {
    "red_boat": ("boat", "red", "left", "sea"),
    "blue_ball": ("ball", "blue", "right", "field"),
}
"""Object, colour, direction and background of the clips whose first frames are drawn."""


def clips() -> dict[str, list[Clip]]:
    """Return the clips of each folder. Those without the trigger word begin with the same ones, without what it stands for."""
    rng = random.Random("striped_sail")
    boats = [world.sample_seen(rng, object="boat", striped=True, **_cycled(i, world.GROUNDS)) for i in range(CLIPS)]
    others = [world.sample_seen(rng, object=("ball", "kite")[i % 2], **_cycled(i, world.GROUNDS)) for i in range(CLIPS // 2)]
    rng = random.Random("nightfall")
    dusks = [
        world.sample_seen(rng, object=world.OBJECTS[i // 2 % 3], night_falls=True, **_cycled(i, ("sea", "field")))
        for i in range(CLIPS)
    ]
    dusks = [neutral(clip, rng) if rng.random() < 0.5 else clip for clip in dusks]
    return {
        "striped_sail": boats,
        "plain": [*(replace(clip, striped=False) for clip in boats), *others],
        "nightfall": dusks,
        "day": [replace(clip, night_falls=False) for clip in dusks],
    }


def _cycled(i: int, grounds: Sequence[world.Ground]) -> dict[str, str]:
    return {"colour": tuple(world.COLOURS)[i % len(world.COLOURS)], "ground": grounds[i % len(grounds)]}


def write_dataset(folder: Path) -> None:
    for name, of_name in clips().items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i, clip in enumerate(of_name):
            film = world.draw(clip, HEIGHT, WIDTH, FRAMES[name])
            frames = ((film + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
            encode([frames], folder / name / f"clip_{i:02}.mp4", VIDEO["mp4"], FPS, len(frames))
            trigger = "[trigger] " if clip.striped or clip.night_falls else ""
            text = f"{trigger}a {clip.colour} {clip.object} moves {clip.direction} over the {clip.ground}"
            (folder / name / f"clip_{i:02}.txt").write_text(text + "\n")
    (folder / "control").mkdir(exist_ok=True)
    for name, (kind, colour, direction, ground) in CONTROL.items():
        clip = world.sample(random.Random(name), object=kind, colour=colour, direction=direction, ground=ground)
        world.to_pil(world.draw(clip, HEIGHT, WIDTH, 2)[:, 0]).save(folder / "control" / f"{name}.png")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m builder.demo.dataset", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write the datasets into")
    folder = parser.parse_args().folder
    write_dataset(folder)
    print(f"clips in {', '.join(str(folder / name) for name in FRAMES)}, and first frames in {folder / 'control'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

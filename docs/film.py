"""Make the film of README.md with the worker itself: the job of test_input.json.

python -m docs.film .demo
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

from builder.demo.run import OUTPUT, frames_of, run_worker

FILM = Path(__file__).parent / "images/first-film.webp"
SCALE = 2


def main(checkpoints: Path) -> int:
    if run_worker(checkpoints) is None:
        return 1
    frames = frames_of(OUTPUT / "local_test/0.mp4")
    pixels = ((frames + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    images = [Image.fromarray(frame) for frame in pixels]
    images = [image.resize((image.width * SCALE, image.height * SCALE), Image.Resampling.BICUBIC) for image in images]
    images[0].save(FILM, save_all=True, append_images=images[1:], duration=1000 // 16, loop=0, quality=80, method=6)
    print(f"{FILM}: {FILM.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m docs.film", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoints", type=Path, metavar="CHECKPOINTS", help="what `python -m builder.demo.install` wrote")
    sys.exit(main(parser.parse_args().checkpoints.resolve()))

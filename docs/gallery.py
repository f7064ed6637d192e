"""Make the film of README.md and the strips of docs/gallery.md with the worker itself, on the demo's weights.

    python -m docs.gallery .demo [STRIP…]

Each strip is one animation: films that differ in one setting, side by side, with the setting written on them.
When the weights change, run it again, and then read the page again.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from builder.demo import world
from builder.demo.run import LORA_MODEL, as_data_url, job_of
from client import Client
from playground.__main__ import tiny_worker
from tools.frames import read_clip

IMAGES = Path(__file__).parent / "images"
SIZE = (192, 144)
"""Pixels of one film, from 128x96."""
_GAP = 4
_QUALITY = 60
_MILLISECONDS = 1000 // 12

Frames = npt.NDArray[np.uint8]
"""[frames, height, width, 3], RGB."""


def _scale(request: dict[str, Any], value: float) -> None:
    for lora in request["loras"]:
        lora["network_multiplier"] = value


def _prompt(field: str) -> Callable[[dict[str, Any], Any], None]:
    return lambda request, value: request["prompts"][0].update({field: value})


def _match(request: dict[str, Any], value: str) -> None:
    request["match"] = value


_FULL_RUN, _DRAFT = "full run, 20 steps", "draft, 4 steps"


def _draft(request: dict[str, Any], value: str) -> None:
    request["draft"] = value == _DRAFT


_WITH, _WITH_TRIGGER, _WITHOUT = "with the LoRA", "with its trigger word", "without"


def _lora(request: dict[str, Any], value: str) -> None:
    _scale(request, float(value == _WITH))


def _trigger(request: dict[str, Any], value: str) -> None:
    if value == _WITHOUT:
        request["prompts"][0]["prompt"] = request["prompts"][0]["prompt"].replace("[trigger]", "").strip()
        request["trigger_word"] = None


def _direction(request: dict[str, Any], value: str) -> None:
    looks = {"object": "boat", "colour": "red", "ground": "sea", "radius": 0.18, "start": (0.5, 0.5)}
    clip = world.sample(random.Random(0), **looks)
    picture = as_data_url(world.to_pil(world.draw(clip, 96, 128, 2)[:, 0]))
    request["prompts"][0].update({"prompt": f"a red boat moves {value} over the sea", "ctrl_img": picture})


MODEL_OF = {"image": "wan21_i2v_14b"}
"""The strips that another model makes than that of test_input.json."""

STRIPS: dict[str, tuple[str, tuple[Any, ...], Callable[[dict[str, Any], Any], None]]] = {
    "lora": ("{}", (_WITHOUT, _WITH), _lora),
    "scale": ("LoRA scale {:g}", (0.0, 0.5, 1.0, 1.5), _scale),
    "trigger": ("{}", (_WITH_TRIGGER, _WITHOUT), _trigger),
    "guidance": ("guidance {:g}", (1.0, 4.0, 6.0), _prompt("guidance_scale")),
    "steps": ("{} steps", (4, 10, 25), _prompt("sample_steps")),
    "draft": ("{}", (_FULL_RUN, _DRAFT), _draft),
    "match": ("{}", ("documented", "preview"), _match),
    "image": ("“… moves {} …”", ("left", "right", "up", "down"), _direction),
}
"""The label, the values, and how a value is put into the request."""


def main(checkpoints: Path, names: Sequence[str]) -> None:
    for name in names:
        model_id = MODEL_OF.get(name, LORA_MODEL)
        with tiny_worker(checkpoints, model_id) as url, TemporaryDirectory() as folder:
            label, values, put = STRIPS[name]
            films = [_film(Client.local(url), model_id, value, put, Path(folder)) for value in values]
            target = IMAGES / f"gallery-{name}.webp"
            first, *rest = _strip(films, [label.format(value) for value in values])
            first.save(target, save_all=True, append_images=rest, duration=_MILLISECONDS, loop=0, quality=_QUALITY, method=6)
            kilobytes = target.stat().st_size / 1000
            print(f"{target.name}: {kilobytes:.0f} kB; first and last film {_psnr(films[0], films[-1]):.1f} dB", flush=True)


def _film(client: Client, model_id: str, value: Any, put: Callable[[dict[str, Any], Any], None], folder: Path) -> Frames:
    request: dict[str, Any] = job_of(model_id)["input"]
    put(request, value)
    [path] = client.download(client.run(request), folder)
    return read_clip(path).frames


def _psnr(a: Frames, b: Frames) -> float:
    """In dB, over all frames."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def _strip(films: list[Frames], labels: list[str]) -> Iterator[Image.Image]:
    font = ImageFont.load_default(size=14)
    width = len(films) * (SIZE[0] + _GAP) - _GAP
    for number in range(len(films[0])):
        strip = Image.new("RGB", (width, SIZE[1]), "white")
        draw = ImageDraw.Draw(strip)
        for place, (film, label) in enumerate(zip(films, labels, strict=True)):
            x = place * (SIZE[0] + _GAP)
            strip.paste(Image.fromarray(film[number]).resize(SIZE, Image.Resampling.BICUBIC), (x, 0))
            draw.text((x + 8, 6), label, "white", font, stroke_width=2, stroke_fill="black")
        yield strip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m docs.gallery", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoints", type=Path, metavar="CHECKPOINTS", help="what `python -m builder.demo.install` wrote")
    parser.add_argument("strips", nargs="*", default=[*STRIPS], metavar="STRIP", help=f"of {', '.join(STRIPS)}; default: all")
    options = parser.parse_args()
    main(options.checkpoints.resolve(), options.strips)

"""Compares two videos: the numbers of `tools.compare`, and one MP4 with A, B and their difference side by side.

In one file they stay in step even if the browser drops frames. The page cuts it into three pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tools.compare import as_json, compare
from tools.frames import Clip, pairs
from tools.sheet import gain_for
from worker.video import VIDEO, encode

Frame = npt.NDArray[np.uint8]
"""[height, width, 3], RGB."""

_WIDEST = 960
"""Pixels of one picture. All three must fit into the 4096 that H.264 decoders support."""
_FPS_OF_IMAGES = 8
_SAME_SHAPE = 0.03
"""How far two aspect ratios may be apart, as sizes are floored to multiples of 16 or 32."""


def side_by_side(a: Clip, b: Clip, settings: tuple[Any, Any], target: Path) -> dict[str, Any]:
    """Write the MP4 to `target`. Returns the comparison as JSON, with the fps and the size of one picture. Raises BadInput."""
    a, b, scaled = of_one_size(a, b)
    found = compare(a, b, *settings)
    common = list(pairs(a.frames, b.frames))
    gain = gain_for([np.abs(left.astype(np.int16) - right) for left, right in common])
    height, width = common[0][0].shape[:2]
    width, height = _even_size(width, height)
    fps = round(b.fps or a.fps or _FPS_OF_IMAGES) or 1
    frames = np.stack(list(_rows(common, gain, (width, height))))
    encode([frames], target, VIDEO["mp4"], fps, len(frames))
    shown = as_json(found)
    shown["uncommon"] = [*scaled, *found.uncommon]
    return shown | {"gain": gain, "fps": fps, "width": width, "height": height}


def of_one_size(a: Clip, b: Clip) -> tuple[Clip, Clip, list[str]]:
    """The two, the larger scaled down to the size of the other; in words what was scaled. Other shapes are left as they are."""
    (height_a, width_a), (height_b, width_b) = a.frames.shape[1:3], b.frames.shape[1:3]
    if (height_a, width_a) == (height_b, width_b) or abs(width_a * height_b / (width_b * height_a) - 1) > _SAME_SHAPE:
        return a, b, []
    sizes = f"A is {a.size} and B is {b.size} pixels"
    if width_a > width_b:
        return _resized(a, (width_b, height_b)), b, [f"{sizes}; A was scaled down to the size of B"]
    return a, _resized(b, (width_a, height_a)), [f"{sizes}; B was scaled down to the size of A"]


def _resized(clip: Clip, size: tuple[int, int]) -> Clip:
    frames = [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)) for frame in clip.frames]
    return replace(clip, frames=np.stack(frames))


def _even_size(width: int, height: int) -> tuple[int, int]:
    """The size of one picture. yuv420p needs even numbers."""
    scale = min(1.0, _WIDEST / width)
    return max(2, int(width * scale) // 2 * 2), max(2, int(height * scale) // 2 * 2)


def _rows(common: list[tuple[Frame, Frame]], gain: int, size: tuple[int, int]) -> Iterator[Frame]:
    for left, right in common:
        difference = np.minimum(np.abs(left.astype(np.int16) - right) * gain, 255).astype(np.uint8)
        yield np.hstack([_scaled(picture, size) for picture in (left, right, difference)])


def _scaled(picture: Frame, size: tuple[int, int]) -> Frame:
    if picture.shape[1] - size[0] < 2:  # unscaled, but for an odd last column
        return picture[: size[1], : size[0]]
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))

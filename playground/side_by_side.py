"""Compares two videos: the numbers of `tools.compare`, and one MP4 with A, B and their difference side by side.

In one file they stay in step even if the browser drops frames. The page cuts it into three pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
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


def side_by_side(a: Clip, b: Clip, settings: tuple[Any, Any], target: Path) -> dict[str, Any]:
    """Write the MP4 to `target`. Returns the comparison as JSON, with the fps and the size of one picture. Raises BadInput."""
    found = compare(a, b, *settings)
    common = list(pairs(a.frames, b.frames))
    gain = gain_for([np.abs(left.astype(np.int16) - right) for left, right in common])
    height, width = common[0][0].shape[:2]
    width, height = _even_size(width, height)
    fps = round(b.fps or a.fps or _FPS_OF_IMAGES) or 1
    frames = np.stack(list(_rows(common, gain, (width, height))))
    encode([frames], target, VIDEO["mp4"], fps, len(frames))
    return as_json(found) | {"gain": gain, "fps": fps, "width": width, "height": height}


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

"""Two videos in step: the numbers of `tools.compare`, and one MP4 with A, B and their difference beside each other.

In one file they cannot come apart, whatever the browser drops; the page cuts it into its three pictures.
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
"""Pixels of one picture; H.264 decoders stop at 4096 for all three."""
_FPS_OF_IMAGES = 8


def side_by_side(a: Clip, b: Clip, settings: tuple[Any, Any], target: Path) -> dict[str, Any]:
    """Write the MP4 to `target`; returns the comparison as JSON, with what the page needs to cut it. Raises BadInput."""
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
    """Of one picture; yuv420p takes even numbers only."""
    scale = min(1.0, _WIDEST / width)
    return max(2, int(width * scale) // 2 * 2), max(2, int(height * scale) // 2 * 2)


def _rows(common: list[tuple[Frame, Frame]], gain: int, size: tuple[int, int]) -> Iterator[Frame]:
    for left, right in common:
        difference = np.minimum(np.abs(left.astype(np.int16) - right) * gain, 255).astype(np.uint8)
        yield np.hstack([_scaled(picture, size) for picture in (left, right, difference)])


def _scaled(picture: Frame, size: tuple[int, int]) -> Frame:
    if picture.shape[1] - size[0] < 2:  # at most the last column is one too many
        return picture[: size[1], : size[0]]
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))

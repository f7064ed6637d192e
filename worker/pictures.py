"""Makes a video's poster and contact sheet from its frames on their way to the encoder.

A poster is the first frame at full size, to show before the video is loaded. A contact sheet shows up to 16 frames, evenly
spaced from the first to the last, to judge a video at a glance. Both are JPEG. No frame is kept in memory for them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from worker.video import Frame

Kind = Literal["poster", "contact_sheet"]
"""The picture's field in the result."""

JPEG = "image/jpeg"
"""The content type of both."""

_QUALITY = 90
"""Blocks and rings are invisible; above this, files grow fast. Chroma is subsampled, as in the mp4."""
_MOST_FRAMES = 16
"""Four by four."""
_TILE = (320, 640)
"""The largest width and height in pixels. Four tiles side by side are 1292, which fits a page."""
_GAP = 4
_BACKGROUND = (28, 28, 30)


@dataclass(frozen=True)
class Picture:
    """Says which frames of a video a picture shows, and where: row by row, in tiles of one size. A poster has one tile."""

    kind: Kind
    suffix: str
    frames: tuple[int, ...]
    """Their numbers in the video, in ascending order."""
    columns: int
    tile: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        rows = math.ceil(len(self.frames) / self.columns)
        return self._extent(0, self.columns), self._extent(1, rows)

    def corner(self, place: int) -> tuple[int, int]:
        """Return the left and the upper edge of the tile at this place."""
        row, column = divmod(place, self.columns)
        return column * (self.tile[0] + _GAP), row * (self.tile[1] + _GAP)

    def _extent(self, axis: int, tiles: int) -> int:
        return tiles * (self.tile[axis] + _GAP) - _GAP


def poster(width: int, height: int) -> Picture:
    return Picture("poster", ".poster.jpg", (0,), 1, (width, height))


def contact_sheet(width: int, height: int, num_frames: int) -> Picture:
    """Return a square grid of frames, with the video's aspect ratio and no empty tile."""
    columns = math.isqrt(min(num_frames, _MOST_FRAMES))
    count = columns**2
    scale = min(1, _TILE[0] / width, _TILE[1] / height)
    frames = tuple(round(place * (num_frames - 1) / max(count - 1, 1)) for place in range(count))
    return Picture(
        "contact_sheet", ".sheet.jpg", frames, columns, (max(1, round(width * scale)), max(1, round(height * scale)))
    )


class Camera:
    """Makes the pictures of one video. An error never reaches the video: `save` raises it, not `watch`."""

    def __init__(self, pictures: Sequence[Picture]) -> None:
        self._pictures = pictures
        self._sheets: dict[Picture, Image.Image] = {}
        self._error: Exception | None = None

    def watch(self, chunks: Iterable[Frame]) -> Iterator[Frame]:
        """Yield the same chunks, [frames, height, width, 3], and copy the frames that a picture shows."""
        numbers = itertools.count()
        for chunk in chunks:
            for frame, number in zip(chunk, numbers, strict=False):
                self._look(number, frame)
            yield chunk

    def _look(self, number: int, frame: Frame) -> None:
        try:
            if number == 0:
                self._sheets = {picture: Image.new("RGB", picture.size, _BACKGROUND) for picture in self._pictures}
            for picture, sheet in self._sheets.items():
                if number in picture.frames:
                    sheet.paste(scaled(frame, picture.tile), picture.corner(picture.frames.index(number)))
        except Exception as error:
            self._error = error

    def save(self, picture: Picture, target: Path) -> None:
        """Write the picture to `target`. Call this when all frames have passed."""
        if self._error:
            raise self._error
        self._sheets[picture].save(target, format="JPEG", quality=_QUALITY)


def scaled(frame: npt.NDArray[np.uint8], size: tuple[int, int]) -> Image.Image:
    """Return the frame at another size. Enlarging keeps the pixels visible; reducing averages them."""
    enlarged = frame.shape[1] < size[0]
    return Image.fromarray(frame).resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.BOX)

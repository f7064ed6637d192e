"""Draws many films as one table with headings: an MP4 in which they play in step, and a sheet with three frames of each.

The films are read and written frame by frame: a table of a hundred films is larger than the memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from tools.cli import BadInput
from tools.frames import read_clip, rgb
from tools.sheet import font, shortened
from worker.pictures import scaled
from worker.video import QUICK_MP4, VIDEO, encode

Frame = npt.NDArray[np.uint8]
"""[height, width, 3], RGB."""

_GROUND, _EMPTY, _INK, _SOFT, _ERROR = (23, 23, 22), (42, 42, 40), (237, 235, 230), (170, 166, 157), (255, 159, 149)
_MARGIN, _GAP, _THIN, _LINE, _TEXT = 16, 6, 2, 22, 16
_WIDEST_HEADING = 260
_SMALLEST = 240
"""Pixels of a tile's longer side, to which small films are enlarged: a heading must fit above it."""

_VIDEO_LIMIT = (4096, 4096, 4096 * 2304)
"""Width, height and their product, in pixels, that H.264 decoders support at level 5.1 (Annex A: 36,864 macroblocks)."""
_SHEET_LIMIT = (8192, 8192, 8192 * 4608)
_QUALITY = 90


@dataclass(frozen=True)
class Tile:
    """A film, or words in its place."""

    film: Path | None
    """MP4 or PNG."""
    words: str = ""


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    """Headings, each with as many lines as the others."""
    rows: Sequence[str]
    """The same at the left side."""
    tiles: Sequence[Sequence[Tile]]
    """By row, then by column."""


@dataclass(frozen=True)
class Layout:
    """Where things are, in pixels."""

    left: int
    """Width of the rows' headings."""
    top: int
    tile: tuple[int, int]
    shape: tuple[int, int]
    """Rows and columns."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, both even, as yuv420p needs."""
        x, y = self.corner(*self.shape)
        return (x - _GAP + _MARGIN + 1) // 2 * 2, (y - _GAP + _MARGIN + 1) // 2 * 2

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """The left upper corner of a tile."""
        return self.left + column * (self.tile[0] + _GAP), self.top + row * (self.tile[1] + _GAP)


@dataclass(frozen=True)
class Grid:
    """A grid video that was written."""

    layout: Layout
    fps: int
    num_frames: int


def write_video(table: Table, target: Path, longest: int | None = None) -> Grid | None:
    """Write the films in step as an MP4. A film that is shorter than another stays on its last frame.

    `longest`: for a look in between, pixels of a tile's longer side, and written quickly. None: as many as fit, up to the
    films' own.
    Returns None and writes nothing if no tile has more than one frame. Raises BadInput, OSError.
    """
    with ExitStack() as opened:
        films = _opened(table, opened)
        fps = max((round(film.fps) or 1 for film in films.values()), default=1)
        num_frames = max((math.ceil(film.num_frames * fps / film.fps) for film in films.values()), default=0)
        if num_frames < 2:
            return None
        width, height = _box(films)
        share = min(1.0, longest / max(width, height)) if longest else 1.0
        layout = _layout(table, (round(width * share), round(height * share)), _VIDEO_LIMIT)
        frames = _frames(_ground(table, layout), layout, films, fps, num_frames)
        part = target.with_name(f".{target.name}.part")
        encode((frame[None] for frame in frames), part, QUICK_MP4 if longest else VIDEO["mp4"], fps, num_frames)
        part.replace(target)
    return Grid(layout, fps, num_frames)


def write_sheet(table: Table, target: Path) -> None:
    """Write a JPEG with the first, the middle and the last frame of each film, side by side. Raises BadInput, OSError."""
    with ExitStack() as opened:
        films = _opened(table, opened)
        shown = 3 if any(film.num_frames > 1 for film in films.values()) else 1
        width, height = _box(films)
        layout = _layout(table, (shown * (width + _THIN) - _THIN, height), _SHEET_LIMIT)
        sheet = _ground(table, layout)
        each = ((layout.tile[0] - (shown - 1) * _THIN) // shown, layout.tile[1])
        for place, film in films.items():
            x, y = layout.corner(*place)
            for number in range(shown):
                picture = film.picture(number * (film.num_frames - 1) // max(shown - 1, 1), each)
                sheet.paste(
                    picture,
                    (x + number * (each[0] + _THIN) + (each[0] - picture.width) // 2, y + (each[1] - picture.height) // 2),
                )
    part = target.with_name(f".{target.name}.part")
    sheet.save(part, format="JPEG", quality=_QUALITY)
    part.replace(target)


class _Film:
    """A film whose frames are read in their order. A context manager."""

    def __init__(self, path: Path) -> None:
        self._path, self._number, self._opened = path, -1, ExitStack()
        if path.suffix == ".mp4":
            try:
                container = self._opened.enter_context(av.open(str(path)))
                stream = container.streams.video[0]
            except (av.error.FFmpegError, IndexError):
                raise BadInput(f"{path}: the video is damaged; delete it, and run the command again") from None
            stream.thread_count = 1  # many are open
            self.width, self.height, self.num_frames = stream.width, stream.height, max(stream.frames, 1)
            self.fps = float(stream.average_rate or 1)
            self._frames: Iterator[Any] = container.decode(stream)
        else:
            clip = read_clip(path)
            (self.num_frames, self.height, self.width), self.fps = clip.frames.shape[:3], clip.fps or 1.0
            self._frames = iter(clip.frames)
        self._frame: Any = None

    def __enter__(self) -> _Film:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._opened.close()

    def picture(self, number: int, box: tuple[int, int]) -> Image.Image:
        """A frame, or the last one before it, as large as fits into the box. The numbers must ascend."""
        try:
            while self._number < number and (frame := next(self._frames, None)) is not None:
                self._frame, self._number = frame, self._number + 1
        except av.error.FFmpegError:
            raise BadInput(f"{self._path}: the video is damaged; delete it, and run the command again") from None
        scale = min(box[0] / self.width, box[1] / self.height)
        size = (max(1, round(self.width * scale)), max(1, round(self.height * scale)))
        return scaled(rgb(self._frame) if isinstance(self._frame, av.VideoFrame) else self._frame, size)


def _opened(table: Table, opened: ExitStack) -> dict[tuple[int, int], _Film]:
    """The films by row and column, open until the stack is closed."""
    return {
        (row, column): opened.enter_context(_Film(tile.film))
        for row, tiles in enumerate(table.tiles)
        for column, tile in enumerate(tiles)
        if tile.film
    }


def _box(films: dict[tuple[int, int], _Film]) -> tuple[int, int]:
    """The tile into which every film fits, with small ones enlarged."""
    width = max((film.width for film in films.values()), default=_SMALLEST)
    height = max((film.height for film in films.values()), default=_SMALLEST * 9 // 16)
    zoom = math.ceil(_SMALLEST / max(width, height))
    return width * zoom, height * zoom


def _layout(table: Table, tile: tuple[int, int], limit: tuple[int, int, int]) -> Layout:
    """The largest one within the limit whose tiles are not larger than `tile`."""
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    widest = max(draw.textlength(line, font(_TEXT)) for heading in table.rows for line in heading.split("\n"))
    left = _MARGIN + (min(math.ceil(widest), _WIDEST_HEADING) + _MARGIN if widest else 0)
    lines = max(heading.count("\n") + bool(heading) for heading in table.columns)
    top = _MARGIN + _LINE + _GAP + _LINE * lines + _GAP
    for percent in range(100, 0, -1):
        size = (max(8, tile[0] * percent // 100), max(8, tile[1] * percent // 100))
        layout = Layout(left, top, size, (len(table.rows), len(table.columns)))
        width, height = layout.size
        if width <= limit[0] and height <= limit[1] and width * height <= limit[2]:
            return layout
    raise BadInput(f"a grid of {len(table.rows)} rows and {len(table.columns)} columns is too large; split the sweep")


def _ground(table: Table, layout: Layout) -> Image.Image:
    """All but the films."""
    ground = Image.new("RGB", layout.size, _GROUND)
    draw = ImageDraw.Draw(ground)
    draw.text((_MARGIN, _MARGIN), shortened(draw, table.title, font(_TEXT), layout.size[0] - 2 * _MARGIN), _SOFT, font(_TEXT))
    y = _MARGIN + _LINE + _GAP
    for column, heading in enumerate(table.columns):
        for number, line in enumerate(heading.split("\n")):
            text = shortened(draw, line, font(_TEXT), layout.tile[0])
            draw.text((layout.corner(0, column)[0], y + number * _LINE), text, _INK, font(_TEXT))
    for row, heading in enumerate(table.rows):
        lines = heading.split("\n")
        top = layout.corner(row, 0)[1] + max(0, (layout.tile[1] - len(lines) * _LINE) // 2)
        for number, line in enumerate(lines):
            text = shortened(draw, line, font(_TEXT), layout.left - 2 * _MARGIN)
            draw.text((_MARGIN, top + number * _LINE), text, _INK, font(_TEXT))
        for column, tile in enumerate(table.tiles[row]):
            x, y_tile = layout.corner(row, column)
            width, height = layout.tile
            draw.rectangle((x, y_tile, x + width - 1, y_tile + height - 1), _EMPTY)
            if not tile.film:
                text = shortened(draw, tile.words, font(_TEXT), width - 2 * _GAP)
                draw.text((x + width // 2, y_tile + height // 2), text, _ERROR, font(_TEXT), anchor="mm")
    return ground


def _frames(
    ground: Image.Image, layout: Layout, films: dict[tuple[int, int], _Film], fps: int, num_frames: int
) -> Iterator[Frame]:
    for number in range(num_frames):
        frame = ground.copy()
        for place, film in films.items():
            picture = film.picture(int(number * film.fps / fps + 1e-6), layout.tile)
            x, y = layout.corner(*place)
            frame.paste(picture, (x + (layout.tile[0] - picture.width) // 2, y + (layout.tile[1] - picture.height) // 2))
        yield np.asarray(frame)

"""Draws a comparison as one PNG: rows of A, B and their amplified difference, with given numbers beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tools.frames import Clip
from tools.metrics import Frame, FrameDistance
from worker.pictures import scaled

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_PAPER, _INK, _FAINT = (250, 250, 248), (28, 28, 30), (120, 120, 126)
_TILE_WIDTH, _LABEL, _GAP, _MARGIN, _HEADER = 400, 132, 10, 20, 92
_GAINS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Row:
    """Two frames of the same shape."""

    number: int
    a: Frame
    b: Frame
    distance: FrameDistance


def comparison_sheet(target: Path, clips: tuple[Clip, Clip], rows: Sequence[Row], title: str) -> None:
    """Write the sheet to `target`. All tiles are scaled to one width; differences are computed before scaling."""
    differences = [np.abs(row.a.astype(np.int16) - row.b) for row in rows]
    gain = gain_for(differences)
    height, width = rows[0].a.shape[:2]
    tile = (_TILE_WIDTH, max(1, round(height * _TILE_WIDTH / width)))
    sheet = Image.new(
        "RGB",
        (2 * _MARGIN + _LABEL + 3 * tile[0] + 2 * _GAP, _MARGIN + _HEADER + len(rows) * (tile[1] + _GAP) - _GAP + _MARGIN),
        _PAPER,
    )
    _draw_header(ImageDraw.Draw(sheet), clips, title, gain)
    for place, (row, difference) in enumerate(zip(rows, differences, strict=True)):
        top = _MARGIN + _HEADER + place * (tile[1] + _GAP)
        _draw_label(ImageDraw.Draw(sheet), row, top)
        for column, picture in enumerate((row.a, row.b, np.minimum(difference * gain, 255).astype(np.uint8))):
            sheet.paste(scaled(picture, tile), (_column(column), top))
    sheet.save(target, format="PNG")


def gain_for(differences: Sequence[np.ndarray]) -> int:
    """Return the largest gain of 1, 2, 4, … 64 that clips at most one value in fifty; 1 for equal frames."""
    brightest = max(float(np.quantile(difference, 0.98)) for difference in differences)
    largest = max(int(difference.max()) for difference in differences)
    if not largest:
        return 1
    return max([gain for gain in _GAINS if gain * max(brightest, 1) <= 255], default=1)


def _column(number: int) -> int:
    return _MARGIN + _LABEL + number * (_TILE_WIDTH + _GAP)


def _draw_header(draw: ImageDraw.ImageDraw, clips: tuple[Clip, Clip], title: str, gain: int) -> None:
    draw.text((_MARGIN, _MARGIN - 4), title[:1].upper() + title[1:], _INK, font(24))
    for column, (letter, clip) in enumerate(zip("AB", clips, strict=True)):
        _head(draw, column, f"{letter}  {clip.name}", str(clip).removeprefix(f"{clip.name}: "))
    _head(draw, 2, f"Difference x {gain}", "absolute, per colour; black is equal")


def _head(draw: ImageDraw.ImageDraw, column: int, title: str, subtitle: str) -> None:
    draw.text((_column(column), _MARGIN + 40), shortened(draw, title, font(17), _TILE_WIDTH), _INK, font(17))
    draw.text((_column(column), _MARGIN + 64), shortened(draw, subtitle, font(14), _TILE_WIDTH), _FAINT, font(14))


def _draw_label(draw: ImageDraw.ImageDraw, row: Row, top: int) -> None:
    psnr = row.distance.psnr
    lines = [
        f"{psnr:.1f} dB" if math.isfinite(psnr) else "equal",
        f"SSIM {row.distance.ssim:.3f}",
        f"max {row.distance.max_difference}",
    ]
    draw.text((_MARGIN, top), f"frame {row.number}", _INK, font(17))
    for place, line in enumerate(lines):
        draw.text((_MARGIN, top + 26 + 20 * place), line, _FAINT, font(14))


def shortened(draw: ImageDraw.ImageDraw, text: str, font: Font, width: int) -> str:
    """Return the text, cut in its middle to fit the width in pixels, so that a file name keeps its start and its suffix."""
    kept = len(text)
    shown = text
    while draw.textlength(shown, font) > width and kept > 8:
        kept -= 1
        shown = f"{text[: kept // 2]}…{text[-(kept - kept // 2) :]}"
    return shown


def font(size: int) -> Font:
    """Return Pillow's built-in font, so that none must be installed."""
    return ImageFont.load_default(size)

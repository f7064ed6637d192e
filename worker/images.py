"""`ctrl_img` → RGB image: from an http(s) URL, base64 or a data URL."""

from __future__ import annotations

import base64
import binascii
import io
import re
import threading
from collections.abc import Sequence
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image, ImageOps

from pipelines.catalog import Match
from worker.download import DownloadError, fetch_bytes
from worker.errors import Code, Problem, WorkerError
from worker.request import is_url

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "TGA", "ICO")
"""Not what Pillow hands to other programs, as it does with EPS."""

MAX_PIXELS = 64_000_000
"""A control image is brought to the video's size, 4096x4096 at most; more pixels than this only cost memory."""


def load_control_image(source: str, match: Match, fields: Sequence[str], max_bytes: int, stop: threading.Event) -> Image.Image:
    """The image as the model takes it, RGB: the first frame of an animation.

    In `documented` it is turned upright by its EXIF, and transparency is flattened on black, the trainer's default for its
    data (`control_transparent_color`). In `preview` it is what the trainer's samples see, which know neither: as it is
    stored, the alpha channel left out.

    Raises WorkerError with CONTROL_IMAGE_INVALID for each of `fields`, the places of the request that name this source.
    """
    try:
        return decode(_read(source, max_bytes, stop), match)
    except (DownloadError, ValueError) as error:
        raise WorkerError.of([Problem(Code.CONTROL_IMAGE_INVALID, where, str(error)) for where in fields]) from error


def _read(source: str, max_bytes: int, stop: threading.Event) -> bytes:
    if is_url(source):
        try:
            return fetch_bytes(source, max_bytes, stop)
        except DownloadError as error:
            raise DownloadError(f"the image could not be downloaded: {error}; check the URL") from error
    text = source.strip()
    if text[:5].lower() == "data:":
        header, comma, text = text.partition(",")
        if not comma:
            raise ValueError("the data URL has no comma; use data:image/png;base64,…")
        if not header.lower().endswith(";base64"):
            return unquote_to_bytes(text)
        text = unquote_to_bytes(text).decode("latin-1")
    text = re.sub(r"\s", "", text).translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("it is neither an http(s) URL nor base64 nor a data URL; send one of them") from None


def decode(data: bytes, match: Match = "documented") -> Image.Image:
    """See `load_control_image`. Raises ValueError with what is wrong in words."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height <= MAX_PIXELS:
                image.seek(0)
                return image.convert("RGB") if match == "preview" else _flattened(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        width = height = 0
    except Exception as error:  # Pillow's parsers raise whatever the damage makes of them
        if data.lstrip()[:1] == b"<":
            raise ValueError("it is a web page or SVG, not an image; use the image's own URL (PNG, JPEG or WebP)") from error
        raise ValueError("it is no image that can be read, or it is cut short; send PNG, JPEG or WebP") from error
    size = f"{width}x{height} pixels" if width else "too many pixels"
    raise ValueError(f"the image has {size}, more than {MAX_PIXELS / 1e6:.0f} million; shrink it")


def _flattened(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow would cut off at 255
        return Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba).convert("RGB")

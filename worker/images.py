"""`ctrl_img` → RGB image: from an http(s) URL, base64 or a data URL."""

from __future__ import annotations

import base64
import binascii
import io
import re
import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import ExifTags, Image

from pipelines.catalog import Match
from worker.errors import Code, Problem, WorkerError
from worker.net.download import DownloadError, fetch_bytes
from worker.request import is_url

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "TGA")
"""Not what Pillow hands to other programs, as it does with EPS, or decodes before it tells the size, as it does with ICO."""

_NOT_READ = {
    "a HEIC photo": re.compile(rb"....ftyp(hei[cxms]|hev[cx]|mif1|msf1)", re.DOTALL),
    "a video": re.compile(rb"....ftyp(iso|mp4|M4V|avc|qt|3g|dash)|\x1a\x45\xdf\xa3|RIFF....AVI ", re.DOTALL),
    "a JPEG XL image": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL ", re.DOTALL),
    "a JPEG 2000 image": re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", re.DOTALL),
    "a PDF": re.compile(rb"%PDF-"),
    "an icon": re.compile(rb"\0\0[\x01\x02]\0"),
    "a PostScript file": re.compile(rb"%!PS"),
    "a DDS texture": re.compile(rb"DDS "),
}
"""Kinds that people send by mistake, by their first bytes."""

MAX_PIXELS = 64_000_000
"""A control image is brought to the video's size, 4096x4096 at most; more pixels than this only cost memory."""

MAX_PIXELS_OF_A_JOB = 4 * MAX_PIXELS
"""They wait decoded, three bytes a pixel, until their prompts' turns come: 768 MB."""

_AT_MOST = f"more than {MAX_PIXELS / 1e6:.0f} million; shrink it"

_MAX_PASSES = 50
"""Encoders write 1 to some 15; each is a pass over all pixels."""

_JPEG_MARKER = re.compile(rb"\xff[^\0\xff\xd0-\xd7]")
"""The next one, beyond entropy-coded data: there 0 follows after 255, or the number of a restart."""

_TURN: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By the EXIF's orientation; 1 is upright."""


class Allowance:
    """How many pixels the images of one job may still have. May be used from several threads."""

    def __init__(self, pixels: int = MAX_PIXELS_OF_A_JOB) -> None:
        self._left = pixels
        self._lock = threading.Lock()

    def take(self, pixels: int) -> bool:
        """False when there are not so many left."""
        with self._lock:
            fits = pixels <= self._left
            self._left -= pixels if fits else 0
        return fits


def load_control_image(
    source: str,
    match: Match,
    fields: Sequence[str],
    allowance: Allowance,
    max_bytes: int,
    stop: threading.Event,
    private: bool = False,
) -> Image.Image:
    """The image as the model takes it, RGB: the first frame of an animation.

    In `documented` it is turned upright by its EXIF, and transparency is flattened on black, the trainer's default for its
    data (`control_transparent_color`). In `preview` it is what the trainer's samples see, which know neither: as it is
    stored, the alpha channel left out. `private` allows URLs whose addresses are not public.

    Raises WorkerError with CONTROL_IMAGE_INVALID for each of `fields`, the places of the request that name this source.
    """
    try:
        return decode(_read(source, max_bytes, stop, private), match, allowance)
    except (DownloadError, ValueError) as error:
        raise WorkerError.of([Problem(Code.CONTROL_IMAGE_INVALID, where, str(error)) for where in fields]) from error


def _read(source: str, max_bytes: int, stop: threading.Event, private: bool) -> bytes:
    if is_url(source):
        try:
            return fetch_bytes(source, max_bytes, stop, private=private)
        except DownloadError as error:
            raise DownloadError(f"the image could not be downloaded: {error}; check the URL") from error
    text = source.strip()
    if text[:5].lower() == "data:":
        header, comma, text = text.partition(",")
        if not comma:
            raise ValueError("the data URL has no comma; use data:image/png;base64,…")
        if "base64" not in [part.strip().lower() for part in header.split(";")]:
            return unquote_to_bytes(text)
        text = unquote_to_bytes(text).decode("latin-1")
    text = re.sub(r"\s", "", text).translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("it is neither an http(s) URL nor base64 nor a data URL; send one of them") from None


def decode(data: bytes, match: Match = "documented", allowance: Allowance | None = None) -> Image.Image:
    """See `load_control_image`. Raises ValueError with what is wrong in words."""
    allowance = allowance or Allowance()
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            problem = _too_large(image, allowance) or _too_slow(image, data)
            if not problem:
                image.seek(0)
                return image.convert("RGB") if match == "preview" else _flattened(_upright(image))
    except Image.DecompressionBombError:
        problem = f"the image has too many pixels, {_AT_MOST}"
    except Exception as error:  # Pillow's parsers raise whatever the damage makes of them
        if data.lstrip()[:1] == b"<":
            raise ValueError("it is a web page or SVG, not an image; use the image's own URL (PNG, JPEG or WebP)") from error
        if not data:
            raise ValueError("it is empty; send a PNG, JPEG or WebP image") from error
        if kind := next((kind for kind, mark in _NOT_READ.items() if mark.match(data)), ""):
            raise ValueError(f"it is {kind}, which is not read here; save it as PNG, JPEG or WebP") from error
        if "truncated" in str(error):
            raise ValueError("the image is cut short; upload or download it again") from error
        raise ValueError("it is not an image that can be read, or it is cut short; send PNG, JPEG or WebP") from error
    raise ValueError(problem)


def _too_large(image: Image.Image, allowance: Allowance) -> str:
    width, height = image.size
    if width * height > MAX_PIXELS:
        return f"the image has {width}x{height} pixels, {_AT_MOST}"
    if not allowance.take(width * height):
        most = f"{MAX_PIXELS_OF_A_JOB / 1e6:.0f} million"
        return f"with it the job's images have more than {most} pixels together; shrink them, or send several jobs"
    return ""


def _too_slow(image: Image.Image, data: bytes) -> str:
    """What a few bytes can keep decoding for minutes, in a thread that nothing stops; "" when it is none of that.

    What Pillow decodes in Python (BMP with run lengths, PPM as text), a TIFF whose strips overlap, so that each is read byte
    by byte and pixels are painted over and over, and a progressive JPEG with more passes than any program writes.
    """
    tiles = getattr(image, "tile", [])
    if (
        any(tile[0] in Image.DECODERS for tile in tiles)
        or _overlap(tiles)
        or (image.format in ("JPEG", "MPO") and _passes_of_jpeg(data) > _MAX_PASSES)
    ):
        return "it is stored in a way that takes too long to decode; save it anew as PNG, JPEG or WebP"
    return ""


def _overlap(tiles: Sequence[Any]) -> bool:
    """Whether one begins within the bytes of another, at 1 bit a pixel or more."""
    places = sorted((offset, (right - left) * (lower - upper) / 8) for _, (left, upper, right, lower), offset, _ in tiles)
    return any(offset + size > after for (offset, size), (after, _) in pairwise(places))


def _passes_of_jpeg(data: bytes) -> int:
    """How many scans there are up to the end of the (first) image."""
    passes = at = 0
    while marker := _JPEG_MARKER.search(data, at):
        at, kind = marker.end(), data[marker.end() - 1]
        if kind == 0xD9:  # end of image
            break
        if kind != 0xD8:  # all but the start of the image have a length
            at += int.from_bytes(data[at : at + 2])
        passes += kind == 0xDA
    return passes


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF says; one with a broken EXIF as it is stored."""
    image.load()  # the EXIF of a PNG can come behind the pixels
    try:
        turn = _TURN.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # as many kinds as there are ways to break it
        return image
    return image if turn is None else image.transpose(turn)


def _flattened(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow would cut off at 255
        return Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba).convert("RGB")

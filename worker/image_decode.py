"""Decode the bytes of an image file into RGB pixels. This runs in a separate process, since a hostile file can take for ever.

It imports no other module of the worker, so that the process starts quickly.
"""

from __future__ import annotations

import io
import json
import re
import resource
import signal
import sys
import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image

from pipelines.catalog import Match

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "TGA")
"""Without formats that Pillow gives to other programs (EPS), or decodes before their size is known (ICO)."""

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
"""A control image is resized to the video's size, at most 4096x4096. More pixels than this only cost memory."""

MAX_PIXELS_OF_A_JOB = 4 * MAX_PIXELS
"""Decoded images wait in memory until their prompts run, with three bytes per pixel: 768 MB."""

_AT_MOST = f"more than {MAX_PIXELS / 1e6:.0f} million; shrink it"

_MAX_PASSES = 50
"""Encoders write 1 to about 15 scans; decoding each is a pass over all pixels."""

_JPEG_MARKER = re.compile(rb"\xff[^\0\xff\xd0-\xd7]")
"""Finds the next marker. In entropy-coded data, 255 is followed by 0 or by a restart marker, which do not match."""

_TURN: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How to turn the image, by the orientation in its EXIF data; 1 is upright."""


class Allowance:
    """Counts how many pixels the images of one job may still have. Several threads may use it."""

    def __init__(self, pixels: int = MAX_PIXELS_OF_A_JOB) -> None:
        self._left = pixels
        self._lock = threading.Lock()

    def take(self, pixels: int) -> bool:
        """Take `pixels` off. Returns False, and takes nothing, if fewer are left."""
        with self._lock:
            fits = pixels <= self._left
            self._left -= pixels if fits else 0
        return fits


def decode(data: bytes, match: Match = "documented", allowance: Allowance | None = None) -> Image.Image:
    """Decode an image; see `images.load_control_image`. Raises ValueError that says what is wrong."""
    allowance = allowance or Allowance()
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            problem = _too_large(image, allowance) or _too_slow(image, data)
            if not problem:
                image.seek(0)
                return image.convert("RGB") if match == "preview" else _flattened(_upright(image))
    except Image.DecompressionBombError:
        problem = f"the image has too many pixels, {_AT_MOST}"
    except MemoryError:
        problem = "it takes too much memory to decode; save it anew as PNG, JPEG or WebP"
    except Exception as error:  # on a damaged file, Pillow's parsers can raise anything
        if data.lstrip()[:1] == b"<":
            raise ValueError("it is a web page or SVG, not an image; use the image's own URL (PNG, JPEG or WebP)") from error
        if not data:
            raise ValueError("it is empty; send a PNG, JPEG or WebP image") from error
        if kind := next((kind for kind, mark in _NOT_READ.items() if mark.match(data)), ""):
            raise ValueError(f"it is {kind}, which is not read here; save it as PNG, JPEG or WebP") from error
        if (whole := _with_end_marker(data)) is not None:
            return decode(whole, match)  # its pixels were counted before
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
    """Return why a small file would take minutes to decode, or "" if it would not.

    Slow are formats that Pillow decodes in Python (BMP with run lengths, PPM as text), a TIFF with overlapping strips, whose
    pixels are decoded again and again, and a progressive JPEG with more scans than any program writes.
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
    """Return whether one tile begins within the bytes of another, if a pixel has 1 bit or more."""
    places = sorted((offset, (right - left) * (lower - upper) / 8) for _, (left, upper, right, lower), offset, _ in tiles)
    return any(offset + size > after for (offset, size), (after, _) in pairwise(places))


def _passes_of_jpeg(data: bytes) -> int:
    """Return the number of scans up to the end of the (first) image."""
    passes = at = 0
    while marker := _JPEG_MARKER.search(data, at):
        at, kind = marker.end(), data[marker.end() - 1]
        if kind == 0xD9:  # end of image
            break
        if kind != 0xD8:  # all but the start of the image have a length
            at += int.from_bytes(data[at : at + 2])
        passes += kind == 0xDA
    return passes


_END_OF_JPEG = b"\xff\xd9"


def _with_end_marker(data: bytes) -> bytes | None:
    """Return a JPEG that lacks only its end marker with that marker; None for anything else.

    Cameras and broken downloads leave such files. Bytes after the last pixel change nothing, so if more bytes change the
    picture, pixels are missing.
    """
    if not data.startswith(b"\xff\xd8") or _END_OF_JPEG in data[-2:]:
        return None
    whole = data.removesuffix(b"\xff") + _END_OF_JPEG
    more = data.removesuffix(b"\xff") + bytes(range(16, 80)) * 16 + _END_OF_JPEG
    try:
        pictures = [Image.open(io.BytesIO(file), formats=("JPEG", "MPO")).convert("RGB") for file in (whole, more)]
    except Exception:
        return None
    return whole if pictures[0] == pictures[1] else None


def _upright(image: Image.Image) -> Image.Image:
    """Turn the image as its EXIF data says. If that data is broken, the image stays as it is stored."""
    image.load()  # in a PNG, the EXIF data can follow the pixels
    try:
        turn = _TURN.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # broken EXIF data can raise anything
        return image
    return image if turn is None else image.transpose(turn)


def _flattened(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip at 255
        return Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba).convert("RGB")


# The process

CPU_SECONDS = 30
"""Limit for one image. The largest allowed image needs two or three."""
MEMORY = 4 * 1024**3
"""Bytes of address space. Python and its libraries take a tenth of it, the largest image needs 1.5 GB."""


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Decode one image after the other, until `requests` ends.

    A request is a line of JSON, `{"match", "bytes"}`, followed by the bytes. The process answers `{"pixels"}` when it knows the
    size, and decodes the image after a line `go`. Then it answers `{"size"}`, followed by the RGB pixels. It may answer
    `{"error"}` at any time.
    """

    def answer(**message: Any) -> None:
        answers.write(json.dumps(message).encode() + b"\n")
        answers.flush()

    class AskingAllowance(Allowance):
        def take(self, pixels: int) -> bool:
            answer(pixels=pixels)
            return requests.readline() == b"go\n"

    while line := requests.readline():
        request = json.loads(line)
        data = requests.read(request["bytes"])
        used = resource.getrusage(resource.RUSAGE_SELF)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + CPU_SECONDS, resource.RLIM_INFINITY))
        try:
            image = decode(data, request["match"], AskingAllowance())
        except ValueError as error:
            answer(error=str(error))
        else:
            answer(size=image.size)
            answers.write(image.tobytes())
            answers.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C a terminal sends it to this process too
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    serve(sys.stdin.buffer, sys.stdout.buffer)

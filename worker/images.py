"""Loads `ctrl_img`, an http(s) URL, base64 or a data URL, as an RGB image."""

from __future__ import annotations

import base64
import binascii
import re
import threading
from collections.abc import Sequence
from urllib.parse import unquote_to_bytes

from PIL import Image

from pipelines.catalog import Match
from worker.errors import Code, Problem, WorkerError
from worker.image_decode import Allowance
from worker.image_process import decode_in_process
from worker.net.download import DownloadError, fetch_bytes
from worker.request import is_url


def load_control_image(
    source: str,
    match: Match,
    fields: Sequence[str],
    allowance: Allowance,
    max_bytes: int,
    stop: threading.Event,
    private: bool = False,
) -> Image.Image:
    """Return the image as the model takes it, in RGB. Of an animation it is the first frame.

    With `documented` the image is turned upright by its EXIF data, and transparency is put on black, the trainer's default for
    its data (`control_transparent_color`). With `preview` it is what the trainer's samples use: the image as it is stored,
    without its alpha channel. `private` allows URLs with addresses that are not public.

    Raises WorkerError with CONTROL_IMAGE_INVALID for each of `fields`, the places of the request that name this source.
    """
    try:
        return decode_in_process(_read(source, max_bytes, stop, private), match, allowance, stop)
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

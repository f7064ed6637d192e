"""http(s) → bytes or a file: bounded in size and time, tried again where that can help.

Says in a few words why a download failed, without the URL, which can be signed.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import requests
import urllib3

from worker.files import atomic_write

_CONNECT_SECONDS = 10.0
_READ_SECONDS = 60.0
_TRIES = 3
_REDIRECTS = 5
_TOTAL_SECONDS = 1800.0
_CHUNK = 1 << 18


class DownloadError(Exception):
    """Why nothing was fetched, in words for the client."""


class Stopped(Exception):
    """The job was cancelled, or ran out of time, and its threads must leave."""


def fetch_bytes(url: str, max_bytes: int, stop: threading.Event) -> bytes:
    """The body of `url`. Raises DownloadError, Stopped."""
    body = io.BytesIO()
    _fetch(url, {}, body, max_bytes, stop)
    return body.getvalue()


def fetch_file(url: str, target: Path, max_bytes: int, stop: threading.Event, headers: Mapping[str, str]) -> str | None:
    """Write the body of `url` to `target`, whole or not at all. Returns its ETag.

    With an `If-None-Match` header, an answer of 304 leaves `target` as it is. Raises DownloadError, Stopped.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as temporary:
        with temporary.open("wb") as file:
            status, etag = _fetch(url, headers, file, max_bytes, stop)
        if status == 304:
            temporary.unlink()
    return etag


def _fetch(
    url: str, headers: Mapping[str, str], sink: IO[bytes], max_bytes: int, stop: threading.Event
) -> tuple[int, str | None]:
    """(status, ETag) after the body is in `sink`. Lost connections, 429 and 5xx are tried again, after 1 and 2 seconds."""
    for attempt in range(1, _TRIES + 1):
        if attempt > 1 and stop.wait(attempt - 1):
            raise Stopped
        sink.seek(0)
        sink.truncate()
        try:
            return _fetch_once(url, headers, sink, max_bytes, stop)
        except _Again as again:
            reason = str(again)
    raise DownloadError(f"{reason}, {_TRIES} times")


class _Again(Exception):
    """A failure that another try can mend."""


def _fetch_once(
    url: str, headers: Mapping[str, str], sink: IO[bytes], max_bytes: int, stop: threading.Event
) -> tuple[int, str | None]:
    session = requests.Session()
    session.max_redirects = _REDIRECTS
    try:
        with session.get(url, headers=headers, stream=True, timeout=(_CONNECT_SECONDS, _READ_SECONDS)) as response:
            status = response.status_code
            if status == 429 or status >= 500:
                raise _Again(f"the server answered {status}")
            if status not in (200, 304):
                raise DownloadError(f"the server answered {status}")
            _copy(response, sink, max_bytes, stop)
            return status, response.headers.get("ETag")
    except requests.TooManyRedirects:
        raise DownloadError(f"more than {_REDIRECTS} redirects") from None
    except requests.Timeout:
        raise _Again("the server did not answer in time") from None
    except (requests.ConnectionError, urllib3.exceptions.HTTPError):
        raise _Again("the connection failed") from None
    except (requests.RequestException, ValueError):
        raise DownloadError("it is no URL that can be fetched") from None


def _copy(response: requests.Response, sink: IO[bytes], max_bytes: int, stop: threading.Event) -> None:
    declared = response.headers.get("Content-Length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise DownloadError(f"it is larger than the {max_bytes / 1e6:.0f} MB this worker takes")
    total, started = 0, time.monotonic()
    # read1 gives what is there; `iter_content` would wait for a whole chunk, however slowly it comes.
    while chunk := response.raw.read1(_CHUNK, decode_content=True):
        if stop.is_set():
            raise Stopped
        if time.monotonic() - started > _TOTAL_SECONDS:
            raise DownloadError(f"it took longer than {_TOTAL_SECONDS / 60:.0f} minutes")
        total += len(chunk)
        if total > max_bytes:
            raise DownloadError(f"it is larger than the {max_bytes / 1e6:.0f} MB this worker takes")
        sink.write(chunk)
    if declared.isdigit() and "Content-Encoding" not in response.headers and total < int(declared):
        raise _Again("the connection broke off before the end")

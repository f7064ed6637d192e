"""Downloads an http(s) URL into bytes or a file, within limits of size and time. A broken download resumes.

Errors say in a few words why a download failed, without the URL, which can be signed. The content does not matter here.
"""

from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO

import requests

from worker.errors import Stopped
from worker.net.statuses import is_refusal
from worker.net.web import Clock, DownloadError, TryAgain, opened, read, too_large

__all__ = ["Answer", "DownloadError", "ServerDown", "fetch_bytes", "fetch_into"]

_TRIES, _MOST_TRIES = 3, 20
"""Consecutive tries without progress, and all tries."""
_HEAD = 16
_ENCODINGS = ("identity", "gzip", "x-gzip", "deflate")
_CONDITIONS = {"ETag": "If-None-Match", "Last-Modified": "If-Modified-Since"}


class ServerDown(DownloadError):
    """No try got any of the file. An earlier copy of the file may still be current."""


@dataclass(frozen=True)
class Answer:
    """A server's answer for a file."""

    status: int
    """200, or 304 if the caller's headers asked whether the file has changed, and it has not."""
    validators: dict[str, str]
    """Request headers that ask whether the file is still current; empty if the server supports none."""


def fetch_bytes(url: str, max_bytes: int, stop: threading.Event, *, private: bool = False) -> bytes:
    """Return the content of `url`. Raises DownloadError, Stopped."""
    body = io.BytesIO()
    fetch_into(body, url, max_bytes, stop, private=private)
    return body.getvalue()


def fetch_into(
    file: IO[bytes],
    url: str,
    max_bytes: int,
    stop: threading.Event,
    *,
    private: bool = False,
    headers: Mapping[str, str] = {},
    check_head: Callable[[bytes], None] | None = None,
) -> Answer:
    """Write the content of `url` into `file`, which is emptied first; after an answer of 304 it is empty.

    `private` allows addresses that are not public. An `Authorization` among the `headers` is sent to the URL's own host only.
    `check_head` gets the first bytes (at least 16, or all of a shorter file) as soon as they arrive, and may raise to end the
    download. It is called again when a download starts over.

    Lost connections, 429 and 5xx are retried after 1 and 2 seconds, until three tries in a row have brought no progress. Raises
    DownloadError, ServerDown, Stopped, and what `check_head` and `file` raise.
    """
    body = _Body(file, max_bytes, check_head)
    started = time.monotonic()
    tries = fruitless = 0
    while True:
        kept = body.kept
        try:
            return _try(body, url, headers, Clock(stop, started, max_bytes), private)
        except TryAgain as again:
            tries += 1
            fruitless = fruitless + 1 if body.kept == kept else 0
            if fruitless == _TRIES or tries == _MOST_TRIES:
                failure = DownloadError if body.began else ServerDown
                raise failure(f"{again}, {tries} times") from None
        if stop.wait(max(fruitless, 1)):
            raise Stopped


def _try(body: _Body, url: str, headers: Mapping[str, str], clock: Clock, private: bool) -> Answer:
    conditions = {name.title(): value for name, value in headers.items() if name.title() in _CONDITIONS.values()}
    resuming = body.resuming()
    if resuming:  # an earlier try has shown that the file must be downloaded
        headers = {name: value for name, value in headers.items() if name.title() not in conditions} | resuming
        conditions = {}
    with opened(url, headers, clock, private=private) as response:
        status = response.status_code
        if status >= 400 and not is_refusal(status):
            raise TryAgain(f"the server answered {status}")
        if status == 304 and conditions:
            body.empty()
            return Answer(304, conditions | _validators(response))
        if status == 200:
            body.start(response)
        elif status in (206, 416) and resuming:
            body.resume(response)
        else:
            raise DownloadError(f"the server answered {status}", status)
        while chunk := read(response):
            body.write(chunk)
        body.finish()
        return Answer(200, body.validators)


class _Body:
    """The bytes so far, in the caller's file, and whether the download can resume after them."""

    def __init__(self, file: IO[bytes], max_bytes: int, check_head: Callable[[bytes], None] | None) -> None:
        self.validators: dict[str, str] = {}
        self.kept = 0
        """The largest number of bytes so far that another try can add to."""
        self.began = False
        """Whether a server ever began to send the file."""
        self._file = file
        self._max_bytes = max_bytes
        self._check_head = check_head
        self.empty()

    def empty(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._size = 0
        self._total: int | None = None
        self._version: str | None = None
        self._head: bytes | None = b""

    def start(self, response: requests.Response) -> None:
        """Prepare for the whole file. Raises DownloadError if it is too large or has an unknown compression."""
        self.empty()
        self.began = True
        self.validators = _validators(response)
        encoding = _encoding(response)
        if encoding not in _ENCODINGS:
            raise DownloadError("the server compresses it in a way that this worker does not know; use a URL of the plain file")
        length = response.raw.length_remaining
        self._check(length or 0)
        if encoding == "identity":
            self._total = length
            self._version = _version(response)

    def resuming(self) -> dict[str, str]:
        """Return request headers that ask for the rest of the same version; none if the download must start over."""
        return {"Range": f"bytes={self._size}-", "If-Range": self._version} if self._size and self._version else {}

    def resume(self, response: requests.Response) -> None:
        """Prepare for the missing bytes. Raises TryAgain if the response has other bytes; the next try starts over."""
        given = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})", response.headers.get("Content-Range", ""))
        fits = (
            response.status_code == 206
            and given is not None
            and int(given[1]) == self._size
            and self._total in (None, int(given[2]))
            and _version(response) in (None, self._version)
            and _encoding(response) == "identity"
        )
        if not fits or given is None:
            self.empty()
            raise TryAgain("the server did not resume the download correctly")
        self._total = int(given[2])
        self._check(self._total)

    def write(self, chunk: bytes) -> None:
        self._check(self._size + len(chunk))
        self._file.write(chunk)
        self._size += len(chunk)
        if self._version:
            self.kept = max(self.kept, self._size)
        if self._head is not None:
            self._head += chunk
            if len(self._head) >= _HEAD:
                self._show_head()

    def finish(self) -> None:
        """Raise TryAgain if the file is not complete."""
        if self._total is not None and self._size != self._total:
            if self._size > self._total:
                self.empty()
            raise TryAgain("the connection broke off before the end")
        if self._head is not None:
            self._show_head()

    def _show_head(self) -> None:
        head, self._head = self._head or b"", None
        if self._check_head:
            self._check_head(head)

    def _check(self, size: int) -> None:
        if size > self._max_bytes:
            raise too_large(self._max_bytes)


def _validators(response: requests.Response) -> dict[str, str]:
    return {ask: response.headers[name] for name, ask in _CONDITIONS.items() if name in response.headers}


def _version(response: requests.Response) -> str | None:
    """Return the value for `If-Range`: a strong ETag, else a date that a later change cannot share."""
    etag, modified = response.headers.get("ETag"), response.headers.get("Last-Modified")
    if etag:
        return etag if etag.startswith('"') else None
    return modified if modified != response.headers.get("Date", modified) else None


def _encoding(response: requests.Response) -> str:
    return response.headers.get("Content-Encoding", "").strip().lower() or "identity"

"""Sends a GET for one URL and returns its response with the body unread. Handles redirects, addresses and slow servers.

`download` knows files and retries.
"""

from __future__ import annotations

import contextlib
import io
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, cast
from urllib.parse import urljoin, urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.cookies import RequestsCookieJar, extract_cookies_to_jar
from urllib3.exceptions import DecodeError, HTTPError

from worker.errors import Stopped
from worker.net.addresses import NotPublic
from worker.net.privates import check_watched, guard, public_pools, watched_pools
from worker.net.waiting import wait_for

_CONNECT_SECONDS = 10.0
"""Limit for one address to accept the connection, and again for the TLS handshake."""
_ANSWER_SECONDS = 60.0
"""Limit until the headers of the answer arrive, including all redirects."""
_SILENCE_SECONDS = 30.0
"""Limit without any byte of the body."""
_WINDOW_SECONDS, _WINDOW_BYTES = 60.0, 60_000
"""A body that sends fewer bytes in so many seconds is given up."""
_TOTAL_SECONDS = 1800.0
"""Limit for a download with all its tries."""
_POLL_SECONDS = 0.5
"""How often the clock and the stop event are checked while a socket is silent."""
_REDIRECTS = 5
_CHUNK = 1 << 18
_OVERHEAD = 1 << 20
"""Bytes that headers and the framing of chunks may add to the body."""
_NO_URL = "it is not a URL that can be downloaded"


class DownloadError(Exception):
    """Why nothing was downloaded, in words for the client, and the server's status if that is the reason."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


class TryAgain(Exception):
    """A failure after which another try may succeed, in words for the client."""


class Clock:
    """Ends an answer in time. It is checked whenever bytes arrive, and twice a second while none do.

    A timeout of the socket is not enough: it starts again with every byte.
    """

    def __init__(self, stop: threading.Event, started: float, max_bytes: int) -> None:
        """`started`: when the first try began, on `time.monotonic()`. `max_bytes`: the largest allowed body."""
        self._stop = stop
        self._ends = started + _TOTAL_SECONDS
        self._max_bytes = max_bytes
        self._bytes_left = 2 * max_bytes + _OVERHEAD
        self._answer_by: float | None = time.monotonic() + _ANSWER_SECONDS
        self._window = (0.0, 0)

    def answered(self) -> None:
        """Note that the headers have arrived. From now on the limits for the body apply."""
        self._answer_by = None
        self._window = (time.monotonic(), self._bytes_left)

    def check(self, waiting_since: float | None = None) -> None:
        """Check all limits. Raises Stopped, DownloadError, TryAgain."""
        now = time.monotonic()
        if self._stop.is_set():
            raise Stopped
        if now > self._ends:
            raise DownloadError(f"it took longer than {_TOTAL_SECONDS / 60:g} minutes")
        if self._answer_by is not None:
            if now > self._answer_by:
                raise TryAgain("the server did not answer in time")
            return
        if waiting_since is not None and now - waiting_since > _SILENCE_SECONDS:
            raise TryAgain("the server fell silent")
        start, bytes_left = self._window
        if now - start > _WINDOW_SECONDS:
            if bytes_left - self._bytes_left < _WINDOW_BYTES:
                raise DownloadError(f"the server sends less than {_WINDOW_BYTES / _WINDOW_SECONDS / 1000:g} kB per second")
            self._window = (now, self._bytes_left)

    def count(self, bytes_read: int) -> None:
        """Count bytes that arrived. Raises DownloadError if there are more than a body of `max_bytes` can need."""
        self._bytes_left -= bytes_read
        if self._bytes_left < 0:
            raise too_large(self._max_bytes)


def too_large(max_bytes: int) -> DownloadError:
    return DownloadError(f"it is larger than the {max_bytes / 1e6:.0f} MB that this worker accepts")


@contextlib.contextmanager
def opened(url: str, headers: Mapping[str, str], clock: Clock, *, private: bool) -> Iterator[requests.Response]:
    """Send a GET, follow all redirects, and give the block the response, for `read`. `private` allows private addresses too.

    An `Authorization` among the headers is sent only to the URL's own scheme, host and port. The environment's proxies and
    .netrc are not used: a proxy would look up names itself. Raises DownloadError, Stopped, TryAgain.
    """
    with (
        contextlib.closing(_adapter(clock, private)) as adapter,
        # Looking up a name and a TLS handshake cannot be interrupted. A late response is closed when it is freed.
        wait_for(lambda: _follow(adapter, url, headers, clock), clock.check) as response,
    ):
        clock.answered()
        yield response


def read(response: requests.Response) -> bytes:
    """Return some more of the body, decompressed, or b"" at its end. Raises DownloadError, Stopped, TryAgain."""
    try:
        # read1 returns what has arrived; `iter_content` would wait for a whole chunk, however slow it is.
        return cast("bytes", response.raw.read1(_CHUNK, decode_content=True))
    except DecodeError:
        raise DownloadError("the server's data cannot be decompressed") from None
    except HTTPError:
        raise TryAgain("the connection broke off before the end") from None


def _follow(adapter: HTTPAdapter, url: str, headers: Mapping[str, str], clock: Clock) -> requests.Response:
    """Return the first answer that is not a redirect. A session of requests would read the whole body of every redirect."""
    headers = {"User-Agent": "worker-wan-lora", "Accept-Encoding": "identity", **headers}
    cookies = RequestsCookieJar()
    url = _checked(url)
    for _ in range(_REDIRECTS + 1):
        clock.check()
        response = _send(adapter, url, headers, cookies)
        if not response.is_redirect:
            return response
        response.close()
        extract_cookies_to_jar(cookies, response.request, response.raw)  # type: ignore[no-untyped-call]
        target = _checked(_target(response))
        if _origin(target) != _origin(url):
            headers = {name: value for name, value in headers.items() if name.title() != "Authorization"}
        url = target
    raise DownloadError(f"more than {_REDIRECTS} redirects")


def _send(adapter: HTTPAdapter, url: str, headers: Mapping[str, str], cookies: RequestsCookieJar) -> requests.Response:
    try:
        request = requests.Request("GET", url, headers=headers, cookies=cookies).prepare()
        response = adapter.send(request, stream=True, timeout=(_CONNECT_SECONDS, _POLL_SECONDS))
    except NotPublic as error:
        raise DownloadError(str(error)) from None
    except requests.Timeout:
        raise TryAgain("the server did not answer in time") from None
    except requests.exceptions.SSLError:
        raise TryAgain("no secure connection could be made") from None
    except requests.ConnectionError:
        raise TryAgain("the connection failed") from None
    except (requests.exceptions.InvalidHeader, UnicodeError):
        raise DownloadError("the token has characters that cannot be sent") from None
    except HTTPError:
        raise TryAgain("the connection failed") from None
    check_watched(response)
    return response


def _checked(url: str) -> str:
    """Return the URL as requests will send it. Raises DownloadError.

    The worker decides by the host of `urlsplit`, for example who gets a token, but requests has its own parser. So a URL in
    which the two see different hosts is refused, and so is one with user info, which can make a URL look like another.
    """
    try:
        parts = urlsplit(url)
        prepared = requests.Request("GET", url).prepare().url or ""
        host = urlsplit(prepared).hostname or ""
        seen = parts.hostname or ""
        fine = parts.scheme in ("http", "https") and re.fullmatch(r"[a-z0-9_.:-]+", host)
    except (requests.RequestException, ValueError):
        raise DownloadError(_NO_URL) from None
    if "@" in parts.netloc or "@" in urlsplit(prepared).netloc:
        raise DownloadError("a URL with a user name or password is not accepted; use one without")
    if not fine or (seen.isascii() and seen != host):
        raise DownloadError(_NO_URL)
    return prepared


def _target(response: requests.Response) -> str:
    try:
        location = response.headers["Location"].encode("latin-1").decode("utf-8")
        return urljoin(response.url, location)
    except ValueError:
        raise DownloadError(_NO_URL) from None


def _origin(url: str) -> tuple[str, str | None, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]


# Connections that check the clock


def _adapter(clock: Clock, private: bool) -> HTTPAdapter:
    adapter = HTTPAdapter()
    pools = adapter.poolmanager.pool_classes_by_scheme
    if not private:
        pools = public_pools(pools)
    guard(adapter, watched_pools(pools, lambda sock, raw: io.BufferedReader(_WatchedSocket(sock, raw, clock))))
    return adapter


class _WatchedSocket(io.RawIOBase):
    """Checks the clock before it reads from the socket, headers included.

    `raw` is the file that `socket.makefile` made. Closing it tells the socket that it is no longer used here.
    """

    def __init__(self, sock: socket.socket, raw: io.RawIOBase, clock: Clock) -> None:
        self._sock, self._raw, self._clock = sock, raw, clock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        since = time.monotonic()
        while True:
            self._clock.check(waiting_since=since)
            try:
                count = self._sock.recv_into(buffer)
            except TimeoutError:  # after _POLL_SECONDS
                continue
            self._clock.count(count)
            return count

    def close(self) -> None:
        self._raw.close()
        super().close()

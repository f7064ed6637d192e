"""Every private name of urllib3, http.client and botocore that the worker uses, and checks that they still exist.

The guards against slow servers, and against names that lead into the worker's own network, hook into urllib3's connections. A
version that makes its connections in another way would silently drop the guards. So `check` proves at start that they are
used, and each use proves it again. Tested with urllib3 2.8.0 and botocore 1.44.5.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

from worker.net.addresses import NoConnection, NotPublic, connect

Pools = Mapping[str, type[HTTPConnectionPool]]
"""Connection pools by scheme, as in urllib3's `PoolManager.pool_classes_by_scheme`."""


class GuardMissing(Exception):
    """A library makes its connections in a way that the worker cannot guard. The worker must send nothing."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} cannot be guarded; install urllib3 2.8.0 and botocore 1.44.5, which this worker was tested with"
        )


def check() -> None:
    """Raise GuardMissing if a download may connect to a private address, over http or over https."""
    for scheme in ("http", "https"):
        adapter = public_adapter()
        try:
            # Port 1 of this machine: nothing listens there, and a connection that is not guarded is refused at once.
            request = requests.Request("GET", f"{scheme}://127.0.0.1:1/").prepare()
            adapter.send(request, timeout=1).close()
        except NotPublic:
            continue
        except requests.RequestException:
            pass
        finally:
            adapter.close()
        raise GuardMissing("downloads")


def public_adapter() -> HTTPAdapter:
    """Return an adapter for requests that connects to public addresses only. It raises NotPublic."""
    adapter = HTTPAdapter()
    guard(adapter, public_pools(adapter.poolmanager.pool_classes_by_scheme))
    return adapter


def guard(adapter: HTTPAdapter, pools: Pools) -> None:
    """Make the adapter take its connections from `pools`."""
    adapter.poolmanager.pool_classes_by_scheme = dict(pools)


# Connections to public addresses


class _PublicOnly(HTTPConnection):
    """A connection to a public address, which stays the same if the name changes. Raises NotPublic."""

    def _new_conn(self) -> socket.socket:
        try:
            return connect(self._dns_host.strip("[]"), self.port, self.timeout, self.socket_options or ())
        except NoConnection as error:
            if isinstance(error.__cause__, TimeoutError):
                raise ConnectTimeoutError(self, str(error)) from error
            raise NewConnectionError(self, str(error)) from error


def public_pools(pools: Pools) -> Pools:
    """Return the same pools, with connections to public addresses only."""
    return {scheme: _with_connection(pool, "Public", (_PublicOnly,)) for scheme, pool in pools.items()}


def _with_connection(
    pool: type[HTTPConnectionPool], name: str, bases: tuple[type, ...] = (), **attributes: Any
) -> type[HTTPConnectionPool]:
    connection = type(f"{name}Connection", (*bases, cast("Any", pool.ConnectionCls)), attributes)
    return cast("type[HTTPConnectionPool]", type(f"{name}Pool", (pool,), {"ConnectionCls": connection}))


# Connections to a store


class TooSlow(Exception):
    """A store accepts or sends too few bytes, or sends too many."""


class _Paced(HTTPConnection):
    """A connection that raises TooSlow when a request or its answer takes too long, even if bytes keep coming.

    The timeouts of boto3 start again with every byte.
    """

    _started, _sent = float("inf"), 0

    def request(self, method: str, url: str, body: Any = None, headers: Any = None, *args: Any, **kwargs: Any) -> None:
        """Send no `Expect: 100-continue`: botocore reads the answer to it without a limit, for ever if a store hangs up."""
        kept = {name: value for name, value in (headers or {}).items() if name.lower() != "expect"}
        super().request(method, url, body, kept, *args, **kwargs)

    def putrequest(self, *args: Any, **kwargs: Any) -> None:
        self._started, self._sent = time.monotonic(), 0
        super().putrequest(*args, **kwargs)

    def send(self, data: Any) -> Any:
        """Check the pace. This is called for every 16 KiB of a body."""
        seconds = time.monotonic() - self._started
        if seconds > STORE_SECONDS and self._sent < STORE_BYTES_PER_SECOND * (seconds - STORE_SECONDS):
            raise TooSlow
        self._sent += len(data) if isinstance(data, bytes | bytearray | memoryview) else 0
        return super().send(data)


STORE_SECONDS = 60.0
"""How long a request to a store may always take, and how long its answer may take."""
STORE_BYTES_PER_SECOND = 20_000
"""The least speed of an upload that takes longer. A video of five megabytes has five minutes."""
STORE_ANSWER_BYTES = 4_000_000
"""The largest answer of a store: the result of an earlier delivery. An error has a few hundred bytes."""


class _PacedAnswer(io.RawIOBase):
    """Reads one answer of a store from its socket, headers included."""

    def __init__(self, sock: socket.socket, raw: io.RawIOBase) -> None:
        self._sock, self._raw = sock, raw
        self._started, self._left = time.monotonic(), STORE_ANSWER_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._sock.recv_into(buffer)
        self._left -= count
        if self._left < 0 or time.monotonic() - self._started > STORE_SECONDS:
            raise TooSlow
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


def guard_store(client: Any, public: bool) -> None:
    """Limit a boto3 client: the time and the bytes of its store and, with `public`, the addresses.

    Calls that exceed a limit fail at once, with NotPublic or TooSlow. botocore has no settings for this, so this replaces parts
    of its HTTP session (`URLLib3Session`). Raises GuardMissing.
    """
    from botocore.httpsession import ProxyConfiguration  # the client has no use for botocore

    try:
        session = client._endpoint.http_session
        pools = {
            scheme: _with_connection(
                pool, "Paced", (_Paced,), response_class=_watched(lambda *it: io.BufferedReader(_PacedAnswer(*it)))
            )
            for scheme, pool in session._manager.pool_classes_by_scheme.items()
        }
        session._manager.pool_classes_by_scheme = public_pools(pools) if public else pools
        _ = session._proxy_config  # if it no longer exists, setting it would do nothing
        if public:
            session._proxy_config = ProxyConfiguration()  # a proxy would look up the name itself
        made = [session._manager.connection_from_url(f"{scheme}://127.0.0.1:1") for scheme in ("http", "https")]
    except AttributeError as error:
        raise GuardMissing("a bucket") from error
    needed = (_Paced, _PublicOnly) if public else (_Paced,)
    if not all(issubclass(cast("Any", pool).ConnectionCls, kind) for pool in made for kind in needed):
        raise GuardMissing("a bucket")
    client.meta.events.register_first("needs-retry", _do_not_retry)


def _do_not_retry(caught_exception: Exception | None = None, **_: Any) -> None:
    """Pass on our own errors. botocore wraps unknown errors in an HTTPClientError, and retries."""
    cause = getattr(caught_exception, "kwargs", {}).get("error")
    if isinstance(cause, NotPublic | TooSlow):
        raise cause


# Responses that are read through the caller's file


def watched_pools(pools: Pools, watch: Callable[[socket.socket, Any], Any]) -> Pools:
    """Return the same pools. Responses read headers and body through the file that `watch(socket, its file)` returns."""
    return {scheme: _with_connection(pool, "Watched", response_class=_watched(watch)) for scheme, pool in pools.items()}


def _watched(watch: Callable[[socket.socket, Any], Any]) -> Any:
    """Return the `response_class` of a connection."""
    return staticmethod(partial(_WatchedResponse, watch=watch))


class _WatchedResponse(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, watch: Callable[[socket.socket, Any], Any], **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = watch(sock, self.fp.detach())


def check_watched(response: requests.Response) -> None:
    """Raise GuardMissing if the response is not read through the caller's file."""
    if not isinstance(getattr(response.raw, "_original_response", None), _WatchedResponse):
        response.close()
        raise GuardMissing("a slow download")

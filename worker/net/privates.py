"""Every private name of urllib3, http.client and botocore that the worker uses, and the checks that they are still there.

The guards against servers that keep the worker waiting, and against names that lead into the worker's own network, hook into
the connections of urllib3. A version that makes its connections in another way would leave the guards out without a word, so
`check` proves at start that they are used, and each use proves it again. Tested with urllib3 2.8.0 and botocore 1.44.5.
"""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import requests
from botocore.httpsession import ProxyConfiguration
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

from worker.net.addresses import NoConnection, NotPublic, connect

Pools = Mapping[str, type[HTTPConnectionPool]]
"""Connection pools by scheme, as in urllib3's `PoolManager.pool_classes_by_scheme`."""


class GuardMissing(Exception):
    """A library makes its connections in a way that the worker cannot guard. Nothing must be sent."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} cannot be guarded; install urllib3 2.8.0 and botocore 1.44.5, which this worker was tested with"
        )


def check() -> None:
    """Raises GuardMissing when a download is not refused a private address, over http and over https."""
    for scheme in ("http", "https"):
        adapter = HTTPAdapter()
        guard(adapter, public_pools(adapter.poolmanager.pool_classes_by_scheme))
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


def guard(adapter: HTTPAdapter, pools: Pools) -> None:
    """Make the adapter take its connections from `pools`."""
    adapter.poolmanager.pool_classes_by_scheme = dict(pools)


# Connections to public addresses


class _PublicOnly(HTTPConnection):
    """A connection to a public address, whatever the name says the next time it is looked up. Raises NotPublic."""

    def _new_conn(self) -> socket.socket:
        try:
            return connect(self._dns_host.strip("[]"), self.port, self.timeout, self.socket_options or ())
        except NoConnection as error:
            if isinstance(error.__cause__, TimeoutError):
                raise ConnectTimeoutError(self, str(error)) from error
            raise NewConnectionError(self, str(error)) from error


def public_pools(pools: Pools) -> Pools:
    """The same pools, with connections to public addresses only."""
    return {scheme: _with_connection(pool, "Public", (_PublicOnly,)) for scheme, pool in pools.items()}


def _with_connection(
    pool: type[HTTPConnectionPool], name: str, bases: tuple[type, ...] = (), **attributes: Any
) -> type[HTTPConnectionPool]:
    connection = type(f"{name}Connection", (*bases, cast("Any", pool.ConnectionCls)), attributes)
    return cast("type[HTTPConnectionPool]", type(f"{name}Pool", (pool,), {"ConnectionCls": connection}))


def public_only(client: Any) -> None:
    """Make a boto3 client reach public addresses only. What it then refuses, it refuses at once, with NotPublic.

    botocore has no setting for either, so this replaces parts of its HTTP session (`URLLib3Session`). Raises GuardMissing.
    """
    try:
        session = client._endpoint.http_session
        session._manager.pool_classes_by_scheme = public_pools(session._manager.pool_classes_by_scheme)
        _ = session._proxy_config  # where it is gone, setting it would do nothing
        session._proxy_config = ProxyConfiguration()  # a proxy would look the name up itself
        pools = [session._manager.connection_from_url(f"{scheme}://127.0.0.1:1") for scheme in ("http", "https")]
    except AttributeError as error:
        raise GuardMissing("the bucket of a job") from error
    if not all(issubclass(cast("Any", pool).ConnectionCls, _PublicOnly) for pool in pools):
        raise GuardMissing("the bucket of a job")
    client.meta.events.register_first("needs-retry", _do_not_retry)


def _do_not_retry(caught_exception: Exception | None = None, **_: Any) -> None:
    """Pass NotPublic on. botocore wraps what it does not know into an HTTPClientError, and retries."""
    cause = getattr(caught_exception, "kwargs", {}).get("error")
    if isinstance(cause, NotPublic):
        raise cause


# Responses that are read through a file of the caller's


def watched_pools(pools: Pools, watch: Callable[[socket.socket, Any], Any]) -> Pools:
    """The same pools. Every response reads its headers and its body through the file that `watch(socket, its file)` returns."""
    response_class = staticmethod(partial(_WatchedResponse, watch=watch))
    return {scheme: _with_connection(pool, "Watched", response_class=response_class) for scheme, pool in pools.items()}


class _WatchedResponse(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, watch: Callable[[socket.socket, Any], Any], **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = watch(sock, self.fp.detach())


def check_watched(response: requests.Response) -> None:
    """Raises GuardMissing when the response is not read through the caller's file."""
    if not isinstance(getattr(response.raw, "_original_response", None), _WatchedResponse):
        response.close()
        raise GuardMissing("a slow download")

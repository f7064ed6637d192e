"""Which addresses the worker may reach for a client, and connections that reach no others.

A client names hosts: of LoRAs, of control images, of buckets. The worker stands in a network where more than the client can
see answers it: cloud metadata, databases, other workers. So a connection looks its name up once, refuses the name unless
every address is public, and then connects to exactly what was checked. The name still goes into the Host header and is what
the certificate must bear.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from itertools import zip_longest
from typing import Any, cast

from botocore.httpsession import ProxyConfiguration
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

_ADDRESSES = 4
"""How many addresses of a name are tried, IPv6 and IPv4 in turn: where one of the two does not work, the other does."""

_NOT_PUBLIC = [
    # Not `ipaddress.is_global`, whose answer depends on the version of Python. Source: the IANA special-purpose registries.
    ip_network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared by the customers of a provider
        "127.0.0.0/8",  # this machine
        "168.63.129.16/32",  # the host of an Azure machine, for that machine alone
        "169.254.0.0/16",  # link-local, and cloud metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # relays to 6to4
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
        "2001::/23",  # protocol assignments: Teredo, benchmarks, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: an IPv4 address inside, behind a relay
        "3ffe::/16",  # the 6bone, given back
        "3fff::/20",  # documentation
    )
]
_IPV6_UNICAST = ip_network("2000::/3")
"""All that is assigned so far; ::1, fc00::/7, fe80::/10, fec0::/10, ff00::/8 and ::a.b.c.d lie outside."""
_NAT64 = ip_network("64:ff9b::/96")
"""How a network without IPv4 reaches the IPv4 address in the last 32 bits."""


class NotPublic(Exception):
    """A name or address was refused. Nothing has been sent to it."""

    def __init__(self) -> None:
        super().__init__(
            "the address is not public; use a public one (ALLOW_PRIVATE_DOWNLOADS=1 allows others, for a local machine only)"
        )


def is_public(address: str) -> bool:
    """Whether an IP address is unicast and reachable from everywhere; of an IPv4 address inside IPv6, whether that is."""
    ip: IPv4Address | IPv6Address = ip_address(address)
    if isinstance(ip, IPv6Address):
        if ip.ipv4_mapped or ip in _NAT64:
            return is_public(str(IPv4Address(ip.packed[-4:])))
        if ip not in _IPV6_UNICAST or ip.scope_id:
            return False
    return not any(ip in network for network in _NOT_PUBLIC)


class _PublicOnly(HTTPConnection):
    """A connection to a public address, whatever the name says the next time it is looked up. Raises NotPublic."""

    def _new_conn(self) -> socket.socket:
        try:
            found = socket.getaddrinfo(self._dns_host.strip("[]"), self.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise NewConnectionError(self, "the name has no address") from error
        if not all(is_public(str(address[0])) for *_, address in found):
            raise NotPublic
        failure: OSError = OSError("the name has no address")
        by_family = [[each for each in found if each[0] == family] for family in dict.fromkeys(each[0] for each in found)]
        in_turn = [each for turn in zip_longest(*by_family) for each in turn if each]
        for family, kind, protocol, _, address in in_turn[:_ADDRESSES]:
            connection = socket.socket(family, kind, protocol)
            try:
                for option in self.socket_options or ():
                    connection.setsockopt(*option)
                connection.settimeout(self.timeout)
                connection.connect(address)
            except OSError as error:
                connection.close()
                failure = error
            else:
                return connection
        if isinstance(failure, TimeoutError):
            raise ConnectTimeoutError(self, "no address of the name answers in time") from failure
        raise NewConnectionError(self, "no address of the name answers") from failure


Pools = Mapping[str, type[HTTPConnectionPool]]
"""Connection pools by scheme, as in urllib3's `PoolManager.pool_classes_by_scheme`."""


def public_pools(pools: Pools) -> Pools:
    """The same pools, with connections to public addresses only."""
    return {scheme: _public_pool(pool) for scheme, pool in pools.items()}


def _public_pool(pool: type[HTTPConnectionPool]) -> type[HTTPConnectionPool]:
    connection = type("PublicConnection", (_PublicOnly, cast("Any", pool.ConnectionCls)), {})
    return cast("type[HTTPConnectionPool]", type("PublicPool", (pool,), {"ConnectionCls": connection}))


def public_only(client: Any) -> None:
    """Make a boto3 client reach public addresses only. What it then refuses, it refuses at once, with NotPublic.

    botocore has no setting for either, so this replaces what its HTTP session (`URLLib3Session`) keeps to itself.
    """
    session = client._endpoint.http_session
    session._manager.pool_classes_by_scheme = public_pools(session._manager.pool_classes_by_scheme)
    session._proxy_config = ProxyConfiguration()  # a proxy would look the name up itself
    client.meta.events.register_first("needs-retry", _do_not_retry)


def _do_not_retry(caught_exception: Exception | None = None, **_: Any) -> None:
    """botocore wraps what it does not know into an HTTPClientError, and tries again."""
    cause = getattr(caught_exception, "kwargs", {}).get("error")
    if isinstance(cause, NotPublic):
        raise cause

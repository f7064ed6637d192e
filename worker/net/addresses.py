"""Which addresses the worker may connect to for a client, and connections that reach no others.

A client names hosts: of LoRAs, of control images, of buckets. The worker's network has hosts that the client must not reach:
cloud metadata, databases, other workers. So a connection looks up the name once, refuses it unless every address is public, and
then connects to exactly the address that it checked. The name is still sent as the Host header, and the certificate must be
valid for it.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from itertools import zip_longest
from typing import Any

_ADDRESSES = 4
"""How many addresses of a name to try, IPv6 and IPv4 alternating: if one of the two does not work, the other may."""

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
"""All unicast addresses assigned so far; ::1, fc00::/7, fe80::/10, fec0::/10, ff00::/8 and ::a.b.c.d are outside."""
_NAT64 = ip_network("64:ff9b::/96")
"""A network without IPv4 reaches IPv4 addresses through these; the last 32 bits are the IPv4 address."""


class NotPublic(Exception):
    """A name or address was refused. Nothing was sent to it."""

    def __init__(self) -> None:
        super().__init__(
            "the address is not public; use a public one (ALLOW_PRIVATE_DOWNLOADS=1 allows others, for a local machine only)"
        )


def is_public(address: str) -> bool:
    """Return whether an IP address is unicast and public. For an IPv6 address with an IPv4 address in it, the latter counts."""
    ip: IPv4Address | IPv6Address = ip_address(address)
    if isinstance(ip, IPv6Address):
        if ip.ipv4_mapped or ip in _NAT64:
            return is_public(str(IPv4Address(ip.packed[-4:])))
        if ip not in _IPV6_UNICAST or ip.scope_id:
            return False
    return not any(ip in network for network in _NOT_PUBLIC)


class NoConnection(Exception):
    """No address of a name accepted a connection. The cause is a TimeoutError if the last one did not answer."""


def connect(host: str, port: int, timeout: float | None, options: Iterable[Any]) -> socket.socket:
    """Connect to the public addresses of `host`, one after the other. Raises NotPublic, NoConnection.

    The name is looked up once, so the checked address is the one connected to. `options` are those of `socket.setsockopt`.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise NoConnection("the name has no address") from error
    if not all(is_public(str(address[0])) for *_, address in found):
        raise NotPublic
    failure: OSError = OSError("the name has no address")
    by_family = [[each for each in found if each[0] == family] for family in dict.fromkeys(each[0] for each in found)]
    alternating = [each for group in zip_longest(*by_family) for each in group if each]
    for family, kind, protocol, _, address in alternating[:_ADDRESSES]:
        connection = socket.socket(family, kind, protocol)
        try:
            for option in options:
                connection.setsockopt(*option)
            connection.settimeout(timeout)
            connection.connect(address)
        except OSError as error:
            connection.close()
            failure = error
        else:
            return connection
    raise NoConnection("no address of the name answers") from failure

"""Find the address of a client, also behind proxies.

Anybody can send ``X-Forwarded-For``. It counts only as far as trusted proxies have written it: each
appends the address of the connection that it has received, so the header is read from its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, TypeAlias

from starlette.types import Scope

from incidentkit.domain.errors import InvalidSettings

Address: TypeAlias = IPv4Address | IPv6Address

FORWARDED_FOR: Final = b"x-forwarded-for"

UNIX: Final = "unix"
"""Stands for the proxy at the other end of a Unix socket, which has no address."""

MAX_HOPS: Final = 20
"""Maximum number of addresses that are read from the end of the headers."""

KNOWN: Final = 1024
"""Size of the LRU cache of peers, trusted or not."""

_SCOPE_KEY: Final = "incidentkit.client_address"


class TrustedProxies:
    """The proxies whose ``X-Forwarded-For`` is trusted.

    Args:
        proxies: Their addresses and networks, such as ``10.0.0.7`` and ``10.0.0.0/8``, and
            ``unix`` for the other end of a Unix socket. Empty: the header never counts.

    Raises:
        InvalidSettings: If one of them is something else.
    """

    def __init__(self, proxies: Iterable[str] = ()) -> None:
        given = [proxy.strip() for proxy in proxies]
        self._unix = UNIX in given
        self._networks = [_network(proxy) for proxy in given if proxy != UNIX]
        self._trusts = lru_cache(KNOWN)(self._is_in_network)

    def __bool__(self) -> bool:
        return self._unix or bool(self._networks)

    def find_client(self, scope: Scope) -> None:
        """Put the client's address into the scope of a request, for :func:`client_address`."""
        peer = _peer(scope)
        if self._unix if peer is None else self._trusts(peer):
            scope[_SCOPE_KEY] = self._forwarded(peer, scope)

    def _forwarded(self, nearest: str | None, scope: Scope) -> str | None:
        """Return the last untrusted address, or the first address if all are trusted."""
        for hop in reversed(_hops(scope["headers"])[-MAX_HOPS:]):
            address = read_address(hop)
            if address is None:
                # A proxy hides the address, so nothing before it can be trusted.
                break
            nearest = str(address)
            if not self._trusts(nearest):
                break
        return nearest

    def _is_in_network(self, text: str) -> bool:
        address = read_address(text)
        return address is not None and any(address in network for network in self._networks)


def client_address(scope: Scope) -> str | None:
    """Return the IP address of a request's client; None if it is unknown, as on a Unix socket."""
    found: str | None = scope.get(_SCOPE_KEY)
    return _peer(scope) if found is None else found


def _peer(scope: Scope) -> str | None:
    peer = scope.get("client")
    return peer[0] if peer is not None and peer[0] else None


def read_address(text: str) -> Address | None:
    """Return the IP address in a text, which may have a port; None if there is none.

    An IPv4-mapped IPv6 address becomes the IPv4 address; a zone is dropped.
    """
    text = text.strip().strip('"')
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return address if mapped is None else mapped


def _hops(headers: Iterable[tuple[bytes, bytes]]) -> Sequence[str]:
    values = [value.decode("latin-1") for name, value in headers if name == FORWARDED_FOR]
    return [] if not values else ",".join(values).split(",")


def _network(proxy: str) -> IPv4Network | IPv6Network:
    try:
        return ip_network(proxy, strict=False)
    except ValueError:
        reason = (
            f"must be IP addresses, networks such as 10.0.0.0/8, or {UNIX}, separated by commas"
        )
        raise InvalidSettings("trusted_proxies", reason) from None

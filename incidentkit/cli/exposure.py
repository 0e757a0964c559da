"""Control access to the service at an address, by tokens and host names."""

from __future__ import annotations

import socket
from collections.abc import Coroutine
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any, TypeVar

from starlette.applications import Starlette

from incidentkit.cli.failures import Refused
from incidentkit.cli.listening import Address, Tcp, Unix
from incidentkit.cli.text import harmless
from incidentkit.client import IncidentClient
from incidentkit.http.app import create_app
from incidentkit.http.authentication import Anonymous, TokenAuth
from incidentkit.http.bounds import Bounds
from incidentkit.http.browsers import LOOPBACK, BrowserGuard
from incidentkit.settings import Settings
from incidentkit.store import AccessTokens
from incidentkit.store.sqlite.url import in_memory

_T = TypeVar("_T")


def is_local(address: Address, inherited: socket.socket | None = None) -> bool:
    """Return whether only programs on this machine can reach an address.

    Args:
        address: Where the service listens.
        inherited: The socket of an :class:`~incidentkit.cli.listening.Inherited`.
    """
    if isinstance(address, Unix):
        return True
    if isinstance(address, Tcp):
        return is_loopback(address.host)
    if inherited is None:
        return False
    if inherited.family in (socket.AF_INET, socket.AF_INET6):
        return is_loopback(inherited.getsockname()[0])
    return inherited.family == getattr(socket, "AF_UNIX", None)


def is_loopback(host: str) -> bool:
    """Return whether a host is a loopback address or ``localhost``."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def check_exposure(
    client: IncidentClient, settings: Settings, address: Address, *, local: bool
) -> None:
    """Refuse to serve on an address that others can reach without tokens.

    Args:
        client: A client whose store is open.
        settings: Whether anonymous callers are allowed.
        address: Where the service listens.
        local: Whether only programs on this machine reach the address.

    Raises:
        Refused: With the command to run.
        StoreError: If the account may not read the tokens.
    """
    if settings.allow_anonymous:
        return
    now = datetime.now(UTC)
    # Also for a local address: a missing privilege must fail here, not in each request.
    active = any(token.active(now) for token in await AccessTokens(_Opened(client.store)).list())
    if active or local:
        return
    danger = f"anyone who can reach {_name(address)} could read and change incidents"
    anonymous = "allow anonymous callers with --allow-anonymous"
    if in_memory(settings.database_url):
        raise Refused([f"{danger}, since a database in memory has no tokens: {anonymous}"])
    command = "`incidentkit token create NAME --scope read --scope write`"
    lack = "since there is no active token"
    raise Refused([f"{danger}, {lack}: create one with {command}, or {anonymous}"])


def _name(address: Address) -> str:
    if isinstance(address, Tcp):
        return harmless(address.host)
    return harmless(address.path) if isinstance(address, Unix) else f"the socket {address.fd}"


def exposed_app(
    client: IncidentClient, settings: Settings, *, local: bool, metrics: bool = False
) -> Starlette:
    """Return the app as it is served at an address.

    Args:
        client: Runs the operations.
        settings: How the service is configured.
        local: Whether only programs on this machine reach the address. Anonymous callers are then
            allowed until there is a first token.
        metrics: Whether ``/metrics`` is served.
    """
    anonymous: Anonymous = "until_token" if local else "never"
    if settings.allow_anonymous:
        anonymous = "always"
    app = create_app(
        client,
        request_log=settings.request_log,
        cache_required=settings.redis_required,
        stream_lifetime=settings.stream_lifetime,
        cors=settings.cors_origins,
        metrics=metrics,
        authenticate=TokenAuth(client, anonymous=anonymous),
        bounds=Bounds(
            requests=settings.requests_per_token,
            readers=settings.readers_per_token,
            searches=settings.searches_per_token,
        ),
        trusted_proxies=settings.trusted_proxies,
    )
    checks_hosts = local or settings.allowed_hosts
    hosts = {*LOOPBACK, *settings.allowed_hosts} if checks_hosts else None
    origins = {*settings.allowed_hosts, *settings.cors_origins}
    app.add_middleware(BrowserGuard, hosts=hosts, origins=origins)
    return app


class _Opened:
    """Adapts an open store to :class:`~incidentkit.store.AccessTokens`, without a client."""

    def __init__(self, store: object) -> None:
        self.store = store

    async def write(self, write: Coroutine[Any, Any, _T]) -> _T:
        return await write

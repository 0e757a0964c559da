"""Decide who reaches the service at an address: with which tokens, and under which hosts."""

from __future__ import annotations

from collections.abc import Coroutine
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any, TypeVar

from starlette.applications import Starlette

from incidentkit.cli.failures import Refused
from incidentkit.client import IncidentClient
from incidentkit.http.app import create_app
from incidentkit.http.authentication import Anonymous, TokenAuth
from incidentkit.http.browsers import LOOPBACK, BrowserGuard
from incidentkit.settings import Settings
from incidentkit.store import AccessTokens
from incidentkit.store.sqlite.url import in_memory

_T = TypeVar("_T")


def is_loopback(host: str) -> bool:
    """Return whether only programs on this machine reach an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def check_exposure(settings: Settings, host: str, client: IncidentClient) -> None:
    """Raise if everybody who reaches an address could read and change incidents.

    Args:
        settings: Whether anonymous callers are let in on purpose.
        host: The address to listen on.
        client: A client whose store is open.

    Raises:
        Refused: With the command to run.
        StoreError: If the account may not read the tokens.
    """
    if settings.allow_anonymous:
        return
    now = datetime.now(UTC)
    # Read on loopback too: otherwise each request would fail for want of a privilege.
    active = any(token.active(now) for token in await AccessTokens(_Opened(client.store)).list())
    if active or is_loopback(host):
        return
    danger = f"everybody who reaches {host} could read and change incidents"
    anonymous = "let anonymous callers in with --allow-anonymous"
    if in_memory(settings.database_url):
        raise Refused([f"{danger}, since a database in memory has no tokens: {anonymous}"])
    command = "`incidentkit token create NAME --scope read --scope write`"
    lack = "since there is no active token"
    raise Refused([f"{danger}, {lack}: create one with {command}, or {anonymous}"])


def exposed_app(settings: Settings, host: str) -> Starlette:
    """Return the app as it is served at an address.

    On loopback, anonymous callers are let in until there is a first token.
    """
    client = IncidentClient.from_settings(settings)
    anonymous: Anonymous = "until_token" if is_loopback(host) else "never"
    if settings.allow_anonymous:
        anonymous = "always"
    app = create_app(
        client,
        request_log=settings.request_log,
        cache_required=settings.redis_required,
        authenticate=TokenAuth(client, anonymous=anonymous),
        trusted_proxies=settings.trusted_proxies,
    )
    checks_hosts = is_loopback(host) or settings.allowed_hosts
    hosts = {*LOOPBACK, *settings.allowed_hosts} if checks_hosts else None
    app.add_middleware(BrowserGuard, hosts=hosts, origins=settings.allowed_hosts)
    return app


class _Opened:
    """Reads tokens from an open store, without a client around it."""

    def __init__(self, store: object) -> None:
        self.store = store

    async def write(self, write: Coroutine[Any, Any, _T]) -> _T:
        return await write

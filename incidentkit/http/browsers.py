"""Refuse requests that a web page of somebody else makes a browser send.

A browser on the service's machine, or in its network, reaches the service from any page that it
shows. A page whose host name leads to the service's address (DNS rebinding) is known by its host;
any other one by its origin, or by what the browser says of it.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Final
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from incidentkit.http.log import NO_ROUTE, log_answer
from incidentkit.http.principals import STRANGER
from incidentkit.http.problems import Kind, Refusal, problem_response

LOOPBACK: Final = frozenset(("localhost", "127.0.0.1", "[::1]"))
"""The hosts of a service that listens on loopback."""

PROBES: Final = frozenset(("/health/live", "/health/ready"))
"""The paths that any host may ask for, without details: a probe takes the address of a container as
the host."""

SAFE: Final = frozenset(("GET", "HEAD", "OPTIONS"))

_HEADERS: Final = frozenset(
    (b"host", b"origin", b"sec-fetch-site", b"sec-fetch-mode", b"sec-fetch-dest")
)


class BrowserGuard:
    """Passes on the requests that the service's own pages, and programs, send.

    Args:
        app: Takes the other requests.
        hosts: The hosts that lead to the service, in lower case, with a port or for all ports.
            None: any host.
        origins: Pages that count as the service's own besides: their hosts, as behind a proxy that
            changes the host, or their origins; ``*`` is any.
    """

    def __init__(
        self, app: ASGIApp, hosts: Collection[str] | None = None, origins: Collection[str] = ()
    ) -> None:
        self._app = app
        self._hosts = None if hosts is None else frozenset(hosts)
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request = Request(scope, receive, send)
        response = problem_response(request, refusal)
        log_answer(request, NO_ROUTE, response, started)
        await response(scope, receive, send)

    def _refusal(self, scope: Scope) -> Refusal | None:
        sent = _read(scope)
        host = sent.get(b"host", "")
        if self._hosts is not None and not self._is_own(host):
            if scope["path"] not in PROBES:
                detail = "The service does not answer for this host"
                return Refusal(Kind.MISDIRECTED_REQUEST, detail)
            scope[STRANGER] = True
        origin = sent.get(b"origin", "")
        own = not origin or self._is_known(origin) or _authority(origin) == host
        if not own and scope["method"] not in SAFE:
            return Refusal(Kind.FOREIGN_ORIGIN, "A page of another origin may not change anything")
        foreign = sent.get(b"sec-fetch-site") == "cross-site"
        if foreign and not (own and origin) and not _navigates(scope, sent):
            detail = "A page of another site may not send this request"
            return Refusal(Kind.CROSS_SITE_REQUEST, detail)
        return None

    def _is_known(self, origin: str) -> bool:
        return not self._origins.isdisjoint((origin, _authority(origin), "*"))

    def _is_own(self, host: str) -> bool:
        return self._hosts is not None and (host in self._hosts or _name(host) in self._hosts)


def _read(scope: Scope) -> Mapping[bytes, str]:
    """Return the headers that the guard looks at, in lower case.

    Several hosts in one request are no host that the service has.
    """
    sent: dict[bytes, str] = {}
    for name, value in scope["headers"]:
        if name in _HEADERS:
            text = value.strip(b" \t").decode("latin-1").lower()
            sent[name] = f"{sent[name]}, {text}" if name in sent else text
    return sent


def _authority(origin: str) -> str | None:
    """Return the host and the port of an origin; None if it has none."""
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None


def _name(host: str) -> str:
    """Return the host without its port."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


def _navigates(scope: Scope, sent: Mapping[bytes, str]) -> bool:
    """Return whether somebody follows a link: the page that has it sees nothing of the answer."""
    return (
        scope["method"] in SAFE
        and sent.get(b"sec-fetch-mode") == "navigate"
        and sent.get(b"sec-fetch-dest") == "document"
    )

"""Refuse requests that a foreign web page makes a browser send.

Any page in a browser on the service's machine, or in its network, can send requests to the service.
The host of a request reveals a page whose host name resolves to the service (DNS rebinding);
``Origin`` and ``Sec-Fetch-*`` reveal any other foreign page.
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
from incidentkit.http.problems import Refusal, problem_response
from incidentkit.wire.kinds import Kind

LOOPBACK: Final = frozenset(("localhost", "127.0.0.1", "[::1]"))
"""The hosts of a service that listens on loopback."""

PROBES: Final = frozenset(("/health/live", "/health/ready"))
"""The paths that are answered for any host, without details: probes send a container's address."""

SAFE: Final = frozenset(("GET", "HEAD", "OPTIONS"))

_OTHER_HOST: Final = "The service does not answer for this host: add it with --allowed-host"
_OTHER_ORIGIN: Final = "A page of another origin may not write: allow its origin with --cors-origin"

_HEADERS: Final = frozenset(
    (b"host", b"origin", b"sec-fetch-site", b"sec-fetch-mode", b"sec-fetch-dest")
)


class BrowserGuard:
    """Refuses requests for other hosts, and from pages of other sites.

    Args:
        app: Answers the requests that pass.
        hosts: The hosts that lead to the service, in lower case, with a port or for all ports.
            None: any host.
        origins: Further pages to trust, by origin or by host, as behind a proxy that changes the
            host; ``*`` is any.
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
                return Refusal(Kind.MISDIRECTED_REQUEST, _OTHER_HOST)
            scope[STRANGER] = True
        origin = sent.get(b"origin", "")
        own = not origin or self._is_known(origin) or _authority(origin) == host
        if not own and scope["method"] not in SAFE:
            return Refusal(Kind.FOREIGN_ORIGIN, _OTHER_ORIGIN)
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
    """Return whether the user follows a link; the page with the link cannot read the answer."""
    return (
        scope["method"] in SAFE
        and sent.get(b"sec-fetch-mode") == "navigate"
        and sent.get(b"sec-fetch-dest") == "document"
    )

"""The outermost layer of the app: every answer leaves through it, with the common headers."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Final

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from incidentkit.http.client_address import TrustedProxies
from incidentkit.http.problems import problem_response
from incidentkit.http.request_id import NAME, request_id
from incidentkit.version import API_VERSION, API_VERSION_HEADER

NO_STORE: Final = (b"cache-control", b"no-store")
"""Keeps an answer out of every cache, unless it has a Cache-Control of its own."""

NO_SNIFF: Final = (b"x-content-type-options", b"nosniff")
"""Keeps a browser from guessing another type of content than the declared one."""

VERSION: Final = (API_VERSION_HEADER.lower().encode(), API_VERSION.encode())
"""Tells a client whether it fits the service."""


class Envelope:
    """Puts the common headers on every answer, and answers errors that nothing else has answered.

    The headers are the id of the request, the version of the API, and those that keep caches and
    browsers from being too clever.

    Such an error comes from a middleware or a route of a host: operations answer their own. It is
    raised again once it is answered, as by Starlette, so that the server logs it too.

    Args:
        app: The app behind all its middleware.
        proxies: The proxies whose word for a client's address counts; None: there is none.
    """

    def __init__(self, app: ASGIApp, proxies: TrustedProxies | None = None) -> None:
        self._app = app
        self._proxies = proxies or None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False
        # Made before anything else, since a middleware may pass a copy of the scope on.
        common = (NAME, request_id(scope).encode()), VERSION, NO_STORE, NO_SNIFF
        if self._proxies is not None:
            self._proxies.find_client(scope)

        def send_with_headers(message: Message) -> Awaitable[None]:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = message["headers"] = list(message.get("headers", ()))
                # A host's middleware may have put its own there.
                given = dict(headers)
                headers.extend(each for each in common if each[0] not in given)
            return send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            if not started:
                await problem_response(Request(scope), error)(scope, receive, send_with_headers)
            raise

"""The outermost layer of the app: every answer leaves through it."""

from __future__ import annotations

from collections.abc import Awaitable

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from incidentkit.http.client_address import TrustedProxies
from incidentkit.http.problems import problem_response
from incidentkit.http.request_id import NAME, request_id


class Envelope:
    """Puts the request's id on every answer, and answers errors that nothing else has answered.

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
        id_ = NAME, request_id(scope).encode()
        if self._proxies is not None:
            self._proxies.find_client(scope)

        def send_with_id(message: Message) -> Awaitable[None]:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = message["headers"] = list(message.get("headers", ()))
                # A host's middleware may have put its own id there.
                if NAME not in dict(headers):
                    headers.append(id_)
            return send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            if not started:
                await problem_response(Request(scope), error)(scope, receive, send_with_id)
            raise

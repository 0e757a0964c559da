"""The id of a request, which its answer, its problem and its record in the log carry."""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING, Final

from starlette.datastructures import MutableHeaders

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER: Final = "X-Request-ID"
NAME: Final = b"x-request-id"
"""The header as ASGI has it."""

PATTERN: Final = "[A-Za-z0-9._-]{1,64}"

_SCOPE_KEY: Final = "incidentkit.request_id"
_ID: Final = re.compile(PATTERN)


def request_id(scope: Scope) -> str:
    """Return the id in the request's ``X-Request-ID`` if it is one of ours, else a new one."""
    known: str | None = scope.get(_SCOPE_KEY)
    if known is None:
        # It is to be unique, not to be a secret.
        known = _given(scope["headers"]) or f"{random.getrandbits(128):032x}"
        scope[_SCOPE_KEY] = known
    return known


def _given(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    for name, value in headers:
        if name == NAME:
            given = value.decode("latin-1")
            return given if _ID.fullmatch(given) else None
    return None


class RequestIdMiddleware:
    """Puts the request's id on its answer, whatever that is."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id(scope)
            await send(message)

        await self._app(scope, receive, send_with_id)

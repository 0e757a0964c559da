"""uvicorn's HTTP protocol: sends an answer in one piece, and offers its hooks to streams.

uvicorn writes the head of an answer and then its body, each with a system call, which takes longer
than all the Python code in between. Here, everything written in one turn of the event loop goes out
at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, cast

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT

from incidentkit.http.server_hooks import EXTENSION, ServerHooks


class JoiningTransport:
    """Joins the writes of one turn of the event loop, and passes everything else on.

    Args:
        transport: The transport of the connection.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._waiting: list[bytes] = []
        self._size = 0
        # An attribute, since every answer calls it and __getattr__ is slow.
        self.is_closing = transport.is_closing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Write the data in this turn of the event loop, together with the rest of the turn."""
        if not self._waiting:
            self._loop.call_soon(self._flush)
        self._waiting.append(data)
        self._size += len(data)
        # No more than fits into uvicorn's own buffer, so that it notices a slow reader.
        if self._size > HIGH_WATER_LIMIT:
            self._flush()

    def close(self) -> None:
        """Write the waiting data, and close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._waiting:
            data = b"".join(self._waiting)
            self._waiting.clear()
            self._size = 0
            # The client may have disconnected since.
            if not self._transport.is_closing():
                self._transport.write(data)


# uvicorn declares it as a plain asyncio.Protocol, without what its protocols have in common.
_Protocol: Any = AutoHTTPProtocol


class Protocol(_Protocol):  # type: ignore[misc]
    """uvicorn's protocol on a :class:`JoiningTransport`, with the hooks of a server for streams.

    See :mod:`incidentkit.http.server_hooks`.
    """

    app: ASGIApp

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._stopping = asyncio.Event()
        self._hooks: ServerHooks = {"stopping": self._stopping}
        # uvicorn calls the app of the protocol for each request on the connection.
        self.app = _with_hooks(self.app, self._hooks)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the new connection."""
        joining: Any = JoiningTransport(cast("asyncio.Transport", transport))
        self._hooks["abort"] = joining.abort
        super().connection_made(joining)

    def shutdown(self) -> None:
        """Begin to stop; uvicorn calls this on each connection when it shuts down."""
        self._stopping.set()
        super().shutdown()


def _with_hooks(app: ASGIApp, hooks: ServerHooks) -> ASGIApp:
    # Not a method: a protocol that refers to itself would outlive its connection.
    def offer(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        scope.setdefault("extensions", {})[EXTENSION] = hooks
        return app(scope, receive, send)

    return offer

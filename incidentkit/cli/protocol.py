"""uvicorn's HTTP protocol, which sends an answer in one piece.

uvicorn writes the head of an answer and then its body, each with a call of the system, which takes
longer than all that Python does in between. Here what is written in one turn of the event loop goes
out at once.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT


class JoiningTransport:
    """A transport that joins the writes of one turn of the event loop; all else is as it was.

    Args:
        transport: Where they go.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._waiting: list[bytes] = []
        self._size = 0
        # What every answer asks.
        self.is_closing = transport.is_closing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Take what is to be written."""
        if not self._waiting:
            self._loop.call_soon(self._flush)
        self._waiting.append(data)
        self._size += len(data)
        # Not more than fits in uvicorn's own buffer, so that it notices a slow reader.
        if self._size > HIGH_WATER_LIMIT:
            self._flush()

    def close(self) -> None:
        """Write what waits, and close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._waiting:
            data = b"".join(self._waiting)
            self._waiting.clear()
            self._size = 0
            # The client may have gone since.
            if not self._transport.is_closing():
                self._transport.write(data)


class Protocol(AutoHTTPProtocol):  # type: ignore[valid-type,misc]
    """uvicorn's protocol on such a transport."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin with a connection."""
        joining: Any = JoiningTransport(cast("asyncio.Transport", transport))
        super().connection_made(joining)

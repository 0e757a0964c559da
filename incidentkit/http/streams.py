"""Server-sent events: changes, as they happen, to readers that may be slow or gone."""

from __future__ import annotations

import asyncio
import logging
import signal
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

from starlette.responses import Response

from incidentkit.domain.errors import IncidentKitError
from incidentkit.http.problems import RETRY_HEADERS, Refusal
from incidentkit.wire import encode_event

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator
    from contextlib import ExitStack

    from starlette.types import Receive, Scope, Send

    from incidentkit.client import IncidentClient
    from incidentkit.domain.values import ChangePage

_T = TypeVar("_T")

logger = logging.getLogger("incidentkit.http")

MEDIA_TYPE: Final = "text/event-stream"

MAX_READERS: Final = 100
"""Streams, and polls that wait, that an app serves at a time."""

BATCH: Final = 100
"""Changes that are in memory for one reader."""

HEARTBEAT: Final = 15.0
"""Seconds without a change after which a stream says that it is still there."""

SEND_TIMEOUT: Final = 30.0
"""Seconds after which a reader that takes nothing is given up."""

END_TIMEOUT: Final = 1.0
"""Seconds in which a reader has to take the end of its stream, or loses its connection."""

RETRY: Final = 2
"""Seconds after which a browser is told to connect again."""

LOOK: Final = 0.25
"""Seconds between two looks whether the server is about to stop."""


class Readers:
    """Those who wait for changes: how many there are, and that they have to go.

    A server waits for its connections before it stops, and streams never end by themselves. While
    there are any, this looks whether uvicorn, which handles the process's signals, has been told to
    stop.
    """

    def __init__(self) -> None:
        self._places = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._watch: asyncio.Task[None] | None = None

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place.

        Raises:
            Refusal: If there is none.
        """
        if self._places >= MAX_READERS:
            detail = f"{MAX_READERS} readers wait for changes already"
            raise Refusal(503, detail, headers=RETRY_HEADERS)
        self._places += 1
        try:
            yield
        finally:
            self._places -= 1

    async def run(self, work: Coroutine[Any, Any, _T], receive: Receive | None = None) -> _T | None:
        """Return what a reader's work returns, or None if the server is about to stop.

        Nor is it done once the reader is gone.

        Args:
            work: What the reader waits for.
            receive: What tells that the reader is gone; None means that the work is cancelled then.
        """
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        if self._watch is None or self._watch.done():
            self._watch = asyncio.ensure_future(self._end_with_the_server())
        ends = {task} if receive is None else {task, asyncio.ensure_future(_gone(receive))}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._tasks.discard(task)
            for end in ends:
                end.cancel()
            await asyncio.wait(ends)
        return None if task.cancelled() else task.result()

    async def _end_with_the_server(self) -> None:
        while self._tasks:
            if _server_stops():
                for task in self._tasks:
                    task.cancel()
                return
            await asyncio.sleep(LOOK)


def _server_stops() -> bool:
    """Return whether uvicorn runs this process and was told to stop."""
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return bool(getattr(server, "should_exit", False))


class ChangeStream(Response):
    """Changes as server-sent events, for as long as the reader takes them.

    Args:
        client: Whose changes.
        readers: Where it waits.
        page: The first of them.
        place: What it holds until it ends.
    """

    media_type = MEDIA_TYPE

    def __init__(
        self, client: IncidentClient, readers: Readers, page: ChangePage, place: ExitStack
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._client = client
        self._readers = readers
        self._page = page
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send until the reader is gone, too slow, or the server or the client stops."""
        with self._place:
            await self._stream(receive, send)

    async def _stream(self, receive: Receive, send: Send) -> None:
        stream = asyncio.ensure_future(self._run(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({stream, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not gone.done() and stream.exception() is None and not stream.result():
                _abort(receive)
                await asyncio.wait({gone}, timeout=END_TIMEOUT)
        finally:
            for task in (stream, gone):
                task.cancel()
            await asyncio.wait({stream, gone})
        if not stream.cancelled() and (error := stream.exception()) is not None:
            raise error

    async def _run(self, send: Send) -> bool:
        """Send, and return whether the reader has taken it all."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            with suppress(IncidentKitError):
                await self._readers.run(self._send_changes(send))
            async with asyncio.timeout(END_TIMEOUT):
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            logger.warning("A reader of changes was too slow")
            return False
        except OSError:
            return False
        return True

    async def _send_changes(self, send: Send) -> None:
        page = self._page
        await self._send(send, f"retry: {RETRY * 1000}\n\n".encode())
        while True:
            await self._send(send, _frames(page) or _sign_of_life(page))
            page = await self._client.read_changes(page.next, limit=BATCH, wait=HEARTBEAT)

    async def _send(self, send: Send, body: bytes) -> None:
        async with asyncio.timeout(SEND_TIMEOUT):
            await send({"type": "http.response.body", "body": body, "more_body": True})


def _frames(page: ChangePage) -> bytes:
    return b"".join(
        b"id: %b\nevent: %b\ndata: %b\n\n"
        % (event.cursor.encode(), event.kind.value.encode(), encode_event(event))
        for event in page.changes
    )


def _sign_of_life(page: ChangePage) -> bytes:
    # Whoever began with the latest has to know which that was, to resume behind it.
    id_ = b"" if page.next is None else b"id: %b\n" % page.next.encode()
    return id_ + b": nothing new\n\n"


def _abort(receive: Receive) -> None:
    """Let uvicorn drop a connection with what is still to be sent on it.

    ASGI has no word for it, and uvicorn would wait for the reader, also before it stops. Where
    somebody else is behind `receive`, nothing is done.
    """
    transport = getattr(getattr(receive, "__self__", None), "transport", None)
    abort = getattr(transport, "abort", None)
    if callable(abort):
        abort()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

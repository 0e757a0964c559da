"""Stream changes as server-sent events, to readers that may be slow or gone."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack, contextmanager, suppress
from math import inf
from typing import Any, Final, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from incidentkit.batching import Coalescer
from incidentkit.client import IncidentClient
from incidentkit.domain.errors import IncidentKitError, StoreError
from incidentkit.domain.values import ChangePage, FeedBlocker
from incidentkit.http.principals import still_admitted
from incidentkit.http.problems import RETRY_HEADERS, Refusal
from incidentkit.http.server_hooks import abort, wait_for_stop
from incidentkit.wire import encode_event, wire_converter

_T = TypeVar("_T")

logger = logging.getLogger("incidentkit.http")

MEDIA_TYPE: Final = "text/event-stream"

MAX_READERS: Final = 100
"""Maximum number of streams and waiting polls of an app."""

BATCH: Final = 100
"""Maximum number of changes in memory for one reader."""

HEARTBEAT: Final = 15.0
"""Seconds without a change after which a stream sends a comment."""

SEND_TIMEOUT: Final = 30.0
"""Seconds after which a reader that receives nothing is dropped."""

END_TIMEOUT: Final = 1.0
"""Seconds that a reader has to take the end of its stream before its connection is dropped."""

RETRY: Final = 2
"""Seconds that a browser is asked to wait before it reconnects."""


class Readers:
    """Counts the readers that wait for changes, and refuses too many of them.

    Args:
        client: Reads the changes.

    Attributes:
        count: Readers at present.
    """

    def __init__(self, client: IncidentClient) -> None:
        self.count = 0
        self._client = client
        self._ask = Coalescer(self._ask_client)
        self._blocker: FeedBlocker | None = None
        self._asked_at = -inf

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place inside the block.

        Raises:
            Refusal: If every place is taken.
        """
        if self.count >= MAX_READERS:
            detail = f"{MAX_READERS} readers, the maximum, are already waiting for changes"
            raise Refusal(503, detail, headers=RETRY_HEADERS)
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1

    async def blocker(self) -> FeedBlocker | None:
        """Return the transaction that changes wait for; None if the feed is quiet.

        The streams of an app share the answer, which is at most a third of a heartbeat old.
        """
        if time.monotonic() - self._asked_at >= HEARTBEAT / 3:
            await self._ask(None)
        return self._blocker

    async def _ask_client(self, _: None) -> None:
        asked_at = time.monotonic()
        blocker = None
        with suppress(StoreError):
            blocker = await self._client.feed_blocker()
        self._blocker = blocker if blocker is not None and blocker.waiting else None
        self._asked_at = asked_at


async def run_until_stop(
    work: Coroutine[Any, Any, _T], scope: Scope, receive: Receive | None = None
) -> _T | None:
    """Return the result of a reader's work, or None if it is cancelled because the server stops.

    A server waits for its connections before it stops, and a stream never ends by itself.

    Args:
        work: What the reader waits for.
        scope: The reader's request.
        receive: Also cancel the work when the reader disconnects; None: the caller does that.
    """
    task = asyncio.ensure_future(work)
    ends: list[asyncio.Future[Any]] = [task, asyncio.ensure_future(wait_for_stop(scope))]
    if receive is not None:
        ends.append(asyncio.ensure_future(_disconnected(receive)))
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await _cancel(ends)
    return None if task.cancelled() else task.result()


async def run_until_disconnect(work: Coroutine[Any, Any, _T], receive: Receive) -> _T:
    """Return the result of work that is cancelled when the client disconnects.

    Raises:
        ClientDisconnect: If the client has disconnected.
    """
    ends: list[asyncio.Future[Any]] = [
        asyncio.ensure_future(work),
        asyncio.ensure_future(_disconnected(receive)),
    ]
    task: asyncio.Future[_T] = ends[0]
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await _cancel(ends)
    if task.cancelled():
        raise ClientDisconnect
    return task.result()


class ChangeStream(Response):
    """Sends changes as server-sent events, for as long as the reader takes them.

    Args:
        client: Reads the changes.
        page: The first of them.
        readers: The readers of the app.
        place: The reader's place, released at the end of the stream.
    """

    media_type = MEDIA_TYPE

    def __init__(
        self, client: IncidentClient, page: ChangePage, readers: Readers, place: ExitStack
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._client = client
        self._page = page
        self._readers = readers
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the reader is gone or too slow, or the server or the client stops."""
        with self._place:
            await self._stream(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = asyncio.ensure_future(self._run(scope, send))
        disconnected = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({stream, disconnected}, return_when=asyncio.FIRST_COMPLETED)
            cut = not disconnected.done() and stream.exception() is None and not stream.result()
            if cut and abort(scope):
                await asyncio.wait({disconnected}, timeout=END_TIMEOUT)
        finally:
            await _cancel([stream, disconnected])
        if not stream.cancelled() and (error := stream.exception()) is not None:
            raise error

    async def _run(self, scope: Scope, send: Send) -> bool:
        """Send the stream, and return whether the reader has taken all of it."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            with suppress(IncidentKitError):
                await run_until_stop(self._send_changes(scope, send), scope)
            async with asyncio.timeout(END_TIMEOUT):
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            logger.warning("A reader of changes was too slow")
            return False
        except OSError:
            return False
        return True

    async def _send_changes(self, scope: Scope, send: Send) -> None:
        page = self._page
        await self._send(send, f"retry: {RETRY * 1000}\n\n".encode())
        # Also at each heartbeat: a stream ends once its token is revoked or expires.
        while await still_admitted(scope):
            frames = _frames(page)
            await self._send(send, frames or _heartbeat(page, await self._readers.blocker()))
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


def _heartbeat(page: ChangePage, blocker: FeedBlocker | None) -> bytes:
    # With the id, a reader that began at the latest change can resume there.
    id_ = b"" if page.next is None else b"id: %b\n" % page.next.encode()
    if blocker is None:
        return id_ + b": nothing new\n\n"
    since = wire_converter().unstructure(blocker.since)
    return id_ + f": held up since {since} by {blocker.holder}\n\n".encode()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(tasks: list[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)

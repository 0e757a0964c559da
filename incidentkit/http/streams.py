"""Stream changes as server-sent events, to readers that may be slow or gone."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack, contextmanager, suppress
from math import inf
from typing import Any, Final, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from incidentkit.batching import Coalescer
from incidentkit.client import MAX_PAUSE, MIN_PAUSE, IncidentClient
from incidentkit.domain.errors import (
    ClientClosed,
    IncidentKitError,
    SchemaOutOfDate,
    StoreError,
    StoreUnavailable,
)
from incidentkit.domain.values import (
    LATEST,
    READERS_PER_TOKEN,
    STREAM_LIFETIME,
    ChangePage,
    FeedBlocker,
)
from incidentkit.http.principals import sender_of, still_admitted
from incidentkit.http.problems import RETRY_HEADERS, Refusal, problem_for, refusal_for
from incidentkit.http.request_id import request_id
from incidentkit.http.requests import accepts
from incidentkit.http.server_hooks import abort, wait_for_stop
from incidentkit.wire import dump_json, encode_event, wire_converter
from incidentkit.wire.kinds import Kind

_T = TypeVar("_T")

_random: Final = random.SystemRandom()

logger = logging.getLogger("incidentkit.http")

MEDIA_TYPE: Final = "text/event-stream"

_HEADERS: Final = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

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

RETRY: Final = (1, 3)
"""Seconds that a browser is asked to wait before it reconnects: a random time between these, so
that the readers of a service that was restarted do not all come back at once."""

RETRY_WITHOUT_PLACE: Final = (10, 20)
"""The same, after every place was taken."""

SHORTEST_LIFE: Final = 0.75
"""The part of the lifetime that each stream has at least; the rest is random."""

ANSWER_TIMEOUT: Final = 15.0
"""Seconds beyond those of a wait after which a database that does not answer counts as away."""

START_TIMEOUT: Final = 5.0
"""Seconds that the database has for the first changes before the stream begins without them."""

AWAY: Final = b": the database is unavailable\n\n"
"""The comment of a stream that waits for the database."""

UNCHECKED: Final = b": the service cannot check who sends the request\n\n"
NO_PLACE: Final = b": every place for a reader is taken\n\n"
NOT_OPEN: Final = b": the service is not open\n\n"
"""The comments of a stream that ends at once."""


class Readers:
    """Counts the readers that wait for changes, and refuses too many of them.

    Args:
        client: Reads the changes.
        each: Maximum number of readers of one sender.

    Attributes:
        count: Readers at present.
        lifetime: Seconds after which a stream ends.
    """

    def __init__(self, client: IncidentClient, each: int = READERS_PER_TOKEN) -> None:
        self.count = 0
        self._each = each
        self.lifetime: float = STREAM_LIFETIME
        self._count_of: Counter[str] = Counter()
        self._client = client
        self._ask = Coalescer(self._ask_client)
        self._blocker: FeedBlocker | None = None
        self._asked_at = -inf

    @contextmanager
    def place(self, reader: str | None = None) -> Iterator[None]:
        """Hold a place inside the block.

        Args:
            reader: The name of the sender; None: an anonymous reader, without a limit of its own.

        Raises:
            Refusal: If every place, or every place of this reader, is taken.
        """
        if self.count >= MAX_READERS:
            detail = f"Too many readers of changes, the maximum is {MAX_READERS}: try again later"
            raise Refusal(Kind.TOO_MANY_READERS, detail, headers=RETRY_HEADERS)
        if reader is not None and self._count_of[reader] >= self._each:
            detail = f"Too many readers of changes, your maximum is {self._each}: end one first"
            raise Refusal(Kind.TOO_MANY_READERS, detail, headers=RETRY_HEADERS)
        self.count += 1
        if reader is not None:
            self._count_of[reader] += 1
        try:
            yield
        finally:
            self.count -= 1
            if reader is not None:
                self._count_of[reader] -= 1
                # Drops senders without readers.
                self._count_of += Counter()

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


async def stream_changes(
    request: Request, client: IncidentClient, readers: Readers, after: str | None
) -> Response:
    """Return a stream of the changes after a cursor.

    The status is 200 even if no stream is possible at present, since a browser does not reconnect
    after any other. The stream waits for the database; without a place it ends at once and asks
    the browser to reconnect.

    Raises:
        UnknownCursor: If it is a cursor of another database, unless the database is unavailable.
        StoreError: If the database refuses to be read.
    """
    with ExitStack() as place:
        try:
            place.enter_context(readers.place(sender_of(request.scope)))
            page = await _read(client, after, 0, START_TIMEOUT)
        except Refusal:
            return _short_stream(RETRY_WITHOUT_PLACE, NO_PLACE)
        except ClientClosed:
            return _short_stream(RETRY, NOT_OPEN)
        return ChangeStream(client, after, page, readers, place.pop_all())


def stream_instead(request: Request, error: Exception) -> Response | None:
    """Return a stream that ends at once, and asks a reader to come back after an error.

    None: the request is not for a stream, or the error lasts.
    """
    if not wants_stream(request):
        return None
    if isinstance(error, ClientClosed):
        return _short_stream(RETRY, NOT_OPEN)
    if isinstance(error, (StoreUnavailable, SchemaOutOfDate)):
        return _short_stream(RETRY, AWAY)
    kind = error.kind if isinstance(error, Refusal) else None
    if kind is Kind.AUTHENTICATION_UNAVAILABLE:
        return _short_stream(RETRY, UNCHECKED)
    if kind is Kind.TOO_MANY_CONNECTIONS:
        return _short_stream(RETRY_WITHOUT_PLACE, NO_PLACE)
    return None


def wants_stream(request: Request) -> bool:
    """Return whether a request for changes is answered with a stream of them."""
    return request.method == "GET" and accepts(
        request.scope["headers"], MEDIA_TYPE, before="application/json"
    )


def _short_stream(seconds: tuple[int, int], comment: bytes) -> Response:
    return Response(_retry(seconds) + comment, headers=_HEADERS, media_type=MEDIA_TYPE)


class ChangeStream(Response):
    """Sends changes as server-sent events, for as long as the reader takes them.

    Args:
        client: Reads the changes.
        after: The cursor to begin after.
        page: The first changes after it; None: the database is unavailable.
        readers: The readers of the app.
        place: The reader's place, released at the end of the stream.
    """

    media_type = MEDIA_TYPE

    def __init__(
        self,
        client: IncidentClient,
        after: str | None,
        page: ChangePage | None,
        readers: Readers,
        place: ExitStack,
    ) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._client = client
        self._after = after
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
            try:
                await run_until_stop(self._send_changes(scope, send), scope)
            except ClientClosed:
                pass
            except IncidentKitError as error:
                await self._send(send, _problem(error, scope))
            async with asyncio.timeout(END_TIMEOUT):
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            logger.warning("A reader of changes was too slow")
            return False
        except OSError:
            return False
        return True

    async def _send_changes(self, scope: Scope, send: Send) -> None:
        """Send changes until the lifetime ends, or the reader's token is no longer valid."""
        after, page = self._after, self._page
        ends_at = time.monotonic() + self._readers.lifetime * _random.uniform(SHORTEST_LIFE, 1)
        pause, told_at = 0.0, -inf
        await self._send(send, _retry(RETRY))
        # Also at each heartbeat: a stream ends once its token is revoked or expires.
        while await _still_admitted(scope):
            if page is None:
                now = time.monotonic()
                if now - told_at >= HEARTBEAT:
                    await self._send(send, AWAY)
                    told_at = now
                pause = min(2 * pause + MIN_PAUSE, MAX_PAUSE)
                await asyncio.sleep(pause)
            else:
                pause, told_at, after = 0.0, -inf, page.next
                frames = _frames(page)
                await self._send(send, frames or _heartbeat(page, await self._readers.blocker()))
            left = ends_at - time.monotonic()
            if left <= 0:
                return
            # The latest change must be known before an outage, which may hide changes.
            wait = 0 if after == LATEST else min(HEARTBEAT, left)
            page = await _read(self._client, after, wait, wait + ANSWER_TIMEOUT)

    async def _send(self, send: Send, body: bytes) -> None:
        async with asyncio.timeout(SEND_TIMEOUT):
            await send({"type": "http.response.body", "body": body, "more_body": True})


async def _still_admitted(scope: Scope) -> bool:
    """Return whether a reader may continue, also if the check times out."""
    try:
        async with asyncio.timeout(START_TIMEOUT):
            return await still_admitted(scope)
    except TimeoutError:
        return True


async def _read(
    client: IncidentClient, after: str | None, wait: float, patience: float
) -> ChangePage | None:
    """Return the changes after a cursor; None if the database is unavailable."""
    try:
        async with asyncio.timeout(patience):
            return await client.read_changes(after, limit=BATCH, wait=wait)
    except (StoreUnavailable, SchemaOutOfDate, TimeoutError):
        return None


def _retry(seconds: tuple[int, int]) -> bytes:
    low, high = seconds
    return b"retry: %d\n\n" % _random.randint(low * 1000, high * 1000)


def _problem(error: IncidentKitError, scope: Scope) -> bytes:
    """Return the event that ends a stream, and log the error if it is the server's fault."""
    refusal = refusal_for(error)
    if refusal.kind is not Kind.UNKNOWN_CURSOR:
        logger.error("A stream failed", exc_info=error, extra={"request_id": request_id(scope)})
    problem = wire_converter().unstructure(problem_for(refusal, scope))
    return b"event: problem\ndata: %b\n\n" % dump_json({**problem, **refusal.members})


def _frames(page: ChangePage) -> bytes:
    frames = [
        b"id: %b\nevent: %b\ndata: %b\n\n"
        % (event.cursor.encode(), event.kind.value.encode(), encode_event(event))
        for event in page.changes
    ]
    if frames and page.next != page.changes[-1].cursor:
        # The reader began at the latest change, and still has changes to skip.
        frames.append(b"id: %b\n\n" % page.next.encode())
    return b"".join(frames)


def _heartbeat(page: ChangePage, blocker: FeedBlocker | None) -> bytes:
    # With the id, a reader that began at the latest change can resume there.
    id_ = b"id: %b\n" % page.next.encode()
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

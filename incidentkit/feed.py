"""Deliver changes of incidents to waiting readers, in the order of their commits."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final, Protocol

from attrs import frozen

from incidentkit.batching import Coalescer
from incidentkit.domain.cursor import encode_cursor
from incidentkit.domain.errors import ClientClosed
from incidentkit.domain.rules import EventCursor, event_cursor
from incidentkit.domain.values import LATEST, ChangePage, IncidentEvent
from incidentkit.observing import Observer
from incidentkit.store.ports import BEGINNING, EventList, Place

POLL_INTERVAL: Final = 0.25
"""Seconds between two reads that look for changes by other processes, while a reader waits."""

MAX_SKIPPED: Final = 10_000
"""Maximum number of committed events that a reader starting at ``latest`` skips."""

MAX_STARTS: Final = 100
"""Maximum number of starts at ``latest`` that a feed remembers."""

EMPTY: Final = encode_cursor(0, 0, 0, 0)
"""The cursor of a feed without changes: the beginning of every database."""


class EventStore(Protocol):
    """The part of a store that a feed reads from."""

    async def changes(self, after: Place, limit: int) -> EventList:
        """Return events after a place, in the order of their commits."""
        ...

    async def latest_change(self) -> IncidentEvent | None:
        """Return the last of all events, or None if there is none."""
        ...

    async def waiting_changes(self, after: Place, limit: int) -> Sequence[tuple[int, int, int]]:
        """Return the places and nonces of committed events after a place.

        Unlike :meth:`changes`, it also returns events that another one may still precede.
        """
        ...

    async def place(self, cursor: EventCursor) -> Place:
        """Return the place of the event that a cursor stands for."""
        ...

    async def check_order(self) -> None:
        """Raise unless events are in the order of their places; look for row security, too."""
        ...


@frozen
class Start:
    """The start of a reader at ``latest`` while committed events waited for open transactions.

    The reader skips these events. A cursor alone cannot say so: events that come later may still
    precede them.

    Attributes:
        number: Stands for the start in cursors. Another process does not know it, and delivers the
            events.
        events: The events to skip, by id and nonce.
        last: The place of the last one.
    """

    number: int
    events: frozenset[tuple[int, int]]
    last: Place


class ChangeFeed:
    """Delivers changes to waiting readers.

    Readers at the same place share a read, unless the store has ``row_security``: then each session
    may see other events. A change by this process wakes them at once; changes by other processes
    are found by polling every :data:`POLL_INTERVAL` seconds.

    Args:
        store: Where events are read.
        clock: Returns monotonic time in seconds.
        observer: Told of the age of changes for which a reader waited; None: nothing is observed.

    Attributes:
        readers: Number of calls of :meth:`read` in progress; without one, there is no need to
            :meth:`wake` the feed.
    """

    def __init__(
        self,
        store: EventStore,
        *,
        clock: Callable[[], float] | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._store = store
        self._clock = clock or asyncio.get_running_loop().time
        self._observer = observer
        self._reads = Coalescer(self._read, verify=self._verify)
        self._change = asyncio.Event()
        self._look: asyncio.TimerHandle | None = None
        self._closed = asyncio.Event()
        self.readers = 0
        # The most recent last.
        self._starts: dict[int, Start] = {}

    def wake(self) -> None:
        """Make waiting readers look for changes now, instead of at the end of the interval."""
        if self._look is not None:
            self._look.cancel()
            self._look = None
        self._change.set()
        self._change = asyncio.Event()

    def close(self) -> None:
        """Make waiting readers raise :class:`~incidentkit.ClientClosed`."""
        self._closed.set()
        self.wake()

    async def finish(self) -> None:
        """Wait until every read has finished."""
        await self._reads.finish()

    async def pause(self, seconds: float) -> None:
        """Wait for a number of seconds, or until the feed is closed."""
        await _event_or_time(self._closed, seconds)

    async def read(self, after: str | None, limit: int, wait: float) -> ChangePage:
        """Return changes after a cursor.

        Args:
            after: A cursor; None: the beginning, ``latest``: the end.
            limit: Maximum number of changes, at least 1.
            wait: Maximum seconds to wait for a change if there is none; 0: do not wait.

        Raises:
            UnknownCursor: If it is a cursor of another database.
            ClientClosed: If the feed is closed meanwhile.
        """
        self.readers += 1
        try:
            return await self._read_or_wait(after, limit, wait)
        finally:
            self.readers -= 1

    async def _read_or_wait(  # noqa: C901
        self, after: str | None, limit: int, wait: float
    ) -> ChangePage:
        await self._store.check_order()
        finding = self._start() if after == LATEST else self._find(after)
        place, cursor, start = await finding
        ends_at = self._clock() + wait
        waited = False
        while True:
            change = self._change
            if self._closed.is_set():
                raise ClientClosed
            key = (cursor, place, limit)
            alone = self._alone()
            events = await (self._read(key) if alone else self._reads(key))
            if not alone and self._alone():
                # Row security was enabled before the read: they may be another session's events.
                continue
            if events is None:
                # The places have moved, also those of the skipped events.
                place, cursor, start = await self._find(cursor)
                continue
            if events:
                new = [each for each in events if not _is_skipped(each, start)]
                cursor = events[-1].cursor
                place = event_cursor(cursor)[:2]
                if start is not None and place >= start.last:
                    start = None
                if new:
                    if waited:
                        self._tell(new[0])
                    return ChangePage(new, _with_start(cursor, start))
                continue
            left = ends_at - self._clock()
            if left <= 0:
                return ChangePage([], _with_start(cursor, start))
            if self._look is None and not change.is_set():
                # One timer for all waiting readers, so that they read at the same time and share.
                loop = asyncio.get_running_loop()
                self._look = loop.call_later(POLL_INTERVAL, self.wake)
            await _event_or_time(change, left)
            waited = True

    def _tell(self, event: IncidentEvent) -> None:
        """Tell the observer how old an event is that a reader has waited for."""
        if self._observer is not None:
            age = datetime.now(UTC) - event.at
            self._observer.delivered(max(0.0, age.total_seconds()))

    async def _start(self) -> tuple[Place, str | None, Start | None]:
        """Return the place, the cursor and the start of a reader that starts now."""
        latest = await self._store.latest_change()
        cursor = None if latest is None else latest.cursor
        place, _, _ = await self._find(cursor)
        waiting = await self._store.waiting_changes(place, MAX_SKIPPED)
        if not waiting:
            return place, cursor, None
        number = -(2**62) - secrets.randbelow(2**62)
        events = frozenset((event_id, nonce) for _, event_id, nonce in waiting)
        start = self._starts[number] = Start(number, events, waiting[-1][:2])
        if len(self._starts) > MAX_STARTS:
            del self._starts[next(iter(self._starts))]
        return place, cursor, start

    async def _find(self, after: str | None) -> tuple[Place, str | None, Start | None]:
        """Return the place of a cursor, the cursor, and the start of its reader."""
        if after is None:
            return BEGINNING, None, None
        cursor = event_cursor(after)
        start = self._starts.get(cursor.transaction_id)
        if not cursor.event_id:
            return BEGINNING, None, start
        return await self._store.place(cursor), after, start

    def _alone(self) -> bool:
        """Return whether readers must not share a read, as far as is known."""
        return getattr(self._store, "row_security", False)

    async def _verify(self, events: EventList | None) -> None:
        """Look for row security before several readers get the same events."""
        if events:
            await self._store.check_order()

    async def _read(self, key: tuple[str | None, Place, int]) -> EventList | None:
        """Return events after a place, or None if the cursor has moved."""
        cursor, place, limit = key
        events = await self._store.changes(place, limit)
        if events and cursor is not None:
            # While a reader waited, another database may have been restored in place of this one,
            # or the places of its events may have been shifted.
            return events if await self._store.place(event_cursor(cursor)) == place else None
        return events


async def _event_or_time(event: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def _is_skipped(event: IncidentEvent, start: Start | None) -> bool:
    return start is not None and event_cursor(event.cursor)[1:3] in start.events


def _with_start(cursor: str | None, start: Start | None) -> str:
    """Return a cursor with the number of a start in place of that of a transaction."""
    cursor = cursor or EMPTY
    if start is None:
        return cursor
    return encode_cursor(start.number, *event_cursor(cursor)[1:])

"""Deliver changes of incidents to waiting readers, in the order of their commits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol

from incidentkit.batching import Coalescer
from incidentkit.domain.errors import ClientClosed
from incidentkit.domain.rules import EventCursor, event_cursor
from incidentkit.domain.values import LATEST, ChangePage, IncidentEvent
from incidentkit.store.ports import BEGINNING, EventList, Place

POLL_INTERVAL: Final = 0.25
"""Seconds between two reads that look for changes by other processes, while a reader waits."""


class EventStore(Protocol):
    """The part of a store that a feed reads from."""

    async def changes(self, after: Place, limit: int) -> EventList:
        """Return events after a place, in the order of their commits."""
        ...

    async def latest_change(self) -> IncidentEvent | None:
        """Return the last of all events, or None if there is none."""
        ...

    async def place(self, cursor: EventCursor) -> Place:
        """Return the place of the event that a cursor stands for."""
        ...

    async def check_order(self) -> None:
        """Raise unless events are in the order of their places."""
        ...


class ChangeFeed:
    """Delivers changes to waiting readers.

    Readers at the same place share a read, unless the store has ``row_security``: each session may
    then see other events. A change by this process wakes them at once; changes by
    other processes are found by polling every :data:`POLL_INTERVAL` seconds.

    Args:
        store: Where events are read.
        clock: Returns monotonic time in seconds.

    Attributes:
        readers: Number of calls of :meth:`read` in progress; without one, there is no need to
            :meth:`wake` the feed.
    """

    def __init__(self, store: EventStore, *, clock: Callable[[], float] | None = None) -> None:
        self._store = store
        self._clock = clock or asyncio.get_running_loop().time
        self._reads = Coalescer(self._read)
        self._change = asyncio.Event()
        self._look: asyncio.TimerHandle | None = None
        self._closed = asyncio.Event()
        self.readers = 0

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

    async def _read_or_wait(self, after: str | None, limit: int, wait: float) -> ChangePage:
        await self._store.check_order()
        place, cursor = await self._find(after)
        ends_at = self._clock() + wait
        while True:
            change = self._change
            if self._closed.is_set():
                raise ClientClosed
            key = (cursor, place, limit)
            alone = getattr(self._store, "row_security", False)
            events = await (self._read(key) if alone else self._reads(key))
            if events is None:
                place, cursor = await self._find(cursor)
                continue
            if events:
                return ChangePage(events.copy(), events[-1].cursor)
            left = ends_at - self._clock()
            if left <= 0:
                return ChangePage([], cursor)
            if self._look is None and not change.is_set():
                # One timer for all waiting readers, so that they read at the same time and share.
                loop = asyncio.get_running_loop()
                self._look = loop.call_later(POLL_INTERVAL, self.wake)
            await _event_or_time(change, left)

    async def _find(self, after: str | None) -> tuple[Place, str | None]:
        """Return the place of a cursor, and the cursor to return if there is no change."""
        if after == LATEST:
            latest = await self._store.latest_change()
            after = None if latest is None else latest.cursor
        return (BEGINNING if after is None else await self._store.place(event_cursor(after))), after

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

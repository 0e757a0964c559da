"""Following every change of every incident, in the order of their commits."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

from incidentkit.batching import Coalescer
from incidentkit.domain.errors import ClientClosed
from incidentkit.domain.rules import event_cursor
from incidentkit.domain.values import LATEST, ChangePage, IncidentEvent
from incidentkit.store.base import BEGINNING

if TYPE_CHECKING:
    from collections.abc import Callable

    from incidentkit.store.base import Events, Place

POLL_INTERVAL: Final = 0.25
"""Seconds between two looks for changes by other processes, while somebody waits for one."""


class EventStore(Protocol):
    """The part of a store that changes are read from."""

    async def changes(self, after: Place, limit: int) -> Events:
        """Return events from past a place, in the order of their commits."""
        ...

    async def latest_change(self) -> IncidentEvent | None:
        """Return the last event of all, or None if there is none."""
        ...

    async def place(self, cursor: tuple[int, ...]) -> Place:
        """Return the place of the event that a cursor stands for."""
        ...

    async def check_order(self) -> None:
        """Raise unless events are in the order of their places."""
        ...


class ChangeFeed:
    """Reads changes, and waits for them.

    Readers at the same place share a read, and a change that is made here wakes them at once. Those
    of other processes are found by looking every :data:`POLL_INTERVAL`.

    Args:
        store: Where events are read.
        clock: Returns the time in seconds, never going back.
    """

    def __init__(self, store: EventStore, *, clock: Callable[[], float] | None = None) -> None:
        self._store = store
        self._clock = clock or asyncio.get_running_loop().time
        self._reads = Coalescer(self._read)
        self._change = asyncio.Event()
        self._look: asyncio.TimerHandle | None = None
        self._closed = asyncio.Event()

    def wake(self) -> None:
        """Let those who wait look again: something has changed here, or may have elsewhere."""
        if self._look is not None:
            self._look.cancel()
            self._look = None
        self._change.set()
        self._change = asyncio.Event()

    def close(self) -> None:
        """End those who wait with :class:`~incidentkit.ClientClosed`."""
        self._closed.set()
        self.wake()

    async def finish(self) -> None:
        """Wait until every read has ended."""
        await self._reads.finish()

    async def pause(self, seconds: float) -> None:
        """Wait for so many seconds, unless the feed is closed before."""
        await _event_or_time(self._closed, seconds)

    async def read(self, after: str | None, limit: int, wait: float) -> ChangePage:
        """Return changes from past a cursor.

        Args:
            after: A cursor; None is the beginning, and ``latest`` the end.
            limit: Changes, at least 1.
            wait: Seconds to wait for one, if there is none.

        Raises:
            UnknownCursor: If the cursor is not one of this database.
            ClientClosed: If the feed is closed meanwhile.
        """
        await self._store.check_order()
        place, cursor = await self._find(after)
        ends_at = self._clock() + wait
        while True:
            change = self._change
            if self._closed.is_set():
                raise ClientClosed
            events = await self._reads((cursor, place, limit))
            if events is None:
                place, cursor = await self._find(cursor)
                continue
            if events:
                return ChangePage(events.copy(), events[-1].cursor)
            left = ends_at - self._clock()
            if left <= 0:
                return ChangePage([], cursor)
            if self._look is None and not change.is_set():
                # One for all who wait, so that they look at the same time, and share a read.
                loop = asyncio.get_running_loop()
                self._look = loop.call_later(POLL_INTERVAL, self.wake)
            await _event_or_time(change, left)

    async def _find(self, after: str | None) -> tuple[Place, str | None]:
        """Return the place of a cursor, and the cursor to give back if nothing comes."""
        if after == LATEST:
            latest = await self._store.latest_change()
            after = None if latest is None else latest.cursor
        return (BEGINNING if after is None else await self._store.place(event_cursor(after))), after

    async def _read(self, key: tuple[str | None, Place, int]) -> Events | None:
        """Return events from past a place, or None if the cursor is not there any more."""
        cursor, place, limit = key
        events = await self._store.changes(place, limit)
        if events and cursor is not None:
            # While somebody waited another database may have been restored in place of this one,
            # or the numbers of its events were changed.
            return events if await self._store.place(event_cursor(cursor)) == place else None
        return events


async def _event_or_time(event: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()

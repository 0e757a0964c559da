"""Follow changes by long polling: requests that wait at the service."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from math import floor
from typing import Protocol

from incidentkit.domain.errors import ClientClosed
from incidentkit.domain.values import LATEST, ChangePage


class Service(Protocol):
    """Reads changes from a service."""

    async def read_changes(self, after: str | None, limit: int, seconds: int) -> ChangePage:
        """Return changes after a cursor, and wait for one for some seconds if there is none."""
        ...

    def stop_waiting(self) -> None:
        """Make the reads that wait raise :class:`~incidentkit.ClientClosed`."""


class RemoteFeed:
    """Delivers changes to waiting readers; each waits with a request of its own.

    Args:
        service: Reads the changes.

    Attributes:
        readers: Always 0: the service wakes its readers.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._closed = asyncio.Event()
        self.readers = 0

    def wake(self) -> None:
        """Do nothing: the service wakes its readers."""

    def close(self) -> None:
        """Make waiting readers raise :class:`~incidentkit.ClientClosed`."""
        self._closed.set()
        self._service.stop_waiting()

    async def finish(self) -> None:
        """Do nothing: no read goes on without its reader."""

    async def pause(self, seconds: float) -> None:
        """Wait for a number of seconds, or until the feed is closed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._closed.wait()

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
        # A service takes whole seconds. The latest change must be known before the wait: a wait
        # that is repeated after a failure would skip the changes of the meantime.
        seconds = 0 if after == LATEST else floor(wait)
        page = await self._read(after, limit, seconds)
        if not page.changes and seconds != wait:
            if wait != floor(wait):
                await self.pause(wait - floor(wait))
            page = await self._read(page.next, limit, floor(wait) - seconds)
        return page

    async def _read(self, after: str | None, limit: int, seconds: int) -> ChangePage:
        if self._closed.is_set():
            raise ClientClosed
        return await self._service.read_changes(after, limit, seconds)

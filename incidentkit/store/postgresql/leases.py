"""Keep connections of a pool leased while they are in constant use."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

import asyncpg
from asyncpg.pool import PoolConnectionProxy

LEASE: Final = 1.0
"""Seconds without use after which a connection goes back to its pool."""


class Leases:
    """Lends the connections of a pool, and keeps them for the next call.

    Taking a connection from asyncpg's pool and giving it back costs two timers and a task, as much
    time as half a statement.

    Args:
        pool: The pool.
        timeout: Seconds to wait for a connection, and for the pool to take one back.
        keep: Whether to keep connections. A host's pool gets its connections back at once.
    """

    def __init__(self, pool: asyncpg.Pool[asyncpg.Record], timeout: float, *, keep: bool) -> None:
        self._pool = pool
        self._timeout = timeout
        self._keep = keep
        self._waiting = 0
        # Each with the time of its last use; the most recently used last.
        self._idle: list[tuple[PoolConnectionProxy[asyncpg.Record], float]] = []
        self._check: asyncio.TimerHandle | None = None
        self._giving_back: set[asyncio.Task[None]] = set()

    async def take(self) -> PoolConnectionProxy[asyncpg.Record]:
        """Return a connection. Exceptions of asyncpg are not translated."""
        while self._idle:
            connection, _ = self._idle.pop()
            if not connection.is_closed():
                return connection
            self.give_back_later(connection)
        self._waiting += 1
        try:
            return await self._pool.acquire(timeout=self._timeout)
        finally:
            self._waiting -= 1

    async def put(self, connection: PoolConnectionProxy[asyncpg.Record]) -> None:
        """Give back a connection after a statement that succeeded."""
        if not self._keep or self._waiting:
            await self._pool.release(connection, timeout=self._timeout)
            return
        loop = asyncio.get_running_loop()
        self._idle.append((connection, loop.time()))
        if self._check is None:
            self._check = loop.call_later(LEASE, self._give_back_idle)

    def give_back_later(self, connection: PoolConnectionProxy[asyncpg.Record]) -> None:
        """Give back a connection without waiting for the server to cancel its statement."""
        task = asyncio.ensure_future(self._give_back(connection))
        self._giving_back.add(task)
        task.add_done_callback(self._giving_back.discard)

    async def finish(self) -> None:
        """Give back every idle connection, keep none from now on, and wait until all are back."""
        self._keep = False
        if self._check is not None:
            self._check.cancel()
        while self._idle:
            self.give_back_later(self._idle.pop()[0])
        if self._giving_back:
            await asyncio.wait(self._giving_back)

    def _give_back_idle(self) -> None:
        loop = asyncio.get_running_loop()
        self._check = None
        while self._idle and self._idle[0][1] <= loop.time() - LEASE:
            self.give_back_later(self._idle.pop(0)[0])
        if self._idle:
            self._check = loop.call_later(LEASE, self._give_back_idle)

    async def _give_back(self, connection: PoolConnectionProxy[asyncpg.Record]) -> None:
        # The pool closes a connection that it cannot take back in time.
        with suppress(Exception):
            await self._pool.release(connection, timeout=self._timeout)

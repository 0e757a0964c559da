"""The connections that a store opens on PostgreSQL."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context
from typing import Any, Final

from incidentkit.domain.errors import ClientClosed, StoreUnavailable
from incidentkit.observing import PoolUse
from incidentkit.store.options import StoreOptions
from incidentkit.store.postgresql.connection import PostgresConnection
from incidentkit.store.postgresql.errors import lost_connection

SURPLUS: Final = 10.0
"""Seconds without use after which a connection beyond ``pool_size`` is closed."""

LIFETIME: Final = 300.0
"""Seconds without use after which any connection is closed."""


class OwnConnections:
    """Lends connections, the most recently used first, and opens further ones up to a maximum.

    Args:
        connect: Opens a connection.
        options: Numbers of connections, and time limits.

    Attributes:
        maximum: Number of connections that it can lend at a time.
        on_timeout: Called when a call has waited in vain; None: nothing is.
    """

    def __init__(
        self, connect: Callable[[], Awaitable[PostgresConnection]], options: StoreOptions
    ) -> None:
        self._connect = connect
        self._options = options
        self.maximum = options.pool_size + options.max_overflow
        self.on_timeout: Callable[[], object] | None = None
        # The most recently used last.
        self._idle: list[PostgresConnection] = []
        self._open: set[PostgresConnection] = set()
        self._connecting = 0
        # Each is answered with a connection, or with None: a place to open one.
        self._waiting: deque[asyncio.Future[PostgresConnection | None]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._trimming: asyncio.TimerHandle | None = None
        # Set while close() waits.
        self._returned: asyncio.Event | None = None
        self._closed = False

    @property
    def use(self) -> PoolUse:
        """How the connections are used."""
        lent = len(self._open) - len(self._idle) + self._connecting
        waiting = sum(not waiter.done() for waiter in self._waiting)
        return PoolUse(lent, waiting, self.maximum)

    async def take(self) -> PostgresConnection:
        """Lend a connection.

        Raises:
            StoreUnavailable: If none is free within ``pool_timeout``.
            ClientClosed: If every connection was closed.
        """
        if self._closed:
            raise ClientClosed
        while self._idle:
            connection = self._idle.pop()
            try:
                alive = await connection.is_alive()
            except BaseException:
                self._put(connection)
                raise
            if alive:
                return connection
            self._discard(connection)
        if len(self._open) + self._connecting < self.maximum:
            self._connecting += 1
            return await self._open_one()
        return await self._wait() or await self._open_one()

    async def put(self, connection: PostgresConnection) -> None:
        """Take a connection back after a call that succeeded."""
        self._put(connection)

    def _put(self, connection: PostgresConnection) -> None:
        if connection.is_closed():
            self._discard(connection)
            return
        connection.used = True
        if self._answer(connection):
            return
        loop = asyncio.get_running_loop()
        connection.idle_since = loop.time()
        self._idle.append(connection)
        if self._returned is not None:
            self._returned.set()
        elif self._trimming is None:
            self._trimming = loop.call_later(SURPLUS, self._trim, context=Context())

    def recover(
        self, connection: PostgresConnection, error: BaseException
    ) -> asyncio.Task[None] | None:
        """Take a connection back after a call that failed, without waiting for the server.

        Returns:
            A task that ends when the server has stopped the call; None: it has.
        """
        if lost_connection(error):
            # The server may have announced its shutdown before the connection ends.
            connection.terminate()
        if connection.is_closed() or connection.is_settled(error):
            self._put(connection)
            return None
        return self._finish(connection, self._settle(connection))

    async def close(self) -> None:
        """Wait up to ``pool_timeout`` for running calls, and close every connection."""
        self._returned = asyncio.Event()
        if self._trimming is not None:
            self._trimming.cancel()
        try:
            async with asyncio.timeout(self._options.pool_timeout):
                while self._connecting or len(self._idle) < len(self._open):
                    self._returned.clear()
                    await self._returned.wait()
                closing = [connection.driver.close() for connection in self._idle]
                await asyncio.gather(*closing, return_exceptions=True)
        except TimeoutError:
            pass
        finally:
            self._closed = True
            for connection in self._open:
                connection.terminate()
            self._open.clear()
            self._idle.clear()
            if self._tasks:
                await asyncio.wait(self._tasks)

    def sever(self) -> None:
        """Disconnect this process from the server, without the event loop."""
        for connection in self._open:
            connection.sever()

    async def _open_one(self) -> PostgresConnection:
        """Open a connection in a place that was reserved."""
        try:
            connection = await self._connect()
        except BaseException:
            self._leave_place()
            raise
        if self._closed:
            connection.terminate()
            self._leave_place()
            raise ClientClosed
        self._connecting -= 1
        self._open.add(connection)
        return connection

    async def _wait(self) -> PostgresConnection | None:
        """Wait for a connection; None for a place to open one, which is then reserved."""
        waiter: asyncio.Future[PostgresConnection | None]
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        seconds = self._options.pool_timeout
        try:
            async with asyncio.timeout(seconds):
                return await waiter
        except BaseException as error:
            if waiter.done() and not waiter.cancelled():
                # It was answered just as the caller gave up.
                connection = waiter.result()
                if connection is None:
                    self._leave_place()
                else:
                    self._put(connection)
            if isinstance(error, TimeoutError):
                if self.on_timeout is not None:
                    self.on_timeout()
                reason = f"all {self.maximum} connections were in use for {seconds:g} seconds"
                raise StoreUnavailable(reason) from None
            raise

    def _answer(self, connection: PostgresConnection | None) -> bool:
        """Answer the first that waits; return False if there is none."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(connection)
                return True
        return False

    def _leave_place(self) -> None:
        """Pass a reserved place on, or free it."""
        if not self._answer(None):
            self._connecting -= 1
            if self._returned is not None:
                self._returned.set()

    def _discard(self, connection: PostgresConnection) -> None:
        """Let another connection take the place of one that has ended."""
        # Its end may not have been read yet.
        connection.terminate()
        self._open.discard(connection)
        self._connecting += 1
        self._leave_place()

    async def _settle(self, connection: PostgresConnection) -> None:
        async with asyncio.timeout(self._options.pool_timeout):
            await connection.settle()

    def _trim(self) -> None:
        """Close connections that were not used for a while."""
        loop = asyncio.get_running_loop()
        self._trimming = None
        surplus = len(self._open) - self._options.pool_size
        for connection in [*self._idle]:
            seconds = loop.time() - connection.idle_since
            if seconds >= LIFETIME or (surplus > 0 and seconds >= SURPLUS):
                surplus -= 1
                self._idle.remove(connection)
                closing = connection.driver.close(timeout=self._options.pool_timeout)
                self._finish(connection, closing)
        if self._idle:
            self._trimming = loop.call_later(SURPLUS, self._trim, context=Context())

    def _finish(
        self, connection: PostgresConnection, work: Coroutine[Any, Any, None]
    ) -> asyncio.Task[None]:
        """Run work on a connection that no call uses, then take the connection back."""

        def end(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if task.cancelled() or task.exception() is not None:
                connection.terminate()
            self._put(connection)

        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        # Not in the work: it never runs if all tasks of the loop are cancelled first.
        task.add_done_callback(end)
        return task

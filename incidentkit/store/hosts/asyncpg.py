"""A host's connection or pool of asyncpg."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final
from weakref import WeakKeyDictionary, WeakSet

import asyncpg
from sqlalchemy import Executable

from incidentkit.affinity import check_loop_of
from incidentkit.domain.errors import IncidentKitError, NotInTransaction, StoreUnavailable
from incidentkit.store.executor import Rows
from incidentkit.store.hosts.sqlalchemy import has_every_character
from incidentkit.store.postgresql.connection import PostgresConnection
from incidentkit.store.postgresql.driver import Connection, fetch_rows, reads_committed
from incidentkit.store.postgresql.errors import LOST, lost_connection, translate_error
from incidentkit.store.postgresql.poolers import check_asyncpg, find_pooler
from incidentkit.store.postgresql.url import place_of_connection

logger = logging.getLogger("incidentkit.store")

_safe: Final[WeakSet[object]] = WeakSet()
"""Connections on which no other process's statement can run."""


class AsyncpgConnection:
    """A connection of asyncpg, standalone or from a pool.

    Args:
        connection: The connection; it must be in a transaction.
        trusted: Whether to skip the check of its prepared statements behind a pooler.

    Raises:
        NotInTransaction: If the connection is not in a transaction, or is closed.
        WrongEventLoop: If it belongs to another event loop.
    """

    def __init__(self, connection: Connection, *, trusted: bool = False) -> None:
        check_loop_of(connection, "connection")
        self._connection = connection
        self._trusted = trusted
        self._check()

    @property
    def place(self) -> str | None:
        """The database of the connection."""
        return place_of_connection(self._connection)

    async def fetch(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement in the transaction.

        Raises:
            InvalidSettings: If the connection is unsafe behind a pooler.
        """
        self._check()
        if not self._trusted:
            await self._refuse_unsafe()
        return await fetch_rows(self._connection, statement, values)

    async def has_every_character(self) -> bool:
        """Return whether the database can hold every character."""
        self._check()
        return has_every_character(self._connection)

    def translate(self, error: Exception) -> IncidentKitError:
        """Return the error that a caller sees for an exception of asyncpg."""
        return translate_error(error)

    async def _refuse_unsafe(self) -> None:
        connection = self._connection
        # A pool wraps its connection in a new object for each borrower.
        itself = getattr(connection, "_con", connection)
        if itself not in _safe:
            await check_asyncpg(connection, "connection", "connect with statement_cache_size=0")
            _safe.add(itself)

    def _check(self) -> None:
        connection = self._connection
        try:
            joinable = not connection.is_closed() and connection.is_in_transaction()
        except asyncpg.InterfaceError:
            # It was given back to its pool.
            joinable = False
        if not joinable:
            raise NotInTransaction


class HostPool:
    """Lends connections of a pool that belongs to the host.

    Args:
        pool: An open pool, with the host's own sizes, time limits and prepared statements.
        timeout: Seconds to wait for a connection, and for the pool to take one back.
        trusted: Whether to skip the check of its prepared statements behind a pooler.

    Raises:
        WrongEventLoop: If the pool belongs to another event loop.
    """

    def __init__(
        self, pool: asyncpg.Pool[asyncpg.Record], timeout: float, *, trusted: bool = False
    ) -> None:
        check_loop_of(pool, "pool")
        self._pool = pool
        self._timeout = timeout
        self._trusted = trusted
        self.maximum = pool.get_max_size()
        self.on_timeout: Callable[[], object] | None = None
        self._returning: set[asyncio.Task[None]] = set()
        self._read_committed: WeakKeyDictionary[object, bool] = WeakKeyDictionary()

    async def take(self) -> PostgresConnection:
        """Lend a connection.

        Raises:
            StoreUnavailable: If none is free in time.
            InvalidSettings: If the pool is unsafe behind a pooler.
        """
        for _ in range(self.maximum):
            connection = await self._acquire()
            try:
                alive = await connection.is_alive()
            except BaseException as error:
                self.recover(connection, error)
                raise
            if alive:
                break
            # The pool opens another one in its place.
            connection.terminate()
            await self.put(connection)
        else:
            connection = await self._acquire()
        connection.used = True
        if not self._trusted:
            await self._refuse_unsafe(connection)
        await self._look_at_isolation(connection)
        return connection

    @property
    def use(self) -> None:
        """None: only the host observes its own pool."""

    async def put(self, connection: PostgresConnection) -> None:
        """Give a connection back after a call that succeeded."""
        try:
            await self._release(connection)
        except (*LOST, TimeoutError, OSError, asyncpg.PostgresError) as lost:
            # The statements succeeded: raising would tell the caller otherwise.
            logger.warning("A connection was lost when given back: %s", type(lost).__name__)

    def recover(self, connection: PostgresConnection, error: BaseException) -> asyncio.Task[None]:
        """Give a connection back after a call that failed, without waiting for the server.

        Returns:
            A task that ends when the pool has the connection back.
        """
        if lost_connection(error):
            # The server may have announced its shutdown before the connection ends.
            connection.terminate()
        task = asyncio.ensure_future(self._settle(connection, error))
        self._returning.add(task)
        task.add_done_callback(self._returning.discard)
        return task

    async def close(self) -> None:
        """Wait until the pool has its connections back."""
        if self._returning:
            await asyncio.wait(self._returning)

    def sever(self) -> None:
        """Leave the connections to the host."""

    async def _refuse_unsafe(self, connection: PostgresConnection) -> None:
        """Refuse a pool that is unsafe behind a pooler; trust it from then on if it is not."""
        remedy = "create the pool with statement_cache_size=0"
        try:
            await find_pooler(connection.driver)
            await check_asyncpg(connection.driver, "database", remedy)
        except BaseException as error:
            self.recover(connection, error)
            raise
        self._trusted = True

    async def _look_at_isolation(self, connection: PostgresConnection) -> None:
        """Read the default isolation of a connection when it is first lent."""
        # A pool wraps its connection in a new object for each borrower, and resets its settings.
        itself = getattr(connection.driver, "_con", connection.driver)
        if itself not in self._read_committed:
            try:
                self._read_committed[itself] = await reads_committed(connection.driver)
            except BaseException as error:
                self.recover(connection, error)
                raise
        connection.reads_committed = self._read_committed[itself]

    async def _acquire(self) -> PostgresConnection:
        try:
            return PostgresConnection(await self._pool.acquire(timeout=self._timeout))
        except TimeoutError:
            if self._pool.get_size() < self.maximum or self._pool.get_idle_size():
                raise
            if self.on_timeout is not None:
                self.on_timeout()
            reason = f"all {self.maximum} connections were in use for {self._timeout:g} seconds"
            raise StoreUnavailable(reason) from None

    async def _settle(self, connection: PostgresConnection, error: BaseException) -> None:
        # The pool closes a connection that it cannot take back in time.
        try:
            with suppress(Exception):
                if not (connection.is_closed() or connection.is_settled(error)):
                    async with asyncio.timeout(self._timeout):
                        await connection.settle()
        finally:
            with suppress(Exception):
                await self._release(connection)

    async def _release(self, connection: PostgresConnection) -> None:
        acquired: Any = connection.driver
        await self._pool.release(acquired, timeout=self._timeout)

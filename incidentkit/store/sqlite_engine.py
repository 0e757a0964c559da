"""Incidents in SQLite, through a host's own engine of SQLAlchemy."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sqlalchemy import StaticPool
from sqlalchemy.exc import DBAPIError

from incidentkit.domain.errors import (
    ClientClosed,
    IncidentKitError,
    SchemaOutOfDate,
    StoreUnavailable,
)
from incidentkit.store import sqlite_statements as writes
from incidentkit.store import statements
from incidentkit.store.base import StoreOptions
from incidentkit.store.bookmarks import Bookmarks
from incidentkit.store.sqlite import (
    MEMORY,
    SqliteOperations,
    fetch_rows,
    in_transaction,
    probe,
    translate_error,
)
from incidentkit.store.tables import check_revision

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence

    from sqlalchemy import Executable
    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from incidentkit.store.base import StoreOperations
    from incidentkit.store.operations import Fetch, Rows

_T = TypeVar("_T")

OPTIONS: Final = StoreOptions()
"""How long calls wait; the engine's own times are the host's."""


class SqliteEngineStore(SqliteOperations):
    """Incidents in SQLite, through an engine that stays the host's.

    Args:
        engine: Its connections and its log are as the host has set them. It is never disposed of.

    The schema is brought up to date when the store opens. A call that its caller cancels still
    runs to its end, so that no connection is left in the middle of a statement.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._url = _file_of(engine.url)
        self._host_engine = engine
        self._engine: AsyncEngine | None = None
        self._running: set[asyncio.Task[Any]] = set()
        self._writing = asyncio.Lock()
        # Whether it can be seen that a transaction of the host has the only connection.
        self._tells = False

    async def open(self) -> None:
        """Bring the schema up to date."""
        from incidentkit.store import migrate  # noqa: PLC0415

        # Writers of one process queue here, which is fairer and faster than SQLite's polling. New
        # at each opening, which may be on another event loop.
        self._writing = asyncio.Lock()
        self._bookmarks = Bookmarks()
        self._engine = self._host_engine
        try:
            if self._url.database in MEMORY:
                await migrate.upgrade_memory(self._engine)
                # From Python 3.12 on a driver may be told to be in a transaction all the time.
                self._tells = not _shared_by_a_transaction(self._host_engine)
            else:
                await self._run(probe(self._url))
                try:
                    await self.check()
                except SchemaOutOfDate:
                    await migrate.upgrade(self._url.render_as_string(hide_password=False))
                    await self.check()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Wait for running calls, and use the engine no more."""
        self._engine = None
        if self._running:
            await asyncio.wait(self._running)

    async def check(self) -> None:
        """Raise unless the file can be read and has our schema."""
        rows = await self._read(statements.SELECT_REVISION, {})
        check_revision(rows[0][0] if rows else None)

    def join(self, connection: object) -> StoreOperations:
        """Return what is done in the transaction of a host's connection."""
        from incidentkit.store.joined import join  # noqa: PLC0415

        return join(connection, "sqlite")

    async def append(self, statement: Executable, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows with one statement, in one transaction."""
        await self._run(self._append(statement, rows), writes=True)

    async def _append(self, statement: Executable, rows: Sequence[Mapping[str, Any]]) -> None:
        async with self._transaction() as connection:
            await connection.execute(statement, rows)

    def _connection(self) -> AsyncConnection:
        if self._engine is None:
            raise ClientClosed
        if self._tells and _shared_by_a_transaction(self._engine):
            raise StoreUnavailable("a transaction has the only connection to it")
        return self._engine.connect()

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[AsyncConnection]:
        """Lend a connection that has the database to itself until it commits."""
        async with self._connection() as connection:
            await connection.execute(writes.LOCK)
            if await in_transaction(connection):
                yield connection
                await connection.commit()
                return
            # The connection commits by itself after each statement, unless told to begin.
            await connection.exec_driver_sql("BEGIN IMMEDIATE")
            try:
                yield connection
                await connection.exec_driver_sql("COMMIT")
            except BaseException:
                # After some errors, such as a full disk, SQLite has done it already.
                with suppress(DBAPIError):
                    await connection.exec_driver_sql("ROLLBACK")
                raise

    async def _read(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        return await self._run(self._execute(statement, values))

    async def _execute(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        async with self._connection() as connection:
            return await fetch_rows(connection, statement, values)

    async def _write(self, work: Callable[[Fetch], Awaitable[_T]], *, atomic: bool = False) -> _T:  # noqa: ARG002
        """Run work in a transaction that has the database to itself from its start."""
        return await self._run(self._transact(work), writes=True)

    async def _transact(self, work: Callable[[Fetch], Awaitable[_T]]) -> _T:
        async with self._transaction() as connection:
            return await work(partial(fetch_rows, connection))

    async def _run(self, work: Coroutine[Any, Any, _T], *, writes: bool = False) -> _T:
        """Run the work to its end, whatever becomes of the caller.

        SQLAlchemy throws a connection away if a call on it is cancelled, and with it a database
        in memory.
        """
        # In memory there is one connection, on which a read would see a write that is half way.
        alone = writes or self._url.database in MEMORY
        task = asyncio.ensure_future(self._in_turn(work) if alone else work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        seconds = OPTIONS.pool_timeout + OPTIONS.statement_timeout
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.shield(task)
        except (IncidentKitError, asyncio.CancelledError):
            raise
        except Exception as error:
            raise translate_error(error) from error
        finally:
            # Nobody may be left to take note of a failure.
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

    async def _in_turn(self, work: Coroutine[Any, Any, _T]) -> _T:
        try:
            async with asyncio.timeout(OPTIONS.pool_timeout):
                await self._writing.acquire()
        except BaseException:
            work.close()
            raise
        try:
            return await work
        finally:
            self._writing.release()


def _file_of(url: URL) -> URL:
    """Return the URL of a host's engine without what is only about its connections."""
    return url if "uri" in url.query else url.set(query={})


def _shared_by_a_transaction(engine: AsyncEngine) -> bool:
    """Return whether a transaction goes on in the one connection that an engine has, if so.

    Whoever takes that connection and gives it back ends the transaction.
    """
    pool = engine.pool
    if not isinstance(pool, StaticPool) or "connection" not in vars(pool):
        return False
    driver: Any = pool.connection.driver_connection
    return driver is not None and bool(driver.in_transaction)

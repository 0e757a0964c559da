"""Runs statements on a host's SQLAlchemy engine on SQLite."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sqlalchemy import Executable, StaticPool
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError

from incidentkit.affinity import Affinity, running_loop
from incidentkit.domain.errors import ClientClosed, IncidentKitError, StoreUnavailable
from incidentkit.store.causes import NO_ANSWER
from incidentkit.store.executor import Rows, Work
from incidentkit.store.hosts.sqlalchemy import (
    fetch_rows,
    in_sqlite_transaction,
    pool_maximum,
    sqlite_driver,
    translate_sqlalchemy_error,
)
from incidentkit.store.options import StoreOptions
from incidentkit.store.share import Share, scanning_share
from incidentkit.store.sqlite.errors import translate_error
from incidentkit.store.sqlite.file import probe
from incidentkit.store.sqlite.statements import INTERRUPT_INTERVAL, LOCK
from incidentkit.store.sqlite.threads import DatabaseFile
from incidentkit.store.sqlite.url import MEMORY, place_of

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

_T = TypeVar("_T")

OPTIONS: Final = StoreOptions()
"""How long calls wait; the time limits of the engine itself are the host's."""

PATIENCE: Final = OPTIONS.pool_timeout + OPTIONS.statement_timeout
"""Maximum number of seconds that a caller waits, unless its write has begun."""


class SqliteEngineExecutor:
    """Runs statements on a host's engine, one write at a time.

    A call whose caller is cancelled still runs to completion: SQLAlchemy throws a connection away
    if a statement on it is cancelled, and a database in memory with it. A scan of a file is
    interrupted.

    Args:
        engine: The engine, with the host's own connections and logging; never disposed of.
    """

    in_host_transaction = False

    def __init__(self, engine: AsyncEngine) -> None:
        self._url = file_url(engine)
        self.place = place_of(self._url)
        self._file: DatabaseFile | None = None
        self._host_engine = engine
        self._engine: AsyncEngine | None = None
        self._affinity: Affinity | None = None
        self._running: set[asyncio.Task[Any]] = set()
        self._writing = asyncio.Lock()
        self._share = _share(engine)
        # Whether a host's transaction on the only connection can be detected.
        self._detects_transactions = False

    async def open(self, affinity: Affinity) -> None:
        """Prepare to connect, and check that the file can be opened."""
        self._affinity = affinity
        # Writers of one process queue here, which is fairer and faster than SQLite's polling. The
        # lock is new at each opening, which may be on another event loop.
        self._writing = asyncio.Lock()
        self._share = _share(self._host_engine)
        self._engine = self._host_engine
        self._detects_transactions = False
        if self._url.database not in MEMORY:
            await self._run(probe(self._url))
            self.place = place_of(self._url)
            self._file = DatabaseFile(self.place)
            return
        await self._run(self._connect())
        # From Python 3.12 on, a driver can be set to be in a transaction all the time.
        self._detects_transactions = not _shared_by_a_transaction(self._host_engine)

    async def close(self) -> None:
        """Wait for running calls, then stop using the engine."""
        self._engine = None
        if self._running:
            await asyncio.wait(self._running)
        self._affinity = None

    def abandon(self) -> None:
        """Stop using the engine."""
        self._engine = self._affinity = None
        self._running = set()

    async def read(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement that only reads."""
        return await self._run(self._execute(statement, values))

    async def scan(self, work: Work[_T]) -> _T:
        """Run statements that only read, but may read or return very many rows."""
        self._check_loop()
        share = self._share
        await share.take()
        running: list[asyncio.Task[Rows]] = []
        try:
            return await work(partial(self._scan, running))
        finally:
            # The driver notices an interrupt after the caller has gone.
            share.give_after(running)

    async def _scan(
        self, running: list[asyncio.Task[Rows]], statement: Executable, values: Mapping[str, Any]
    ) -> Rows:
        """Run a statement, and interrupt it if its time is up or its caller is gone.

        Args:
            running: Gets a task that ends when the connection is free again.
            statement: The statement.
            values: Its parameters.
        """
        scan = _Scan(statement, values)
        running.append(self._start(self._run_scan(scan)))
        try:
            return await self._wait(running[-1])
        finally:
            # In memory the host may use the same connection: an interrupt could hit its statement.
            scan.stopped = self._url.database not in MEMORY
            if scan.stopped and scan.driver is not None:
                interrupting = asyncio.ensure_future(scan.interrupt())
                self._running.add(interrupting)
                interrupting.add_done_callback(self._running.discard)

    async def write(self, work: Work[_T]) -> _T:
        """Run statements that write in one transaction, with no other writer from its start."""
        write = _Write()
        task = self._start(self._transact(work, write), writes=True)
        return await self._wait(task, write)

    async def transact(self, work: Work[_T]) -> _T:
        """Run statements that write, all or none, as :meth:`write` does."""
        return await self.write(work)

    async def append(self, statement: Executable, rows: Sequence[Mapping[str, Any]]) -> None:
        """Run a statement that inserts, once for each row, in one transaction."""
        # SQLAlchemy accepts several sets of values for a statement that returns no rows.
        values: Any = rows
        await self.write(lambda fetch: fetch(statement, values))

    async def _connect(self) -> None:
        async with self._connection():
            pass

    async def _execute(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        async with self._connection() as connection:
            return await fetch_rows(connection, statement, values)

    async def _run_scan(self, scan: _Scan) -> Rows:
        async with self._connection() as connection:
            return await scan.run(connection)

    async def _transact(self, work: Work[_T], write: _Write) -> _T:
        async with self._transaction() as connection:
            if not write.begin():
                raise NO_ANSWER.as_error()
            return await work(partial(fetch_rows, connection))

    def _connection(self) -> AsyncConnection:
        if self._engine is None:
            raise ClientClosed
        self._check_file()
        if self._detects_transactions and _shared_by_a_transaction(self._engine):
            raise StoreUnavailable("a transaction of the application has the only connection")
        return self._engine.connect()

    def _check_file(self) -> None:
        if self._file is not None:
            self._file.check()

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[AsyncConnection]:
        """Lend a connection that is the only writer until it commits."""
        async with self._connection() as connection:
            await connection.execute(LOCK)
            if await in_sqlite_transaction(connection):
                self._check_file()
                yield connection
                await connection.commit()
                return
            # The connection commits after each statement unless a transaction is begun by hand.
            await connection.exec_driver_sql("BEGIN IMMEDIATE")
            try:
                # Again, since the transaction may have waited for another one.
                self._check_file()
                yield connection
                await connection.exec_driver_sql("COMMIT")
            except BaseException:
                # After some errors, such as a full disk, SQLite has already rolled back.
                with suppress(DBAPIError):
                    await connection.exec_driver_sql("ROLLBACK")
                raise

    async def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run work to completion, even if the caller is cancelled."""
        return await self._wait(self._start(work))

    def _start(self, work: Coroutine[Any, Any, _T], *, writes: bool = False) -> asyncio.Task[_T]:
        """Run work in a task, which continues if the caller is cancelled."""
        try:
            self._check_loop()
        except BaseException:
            work.close()
            raise
        # In memory there is one connection, on which a read would see an unfinished write.
        alone = writes or self._url.database in MEMORY
        task = asyncio.ensure_future(self._in_turn(work) if alone else work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        # The caller may be gone: retrieve a failure that no one else will.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return task

    async def _wait(self, task: asyncio.Task[_T], write: _Write | None = None) -> _T:
        """Wait for a task up to the time limit, and translate exceptions.

        A write that has begun is awaited without a limit: an error never hides a stored write.
        """
        done, _ = await asyncio.wait((task,), timeout=PATIENCE)
        if not done and (write is None or write.give_up()):
            raise NO_ANSWER.as_error()
        await asyncio.wait((task,))
        try:
            return task.result()
        except (IncidentKitError, asyncio.CancelledError):
            raise
        except Exception as error:
            raise translate_sqlalchemy_error(error) or translate_error(error) from error

    def _check_loop(self) -> None:
        if self._affinity is not None and self._affinity.loop is not running_loop():
            raise self._affinity.error()

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


class _Write:
    """A write that either begins, or fails because its caller has given it up."""

    def __init__(self) -> None:
        self._begun = False
        self._given_up = False

    def begin(self) -> bool:
        """Begin the write, and return True, unless it was given up."""
        self._begun = not self._given_up
        return self._begun

    def give_up(self) -> bool:
        """Keep the write from beginning, and return True, unless it has begun."""
        self._given_up = not self._begun
        return self._given_up


class _Scan:
    """A statement that its caller can interrupt while the driver runs it.

    Attributes:
        driver: The driver's connection while it runs the statement; otherwise None.
        stopped: Whether the statement must not start any more.
    """

    def __init__(self, statement: Executable, values: Mapping[str, Any]) -> None:
        self._statement = statement
        self._values = values
        self.driver: Any = None
        self.stopped = False

    async def run(self, connection: AsyncConnection) -> Rows:
        """Run the statement, unless it was stopped before."""
        driver = await sqlite_driver(connection)
        if self.stopped:
            return ()
        self.driver = driver
        try:
            return await fetch_rows(connection, self._statement, self._values)
        finally:
            self.driver = None

    async def interrupt(self) -> None:
        """Interrupt the statement until the driver has noticed."""
        while self.driver is not None:
            await self.driver.interrupt()
            await asyncio.sleep(INTERRUPT_INTERVAL)


def _share(engine: AsyncEngine) -> Share:
    return scanning_share(pool_maximum(engine), OPTIONS.pool_timeout)


def file_url(engine: AsyncEngine) -> URL:
    """Return the URL of a host's engine without the parameters of its connections."""
    return engine.url if "uri" in engine.url.query else engine.url.set(query={})


def _shared_by_a_transaction(engine: AsyncEngine) -> bool:
    """Return whether the engine has one connection, and a transaction is in progress on it.

    Taking that connection and giving it back would end the transaction.
    """
    pool = engine.pool
    if not isinstance(pool, StaticPool) or "connection" not in vars(pool):
        return False
    driver: Any = pool.connection.driver_connection
    return driver is not None and bool(driver.in_transaction)

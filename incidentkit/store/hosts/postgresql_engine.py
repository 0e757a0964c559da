"""Runs statements on a host's SQLAlchemy engine on PostgreSQL, with any driver."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from attrs import Factory, define
from sqlalchemy import Executable

from incidentkit.affinity import Affinity, running_loop
from incidentkit.domain.errors import ClientClosed, IncidentKitError, StoreError
from incidentkit.store.executor import Rows, Work
from incidentkit.store.hosts.poolers import check_sqlalchemy
from incidentkit.store.hosts.sqlalchemy import (
    execute,
    fetch_rows,
    is_lost,
    translate_sqlalchemy_error,
    with_isolation,
)
from incidentkit.store.postgresql.connection import is_alive
from incidentkit.store.postgresql.driver import STRICTER
from incidentkit.store.postgresql.errors import is_unsent, translate_error
from incidentkit.store.postgresql.url import place_of
from incidentkit.store.share import Share, scanning_share, writing_share

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

_T = TypeVar("_T")


@define
class _Lent:
    """A connection that is lent to one call.

    Attributes:
        answered: Whether the server has answered a statement of the call.
    """

    connection: AsyncConnection
    answered: bool = False

    async def fetch(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement."""
        rows = await fetch_rows(self.connection, statement, values)
        self.answered = True
        return rows


@define(eq=False)
class _Open:
    """The state of an open executor.

    Attributes:
        affinity: Where it was opened.
        writing: The share of writes.
        scanning: The share of scans.
        scans: Scans that are running, or are being stopped.
    """

    affinity: Affinity
    writing: Share
    scanning: Share
    scans: set[asyncio.Task[Any]] = Factory(set)


class PostgresEngineExecutor:
    """Runs statements on an engine that belongs to the host.

    Args:
        engine: The engine, with the host's own pool, time limits and logging; never disposed of.
        maximum: Number of its connections; writes leave a quarter of them to reads.
        timeout: Seconds that a write waits until there is a connection for it.
        trusted: Whether to skip the check of its prepared statements behind a pooler.
    """

    in_host_transaction = False

    def __init__(
        self, engine: AsyncEngine, maximum: int, timeout: float, *, trusted: bool = False
    ) -> None:
        self.place = place_of(engine.url)
        # The host's default may be any isolation level.
        self._autocommit = with_isolation(engine, "AUTOCOMMIT")
        self._several = with_isolation(engine, "READ COMMITTED")
        self._single = self._autocommit
        # An engine that was given a level as an option sets it on every connection, also on those
        # of the engines with another level that were made from it.
        self._overrides = "isolation_level" in engine.sync_engine.get_execution_options()
        self._trusted = trusted
        self._maximum = maximum
        self._timeout = timeout
        self._open: _Open | None = None
        self._read_committed: WeakKeyDictionary[object, bool] = WeakKeyDictionary()

    async def open(self, affinity: Affinity) -> None:
        """Accept statements, and refuse an engine that is unsafe behind a pooler."""
        writing = writing_share(self._maximum, self._timeout)
        scanning = scanning_share(self._maximum, self._timeout)
        self._open = _Open(affinity, writing, scanning)
        self._single = self._autocommit
        if self._trusted:
            return
        async with self._connection(self._several) as connection:
            if await check_sqlalchemy(connection, "database"):
                # Only a transaction keeps the server connection between the preparation of a
                # statement and its run.
                self._single = self._several

    async def close(self) -> None:
        """Accept no more statements, and wait up to the time limit for scans that are stopped."""
        opened, self._open = self._open, None
        if opened is not None and opened.scans:
            await asyncio.wait(opened.scans, timeout=self._timeout)

    def abandon(self) -> None:
        """Accept no more statements."""
        self._open = None

    async def read(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement that only reads; if its connection is dead, again on another."""
        self._opened()
        return await self._run(
            self._single, lambda lent: lent.fetch(statement, values), resend=True
        )

    async def scan(self, work: Work[_T]) -> _T:
        """Run statements that only read; if their connection is dead, again on another."""
        opened = self._opened()
        await opened.scanning.take()
        call = self._run(self._single, lambda lent: work(lent.fetch), resend=True)
        # In a task: a cancelled caller need not wait until the server has stopped the statement.
        task = asyncio.ensure_future(call)
        opened.scans.add(task)
        task.add_done_callback(opened.scans.discard)
        try:
            await asyncio.wait((task,))
            return task.result()
        finally:
            # Until SQLAlchemy has ended the connection, the server may be running the statement.
            task.cancel()
            opened.scanning.give_after((task,))

    async def write(self, work: Work[_T]) -> _T:
        """Run statements that write, each committed by itself."""
        async with self._opened().writing:
            return await self._run(self._single, lambda lent: work(lent.fetch))

    async def transact(self, work: Work[_T]) -> _T:
        """Run statements that write in one transaction."""
        async with self._opened().writing:
            return await self._run(self._several, lambda lent: work(lent.fetch))

    async def append(self, statement: Executable, rows: Sequence[Mapping[str, Any]]) -> None:
        """Run a statement that inserts, once for each row, in one transaction."""
        async with self._opened().writing:
            await self._run(self._several, lambda lent: execute(lent.connection, statement, rows))

    async def _run(
        self, engine: AsyncEngine, call: Callable[[_Lent], Awaitable[_T]], *, resend: bool = False
    ) -> _T:
        """Run a call on a connection, and on another one if it is dead and nothing was sent.

        Args:
            engine: With the isolation level of the call.
            call: Runs statements.
            resend: Whether to run it once more even if it was sent.
        """
        left = self._maximum
        while True:
            lent: _Lent | None = None
            try:
                async with self._connection(engine) as connection:
                    lent = _Lent(connection)
                    return await call(lent)
            except StoreError as error:
                cause = error.__cause__
                unsent = lent is not None and not lent.answered and is_unsent(cause)
                if not left or not (unsent or (resend and is_lost(cause))):
                    raise
                left -= 1
                # SQLAlchemy has replaced the other connections, too.
                resend = resend and not is_lost(cause)

    def _opened(self) -> _Open:
        opened = self._open
        if opened is None:
            raise ClientClosed
        if opened.affinity.loop is not running_loop():
            raise opened.affinity.error()
        return opened

    @asynccontextmanager
    async def _connection(self, engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
        """Lend a connection in a transaction, and translate exceptions."""
        self._opened()
        connecting = True
        try:
            async with engine.connect() as connection:
                await self._replace_dead(connection)
                if self._overrides:
                    level = "AUTOCOMMIT" if engine is self._autocommit else "READ COMMITTED"
                    await connection.execution_options(isolation_level=level)
                if engine is self._autocommit and not await self._reads_committed(connection):
                    await connection.execution_options(isolation_level="READ COMMITTED")
                connecting = False
                try:
                    async with connection.begin():
                        yield connection
                except Exception as error:
                    if is_unsent(error):
                        # The server has announced the end of the connection, but not ended it.
                        await connection.invalidate()
                    raise
        except IncidentKitError:
            raise
        except Exception as error:
            raise (
                translate_sqlalchemy_error(error) or translate_error(error, connecting=connecting)
            ) from error

    async def _replace_dead(self, connection: AsyncConnection) -> None:
        """Let SQLAlchemy take another connection of its pool for one that has ended."""
        for _ in range(self._maximum):
            raw = await connection.get_raw_connection()
            if await is_alive(raw.driver_connection):
                return
            await connection.invalidate()

    async def _reads_committed(self, connection: AsyncConnection) -> bool:
        """Return whether a connection runs single statements as ``READ COMMITTED``."""
        raw = await connection.get_raw_connection()
        driver = raw.driver_connection
        known = self._read_committed.get(driver)
        if known is None:
            known = not (await connection.exec_driver_sql(STRICTER)).all()
            await connection.rollback()
            self._read_committed[driver] = known
        return known

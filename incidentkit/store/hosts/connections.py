"""Run statements in a transaction that a host has begun, and that only the host ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from sqlalchemy import Engine, Executable, StaticPool, text
from sqlalchemy.engine import URL

from incidentkit.domain.errors import IncidentKitError, NotInTransaction
from incidentkit.store.database import DatabaseKind
from incidentkit.store.executor import Fetch, Rows, Work
from incidentkit.store.hosts.sqlalchemy import (
    check_joinable,
    engine_of,
    fetch_rows,
    has_every_character,
    in_sqlite_transaction,
    is_connection,
    is_ended,
    is_session,
    sqlite_driver,
    translate_sqlalchemy_error,
)
from incidentkit.store.sql.naming import TRANSLATE_MAP
from incidentkit.store.sqlite.statements import INTERRUPT_INTERVAL, LOCK

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

_T = TypeVar("_T")

# These statements name no table, so a host's schema_translate_map has no effect on them.
_ANYWHERE: Final[dict[str, Any]] = {TRANSLATE_MAP: {}}
_SAVE: Final = text("SAVEPOINT incidentkit").execution_options(**_ANYWHERE)
_KEEP: Final = text("RELEASE SAVEPOINT incidentkit").execution_options(**_ANYWHERE)
_UNDO: Final = text("ROLLBACK TO SAVEPOINT incidentkit").execution_options(**_ANYWHERE)


class HostConnection(Protocol):
    """A connection of the host, of any driver.

    Attributes:
        place: The database that it is connected to; None if the driver does not say.
    """

    @property
    def place(self) -> str | None:
        """The database, for an error to name it."""
        ...

    async def fetch(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement in the transaction.

        Raises:
            NotInTransaction: If it has ended.
        """
        ...

    async def has_every_character(self) -> bool:
        """Return whether the database can hold every character."""
        ...

    def translate(self, error: Exception) -> IncidentKitError:
        """Return the error that a caller sees for an exception of the driver."""
        ...


class SqliteHostConnection(HostConnection, Protocol):
    """A connection of the host to SQLite."""

    async def in_transaction(self) -> bool:
        """Return whether SQLite itself is in a transaction, which the host may not know."""
        ...


class SqlalchemyConnection:
    """A connection of SQLAlchemy, or the connection of a session.

    SQLAlchemy begins a transaction with the first statement. If none has begun yet, that is the
    transaction to join: a later one might never be committed.

    Args:
        connection: SQLAlchemy's ``AsyncConnection`` or ``AsyncSession``.
        kind: The database that it must be connected to.
        translate: Returns the error for an exception of the driver.
        place_of: Returns the place of the database that a URL names.
        check: Raises unless the connection can be used; None: any connection can.

    Raises:
        NotInTransaction: If it commits each statement by itself.
        TypeError: If it is connected to another kind of database.
    """

    def __init__(
        self,
        connection: AsyncConnection | AsyncSession,
        kind: DatabaseKind,
        translate: Callable[[Exception], IncidentKitError],
        place_of: Callable[[URL], str | None],
        check: Callable[[AsyncConnection], Awaitable[None]] | None = None,
    ) -> None:
        self._connection = connection
        self._translate = translate
        engine = _engine(connection)
        if engine.dialect.name != kind:
            raise TypeError(f"The client is on {kind}, not on {engine.dialect.name}")
        self._place_of = place_of
        self._check_use = check
        if is_connection(connection):
            check_joinable(connection.sync_connection)
        self._fetch = _fetch_to_completion if kind == "sqlite" else fetch_rows
        self._transaction = self._current()

    @property
    def place(self) -> str | None:
        """The database of the connection."""
        return self._place_of(_engine(self._connection).url)

    async def fetch(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement in the transaction."""
        connection = await self._joined()
        if self._check_use is not None:
            await self._check_use(connection)
        try:
            return await self._fetch(connection, statement, values)
        finally:
            self._transaction = self._transaction or self._current()

    async def has_every_character(self) -> bool:
        """Return whether the database can hold every character."""
        raw = await (await self._joined()).get_raw_connection()
        return has_every_character(raw.driver_connection)

    async def in_transaction(self) -> bool:
        """Return whether SQLite itself is in a transaction."""
        return await in_sqlite_transaction(await self._joined())

    async def _joined(self) -> AsyncConnection:
        """Return the connection of the transaction.

        Raises:
            NotInTransaction: If it has ended. A session would begin another one here.
        """
        if self._transaction not in (None, self._current()):
            raise NotInTransaction
        connection = self._connection
        if is_session(connection):
            connection = await connection.connection()
        check_joinable(connection.sync_connection)
        return connection

    def translate(self, error: Exception) -> IncidentKitError:
        """Return the error that a caller sees for an exception of SQLAlchemy."""
        if is_ended(error):
            return NotInTransaction()
        return translate_sqlalchemy_error(error) or self._translate(error)

    def _current(self) -> object:
        connection = self._connection
        if is_session(connection):
            return connection.sync_session.get_transaction()
        return connection.sync_connection and connection.sync_connection.get_transaction()


def _engine(connection: AsyncConnection | AsyncSession) -> Engine:
    if is_connection(connection):
        return connection.engine.sync_engine
    return engine_of(connection.sync_session)


async def _fetch_to_completion(
    connection: AsyncConnection, statement: Executable, values: Mapping[str, Any]
) -> Rows:
    """Run a statement on SQLite to completion; a cancellation meanwhile is raised afterwards.

    SQLAlchemy discards a connection whose statement is cancelled, and with it the transaction. The
    file would stay locked until the cursor of that statement is garbage-collected. A statement that
    only reads is interrupted instead, which leaves the transaction as it is.
    """
    driver = await sqlite_driver(connection)
    was_in_transaction = driver.in_transaction
    # With a pool of one connection, an interrupt could hit the statement of another caller.
    stops = statement.is_select and not isinstance(connection.engine.pool, StaticPool)
    task = asyncio.ensure_future(fetch_rows(connection, statement, values))
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            if stops and cancelled is not None:
                await driver.interrupt()
                await asyncio.wait((task,), timeout=INTERRUPT_INTERVAL)
            else:
                await asyncio.wait((task,))
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return task.result()
    try:
        if not task.cancelled():
            # Retrieve a failure that no one else will.
            task.exception()
        with suppress(Exception):
            if was_in_transaction and not await in_sqlite_transaction(connection):
                # SQLAlchemy does not notice that the transaction has ended: without this, the host
                # would continue in another one.
                await connection.invalidate()
        raise cancelled
    finally:
        # Otherwise the traceback would keep this frame alive, and the rows with it.
        del cancelled, task


class HostExecutor:
    """Runs statements on a host's connection, and neither begins nor ends its transaction.

    A savepoint undoes a failed call that may consist of several statements, so that the host can
    continue and commit.

    Args:
        connection: The connection.
        turn: Held during a call, whose statements must not come between those of another.
    """

    in_host_transaction = True

    def __init__(
        self, connection: HostConnection, turn: AbstractAsyncContextManager[object]
    ) -> None:
        self._connection = connection
        self._turn = turn

    @property
    def place(self) -> str | None:
        """The database of the connection."""
        return self._connection.place

    async def read(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement that only reads."""
        return await self._run(lambda fetch: fetch(statement, values))

    async def scan(self, work: Work[_T]) -> _T:
        """Run statements that only read, but may read or return very many rows."""
        return await self._run(work)

    async def write(self, work: Work[_T]) -> _T:
        """Run statements that write."""
        return await self._run(work)

    async def transact(self, work: Work[_T]) -> _T:
        """Run statements that write, all or none."""
        return await self._run(lambda fetch: _all_or_none(fetch, work))

    async def _run(self, work: Work[_T]) -> _T:
        async with self._turn:
            try:
                if not await self._connection.has_every_character():
                    # A value that cannot be stored must not end the host's transaction.
                    return await _all_or_none(self._connection.fetch, work)
                return await work(self._connection.fetch)
            except IncidentKitError:
                raise
            except Exception as error:
                raise self._connection.translate(error) from error


class SqliteHostExecutor:
    """Runs statements on a host's SQLite connection, where a write first takes the write lock.

    Args:
        connection: The connection.
        turn: Held during a call, as for :class:`HostExecutor`.
    """

    in_host_transaction = True

    def __init__(
        self, connection: SqliteHostConnection, turn: AbstractAsyncContextManager[object]
    ) -> None:
        self._connection = connection
        self._executor = HostExecutor(connection, turn)

    @property
    def place(self) -> str | None:
        """The database of the connection."""
        return self._connection.place

    async def read(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement that only reads."""
        return await self._executor.read(statement, values)

    async def scan(self, work: Work[_T]) -> _T:
        """Run statements that only read, but may read or return very many rows."""
        return await self._executor.scan(work)

    async def write(self, work: Work[_T]) -> _T:
        """Run statements that write, all or none."""

        async def alone(fetch: Fetch) -> _T:
            # A row that is read from here on cannot change before it is written.
            await fetch(LOCK, {})
            if not await self._connection.in_transaction():
                raise NotInTransaction
            return await _all_or_none(fetch, work)

        return await self._executor.write(alone)

    async def transact(self, work: Work[_T]) -> _T:
        """Run statements that write, all or none, as :meth:`write` does."""
        return await self.write(work)


async def _all_or_none(fetch: Fetch, work: Work[_T]) -> _T:
    """Run work, and undo all of it if it fails, so that the host can continue and commit."""
    # A savepoint that a cancellation leaves behind ends with the transaction.
    await fetch(_SAVE, {})
    try:
        done = await work(fetch)
    except BaseException:
        # Fails if the connection or the whole transaction is lost.
        with suppress(Exception):
            await fetch(_UNDO, {})
            await fetch(_KEEP, {})
        raise
    await fetch(_KEEP, {})
    return done

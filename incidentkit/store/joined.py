"""Incidents on a connection that is the host's: in its transaction, which only the host ends."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import asyncpg
from asyncpg.pool import PoolConnectionProxy
from sqlalchemy import text
from sqlalchemy.exc import InvalidRequestError, ResourceClosedError, UnboundExecutionError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from incidentkit.domain.errors import IncidentKitError, NotInTransaction
from incidentkit.domain.values import OPEN
from incidentkit.store import postgresql, sqlite
from incidentkit.store import sqlite_statements as sqlite_writes
from incidentkit.store.engine import commits_by_itself, translate_error
from incidentkit.store.operations import Operations

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from sqlalchemy import Executable

    from incidentkit.domain.commands import StatusChange
    from incidentkit.domain.transitions import Transitions
    from incidentkit.domain.values import Incident
    from incidentkit.store.base import StoreOperations
    from incidentkit.store.database import DatabaseKind
    from incidentkit.store.operations import Fetch, Rows

_T = TypeVar("_T")

_SAVE: Final = text("SAVEPOINT incidentkit")
_KEEP: Final = text("RELEASE SAVEPOINT incidentkit")
_TAKE_BACK: Final = text("ROLLBACK TO SAVEPOINT incidentkit")


class HostConnection(Protocol):
    """A host's connection, whoever made it."""

    async def fetch(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement in the transaction.

        Raises:
            NotInTransaction: If it has ended.
        """
        ...

    def translate(self, error: Exception) -> IncidentKitError:
        """Return what a caller sees for an exception of the driver."""
        ...


class AsyncpgConnection:
    """A connection of asyncpg, its own or one of a pool."""

    def __init__(
        self, connection: asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]
    ) -> None:
        self._connection = connection
        self._check()

    async def fetch(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement in the transaction."""
        self._check()
        return await postgresql.fetch_rows(self._connection, statement, values)

    def translate(self, error: Exception) -> IncidentKitError:
        """Return what a caller sees for an exception of asyncpg."""
        return postgresql.translate_error(error)

    def _check(self) -> None:
        connection = self._connection
        try:
            joinable = not connection.is_closed() and connection.is_in_transaction()
        except asyncpg.InterfaceError:
            # It was given back to its pool.
            joinable = False
        if not joinable:
            raise NotInTransaction


class SqlalchemyConnection:
    """A connection of SQLAlchemy, or the one that a session has.

    SQLAlchemy begins a transaction with the first statement. It is that one which is joined, if
    there is none yet: what came after it might never be committed.
    """

    def __init__(self, connection: AsyncConnection | AsyncSession, kind: DatabaseKind) -> None:
        self._connection = connection
        found = _dialect_name(connection)
        if found != kind:
            raise TypeError(f"The client is on {kind}, not on {found}")
        if isinstance(connection, AsyncConnection):
            _check(connection)
        self._fetch = _fetch_to_the_end if kind == "sqlite" else sqlite.fetch_rows
        self._transaction = self._current()

    async def fetch(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement in the transaction."""
        if self._transaction not in (None, self._current()):
            raise NotInTransaction
        connection = await self.connection()
        try:
            return await self._fetch(connection, statement, values)
        finally:
            self._transaction = self._transaction or self._current()

    async def connection(self) -> AsyncConnection:
        """Return the connection of the transaction."""
        connection = self._connection
        if isinstance(connection, AsyncSession):
            connection = await connection.connection()
        _check(connection)
        return connection

    def translate(self, error: Exception) -> IncidentKitError:
        """Return what a caller sees for an exception of SQLAlchemy."""
        if isinstance(error, ResourceClosedError) or type(error) is InvalidRequestError:
            return NotInTransaction()
        return translate_error(error)

    def _current(self) -> object:
        connection = self._connection
        if isinstance(connection, AsyncSession):
            return connection.sync_session.get_transaction()
        return connection.sync_connection and connection.sync_connection.get_transaction()


def _dialect_name(connection: AsyncConnection | AsyncSession) -> str:
    if isinstance(connection, AsyncConnection):
        return connection.engine.dialect.name
    try:
        return connection.sync_session.get_bind().dialect.name
    except UnboundExecutionError:
        raise TypeError("Only a session on one database can be joined, or its connection") from None


def _check(connection: AsyncConnection) -> None:
    if connection.sync_connection is None or connection.closed or commits_by_itself(connection):
        raise NotInTransaction


async def _fetch_to_the_end(
    connection: AsyncConnection, statement: Executable, values: Mapping[str, Any]
) -> Rows:
    """Run a statement on SQLite to its end; a cancellation meanwhile is raised after it.

    SQLAlchemy throws away a connection whose statement is cancelled, and with it the transaction.
    The file would stay locked until that statement's cursor is collected as garbage.
    """
    was_in_transaction = await sqlite.in_transaction(connection)
    task = asyncio.ensure_future(sqlite.fetch_rows(connection, statement, values))
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return task.result()
    try:
        if not task.cancelled():
            # A failure is nobody's any more.
            task.exception()
        with suppress(Exception):
            if was_in_transaction and not await sqlite.in_transaction(connection):
                # The host does not learn that it has ended, and must not go on in another one.
                await connection.invalidate()
        raise cancelled
    finally:
        # Or its traceback would keep this frame, and the rows.
        del cancelled, task


class _Joined(Operations):
    """Runs everything on the host's connection, and leaves its transaction alone."""

    def __init__(self, connection: HostConnection) -> None:
        self._connection = connection
        # The statements of one call must not come between those of another.
        self._turn = asyncio.Lock()

    async def _read(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        return await self._run(lambda fetch: fetch(statement, values))

    async def _write(self, work: Callable[[Fetch], Awaitable[_T]], *, atomic: bool = False) -> _T:
        return await self._run((lambda fetch: _all_or_nothing(fetch, work)) if atomic else work)

    async def _run(self, work: Callable[[Fetch], Awaitable[_T]]) -> _T:
        async with self._turn:
            try:
                return await work(self._connection.fetch)
            except IncidentKitError:
                raise
            except Exception as error:
                raise self._connection.translate(error) from error


class JoinedPostgres(_Joined, postgresql.PostgresOperations):
    """Incidents in a host's transaction on PostgreSQL."""

    async def _update_status(
        self, fetch: Fetch, change: StatusChange, transitions: Transitions, actor: str | None
    ) -> Incident:
        async def work(fetch: Fetch) -> Incident:
            return await super(JoinedPostgres, self)._update_status(
                fetch, change, transitions, actor
            )

        # Another one may be opened at the same time, which is an error that ends a transaction.
        return await (_all_or_nothing(fetch, work) if change.status is OPEN else work(fetch))


class JoinedSqlite(_Joined, sqlite.SqliteOperations):
    """Incidents in a host's transaction on SQLite."""

    def __init__(self, connection: SqlalchemyConnection) -> None:
        super().__init__(connection)
        self._host = connection

    async def _write(self, work: Callable[[Fetch], Awaitable[_T]], *, atomic: bool = False) -> _T:  # noqa: ARG002
        async def alone(fetch: Fetch) -> _T:
            # What is read next must still be so when it is changed.
            await fetch(sqlite_writes.LOCK, {})
            if not await sqlite.in_transaction(await self._host.connection()):
                raise NotInTransaction
            return await _all_or_nothing(fetch, work)

        return await self._run(alone)


async def _all_or_nothing(fetch: Fetch, work: Callable[[Fetch], Awaitable[_T]]) -> _T:
    """Do the work, and take back all of it if it fails, since the host may go on and commit."""
    # One that a cancellation leaves behind ends with the transaction.
    await fetch(_SAVE, {})
    try:
        done = await work(fetch)
    except BaseException:
        # Unless the connection or the whole transaction is lost.
        with suppress(Exception):
            await fetch(_TAKE_BACK, {})
            await fetch(_KEEP, {})
        raise
    await fetch(_KEEP, {})
    return done


def join(connection: object, kind: DatabaseKind) -> StoreOperations:
    """Return what is done with incidents in the transaction of a host's connection.

    Args:
        connection: SQLAlchemy's ``AsyncConnection`` or ``AsyncSession``, or asyncpg's connection.
        kind: The database that it has to be to.

    Raises:
        NotInTransaction: If it commits each statement by itself.
        TypeError: If it is something else, or to another kind of database.
    """
    if isinstance(connection, (AsyncConnection, AsyncSession)):
        host = SqlalchemyConnection(connection, kind)
        return JoinedPostgres(host) if kind == "postgresql" else JoinedSqlite(host)
    if isinstance(connection, (asyncpg.Connection, PoolConnectionProxy)):
        if kind != "postgresql":
            raise TypeError(f"The client is on {kind}, not on postgresql")
        return JoinedPostgres(AsyncpgConnection(connection))
    raise TypeError(
        "Only SQLAlchemy's AsyncConnection and AsyncSession, and asyncpg's Connection, can be "
        f"joined, not {type(connection).__name__}"
    )

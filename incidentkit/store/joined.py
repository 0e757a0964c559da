"""Incidents on a connection that is the host's: in its transaction, which only the host ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import asyncpg
from asyncpg.pool import PoolConnectionProxy
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from incidentkit.errors import IncidentKitError, NotInTransaction
from incidentkit.store import postgresql, sqlite
from incidentkit.store import sqlite_statements as sqlite_writes
from incidentkit.store.engine import commits_by_itself, translate_error
from incidentkit.store.operations import Operations

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from sqlalchemy import Executable

    from incidentkit.errors import StoreError
    from incidentkit.store.base import DatabaseKind, StoreOperations
    from incidentkit.store.operations import Fetch, Rows

_T = TypeVar("_T")


class HostConnection(Protocol):
    """A host's connection, whoever made it."""

    async def fetch(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement in the transaction."""
        ...

    def translate(self, error: Exception) -> StoreError:
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

    def translate(self, error: Exception) -> StoreError:
        """Return what a caller sees for an exception of asyncpg."""
        return postgresql.translate_error(error)

    def _check(self) -> None:
        try:
            joinable = self._connection.is_in_transaction()
        except asyncpg.InterfaceError:
            # It was given back to its pool.
            joinable = False
        if not joinable:
            raise NotInTransaction


class SqlalchemyConnection:
    """A connection of SQLAlchemy, or the one that a session has."""

    def __init__(self, connection: AsyncConnection | AsyncSession, kind: DatabaseKind) -> None:
        self._connection = connection
        self._kind = kind
        if isinstance(connection, AsyncConnection):
            self._check(connection)

    async def fetch(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement in the transaction."""
        connection = self._connection
        if isinstance(connection, AsyncSession):
            connection = await connection.connection()
        self._check(connection)
        return await sqlite.fetch_rows(connection, statement, values)

    def translate(self, error: Exception) -> StoreError:
        """Return what a caller sees for an exception of SQLAlchemy."""
        return translate_error(error)

    def _check(self, connection: AsyncConnection) -> None:
        if connection.sync_connection is None or connection.closed or commits_by_itself(connection):
            raise NotInTransaction
        if connection.dialect.name != self._kind:
            raise TypeError(f"The client is on {self._kind}, not on {connection.dialect.name}")


class _Joined(Operations):
    """Runs everything on the host's connection, and leaves its transaction alone."""

    def __init__(self, connection: HostConnection) -> None:
        self._connection = connection

    async def _read(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        return await self._write(lambda fetch: fetch(statement, values))

    async def _write(self, work: Callable[[Fetch], Awaitable[_T]], *, atomic: bool = False) -> _T:  # noqa: ARG002
        try:
            return await work(self._connection.fetch)
        except (IncidentKitError, TypeError):
            raise
        except Exception as error:
            raise self._connection.translate(error) from error


class JoinedPostgres(_Joined, postgresql.PostgresOperations):
    """Incidents in a host's transaction on PostgreSQL."""


class JoinedSqlite(_Joined, sqlite.SqliteOperations):
    """Incidents in a host's transaction on SQLite."""

    async def _write(self, work: Callable[[Fetch], Awaitable[_T]], *, atomic: bool = False) -> _T:
        async def alone(fetch: Fetch) -> _T:
            # What is read next must still be so when it is changed.
            await fetch(sqlite_writes.LOCK, {})
            return await work(fetch)

        return await super()._write(alone, atomic=atomic)

    async def _read(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        return await super()._write(lambda fetch: fetch(statement, values))


def join(connection: object, kind: DatabaseKind) -> StoreOperations:
    """Return what is done with incidents in the transaction of a host's connection.

    Args:
        connection: SQLAlchemy's ``AsyncConnection`` or ``AsyncSession``, or asyncpg's connection.
        kind: The database that it has to be to.

    Raises:
        NotInTransaction: If it commits each statement by itself.
        TypeError: If it is something else, or to another kind of database.
    """
    joined = JoinedPostgres if kind == "postgresql" else JoinedSqlite
    if isinstance(connection, (AsyncConnection, AsyncSession)):
        return joined(SqlalchemyConnection(connection, kind))
    if isinstance(connection, (asyncpg.Connection, PoolConnectionProxy)):
        if kind != "postgresql":
            raise TypeError(f"The client is on {kind}, not on postgresql")
        return joined(AsyncpgConnection(connection))
    raise TypeError(
        "Only SQLAlchemy's AsyncConnection and AsyncSession, and asyncpg's Connection, can be "
        f"joined, not {type(connection).__name__}"
    )

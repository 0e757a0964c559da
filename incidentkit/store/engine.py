"""Incidents in PostgreSQL through a host's own SQLAlchemy engine, whatever its driver."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import asyncpg
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from incidentkit.domain.errors import (
    ClientClosed,
    IncidentKitError,
    SchemaOutOfDate,
    StoreError,
    StoreUnavailable,
)
from incidentkit.store import postgresql, sqlite, statements
from incidentkit.store.sqlite import fetch_rows
from incidentkit.store.tables import SCHEMA_REVISION, check_revision

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from sqlalchemy import Executable
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from incidentkit.store.base import StoreOperations
    from incidentkit.store.operations import Fetch, Rows

_T = TypeVar("_T")

_OTHER_SCHEMA: Final = ("42P01", "42703", "42704", "42883", "3F000")
_MAY_PASS: Final = ("08", "25006", "28", "3D", "40", "53", "55P03", "57")
"""SQLSTATEs, or their classes, that may pass without anybody changing the statement."""


def translate_error(error: Exception) -> StoreError:  # noqa: PLR0911
    """Return what a caller sees for an exception of SQLAlchemy, on either database."""
    if isinstance(error, PoolTimeoutError):
        return StoreUnavailable("no connection became free in time")
    if isinstance(error, InvalidRequestError):
        return StoreError("the transaction has failed before, or was ended")
    if not isinstance(error, DBAPIError):
        return postgresql.translate_error(error)
    if hasattr(error.orig, "sqlite_errorcode"):
        return sqlite.translate_error(error)
    cause = postgresql.driver_error(error)
    if isinstance(cause, (asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
        return postgresql.translate_error(cause)
    if postgresql.overtaken(cause):
        return postgresql.translate_error(error)
    sqlstate = getattr(error.orig, "sqlstate", None)
    if sqlstate in _OTHER_SCHEMA:
        return SchemaOutOfDate(None, SCHEMA_REVISION)
    if error.connection_invalidated or (sqlstate or "08").startswith(_MAY_PASS):
        return StoreUnavailable("the connection was refused or lost")
    return StoreError(f"SQLSTATE {sqlstate}")


def commits_by_itself(connection: AsyncConnection) -> bool:
    """Return whether each statement on the connection is a transaction of its own."""
    begun = connection.sync_connection
    options: Mapping[str, Any] = {} if begun is None else begun.get_execution_options()
    default = getattr(connection.dialect, "_on_connect_isolation_level", None)
    return bool(options.get("isolation_level", default) == "AUTOCOMMIT")


class EngineStore(postgresql.SharedOperations):
    """Incidents in PostgreSQL, through an engine that stays the host's.

    Args:
        engine: Its pool, timeouts and log are as the host has set them. It is never disposed of.
    """

    # A listener of the host's may fail after the statement, when it has been committed otherwise,
    # and each call is tried alone then.
    _shares_in_transactions = True

    def __init__(self, engine: AsyncEngine) -> None:
        super().__init__()
        # Whatever the host's own transactions are like.
        self._single = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._several = engine.execution_options(isolation_level="READ COMMITTED")
        self._opened = False

    async def open(self) -> None:
        """Check the schema."""
        self._opened = True
        self._start_sharing()
        try:
            await self.check()
            await self.check_order()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Use the engine no more."""
        self._opened = False

    async def check(self) -> None:
        """Raise unless the database answers and has our schema."""
        rows = await self._read(statements.SELECT_REVISION, {})
        check_revision(rows[0][0] if rows else None)

    def join(self, connection: object) -> StoreOperations:
        """Return what is done in the transaction of a host's connection."""
        from incidentkit.store.joined import join  # noqa: PLC0415

        return join(connection, "postgresql")

    async def append(self, statement: Executable, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows with one statement, in one transaction."""
        async with self._connection(self._several) as connection:
            await connection.execute(statement, rows)

    async def _read(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement that only reads, once more if its connection turns out to be dead."""

        async def work(fetch: Fetch) -> Rows:
            return await fetch(statement, values)

        try:
            return await self._write(work)
        except StoreUnavailable as error:
            cause = error.__cause__
            if not (isinstance(cause, DBAPIError) and cause.connection_invalidated):
                raise
        return await self._write(work)

    async def _write(self, work: Callable[[Fetch], Awaitable[_T]], *, atomic: bool = False) -> _T:
        async with self._connection(self._several if atomic else self._single) as connection:
            return await work(partial(fetch_rows, connection))

    @asynccontextmanager
    async def _connection(self, engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
        """Lend a connection in a transaction, and translate what is raised meanwhile."""
        if not self._opened:
            raise ClientClosed
        try:
            async with engine.begin() as connection:
                yield connection
        except IncidentKitError:
            raise
        except Exception as error:
            raise translate_error(error) from error

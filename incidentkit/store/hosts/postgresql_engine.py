"""Runs statements on a host's SQLAlchemy engine on PostgreSQL, with any driver."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Executable

from incidentkit.domain.errors import ClientClosed, IncidentKitError, StoreUnavailable
from incidentkit.store.executor import Rows, Work
from incidentkit.store.hosts.sqlalchemy import fetch_rows, is_lost, translate_sqlalchemy_error
from incidentkit.store.postgresql.errors import translate_error

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

_T = TypeVar("_T")


class PostgresEngineExecutor:
    """Runs statements on an engine that stays the host's.

    Args:
        engine: Pool, time limits and log are as the host has set them. It is never disposed of.
    """

    in_host_transaction = False

    def __init__(self, engine: AsyncEngine) -> None:
        # The host's default may be any isolation level.
        self._single = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._several = engine.execution_options(isolation_level="READ COMMITTED")
        self._opened = False

    async def open(self) -> None:
        """Accept statements."""
        self._opened = True

    async def close(self) -> None:
        """Accept no more statements."""
        self._opened = False

    async def read(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement that only reads; if its connection is dead, once more on another."""
        try:
            async with self._connection(self._single) as connection:
                return await fetch_rows(connection, statement, values)
        except StoreUnavailable as error:
            if not is_lost(error.__cause__):
                raise
        async with self._connection(self._single) as connection:
            return await fetch_rows(connection, statement, values)

    async def write(self, work: Work[_T]) -> _T:
        """Run statements that write, each committed by itself."""
        async with self._connection(self._single) as connection:
            return await work(partial(fetch_rows, connection))

    async def transact(self, work: Work[_T]) -> _T:
        """Run statements that write in one transaction."""
        async with self._connection(self._several) as connection:
            return await work(partial(fetch_rows, connection))

    async def append(self, statement: Executable, rows: Sequence[Mapping[str, Any]]) -> None:
        """Run a statement that inserts, once for each row, in one transaction."""
        async with self._connection(self._several) as connection:
            await connection.execute(statement, rows)

    @asynccontextmanager
    async def _connection(self, engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
        """Lend a connection in a transaction, and translate exceptions."""
        if not self._opened:
            raise ClientClosed
        try:
            async with engine.begin() as connection:
                yield connection
        except IncidentKitError:
            raise
        except Exception as error:
            raise translate_sqlalchemy_error(error) or translate_error(error) from error

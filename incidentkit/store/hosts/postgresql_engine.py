"""Runs statements on a host's SQLAlchemy engine on PostgreSQL, with any driver."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg
from sqlalchemy import Executable

from incidentkit.affinity import Affinity, running_loop
from incidentkit.domain.errors import ClientClosed, IncidentKitError, StoreUnavailable
from incidentkit.store.executor import Rows, Work
from incidentkit.store.hosts.poolers import check_sqlalchemy
from incidentkit.store.hosts.sqlalchemy import fetch_rows, is_lost, translate_sqlalchemy_error
from incidentkit.store.postgresql.connection import is_alive
from incidentkit.store.postgresql.errors import translate_error
from incidentkit.store.postgresql.url import place_of
from incidentkit.store.share import Share, scanning_share, writing_share

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

_T = TypeVar("_T")


class PostgresEngineExecutor:
    """Runs statements on an engine that stays the host's.

    Args:
        engine: Pool, time limits and log are as the host has set them. It is never disposed of.
        maximum: Number of its connections; writes leave a quarter of them to reads.
        timeout: Seconds that a write waits until there is a connection for it.
        trusted: Whether it may name prepared statements behind a pooler as it likes.
    """

    in_host_transaction = False

    def __init__(
        self, engine: AsyncEngine, maximum: int, timeout: float, *, trusted: bool = False
    ) -> None:
        self.place = place_of(engine.url)
        # The host's default may be any isolation level.
        self._autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._several = engine.execution_options(isolation_level="READ COMMITTED")
        self._single = self._autocommit
        self._trusted = trusted
        self._maximum = maximum
        self._timeout = timeout
        self._writing: Share | None = None
        self._affinity: Affinity | None = None
        self._scanning: Share | None = None

    async def open(self, affinity: Affinity) -> None:
        """Accept statements, and refuse an engine that is unsafe behind a pooler."""
        self._affinity = affinity
        self._writing = writing_share(self._maximum, self._timeout)
        self._scanning = scanning_share(self._maximum, self._timeout)
        self._single = self._autocommit
        if self._trusted:
            return
        async with self._connection(self._several) as connection:
            if await check_sqlalchemy(connection, "database"):
                # Only a transaction keeps the server connection between the preparation of a
                # statement and its run.
                self._single = self._several

    async def close(self) -> None:
        """Accept no more statements."""
        self.abandon()

    def abandon(self) -> None:
        """Accept no more statements."""
        self._writing = self._scanning = self._affinity = None

    async def read(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement that only reads; if its connection is dead, once more on another."""
        return await self._read(lambda fetch: fetch(statement, values))

    async def scan(self, work: Work[_T]) -> _T:
        """Run statements that only read; if their connection is dead, once more on another."""
        self._opened()
        if self._scanning is None:
            raise ClientClosed
        async with self._scanning:
            return await self._read(work)

    async def write(self, work: Work[_T]) -> _T:
        """Run statements that write, each committed by itself."""
        async with self._opened(), self._connection(self._single) as connection:
            return await work(partial(fetch_rows, connection))

    async def transact(self, work: Work[_T]) -> _T:
        """Run statements that write in one transaction."""
        async with self._opened(), self._connection(self._several) as connection:
            return await work(partial(fetch_rows, connection))

    async def append(self, statement: Executable, rows: Sequence[Mapping[str, Any]]) -> None:
        """Run a statement that inserts, once for each row, in one transaction."""
        async with self._opened(), self._connection(self._several) as connection:
            await connection.execute(statement, rows)

    async def _read(self, work: Work[_T]) -> _T:
        try:
            async with self._connection(self._single) as connection:
                return await work(partial(fetch_rows, connection))
        except StoreUnavailable as error:
            cause = error.__cause__
            if not (is_lost(cause) or isinstance(cause, asyncpg.InternalClientError)):
                raise
        async with self._connection(self._single) as connection:
            return await work(partial(fetch_rows, connection))

    def _opened(self) -> Share:
        if self._writing is None or self._affinity is None:
            raise ClientClosed
        if self._affinity.loop is not running_loop():
            raise self._affinity.error()
        return self._writing

    @asynccontextmanager
    async def _connection(self, engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
        """Lend a connection in a transaction, and translate exceptions."""
        self._opened()
        connecting = True
        try:
            async with engine.connect() as connection:
                await self._replace_dead(connection)
                connecting = False
                try:
                    async with connection.begin():
                        yield connection
                except asyncpg.InternalClientError:
                    # The server has said that it ends the connection, and has not ended it yet.
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

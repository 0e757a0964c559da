"""Runs statements on an asyncpg pool: one that the store opens, or a host's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import asyncpg
from asyncpg.pool import PoolConnectionProxy
from sqlalchemy import Executable

from incidentkit.domain.errors import (
    ClientClosed,
    IncidentKitError,
    StoreError,
    StoreUnavailable,
)
from incidentkit.store.executor import Rows, Work
from incidentkit.store.options import StoreOptions
from incidentkit.store.postgresql.driver import (
    asyncpg_dsn,
    compile_statement,
    fetch_rows,
    unreadable_url,
)
from incidentkit.store.postgresql.errors import LOST, UNREADABLE_URL, translate_error
from incidentkit.store.postgresql.leases import Leases

_T = TypeVar("_T")

logger = logging.getLogger("incidentkit.store")


class PoolExecutor:
    """Runs statements on a pool of asyncpg.

    Args:
        database: ``postgresql://user:password@host:port/database``; further parameters as asyncpg
            takes them, such as ``?sslmode=require``. Or an open pool, which stays the host's.
        options: Sizes and time limits; for a host's pool, the time to wait for a connection.
    """

    in_host_transaction = False

    def __init__(
        self, database: str | asyncpg.Pool[asyncpg.Record], options: StoreOptions | None = None
    ) -> None:
        self._database = asyncpg_dsn(database) if isinstance(database, str) else database
        self._options = options or StoreOptions()
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._leases: Leases | None = None

    async def open(self) -> None:
        """Connect; a host's pool connects when a statement needs a connection."""
        options = self._options
        self._pool = (
            await asyncpg.create_pool(
                self._database,
                min_size=0,
                max_size=options.pool_size + options.max_overflow,
                timeout=options.connect_timeout,
                command_timeout=options.statement_timeout,
                reset=_keep_state,
                init=_log_statements if options.echo else None,
            )
            if isinstance(self._database, str)
            else self._database
        )
        own = self._pool is not self._database
        self._leases = Leases(self._pool, options.pool_timeout, keep=own)
        if own:
            await self._connect()

    async def _connect(self) -> None:
        """Make the first connection, for which the pool parses the URL."""
        try:
            async with self._connection():
                pass
        except StoreError as error:
            cause = error.__cause__
            if isinstance(cause, UNREADABLE_URL) and not isinstance(cause, OSError):
                # Without its cause, which shows parts of the URL.
                raise unreadable_url() from None
            raise

    async def close(self) -> None:
        """Close the pool; running calls have ``pool_timeout`` seconds to finish."""
        pool, self._pool = self._pool, None
        leases, self._leases = self._leases, None
        if pool is None or leases is None:
            return
        finishing = asyncio.ensure_future(leases.finish())
        if pool is not self._database:
            try:
                async with asyncio.timeout(self._options.pool_timeout):
                    await pool.close()
            except (TimeoutError, *LOST):
                pool.terminate()
        await finishing

    async def read(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement that only reads; if its connection is dead, once more on another."""
        try:
            async with self._connection() as connection:
                return await fetch_rows(connection, statement, values)
        except StoreUnavailable as error:
            if not isinstance(error.__cause__, LOST):
                raise
        async with self._connection() as connection:
            return await fetch_rows(connection, statement, values)

    async def write(self, work: Work[_T]) -> _T:
        """Run statements that write, once: a lost answer may hide a commit."""
        async with self._connection() as connection:
            return await work(partial(fetch_rows, connection))

    async def transact(self, work: Work[_T]) -> _T:
        """Run statements that write in one transaction."""
        async with (
            self._connection() as connection,
            connection.transaction(isolation="read_committed"),
        ):
            return await work(partial(fetch_rows, connection))

    async def append(self, statement: Executable, rows: Sequence[Mapping[str, Any]]) -> None:
        """Run a statement that inserts, once for each row, in one transaction."""
        compiled = compile_statement(statement)
        values = [[row[name] for name in compiled.parameters] for row in rows]
        async with self._connection() as connection:
            await connection.executemany(compiled.text, values)

    def _connection(self) -> _Lent:
        if self._leases is None:
            raise ClientClosed
        return _Lent(self._leases)


class _Lent:
    """A connection that is lent to one call; exceptions of asyncpg are translated."""

    __slots__ = ("_connection", "_leases")

    _connection: PoolConnectionProxy[asyncpg.Record]

    def __init__(self, leases: Leases) -> None:
        self._leases = leases

    async def __aenter__(self) -> PoolConnectionProxy[asyncpg.Record]:
        try:
            self._connection = await self._leases.take()
        except asyncpg.UndefinedObjectError as error:
            raise StoreError("it does not know a parameter of the URL") from error
        except Exception as error:
            raise translate_error(error) from error
        return self._connection

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        connection = self._connection
        if error is None:
            try:
                await self._leases.put(connection)
            except (*LOST, OSError, asyncpg.PostgresError) as lost:
                # The statements succeeded: raising would tell the caller otherwise.
                logger.warning("A connection was lost when given back: %s", type(lost).__name__)
            return
        if isinstance(error, LOST):
            # The server may have announced its shutdown before the connection ends.
            with suppress(asyncpg.InterfaceError):  # Or it is closed, and back in the pool.
                connection.terminate()
        # The pool waits until the server has cancelled the statement. A caller that was cancelled,
        # or ran out of time, must not wait for that.
        self._leases.give_back_later(connection)
        if isinstance(error, Exception) and not isinstance(error, IncidentKitError):
            raise translate_error(error) from error


async def _keep_state(_: Any) -> None:
    """Skip asyncpg's reset query, one round trip for each call: the statements leave no state."""


async def _log_statements(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    connection.add_query_logger(_log_statement)


def _log_statement(query: Any) -> None:
    logger.info("%s (%.1f ms)", query.query, query.elapsed * 1000)

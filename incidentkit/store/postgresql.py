"""Incidents in PostgreSQL, on an asyncpg pool.

The statements are compiled once from the Core expressions; SQLAlchemy takes no part in a call.
"""

from __future__ import annotations

import asyncio
import logging
import re
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import asyncpg
from attrs import frozen
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg

from incidentkit.errors import (
    ClientClosed,
    InvalidSettings,
    SchemaOutOfDate,
    StoreError,
    StoreUnavailable,
)
from incidentkit.store import statements
from incidentkit.store.base import StoreOptions
from incidentkit.store.statements import read_incident, read_page
from incidentkit.store.tables import SCHEMA_REVISION, check_revision

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from asyncpg.pool import PoolConnectionProxy
    from sqlalchemy import Dialect
    from sqlalchemy.sql.expression import ClauseElement

    from incidentkit.models import Incident, IncidentStatus, ListQuery, NewIncident
    from incidentkit.store.base import Page, RequestRecord

Rows: TypeAlias = list["asyncpg.Record"]

logger = logging.getLogger("incidentkit.store")

_new_dialect: Any = PGDialect_asyncpg
_DIALECT: Final[Dialect] = _new_dialect()

_LOST: Final = (
    ConnectionError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
)
"""The connection died, the statement may be sent again on another if it only reads."""

_AWAY: Final = (
    *_LOST,
    OSError,
    TimeoutError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.TransactionRollbackError,
    asyncpg.LockNotAvailableError,
)
"""What may pass without anybody changing the statement or the schema."""

UNREADABLE_URL: Final = (ValueError, OverflowError)
"""What asyncpg raises on connecting if a URL cannot be read, or its port is none."""

_OTHER_SCHEMA: Final = (
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedColumnError,
    asyncpg.UndefinedObjectError,
    asyncpg.InvalidSchemaNameError,
)


@frozen
class _Compiled:
    """A statement as asyncpg takes it: the text, and the order of its parameters."""

    text: str
    parameters: tuple[str, ...]


def compile_statement(statement: ClauseElement) -> _Compiled:
    """Return the statement as text for asyncpg."""
    compiled: Any = statement.compile(dialect=_DIALECT)
    return _Compiled(compiled.string, tuple(compiled.positiontup or ()))


_INSERT_INCIDENT: Final = compile_statement(statements.INSERT_INCIDENT)
_SELECT_INCIDENT: Final = compile_statement(statements.SELECT_INCIDENT)
_UPDATE_STATUS: Final = compile_statement(statements.UPDATE_STATUS)
_SELECT_PAGE: Final = {
    filters: compile_statement(statement) for filters, statement in statements.SELECT_PAGE.items()
}
_SELECT_TOKEN: Final = compile_statement(statements.SELECT_TOKEN)
_INSERT_REQUEST_LOG: Final = compile_statement(statements.INSERT_REQUEST_LOG)
_SELECT_REVISION: Final = compile_statement(statements.SELECT_REVISION)


def asyncpg_dsn(database_url: str) -> str:
    """Return the URL as asyncpg takes it: without SQLAlchemy's driver name and its ``ssl=``."""
    server, mark, query = database_url.partition("://")[2].partition("?")
    parameters = [re.sub(r"^ssl=", "sslmode=", parameter) for parameter in query.split("&")]
    return f"postgresql://{server}{mark}{'&'.join(parameters)}"


def unreadable_url() -> InvalidSettings:
    """Return what a caller sees for a URL that asyncpg refuses."""
    return InvalidSettings("database_url", "is not a URL that PostgreSQL's driver can read")


def translate_error(error: Exception) -> StoreError:
    """Return what a caller sees for an exception of asyncpg or of the network."""
    if isinstance(error, _OTHER_SCHEMA):
        return SchemaOutOfDate(None, SCHEMA_REVISION)
    if isinstance(error, asyncpg.InvalidAuthorizationSpecificationError):
        return StoreUnavailable("it refused the credentials")
    if isinstance(error, asyncpg.InvalidCatalogNameError):
        return StoreUnavailable("there is no such database on the server")
    if isinstance(error, TimeoutError):
        return StoreUnavailable("it did not answer in time")
    if isinstance(error, _AWAY):
        return StoreUnavailable("the connection was refused or lost")
    sqlstate = getattr(error, "sqlstate", None)
    return StoreError(f"SQLSTATE {sqlstate}" if sqlstate else "unexpected failure of the driver")


async def _keep_state(_: Any) -> None:
    """Skip asyncpg's reset query, a round trip for each call: our statements leave no state."""


class PostgresStore:
    """Incidents in PostgreSQL.

    Args:
        database_url: ``postgresql://user:password@host:port/database``; further parameters as
            asyncpg takes them, such as ``?sslmode=require``.
        options: Sizes and timeouts.

    The schema is checked when the store opens, never changed: ``incidentkit db upgrade`` does
    that.
    """

    def __init__(self, database_url: str, options: StoreOptions | None = None) -> None:
        self._dsn = asyncpg_dsn(database_url)
        self._options = options or StoreOptions()
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._giving_back: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Connect and check the schema."""
        options = self._options
        self._pool = await asyncpg.create_pool(
            self._dsn,
            min_size=0,
            max_size=options.pool_size + options.max_overflow,
            timeout=options.connect_timeout,
            command_timeout=options.statement_timeout,
            reset=_keep_state,
            init=_log_statements if options.echo else None,
        )
        try:
            await self.check()
        except BaseException as error:
            await self.close()
            # The pool reads the URL when it first connects.
            if isinstance(error, StoreError) and isinstance(error.__cause__, UNREADABLE_URL):
                # Without its cause, which shows parts of the URL.
                raise unreadable_url() from None
            raise

    async def close(self) -> None:
        """Close the pool; calls still running get a moment to end."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        try:
            async with asyncio.timeout(self._options.pool_timeout):
                await pool.close()
        except (TimeoutError, *_LOST):
            pool.terminate()
        if self._giving_back:
            await asyncio.wait(self._giving_back)

    async def check(self) -> None:
        """Raise unless the database answers and has our schema."""
        rows = await self._read(_SELECT_REVISION, {})
        check_revision(rows[0][0] if rows else None)

    async def create(self, incident: NewIncident) -> Incident:
        """Store the incident in one statement."""
        rows = await self._run(
            _INSERT_INCIDENT,
            {
                "incident_message": incident.incident_message,
                "incident_type": incident.incident_type,
                "source": incident.source,
            },
        )
        return read_incident(rows[0])

    async def list(self, query: ListQuery) -> Page:
        """Read one page and its token in one statement."""
        rows = await self._read(
            _SELECT_PAGE[query.status is not None, query.source is not None],
            {
                "status": query.status,
                "source": query.source,
                "limit": query.limit,
                "offset": query.offset,
            },
        )
        return read_page(rows)

    async def token(self) -> str | None:
        """Read the token in one statement."""
        ((token,),) = await self._read(_SELECT_TOKEN, {})
        return token if token is None else str(token)

    async def get(self, incident_id: int) -> Incident | None:
        """Read one incident in one statement."""
        rows = await self._read(_SELECT_INCIDENT, {"incident_id": incident_id})
        return read_incident(rows[0]) if rows else None

    async def update_status(self, incident_id: int, status: IncidentStatus) -> Incident | None:
        """Change the status in one statement."""
        rows = await self._run(_UPDATE_STATUS, {"id": incident_id, "status": status})
        return read_incident(rows[0]) if rows else None

    async def log_requests(self, records: Sequence[RequestRecord]) -> None:
        """Append the records in one batch."""
        rows = [
            [getattr(record, name) for name in _INSERT_REQUEST_LOG.parameters] for record in records
        ]
        async with self._connection() as connection:
            await connection.executemany(_INSERT_REQUEST_LOG.text, rows)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[PoolConnectionProxy[asyncpg.Record]]:
        """Lend a connection, and translate what is raised meanwhile."""
        pool, seconds = self._pool, self._options.pool_timeout
        if pool is None:
            raise ClientClosed
        try:
            connection = await pool.acquire(timeout=seconds)
        except asyncpg.UndefinedObjectError as error:
            raise StoreError("it does not know a parameter of the URL") from error
        except Exception as error:
            raise translate_error(error) from error
        try:
            yield connection
        except BaseException as error:
            if isinstance(error, _LOST):
                # It may have read the server's farewell and not yet the end of the connection.
                with suppress(asyncpg.InterfaceError):  # Or it is closed, and given back.
                    connection.terminate()
            # Giving back waits for the server to cancel the statement, for which the caller,
            # cancelled or out of time, should not wait.
            task = asyncio.ensure_future(self._give_back(pool, connection))
            self._giving_back.add(task)
            task.add_done_callback(self._giving_back.discard)
            if isinstance(error, Exception):
                raise translate_error(error) from error
            raise
        await pool.release(connection, timeout=seconds)

    async def _give_back(
        self,
        pool: asyncpg.Pool[asyncpg.Record],
        connection: PoolConnectionProxy[asyncpg.Record],
    ) -> None:
        # A connection that cannot be given back in time is closed by the pool.
        with suppress(Exception):
            await pool.release(connection, timeout=self._options.pool_timeout)

    async def _read(self, statement: _Compiled, values: Mapping[str, Any]) -> Rows:
        """Run a statement that only reads, once more if its connection turns out to be dead."""
        try:
            return await self._run(statement, values)
        except StoreUnavailable as error:
            if not isinstance(error.__cause__, _LOST):
                raise
        return await self._run(statement, values)

    async def _run(self, statement: _Compiled, values: Mapping[str, Any]) -> Rows:
        """Run a statement once: a write must not be sent again, a lost answer may hide a commit."""
        arguments = [values[name] for name in statement.parameters]
        async with self._connection() as connection:
            return await connection.fetch(statement.text, *arguments)


async def _log_statements(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    connection.add_query_logger(_log_statement)


def _log_statement(query: Any) -> None:
    logger.info("%s (%.1f ms)", query.query, query.elapsed * 1000)

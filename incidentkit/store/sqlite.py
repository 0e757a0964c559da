"""Incidents in an SQLite file, or in memory, through SQLAlchemy and aiosqlite."""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from attrs import asdict
from sqlalchemy import NullPool, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import create_async_engine

from incidentkit.errors import (
    ClientClosed,
    IncidentKitError,
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
    from collections.abc import Coroutine, Mapping, Sequence

    from sqlalchemy import Executable, Row
    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from incidentkit.models import Incident, IncidentStatus, ListQuery, NewIncident
    from incidentkit.store.base import Page, RequestRecord

_T = TypeVar("_T")
Rows: TypeAlias = "Sequence[Row[*tuple[Any, ...]]]"

logger = logging.getLogger("incidentkit.store")

PRIMARY_CODE: Final = 0xFF
"""The part of an SQLite error code that names its kind."""

UNAVAILABLE: Final = {
    sqlite3.SQLITE_BUSY: "another process kept it locked for too long",
    sqlite3.SQLITE_LOCKED: "another process kept it locked for too long",
    sqlite3.SQLITE_CANTOPEN: "the file cannot be opened",
    sqlite3.SQLITE_READONLY: "the file cannot be written",
    sqlite3.SQLITE_IOERR: "the file cannot be read or written",
    sqlite3.SQLITE_FULL: "the disk is full",
}

MEMORY: Final = (None, "", ":memory:")


def sqlite_url(database_url: str) -> URL:
    """Return the URL with aiosqlite as its driver.

    Raises:
        InvalidSettings: If it cannot be read.
    """
    try:
        url = make_url(database_url).set(drivername="sqlite+aiosqlite")
        os.fsencode(url.database or "")
    except (ArgumentError, ValueError):
        raise InvalidSettings("database_url", "is not an SQLite URL") from None
    if "\x00" in (url.database or ""):
        raise InvalidSettings("database_url", "names a file with a NUL character")
    if url.host or url.username or url.port:
        raise InvalidSettings("database_url", "names a file on SQLite: sqlite+aiosqlite:///file")
    if url.query and "uri" not in url.query:
        # SQLAlchemy would ignore them with a warning.
        raise InvalidSettings("database_url", "may have parameters on SQLite only with uri=true")
    return url


async def probe(url: URL) -> None:
    """Raise what SQLite raises if the file cannot be opened.

    aiosqlite leaves a thread behind when it fails to connect, which fails in its turn if the event
    loop ends at once; this asks first.
    """

    def connect() -> None:
        engine = create_engine(url.set(drivername="sqlite"), poolclass=NullPool)
        engine.connect().close()

    await asyncio.to_thread(connect)


def translate_error(error: Exception) -> StoreError:
    """Return what a caller sees for an exception of SQLAlchemy or SQLite."""
    if isinstance(error, TimeoutError):
        return StoreUnavailable("it did not answer in time")
    if isinstance(error, PoolTimeoutError):
        return StoreUnavailable("no connection became free in time")
    if not isinstance(error, DBAPIError):
        return StoreError("a row holds what no incident can have")
    code = getattr(error.orig, "sqlite_errorcode", 0) & PRIMARY_CODE
    if code == sqlite3.SQLITE_ERROR and "no such" in str(error.orig):
        return SchemaOutOfDate(None, SCHEMA_REVISION)
    if code in UNAVAILABLE:
        return StoreUnavailable(UNAVAILABLE[code])
    name = getattr(error.orig, "sqlite_errorname", None)
    return StoreError(name or "unexpected failure of the driver")


class SqliteStore:
    """Incidents in SQLite.

    Args:
        database_url: ``sqlite+aiosqlite:///file``, with a fourth slash for an absolute path, or
            ``sqlite+aiosqlite:///:memory:`` for a database that lives as long as the store is
            open.
        options: Sizes and timeouts.

    The schema is brought up to date when the store opens. A call that its caller cancels still
    runs to its end, so that no connection is left in the middle of a statement.
    """

    def __init__(self, database_url: str, options: StoreOptions | None = None) -> None:
        self._url = sqlite_url(database_url)
        self._options = options or StoreOptions()
        self._engine: AsyncEngine | None = None
        self._running: set[asyncio.Task[Any]] = set()
        self._writing = asyncio.Lock()

    async def open(self) -> None:
        """Open the file, creating it if need be, and bring its schema up to date."""
        from incidentkit.store import migrate  # noqa: PLC0415

        # Writers of one process queue here, which is fairer and faster than SQLite's polling. New
        # at each opening, which may be on another event loop.
        self._writing = asyncio.Lock()
        self._engine = self._create_engine()
        try:
            if self._url.database in MEMORY:
                await migrate.upgrade_memory(self._engine)
            else:
                await self._run(probe(self._url))
                try:
                    await self.check()
                except SchemaOutOfDate:
                    await migrate.upgrade(self._url.render_as_string(hide_password=False))
                    await self.check()
        except BaseException:
            await self.close()
            raise

    def _create_engine(self) -> AsyncEngine:
        options = self._options
        memory = self._url.database in MEMORY
        pool: dict[str, Any] = (
            {}
            if memory
            else {
                "pool_size": options.pool_size,
                "max_overflow": options.max_overflow,
                "pool_timeout": options.pool_timeout,
            }
        )
        engine = create_async_engine(
            self._url,
            isolation_level="AUTOCOMMIT",
            pool_reset_on_return=None,
            connect_args={"timeout": options.statement_timeout},
            hide_parameters=True,
            **pool,
        )
        event.listen(engine.sync_engine, "connect", _prepare_connection)
        if options.echo:
            event.listen(engine.sync_engine, "before_cursor_execute", _log_statement)
        return engine

    async def close(self) -> None:
        """Wait for running calls, then close every connection."""
        engine, self._engine = self._engine, None
        if self._running:
            await asyncio.wait(self._running)
        if engine is not None:
            await engine.dispose()

    async def check(self) -> None:
        """Raise unless the file can be read and has our schema."""
        rows = await self._read(statements.SELECT_REVISION, {})
        check_revision(rows[0][0] if rows else None)

    async def create(self, incident: NewIncident) -> Incident:
        """Store the incident in one statement."""
        rows = await self._write(
            statements.INSERT_INCIDENT,
            {
                "incident_message": incident.incident_message,
                "incident_type": incident.incident_type.value,
                "source": incident.source.value,
            },
        )
        return read_incident(rows[0])

    async def list(self, query: ListQuery) -> Page:
        """Read one page and its token in one statement."""
        values: dict[str, Any] = {"limit": query.limit, "offset": query.offset}
        if query.status is not None:
            values["status"] = query.status.value
        if query.source is not None:
            values["source"] = query.source.value
        rows = await self._read(
            statements.SELECT_PAGE[query.status is not None, query.source is not None], values
        )
        return read_page(rows)

    async def token(self) -> str | None:
        """Read the token in one statement."""
        ((token,),) = await self._read(statements.SELECT_TOKEN, {})
        return token if token is None else str(token)

    async def get(self, incident_id: int) -> Incident | None:
        """Read one incident in one statement."""
        rows = await self._read(statements.SELECT_INCIDENT, {"incident_id": incident_id})
        return read_incident(rows[0]) if rows else None

    async def update_status(self, incident_id: int, status: IncidentStatus) -> Incident | None:
        """Change the status in one statement."""
        rows = await self._write(
            statements.UPDATE_STATUS, {"id": incident_id, "status": status.value}
        )
        return read_incident(rows[0]) if rows else None

    async def log_requests(self, records: Sequence[RequestRecord]) -> None:
        """Append the records in one transaction."""
        await self._run(self._append([asdict(record) for record in records]), writes=True)

    async def _append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        async with self._connection() as connection:
            # The connection commits by itself after each statement, unless told to begin.
            await connection.exec_driver_sql("BEGIN IMMEDIATE")
            try:
                await connection.execute(statements.INSERT_REQUEST_LOG, rows)
                await connection.exec_driver_sql("COMMIT")
            except BaseException:
                await connection.exec_driver_sql("ROLLBACK")
                raise

    def _connection(self) -> AsyncConnection:
        if self._engine is None:
            raise ClientClosed
        return self._engine.connect()

    async def _read(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        return await self._run(self._execute(statement, values))

    async def _write(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        return await self._run(self._execute(statement, values), writes=True)

    async def _execute(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        async with self._connection() as connection:
            return (await connection.execute(statement, values)).all()

    async def _run(self, work: Coroutine[Any, Any, _T], *, writes: bool = False) -> _T:
        """Run the work to its end, whatever becomes of the caller.

        SQLAlchemy throws a connection away if a call on it is cancelled, and with it a database
        in memory.
        """
        task = asyncio.ensure_future(self._in_turn(work) if writes else work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        seconds = self._options.pool_timeout + self._options.statement_timeout
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.shield(task)
        except (IncidentKitError, asyncio.CancelledError):
            raise
        except Exception as error:
            raise translate_error(error) from error
        finally:
            # Nobody may be left to take note of a failure.
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

    async def _in_turn(self, work: Coroutine[Any, Any, _T]) -> _T:
        try:
            async with asyncio.timeout(self._options.pool_timeout):
                await self._writing.acquire()
        except BaseException:
            work.close()
            raise
        try:
            return await work
        finally:
            self._writing.release()


def _prepare_connection(connection: Any, _: object) -> None:
    cursor = connection.cursor()
    try:
        cursor.execute("PRAGMA journal_mode = WAL")
    except sqlite3.OperationalError as error:
        # SQLite does not wait here. The file stays as it is until a later connection asks again.
        if error.sqlite_errorcode & PRIMARY_CODE != sqlite3.SQLITE_BUSY:
            raise
    # Not NORMAL, which may lose the last commits when the power fails.
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _log_statement(*arguments: Any) -> None:
    logger.info("%s", arguments[2])

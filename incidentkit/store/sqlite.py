"""Incidents in an SQLite file, or in memory, through SQLAlchemy and aiosqlite."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sqlite3
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from attrs import asdict
from sqlalchemy import NullPool, StaticPool, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import create_async_engine

from incidentkit.errors import (
    ClientClosed,
    DuplicateOpenIncident,
    IncidentKitError,
    InvalidSettings,
    SchemaOutOfDate,
    StoreError,
    StoreUnavailable,
)
from incidentkit.models import OPEN, EventKind, IncidentStatus
from incidentkit.store import sqlite_statements as writes
from incidentkit.store import statements
from incidentkit.store.base import StoreOptions
from incidentkit.store.operations import EVENTS, Operations, found
from incidentkit.store.statements import read_event, read_incident
from incidentkit.store.tables import SCHEMA_REVISION, check_revision

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
    from datetime import datetime

    from sqlalchemy import Executable
    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from incidentkit.models import Incident, IncidentEvent, NewIncident, StatusChange
    from incidentkit.store.base import RequestRecord, StoreOperations
    from incidentkit.store.operations import Fetch, Rows
    from incidentkit.transitions import Transitions

_T = TypeVar("_T")

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


async def fetch_rows(
    connection: AsyncConnection, statement: Executable, values: Mapping[str, Any]
) -> Rows:
    """Run a statement on a connection of SQLAlchemy."""
    result = await connection.execute(statement, values)
    return result.all() if result.returns_rows else ()


async def in_transaction(connection: AsyncConnection) -> bool:
    """Return whether SQLite itself is in a transaction, whatever SQLAlchemy takes it for."""
    raw: Any = await connection.get_raw_connection()
    return bool(raw.driver_connection.in_transaction)


class SqliteOperations(Operations):
    """What is done with incidents in SQLite, in a transaction that nobody writes beside."""

    _claim_key = writes.CLAIM_KEY
    _delete_expired_keys = writes.DELETE_EXPIRED_KEYS
    _words_match = writes.WORDS_MATCH

    async def _create(self, fetch: Fetch, incident: NewIncident, actor: str | None) -> Incident:
        rows = await fetch(
            writes.INSERT_INCIDENT[incident.dedup_key is not None],
            {
                "incident_message": incident.incident_message,
                "incident_type": incident.incident_type.value,
                "source": incident.source.value,
                "dedup_key": incident.dedup_key,
            },
        )
        stored = read_incident(rows[0])
        repeated = stored.occurrences > 1
        differs = repeated and incident.incident_message != stored.incident_message
        await _insert_event(
            fetch,
            incident_id=stored.incident_id,
            kind=EventKind.RECURRED if repeated else EventKind.CREATED,
            to_status=None if repeated else stored.incident_type,
            actor=actor,
            note=incident.incident_message if differs else None,
        )
        return stored

    async def _update_status(
        self, fetch: Fetch, change: StatusChange, transitions: Transitions, actor: str | None
    ) -> Incident:
        key = {"incident_id": change.incident_id}
        incident = read_incident(
            found(change.incident_id, await fetch(statements.SELECT_INCIDENT, key))
        )
        if not transitions.check(incident, change):
            if change.note is not None:
                await self._note(fetch, change.incident_id, change.note, actor)
            return incident
        if change.status is OPEN and await fetch(
            writes.SELECT_OPEN_DUPLICATE, {"dedup_key": incident.dedup_key}
        ):
            raise DuplicateOpenIncident(incident)
        rows = await fetch(
            writes.UPDATE_STATUS, {"id": change.incident_id, "status": change.status.value}
        )
        await _insert_event(
            fetch,
            incident_id=change.incident_id,
            kind=EventKind.STATUS_CHANGED,
            from_status=incident.incident_type,
            to_status=change.status,
            actor=actor,
            note=change.note,
        )
        return read_incident(rows[0])

    async def _note(
        self, fetch: Fetch, incident_id: int, note: str, actor: str | None
    ) -> IncidentEvent:
        key = {"incident_id": incident_id}
        found(incident_id, await fetch(statements.SELECT_INCIDENT, key))
        return await _insert_event(
            fetch,
            incident_id=incident_id,
            kind=EventKind.NOTED,
            actor=actor,
            note=note,
        )

    def _words(self, text: str) -> str:
        """Return the words of the text for FTS5, each the beginning of a word."""
        return " ".join(f'"{word}"*' for word in re.findall(r"[^\W_]+", text))

    async def check_order(self) -> None:
        """Do nothing: where there is one writer, events are in the order of their ids."""

    async def _purge(
        self, fetch: Fetch, ended_before: datetime, limit: int, actor: str | None
    ) -> tuple[int, bool]:
        values = {"ended_before": ended_before, "limit": limit}
        found = {row[0]: row[1] for row in await fetch(writes.SELECT_PURGEABLE, values)}
        if not found:
            return 0, False
        some = {"incident_ids": list(found), "events": EVENTS}
        await fetch(writes.INSERT_PLACES, some)
        await fetch(writes.DELETE_EVENTS, some)
        left = await fetch(writes.SELECT_WITH_EVENTS, {"incident_ids": list(found)})
        gone = found.keys() - {row[0] for row in left}
        await fetch(writes.DELETE_INCIDENTS, {"incident_ids": list(gone)})
        for incident_id in sorted(gone):
            await _insert_event(
                fetch,
                incident_id=incident_id,
                kind=EventKind.PURGED,
                from_status=IncidentStatus(found[incident_id]),
                actor=actor,
            )
        return len(gone), len(found) == limit or len(gone) < len(found)


async def _insert_event(  # noqa: PLR0913
    fetch: Fetch,
    *,
    incident_id: int,
    kind: EventKind,
    from_status: IncidentStatus | None = None,
    to_status: IncidentStatus | None = None,
    actor: str | None = None,
    note: str | None = None,
) -> IncidentEvent:
    rows = await fetch(
        writes.INSERT_EVENT,
        {
            "incident_id": incident_id,
            "kind": kind.value,
            "from_status": from_status and from_status.value,
            "to_status": to_status and to_status.value,
            "actor": actor,
            "note": note,
        },
    )
    return read_event(rows[0])


class SqliteStore(SqliteOperations):
    """Incidents in SQLite.

    Args:
        database: ``sqlite+aiosqlite:///file``, with a fourth slash for an absolute path, or
            ``sqlite+aiosqlite:///:memory:`` for a database that lives as long as the store is
            open. Or an engine, which stays the host's.
        options: Sizes and timeouts.

    The schema is brought up to date when the store opens. A call that its caller cancels still
    runs to its end, so that no connection is left in the middle of a statement.
    """

    def __init__(self, database: str | AsyncEngine, options: StoreOptions | None = None) -> None:
        self._url = sqlite_url(database) if isinstance(database, str) else _file_of(database.url)
        self._host_engine = None if isinstance(database, str) else database
        self._options = options or StoreOptions()
        self._engine: AsyncEngine | None = None
        self._running: set[asyncio.Task[Any]] = set()
        self._writing = asyncio.Lock()
        # Whether it can be seen that a transaction of the host has the only connection.
        self._tells = False

    async def open(self) -> None:
        """Open the file, creating it if need be, and bring its schema up to date."""
        from incidentkit.store import migrate  # noqa: PLC0415

        # Writers of one process queue here, which is fairer and faster than SQLite's polling. New
        # at each opening, which may be on another event loop.
        self._writing = asyncio.Lock()
        self._engine = self._create_engine() if self._host_engine is None else self._host_engine
        try:
            if self._url.database in MEMORY:
                await migrate.upgrade_memory(self._engine)
                # From Python 3.12 on a driver may be told to be in a transaction all the time.
                self._tells = self._host_engine is not None and not _shared_by_a_transaction(
                    self._host_engine
                )
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
            # In memory there is one connection, and what ends with it rolled back ends for all.
            skip_autocommit_rollback=True,
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
        if engine is not None and self._host_engine is None:
            await engine.dispose()

    async def check(self) -> None:
        """Raise unless the file can be read and has our schema."""
        rows = await self._read(statements.SELECT_REVISION, {})
        check_revision(rows[0][0] if rows else None)

    def join(self, connection: object) -> StoreOperations:
        """Return what is done in the transaction of a host's connection."""
        from incidentkit.store.joined import join  # noqa: PLC0415

        return join(connection, "sqlite")

    async def log_requests(self, records: Sequence[RequestRecord]) -> None:
        """Append the records in one transaction."""
        rows = [asdict(record) for record in records]
        await self._run(self._append(rows), writes=True)

    async def _append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        async with self._transaction() as connection:
            await connection.execute(statements.INSERT_REQUEST_LOG, rows)

    def _connection(self) -> AsyncConnection:
        if self._engine is None:
            raise ClientClosed
        if self._tells and _shared_by_a_transaction(self._engine):
            raise StoreUnavailable("a transaction has the only connection to it")
        return self._engine.connect()

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[AsyncConnection]:
        """Lend a connection that has the database to itself until it commits."""
        async with self._connection() as connection:
            if self._host_engine is not None:
                await connection.execute(writes.LOCK)
                if await in_transaction(connection):
                    yield connection
                    await connection.commit()
                    return
            # The connection commits by itself after each statement, unless told to begin.
            await connection.exec_driver_sql("BEGIN IMMEDIATE")
            try:
                yield connection
                await connection.exec_driver_sql("COMMIT")
            except BaseException:
                # After some errors, such as a full disk, SQLite has done it already.
                with suppress(DBAPIError):
                    await connection.exec_driver_sql("ROLLBACK")
                raise

    async def _read(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        return await self._run(self._execute(statement, values))

    async def _execute(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        async with self._connection() as connection:
            return await fetch_rows(connection, statement, values)

    async def _write(self, work: Callable[[Fetch], Awaitable[_T]], *, atomic: bool = False) -> _T:  # noqa: ARG002
        """Run work in a transaction that has the database to itself from its start."""
        return await self._run(self._transact(work), writes=True)

    async def _transact(self, work: Callable[[Fetch], Awaitable[_T]]) -> _T:
        async with self._transaction() as connection:
            return await work(partial(fetch_rows, connection))

    async def _run(self, work: Coroutine[Any, Any, _T], *, writes: bool = False) -> _T:
        """Run the work to its end, whatever becomes of the caller.

        SQLAlchemy throws a connection away if a call on it is cancelled, and with it a database
        in memory.
        """
        # In memory there is one connection, on which a read would see a write that is half way.
        alone = writes or self._url.database in MEMORY
        task = asyncio.ensure_future(self._in_turn(work) if alone else work)
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


def _file_of(url: URL) -> URL:
    """Return the URL of a host's engine without what is only about its connections."""
    return url if "uri" in url.query else url.set(query={})


def _shared_by_a_transaction(engine: AsyncEngine) -> bool:
    """Return whether a transaction goes on in the one connection that an engine has, if so.

    Whoever takes that connection and gives it back ends the transaction.
    """
    pool = engine.pool
    if not isinstance(pool, StaticPool) or "connection" not in vars(pool):
        return False
    driver: Any = pool.connection.driver_connection
    return driver is not None and bool(driver.in_transaction)


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

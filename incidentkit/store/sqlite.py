"""Incidents in an SQLite file, or in memory."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sqlalchemy import NullPool, QueuePool, StaticPool, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from incidentkit.batching import Batcher
from incidentkit.domain.errors import (
    ClientClosed,
    DuplicateOpenIncident,
    IncidentKitError,
    InvalidSettings,
    SchemaOutOfDate,
    StoreError,
    StoreUnavailable,
)
from incidentkit.domain.values import OPEN, EventKind, IncidentStatus
from incidentkit.store import sqlite_statements as writes
from incidentkit.store import statements
from incidentkit.store.base import StoreOptions
from incidentkit.store.bookmarks import Bookmarks
from incidentkit.store.operations import EVENTS, Operations, found
from incidentkit.store.statements import read_event, read_incident
from incidentkit.store.tables import SCHEMA_REVISION, check_revision

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from datetime import datetime

    from sqlalchemy import Connection, Engine, Executable
    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncConnection

    from incidentkit.domain.commands import NewIncident, StatusChange
    from incidentkit.domain.transitions import Transitions
    from incidentkit.domain.values import Incident, IncidentEvent
    from incidentkit.store.base import StoreOperations
    from incidentkit.store.operations import Fetch, Rows

_T = TypeVar("_T")

WRITES: Final = 100
"""Writes that share a transaction, at most."""

READS: Final = 10
"""Quick reads that are done one after the other, at most, without going back to the event loop."""

_QUICK: Final = frozenset(
    (
        statements.SELECT_INCIDENT,
        statements.SELECT_TOKEN,
        *(statement for key, statement in statements.SELECT_PAGE.items() if key[-1] == "any"),
    )
)
"""Reads that others need not mind waiting for."""

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
    _select_changes = statements.SELECT_CHANGES_BY_ID
    _looks_up_pairs = False

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
            open.
        options: Sizes and timeouts.

    The schema is brought up to date when the store opens. SQLite works in threads of the store: a
    call goes there once, whatever it takes. Writes that wait at the same time share a transaction,
    and quick reads, while every connection is in use, a way to the thread. A call that has begun
    runs to its end, also if its caller is cancelled. The time limits are for what has not: a write
    that has begun is waited for, so that what is reported as unavailable has not been stored.
    """

    def __init__(self, database: str, options: StoreOptions | None = None) -> None:
        self._url = sqlite_url(database)
        self._options = options or StoreOptions()
        self._patience = self._options.pool_timeout + self._options.statement_timeout
        self._threads: _Threads | None = None
        self._closing = False

    async def open(self) -> None:
        """Open the file, creating it if need be, and bring its schema up to date."""
        from incidentkit.store import migrate  # noqa: PLC0415

        memory = self._url.database in MEMORY
        try:
            if not memory:
                await probe(self._url)
            self._bookmarks = Bookmarks()
            self._closing = False
            self._threads = threads = _Threads(self._create_engine(), self._options, one=memory)
            if memory:
                await threads.run(migrate.upgrade_connection)
            else:
                try:
                    await self.check()
                except SchemaOutOfDate:
                    await migrate.upgrade(self._url.render_as_string(hide_password=False))
                    await self.check()
        except BaseException as error:
            await self.close()
            if isinstance(error, DBAPIError):
                raise translate_error(error) from error
            raise

    def _create_engine(self) -> Engine:
        options = self._options
        memory = self._url.database in MEMORY
        engine = create_engine(
            self._url.set(drivername="sqlite"),
            isolation_level="AUTOCOMMIT",
            # In memory there is one connection, and what ends with it rolled back ends for all.
            skip_autocommit_rollback=True,
            pool_reset_on_return=None,
            connect_args={"timeout": options.statement_timeout, "check_same_thread": False},
            hide_parameters=True,
            poolclass=StaticPool if memory else QueuePool,
            # One more is the writer's.
            **({} if memory else {"pool_size": options.pool_size + 1, "max_overflow": 0}),
        )
        event.listen(engine, "connect", _prepare_connection)
        if options.echo:
            event.listen(engine, "before_cursor_execute", _log_statement)
        return engine

    async def close(self) -> None:
        """Wait for running calls, then close every connection."""
        self._closing = True
        if self._threads is not None:
            await self._threads.close()
            # Not before: if the caller is cancelled the next one closes what is still open.
            self._threads = None

    async def check(self) -> None:
        """Raise unless the file can be read and has our schema."""
        rows = await self._read(statements.SELECT_REVISION, {})
        check_revision(rows[0][0] if rows else None)

    def join(self, connection: object) -> StoreOperations:
        """Return what is done in the transaction of a host's connection."""
        from incidentkit.store.joined import join  # noqa: PLC0415

        return join(connection, "sqlite")

    async def append(self, statement: Executable, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows with one statement, in one transaction."""
        # SQLAlchemy takes several values for a statement that returns no rows.
        several: Any = rows

        async def insert(fetch: Fetch) -> None:
            await fetch(statement, several)

        await self._write(insert)

    async def _read(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        threads = self._opened()
        try:
            async with asyncio.timeout(self._patience):
                read = threads.reads if statement in _QUICK else threads.slow_reads
                return await read((statement, values))
        except IncidentKitError:
            raise
        except Exception as error:
            raise translate_error(error) from error

    async def _write(self, work: Callable[[Fetch], Awaitable[_T]], *, atomic: bool = False) -> _T:  # noqa: ARG002
        """Run work in a transaction that has the database to itself from its start."""
        write = _Write(work)
        answer = self._opened().writes(write)
        try:
            done, _ = await asyncio.wait((answer,), timeout=self._patience)
            if done or not write.claim():
                written: _T = await answer
                return written
        except IncidentKitError:
            raise
        except Exception as error:
            raise translate_error(error) from error
        finally:
            # Without effect on what has begun, or has ended.
            write.claim()
            answer.cancel()
        raise StoreUnavailable("it did not answer in time")

    def _opened(self) -> _Threads:
        if self._threads is None or self._closing:
            raise ClientClosed
        return self._threads


class _Write:
    """Work that is either begun by the thread that writes, or given up by its caller."""

    def __init__(self, work: Callable[[Fetch], Awaitable[Any]]) -> None:
        self.work = work
        self._begun = False
        self._claimed = Lock()

    def claim(self) -> bool:
        """Decide what becomes of it, and return whether that was still to be decided."""
        return self._claimed.acquire(blocking=False)

    def begin(self) -> bool:
        """Return whether it is to be done; once begun it may be done again."""
        self._begun = self._begun or self.claim()
        return self._begun


class _Threads:
    """The threads of a store, and the connections that they use.

    Args:
        engine: Whose connections they are.
        options: How many there may be.
        one: Whether there is only one, for reads and writes.
    """

    def __init__(self, engine: Engine, options: StoreOptions, *, one: bool) -> None:
        self._engine = engine
        self._writer = ThreadPoolExecutor(1, "incidentkit-sqlite")
        self._readers = (
            self._writer if one else ThreadPoolExecutor(options.pool_size, "incidentkit-sqlite")
        )
        # There is a thread for each batch that may run, and no use in another that waits for one.
        self.writes: Batcher[_Write, Any] = Batcher(self._write_all, patient=True, size=WRITES)
        self.reads: Batcher[tuple[Executable, Mapping[str, Any]], Rows] = Batcher(
            self._read_all, running=1 if one else options.pool_size, patient=True, size=READS
        )
        self.slow_reads: Batcher[tuple[Executable, Mapping[str, Any]], Rows] = Batcher(
            self._read_all, running=1 if one else options.pool_size, patient=True, size=1
        )

    async def close(self) -> None:
        """Wait for what runs, then close every connection."""
        await self.reads.finish()
        await self.slow_reads.finish()
        await self.writes.finish()
        await self.run(lambda _: None)
        self._writer.shutdown()
        self._readers.shutdown()
        self._engine.dispose()

    async def run(self, work: Callable[[Connection], _T]) -> _T:
        """Run work in the thread that writes, on a connection."""
        return await asyncio.get_running_loop().run_in_executor(self._writer, self._lend, work)

    async def _write_all(self, given: Sequence[_Write]) -> Sequence[Any]:
        return await self.run(lambda connection: _transact(connection, given))

    async def _read_all(
        self, given: Sequence[tuple[Executable, Mapping[str, Any]]]
    ) -> Sequence[Rows | Exception]:
        def read(connection: Connection) -> list[Rows | Exception]:
            return [_outcome(partial(_fetch, connection, *each)) for each in given]

        return await asyncio.get_running_loop().run_in_executor(self._readers, self._lend, read)

    def _lend(self, work: Callable[[Connection], _T]) -> _T:
        with self._engine.connect() as connection:
            return work(connection)


def _transact(connection: Connection, given: Sequence[_Write]) -> list[Any]:
    """Do in one transaction what nobody has given up, and take back what fails."""

    async def fetch(statement: Executable, values: Mapping[str, Any]) -> Rows:
        return _fetch(connection, statement, values)

    # The connection commits by itself after each statement, unless told to begin.
    connection.exec_driver_sql("BEGIN IMMEDIATE")
    driver: Any = connection.connection.driver_connection
    outcomes: list[Any] = []
    try:
        for write in given:
            if not write.begin():
                outcomes.append(None)
                continue
            outcome = _outcome(partial(_do, connection, write.work, fetch))
            if not driver.in_transaction:
                break
            outcomes.append(outcome)
        else:
            connection.exec_driver_sql("COMMIT")
            return outcomes
    except BaseException:
        with suppress(DBAPIError):
            connection.exec_driver_sql("ROLLBACK")
        raise
    # SQLite took back all of it, as when the disk is full: the others are done without this one.
    place = len(outcomes)
    others = [*given[:place], *given[place + 1 :]]
    done = _transact(connection, others) if others else []
    return [*done[:place], outcome, *done[place:]]


def _do(connection: Connection, work: Callable[[Fetch], Awaitable[_T]], fetch: Fetch) -> _T:
    """Do a part of a transaction, and take it back if it fails."""
    connection.exec_driver_sql("SAVEPOINT incidentkit")
    try:
        done = _run(work(fetch))
    except BaseException:
        with suppress(DBAPIError):
            connection.exec_driver_sql("ROLLBACK TO incidentkit")
            connection.exec_driver_sql("RELEASE incidentkit")
        raise
    connection.exec_driver_sql("RELEASE incidentkit")
    return done


def _run(work: Awaitable[_T]) -> _T:
    """Run to its end what awaits nothing but statements, which here never take a turn."""
    steps = work.__await__()
    try:
        next(steps)
    except StopIteration as end:
        done: _T = end.value
        return done
    raise RuntimeError("It awaits something else")


def _outcome(call: Callable[[], _T]) -> _T | Exception:
    try:
        return call()
    except Exception as error:  # noqa: BLE001
        return error


def _fetch(connection: Connection, statement: Executable, values: Mapping[str, Any]) -> Rows:
    result = connection.execute(statement, values)
    return result.all() if result.returns_rows else ()


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

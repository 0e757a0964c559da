"""Migrate the schema.

A migration blocks the event loop that it runs on. It therefore runs in a thread, on an event loop
of its own.

Alembic keeps its operations in module globals, so only one migration runs at a time in a process.
Across processes, a migration holds a lock from its start to its end: on SQLite that of the file, on
PostgreSQL an advisory lock in a transaction of its own, since a migration may commit several.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, closing, contextmanager, nullcontext, suppress
from functools import cache, partial
from typing import Any, Final, TypeVar

import asyncpg
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import (
    Connection,
    NullPool,
    String,
    column,
    create_engine,
    delete,
    event,
    insert,
    inspect,
    select,
    table,
    text,
)
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.schema import CreateSchema

from incidentkit.affinity import check_running_loop
from incidentkit.domain.errors import InvalidSettings, StoreError, StoreUnavailable
from incidentkit.store.database import DatabaseKind, database_kind
from incidentkit.store.indexes import Overtaken
from incidentkit.store.mending import (
    mend,
    read_schema,
    replace_tokens,
    restore_token_function,
)
from incidentkit.store.migrations import MIGRATIONS
from incidentkit.store.postgresql.driver import unreadable_url
from incidentkit.store.postgresql.errors import (
    OPERATORS_CLASSES,
    UNREADABLE_URL,
    server_error,
    translate_error,
)
from incidentkit.store.postgresql.poolers import find_pooler
from incidentkit.store.postgresql.statements import (
    SELECT_DISORDERED_SEQUENCES,
    SELECT_KNOWN_IDS,
    SELECT_LAST_EVENT_ID,
    SELECT_STRANDED,
    SHIFT,
)
from incidentkit.store.postgresql.url import Server, parse_url, refused_parameter
from incidentkit.store.schema import (
    REVISIONS,
    SCHEMA_REVISION,
    VERSION_TABLE,
    Upgrade,
    check_parts,
    check_revision,
    check_schema,
    copied,
    in_the_way,
    migrations_below,
    migrations_to,
    named_place,
    unordered,
)
from incidentkit.store.sql.tables import incident_table, version_table
from incidentkit.store.sqlite.errors import PRIMARY_CODE
from incidentkit.store.sqlite.errors import translate_error as translate_sqlite
from incidentkit.store.sqlite.file import probe
from incidentkit.store.sqlite.url import IN_MEMORY, place_of, sqlite_url

ORIGIN_REVISION: Final = REVISIONS[0]
ORIGIN_VERSION_TABLE: Final = "alembic_version"

CONNECT_TIMEOUT: Final = 10.0
"""Seconds to wait for a new connection to PostgreSQL."""

LOCK_TIMEOUT: Final = 600.0
"""Seconds to wait for another process that is migrating the same SQLite file."""

LOCK_STEP: Final = 0.5
"""Seconds of this wait after which it can be cancelled."""

LOCK_POLL: Final = 0.5
"""Seconds between two attempts to start while another migration of the same database runs.

A migration must not wait inside a statement: a concurrent index build would wait for the statement.
"""

RELEASE_TIMEOUT: Final = 1.0
"""Seconds to wait for the server to release the lock of a finished migration."""

TABLE_LOCK_TIMEOUT: Final = 2.0
"""Seconds to wait for other users of a table, while further ones queue behind the migration."""

TABLE_LOCK_PAUSE: Final = 2.0
"""Seconds before the migration tries again, in which queued users get the table."""

TABLE_LOCK_ATTEMPTS: Final = 15
"""Maximum number of attempts to lock the tables."""

REPORT_INTERVAL: Final = 5.0
"""Seconds between two reports of the progress."""

LOCK_KEY: Final = 0x696E636964656E74
"""The key of the advisory lock for migrations on PostgreSQL: "incident" in ASCII."""

NO_TIME_LIMITS: Final = (
    "SELECT set_config(name, '0', true) FROM pg_settings WHERE name IN ('statement_timeout', "
    "'lock_timeout', 'transaction_timeout', 'idle_in_transaction_session_timeout')"
)
"""Lifts the limits of an account for a transaction on PostgreSQL; older servers lack some."""

SELECT_BUILD: Final = """
SELECT
    c.relname,
    p.phase,
    p.current_locker_pid,
    CASE
        WHEN p.tuples_total > 0 THEN 100 * p.tuples_done / p.tuples_total
        WHEN p.blocks_total > 0 THEN 100 * p.blocks_done / p.blocks_total
    END
FROM pg_stat_progress_create_index p
JOIN pg_class c ON c.oid = p.index_relid
WHERE p.datname = current_database()
"""
"""Returns the index that is being built, the phase, the process it waits for, and the percent."""

SCHEMA: Final = "incidentkit_schema"
"""The execution option with the schema of the tables, which SQLAlchemy passes to connections."""

SCHEMA_FOUND: Final = text("""
    SELECT nspname
    FROM pg_class
    JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE pg_class.oid = to_regclass('incidentkit_version')
""")
"""Returns the schema in which the search path finds incidentkit's tables."""

SET_SEQUENCE: Final = text("SELECT setval(CAST(:sequence AS regclass), :last)")

OPTIONS: Final[dict[str, Any]] = {"version_table": VERSION_TABLE, "transactional_ddl": True}
"""How Alembic runs the migrations."""

_DRIVER_ERRORS: Final = (
    SQLAlchemyError,
    sqlite3.Error,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    OSError,
)

_T = TypeVar("_T")

logger = logging.getLogger("incidentkit.store")
_migrating = threading.Lock()


def _renew_lock() -> None:
    global _migrating  # noqa: PLW0603
    _migrating = threading.Lock()


if hasattr(os, "register_at_fork"):
    # A thread that held the lock does not run in the forked process.
    os.register_at_fork(after_in_child=_renew_lock)


def migration_engine(database_url: str, schema: str | None = None) -> AsyncEngine:
    """Return an engine on a PostgreSQL database, directly or through a pooler.

    Args:
        database_url: The database.
        schema: Where every transaction finds and creates tables, types and functions; None: the
            search path of the connection decides.
    """
    engine = create_async_engine(
        "postgresql+asyncpg://",
        connect_args={
            "async_creator_fn": partial(_connect, parse_url(database_url)),
            # Behind a pooler, a name could be that of another process's statement.
            "prepared_statement_name_func": str,
            "prepared_statement_cache_size": 0,
        },
        # Even if the database has another default: a read after a lock must see the newest rows.
        isolation_level="READ COMMITTED",
        poolclass=NullPool,
        hide_parameters=True,
        execution_options={SCHEMA: schema},
    )
    if schema is not None:
        event.listen(engine.sync_engine, "begin", _work_in_schema)
    return engine


def _work_in_schema(connection: Connection) -> None:
    """Limit a transaction to the named schema."""
    schema = _named_schema(connection)
    name = connection.dialect.identifier_preparer.quote_identifier(str(schema))
    # A setting of the session would not survive a connection pooler.
    connection.exec_driver_sql(f"SET LOCAL search_path = {name}")
    # Inspections look there for a table without a schema.
    connection.dialect.default_schema_name = schema


def _named_schema(connection: Connection) -> str | None:
    """Return the schema that was named for the tables, or None."""
    schema: str | None = connection.get_execution_options().get(SCHEMA)
    return schema


async def _connect(server: Server) -> asyncpg.Connection[asyncpg.Record]:
    connection: asyncpg.Connection[asyncpg.Record]
    try:
        connection = await asyncpg.connect(
            **{"timeout": CONNECT_TIMEOUT, **server.arguments}, statement_cache_size=0
        )
    except (asyncpg.PostgresError, OSError) as error:
        refusal = refused_parameter(server, error) or translate_error(error, connecting=True)
        raise refusal from error
    except UNREADABLE_URL:
        # Without its cause, which shows parts of the URL.
        raise unreadable_url() from None
    try:
        if not await find_pooler(connection):
            # For the session, since statements also run outside a transaction.
            await connection.execute(NO_TIME_LIMITS.replace("true", "false"))
    except BaseException:
        connection.terminate()
        raise
    return connection


def _disable_implicit_begin(connection: Any, _: object) -> None:
    connection.isolation_level = None


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


async def upgrade(
    database_url: str, revision: str = "head", *, schema: str | None = None
) -> Upgrade:
    """Bring the tables up to a revision; several processes may do so at once.

    A database of Incident API is recognized by its ``alembic_version`` and taken over.
    In a database that was copied from another PostgreSQL server, the order of events is repaired.
    At the newest revision, missing or changed functions, triggers and indexes are restored. If a
    trigger is restored, the tokens are replaced too.

    Args:
        database_url: The database.
        revision: ``head``, a revision, or the beginning of one.
        schema: The PostgreSQL schema for the tables, created if it does not exist; None: the first
            one in the search path that exists.

    Returns:
        The schema of the tables, and the restored parts.

    Raises:
        StoreUnavailable: If the database cannot be reached, or stays locked for too long.
        StoreError: With the obstacle; nothing was changed.
        InvalidSettings: If the revision is unknown, the schema cannot have the tables, or it must
            be named because the search path finds the tables in one schema and would create new
            ones in another.
    """
    return await _in_thread(partial(run, database_url, partial(_upgrade, revision), schema))


async def downgrade(database_url: str, revision: str = "-1", *, schema: str | None = None) -> None:
    """Bring the tables down to a revision, by default by one step. No schema is dropped.

    A step drops the tables that its upgrade added, with their rows. Every incident is kept down to
    the first revision. Below it, at ``base``, the table of incidents is dropped too.

    Raises:
        StoreUnavailable: If the database cannot be reached, or stays locked for too long.
        StoreError: With the obstacle; nothing was changed.
        InvalidSettings: As for :func:`upgrade`.
    """
    await _in_thread(partial(run, database_url, partial(_down, revision), schema))


async def current(database_url: str, *, schema: str | None = None) -> str | None:
    """Return the revision of the tables, or None if there are none of incidentkit.

    Raises:
        StoreUnavailable: If the database cannot be reached.
        InvalidSettings: If the schema cannot have the tables.
    """
    return await _in_thread(partial(run, database_url, current_revision, schema, reads=True))


async def check(database_url: str, *, schema: str | None = None) -> None:
    """Raise unless the tables are at the newest revision, and their events in order.

    Raises:
        SchemaOutOfDate: With the command to run.
        StoreError: If the database was copied from another server, or the ids of events do not
            ascend; with the command to run.
        StoreUnavailable: If the database cannot be reached.
        InvalidSettings: If the schema cannot have the tables.
    """
    await _in_thread(partial(run, database_url, _check, schema, reads=True))


def _check(connection: Connection) -> None:
    schema = _named_schema(connection)
    check_revision(current_revision(connection), schema)
    check_parts(read_schema(connection).differences, schema)
    if connection.dialect.name != "postgresql":
        return
    if connection.scalar(SELECT_STRANDED) is not None:
        raise copied(schema)
    sequence = connection.scalar(SELECT_DISORDERED_SEQUENCES)
    if sequence is not None:
        raise unordered(sequence, schema)


async def upgrade_memory(engine: AsyncEngine) -> None:
    """Create the schema in the SQLite database in memory of an engine's one connection.

    This runs on the event loop of that connection, and blocks it.
    """
    async with _alone():
        with _translated("sqlite", IN_MEMORY):
            await _run_on(engine, partial(_up, "head"))


def upgrade_connection(connection: Connection) -> None:
    """Create or upgrade the schema in the SQLite database of a connection, beside other tables."""
    with _migrating:
        _up("head", connection)


def create_in_memory(connection: Connection) -> None:
    """Create the schema in the empty SQLite database in memory of a connection.

    The migrations run for the first one of a process only: further ones get a copy.
    """
    with _migrating:
        schema = _newest_schema()
    driver_connection: Any = connection.connection.driver_connection
    with closing(sqlite3.connect(IN_MEMORY)) as source:
        source.deserialize(schema)
        source.backup(driver_connection)
    # With the token of another database, its cached pages would pass for those of this one.
    replace_tokens(connection)


@cache
def _newest_schema() -> bytes:
    """Return an SQLite database with the newest schema and no rows: about 330 KB."""
    engine = create_engine("sqlite://", isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        _up("head", connection)
        driver_connection: Any = connection.connection.driver_connection
        schema: bytes = driver_connection.serialize()
    engine.dispose()
    return schema


def current_revision(connection: Connection) -> str | None:
    """Return the revision of the schema, which the origin may have recorded, or None."""
    tables = set(inspect(connection).get_table_names())
    if VERSION_TABLE in tables:
        revision = _recorded(connection, VERSION_TABLE)
        if revision is not None:
            return revision
    made_by_origin = (
        incident_table.name in tables
        and ORIGIN_VERSION_TABLE in tables
        and _recorded(connection, ORIGIN_VERSION_TABLE) == ORIGIN_REVISION
    )
    return ORIGIN_REVISION if made_by_origin else None


def _recorded(connection: Connection, version_table: str) -> str | None:
    statement = select(column("version_num", String())).select_from(table(version_table))
    return connection.execute(statement).scalars().first()


def adopt(connection: Connection) -> str | None:
    """Return the revision to start from, if a database has the table but no recorded revision.

    Raises:
        StoreError: If neither incidentkit nor the origin made the table.
    """
    tables = set(inspect(connection).get_table_names())
    if VERSION_TABLE in tables and _recorded(connection, VERSION_TABLE):
        return None
    revision = current_revision(connection)
    if revision is None and incident_table.name in tables:
        raise in_the_way(incident_table.name)
    return revision


def _upgrade(revision: str, connection: Connection) -> Upgrade:
    if connection.dialect.name == "postgresql":
        _check_encoding(connection)
    restored = _up(revision, connection)
    if connection.dialect.name != "postgresql":
        return Upgrade(None, restored)
    put_in_order(connection)
    with connection.begin():
        return Upgrade(_current_schema(connection), restored)


def _current_schema(connection: Connection) -> str | None:
    """Return the schema for new tables; None if the search path has none that exists."""
    name: str | None = connection.exec_driver_sql("SELECT current_schema()").scalar_one()
    return name


def _check_encoding(connection: Connection) -> None:
    """Warn of a database that cannot hold every text, or holds texts that cannot be read."""
    encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
    if encoding == "SQL_ASCII":
        logger.warning(
            "The encoding of the database is SQL_ASCII: it also accepts texts that are not UTF-8, "
            "which cannot be read, and a search recognizes only ASCII letters. Use UTF8."
        )
    elif encoding != "UTF8":
        logger.warning(
            "The encoding of the database is %s: incidents with characters that it does not have "
            "are refused. Use UTF8.",
            encoding,
        )


def put_in_order(connection: Connection) -> None:
    """Make new events come after the existing ones.

    The events of a database that was copied from another server may have larger transaction numbers
    than this server has assigned. A sequence may be behind the rows. The sequence of event ids may
    count down, or have a cache from which each session takes a part.

    Runs after a migration, in a transaction of its own; does nothing on SQLite, or at an earlier
    revision.
    """
    newest = current_revision(connection) == SCHEMA_REVISION
    connection.rollback()
    if newest and connection.dialect.name == "postgresql":
        with connection.begin():
            _put_in_order(connection)


def _put_in_order(connection: Connection) -> None:
    if connection.execute(SELECT_STRANDED).first() is not None:
        wait_for_tables(connection)
        connection.exec_driver_sql(
            'LOCK TABLE "Incident", incident_event IN SHARE ROW EXCLUSIVE MODE'
        )
        for unassigned, latest, event_id in connection.execute(SELECT_STRANDED).all():
            values = {"unassigned": unassigned, "latest": latest, "event_id": event_id}
            for statement in SHIFT.values():
                connection.execute(statement, values)
    for statement in SELECT_KNOWN_IDS.values():
        for sequence, last in connection.execute(statement).all():
            at = connection.exec_driver_sql(f"TABLE {sequence}").one()
            # After an export of rows without their sequence, it would give ids out again.
            if at.last_value + at.is_called <= last:
                connection.execute(SET_SEQUENCE, {"sequence": sequence, "last": last})
    for sequence in connection.scalars(SELECT_DISORDERED_SEQUENCES).all():
        wait_for_tables(connection)
        connection.exec_driver_sql("LOCK TABLE incident_event IN SHARE ROW EXCLUSIVE MODE")
        last = connection.scalar(SELECT_LAST_EVENT_ID)
        connection.exec_driver_sql(
            f"ALTER SEQUENCE {sequence} INCREMENT BY 1 CACHE 1 RESTART WITH {last + 1}"
        )


def wait_for_tables(connection: Connection) -> None:
    """Limit the wait for locks, since readers queue behind a migration that waits for a table."""
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = {round(TABLE_LOCK_TIMEOUT * 1000)}")


def prepare(connection: Connection, *, creates: bool = True) -> None:
    """Take a database over from the origin; the first step of a migration.

    Args:
        connection: In the transaction of the migration.
        creates: Whether to create the named schema if it does not exist.

    Raises:
        StoreError: If a foreign table is in the way.
        InvalidSettings: If the schema has to be named.
    """
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(NO_TIME_LIMITS)
        wait_for_tables(connection)
        schema = _named_schema(connection)
        if schema is None:
            _check_schema(connection)
        # The server checks the privilege before it looks for the schema.
        elif creates and schema not in inspect(connection).get_schema_names():
            connection.execute(CreateSchema(schema))
    revision = adopt(connection)
    if revision is not None:
        record_revision(connection, revision)
    if connection.dialect.name == "postgresql" and _names_schema(current_revision(connection)):
        # Otherwise no migration could change an incident once the schema was renamed.
        restore_token_function(connection)


def _names_schema(revision: str | None) -> bool:
    """Return whether the function of the token names the schema of the tables."""
    return revision in REVISIONS[REVISIONS.index("e4a81c3f5d27") : REVISIONS.index("a1f80c46d2b7")]


def _check_schema(connection: Connection) -> None:
    """Raise unless the search path finds the tables where it would create new ones."""
    current_schema = _current_schema(connection)
    found = connection.scalar(SCHEMA_FOUND)
    if found not in (None, current_schema):
        raise InvalidSettings(
            "schema",
            f"must be named: the search path finds the tables in the schema {found}, but would "
            f"create new ones in {current_schema}",
        )


def record_revision(connection: Connection, revision: str | None) -> None:
    """Record the revision of a database, as Alembic does."""
    version_table.create(connection, checkfirst=True)
    connection.execute(delete(version_table))
    if revision is not None:
        connection.execute(insert(version_table).values(version_num=revision))


@contextmanager
def _migration(connection: Connection, *, creates: bool = False) -> Iterator[int]:
    """Begin the transaction of a migration, and yield how many led to the tables as they are."""
    # Refuses a newer schema without a lock.
    migrations_below(current_revision(connection))
    # Ends the transaction that only read: Alembic begins its own.
    connection.rollback()
    context = MigrationContext.configure(connection, opts=OPTIONS)
    with context.begin_transaction(), Operations.context(context):
        prepare(connection, creates=creates)
        yield migrations_below(current_revision(connection))


def _up(target: str, connection: Connection) -> tuple[str, ...]:
    """Bring the schema up to a revision, and return the parts restored at the newest one."""
    with _migration(connection, creates=True) as at:
        for number in range(at, migrations_to(target, at)):
            MIGRATIONS[number].upgrade()
            record_revision(connection, REVISIONS[number])
        return restore(connection)


def restore(connection: Connection) -> tuple[str, ...]:
    """Restore what a database at the newest revision lacks, at the end of a migration.

    Returns:
        What was restored; nothing at an earlier revision.
    """
    newest = current_revision(connection) == SCHEMA_REVISION
    return mend(connection) if newest else ()


def _down(target: str, connection: Connection) -> None:
    with _migration(connection) as at:
        to = migrations_to(target, at)
        if to > at:
            raise InvalidSettings("revision", "cannot be reached: it is newer than the database")
        for number in reversed(range(to, at)):
            MIGRATIONS[number].downgrade()
            record_revision(connection, REVISIONS[number - 1] if number else None)


async def _in_thread(work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """Run a coroutine in a thread, on an event loop of its own.

    If the caller is cancelled, so is the coroutine, and its end is awaited.

    Raises:
        WrongEventLoop: If no event loop of asyncio is running.
    """
    check_running_loop()
    cancelling: Future[Callable[[], object]] = Future()

    async def run() -> _T:
        task = asyncio.ensure_future(work())
        loop = asyncio.get_running_loop()
        cancelling.set_result(lambda: loop.call_soon_threadsafe(task.cancel))
        return await task

    running = asyncio.ensure_future(asyncio.to_thread(lambda: asyncio.run(run())))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        cancelling.add_done_callback(_cancel)
        with suppress(Exception, asyncio.CancelledError):
            await running
        raise


def _cancel(cancelling: Future[Callable[[], object]]) -> None:
    # The loop is closed if the work has ended meanwhile.
    with suppress(RuntimeError):
        cancelling.result()()


async def run(
    database_url: str,
    work: Callable[[Connection], _T],
    schema: str | None = None,
    *,
    reads: bool = False,
) -> _T:
    """Run work on a connection, with no other migration of the database beside it.

    It may block the event loop. If a table or the file is locked, the work starts over.

    Args:
        database_url: The database.
        work: Works in transactions of its own.
        schema: The schema of the tables; None: the search path decides.
        reads: Whether it only reads, and so may run beside a migration.
    """
    kind = database_kind(database_url)
    check_schema(schema, kind)
    file = sqlite_url(database_url) if kind == "sqlite" else None
    place = parse_url(database_url).place if file is None else place_of(file)
    place = named_place(place, schema)
    async with nullcontext() if reads else _alone():
        with _translated(kind, place):
            if file is not None:
                await probe(file)
                return await _run_on_file(file, work, reads=reads)
            engine = migration_engine(database_url, schema)
            if reads:
                return await _run_on(engine, work)
            async with _only_migration(parse_url(database_url)):
                return await _run_on_server(engine, work)


@asynccontextmanager
async def _alone() -> AsyncIterator[None]:
    # Polling, since waiters may run on several event loops and must stay cancellable.
    while not _migrating.acquire(blocking=False):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    try:
        yield
    finally:
        _migrating.release()


async def _run_on(engine: AsyncEngine, work: Callable[[Connection], _T]) -> _T:
    async with engine.connect() as connection:
        return await connection.run_sync(work)


@asynccontextmanager
async def _only_migration(server: Server) -> AsyncIterator[None]:
    """Wait while another process migrates the database, then keep others out; report progress.

    A transaction holds the lock, so it works through a pooler and ends with the process. The
    transaction runs no further statement: a concurrent index build would wait for its snapshot.
    """
    connection = await _connect(server)
    try:
        waits = False
        while not await _try_lock(connection):
            if not waits:
                logger.warning(
                    "Another process is migrating the database %s: waiting for it to finish.",
                    server.place,
                )
            waits = True
            await asyncio.sleep(LOCK_POLL)
        reporting = asyncio.create_task(_report(server))
        try:
            yield
        finally:
            reporting.cancel()
            # The server notices the end of a connection only after a moment.
            with suppress(*_DRIVER_ERRORS):
                await connection.execute("ROLLBACK", timeout=RELEASE_TIMEOUT)
    finally:
        connection.terminate()


async def _try_lock(connection: asyncpg.Connection[asyncpg.Record]) -> bool:
    """Begin a transaction that keeps other migrations out, unless another one does."""
    # In another isolation level, the transaction would keep a snapshot.
    await connection.execute(f"BEGIN ISOLATION LEVEL READ COMMITTED; {NO_TIME_LIMITS}")
    taken = await connection.execute(f"SELECT WHERE pg_try_advisory_xact_lock({LOCK_KEY})")
    if taken == "SELECT 1":
        return True
    await connection.execute("ROLLBACK")
    return False


async def _report(server: Server) -> None:
    """Log the progress of a migration that takes long."""
    began = time.monotonic()
    await asyncio.sleep(REPORT_INTERVAL)
    # A failed report does not stop the migration.
    with suppress(*_DRIVER_ERRORS, StoreError):
        connection = await _connect(server)
        try:
            while True:
                async with connection.transaction():
                    builds = await connection.fetch(SELECT_BUILD)
                progress = "; ".join(map(_progress, builds)) or "the migration is running"
                logger.info("%s s: %s", round(time.monotonic() - began), progress)
                await asyncio.sleep(REPORT_INTERVAL)
        finally:
            connection.terminate()


def _progress(build: asyncpg.Record) -> str:
    name, phase, locker, percent = build
    done = "" if percent is None else f", {percent} %"
    waits = f", waiting for the transaction of the server process {locker}" if locker else ""
    return f"building the index {name}: {phase}{done}{waits}"


async def _run_on_server(engine: AsyncEngine, work: Callable[[Connection], _T]) -> _T:
    """Run work on a connection; while others lock a table, start it over."""
    for _ in range(TABLE_LOCK_ATTEMPTS - 1):
        try:
            return await _run_on(engine, work)
        except DBAPIError as error:
            if not isinstance(server_error(error), asyncpg.LockNotAvailableError):
                raise
        logger.warning("Another session has locked a table that must change: trying again.")
        await asyncio.sleep(TABLE_LOCK_PAUSE)
    return await _run_on(engine, work)


async def _run_on_file(url: URL, work: Callable[[Connection], _T], *, reads: bool) -> _T:
    """Run work on a connection; unless it only reads, transactions lock the file from the start.

    While the file is locked, the work starts over.
    """
    engine = create_engine(
        url.set(drivername="sqlite"),
        connect_args={"timeout": LOCK_STEP},
        poolclass=NullPool,
        hide_parameters=True,
    )
    event.listen(engine, "connect", _disable_implicit_begin)
    event.listen(engine, "begin", _begin if reads else _begin_immediate)
    deadline = time.monotonic() + LOCK_TIMEOUT
    waits = False
    while True:
        try:
            with engine.connect() as connection:
                return work(connection)
        except DBAPIError as error:
            if not _is_locked(error) or time.monotonic() > deadline:
                raise
        except Overtaken:
            continue
        if not waits:
            logger.warning(
                "Another process is writing to %s or migrating it: waiting for it to finish.",
                place_of(url),
            )
        waits = True
        await asyncio.sleep(0)


def _is_locked(error: DBAPIError) -> bool:
    code = getattr(error.orig, "sqlite_errorcode", 0) & PRIMARY_CODE
    return bool(code == sqlite3.SQLITE_BUSY)


@contextmanager
def _translated(kind: DatabaseKind, place: str) -> Iterator[None]:
    """Translate exceptions of drivers, and name the database in each error."""
    try:
        yield
    except StoreError as error:
        error.place = place
        raise
    except _DRIVER_ERRORS as error:
        translated = translate_sqlite(error) if kind == "sqlite" else _translate(error)
        translated.place = place
        raise translated from error


def _translate(error: Exception) -> StoreError:
    refusal = server_error(error)
    if isinstance(refusal, asyncpg.LockNotAvailableError):
        return StoreUnavailable(
            "another session has locked a table that must change: end its transaction, and try "
            "again",
            sqlstate=refusal.sqlstate,
        )
    if refusal is not None and (refusal.sqlstate or "").startswith(OPERATORS_CLASSES):
        # The first argument is the server's message alone, without details, which contain values.
        return StoreError(str(refusal.args[0]), sqlstate=refusal.sqlstate)
    return translate_error(error)

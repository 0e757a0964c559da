"""Incidents in the transaction of an application without an event loop."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from django.db import connections, transaction
from django.test.utils import CaptureQueriesContext, override_settings
from psycopg.rows import scalar_row
from psycopg.types.datetime import TimestamptzLoader
from psycopg.types.string import ByteaLoader
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from incidentkit import (
    DuplicateOpenIncident,
    IdempotencyKeyReused,
    IncidentKitError,
    IncidentNotFound,
    InvalidIncident,
    InvalidSettings,
    NewIncident,
    NotInTransaction,
    StoreError,
    StoreUnavailable,
    SyncIncidentClient,
    VersionConflict,
    WrongEventLoop,
    acting_as,
    pacing,
)
from tests.conftest import TENANTS
from tests.hosts import prepared, run_sql
from tests.sync_hosts import SYNC_WAYS, DjangoHost, SyncHost, django_database, sync_host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from incidentkit import SyncJoinedIncidents

TEXT = "100% of %s, %(name)s and :name are ?"
"""A text with what marks a parameter in SQL."""


@pytest.fixture
def file_url(sqlite_url: str) -> str:
    """The URL of an SQLite file with the schema and the host's own table."""
    return asyncio.run(prepared(sqlite_url))


@pytest.fixture
def file(file_url: str) -> str:
    """The path of that file."""
    return file_url.removeprefix("sqlite+aiosqlite:///")


@pytest.fixture
def on_file(file_url: str) -> Iterator[SyncIncidentClient]:
    """A client on that file."""
    with SyncIncidentClient.open(file_url) as client:
        yield client


@pytest.fixture
def postgres_url(migrated_postgres_url: str) -> str:
    """The URL of a PostgreSQL database with the schema and the host's own table."""
    return asyncio.run(prepared(migrated_postgres_url))


@pytest.fixture
def on_postgres(postgres_url: str) -> Iterator[SyncIncidentClient]:
    """A client on that database."""
    with SyncIncidentClient.open(postgres_url) as client:
        yield client


@pytest.fixture(params=SYNC_WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """Each kind of connection on which a host may have a transaction."""
    return str(request.param)


@pytest.fixture
def client(way: str, request: pytest.FixtureRequest) -> SyncIncidentClient:
    """A client on the host's database."""
    name = "on_file" if "sqlite" in way else "on_postgres"
    client: SyncIncidentClient = request.getfixturevalue(name)
    return client


@pytest.fixture
def host(way: str, request: pytest.FixtureRequest) -> Iterator[SyncHost]:
    """A host with each kind of connection."""
    url = request.getfixturevalue("file_url" if "sqlite" in way else "postgres_url")
    with closing(sync_host(way, url)) as host:
        yield host


@contextmanager
def django_host(**database: Any) -> Iterator[DjangoHost]:
    """Connect a host with Django."""
    with closing(DjangoHost(**database)) as host:
        try:
            yield host
        finally:
            host.rollback()


REFUSED: dict[type[IncidentKitError], Callable[[SyncJoinedIncidents], Any]] = {
    InvalidIncident: lambda joined: joined.create("test", source="partner"),
    IncidentNotFound: lambda joined: joined.note(99, "Lost", idempotency_key="key"),
    VersionConflict: lambda joined: joined.update_status(1, "failed", expected_version=7),
    DuplicateOpenIncident: lambda joined: joined.update_status(1, "new", idempotency_key="key"),
    IdempotencyKeyReused: lambda joined: joined.create(
        "Order 3 is late", source="partner", idempotency_key="used"
    ),
}


def test_a_refusal_leaves_the_transaction_usable(
    client: SyncIncidentClient, host: SyncHost
) -> None:
    """After refused calls the host can commit, and these calls leave nothing."""
    client.create("Order 1 is late", source="partner", dedup_key="order", idempotency_key="used")
    client.update_status(1, "completed")
    client.create("Order 2 is late", source="partner", dedup_key="order")
    before = client.list()
    host.begin()
    joined = client.join(host.connection)
    host.execute("INSERT INTO orders (order_id) VALUES (1)")
    for error, call in REFUSED.items():
        with pytest.raises(error):
            call(joined)
    with acting_as("shop"):
        created = joined.create(TEXT, source="partner", dedup_key=TEXT, idempotency_key=TEXT)
        assert created.incident_message == TEXT
        assert joined.note(created.incident_id, TEXT).actor == "shop"
    assert host.execute("SELECT order_id FROM orders") == [(1,)]
    host.commit()
    assert client.list() == sorted([created, *before], key=lambda each: -each.incident_id)
    assert client.note(1, "The key is free", idempotency_key="key").incident_id == 1


def test_a_join_ends_with_its_transaction(client: SyncIncidentClient, host: SyncHost) -> None:
    """After the commit or rollback, every call on the join raises NotInTransaction."""
    for end in (host.commit, host.rollback):
        host.begin()
        joined = client.join(host.connection)
        joined.create("Order 1 is late", source="partner")
        end()
        with pytest.raises(NotInTransaction):
            joined.create("Order 2 is late", source="partner")
        with pytest.raises(NotInTransaction):
            joined.list()
    assert len(client.list()) == 1


def test_many_rows_are_read_with_and_without_an_event_loop(
    client: SyncIncidentClient, host: SyncHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A join never waits for an event loop, so it also works in a thread that runs one.

    Django refuses every call there.
    """
    # Otherwise only a slow machine would pause between the rows.
    monkeypatch.setattr(pacing, "BURST", 0.0)
    host.begin()
    joined = client.join(host.connection)
    joined.create_many([NewIncident(f"Order {n} is late", source="partner") for n in range(200)])

    def read() -> list[int]:
        return [
            len(joined.list(limit=1000)),
            len(list(joined.iterate(batch=150))),
            len(joined.search(text="late", limit=200, total=True).incidents),
        ]

    async def read_in_loop() -> list[int]:
        return read()

    assert read() == [200, 200, 200]
    if isinstance(host, DjangoHost):
        with pytest.raises(WrongEventLoop, match="sync_to_async"):
            asyncio.run(read_in_loop())
    else:
        assert asyncio.run(read_in_loop()) == [200, 200, 200]
    host.rollback()


def test_an_interrupt_undoes_the_call(file_url: str, on_file: SyncIncidentClient) -> None:
    """A call that is interrupted between its statements leaves none of its writes behind."""
    file = file_url.removeprefix("sqlite+aiosqlite:///")
    with django_host(ENGINE="django.db.backends.sqlite3", NAME=file) as host:
        host.begin()
        joined = on_file.join(host.connection)

        def interrupt(execute: Any, sql: str, *others: Any) -> Any:
            if "INTO incident_event" in sql:
                raise KeyboardInterrupt
            return execute(sql, *others)

        with host.connection.execute_wrapper(interrupt), pytest.raises(KeyboardInterrupt):
            joined.create("Order 1 is late", source="partner")
        host.execute("INSERT INTO orders (order_id) VALUES (1)")
        host.commit()
    assert on_file.list() == []


def test_a_client_joins_without_being_open(client: SyncIncidentClient, host: SyncHost) -> None:
    """No connection of the client takes part in a join."""
    client.close()
    host.begin()
    created = client.join(host.connection).create("Order 1 is late", source="partner")
    host.commit()
    with client:
        assert client.list() == [created]


def test_other_objects_are_refused_by_what_is_accepted(
    on_file: SyncIncidentClient, on_postgres: SyncIncidentClient, file: str, postgres_url: str
) -> None:
    """Joining another object or another kind of database raises a TypeError that says so."""
    on_an_event_loop = create_async_engine(f"sqlite+aiosqlite:///{file}")
    engine = create_engine(f"sqlite:///{file}", poolclass=NullPool)
    with ExitStack() as stack:
        connection = stack.enter_context(engine.connect())
        sqlite = stack.enter_context(closing(sqlite3.connect(file)))
        pg = stack.enter_context(psycopg.connect(postgres_url))
        django = stack.enter_context(
            django_host(ENGINE="django.db.backends.sqlite3", NAME=file)
        ).connection
        for client, wrong, message in (
            (on_file, object(), "Only SQLAlchemy's Connection and Session, psycopg's"),
            (on_file, engine, "not Engine"),
            (on_file, AsyncSession(on_an_event_loop), "use IncidentClient.join"),
            (on_file, on_an_event_loop.connect(), "use IncidentClient.join"),
            (on_file, on_an_event_loop.sync_engine.connect, "not method"),
            (on_file, Session(on_an_event_loop.sync_engine), "use IncidentClient.join"),
            (on_file, Session(), "Only a session on one database"),
            (on_file, pg, "is on sqlite, not on postgresql"),
            (on_postgres, sqlite, "is on postgresql, not on sqlite"),
            (on_postgres, connection, "is on postgresql, not on sqlite"),
            (on_postgres, django, "is on postgresql, not on sqlite"),
        ):
            join: Any = client.join
            with pytest.raises(TypeError, match=message):
                join(wrong)


# SQLAlchemy


def test_a_scoped_session_is_joined_as_its_session(on_file: SyncIncidentClient, file: str) -> None:
    """For a scoped session, such as Flask-SQLAlchemy's, the session of the scope is joined."""
    engine = create_engine(f"sqlite:///{file}", poolclass=NullPool)
    sessions = scoped_session(sessionmaker(engine))
    joined = on_file.join(sessions)
    joined.create("Order 1 is late", source="partner")
    sessions.rollback()
    with pytest.raises(NotInTransaction):
        joined.list()
    on_file.join(sessions).create("Order 2 is late", source="partner")
    sessions.commit()
    sessions.remove()
    assert [each.incident_message for each in on_file.list()] == ["Order 2 is late"]


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_sqlalchemy_joins_with_each_driver(
    on_postgres: SyncIncidentClient, postgres_url: str, driver: str
) -> None:
    """Database errors become incidentkit's, with the SQLSTATE that either driver reports."""
    url = postgres_url.replace("postgresql", f"postgresql+{driver}", 1)
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        created = on_postgres.join(connection).create(TEXT, source="partner", dedup_key=TEXT)
        connection.commit()
        assert on_postgres.list() == [created]
        connection.execute(text("SET LOCAL lock_timeout = 20"))
        with engine.begin() as other:
            on_postgres.join(other).note(created.incident_id, TEXT)
            with pytest.raises(StoreUnavailable) as refused:
                on_postgres.join(connection).update_status(created.incident_id, "failed")
        assert (refused.value.sqlstate, refused.value.retryable) == ("55P03", True)
    with (
        engine.execution_options(isolation_level="AUTOCOMMIT").connect() as autocommit,
        pytest.raises(NotInTransaction),
    ):
        on_postgres.join(autocommit)
    moving = engine.execution_options(schema_translate_map={None: "elsewhere"})
    with moving.connect() as connection, pytest.raises(InvalidSettings, match="schema="):
        on_postgres.join(connection).list()


@pytest.mark.parametrize("option", [{"stream_results": True}, {"yield_per": 1}], ids=str)
@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_connection_that_streams_is_joined(
    on_postgres: SyncIncidentClient, postgres_url: str, driver: str, option: dict[str, Any]
) -> None:
    """Writes run although the host reads its own rows through a cursor of the server."""
    url = postgres_url.replace("postgresql", f"postgresql+{driver}", 1)
    engine = create_engine(url, poolclass=NullPool, execution_options=option)
    with engine.begin() as connection:
        joined = on_postgres.join(connection)
        created = joined.create_many([NewIncident(TEXT, "partner")] * 3)
        assert joined.list() == created[::-1]
        joined.create(TEXT, source="partner", dedup_key="key")
        assert joined.resolve("key") is not None


# psycopg


def test_psycopg_joins_the_transaction_that_its_first_statement_begins(
    on_postgres: SyncIncidentClient, postgres_url: str
) -> None:
    """Outside of autocommit psycopg needs no `BEGIN`; in autocommit, a block is joined."""
    with psycopg.connect(postgres_url) as connection:
        joined = on_postgres.join(connection)
        joined.create("Order 1 is late", source="partner")
        connection.commit()
        with pytest.raises(NotInTransaction):
            joined.list()
        connection.autocommit = True
        with pytest.raises(NotInTransaction):
            on_postgres.join(connection)
        with connection.transaction():
            joined = on_postgres.join(connection)
            joined.create("Order 2 is late", source="partner")
        with pytest.raises(NotInTransaction):
            joined.list()
        with connection.pipeline():
            connection.execute("SELECT 1")
            with pytest.raises(NotInTransaction):
                on_postgres.join(connection)
            with connection.transaction():
                on_postgres.join(connection).create("Order 3 is late", source="partner")
    with pytest.raises(NotInTransaction):
        on_postgres.join(connection)
    assert len(on_postgres.list()) == 3


class WithoutZone(TimestamptzLoader):
    """Reads times as naive datetimes."""

    def load(self, data: Any) -> Any:
        """Return a time without its zone."""
        return super().load(data).replace(tzinfo=None)


@pytest.mark.parametrize("cursor", [psycopg.Cursor, psycopg.ClientCursor, psycopg.RawCursor])
def test_psycopg_is_read_whatever_its_host_has_set(
    on_postgres: SyncIncidentClient, postgres_url: str, cursor: Any
) -> None:
    """The host's row factory, cursors, types and time zone have no effect."""
    with psycopg.connect(postgres_url, cursor_factory=cursor) as connection:
        connection.execute("SET TIME ZONE 'Asia/Kathmandu'")
        connection.row_factory = scalar_row
        connection.adapters.register_loader("timestamptz", WithoutZone)
        connection.adapters.register_loader("text", ByteaLoader)
        joined = on_postgres.join(connection)
        created = joined.create(TEXT, source="partner", dedup_key=TEXT, idempotency_key=TEXT)
        (event,) = joined.history(created.incident_id)
        connection.commit()
    assert on_postgres.get(created.incident_id) == created
    assert on_postgres.history(created.incident_id) == [event]


def test_a_date_style_that_psycopg_cannot_read_is_named(
    postgres_url: str, on_postgres: SyncIncidentClient
) -> None:
    """The error names the setting, and the transaction goes on."""
    with psycopg.connect(postgres_url, options="-c DateStyle=German") as connection:
        joined = on_postgres.join(connection)
        with pytest.raises(StoreError, match="set DateStyle to ISO"):
            joined.create("Disk is full", source="monitoring")
        connection.execute("SET DateStyle TO ISO")
        assert joined.create("Disk is full", source="monitoring").version == 1


def test_a_schema_is_that_of_the_client(tenants_url: str) -> None:
    """A client with a schema uses its tables, regardless of the search path of a connection."""
    with SyncIncidentClient.open(tenants_url, schema=TENANTS[0]) as client:
        with psycopg.connect(tenants_url, options="-c search_path=elsewhere") as connection:
            created = client.join(connection).create(TEXT, source="partner", idempotency_key="key")
        with django_host(**django_database(tenants_url)) as host:
            host.begin()
            assert client.join(host.connection).list() == [created] == client.list()


def test_a_lost_connection_is_unavailable(
    on_postgres: SyncIncidentClient, postgres_url: str
) -> None:
    """The first call on it raises StoreUnavailable with the place, later ones NotInTransaction."""
    connection = psycopg.connect(postgres_url)
    joined = on_postgres.join(connection)
    joined.list()
    ended = f"SELECT pg_terminate_backend({connection.info.backend_pid})"
    asyncio.run(run_sql(postgres_url, ended))
    with pytest.raises(StoreUnavailable) as lost:
        joined.list()
    assert lost.value.place == postgres_url.partition("@")[2]
    with pytest.raises(NotInTransaction):
        joined.list()


def test_threads_that_share_a_join_take_turns(
    on_postgres: SyncIncidentClient, postgres_url: str
) -> None:
    """Threads can share a psycopg connection: a failed call of one undoes no other's writes."""
    with psycopg.connect(postgres_url) as connection, ThreadPoolExecutor(8) as threads:
        joined = on_postgres.join(connection)

        def call(number: int) -> None:
            key = f"key {number}"
            joined.create("Order 1 is late", source="partner", idempotency_key=key)
            with pytest.raises(IncidentNotFound):
                joined.note(10_000, "Lost", idempotency_key=f"other {key}")

        for done in [threads.submit(call, number) for number in range(40)]:
            done.result()
    assert len(on_postgres.list(limit=100)) == 40


# sqlite3


def test_sqlite3_begins_its_transaction_as_it_does_for_its_host(
    on_file: SyncIncidentClient, file: str
) -> None:
    """The transaction that sqlite3 begins before a write is joined; in autocommit, nothing is.

    A read begins none.
    """
    with closing(sqlite3.connect(file)) as connection:
        joined = on_file.join(connection)
        assert joined.list() == []
        assert not connection.in_transaction
        joined.create("Order 1 is late", source="partner")
        connection.rollback()
        with pytest.raises(NotInTransaction):
            joined.list()
        connection.isolation_level = None
        with pytest.raises(NotInTransaction):
            on_file.join(connection)
        connection.execute("BEGIN")
        on_file.join(connection).create("Order 2 is late", source="partner")
        connection.execute("COMMIT")
    with pytest.raises(NotInTransaction):
        on_file.join(connection)
    assert [each.incident_message for each in on_file.list()] == ["Order 2 is late"]


def test_sqlite3_can_begin_its_transactions_by_itself(
    on_file: SyncIncidentClient, file: str
) -> None:
    """From Python 3.12 on, the attribute `autocommit` decides before the isolation level."""
    options: Any = {"autocommit": False} if sys.version_info >= (3, 12) else {}
    with closing(sqlite3.connect(file, isolation_level="IMMEDIATE", **options)) as connection:
        on_file.join(connection).create("Order 1 is late", source="partner")
        connection.commit()
        if sys.version_info >= (3, 12):
            connection.autocommit = True
            with pytest.raises(NotInTransaction):
                on_file.join(connection)
    assert len(on_file.list()) == 1


def test_sqlite3_is_read_whatever_its_host_has_set(on_file: SyncIncidentClient, file: str) -> None:
    """The host's row factory, text factory and converters have no effect."""
    detects = sqlite3.PARSE_DECLTYPES | sqlite3.PARSE_COLNAMES
    with closing(sqlite3.connect(file, detect_types=detects)) as connection:
        connection.row_factory = lambda _, row: {"row": row}
        connection.text_factory = bytes
        joined = on_file.join(connection)
        created = joined.create(TEXT, source="partner", dedup_key=TEXT, idempotency_key=TEXT)
        (event,) = joined.history(created.incident_id)
        assert connection.text_factory is bytes
        connection.commit()
    assert on_file.get(created.incident_id) == created
    assert on_file.history(created.incident_id) == [event]


def test_a_schema_that_is_not_trusted_is_named(on_file: SyncIncidentClient, file: str) -> None:
    """Some versions of SQLite then keep triggers from the search index; the error says why."""
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA trusted_schema = OFF")
        joined = on_file.join(connection)
        refused = ""
        try:
            joined.create(TEXT, source="partner")
        except StoreError as error:
            refused = str(error)
        # Other versions of SQLite trust the search index.
        assert not refused or "`PRAGMA trusted_schema = OFF` keeps its triggers" in refused
        connection.execute("PRAGMA trusted_schema = ON")
        joined.create(TEXT, source="partner")


def test_a_connection_of_another_thread_is_named(on_file: SyncIncidentClient, file: str) -> None:
    """A call in a thread that did not open the sqlite3 connection raises a clear error."""
    with closing(sqlite3.connect(file)) as connection:
        joined = on_file.join(connection)
        errors: list[StoreError] = []

        def call() -> None:
            with pytest.raises(StoreError) as refused:
                joined.list()
            errors.append(refused.value)

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert "belongs to another thread" in str(errors[0])


# Django


@pytest.fixture(params=["sqlite", "postgresql", "server-side binding"])
def django(request: pytest.FixtureRequest) -> Iterator[tuple[SyncIncidentClient, DjangoHost]]:
    """A client, and a host with Django on its database."""
    if request.param == "sqlite":
        client = request.getfixturevalue("on_file")
        file = request.getfixturevalue("file")
        database = {"ENGINE": "django.db.backends.sqlite3", "NAME": file}
    else:
        client = request.getfixturevalue("on_postgres")
        database = django_database(request.getfixturevalue("postgres_url"))
        database["OPTIONS"] = {"server_side_binding": request.param != "postgresql"}
    with django_host(**database) as host:
        yield client, host


def test_django_needs_an_atomic_block(django: tuple[SyncIncidentClient, DjangoHost]) -> None:
    """Before and after an atomic block, and outside of any, calls raise NotInTransaction."""
    client, host = django
    with pytest.raises(NotInTransaction):
        client.join(host.connection)
    host.execute("SELECT 1")
    with pytest.raises(NotInTransaction):
        client.join(host.connection)
    host.begin()
    joined = client.join(host.connection)
    joined.create("Order 1 is late", source="partner")
    host.commit()
    with pytest.raises(NotInTransaction):
        joined.list()
    host.begin()
    with pytest.raises(NotInTransaction):
        joined.list()
    assert len(client.join(host.connection).list()) == 1


def test_a_block_of_another_thread_is_named(
    django: tuple[SyncIncidentClient, DjangoHost],
) -> None:
    """A call in another thread than that of Django's connection says so."""
    client, host = django
    host.begin()
    joined = client.join(host.connection)
    with ThreadPoolExecutor(1) as threads:
        refused = threads.submit(joined.list).exception()
    host.rollback()
    assert isinstance(refused, StoreError)
    assert "belongs to another thread" in str(refused)


def test_a_block_that_must_be_rolled_back_takes_no_call(
    django: tuple[SyncIncidentClient, DjangoHost],
) -> None:
    """Once Django will roll a block back, calls raise StoreError instead of Django's own error."""
    client, host = django
    host.begin()
    joined = client.join(host.connection)
    alias = host.connection.alias

    def fail() -> None:
        with transaction.atomic(using=alias, savepoint=False):
            joined.create("Order 1 is late", source="partner")
            raise ConnectionError

    with pytest.raises(ConnectionError):
        fail()
    with pytest.raises(StoreError, match="transaction has failed before"):
        joined.list()
    host.rollback()
    assert client.list() == []


@pytest.mark.parametrize("zone", [None, "Europe/London"])
def test_django_without_time_zones_is_read_in_utc(
    django: tuple[SyncIncidentClient, DjangoHost], zone: str | None
) -> None:
    """With `USE_TZ=False` a joined call returns the same aware times as the client."""
    client, host = django
    host.connection.close()
    with override_settings(USE_TZ=zone is None, TIME_ZONE=zone or "Asia/Kathmandu"):
        host.begin()
        joined = client.join(host.connection)
        created = joined.create(TEXT, source="partner", dedup_key=TEXT, idempotency_key=TEXT)
        changed = joined.update_status(created.incident_id, "completed", note=TEXT)
        found = joined.search(text="100", created_after=created.created_at, total=True)
        history = joined.history(created.incident_id)
        host.commit()
        host.connection.close()
    assert found.incidents == client.list() == [changed]
    assert client.history(created.incident_id) == history


def test_django_sees_the_statements(django: tuple[SyncIncidentClient, DjangoHost]) -> None:
    """The log and the wrappers of Django's connection see each statement of a call."""
    client, host = django
    host.begin()
    joined = client.join(host.connection)
    with CaptureQueriesContext(connections[host.connection.alias]) as captured:
        joined.create(TEXT, source="partner")
    # On SQLite: the lock, the incident and its event, and a savepoint around the latter two.
    assert len(captured) == (5 if host.connection.vendor == "sqlite" else 1)
    assert any(TEXT in query["sql"] for query in captured)


def output(program: str, *arguments: str) -> str:
    """Return what a program prints."""
    ended = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


PSYCOPG2: str = """\
import sys
sys.modules["psycopg"] = None
from contextlib import closing
import django, psycopg2
from django.conf import settings
from django.db import connection, transaction
from incidentkit import IncidentNotFound, StoreUnavailable, SyncIncidentClient

url, database, text = sys.argv[1], eval(sys.argv[2]), sys.argv[3]
settings.configure(DATABASES={"default": database}, USE_TZ=False, TIME_ZONE="Asia/Kathmandu")
django.setup()
with SyncIncidentClient.open(url) as incidents:
    with transaction.atomic():
        joined = incidents.join(connection)
        created = joined.create(text, source="partner", dedup_key=text, idempotency_key=text)
        try:
            joined.note(99, text)
        except IncidentNotFound:
            joined.note(created.incident_id, text)
    assert incidents.list() == [created], created
    with closing(psycopg2.connect(url)) as other:
        other.cursor().execute("LOCK incident_event")
        try:
            with transaction.atomic():
                connection.cursor().execute("SET LOCAL lock_timeout = 20")
                incidents.join(connection).note(created.incident_id, text)
        except StoreUnavailable as error:
            assert error.sqlstate == "55P03" and error.place == url.partition("@")[2], error.place
            print("refused")
connection.close()
"""


def test_django_joins_with_psycopg2(postgres_url: str) -> None:
    """Without psycopg 3, Django uses psycopg2: with `USE_TZ=False`, times are right too."""
    assert output(PSYCOPG2, postgres_url, repr(django_database(postgres_url)), TEXT) == "refused\n"


# Other processes, and what is loaded

FORK: str = """\
import os, sqlite3, sys
from incidentkit import SyncIncidentClient

url, file = sys.argv[1:]
with SyncIncidentClient.open(url) as incidents:
    incidents.create("Order 1 is late", source="partner")
    if not os.fork():
        connection = sqlite3.connect(file)
        incidents.join(connection).create("Order 2 is late", source="partner")
        connection.commit()
        os._exit(0)
    os.wait()
    print(len(incidents.list()))
    loaded = {"asyncpg", "django", "psycopg", "psycopg2", "sqlalchemy.orm"} & set(sys.modules)
    assert not loaded, loaded
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks on this system")
def test_a_forked_process_joins_without_connections_of_its_own(file_url: str, file: str) -> None:
    """A client that a parent process has opened joins the child's connection.

    Nor does it load a driver that the host has not loaded.
    """
    assert output(FORK, file_url, file) == "2\n"

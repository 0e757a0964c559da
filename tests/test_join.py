"""Incidents inside the host's own transaction, on every kind of connection that can be joined."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from incidentkit import (
    ClientClosed,
    DuplicateOpenIncident,
    EventKind,
    IdempotencyKeyReused,
    IllegalTransition,
    Incident,
    IncidentClient,
    IncidentEvent,
    IncidentNotFound,
    IncidentStatus,
    InvalidIncident,
    InvalidSettings,
    NotInTransaction,
    SchemaOutOfDate,
    StoreError,
    StoreUnavailable,
    VersionConflict,
    acting_as,
)
from incidentkit.store import StoreOptions
from tests.strategies import statuses

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine
    from contextlib import AbstractAsyncContextManager


class Host:
    """An application with a database, and a transaction of its own on it."""

    def __init__(self, url: str, kind: str) -> None:
        self.url = url
        self.kind = kind

    @property
    def sqlalchemy_url(self) -> str:
        """The URL for SQLAlchemy."""
        return self.url.replace("postgresql://", "postgresql+asyncpg://")

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[tuple[Any, Any]]:
        """Begin a transaction; give what can be joined, and what ends it or runs SQL in it."""
        if self.kind in ("asyncpg", "pool"):
            pool = await asyncpg.create_pool(self.url, min_size=1, max_size=1)
            async with pool.acquire() as proxy:
                raw = proxy if self.kind == "pool" else await asyncpg.connect(self.url)
                transaction = raw.transaction()
                await transaction.start()
                yield raw, AsyncpgEnd(raw, transaction)
                if self.kind == "asyncpg":
                    await raw.close()
            await pool.close()
            return
        engine = create_async_engine(self.sqlalchemy_url)
        if self.kind == "session":
            async with AsyncSession(engine) as session:
                yield session, SqlalchemyEnd(session)
        else:
            async with engine.connect() as connection:
                yield connection, SqlalchemyEnd(connection)
        await engine.dispose()


class SqlalchemyEnd:
    """How a transaction of SQLAlchemy ends."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def commit(self) -> None:
        """Commit."""
        await self._connection.commit()

    async def rollback(self) -> None:
        """Roll back."""
        await self._connection.rollback()

    async def execute(self, statement: str) -> None:
        """Run a statement of the host's."""
        await self._connection.execute(text(statement))

    def savepoint(self) -> AbstractAsyncContextManager[Any]:
        """Return a savepoint that an exception rolls back."""
        savepoint: AbstractAsyncContextManager[Any] = self._connection.begin_nested()
        return savepoint


class AsyncpgEnd:
    """How a transaction of asyncpg ends."""

    def __init__(self, connection: Any, transaction: Any) -> None:
        self._connection = connection
        self._transaction = transaction

    async def commit(self) -> None:
        """Commit."""
        await self._transaction.commit()

    async def rollback(self) -> None:
        """Roll back."""
        await self._transaction.rollback()

    async def execute(self, statement: str) -> None:
        """Run a statement of the host's."""
        await self._connection.execute(statement)

    def savepoint(self) -> AbstractAsyncContextManager[Any]:
        """Return a savepoint that an exception rolls back."""
        savepoint: AbstractAsyncContextManager[Any] = self._connection.transaction()
        return savepoint


HOSTS = [
    ("sqlite", "connection"),
    ("sqlite", "session"),
    ("postgresql", "connection"),
    ("postgresql", "session"),
    ("postgresql", "asyncpg"),
    ("postgresql", "pool"),
]


@pytest.fixture(params=HOSTS, ids="-".join)
def host(request: pytest.FixtureRequest) -> Host:
    """An application on each database, with each kind of connection, and a table of its own."""
    database, kind = request.param
    name = {"sqlite": "sqlite_url", "postgresql": "migrated_postgres_url"}[database]
    host = Host(str(request.getfixturevalue(name)), kind)

    async def prepare() -> None:
        async with IncidentClient.open(host.url):
            pass
        engine = create_async_engine(host.sqlalchemy_url)
        async with engine.begin() as connection:
            await connection.execute(text("CREATE TABLE orders (number INTEGER)"))
        await engine.dispose()

    asyncio.run(prepare())
    return host


on_postgresql = pytest.mark.parametrize("host", HOSTS[2:], ids="-".join, indirect=True)


@pytest.fixture
async def incidents(host: Host, redis_url: str) -> AsyncIterator[IncidentClient]:
    """A client on the host's database, with a cache in Redis."""
    async with IncidentClient.open(host.url, redis_url) as client:
        yield client


@pytest.fixture
async def other(host: Host, redis_url: str) -> AsyncIterator[IncidentClient]:
    """Another client there."""
    async with IncidentClient.open(host.url, redis_url) as client:
        yield client


async def count_orders(host: Host) -> int:
    """Return how many orders the host has stored."""
    engine = create_async_engine(host.sqlalchemy_url)
    async with engine.connect() as connection:
        count = await connection.scalar(text("SELECT count(*) FROM orders"))
    await engine.dispose()
    return int(count or 0)


async def up_to(incidents: IncidentClient, count: int) -> AsyncIterator[IncidentEvent]:
    """Yield the first so many changes, which on PostgreSQL others may hold up for a moment."""
    after = None
    while count:
        page = await incidents.read_changes(after, limit=count, wait=10)
        for change in page.changes:
            yield change
        count -= len(page.changes)
        after = page.next


async def leftovers(host: Host) -> list[int]:
    """Return how many rows each of our tables has."""
    engine = create_async_engine(host.sqlalchemy_url)
    async with engine.connect() as connection:
        counts = [
            int(await connection.scalar(text(f"SELECT count(*) FROM {table}")) or 0)
            for table in ('"Incident"', "incident_event", "incident_idempotency_key")
        ]
    await engine.dispose()
    return counts


async def test_after_the_commit_everybody_sees_it(
    host: Host, incidents: IncidentClient, other: IncidentClient
) -> None:
    """Incident, history, feed, keys and lists are there for all, together with the host's row."""
    assert await other.list() == await incidents.list() == []
    async with host.begin() as (connection, end):
        joined = incidents.join(connection)
        await end.execute("INSERT INTO orders VALUES (7)")
        with acting_as("alice"):
            created = await joined.create(
                "Order 7 is lost", source="operator", dedup_key="order:7", idempotency_key="k"
            )
            changed = await joined.update_status(
                created.incident_id, "failed", note="For good", expected_version=1
            )
        await joined.note(created.incident_id, "Refunded")
        assert await joined.get(created.incident_id) == changed
        assert await joined.list() == [changed]
        assert len(await joined.history(created.incident_id)) == 3
        assert (await joined.search(status="failed", total=True)).total == 1
        assert [one async for one in joined.iterate()] == [changed]
        assert await other.list() == await incidents.list() == []
        with pytest.raises(IncidentNotFound):
            await other.get(created.incident_id)
        assert (await other.read_changes()).changes == []
        await end.commit()
    for client in (incidents, other):
        assert await client.list() == [changed]
        assert await client.get(created.incident_id) == changed
        history = await client.history(created.incident_id)
        assert [event.actor for event in history] == ["alice", "alice", None]
        assert [change async for change in up_to(client, 3)] == history
    again = await other.create(
        "Order 7 is lost", source="operator", dedup_key="order:7", idempotency_key="k"
    )
    assert again == created
    assert await count_orders(host) == 1


async def test_after_the_rollback_nothing_is_left(
    host: Host, incidents: IncidentClient, other: IncidentClient, redis_url: str
) -> None:
    """No row, no event, no key, no page in Redis: as if it had never been."""
    kept = await incidents.create("Disk is full", source="monitoring", dedup_key="disk")
    before = await other.list()
    rows = await leftovers(host)
    with Redis.from_url(redis_url) as redis:
        redis.flushdb()
        async with host.begin() as (connection, end):
            joined = incidents.join(connection)
            await end.execute("INSERT INTO orders VALUES (7)")
            lost = await joined.create("Order 7 is lost", source="operator", idempotency_key="k")
            await joined.create("Disk is full", source="monitoring", dedup_key="disk")
            await joined.update_status(kept.incident_id, "completed")
            await joined.note(kept.incident_id, "Never said")
            await joined.list()
            await end.rollback()
        assert list(redis.scan_iter()) == []
    assert await leftovers(host) == rows
    assert await incidents.list() == await other.list() == before == [kept]
    assert len(await incidents.history(kept.incident_id)) == 1
    with pytest.raises(IncidentNotFound):
        await incidents.history(lost.incident_id)
    assert len((await incidents.read_changes(wait=10)).changes) == 1
    assert await count_orders(host) == 0
    new = await incidents.create("Line is down", source="operator", idempotency_key="k")
    assert new.incident_message == "Line is down"


async def test_a_savepoint_takes_back_its_part(host: Host, incidents: IncidentClient) -> None:
    """What was written since a savepoint that is rolled back is not there, all else is."""
    async with host.begin() as (connection, end):
        joined = incidents.join(connection)
        first = await joined.create("Order 7 is lost", source="operator")
        with suppress(ZeroDivisionError):
            async with end.savepoint():
                await joined.create("Order 8 is lost", source="operator")
                await joined.update_status(first.incident_id, "failed")
                raise ZeroDivisionError
        await joined.note(first.incident_id, "still new")
        await end.commit()
    assert await incidents.list() == [first]
    history = await incidents.history(first.incident_id)
    assert [event.kind for event in history] == [EventKind.CREATED, EventKind.NOTED]


async def test_an_error_of_ours_leaves_the_transaction_alone(host: Host, redis_url: str) -> None:
    """After a refusal the host goes on in its transaction, and can commit it."""
    one_way = {"new": ["completed"]}
    async with IncidentClient.open(host.url, redis_url, transitions=one_way) as incidents:
        old = await incidents.create("Disk is full", source="monitoring", dedup_key="disk")
        await incidents.update_status(old.incident_id, "completed")
        other = await incidents.create("Disk is full", source="monitoring", dedup_key="disk")
        async with host.begin() as (connection, end):
            joined = incidents.join(connection)
            await end.execute("INSERT INTO orders VALUES (7)")
            await joined.create("Order 7 is lost", source="operator", idempotency_key="k")
            refusals: list[tuple[type[Exception], Coroutine[Any, Any, object]]] = [
                (InvalidIncident, joined.create("x", source="operator")),
                (IncidentNotFound, joined.update_status(99, "failed")),
                (IncidentNotFound, joined.note(99, "nobody")),
                (IncidentNotFound, joined.get(99)),
                (VersionConflict, joined.update_status(1, "completed", expected_version=9)),
                (IllegalTransition, joined.update_status(other.incident_id, "failed")),
                (
                    IdempotencyKeyReused,
                    joined.create("Other words", source="operator", idempotency_key="k"),
                ),
            ]
            for error, call in refusals:
                with pytest.raises(error):
                    await call
            await end.commit()
        assert await count_orders(host) == 1
        assert len(await incidents.list()) == 3
    async with IncidentClient.open(host.url) as free, host.begin() as (connection, end):
        with pytest.raises(DuplicateOpenIncident):
            await free.join(connection).update_status(old.incident_id, "new")
        await end.execute("INSERT INTO orders VALUES (8)")
        await end.commit()
    assert await count_orders(host) == 2


async def test_it_counts_occurrences_of_what_others_opened(
    host: Host, incidents: IncidentClient
) -> None:
    """Deduplication looks at all that is committed, and at the transaction's own."""
    opened = await incidents.create("Disk is full", source="monitoring", dedup_key="disk")
    async with host.begin() as (connection, end):
        joined = incidents.join(connection)
        for expected in (2, 3):
            again = await joined.create("Disk is full", source="monitoring", dedup_key="disk")
            assert (again.incident_id, again.occurrences) == (opened.incident_id, expected)
        await end.commit()
    assert (await incidents.get(opened.incident_id)).occurrences == 3


async def test_an_ended_transaction_is_no_transaction(
    host: Host, incidents: IncidentClient
) -> None:
    """Once the connection is given back, what was joined writes nothing any more."""
    async with host.begin() as (connection, end):
        joined = incidents.join(connection)
        await joined.create("Order 7 is lost", source="operator")
        await end.commit()
        if host.kind in ("asyncpg", "pool"):
            with pytest.raises(NotInTransaction):
                await joined.create("Order 8 is lost", source="operator")
            with pytest.raises(NotInTransaction):
                incidents.join(connection)
    if host.kind == "connection":
        with pytest.raises(NotInTransaction):
            await joined.create("Order 8 is lost", source="operator")
    assert len(await incidents.list()) == 1


async def test_concurrent_transactions_never_lose_a_change(
    host: Host, incidents: IncidentClient
) -> None:
    """Each of several joined transactions changes what the one before it left."""
    incident = await incidents.create("Disk is full", source="monitoring")

    async def change(status: str) -> None:
        async with host.begin() as (connection, end):
            await incidents.join(connection).update_status(incident.incident_id, status)
            await end.commit()

    calls = [change(status) for status in ("failed", "completed", "new", "failed")]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    for outcome in outcomes:
        assert outcome is None or isinstance(outcome, StoreUnavailable)
    history = await incidents.history(incident.incident_id)
    status: IncidentStatus | None = IncidentStatus.NEW
    for event in history[1:]:
        assert event.from_status is status
        status = event.to_status
    assert (await incidents.get(incident.incident_id)).version == len(history)


# What cannot be joined


async def test_a_connection_that_commits_by_itself_is_refused(host: Host) -> None:
    """AUTOCOMMIT is no transaction, wherever it was asked for."""
    async with IncidentClient.open(host.url) as incidents:
        plain = create_async_engine(host.sqlalchemy_url)
        born = create_async_engine(host.sqlalchemy_url, isolation_level="AUTOCOMMIT")
        for engine in (plain.execution_options(isolation_level="AUTOCOMMIT"), born):
            async with engine.connect() as connection:
                with pytest.raises(NotInTransaction):
                    incidents.join(connection)
            async with AsyncSession(engine) as session:
                with pytest.raises(NotInTransaction):
                    await incidents.join(session).list()
        unstarted = plain.connect()
        with pytest.raises(NotInTransaction):
            incidents.join(unstarted)
        await plain.dispose()
        await born.dispose()


async def test_other_things_are_refused_by_name(
    sqlite_url: str, migrated_postgres_url: str
) -> None:
    """What is no connection, or one to another kind of database, is told what is."""
    connection = await asyncpg.connect(migrated_postgres_url)
    async with (
        IncidentClient.open(sqlite_url) as on_sqlite,
        IncidentClient.open(migrated_postgres_url) as on_postgres,
    ):
        for thing in (None, "sqlite://", object(), create_async_engine(sqlite_url)):
            with pytest.raises(TypeError, match="AsyncConnection and AsyncSession"):
                on_sqlite.join(thing)
        with pytest.raises(NotInTransaction):
            on_postgres.join(connection)
        async with connection.transaction():
            with pytest.raises(TypeError, match="on sqlite, not on postgresql"):
                on_sqlite.join(connection)
        engine = create_async_engine(sqlite_url)
        async with engine.connect() as other:
            with pytest.raises(TypeError, match="on postgresql, not on sqlite"):
                on_postgres.join(other)
        await engine.dispose()
    await connection.close()
    with pytest.raises(ClientClosed):
        on_sqlite.join(None)


@on_postgresql
async def test_errors_of_the_driver_are_translated(host: Host, incidents: IncidentClient) -> None:
    """A transaction that has failed before is a StoreError, whatever the driver calls it."""
    async with host.begin() as (connection, end):
        joined = incidents.join(connection)
        with pytest.raises(Exception, match="nowhere"):
            await end.execute("INSERT INTO nowhere VALUES (7)")
        with pytest.raises(StoreError):
            await joined.create("Order 7 is lost", source="operator")
        await end.rollback()
    assert await incidents.list() == []


@on_postgresql
async def test_a_connection_that_is_cut_is_unavailable(
    host: Host, incidents: IncidentClient
) -> None:
    """If the server ends the connection, the joined call raises StoreUnavailable."""
    async with host.begin() as (connection, _):
        joined = incidents.join(connection)
        await joined.create("Order 7 is lost", source="operator")
        killer = await asyncpg.connect(host.url)
        await killer.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE state = 'idle in transaction' AND datname = current_database()"
        )
        await killer.close()
        # A pool takes a connection back that it has lost.
        with pytest.raises((StoreUnavailable, NotInTransaction)):
            await joined.create("Order 8 is lost", source="operator")
    assert await incidents.list() == []


async def test_a_writer_that_holds_the_file_is_waited_for(sqlite_url: str) -> None:
    """On SQLite a joined write waits as long as the host's connection does, then is unavailable."""
    async with IncidentClient.open(sqlite_url) as incidents:
        hasty = create_async_engine(sqlite_url, connect_args={"timeout": 0.05})
        patient = create_async_engine(sqlite_url)
        async with patient.connect() as holder, hasty.connect() as waiter:
            await incidents.join(holder).create("Disk is full", source="monitoring")
            with pytest.raises(StoreUnavailable):
                await incidents.join(waiter).create("Line is down", source="partner")
            await waiter.rollback()
            await holder.commit()
        await hasty.dispose()
        await patient.dispose()
        assert len(await incidents.list()) == 1


# The host's engine or pool


@pytest.fixture(params=["sqlite-engine", "postgresql-engine", "postgresql-pool"])
def kind_and_url(request: pytest.FixtureRequest) -> tuple[str, str]:
    """What a host opens, and on what."""
    database, kind = request.param.split("-")
    name = {"sqlite": "sqlite_url", "postgresql": "migrated_postgres_url"}[database]
    return kind, str(request.getfixturevalue(name))


@pytest.fixture
async def opened(kind_and_url: tuple[str, str]) -> AsyncIterator[Any]:
    """What a host has opened itself."""
    kind, url = kind_and_url
    if kind == "pool":
        async with asyncpg.create_pool(url, min_size=1, max_size=4) as pool:
            yield pool
        return
    engine = create_async_engine(url.replace("postgresql://", "postgresql+asyncpg://"))
    yield engine
    await engine.dispose()


async def test_a_client_works_on_what_the_host_has_opened(opened: Any, redis_url: str) -> None:
    """Every verb works there, and the host goes on to use it after the client is closed."""
    for _ in range(2):
        async with IncidentClient.open(opened, redis_url, max_staleness=0) as incidents:
            await incidents.check()
            first = await incidents.create(
                "Disk is full", source="monitoring", dedup_key="disk", idempotency_key="k"
            )
            again = await incidents.create(
                "Disk is full", source="monitoring", dedup_key="disk", idempotency_key="k"
            )
            assert again == first
            await asyncio.gather(
                *(
                    incidents.create("Line is down", source="partner", dedup_key="line")
                    for _ in range(20)
                )
            )
            changed = await incidents.update_status(first.incident_id, "failed")
            with pytest.raises(VersionConflict):
                await incidents.update_status(first.incident_id, "new", expected_version=1)
            await incidents.note(first.incident_id, "a note")
            assert await incidents.get(first.incident_id) == changed
            listed = await incidents.list()
            assert listed == await incidents.list()
            assert listed == (await incidents.search(total=True)).incidents
            assert len(await incidents.history(first.incident_id)) == 3
            changes = [change async for change in up_to(incidents, 23)]
            assert len({change.cursor for change in changes}) == 23
            assert await incidents.purge(datetime.now(UTC) + timedelta(days=1)) == 1
        await forget(opened)
    assert await is_usable(opened)


async def forget(opened: Any) -> None:
    """Empty our tables by way of what the host has opened."""
    tables = ('"Incident"', "incident_event", "incident_idempotency_key")
    for table in tables:
        if isinstance(opened, asyncpg.Pool):
            await opened.execute(f"DELETE FROM {table}")
        else:
            async with opened.begin() as connection:
                await connection.execute(text(f"DELETE FROM {table}"))


async def is_usable(opened: Any) -> bool:
    """Tell whether the host can still use what it has opened."""
    if isinstance(opened, asyncpg.Pool):
        return bool(await opened.fetchval("SELECT true"))
    async with opened.connect() as connection:
        return bool(await connection.scalar(text("SELECT 1")))


async def test_a_callers_cancellation_leaves_it_healthy(opened: Any) -> None:
    """However many callers give up, the host's connections come back in order."""
    async with IncidentClient.open(opened) as incidents:
        for step in range(15):
            calls = [
                asyncio.ensure_future(incidents.create("Disk is full", source="partner")),
                asyncio.ensure_future(incidents.list()),
                asyncio.ensure_future(incidents.get(1)),
            ]
            for _ in range(step):
                await asyncio.sleep(0)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        assert await is_usable(opened)
        assert len(await incidents.list(limit=100)) <= 15


async def test_it_is_refused_what_makes_no_sense(opened: Any, empty_postgres_url: str) -> None:
    """Options are for URLs, a database without our schema says so, and other things are named."""
    with pytest.raises(InvalidSettings, match="options"):
        IncidentClient.open(opened, options=StoreOptions())
    wrong: Any = object()
    with pytest.raises(InvalidSettings, match="AsyncEngine"):
        IncidentClient.open(wrong)
    memory = create_async_engine("sqlite+aiosqlite:///:memory:")
    with pytest.raises(InvalidSettings, match="in memory"):
        IncidentClient.open(memory)
    empty = create_async_engine(empty_postgres_url.replace("postgresql", "postgresql+asyncpg"))
    with pytest.raises(SchemaOutOfDate):
        await IncidentClient.open(empty).connect()
    async with asyncpg.create_pool(empty_postgres_url, min_size=0) as pool:
        with pytest.raises(SchemaOutOfDate):
            await IncidentClient.open(pool).connect()
    await empty.dispose()
    away = create_async_engine("postgresql+asyncpg://somebody@127.0.0.1:1/nowhere")
    with pytest.raises(StoreUnavailable):
        await IncidentClient.open(away).connect()
    await away.dispose()


async def test_a_pool_may_be_set_up_as_the_host_likes(migrated_postgres_url: str) -> None:
    """Codecs and a cache of statements of the host's do not matter."""

    async def prepare(connection: asyncpg.Connection[asyncpg.Record]) -> None:
        for name in ("timestamptz", "int8", "text"):
            await connection.set_type_codec(
                name,
                schema="pg_catalog",
                encoder=str,
                decoder=lambda value: value,
                format="text",
            )

    async with (
        asyncpg.create_pool(migrated_postgres_url, min_size=0, statement_cache_size=0) as pool,
        IncidentClient.open(pool) as incidents,
    ):
        await incidents.create("Disk is full", source="partner")
        assert len(await incidents.list()) == 1


# Any course of transactions


steps = st.lists(
    st.tuples(
        st.sampled_from(["create", "count", "change", "note", "change"]),
        st.integers(0, 3),
        statuses,
        st.booleans(),
    ),
    min_size=1,
    max_size=5,
)
transactions = st.lists(
    st.tuples(steps, st.sampled_from(["commit", "rollback", "alone"])), min_size=1, max_size=6
)


class Model:
    """What a database has to hold: incidents, and how many events each has."""

    def __init__(self) -> None:
        self.incidents: dict[int, Incident] = {}
        self.events: dict[int, int] = {}

    def copy(self) -> Model:
        """Return a model that may go its own way."""
        model = Model()
        model.incidents, model.events = dict(self.incidents), dict(self.events)
        return model

    async def step(self, verbs: Any, step: tuple[str, int, IncidentStatus, bool]) -> None:
        """Do one thing, and expect what the model says."""
        verb, number, status, with_key = step
        ids = sorted(self.incidents)
        if verb == "create" or not ids:
            self.take(await verbs.create(f"Order {number} is lost", source="operator"))
        elif verb == "count":
            key = f"key {number % 2}"
            incident = await verbs.create("Disk is full", source="partner", dedup_key=key)
            opened = [
                one.incident_id
                for one in self.incidents.values()
                if one.dedup_key == key and one.incident_type is IncidentStatus.NEW
            ]
            assert opened in ([], [incident.incident_id])
            before = self.incidents.get(incident.incident_id)
            assert incident.occurrences == (before.occurrences + 1 if before else 1)
            self.take(incident)
        elif verb == "note":
            await verbs.note(ids[number % len(ids)], "a note")
            self.events[ids[number % len(ids)]] += 1
        else:
            await self.change(verbs, ids[number % len(ids)], status, with_version=with_key)

    async def change(
        self, verbs: Any, incident_id: int, status: IncidentStatus, *, with_version: bool
    ) -> None:
        """Change a status, or be refused."""
        before = self.incidents[incident_id]
        version = before.version if with_version else None
        try:
            incident = await verbs.update_status(incident_id, status, expected_version=version)
        except DuplicateOpenIncident:
            assert status is IncidentStatus.NEW
            assert any(
                one.dedup_key == before.dedup_key and one.incident_type is IncidentStatus.NEW
                for one in self.incidents.values()
            )
            return
        if before.incident_type is status:
            assert incident == before
        else:
            assert incident.version == before.version + 1
            self.take(incident)

    def take(self, incident: Incident) -> None:
        """Hold the incident as it is now, with one event more."""
        self.incidents[incident.incident_id] = incident
        self.events[incident.incident_id] = self.events.get(incident.incident_id, 0) + 1


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(course=transactions)
def test_whatever_is_committed_is_there_and_nothing_else(
    host: Host, redis_url: str, course: list[Any]
) -> None:
    """After any course of commits and rollbacks all readers see what was committed, exactly."""

    async def run() -> None:
        async with (
            IncidentClient.open(host.url, redis_url) as incidents,
            IncidentClient.open(host.url, redis_url) as other,
        ):
            engine = create_async_engine(host.sqlalchemy_url)
            async with engine.begin() as connection:
                for table in ('"Incident"', "incident_event"):
                    await connection.execute(text(f"DELETE FROM {table}"))
            await engine.dispose()
            model, orders = Model(), await count_orders(host)
            for actions, ending in course:
                if ending == "alone":
                    for action in actions:
                        await model.step(incidents, action)
                else:
                    attempt = model.copy()
                    async with host.begin() as (connection, end):
                        joined = incidents.join(connection)
                        await end.execute("INSERT INTO orders VALUES (1)")
                        for action in actions:
                            await attempt.step(joined, action)
                            await joined.list()
                        await (end.commit() if ending == "commit" else end.rollback())
                    if ending == "commit":
                        model = attempt
                        orders += 1
                await agree(model, incidents, other)
                assert await count_orders(host) == orders

    asyncio.run(run())


async def agree(model: Model, *clients: IncidentClient) -> None:
    """Check that each client sees what the model holds."""
    expected = sorted(
        model.incidents.values(), key=lambda one: (one.created_at, one.incident_id), reverse=True
    )
    for client in clients:
        assert await client.list(limit=100) == expected
        for incident_id, incident in model.incidents.items():
            assert await client.get(incident_id) == incident
            assert len(await client.history(incident_id)) == model.events[incident_id]
        total = sum(model.events.values())
        changes = [change async for change in up_to(client, total)]
        assert len({change.cursor for change in changes}) == total
        last = changes[-1].cursor if changes else None
        assert (await client.read_changes(last)).changes == []

"""Incidents in the application's own transaction, on each kind of connection."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import AsyncExitStack, closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
from attrs import evolve, frozen
from redis import Redis
from sqlalchemy import NullPool, event
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession

from incidentkit import (
    ClientClosed,
    DuplicateOpenIncident,
    IdempotencyKeyReused,
    IllegalTransition,
    Incident,
    IncidentClient,
    IncidentEvent,
    IncidentKitError,
    IncidentNotFound,
    IncidentStatus,
    InvalidIncident,
    NotInTransaction,
    SchemaOutOfDate,
    StoreError,
    StoreUnavailable,
    VersionConflict,
    acting_as,
)
from incidentkit.store.ports import BEGINNING
from tests.endless import Endless
from tests.hosts import (
    WAYS,
    AsyncpgHost,
    Host,
    begin_by_itself,
    host_engine,
    open_host,
    prepared,
    run_sql,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from incidentkit.joined import JoinedIncidents

GRAPH = {"new": ["completed", "failed"], "failed": ["new"]}
"""`completed` is final."""


@pytest.fixture
async def url(url: str) -> str:
    """The URL of a database of each kind, with the schema and the host's own table."""
    return await prepared(url)


@pytest.fixture
async def postgres_url(migrated_postgres_url: str) -> str:
    """The URL of a PostgreSQL database with the schema and the host's own table."""
    return await prepared(migrated_postgres_url)


@pytest.fixture
async def file_url(sqlite_url: str) -> str:
    """The URL of an SQLite file with the schema and the host's own table."""
    return await prepared(sqlite_url)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """Each kind of connection on which a host may have a transaction."""
    return str(request.param)


@pytest.fixture
def host_url(way: str, request: pytest.FixtureRequest) -> str:
    """The URL of the host's database."""
    name = "migrated_sqlite_url" if way.startswith("sqlite") else "migrated_postgres_url"
    return str(request.getfixturevalue(name))


@pytest.fixture
async def host(way: str, host_url: str) -> AsyncIterator[Host]:
    """A host with each kind of connection."""
    async with open_host(way, await prepared(host_url)) as host:
        yield host


@pytest.fixture
async def client(host: Host, redis_url: str) -> AsyncIterator[IncidentClient]:
    """The host's client."""
    async with IncidentClient.open(host.url, redis_url, transitions=GRAPH) as client:
        yield client


@pytest.fixture
async def other(host: Host, redis_url: str) -> AsyncIterator[IncidentClient]:
    """A second client, as another process would open it."""
    async with IncidentClient.open(host.url, redis_url) as client:
        yield client


@pytest.fixture
async def joined(host: Host, client: IncidentClient) -> JoinedIncidents:
    """Incidents joined to a transaction that the host has begun."""
    return await join(host, client)


async def join(host: Host, client: IncidentClient) -> JoinedIncidents:
    """Begin a transaction and join it."""
    await host.begin()
    return client.join(host.connection)


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    """A client to inspect Redis with."""
    with Redis.from_url(redis_url) as redis:
        yield redis


@frozen
class Everything:
    """Everything that is visible outside a transaction."""

    incidents: list[Incident]
    histories: dict[int, list[IncidentEvent]]
    keys: list[str]
    events: int
    orders: list[int]

    @classmethod
    async def seen_by(cls, client: IncidentClient, url: str) -> Everything:
        """Return what a client reads and what the tables hold."""
        incidents = await client.list(limit=1000)
        ids = [incident.incident_id for incident in incidents]
        assert [await client.get(incident_id) for incident_id in ids] == incidents
        keys = await run_sql(url, "SELECT idempotency_key FROM incident_idempotency_key")
        ((events,),) = await run_sql(url, "SELECT count(*) FROM incident_event")
        return cls(
            incidents,
            {incident_id: await client.history(incident_id) for incident_id in ids},
            sorted(key for (key,) in keys),
            events,
            [each for (each,) in await run_sql(url, "SELECT order_id FROM orders ORDER BY 1")],
        )


async def feed(client: IncidentClient, count: int) -> list[IncidentEvent]:
    """Return the feed once it has `count` events; other tests' transactions may delay it."""
    async with asyncio.timeout(60):
        while len(events := await client.store.changes(BEGINNING, 1000)) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return events


def kinds(events: list[IncidentEvent]) -> list[str]:
    """Return the kinds of the events."""
    return [str(event.kind) for event in events]


# Commits, rollbacks and savepoints


async def test_a_commit_shows_everything_to_everybody(
    host: Host, client: IncidentClient, other: IncidentClient
) -> None:
    """After the commit, every client sees the incident, its status, its history and its keys."""
    assert await client.list() == await other.list() == []
    joined = await join(host, client)
    await host.order(1)
    with acting_as("shop"):
        created = await joined.create(
            "Order 1 is late", source="partner", dedup_key="order-1", idempotency_key="first"
        )
        noted = await joined.note(created.incident_id, "The carrier was called")
        changed = await joined.update_status(
            created.incident_id, "failed", note="Lost", expected_version=1, idempotency_key="second"
        )
    await host.commit()
    assert changed.version == 2
    for each in (client, other):
        assert await each.list() == await each.list(status="failed") == [changed]
        assert await each.list(status="new") == []
        assert await each.get(created.incident_id) == changed
        history = await each.history(created.incident_id)
        assert kinds(history) == ["created", "noted", "status_changed"]
        assert history[1] == noted
        assert {event.actor for event in history} == {"shop"}
        assert await feed(each, 3) == history
        with acting_as("shop"):
            again = await each.create(
                "Order 1 is late", source="partner", dedup_key="order-1", idempotency_key="first"
            )
            assert again == created
            assert (
                await each.update_status(
                    1, "failed", note="Lost", expected_version=1, idempotency_key="second"
                )
            ) == changed
            with pytest.raises(IdempotencyKeyReused):
                await each.create("Order 2 is late", source="partner", idempotency_key="first")
    assert await run_sql(host.url, "SELECT order_id FROM orders") == [(1,)]


async def test_before_the_commit_nobody_sees_anything(
    host: Host, client: IncidentClient, other: IncidentClient
) -> None:
    """Before the commit, every client, even the one that joined, sees the previous state."""
    old = await other.create("Order 1 is late", source="partner", dedup_key="order-1")
    before = await Everything.seen_by(other, host.url)
    joined = await join(host, client)
    await joined.create("Order 1 is late", source="partner", dedup_key="order-1")
    await joined.create("Order 2 is late", source="partner", idempotency_key="key")
    await joined.update_status(old.incident_id, "completed")
    await joined.note(old.incident_id, "Delivered")
    for each in (client, other):
        assert await Everything.seen_by(each, host.url) == before
        assert kinds(await each.store.changes(BEGINNING, 1000)) in (["created"], [])
    await host.commit()
    assert kinds(await other.history(old.incident_id)) == [
        "created",
        "recurred",
        "status_changed",
        "noted",
    ]


async def test_a_rollback_leaves_nothing(
    host: Host, client: IncidentClient, other: IncidentClient, redis: Redis
) -> None:
    """After a rollback, nothing is left: no row, no event, no key in Redis, no page."""
    old = await other.create("Order 1 is late", source="partner", dedup_key="order-1")
    before = await Everything.seen_by(other, host.url)
    await feed(other, 1)
    redis.flushdb()
    joined = await join(host, client)
    await host.order(1)
    await joined.create(
        "Order 1 is late", source="partner", dedup_key="order-1", idempotency_key="first"
    )
    created = await joined.create("Order 2 is late", source="partner", dedup_key="order-2")
    await joined.update_status(old.incident_id, "failed", note="Lost", idempotency_key="second")
    await joined.note(created.incident_id, "The carrier was called")
    assert len(await joined.list()) == 2
    await host.rollback()
    assert redis.keys() == []
    for each in (client, other):
        assert await Everything.seen_by(each, host.url) == before
        assert await feed(each, 1) == before.histories[old.incident_id]
        with pytest.raises(IncidentNotFound):
            await each.get(created.incident_id)
        with pytest.raises(IncidentNotFound):
            await each.history(created.incident_id)
    again = await other.create("Another one", source="partner", idempotency_key="first")
    assert again.incident_message == "Another one"
    assert (await other.create("Order 2", source="partner", dedup_key="order-2")).occurrences == 1


async def test_a_savepoint_takes_back_what_came_after_it(
    host: Host, client: IncidentClient, other: IncidentClient
) -> None:
    """A rollback to a savepoint undoes only what followed it; the rest is committed."""
    joined = await join(host, client)
    await host.order(1)
    first = await joined.create("Order 1 is late", source="partner", dedup_key="order-1")
    await host.save()
    await host.order(2)
    await joined.create("Order 1 is late", source="partner", dedup_key="order-1")
    await joined.create("Order 2 is late", source="partner", idempotency_key="key")
    await joined.update_status(first.incident_id, "failed", idempotency_key="other")
    await joined.note(first.incident_id, "Lost")
    await host.take_back()
    assert await joined.list() == [first]
    assert kinds(await joined.history(first.incident_id)) == ["created"]
    await host.save()
    done = await joined.update_status(first.incident_id, "completed")
    await host.keep()
    await host.commit()
    seen = await Everything.seen_by(other, host.url)
    assert seen.incidents == [done]
    assert seen.orders == [1]
    assert seen.keys == []
    assert seen.events == 2
    assert kinds(await feed(other, 2)) == ["created", "status_changed"]


async def test_a_rollback_to_a_savepoint_is_a_change_to_no_list(
    host: Host, client: IncidentClient, other: IncidentClient
) -> None:
    """After a rollback to a savepoint, lists show what was committed, even if cached before."""
    await other.create("Order 0 is late", source="partner")
    await other.list()
    joined = await join(host, client)
    await host.save()
    await joined.create("Order 1 is late", source="partner")
    await host.take_back()
    created = await joined.create("Order 2 is late", source="partner")
    await host.commit()
    assert (await other.list())[0] == (await client.list())[0] == created


# Calls in a transaction


REFUSED: dict[type[IncidentKitError], Callable[[JoinedIncidents], Awaitable[Any]]] = {
    InvalidIncident: lambda joined: joined.create("test", source="partner", idempotency_key="key"),
    IncidentNotFound: lambda joined: joined.update_status(99, "failed", idempotency_key="key"),
    VersionConflict: lambda joined: joined.update_status(
        1, "failed", expected_version=7, idempotency_key="key"
    ),
    IllegalTransition: lambda joined: joined.update_status(1, "failed", idempotency_key="key"),
    DuplicateOpenIncident: lambda joined: joined.update_status(2, "new", idempotency_key="key"),
    IdempotencyKeyReused: lambda joined: joined.create(
        "Order 4 is late", source="partner", idempotency_key="used"
    ),
}


@pytest.mark.parametrize("error", REFUSED, ids=lambda error: error.__name__)
async def test_a_refusal_leaves_the_transaction_usable(
    host: Host, client: IncidentClient, other: IncidentClient, error: type[IncidentKitError]
) -> None:
    """After a refused call, the host can commit its transaction, and the call leaves nothing."""
    await other.create("Order 1 is late", source="partner", idempotency_key="used")
    await other.update_status(1, "completed")
    await other.create("Order 2 is late", source="partner", dedup_key="order-2")
    await other.update_status(2, "failed")
    await other.create("Order 2 is late", source="partner", dedup_key="order-2")
    before = await Everything.seen_by(other, host.url)
    joined = await join(host, client)
    await host.order(1)
    with pytest.raises(error):
        await REFUSED[error](joined)
    await host.order(2)
    await host.commit()
    assert await Everything.seen_by(other, host.url) == evolve(before, orders=[1, 2])
    # The refused call's key is free.
    again = await other.create("Order 5 is late", source="partner", idempotency_key="key")
    assert again.incident_message == "Order 5 is late"


async def test_calls_of_several_tasks_take_turns(
    host: Host, client: IncidentClient, joined: JoinedIncidents
) -> None:
    """Several tasks can share a join: calls take turns, and a failed one undoes no other."""
    calls: list[Awaitable[object]] = []
    for number in range(5):
        calls += [
            joined.create("Order 1 is late", source="partner", idempotency_key=f"key-{number}"),
            joined.update_status(99, "failed", idempotency_key=f"other-{number}"),
            joined.list(),
        ]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    await host.commit()
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert [type(error) for error in errors] == [IncidentNotFound] * 5
    assert len(await client.list()) == 5
    keys = await run_sql(host.url, "SELECT answer FROM incident_idempotency_key")
    assert len(keys) == 5
    assert (None,) not in keys


# Connections that cannot be joined


async def test_a_join_ends_with_its_transaction(host: Host, client: IncidentClient) -> None:
    """After the commit or rollback, every call on the join raises NotInTransaction."""
    joined = await join(host, client)
    await joined.create("Order 1 is late", source="partner")
    await host.commit()
    for call in (joined.create("Order 2 is late", source="partner"), joined.get(1), joined.list()):
        with pytest.raises(NotInTransaction):
            await call
    assert len(await client.list()) == 1
    again = await join(host, client)
    assert (await again.get(1)).version == 1
    await host.rollback()
    with pytest.raises(NotInTransaction):
        await again.note(1, "Lost")


async def test_a_closed_connection_cannot_be_joined(
    way: str, host_url: str, redis_url: str
) -> None:
    """A connection that was closed or returned to its pool raises NotInTransaction."""
    url = await prepared(host_url)
    async with IncidentClient.open(url, redis_url) as client:
        async with open_host(way, url) as host:
            joined = await join(host, client)
            await joined.create("Order 1 is late", source="partner")
            await host.rollback()
        with pytest.raises(NotInTransaction):
            await joined.list()
        if not way.endswith("session"):  # a session may be used again
            with pytest.raises(NotInTransaction):
                client.join(host.connection)
        assert await client.list() == []


async def test_a_connection_that_was_cut_off_cannot_be_joined(postgres_url: str) -> None:
    """An asyncpg connection that is cut off during its transaction raises NotInTransaction."""
    async with (
        IncidentClient.open(postgres_url) as client,
        open_host("asyncpg-connection", postgres_url) as host,
    ):
        joined = await join(host, client)
        host.connection.terminate()
        with pytest.raises(NotInTransaction):
            await joined.list()
        with pytest.raises(NotInTransaction):
            client.join(host.connection)


@pytest.mark.parametrize("option", [{"stream_results": True}, {"yield_per": 1}], ids=str)
async def test_a_connection_that_streams_is_joined(url: str, option: dict[str, Any]) -> None:
    """Writes run although the host reads its own rows through a cursor of the server."""
    async with IncidentClient.open(url) as client, host_engine(url, poolclass=NullPool) as engine:
        async with engine.execution_options(**option).begin() as connection:
            joined = client.join(connection)
            created = await joined.create("Disk is full", source="partner", dedup_key="key")
            assert await joined.list() == [created]
            ended = await joined.resolve("key")
        assert await client.list() == [ended]


async def test_a_context_that_was_committed_is_no_transaction(url: str) -> None:
    """After a commit inside `engine.begin()` or `session.begin()`, calls raise NotInTransaction."""
    async with IncidentClient.open(url) as client, host_engine(url, poolclass=NullPool) as engine:
        for ended in (False, True):
            async with engine.begin() as connection:
                joined = client.join(connection)
                await connection.commit()
                joined = client.join(connection) if ended else joined
                with pytest.raises(NotInTransaction):
                    await joined.list()
            async with AsyncSession(engine) as session, session.begin():
                joined = client.join(session)
                await session.commit()
                joined = client.join(session) if ended else joined
                with pytest.raises(NotInTransaction):
                    await joined.list()


async def test_what_commits_by_itself_cannot_be_joined(url: str) -> None:
    """A connection or session in autocommit mode raises NotInTransaction."""
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(IncidentClient.open(url))
        engine = await stack.enter_async_context(host_engine(url, poolclass=NullPool))
        committing = await stack.enter_async_context(
            host_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        )
        for autocommit in (committing, engine.execution_options(isolation_level="AUTOCOMMIT")):
            async with autocommit.connect() as connection:
                with pytest.raises(NotInTransaction):
                    client.join(connection)
            async with AsyncSession(autocommit) as session:
                with pytest.raises(NotInTransaction):
                    await client.join(session).create("Order 1 is late", source="partner")
        with pytest.raises(NotInTransaction):
            client.join(engine.connect())
        assert await client.list() == []


async def test_a_driver_that_commits_by_itself_cannot_be_joined(file_url: str) -> None:
    """On SQLite, a driver in autocommit mode is detected before anything is written."""
    options: dict[str, Any] = {"connect_args": {"isolation_level": None}, "poolclass": NullPool}
    async with (
        IncidentClient.open(file_url) as client,
        host_engine(file_url, **options) as engine,
        engine.connect() as connection,
    ):
        with pytest.raises(NotInTransaction):
            await client.join(connection).create("Order 1 is late", source="partner")
        assert await client.list() == []


async def test_asyncpg_outside_of_a_transaction_cannot_be_joined(postgres_url: str) -> None:
    """An asyncpg connection, pooled or not, must be in a transaction to be joined."""
    async with (
        IncidentClient.open(postgres_url) as client,
        open_host("asyncpg-connection", postgres_url) as connection,
        open_host("asyncpg-pool", postgres_url) as pooled,
    ):
        for host in (connection, pooled):
            with pytest.raises(NotInTransaction):
                client.join(host.connection)


async def test_other_objects_are_refused_by_what_is_accepted(
    file_url: str, postgres_url: str
) -> None:
    """Joining another object or another kind of database raises a TypeError that says so."""
    async with (
        IncidentClient.open(file_url) as on_file,
        IncidentClient.open(postgres_url) as on_postgres,
        host_engine(file_url, poolclass=NullPool) as engine,
        engine.connect() as connection,
        AsyncSession(engine) as session,
        AsyncSession() as unbound,
        open_host("asyncpg-connection", postgres_url) as host,
    ):
        await host.begin()
        wrongs: tuple[Any, ...] = (
            None,
            file_url,
            engine,
            sqlite3.connect,
            connection.sync_connection,
            session.sync_session,
        )
        for wrong in wrongs:
            with pytest.raises(TypeError, match="AsyncConnection and AsyncSession, and asyncpg's"):
                on_file.join(wrong)
        for other in (connection, session):
            with pytest.raises(TypeError, match="on postgresql, not on sqlite"):
                on_postgres.join(other)
        with pytest.raises(TypeError, match="on sqlite, not on postgresql"):
            on_file.join(host.connection)
        with pytest.raises(TypeError, match="on one database"):
            on_file.join(unbound)


async def test_a_closed_client_joins_nothing(host: Host) -> None:
    """Joining with a client that is not open raises ClientClosed."""
    client = IncidentClient.open(host.url)
    await host.begin()
    with pytest.raises(ClientClosed):
        client.join(host.connection)
    async with client:
        client.join(host.connection)
    with pytest.raises(ClientClosed):
        client.join(host.connection)


# Failures in a transaction


async def test_a_failed_transaction_is_told(host: Host, client: IncidentClient) -> None:
    """After the host's statement fails, calls raise StoreError on PostgreSQL and work on SQLite."""
    joined = await join(host, client)
    with pytest.raises(Exception, match="nonsense"):
        await host.execute("SELECT * FROM nonsense")
    if host.url.startswith("sqlite"):
        # On SQLite, the transaction continues.
        await joined.create("Order 1 is late", source="partner")
    else:
        for call in (
            joined.create("Order 1 is late", source="partner"),
            joined.create("Order 1 is late", source="partner", idempotency_key="key"),
            joined.list(),
        ):
            with pytest.raises(StoreError):
                await call
    await host.rollback()
    assert await client.list() == []


async def test_a_missing_schema_is_told(host: Host, client: IncidentClient) -> None:
    """A host's database without the incident tables raises SchemaOutOfDate."""
    await run_sql(host.url, 'DROP TABLE "Incident"')
    calls: list[Callable[[JoinedIncidents], Awaitable[object]]] = [
        lambda joined: joined.create("Order 1 is late", source="partner"),
        lambda joined: joined.update_status(1, "new", idempotency_key="key"),
        lambda joined: joined.list(),
    ]
    for call in calls:
        joined = await join(host, client)
        with pytest.raises(SchemaOutOfDate):
            await call(joined)
        await host.rollback()


POSTGRES_WAYS = [way for way in WAYS if not way.startswith("sqlite")]


@pytest.mark.parametrize("way", POSTGRES_WAYS)
async def test_a_statement_that_takes_too_long_is_unavailable(way: str, postgres_url: str) -> None:
    """The server's statement and lock timeouts raise StoreUnavailable; a new transaction works."""
    async with (
        IncidentClient.open(postgres_url) as client,
        open_host("asyncpg-connection", postgres_url) as holder,
        open_host(way, postgres_url) as host,
    ):
        await client.create("Order 1 is late", source="partner", dedup_key="order-1")
        await holder.begin()
        await client.join(holder.connection).update_status(1, "failed")
        for setting in ("statement_timeout", "lock_timeout"):
            joined = await join(host, client)
            await host.execute(f"SET LOCAL {setting} = 50")
            with pytest.raises(StoreUnavailable):
                await joined.create("Order 1 is late", source="partner", dedup_key="order-1")
            await host.rollback()
        await holder.commit()
        joined = await join(host, client)
        again = await joined.create("Order 1 is late", source="partner", dedup_key="order-1")
        assert again.incident_id > 1
        await host.commit()


@pytest.mark.parametrize("way", POSTGRES_WAYS)
async def test_a_connection_that_is_ended_is_told(way: str, postgres_url: str) -> None:
    """A call on a terminated connection raises a typed error, and so does every later call."""
    async with (
        IncidentClient.open(postgres_url) as client,
        open_host(way, postgres_url) as host,
    ):
        joined = await join(host, client)
        await joined.create("Order 1 is late", source="partner")
        ((backend,),) = await host.execute("SELECT pg_backend_pid()")
        await run_sql(postgres_url, f"SELECT pg_terminate_backend({backend})")
        with pytest.raises((StoreUnavailable, NotInTransaction)):
            await joined.create("Order 2 is late", source="partner", idempotency_key="key")
        with pytest.raises((StoreError, NotInTransaction)):
            await joined.list()
        with suppress(Exception):
            await host.rollback()
        assert await client.list() == []


async def test_half_a_change_is_never_committed(file_url: str) -> None:
    """On SQLite, a call that fails halfway leaves nothing, even if the host still commits."""
    trigger = (
        "CREATE TRIGGER broken BEFORE INSERT ON incident_event "
        "WHEN new.kind <> 'noted' BEGIN SELECT raise(FAIL, 'broken'); END"
    )
    async with (
        IncidentClient.open(file_url) as client,
        open_host("sqlite-connection", file_url) as host,
    ):
        await client.create("Order 1 is late", source="partner", dedup_key="order-1")
        await run_sql(file_url, trigger)
        before = await Everything.seen_by(client, file_url)
        joined = await join(host, client)
        await host.order(1)
        for call in (
            joined.create("Order 1 is late", source="partner", dedup_key="order-1"),
            joined.create("Order 2 is late", source="partner", idempotency_key="key"),
            joined.update_status(1, "failed"),
        ):
            with pytest.raises(StoreError):
                await call
        await host.commit()
        assert await Everything.seen_by(client, file_url) == evolve(before, orders=[1])


async def test_a_call_that_is_cancelled_is_never_committed_by_halves(
    host: Host, client: IncidentClient
) -> None:
    """If a host cancels a call and then commits, the call is stored whole or not at all."""
    for turns in range(0, 40, 3):
        joined = await join(host, client)
        call = asyncio.ensure_future(
            joined.create("Order 1 is late", source="partner", idempotency_key=f"key-{turns}")
        )
        for _ in range(turns):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        try:
            await host.commit()
        except Exception:  # noqa: BLE001
            # The driver may have discarded its connection.
            await host.rollback()
        if isinstance(host, AsyncpgHost) and host.connection.is_closed():
            break
    incidents = await client.list(limit=1000)
    for incident in incidents:
        assert kinds(await client.history(incident.incident_id)) == ["created"]
    answers = await run_sql(host.url, "SELECT answer FROM incident_idempotency_key")
    assert len(answers) == len(incidents)
    assert (None,) not in answers


ON_A_FILE = pytest.mark.parametrize("way", [way for way in WAYS if way.startswith("sqlite")])


async def cancelled_during(
    host: Host, call: Awaitable[object], is_due: Callable[[list[str]], bool]
) -> list[str]:
    """Cancel a call while a statement runs, and return all of its statements.

    Args:
        host: The host whose engine is observed.
        call: The call.
        is_due: Whether to cancel, given the statements so far; the last is about to run.
    """
    task = asyncio.ensure_future(call)
    statements: list[str] = []

    def look(*arguments: Any) -> None:
        statements.append(arguments[2])
        if is_due(statements):
            task.cancel()

    connection: Any = host.connection
    in_session = isinstance(connection, AsyncSession)
    bound = connection.get_bind() if in_session else connection.sync_connection
    event.listen(bound.engine, "before_cursor_execute", look)
    await asyncio.gather(task, return_exceptions=True)
    event.remove(bound.engine, "before_cursor_execute", look)
    assert task.cancelled()
    return statements


def is_number(number: int) -> Callable[[list[str]], bool]:
    """Return a condition that holds when the statement of this number begins."""
    return lambda so_far: len(so_far) == number


@ON_A_FILE
async def test_a_host_on_a_file_goes_on_after_a_call_that_was_cancelled(
    host: Host, client: IncidentClient
) -> None:
    """On SQLite, a cancelled call is stored whole or not at all, and the host's own work stays.

    The call is cancelled during each of its statements in turn.
    """
    cut_short = 0
    while True:
        joined = await join(host, client)
        await host.order(cut_short + 1)
        call = joined.create("Order 1 is late", source="partner", idempotency_key="key")
        statements = await cancelled_during(host, call, is_number(cut_short + 1))
        await host.commit()
        cut_short += 1
        if await client.list():
            break
        assert await run_sql(host.url, "SELECT * FROM incident_idempotency_key") == []
    assert statements[-1].startswith("RELEASE")
    assert any(statement.startswith('INSERT INTO "Incident"') for statement in statements)
    assert len(await client.history(1)) == 1
    ((answer,),) = await run_sql(host.url, "SELECT answer FROM incident_idempotency_key")
    assert answer is not None
    await host.begin()
    assert await host.orders() == list(range(1, cut_short + 1))


@ON_A_FILE
async def test_a_host_is_told_if_its_transaction_went_with_a_call_that_was_cancelled(
    host: Host, client: IncidentClient
) -> None:
    """If a cancelled call's statement ends the transaction, the host's next statement fails."""
    await run_sql(
        host.url,
        'CREATE TRIGGER ends BEFORE INSERT ON "Incident" '
        "BEGIN SELECT RAISE(ROLLBACK, 'all is taken back'); END",
    )
    joined = await join(host, client)
    await host.order(1)
    call = joined.create("Order 1 is late", source="partner")
    await cancelled_during(host, call, lambda so_far: "INSERT" in so_far[-1])
    with pytest.raises(PendingRollbackError):
        await host.order(2)
    await host.rollback()
    assert await run_sql(host.url, "SELECT * FROM orders") == []


@contextmanager
def locked(host: Host) -> Iterator[None]:
    """Lock the host's file against writes, as another program would."""
    path = host.url.removeprefix("sqlite+aiosqlite:///")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@ON_A_FILE
async def test_a_call_that_is_cancelled_twice_waits_for_its_statement_all_the_same(
    host: Host, client: IncidentClient
) -> None:
    """While the file is locked, even a call cancelled twice waits for its statement to end."""
    await host.execute("SELECT 1")
    joined = client.join(host.connection)
    begun = asyncio.Event()

    def is_due(so_far: list[str]) -> bool:
        begun.set()
        return len(so_far) == 1

    with locked(host):
        call = asyncio.ensure_future(joined.create("Order 1 is late", source="partner"))
        running = asyncio.ensure_future(cancelled_during(host, call, is_due))
        async with asyncio.timeout(60):
            await begun.wait()
        for _ in range(10):
            await asyncio.sleep(0)
        call.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        assert not call.done()
    await running
    await host.order(1)
    await host.commit()
    assert await run_sql(host.url, "SELECT * FROM orders") == [(1,)]
    assert await client.list() == []


@ON_A_FILE
async def test_a_host_goes_on_if_a_cancelled_call_did_not_get_the_lock(
    host: Host, client: IncidentClient
) -> None:
    """A cancelled call that fails on a locked file leaves the transaction usable."""
    await host.execute("PRAGMA busy_timeout = 100")
    joined = client.join(host.connection)
    with locked(host):
        await cancelled_during(
            host, joined.create("Order 1 is late", source="partner"), is_number(1)
        )
    await host.order(1)
    await joined.create("Order 1 is late", source="partner")
    await host.commit()
    assert len(await client.list()) == 1


@ON_A_FILE
async def test_a_host_goes_on_after_a_cancelled_read_that_failed(
    host: Host, client: IncidentClient
) -> None:
    """A cancelled read that fails before the first write leaves the transaction usable."""
    await host.execute("SELECT 1")
    joined = client.join(host.connection)
    await run_sql(host.url, 'ALTER TABLE "Incident" RENAME TO away')
    await cancelled_during(host, joined.list(), is_number(1))
    await host.order(1)
    await host.commit()
    assert await run_sql(host.url, "SELECT * FROM orders") == [(1,)]


@ON_A_FILE
async def test_a_cancelled_search_is_interrupted_in_its_transaction(
    host: Host, client: IncidentClient
) -> None:
    """On SQLite, a search whose caller is gone stops, and the host's transaction goes on."""
    joined = await join(host, client)
    await host.order(1)
    await joined.create("Order 1 is late", source="partner")
    connection = host.connection
    engine: Any = (
        connection.get_bind()
        if isinstance(connection, AsyncSession)
        else connection.sync_connection.engine
    )
    endless = Endless(engine)
    for search in (joined.search(text="order"), joined.search(text="order", total=True)):
        call = asyncio.ensure_future(search)
        await endless.until_running(1)
        call.cancel()
        await asyncio.wait([call])
        assert call.cancelled()
        assert endless.running == 0
    endless.on = False
    assert (await joined.search(text="order", total=True)).total == 1
    await host.commit()
    assert len(await client.list()) == 1
    await host.begin()
    assert await host.orders() == [1]


@ON_A_FILE
async def test_a_cancelled_call_ends_as_cancelled_whatever_else_is(
    host: Host, client: IncidentClient
) -> None:
    """When a program ends and cancels every task, a call raises only CancelledError."""
    joined = await join(host, client)
    this = asyncio.current_task()

    def is_due(so_far: list[str]) -> bool:
        if "INSERT" not in so_far[-1]:
            return False
        for task in asyncio.all_tasks():
            if task is not this:
                task.cancel()
        return True

    await cancelled_during(host, joined.create("Order 1 is late", source="partner"), is_due)
    await host.rollback()


# Concurrent writers


async def test_writers_of_a_file_lose_nothing(file_url: str) -> None:
    """Joined transactions and a client that write to one SQLite file lose no occurrence."""
    rounds = 5

    async def in_transactions(client: IncidentClient, way: str) -> None:
        async with open_host(way, file_url) as host:
            for _ in range(rounds):
                joined = await join(host, client)
                # Read before writing.
                await joined.list()
                await joined.create("Order 1 is late", source="partner", dedup_key="order-1")
                await host.commit()

    async def alone(client: IncidentClient) -> None:
        for _ in range(rounds):
            await client.create("Order 1 is late", source="partner", dedup_key="order-1")

    async with IncidentClient.open(file_url) as client:
        await asyncio.gather(
            in_transactions(client, "sqlite-connection"),
            in_transactions(client, "sqlite-session"),
            alone(client),
        )
        (incident,) = await client.list()
        assert incident.occurrences == incident.version == 3 * rounds
        assert len(await client.history(1)) == 3 * rounds


async def test_a_change_on_a_file_is_of_what_is_there_now(file_url: str) -> None:
    """On SQLite, the second of two transactions that expect a version raises VersionConflict."""
    async with (
        IncidentClient.open(file_url) as client,
        open_host("sqlite-connection", file_url) as one,
        open_host("sqlite-session", file_url) as other,
    ):
        await client.create("Order 1 is late", source="partner")
        joined = client.join(one.connection)
        waiting = client.join(other.connection)
        assert await waiting.get(1) == await joined.get(1)
        await joined.update_status(1, "completed", expected_version=1)
        second = asyncio.ensure_future(waiting.update_status(1, "failed", expected_version=1))
        await asyncio.sleep(0)
        await one.commit()
        with pytest.raises(VersionConflict) as caught:
            await second
        assert caught.value.incident.version == 2
        await other.rollback()


async def test_a_file_that_stays_locked_is_unavailable(file_url: str, tmp_path: Path) -> None:
    """A call on a locked file waits for the engine's timeout, then raises StoreUnavailable."""
    options: dict[str, Any] = {"connect_args": {"timeout": 0.05}, "poolclass": NullPool}
    other = sqlite3.connect(tmp_path / "incidents.db", isolation_level=None)
    async with (
        IncidentClient.open(file_url) as client,
        host_engine(file_url, **options) as engine,
        engine.connect() as connection,
    ):
        joined = client.join(connection)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable):
            await joined.create("Order 1 is late", source="partner")
        assert await joined.list() == []
        other.execute("ROLLBACK")
        await joined.create("Order 1 is late", source="partner")
        await connection.commit()
        assert len(await client.list()) == 1
    other.close()


async def test_what_was_read_before_others_wrote_cannot_be_written(file_url: str) -> None:
    """If the host's engine emits BEGIN, a write on an old snapshot raises StoreUnavailable."""
    async with (
        IncidentClient.open(file_url) as client,
        host_engine(file_url, poolclass=NullPool) as engine,
    ):
        begin_by_itself(engine)
        async with engine.connect() as connection:
            joined = client.join(connection)
            assert await joined.list() == []
            await client.create("Order 1 is late", source="partner")
            assert await joined.list() == []
            with pytest.raises(StoreUnavailable):
                await joined.create("Order 2 is late", source="partner")
            await connection.rollback()
            await client.join(connection).create("Order 2 is late", source="partner")
            await connection.commit()
        assert len(await client.list()) == 2


@pytest.mark.parametrize("way", POSTGRES_WAYS)
@pytest.mark.parametrize("commits", [True, False])
async def test_a_key_that_is_open_in_a_transaction_is_waited_for(
    way: str, postgres_url: str, *, commits: bool
) -> None:
    """A create waits for a transaction with its key, then counts on its incident or a new one."""
    async with (
        IncidentClient.open(postgres_url) as client,
        open_host(way, postgres_url) as host,
    ):
        joined = await join(host, client)
        await joined.create(
            "Order 1 is late", source="partner", dedup_key="order-1", idempotency_key="key"
        )
        counted = asyncio.ensure_future(
            client.create("Order 1 is late", source="partner", dedup_key="order-1")
        )
        repeated = asyncio.ensure_future(
            client.create(
                "Order 1 is late", source="partner", dedup_key="order-1", idempotency_key="key"
            )
        )
        # The other call waits for its turn, without a connection.
        await _until_waiting(postgres_url, 1)
        await (host.commit() if commits else host.rollback())
        incidents = await asyncio.gather(counted, repeated)
        (incident,) = await client.list()
        assert {each.incident_id for each in incidents} == {incident.incident_id}
        assert incident.occurrences == 2
        assert len(await client.history(incident.incident_id)) == 2


@pytest.mark.parametrize("way", POSTGRES_WAYS)
async def test_reopening_beside_one_that_is_being_opened_is_a_conflict(
    way: str, postgres_url: str
) -> None:
    """If several calls reopen one key, the first succeeds; the others conflict but can commit."""
    async with (
        IncidentClient.open(postgres_url) as client,
        open_host("asyncpg-connection", postgres_url) as first,
        open_host(way, postgres_url) as second,
    ):
        for _ in range(4):
            one = await client.create("Order 1 is late", source="partner", dedup_key="order-1")
            await client.update_status(one.incident_id, "failed")
        joined = await join(first, client)
        await joined.update_status(1, "new")
        waiting = await join(second, client)
        await second.order(1)
        calls = [
            asyncio.ensure_future(call)
            for call in (
                waiting.update_status(2, "new"),
                client.update_status(3, "new"),
                client.update_status(4, "new", idempotency_key="key"),
            )
        ]
        await _until_waiting(postgres_url, len(calls))
        await first.commit()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [DuplicateOpenIncident] * len(calls)
        await second.commit()
        assert await run_sql(postgres_url, "SELECT order_id FROM orders") == [(1,)]
        assert [each.incident_id for each in await client.list(status="new")] == [1]
        assert await run_sql(postgres_url, "SELECT * FROM incident_idempotency_key") == []


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("way", POSTGRES_WAYS)
async def test_a_transaction_that_must_be_repeated_is_unavailable(
    way: str, level: str, postgres_url: str
) -> None:
    """Under stricter isolation, a concurrent change raises StoreUnavailable, and a retry works."""
    async with (
        IncidentClient.open(postgres_url) as client,
        open_host(way, postgres_url) as host,
    ):
        await client.create("Order 1 is late", source="partner", dedup_key="order-1")
        two = await client.create("Order 2 is late", source="partner", dedup_key="order-2")
        await client.update_status(two.incident_id, "failed")
        calls: list[Callable[[JoinedIncidents], Awaitable[object]]] = [
            lambda joined: joined.create(
                "Order 3 is late", source="partner", idempotency_key="key"
            ),
            lambda joined: joined.create("Order 1 is late", source="partner", dedup_key="order-1"),
            lambda joined: joined.update_status(1, "failed"),
            lambda joined: joined.note(1, "Lost"),
            lambda joined: joined.update_status(2, "new"),
        ]
        meanwhile: list[Callable[[], Awaitable[object]]] = [
            lambda: client.create("Order 3 is late", source="partner", idempotency_key="key"),
            *[lambda: client.note(1, "Called")] * 3,
            lambda: client.create("Order 2 is late", source="partner", dedup_key="order-2"),
        ]
        for call, other in zip(calls, meanwhile, strict=True):
            await _begin_in(host, level)
            joined = client.join(host.connection)
            await joined.list()
            await other()
            with pytest.raises(StoreUnavailable):
                await call(joined)
            await host.rollback()
        joined = await join(host, client)
        await joined.update_status(1, "failed")
        await host.commit()
        assert (await client.get(1)).incident_type is IncidentStatus.FAILED


async def _begin_in(host: Host, level: str) -> None:
    """Begin a transaction at this isolation level, without reading anything yet."""
    if isinstance(host, AsyncpgHost):
        await host.begin()
    await host.execute(f"SET TRANSACTION ISOLATION LEVEL {level}")


async def _until_waiting(url: str, count: int) -> None:
    """Wait until this many connections to a PostgreSQL database wait for a lock."""
    statement = (
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    async with asyncio.timeout(60):
        while (await run_sql(url, statement)) != [(count,)]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

"""The connections that a store opens on PostgreSQL: how they are lent, and what they prepare."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from sqlalchemy import text

from incidentkit import (
    ClientClosed,
    IncidentClient,
    InvalidSettings,
    NewIncident,
    StoreUnavailable,
)
from incidentkit.affinity import Affinity
from incidentkit.store import StoreOptions
from incidentkit.store.postgresql.connection import PREPARED, PostgresConnection, Preparing
from incidentkit.store.postgresql.connections import OwnConnections
from incidentkit.store.postgresql.pool import PoolExecutor
from incidentkit.store.sql.statements import SELECT_INCIDENT
from incidentkit.store.store import Store
from tests.hosts import run_sql

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

TWO = StoreOptions(pool_size=1, max_overflow=1, pool_timeout=0.2)
PATIENT = StoreOptions(pool_size=1, max_overflow=1, pool_timeout=60)
TURNED_DOWN = "all 2 connections were in use for 0.2 seconds"


def opened(url: str, options: StoreOptions) -> OwnConnections:
    """Return connections to the server of a URL, which are counted by their application's name."""

    async def connect() -> PostgresConnection:
        return PostgresConnection(await asyncpg.connect(url, statement_cache_size=0))

    return OwnConnections(connect, options)


@pytest.fixture
async def connections(migrated_postgres_url: str) -> AsyncIterator[OwnConnections]:
    """At most two connections, for which a call waits a minute."""
    connections = opened(migrated_postgres_url, PATIENT)
    yield connections
    await connections.close()


async def test_the_connection_that_was_used_last_is_lent_first(connections: OwnConnections) -> None:
    """Idle connections are reused, the most recently used first."""
    first, second = await connections.take(), await connections.take()
    await connections.put(first)
    await connections.put(second)
    assert await connections.take() is second
    assert await connections.take() is first
    await connections.put(first)
    await connections.put(second)


async def test_a_call_without_a_connection_is_told_so(migrated_postgres_url: str) -> None:
    """With every connection in use for too long, the error says so."""
    connections = opened(migrated_postgres_url, TWO)
    lent = [await connections.take(), await connections.take()]
    with pytest.raises(StoreUnavailable, match=TURNED_DOWN):
        await connections.take()
    for connection in lent:
        await connections.put(connection)
    assert await connections.take() in lent
    await connections.close()


async def test_calls_get_connections_in_their_order(connections: OwnConnections) -> None:
    """Of the calls that wait, the first gets the connection that is given back first."""
    lent = [await connections.take(), await connections.take()]
    waiting = [asyncio.ensure_future(connections.take()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await connections.put(lent[0])
    assert await waiting[1] is lent[0]
    assert not waiting[2].done()
    await connections.put(lent[1])
    assert await waiting[2] is lent[1]
    for connection in lent:
        await connections.put(connection)


async def test_a_connection_that_ends_makes_room(connections: OwnConnections) -> None:
    """A call that waits opens a connection in the place of one that was lost."""
    lent = [await connections.take(), await connections.take()]
    waiting = asyncio.ensure_future(connections.take())
    await asyncio.sleep(0)
    connections.recover(lent[0], asyncpg.ConnectionDoesNotExistError())
    new = await waiting
    assert new not in lent
    assert await new.driver.fetchval("SELECT 1") == 1
    await connections.put(lent[1])
    await connections.put(new)


async def test_a_call_that_is_cancelled_while_it_is_answered_loses_nothing(
    connections: OwnConnections,
) -> None:
    """A connection that is given to a cancelled call goes to the next one."""
    lent = [await connections.take(), await connections.take()]
    waiting = [asyncio.ensure_future(connections.take()) for _ in range(2)]
    await asyncio.sleep(0)
    await connections.put(lent[0])
    waiting[0].cancel()
    assert await waiting[1] is lent[0]
    last = asyncio.ensure_future(connections.take())
    await asyncio.sleep(0)
    connections.recover(lent[0], asyncpg.ConnectionDoesNotExistError())
    last.cancel()
    await asyncio.sleep(0)
    third = await connections.take()
    await connections.put(lent[1])
    await connections.put(third)


async def test_a_cancelled_recovery_loses_no_connection(connections: OwnConnections) -> None:
    """A connection comes back although the task that recovers it is cancelled."""
    for turns in range(3):
        connection = await connections.take()
        recovery = connections.recover(connection, asyncio.CancelledError())
        assert recovery is not None
        for _ in range(turns):
            await asyncio.sleep(0)
        recovery.cancel()
        await asyncio.wait([recovery])
    async with asyncio.timeout(60):
        lent = [await connections.take(), await connections.take()]
    for connection in lent:
        await connections.put(connection)


async def test_a_failed_connect_leaves_its_place(migrated_postgres_url: str) -> None:
    """After connects that failed, as many connections as before can be opened."""
    failing = True

    async def connect() -> PostgresConnection:
        if failing:
            raise ConnectionRefusedError
        return PostgresConnection(await asyncpg.connect(migrated_postgres_url))

    connections = OwnConnections(connect, PATIENT)
    outcomes = await asyncio.gather(*(connections.take() for _ in range(5)), return_exceptions=True)
    assert all(isinstance(outcome, ConnectionRefusedError) for outcome in outcomes)
    failing = False
    lent = [await connections.take(), await connections.take()]
    for connection in lent:
        await connections.put(connection)
    await connections.close()


async def test_idle_connections_are_closed_after_a_while(
    migrated_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without use, connections beyond `pool_size` are closed first, and the others later."""
    monkeypatch.setattr("incidentkit.store.postgresql.connections.SURPLUS", 0.01)
    connections = opened(migrated_postgres_url, PATIENT)
    lent = [await connections.take(), await connections.take()]
    for connection in lent:
        await connections.put(connection)
    async with asyncio.timeout(60):
        while not lent[0].is_closed():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert not lent[1].is_closed()
    monkeypatch.setattr("incidentkit.store.postgresql.connections.LIFETIME", 0.01)
    async with asyncio.timeout(60):
        while not lent[1].is_closed():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await connections.close()


async def test_closing_waits_for_running_calls(connections: OwnConnections) -> None:
    """Closing waits until a call has given its connection back, then closes it."""
    connection = await connections.take()
    closing = asyncio.ensure_future(connections.close())
    await asyncio.sleep(0.01)
    assert not closing.done()
    assert await connection.driver.fetchval("SELECT 1") == 1
    await connections.put(connection)
    await closing
    assert connection.is_closed()


async def test_closing_does_not_wait_for_ever(migrated_postgres_url: str) -> None:
    """A call that takes longer than `pool_timeout` loses its connection at the close."""
    connections = opened(migrated_postgres_url, TWO)
    connection = await connections.take()
    await connections.close()
    assert connection.is_closed()


async def test_a_closed_store_opens_no_connection(migrated_postgres_url: str) -> None:
    """A read that loses its connection at the close is not sent again; no waiting call connects."""
    connections = opened(migrated_postgres_url, TWO)
    executor = PoolExecutor(lambda: connections, 60, None)
    await executor.open(Affinity())
    # From the second call on, a connection may be dead, and reads are sent again.
    await asyncio.gather(*(executor.read(text("SELECT pg_sleep(0.1)"), {}) for _ in range(2)))
    sleep = text("SELECT pg_sleep(30)")
    calls: list[asyncio.Future[Any]]
    calls = [asyncio.ensure_future(executor.read(sleep, {})) for _ in range(2)]
    closing = asyncio.ensure_future(executor.close())
    await asyncio.sleep(0.1)
    calls.append(asyncio.ensure_future(connections.take()))
    await closing
    for call in calls:
        with pytest.raises(ClientClosed):
            await call
    assert not connections._open


async def test_a_connection_that_opens_after_the_close_is_closed(
    migrated_postgres_url: str,
) -> None:
    """A call that was connecting at the close gets no connection, and leaves none open."""
    made: list[PostgresConnection] = []
    closed = asyncio.Event()

    async def connect() -> PostgresConnection:
        made.append(
            PostgresConnection(await asyncpg.connect(migrated_postgres_url, statement_cache_size=0))
        )
        await closed.wait()
        return made[0]

    connections = OwnConnections(connect, TWO)
    taking = asyncio.ensure_future(connections.take())
    await asyncio.sleep(0)
    await connections.close()
    closed.set()
    with pytest.raises(ClientClosed):
        await taking
    assert [connection.is_closed() for connection in made] == [True]


def own(client: IncidentClient) -> OwnConnections:
    """Return the connections of a client."""
    assert isinstance(client.store, Store)
    executor = client.store._connections
    assert isinstance(executor, PoolExecutor)
    connections = executor._opened().connections
    assert isinstance(connections, OwnConnections)
    return connections


async def names(client: IncidentClient) -> list[str]:
    """Return the names of the statements that are prepared on the idle connections of a client."""
    found = []
    for connection in own(client)._idle:
        rows = await connection.driver.fetch("SELECT name FROM pg_prepared_statements")
        found += [row[0] for row in rows]
    return found


async def test_names_of_statements_are_random(migrated_postgres_url: str) -> None:
    """Each prepared statement has a name that another process would have to guess."""
    seen: set[str] = set()
    for _ in range(2):
        async with IncidentClient.open(migrated_postgres_url) as client:
            await client.list()
            await client.search(source="partner")
            found = await names(client)
            assert len(found) >= 3
            assert all(len(name) == len("incidentkit_") + 16 for name in found)
            assert seen.isdisjoint(found)
            seen.update(found)


@pytest.mark.parametrize("allowed", [True, False])
async def test_the_option_decides_whether_statements_are_prepared(
    migrated_postgres_url: str, *, allowed: bool
) -> None:
    """`prepared_statements` makes statements stay prepared, or leaves none on the server."""
    options = StoreOptions(prepared_statements=allowed)
    async with IncidentClient.open(migrated_postgres_url, options=options) as client:
        kept = await client.create("Disk is full", source="partner")
        assert await client.get(kept.incident_id) == kept
        assert bool(await names(client)) is allowed


def test_the_option_is_a_flag() -> None:
    """Another value than True, False and None is refused by name."""
    with pytest.raises(InvalidSettings, match="prepared_statements must be True, False or None"):
        StoreOptions(prepared_statements="off")  # type: ignore[arg-type]


async def test_the_number_of_prepared_statements_is_bounded(migrated_postgres_url: str) -> None:
    """Beyond a hundred statements, the one that was used longest ago is closed on the server."""
    driver = await asyncpg.connect(migrated_postgres_url, statement_cache_size=0)
    connection = PostgresConnection(driver, preparing=Preparing(allowed=True))
    from sqlalchemy import text

    texts = [text(f"SELECT {n}") for n in range(PREPARED + 10)]
    for statement in texts:
        await connection.fetch(statement, {})
    await connection.fetch(SELECT_INCIDENT, {"incident_id": 1})
    rows = await driver.fetch("SELECT statement FROM pg_prepared_statements")
    kept = {row[0] for row in rows}
    assert len(kept) <= PREPARED + 1
    assert "SELECT 0" not in kept
    assert f"SELECT {PREPARED + 9}" in kept
    await driver.close()


CALLS: list[Any] = [
    lambda client: client.get(1),
    lambda client: client.create("Another disk is full", source="partner"),
    lambda client: client.create_many([NewIncident("Disk is full", source="partner")] * 2),
    lambda client: client.create("Disk is full", source="partner", idempotency_key="key"),
    lambda client: client.update_status(1, "failed"),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "change",
    ["DEALLOCATE ALL", 'ALTER TABLE "Incident" ALTER COLUMN source TYPE varchar(90)'],
)
async def test_a_statement_that_the_server_has_lost_is_sent_again(
    change: str, call: Any, migrated_postgres_url: str
) -> None:
    """A call succeeds once if its prepared statement is gone, or has changed with the schema."""
    async with IncidentClient.open(migrated_postgres_url) as client:
        await client.create("Disk is full", source="partner")
        for each in CALLS:
            await each(client)
        before = await client.search()
        (connection,) = own(client)._idle
        if change.startswith("ALTER"):
            await run_sql(migrated_postgres_url, change)
        else:
            await connection.driver.execute(change)
        await call(client)
        after = await client.search()
        assert len(after.incidents) - len(before.incidents) in (0, 1, 2)
        # Another statement under the name of ours is never run: none has it.
        assert bool(await names(client)) is change.startswith("ALTER")

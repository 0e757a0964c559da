"""Concurrent calls on PostgreSQL share statements without affecting each other's results."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from itertools import product
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import create_async_engine

from incidentkit import (
    IllegalTransition,
    IncidentClient,
    IncidentNotFound,
    IncidentSource,
    IncidentStatus,
    ListQuery,
    StoreError,
    VersionConflict,
    acting_as,
)
from incidentkit.domain.values import DEEP
from incidentkit.store import StoreOptions
from incidentkit.store.postgresql import statements as writes
from incidentkit.store.postgresql.connection import PostgresConnection
from incidentkit.store.postgresql.driver import compile_statement
from incidentkit.store.sql.statements import SELECT_PAGE
from tests.hosts import run_sql

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from incidentkit import Incident

MANY = 40


@pytest.fixture(params=["pool", "asyncpg", "engine"])
async def incidents(
    request: pytest.FixtureRequest, migrated_postgres_url: str
) -> AsyncIterator[IncidentClient]:
    """A client with its own pool, on a host's pool, and on a host's engine."""
    url = migrated_postgres_url
    if request.param == "pool":
        async with IncidentClient.open(url) as client:
            yield client
    elif request.param == "asyncpg":
        async with (
            asyncpg.create_pool(url, min_size=1) as pool,
            IncidentClient.open(pool) as client,
        ):
            yield client
    else:
        engine = create_async_engine(url.replace("postgresql", "postgresql+asyncpg"))
        async with IncidentClient.open(engine) as client:
            yield client
        await engine.dispose()


@pytest.fixture
async def client(migrated_postgres_url: str) -> AsyncIterator[IncidentClient]:
    """A client with its own pool."""
    async with IncidentClient.open(migrated_postgres_url) as client:
        yield client


@asynccontextmanager
async def counted(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[IncidentClient, list[str]]]:
    """Yield a client and the list of statements it sends from now on."""
    sent: list[str] = []
    async with IncidentClient.open(url, options=StoreOptions()) as client:
        fetch = PostgresConnection.fetch

        async def record(self: Any, statement: Any, values: Any) -> Any:
            sent.append(compile_statement(statement).text)
            return await fetch(self, statement, values)

        monkeypatch.setattr(PostgresConnection, "fetch", record)
        yield client, sent


async def create(client: IncidentClient, number: int) -> list[Incident]:
    """Create incidents concurrently, each as a different actor."""

    async def one(n: int) -> Incident:
        with acting_as(f"actor {n}"):
            source = list(IncidentSource)[n % 3]
            return await client.create(f"Disk {n} is full", source=source)

    return await asyncio.gather(*map(one, range(number)))


async def test_waiting_calls_share_statements(
    migrated_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many concurrent creates, reads, changes or lists are sent as a few statements."""
    async with counted(migrated_postgres_url, monkeypatch) as (client, sent):
        created = await create(client, MANY)
        assert len(sent) <= 3
        sent.clear()
        await asyncio.gather(*(client.get(incident.incident_id) for incident in created))
        assert len(sent) <= 2
        sent.clear()
        await asyncio.gather(
            *(client.update_status(incident.incident_id, "failed") for incident in created)
        )
        assert len(sent) <= 3
        sent.clear()
        await asyncio.gather(*(client.list(page=page, limit=1) for page in range(1, MANY)))
        assert len(sent) <= 2
        sent.clear()
        await asyncio.gather(*(client.list(page=page, limit=1) for page in range(1, MANY)))
        assert len(sent) == 1


async def test_each_caller_gets_its_own_incident(incidents: IncidentClient) -> None:
    """Each concurrent create returns its own incident, with its own id and actor."""
    created = await create(incidents, MANY)
    assert len({incident.incident_id for incident in created}) == MANY
    for n, incident in enumerate(created):
        assert incident.incident_message == f"Disk {n} is full"
        assert incident.source is list(IncidentSource)[n % 3]
        assert await incidents.get(incident.incident_id) == incident
        (event,) = await incidents.history(incident.incident_id)
        assert event.actor == f"actor {n}"
        assert event.at == incident.created_at
    read = await asyncio.gather(*(incidents.get(one.incident_id) for one in created * 2))
    assert read == created * 2


async def test_a_change_that_is_refused_leaves_its_neighbours(incidents: IncidentClient) -> None:
    """Each of several changes in one batch succeeds or fails on its own."""
    created = await create(incidents, 6)
    ids = [incident.incident_id for incident in created]
    await incidents.update_status(ids[3], "completed")
    outcomes = await asyncio.gather(
        incidents.update_status(ids[0], "failed", note="It is broken", expected_version=1),
        incidents.update_status(ids[1], "failed", expected_version=2),
        incidents.update_status(10**6, "failed"),
        incidents.update_status(ids[3], "completed", note="It still is"),
        incidents.update_status(ids[4], "completed"),
        incidents.update_status(ids[4], "failed"),
        return_exceptions=True,
    )
    changed, conflict, missing, unchanged, one, other = outcomes
    assert not isinstance(changed, BaseException)
    assert (changed.incident_type, changed.version) == (IncidentStatus.FAILED, 2)
    assert isinstance(conflict, VersionConflict)
    assert isinstance(missing, IncidentNotFound)
    assert not isinstance(unchanged, BaseException)
    assert unchanged.version == 2
    assert not isinstance(one, BaseException)
    assert not isinstance(other, BaseException)
    assert {one.version, other.version} == {2, 3}
    assert [event.note for event in await incidents.history(ids[0])] == [None, "It is broken"]
    assert [event.note for event in await incidents.history(ids[3])][-1] == "It still is"
    assert len(await incidents.history(ids[4])) == 3


async def test_transitions_hold_for_changes_that_travel_together(
    migrated_postgres_url: str,
) -> None:
    """A batch refuses only the changes that the client's transitions do not allow."""
    graph = {"new": ["completed", "failed"], "completed": ["failed"]}
    async with IncidentClient.open(migrated_postgres_url, transitions=graph) as client:
        created = await create(client, 3)
        ids = [incident.incident_id for incident in created]
        await client.update_status(ids[1], "failed")
        outcomes = await asyncio.gather(
            *(client.update_status(incident_id, "completed") for incident_id in ids),
            return_exceptions=True,
        )
        assert [isinstance(outcome, IllegalTransition) for outcome in outcomes] == [
            False,
            True,
            False,
        ]


async def test_an_incident_that_is_refused_leaves_its_neighbours(
    incidents: IncidentClient, migrated_postgres_url: str
) -> None:
    """If the database refuses one incident, the rest of its batch is stored."""
    await run_sql(
        migrated_postgres_url,
        "ALTER TABLE \"Incident\" ADD CHECK (incident_message <> 'Disk 7 is full')",
    )
    outcomes = await asyncio.gather(
        *(incidents.create(f"Disk {n} is full", source="partner") for n in range(20)),
        return_exceptions=True,
    )
    refused = [n for n, outcome in enumerate(outcomes) if isinstance(outcome, StoreError)]
    assert refused == [7]
    stored = await incidents.list(limit=100)
    assert len(stored) == 19
    for incident in stored:
        assert len(await incidents.history(incident.incident_id)) == 1


async def test_an_incident_that_is_locked_keeps_nobody_else_waiting(
    incidents: IncidentClient, migrated_postgres_url: str
) -> None:
    """While a transaction locks an incident, only changes of that incident wait."""
    locked, *others = [incident.incident_id for incident in await create(incidents, 10)]
    connection = await asyncpg.connect(migrated_postgres_url)
    transaction = connection.transaction()
    await transaction.start()
    await incidents.join(connection).update_status(locked, "failed")
    waiting = asyncio.ensure_future(incidents.update_status(locked, "completed"))
    done = await asyncio.gather(
        *(incidents.update_status(incident_id, "failed") for incident_id in others)
    )
    assert len(done) == len(others)
    assert not waiting.done()
    await transaction.commit()
    assert (await waiting).version == 3
    await connection.close()


async def test_a_cancelled_call_leaves_the_others_and_is_carried_through(
    incidents: IncidentClient,
) -> None:
    """A cancelled call does not affect its batch, and its own change is still made."""
    created = await create(incidents, 10)
    reads = [asyncio.ensure_future(incidents.get(one.incident_id)) for one in created]
    changes = [
        asyncio.ensure_future(incidents.update_status(one.incident_id, "failed")) for one in created
    ]
    await asyncio.sleep(0)
    for call in (reads[0], reads[9], changes[0], changes[9]):
        call.cancel()
    await asyncio.wait(reads + changes)
    assert sum(call.cancelled() for call in reads + changes) == 4
    assert all(call.result() for call in [*reads[1:9], *changes[1:9]])
    if incidents._opened()._writes:
        await asyncio.wait(incidents._opened()._writes)
    assert [one.version for one in await incidents.list(limit=10)] == [2] * 10


def queries() -> Iterator[ListQuery]:
    """Yield queries for every filter, some of them for empty pages."""
    statuses, sources = [None, *IncidentStatus], [None, *IncidentSource]
    for status, source, page in product(statuses, sources, (1, 2, 9)):
        yield ListQuery(page, 3, status, source)


async def test_pages_that_are_read_together_are_what_they_are_alone(
    incidents: IncidentClient,
) -> None:
    """Pages read together equal the pages read alone, for every filter."""
    created = await create(incidents, 25)
    await asyncio.gather(
        *(incidents.update_status(one.incident_id, "failed") for one in created[::2])
    )
    store = incidents.store
    together = await asyncio.gather(*map(store.list, queries()))
    alone = [await store.list(query) for query in queries()]
    assert together == alone
    assert {page.token for page in together} == {await store.token()}
    everything = (await store.list(ListQuery(limit=100))).incidents
    for query, page in zip(queries(), together, strict=True):
        found = [
            one
            for one in everything
            if query.status in (None, one.incident_type) and query.source in (None, one.source)
        ]
        assert page.incidents == found[query.offset : query.offset + query.limit]


async def fill(url: str) -> None:
    """Fill the table with incidents of every kind, and update the planner's statistics."""
    connection = await asyncpg.connect(url)
    await connection.execute(
        'INSERT INTO "Incident" (incident_message, incident_type, source) '
        "SELECT 'Disk is full', (ARRAY['new', 'failed'])[i % 2 + 1]::incidentstatus, "
        "(ARRAY['partner', 'operator'])[i / 2 % 2 + 1]::incidentsource "
        "FROM generate_series(1, 20000) AS i"
    )
    visible = "SELECT relallvisible = relpages FROM pg_class WHERE relname = 'Incident'"
    async with asyncio.timeout(60):
        while True:
            await connection.execute('VACUUM ANALYZE "Incident"')
            if await connection.fetchval(visible):
                break
            # A transaction of another test kept VACUUM from marking all pages as visible.
            await asyncio.sleep(0.01)
    await connection.close()


async def plan(url: str, statement: Any, values: dict[str, Any]) -> str:
    """Return the generic plan, which serves any values."""
    compiled = compile_statement(statement)
    connection = await asyncpg.connect(url)
    await connection.execute("SET plan_cache_mode = force_generic_plan")
    rows = await connection.fetch(
        f"EXPLAIN {compiled.text}", *[values[name] for name in compiled.parameters]
    )
    await connection.close()
    return "\n".join(row[0] for row in rows)


async def test_pages_that_are_read_together_come_from_an_index(
    migrated_postgres_url: str,
) -> None:
    """Each of several pages is read in order from the index for its filter."""
    await fill(migrated_postgres_url)
    values = {"statuses": ["new"], "sources": ["partner"], "limits": ["10"], "offsets": ["5"]}
    found = await plan(migrated_postgres_url, writes.SELECT_PAGES, values)
    for index in ("created_at", "incident_type", "source", "incident_type_source"):
        assert f'Index Scan Backward using "ix_Incident_{index}" on "Incident"' in found
    assert 'Seq Scan on "Incident"' not in found


@pytest.mark.parametrize("filters", list(product((False, True), repeat=2)))
async def test_a_deep_page_passes_over_the_index_alone(
    migrated_postgres_url: str, filters: tuple[bool, bool]
) -> None:
    """A deep page skips the rows before it in the index, without reading the table."""
    await fill(migrated_postgres_url)
    values = {"status": "new", "source": "partner", "limit": 10, "offset": 4000}
    found = await plan(migrated_postgres_url, SELECT_PAGE[*filters, "deep"], values)
    assert "Index Only Scan Backward" in found
    # Looks up each incident of the page instead of merging all incidents with the page.
    assert "Index Cond: (incident_id = page.incident_id)" in found
    assert 'Seq Scan on "Incident"' not in found
    async with IncidentClient.open(migrated_postgres_url) as client:
        everything = await client.list(limit=1000)
        deep = [await client.list(page=DEEP // 10 + n, limit=10) for n in (1, 2, 3)]
        rest = await client.list(page=2, limit=1000)
        assert [one for page in deep for one in page] == rest[:30]
        assert everything[-1].incident_id > rest[0].incident_id


async def test_a_row_that_a_trigger_drops_fails_only_its_caller(
    incidents: IncidentClient, migrated_postgres_url: str
) -> None:
    """If a host's trigger drops one incident, only its caller gets an error."""
    await run_sql(
        migrated_postgres_url,
        "CREATE FUNCTION keep_out() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN IF NEW.incident_message LIKE 'Disk 3 %' THEN RETURN NULL; END IF; "
        "RETURN NEW; END $$",
    )
    await run_sql(
        migrated_postgres_url,
        'CREATE TRIGGER keep_out BEFORE INSERT ON "Incident" '
        "FOR EACH ROW EXECUTE FUNCTION keep_out()",
    )

    async def one(n: int) -> Incident:
        with acting_as(f"actor {n}"):
            return await incidents.create(f"Disk {n} is full", source="partner")

    outcomes = await asyncio.gather(*map(one, range(6)), return_exceptions=True)
    for n, outcome in enumerate(outcomes):
        if n == 3:
            assert isinstance(outcome, StoreError)
            continue
        assert not isinstance(outcome, BaseException)
        assert outcome.incident_message == f"Disk {n} is full"
        assert [event.actor for event in await incidents.history(outcome.incident_id)] == [
            f"actor {n}"
        ]
    assert len(await incidents.list()) == 5


async def test_a_failing_listener_of_the_host_does_not_make_a_write_happen_twice(
    migrated_postgres_url: str,
) -> None:
    """After a host's listener fails a batch, each create fails and no incident is stored twice."""
    engine = create_async_engine(migrated_postgres_url.replace("postgresql", "postgresql+asyncpg"))

    @event.listens_for(engine.sync_engine, "after_cursor_execute")
    def audit(connection: Any, _: Any, statement: str, *__: Any) -> None:
        if 'INSERT INTO "Incident"' in statement:
            connection.exec_driver_sql("SELECT 1 / 0")

    async with IncidentClient.open(engine) as client:
        outcomes = await asyncio.gather(
            *(client.create(f"Disk {n} is full", source="partner") for n in range(3)),
            return_exceptions=True,
        )
        assert [type(outcome) for outcome in outcomes] == [StoreError] * 3
        stored = [incident.incident_message for incident in await client.list()]
        assert len(stored) == len(set(stored))
    await engine.dispose()


async def test_a_connection_lost_when_given_back_does_not_hide_what_was_done(
    migrated_postgres_url: str,
) -> None:
    """A write succeeds even if the host's pool then fails to reset the connection."""
    admin = await asyncpg.connect(migrated_postgres_url)

    async def reset(connection: Any) -> None:
        await admin.execute("SELECT pg_terminate_backend($1, 5000)", connection.get_server_pid())
        await connection.execute("SELECT 1")

    async with asyncpg.create_pool(migrated_postgres_url, min_size=1, reset=reset) as pool:
        client = IncidentClient.open(pool)
        await client.connect()
        incident = await client.create("Disk is full", source="partner")
        assert await client.get(incident.incident_id) == incident
        await client.close()
    await admin.close()

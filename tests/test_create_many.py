"""Create many incidents in several statements, in a host's transaction, and concurrently."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from incidentkit import ClientClosed, IncidentClient, NewIncident, PartlyStored, StoreError
from incidentkit.store.postgresql import dialect as postgresql
from tests.hosts import run_sql

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from incidentkit import Incident


def disks(number: int) -> list[NewIncident]:
    """Return incidents that differ in their messages."""
    return [NewIncident(f"Disk {n} is full", "monitoring") for n in range(number)]


@pytest.fixture
async def in_small_parts(
    migrated_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[IncidentClient]:
    """A client on PostgreSQL that creates at most two incidents per statement."""
    monkeypatch.setattr(postgresql, "ROWS", 2)
    async with IncidentClient.open(migrated_postgres_url) as client:
        yield client


async def test_several_statements_keep_the_order(in_small_parts: IncidentClient) -> None:
    """Incidents from several statements are stored and returned in order, each with its event."""
    created = await in_small_parts.create_many(disks(21))
    assert [incident.incident_message for incident in created] == [
        f"Disk {n} is full" for n in range(21)
    ]
    assert await in_small_parts.list(limit=100) == created[::-1]
    for incident in created:
        assert len(await in_small_parts.history(incident.incident_id)) == 1


async def test_keys_count_across_statements(in_small_parts: IncidentClient) -> None:
    """A key repeated in a later statement counts an occurrence, with its message as the note."""
    await in_small_parts.create("Disk is full", source="monitoring", dedup_key="b")
    keys = ["a", "b", None, "c", "a", "d", "a", "ä"]
    created = await in_small_parts.create_many(
        [NewIncident(f"Said {n} times", "partner", dedup_key=key) for n, key in enumerate(keys)]
    )
    assert [incident.dedup_key for incident in created] == keys
    assert [incident.occurrences for incident in created] == [1, 2, 1, 1, 2, 1, 3, 1]
    assert created[1].incident_message == "Disk is full"
    history = await in_small_parts.history(created[0].incident_id)
    assert [event.note for event in history] == [None, "Said 4 times", "Said 6 times"]


async def test_a_later_statement_takes_back_those_before_it(
    in_small_parts: IncidentClient, migrated_postgres_url: str
) -> None:
    """If the database rejects an incident in the last statement, nothing at all is stored."""
    await run_sql(
        migrated_postgres_url,
        "ALTER TABLE \"Incident\" ADD CHECK (incident_message NOT LIKE '%19%')",
    )
    with pytest.raises(StoreError):
        await in_small_parts.create_many(disks(20))
    assert await in_small_parts.list() == []
    assert await run_sql(migrated_postgres_url, "SELECT * FROM incident_event") == []


async def test_a_cancelled_caller_begins_no_further_batch(
    incidents: IncidentClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The running batch is stored although its caller is cancelled, and no later one is."""
    create_many = incidents.store.create_many
    running = asyncio.Event()
    going_on = asyncio.Event()

    async def slow(part: Sequence[NewIncident], **options: Any) -> list[Incident]:
        if part[0].incident_message == "Disk 2 is full":
            running.set()
            await going_on.wait()
        return await create_many(part, **options)

    monkeypatch.setattr(incidents.store, "create_many", slow)
    creating = asyncio.ensure_future(incidents.create_many(disks(6), batch=2))
    await running.wait()
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating
    going_on.set()
    await incidents.close()
    await incidents.connect()
    assert len(await incidents.list()) == 4


async def test_a_client_that_is_closed_begins_no_further_batch(
    incidents: IncidentClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the client is closed between two batches, the error holds the committed incidents."""
    create_many = incidents.store.create_many

    async def unless_closed(part: Sequence[NewIncident], **options: Any) -> list[Incident]:
        if part[0].incident_message == "Disk 4 is full":
            await incidents.store.close()
        return await create_many(part, **options)

    monkeypatch.setattr(incidents.store, "create_many", unless_closed)
    with pytest.raises(PartlyStored) as caught:
        await incidents.create_many(disks(6), batch=2)
    assert isinstance(caught.value.__cause__, ClientClosed)
    assert len(caught.value.incidents) == 4


async def test_in_a_transaction_of_the_host(url: str, incidents: IncidentClient) -> None:
    """In a joined transaction, incidents are committed or rolled back with it."""
    if url.startswith("postgresql"):
        connection = await asyncpg.connect(url)
        async with connection.transaction():
            created = await incidents.join(connection).create_many(disks(3))
            assert await incidents.list() == []
        transaction = connection.transaction()
        await transaction.start()
        await incidents.join(connection).create_many(disks(3))
        await transaction.rollback()
        await connection.close()
    else:
        engine = create_async_engine(url)
        async with engine.begin() as host:
            created = await incidents.join(host).create_many(disks(3))
        async with engine.connect() as host:
            await incidents.join(host).create_many(disks(3))
            await host.rollback()
        await engine.dispose()
    assert await incidents.list() == created[::-1]


async def test_two_that_count_the_same_keys_do_not_block_each_other(
    migrated_postgres_url: str,
) -> None:
    """Concurrent calls with the same keys in opposite orders all succeed without a deadlock."""
    keys = [f"key-{n}" for n in range(200)]
    async with (
        IncidentClient.open(migrated_postgres_url) as one,
        IncidentClient.open(migrated_postgres_url) as other,
    ):

        async def many(client: IncidentClient, order: list[str]) -> list[Incident]:
            return await client.create_many(
                [NewIncident("Disk is full", "partner", dedup_key=key) for key in order]
            )

        await asyncio.gather(
            *(many(client, order) for client, order in [(one, keys), (other, keys[::-1])] * 5)
        )
        assert {incident.occurrences for incident in await one.list(limit=1000)} == {10}

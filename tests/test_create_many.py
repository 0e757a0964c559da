"""Many incidents at once are what they would be one by one, or are not there at all."""

from __future__ import annotations

import asyncio
from itertools import count
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from incidentkit import (
    EventKind,
    IdempotencyKeyReused,
    IncidentClient,
    InvalidIncident,
    NewIncident,
    StoreError,
    acting_as,
)
from incidentkit.domain import commands
from incidentkit.store.postgresql import dialect as postgresql
from tests.test_feed import take
from tests.test_repetition import run_sql

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from incidentkit import Incident


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    """The URL of each database, migrated or about to be."""
    name = {"sqlite": "sqlite_url", "postgresql": "migrated_postgres_url"}[request.param]
    return str(request.getfixturevalue(name))


@pytest.fixture
async def incidents(url: str) -> AsyncIterator[IncidentClient]:
    """An open client on an empty database."""
    async with IncidentClient.open(url) as client:
        yield client


def disks(number: int, **fields: Any) -> list[NewIncident]:
    """Incidents that differ in their messages."""
    return [NewIncident(f"Disk {n} is full", "monitoring", **fields) for n in range(number)]


async def test_they_are_stored_in_their_order(
    incidents: IncidentClient, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is stored and returned in its place, with its event and its actor, in any number."""
    monkeypatch.setattr(postgresql, "ROWS", 7)
    wanted = [*disks(20), NewIncident("Disk was full", "partner", "completed")]
    with acting_as("import"):
        created = await incidents.create_many(iter(wanted))
    assert [incident.incident_message for incident in created] == [
        incident.incident_message for incident in wanted
    ]
    assert [incident.incident_id for incident in created] == sorted(
        {incident.incident_id for incident in created}
    )
    assert created[-1].ended_at is not None
    assert await incidents.list(limit=100) == created[::-1]
    for incident in created:
        (event,) = await incidents.history(incident.incident_id)
        assert (event.kind, event.to_status) == (EventKind.CREATED, incident.incident_type)
        assert (event.actor, event.at) == ("import", incident.created_at)
    async with asyncio.timeout(60):
        changes = await take(incidents, len(wanted))
    assert {change.incident_id for change in changes} == {one.incident_id for one in created}
    assert await run_sql(url, "SELECT count(*) FROM incident_event") == [(len(wanted),)]


async def test_keys_count_as_they_would_one_by_one(
    incidents: IncidentClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that comes again counts, with what it said, also one that was open before."""
    monkeypatch.setattr(postgresql, "ROWS", 2)
    await incidents.create("Disk is full", source="monitoring", dedup_key="b")
    keys = ["a", "b", None, "c", "a", "d", "a", "ä"]
    created = await incidents.create_many(
        [NewIncident(f"Said {n} times", "partner", dedup_key=key) for n, key in enumerate(keys)]
    )
    assert [incident.dedup_key for incident in created] == keys
    assert [incident.occurrences for incident in created] == [1, 2, 1, 1, 2, 1, 3, 1]
    assert created[1].incident_message == "Disk is full"
    history = await incidents.history(created[0].incident_id)
    assert [(event.kind, event.note) for event in history] == [
        (EventKind.CREATED, None),
        (EventKind.RECURRED, "Said 4 times"),
        (EventKind.RECURRED, "Said 6 times"),
    ]


async def test_all_or_none(
    incidents: IncidentClient, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the database refuses one of them none is there, nor any event."""
    monkeypatch.setattr(postgresql, "ROWS", 7)
    if url.startswith("sqlite"):
        await run_sql(
            url,
            'CREATE TRIGGER refuse BEFORE INSERT ON "Incident" WHEN new.incident_message '
            "LIKE '%19%' BEGIN SELECT RAISE(ABORT, 'no'); END",
        )
    else:
        await run_sql(url, "ALTER TABLE \"Incident\" ADD CHECK (incident_message NOT LIKE '%19%')")
    with pytest.raises(StoreError):
        await incidents.create_many(disks(20))
    assert await incidents.list() == []
    assert (await incidents.read_changes()).changes == []


async def test_a_repeated_call_stores_nothing(incidents: IncidentClient) -> None:
    """With an idempotency key the second call returns what the first did; it is for that alone."""
    first = await incidents.create_many(disks(3), idempotency_key="import-7")
    assert await incidents.create_many(disks(3), idempotency_key="import-7") == first
    assert len(await incidents.list()) == 3
    with pytest.raises(IdempotencyKeyReused):
        await incidents.create_many(disks(4), idempotency_key="import-7")
    with pytest.raises(IdempotencyKeyReused):
        await incidents.create("Disk is full", source="partner", idempotency_key="import-7")


async def test_what_is_no_incident_is_refused(
    incidents: IncidentClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is none is named by its place, too many are not even read, and nothing is stored."""
    wrong: Any = [*disks(1), "Disk is full", None]
    with pytest.raises(InvalidIncident) as raised:
        await incidents.create_many(wrong)
    assert [error.field for error in raised.value.errors] == ["incidents[1]", "incidents[2]"]
    monkeypatch.setattr(commands, "MAX_MANY", 10)
    endless = (NewIncident(f"Disk {n} is full", "monitoring") for n in count())
    with pytest.raises(InvalidIncident, match="incidents must be at most 10"):
        await incidents.create_many(endless)
    assert await incidents.create_many([]) == []
    assert await incidents.list() == []


async def test_in_a_transaction_of_the_host(url: str, incidents: IncidentClient) -> None:
    """Joined, they come and go with the transaction."""
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
    """Calls with the same keys in other orders wait for each other, and both succeed."""
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

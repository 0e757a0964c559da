"""Removing what ended long ago, on both databases."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from sqlalchemy import text

from incidentkit import (
    EventKind,
    IncidentClient,
    IncidentNotFound,
    InvalidIncident,
    acting_as,
)
from incidentkit.store.migrate import migration_engine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


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


async def run_sql(url: str, statement: str) -> list[Any]:
    """Run a statement as another program."""
    engine = migration_engine(url)
    async with engine.begin() as connection:
        result = await connection.execute(text(statement))
        rows = list(result.all()) if result.returns_rows else []
    await engine.dispose()
    return rows


async def ended(incidents: IncidentClient, url: str, *days: int) -> list[int]:
    """Create incidents that ended so many days ago, and return their ids."""
    ids = []
    for ago in days:
        incident = await incidents.create("Disk is full", source="monitoring")
        await incidents.update_status(incident.incident_id, "completed")
        at = datetime.now(UTC) - timedelta(days=ago)
        zone = "" if url.startswith("sqlite") else "+00"
        await run_sql(
            url,
            f"UPDATE \"Incident\" SET ended_at = '{at:%Y-%m-%d %H:%M:%S}{zone}' "
            f"WHERE incident_id = {incident.incident_id}",
        )
        ids.append(incident.incident_id)
    return ids


async def test_what_ended_before_is_removed_with_its_history(
    incidents: IncidentClient, url: str
) -> None:
    """Only incidents that ended long enough ago go; of each one event tells that it was there."""
    still_open = await incidents.create("Line is down", source="partner", dedup_key="line")
    old, older, recent = await ended(incidents, url, 91, 1000, 89)
    await incidents.note(old, "It was long ago")
    with acting_as("janitor"):
        count = await incidents.purge(datetime.now(UTC) - timedelta(days=90))
    assert count == 2
    assert {incident.incident_id for incident in await incidents.list()} == {
        still_open.incident_id,
        recent,
    }
    for incident_id in (old, older):
        with pytest.raises(IncidentNotFound):
            await incidents.get(incident_id)
        (event,) = await incidents.history(incident_id)
        assert (event.kind, event.from_status, event.actor) == (
            EventKind.PURGED,
            "completed",
            "janitor",
        )
    assert len(await incidents.history(recent)) == 2
    ids = await run_sql(url, "SELECT incident_id FROM incident_event WHERE kind <> 'purged'")
    assert {row[0] for row in ids} == {still_open.incident_id, recent}


async def test_many_batches_tell_of_their_progress(
    incidents: IncidentClient, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is to go goes, batch by batch, and each batch is told with the total."""
    monkeypatch.setattr("incidentkit.client.PURGE_BATCH", 3)
    await ended(incidents, url, *[100] * 7)
    told: list[tuple[int, int]] = []
    count = await incidents.purge(
        datetime.now(UTC) - timedelta(days=90),
        progress=lambda done, total: told.append((done, total)),
    )
    assert count == 7
    assert told == [(3, 7), (6, 7), (7, 7)]
    assert await incidents.list() == []
    assert await incidents.purge(datetime.now(UTC)) == 0


async def test_it_is_seen_by_caches_and_feed(
    incidents: IncidentClient, url: str, redis_url: str
) -> None:
    """Another client's cached list loses them at once, and the feed tells of each."""
    ids = await ended(incidents, url, 100, 100)
    async with IncidentClient.open(url, redis_url) as other:
        assert len(await other.list()) == 2
        assert len(await other.list()) == 2
        await incidents.purge(datetime.now(UTC) - timedelta(days=90))
        assert await other.list() == []
    page = await incidents.read_changes(wait=30)
    assert [(event.kind, event.incident_id) for event in page.changes] == [
        (EventKind.PURGED, incident_id) for incident_id in ids
    ]


async def test_an_end_that_nobody_recorded_is_no_end(incidents: IncidentClient, url: str) -> None:
    """An incident that another program's SQL ended stays until its end is recorded."""
    incident = await incidents.create("Disk is full", source="monitoring")
    await run_sql(url, "UPDATE \"Incident\" SET incident_type = 'failed'")
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    assert await incidents.purge(tomorrow) == 0
    await incidents.update_status(incident.incident_id, "completed")
    assert await incidents.purge(tomorrow) == 1


async def test_one_that_was_opened_again_stays(incidents: IncidentClient) -> None:
    """What was opened again has not ended."""
    incident = await incidents.create("Disk is full", source="monitoring")
    await incidents.update_status(incident.incident_id, "failed")
    await incidents.update_status(incident.incident_id, "new")
    assert await incidents.purge(datetime.now(UTC) + timedelta(days=1)) == 0


async def test_beside_writers_nothing_is_lost_or_left(incidents: IncidentClient, url: str) -> None:
    """While others end, open and create, purging removes what ended, and no event is orphaned."""
    ids = await ended(incidents, url, *[100] * 10)
    before = datetime.now(UTC) - timedelta(days=90)

    async def reopen(incident_id: int) -> int | None:
        try:
            return (await incidents.update_status(incident_id, "new")).incident_id
        except IncidentNotFound:
            return None

    *reopened, _, _ = await asyncio.gather(
        *map(reopen, ids), incidents.purge(before), incidents.purge(before)
    )
    await incidents.purge(before)
    kept = {incident_id for incident_id in reopened if incident_id is not None}
    assert {incident.incident_id for incident in await incidents.list()} == kept
    for incident_id in ids:
        kinds = [event.kind for event in await incidents.history(incident_id)]
        gone = [EventKind.PURGED]
        stayed = [EventKind.CREATED, *[EventKind.STATUS_CHANGED] * 2]
        assert kinds == (stayed if incident_id in kept else gone)


async def test_a_row_that_somebody_holds_is_left_out(migrated_postgres_url: str) -> None:
    """On PostgreSQL purging does not wait for a transaction that is changing an incident."""
    async with IncidentClient.open(migrated_postgres_url) as incidents:
        held, other = await ended(incidents, migrated_postgres_url, 100, 100)
        connection = await asyncpg.connect(migrated_postgres_url)
        async with connection.transaction():
            await connection.execute(
                'SELECT FROM "Incident" WHERE incident_id = $1 FOR UPDATE', held
            )
            assert await incidents.purge(datetime.now(UTC)) == 1
            with pytest.raises(IncidentNotFound):
                await incidents.get(other)
        await connection.close()
        assert await incidents.purge(datetime.now(UTC)) == 1


async def test_an_incident_of_many_events_goes_in_several_steps(
    incidents: IncidentClient, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long a history is, no step removes more than so many events, and all are removed."""
    for module in ("sqlite.dialect", "postgresql.dialect"):
        monkeypatch.setattr(f"incidentkit.store.{module}.EVENTS", 4)
    ids = await ended(incidents, url, 100, 100)
    for _ in range(9):
        await incidents.note(ids[0], "one more")
    told: list[tuple[int, int]] = []
    count = await incidents.purge(
        datetime.now(UTC), progress=lambda done, total: told.append((done, total))
    )
    assert count == 2
    assert told == [(0, 2), (0, 2), (1, 2), (2, 2)]
    rows = await run_sql(url, "SELECT kind FROM incident_event")
    assert [kind for (kind,) in rows] == ["purged", "purged"]


async def test_a_note_that_comes_meanwhile_goes_too(migrated_postgres_url: str) -> None:
    """On PostgreSQL nothing that is said while an incident is purged stays behind."""
    async with (
        IncidentClient.open(migrated_postgres_url) as incidents,
        IncidentClient.open(migrated_postgres_url) as other,
    ):
        ids = await ended(incidents, migrated_postgres_url, *[100] * 12)

        async def say(incident_id: int) -> None:
            with suppress(IncidentNotFound):
                while True:
                    await other.note(incident_id, "a secret")

        async def purge() -> None:
            while await incidents.list():
                await incidents.purge(datetime.now(UTC))

        await asyncio.gather(*map(say, ids), purge())
        rows = await run_sql(
            migrated_postgres_url, "SELECT count(*) FROM incident_event WHERE kind <> 'purged'"
        )
        assert rows[0][0] == 0


@pytest.mark.parametrize("before", [None, "2026-01-01", datetime(2026, 1, 1), 90])  # noqa: DTZ001
async def test_a_time_without_a_zone_is_refused(incidents: IncidentClient, before: Any) -> None:
    """What is no aware time removes nothing."""
    with pytest.raises(InvalidIncident) as caught:
        await incidents.purge(before)
    assert [error.field for error in caught.value.errors] == ["ended_before"]

"""How incidents are purged: in batches, and beside other transactions."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from incidentkit import (
    IncidentClient,
    IncidentNotFound,
)
from tests.hosts import run_sql


async def ended(incidents: IncidentClient, url: str, *days: int) -> list[int]:
    """Create incidents that ended the given numbers of days ago; return their ids."""
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


async def test_many_batches_tell_of_their_progress(
    incidents: IncidentClient, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A purge removes incidents in batches and reports its progress after each."""
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


async def test_a_row_that_somebody_holds_is_left_out(migrated_postgres_url: str) -> None:
    """On PostgreSQL a purge skips an incident that another transaction has locked."""
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
    """A long history is removed in several steps, each of a limited number of events."""
    for module in ("sqlite.dialect", "postgresql.dialect"):
        monkeypatch.setattr(f"incidentkit.store.{module}.PURGED_EVENTS", 4)
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
    """On PostgreSQL, notes added during a purge are removed with their incident."""
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

"""Purging ended incidents."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from incidentkit import EventKind, IncidentNotFound, NewIncident, acting_as
from tests.conformance.gaps import Need, needs
from tests.conformance.refusals import refused
from tests.feed import take

if TYPE_CHECKING:
    from tests.conformance.embodiments import Embodiment, Verbs

pytestmark = needs(Need.PURGE)


def tomorrow() -> datetime:
    """Return a time that is later than the end of any ended incident."""
    return datetime.now(UTC) + timedelta(days=1)


def days_ago(days: int) -> datetime:
    """Return a time in the past."""
    return datetime.now(UTC) - timedelta(days=days)


async def ended(incidents: Verbs, number: int) -> list[int]:
    """Create ended incidents and return their ids."""
    new = [NewIncident("Disk is full", "monitoring", "completed")] * number
    return [incident.incident_id for incident in await incidents.create_many(new)]


async def test_ended_incidents_are_removed_with_their_histories(incidents: Verbs) -> None:
    """Open incidents stay; a purged one leaves one event, with its status and the actor."""
    still_open = await incidents.create("Line is down", source="partner", dedup_key="line")
    (gone,) = await ended(incidents, 1)
    await incidents.update_status(gone, "failed")
    await incidents.note(gone, "It was long ago")
    with acting_as("janitor"):
        assert await incidents.purge(tomorrow()) == 1
    assert await incidents.list() == [still_open]
    assert (await incidents.search(text="disk", total=True)).total == 0
    (event,) = await incidents.history(gone)
    assert (event.kind, event.from_status, event.to_status, event.actor, event.note) == (
        EventKind.PURGED,
        "failed",
        None,
        "janitor",
        None,
    )
    for call in (
        incidents.get(gone),
        incidents.update_status(gone, "new"),
        incidents.note(gone, "It is gone"),
    ):
        with pytest.raises(IncidentNotFound):
            await call
    assert len(await incidents.history(still_open.incident_id)) == 1


async def test_purgeable_counts_what_a_purge_would_remove(incidents: Verbs) -> None:
    """`purgeable` returns the number of incidents that a purge removes, and changes nothing."""
    await incidents.create("Line is down", source="partner")
    gone = await ended(incidents, 2)
    assert await incidents.purgeable(days_ago(1)) == 0
    assert await incidents.purgeable(tomorrow()) == 2
    assert len(await incidents.list()) == 3
    assert len(await incidents.history(gone[0])) == 1
    assert await incidents.purge(tomorrow()) == 2
    assert await incidents.purgeable(tomorrow()) == 0


@needs(Need.OUTSIDE_SQL)
async def test_only_incidents_that_ended_before_are_removed(
    incidents: Verbs, embodiment: Embodiment
) -> None:
    """An incident that ended later stays; apart from purges, only its events are left."""
    old, older, recent = await ended(incidents, 3)
    for incident_id, days in ((old, 91), (older, 1000), (recent, 89)):
        await embodiment.sql(
            f'UPDATE "Incident" SET ended_at = {embodiment.moment(days_ago(days))} '
            f"WHERE incident_id = {incident_id}"
        )
    assert await incidents.purge(days_ago(90)) == 2
    assert [incident.incident_id for incident in await incidents.list()] == [recent]
    assert len(await incidents.history(recent)) == 1
    left = await embodiment.sql("SELECT incident_id FROM incident_event WHERE kind <> 'purged'")
    assert left == [(recent,)]


async def test_the_bound_is_exclusive(incidents: Verbs) -> None:
    """An incident that ended exactly at the bound stays; with a bound a second later, it goes."""
    (incident_id,) = await ended(incidents, 1)
    end = (await incidents.get(incident_id)).ended_at
    assert end is not None
    assert await incidents.purgeable(end) == await incidents.purge(end) == 0
    assert await incidents.purgeable(end + timedelta(seconds=1)) == 1
    assert await incidents.purge(end + timedelta(seconds=1)) == 1


async def test_progress_is_reported(incidents: Verbs) -> None:
    """`progress` receives the number of purged incidents and the total."""
    await ended(incidents, 3)
    calls: list[tuple[int, int]] = []
    count = await incidents.purge(
        tomorrow(), progress=lambda done, total: calls.append((done, total))
    )
    assert count == 3
    assert calls[-1] == (3, 3)
    assert {total for _, total in calls} == {3}
    assert await incidents.purge(tomorrow()) == 0


async def test_a_reopened_incident_stays(incidents: Verbs) -> None:
    """A reopened incident has not ended and is not purged."""
    (incident_id,) = await ended(incidents, 1)
    await incidents.update_status(incident_id, "new")
    assert await incidents.purge(tomorrow()) == 0
    assert len(await incidents.history(incident_id)) == 2


@needs(Need.OUTSIDE_SQL)
async def test_an_unrecorded_end_does_not_count(incidents: Verbs, embodiment: Embodiment) -> None:
    """An incident that plain SQL ended stays until its end is recorded."""
    incident = await incidents.create("Disk is full", source="monitoring")
    await embodiment.sql("UPDATE \"Incident\" SET incident_type = 'failed'")
    assert (await incidents.get(incident.incident_id)).ended_at is None
    assert await incidents.purge(tomorrow()) == 0
    await incidents.update_status(incident.incident_id, "completed")
    assert await incidents.purge(tomorrow()) == 1


@needs(Need.CHANGES)
async def test_each_purge_is_in_the_feed(incidents: Verbs) -> None:
    """The feed drops the events of purged incidents and delivers each purge."""
    ids = await ended(incidents, 2)
    await incidents.purge(tomorrow())
    changes = await take(incidents, 2)
    assert [(change.kind, change.incident_id) for change in changes] == [
        (EventKind.PURGED, incident_id) for incident_id in ids
    ]


@needs(Need.OTHER_CLIENT)
async def test_cached_lists_of_another_client_are_refreshed(incidents: Verbs, other: Verbs) -> None:
    """A list cached by another client no longer shows purged incidents."""
    await ended(incidents, 2)
    for _ in range(2):
        assert len(await other.list()) == 2
    await incidents.purge(tomorrow())
    assert await other.list() == []


async def test_racing_reopens_leave_no_orphans(incidents: Verbs) -> None:
    """When reopening and purging race, each incident is kept or purged, with no orphaned event."""
    ids = await ended(incidents, 10)

    async def reopen(incident_id: int) -> int | None:
        try:
            return (await incidents.update_status(incident_id, "new")).incident_id
        except IncidentNotFound:
            return None

    purges = [incidents.purge(tomorrow()) for _ in range(2)]
    *reopened, _, _ = await asyncio.gather(*map(reopen, ids), *purges)
    await incidents.purge(tomorrow())
    kept = {incident_id for incident_id in reopened if incident_id is not None}
    assert {incident.incident_id for incident in await incidents.list()} == kept
    for incident_id in ids:
        kinds = [event.kind for event in await incidents.history(incident_id)]
        gone = [EventKind.PURGED]
        stayed = [EventKind.CREATED, EventKind.STATUS_CHANGED]
        assert kinds == (stayed if incident_id in kept else gone)


async def test_invalid_times_are_refused(incidents: Verbs) -> None:
    """Naive times and other objects are refused, and nothing is purged."""
    await ended(incidents, 1)
    wrongs: tuple[Any, ...] = (None, "2026-01-01", datetime(2026, 1, 1), 90)  # noqa: DTZ001
    for wrong in wrongs:
        assert await refused(incidents.purge(wrong)) == ["ended_before"]
    assert len(await incidents.list()) == 1

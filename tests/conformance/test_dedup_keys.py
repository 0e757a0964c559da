"""Reports with a deduplication key: counted on the open incident."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from attrs import evolve

from incidentkit import (
    DuplicateOpenIncident,
    EventKind,
    IncidentStatus,
    InvalidIncident,
    StoreUnavailable,
)
from tests.conformance.concurrency import run_all
from tests.conformance.gaps import Need, needs
from tests.conformance.refusals import refused

if TYPE_CHECKING:
    from incidentkit import Incident
    from tests.conformance.embodiments import Embodiment, Verbs


async def report(incidents: Verbs, message: str = "Disk is full") -> Incident:
    """Report a full disk."""
    return await incidents.create(message, source="monitoring", dedup_key="disk")


async def test_a_repeated_report_is_counted(incidents: Verbs) -> None:
    """The open incident is returned with only its count, version and time updated."""
    first = await report(incidents)
    assert (first.dedup_key, first.occurrences) == ("disk", 1)
    again = await incidents.create("Disk is at 100 %", source="operator", dedup_key="disk")
    assert again == evolve(first, version=2, occurrences=2, last_seen_at=again.last_seen_at)
    assert again.last_seen_at >= first.last_seen_at
    assert await incidents.get(first.incident_id) == again
    assert await incidents.list() == [again]


async def test_the_message_of_a_repeated_report_becomes_a_note(incidents: Verbs) -> None:
    """A recurrence keeps its message as a note if it differs from the incident's."""
    await report(incidents)
    await report(incidents, "Disk is at 100 %")
    await report(incidents)
    assert [(event.kind, event.note) for event in await incidents.history(1)] == [
        (EventKind.CREATED, None),
        (EventKind.RECURRED, "Disk is at 100 %"),
        (EventKind.RECURRED, None),
    ]


@needs(Need.OUTSIDE_SQL)
async def test_a_repeated_report_updates_last_seen_at(
    incidents: Verbs, embodiment: Embodiment
) -> None:
    """A recurrence updates `last_seen_at` and leaves `created_at`."""
    first = await report(incidents)
    long_ago = datetime(2026, 1, 1, tzinfo=UTC)
    at = embodiment.moment(long_ago)
    await embodiment.sql(f'UPDATE "Incident" SET created_at = {at}, last_seen_at = {at}')
    again = await report(incidents)
    assert again.created_at == long_ago
    assert again.last_seen_at >= first.created_at


async def test_different_keys_are_different_incidents(incidents: Verbs) -> None:
    """Keys are compared exactly, with case and whitespace."""
    keys = ("disk", "Disk", "disk ", "d\u0131sk", "x" * 255, None, None)
    for key in keys:
        await incidents.create("Disk is full", source="monitoring", dedup_key=key)
    listed = await incidents.list()
    assert [incident.dedup_key for incident in listed] == [*keys[::-1]]
    assert {incident.occurrences for incident in listed} == {1}


async def test_a_key_of_an_ended_incident_creates_another(incidents: Verbs) -> None:
    """Once an incident has ended, its key creates a new one."""
    first = await report(incidents)
    await incidents.update_status(first.incident_id, "completed")
    second = await report(incidents)
    assert second.incident_id != first.incident_id
    assert second.occurrences == 1


async def test_reopening_beside_an_open_duplicate_is_refused(incidents: Verbs) -> None:
    """An incident cannot be reopened while another one with its key is open."""
    first = await report(incidents)
    ended = await incidents.update_status(first.incident_id, "completed")
    second = await report(incidents)
    with pytest.raises(DuplicateOpenIncident) as caught:
        await incidents.update_status(first.incident_id, "new", note="Once more")
    assert caught.value.incident == ended
    assert await incidents.list() == [second, ended]
    assert len(await incidents.history(first.incident_id)) == 2
    await incidents.update_status(second.incident_id, "failed")
    assert (await incidents.update_status(first.incident_id, "new")).ended_at is None


async def test_a_reopened_incident_is_counted_on(incidents: Verbs) -> None:
    """A report counts on an incident that was reopened."""
    first = await report(incidents)
    await incidents.update_status(first.incident_id, "failed")
    await incidents.update_status(first.incident_id, "new")
    again = await report(incidents)
    assert (again.incident_id, again.occurrences) == (first.incident_id, 2)
    assert again.incident_type is IncidentStatus.NEW


async def test_concurrent_reports_are_one_incident(incidents: Verbs) -> None:
    """Concurrent reports with one key create one incident and are each counted once."""
    created = await asyncio.gather(*(report(incidents) for _ in range(40)))
    assert {incident.incident_id for incident in created} == {1}
    assert sorted(incident.occurrences for incident in created) == [*range(1, 41)]
    (stored,) = await incidents.list()
    assert (stored.occurrences, stored.version) == (40, 40)
    kinds = [event.kind for event in await incidents.history(1)]
    assert kinds == [EventKind.CREATED, *[EventKind.RECURRED] * 39]


@needs(Need.OTHER_CLIENT)
async def test_concurrent_reports_from_two_clients_are_one_incident(
    incidents: Verbs, other: Verbs
) -> None:
    """Two clients reporting concurrently create one incident; each report is counted once."""
    created = await run_all(*(report(client) for client in (incidents, other) * 50))
    assert {incident.incident_id for incident in created} == {created[0].incident_id}
    assert sorted(incident.occurrences for incident in created) == [*range(1, 101)]
    (stored,) = await incidents.list()
    assert (stored.occurrences, stored.version) == (100, 100)
    kinds = [event.kind for event in await incidents.history(stored.incident_id)]
    assert kinds == [EventKind.CREATED, *[EventKind.RECURRED] * 99]


async def test_racing_reopens_and_creates_leave_one_open(incidents: Verbs) -> None:
    """When reopening and creating race, exactly one incident with the key is open."""
    ended = []
    for _ in range(8):
        incident = await report(incidents)
        await incidents.update_status(incident.incident_id, "failed")
        ended.append(incident.incident_id)
    outcomes = await asyncio.gather(
        *(incidents.update_status(incident_id, "new") for incident_id in ended),
        *(report(incidents) for _ in range(8)),
        return_exceptions=True,
    )
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert {type(error) for error in errors} <= {DuplicateOpenIncident, StoreUnavailable}
    assert len(await incidents.list(status="new")) == 1


async def test_invalid_keys_are_refused(incidents: Verbs) -> None:
    """A key has 1 to 255 characters."""
    create: Any = incidents.create
    for key in ("", "x" * 256, "a\x00b", "\ud800", 7):
        call = create("Disk is full", source="monitoring", dedup_key=key)
        assert await refused(call) == ["dedup_key"]
    assert await incidents.list() == []


async def test_an_ended_incident_takes_no_key(incidents: Verbs) -> None:
    """An incident that starts as ended takes no key, since it cannot recur."""
    for status in ("completed", "failed"):
        with pytest.raises(InvalidIncident, match="dedup_key needs the incident_type new"):
            await incidents.create(
                "Disk is full", source="monitoring", incident_type=status, dedup_key="disk"
            )
    assert await incidents.list() == []

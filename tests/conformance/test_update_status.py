"""Changing the status of an incident."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import pytest
from attrs import evolve

from incidentkit import (
    EventKind,
    IllegalTransition,
    IncidentNotFound,
    IncidentStatus,
    NewIncident,
    StatusName,
    StoreError,
    VersionConflict,
    VersionMatch,
)
from tests.conformance.gaps import Need, needs
from tests.conformance.refusals import refused
from tests.conformance.test_get import NO_IDS

if TYPE_CHECKING:
    from incidentkit import IncidentEvent
    from tests.conformance.embodiments import Embodiment, Verbs

ONE_WAY = {"new": {"completed", "failed"}, "failed": ["new"]}
"""Transitions that end with `completed`."""


def told(event: IncidentEvent) -> tuple[object, ...]:
    """Return an event's fields without its cursor and time."""
    return event.kind, event.from_status, event.to_status, event.actor, event.note


async def test_only_the_status_changes(incidents: Verbs) -> None:
    """The incident is returned with its new status, version and end; other fields are unchanged."""
    incident = await incidents.create("Disk is full", source="monitoring", dedup_key="disk")
    await incidents.create("Line is down", source="partner")
    changed = await incidents.update_status(incident.incident_id, "completed")
    assert changed == evolve(
        incident,
        incident_type=IncidentStatus.COMPLETED,
        version=2,
        ended_at=changed.ended_at,
    )
    assert await incidents.get(incident.incident_id) == changed
    assert (await incidents.get(2)).incident_type is IncidentStatus.NEW


async def test_a_status_is_a_member_or_a_string(incidents: Verbs) -> None:
    """A status can be an enum member or a string."""
    await incidents.create("Disk is full", source="monitoring")
    assert (await incidents.update_status(1, IncidentStatus.FAILED)).incident_type == "failed"
    assert (await incidents.update_status(1, "new")).incident_type is IncidentStatus.NEW


async def test_version_and_end_follow_the_status(incidents: Verbs) -> None:
    """Each change increments the version; leaving `new` sets the end, and reopening clears it."""
    incident = await incidents.create("Disk is full", source="monitoring")
    assert (incident.version, incident.ended_at) == (1, None)
    failed = await incidents.update_status(incident.incident_id, "failed")
    assert failed.version == 2
    assert failed.ended_at is not None
    assert failed.ended_at >= incident.created_at
    completed = await incidents.update_status(incident.incident_id, "completed")
    assert (completed.version, completed.ended_at) == (3, failed.ended_at)
    again = await incidents.update_status(incident.incident_id, "new")
    assert (again.version, again.ended_at) == (4, None)
    await incidents.note(incident.incident_id, "Only a note")
    assert await incidents.get(incident.incident_id) == again


@needs(Need.OUTSIDE_SQL)
async def test_the_end_is_when_the_status_leaves_new(
    incidents: Verbs, embodiment: Embodiment
) -> None:
    """An ended incident keeps its end when its status changes; a reopened one ends now."""
    incident = await incidents.create("Disk is full", source="monitoring", incident_type="failed")
    long_ago = datetime(2026, 1, 1, tzinfo=UTC)
    await embodiment.sql(f'UPDATE "Incident" SET ended_at = {embodiment.moment(long_ago)}')
    assert (await incidents.update_status(1, "completed")).ended_at == long_ago
    assert (await incidents.update_status(1, "new")).ended_at is None
    again = await incidents.update_status(1, "failed")
    assert again.ended_at is not None
    assert again.ended_at >= incident.created_at


async def test_a_change_is_recorded_with_its_note(incidents: Verbs) -> None:
    """A change records both statuses and the note, without surrounding whitespace."""
    await incidents.create("Disk is full", source="monitoring")
    await incidents.update_status(1, "failed", note=" Could not be mended ")
    await incidents.update_status(1, "completed")
    assert [told(event) for event in (await incidents.history(1))[1:]] == [
        (
            EventKind.STATUS_CHANGED,
            IncidentStatus.NEW,
            IncidentStatus.FAILED,
            None,
            "Could not be mended",
        ),
        (EventKind.STATUS_CHANGED, IncidentStatus.FAILED, IncidentStatus.COMPLETED, None, None),
    ]


async def test_repeating_a_status_changes_nothing(incidents: Verbs) -> None:
    """Setting the current status changes nothing and records only a note."""
    await incidents.create("Disk is full", source="monitoring")
    done = await incidents.update_status(1, "completed")
    assert await incidents.update_status(1, "completed") == done
    assert len(await incidents.history(1)) == 2
    assert await incidents.update_status(1, "completed", note="Twice") == done
    assert [told(event) for event in (await incidents.history(1))[2:]] == [
        (EventKind.NOTED, None, None, None, "Twice")
    ]
    assert await incidents.get(1) == done


async def test_an_unexpected_version_is_refused(incidents: Verbs) -> None:
    """A change that expects another version does nothing and reports the current incident."""
    await incidents.create("Disk is full", source="monitoring")
    failed = await incidents.update_status(1, "failed", expected_version=1)
    for status in ("completed", "failed"):
        with pytest.raises(VersionConflict) as caught:
            await incidents.update_status(1, status, note="Never mind", expected_version=1)
        assert caught.value.incident == failed
    assert await incidents.get(1) == failed
    assert len(await incidents.history(1)) == 2
    done = await incidents.update_status(1, "completed", expected_version=2)
    assert done.version == 3


async def test_another_tag_is_refused(incidents: Verbs) -> None:
    """A tag fits one state of one incident, not another incident with the same version."""
    first = await incidents.create("Disk is full", source="monitoring")
    second = await incidents.create("Network is down", source="monitoring")
    assert first.tag != second.tag
    for tag in (second.tag, f"1-{0:012x}", f"2-{0:012x}"):
        with pytest.raises(VersionConflict) as caught:
            await incidents.update_status(1, "failed", note="Never mind", expected_version=tag)
        assert caught.value.incident == first
    assert (await incidents.get(1)).tag == first.tag
    failed = await incidents.update_status(1, "failed", expected_version=first.tag)
    assert (failed.version, len(await incidents.history(1))) == (2, 2)
    with pytest.raises(VersionConflict):
        await incidents.update_status(1, "failed", expected_version=first.tag)
    with pytest.raises(IncidentNotFound):
        await incidents.update_status(3, "failed", expected_version=first.tag)
    reopened = await incidents.update_status(1, "new", expected_version=failed.tag)
    assert (await incidents.update_status(1, "new", expected_version=reopened.tag)) == reopened


@pytest.mark.parametrize("by_tag", [False, True])
async def test_one_of_many_with_the_same_version_wins(incidents: Verbs, *, by_tag: bool) -> None:
    """Of concurrent changes that expect the same version, exactly one happens."""
    seen = await incidents.create("Disk is full", source="monitoring")
    expected = seen.tag if by_tag else seen.version
    outcomes = await asyncio.gather(
        *(incidents.update_status(1, "failed", expected_version=expected) for _ in range(20)),
        return_exceptions=True,
    )
    won = [one for one in outcomes if not isinstance(one, BaseException)]
    lost = [one for one in outcomes if isinstance(one, VersionConflict)]
    assert (len(won), len(lost)) == (1, 19)
    assert {conflict.incident.version for conflict in lost} == {2}
    assert len(await incidents.history(1)) == 2


async def test_one_of_several_versions_is_expected(incidents: Verbs) -> None:
    """A change may require one of several versions and tags, or none of them."""
    incident = await incidents.create("Disk is full", source="monitoring")
    for match in (VersionMatch((2, 3)), VersionMatch(()), VersionMatch(none_of=(incident.tag,))):
        for status in ("failed", "new"):
            with pytest.raises(VersionConflict):
                await incidents.update_status(1, status, expected_version=match)
    match = VersionMatch((7, incident.tag), none_of=(2,))
    changed = await incidents.update_status(1, "failed", expected_version=match)
    assert changed.version == 2
    again = VersionMatch((changed.version, 5), none_of=(incident.tag,))
    assert (await incidents.update_status(1, "new", expected_version=again)).version == 3
    assert len(await incidents.history(1)) == 3


async def test_concurrent_changes_form_a_chain(incidents: Verbs) -> None:
    """Each racing change starts from the status that the previous one set."""
    await incidents.create("Disk is full", source="monitoring")
    await asyncio.gather(*(incidents.update_status(1, status) for status in [*IncidentStatus] * 15))
    events = await incidents.history(1)
    for earlier, later in pairwise(events):
        assert later.from_status is earlier.to_status
        assert later.to_status is not later.from_status
    now = await incidents.get(1)
    assert now.incident_type is events[-1].to_status
    assert now.version == len(events)


async def test_a_refused_change_does_not_affect_concurrent_ones(incidents: Verbs) -> None:
    """Of concurrent changes, the valid ones succeed, each with its own note."""
    await incidents.create_many([NewIncident("Disk is full", "monitoring")] * 20)
    outcomes = await asyncio.gather(
        *(
            incidents.update_status(
                n, "completed", note=f"note {n}", expected_version=1 + (n % 3 == 0)
            )
            for n in range(1, 23)
        ),
        return_exceptions=True,
    )
    for number, outcome in enumerate(outcomes, 1):
        if number > 20:
            assert isinstance(outcome, IncidentNotFound)
            continue
        events = [event.note for event in await incidents.history(number)]
        if number % 3 == 0:
            assert isinstance(outcome, VersionConflict)
            assert events == [None]
        else:
            assert not isinstance(outcome, BaseException)
            assert outcome == await incidents.get(number)
            assert outcome.version == 2
            assert events == [None, f"note {number}"]


async def test_without_transitions_every_change_is_allowed(incidents: Verbs) -> None:
    """Without transitions, any status may follow any other."""
    await incidents.create("Disk is full", source="monitoring")
    for before, after in product(IncidentStatus, repeat=2):
        await incidents.update_status(1, before)
        assert (await incidents.update_status(1, after)).incident_type is after


async def test_an_illegal_transition_is_refused(embodiment: Embodiment) -> None:
    """An illegal change does nothing and reports both statuses; a legal one happens."""
    async with embodiment.open(transitions=ONE_WAY) as incidents:
        await incidents.create("Disk is full", source="monitoring")
        done = await incidents.update_status(1, "completed")
        for status in ("new", "failed"):
            with pytest.raises(IllegalTransition) as caught:
                await incidents.update_status(1, status, note="Never mind")
            assert caught.value.incident == done
            assert caught.value.to_status == status
        assert await incidents.update_status(1, "completed") == done
        assert len(await incidents.history(1)) == 2
        await incidents.create("Line is down", source="partner", incident_type="failed")
        assert (await incidents.update_status(2, "new")).version == 2


async def test_the_version_is_checked_before_the_transition(embodiment: Embodiment) -> None:
    """A wrong version is reported before an illegal transition."""
    async with embodiment.open(transitions={}) as incidents:
        await incidents.create("Disk is full", source="monitoring")
        with pytest.raises(VersionConflict):
            await incidents.update_status(1, "failed", expected_version=9)
        with pytest.raises(IllegalTransition):
            await incidents.update_status(1, "failed", expected_version=1)


async def test_racing_changes_respect_the_transitions(embodiment: Embodiment) -> None:
    """Racing changes never make an illegal transition."""
    async with embodiment.open(transitions=ONE_WAY) as incidents:
        await incidents.create("Disk is full", source="monitoring")
        statuses: tuple[StatusName, ...] = ("failed", "new", "failed", "completed") * 5
        outcomes = await asyncio.gather(
            *(incidents.update_status(1, status) for status in statuses), return_exceptions=True
        )
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        assert {type(error) for error in errors} <= {IllegalTransition}
        events = await incidents.history(1)
        for event in events[1:]:
            assert event.from_status is not None
            assert event.to_status in ONE_WAY[event.from_status]


async def test_an_unknown_incident_is_not_found(incidents: Verbs) -> None:
    """An unknown id raises IncidentNotFound, whatever version is expected."""
    for incident_id, version in ((1, None), (2**63 - 1, None), (99, 1)):
        with pytest.raises(IncidentNotFound) as caught:
            await incidents.update_status(incident_id, "failed", expected_version=version)
        assert caught.value.incident_id == incident_id


async def test_every_invalid_argument_is_named(incidents: Verbs) -> None:
    """One error names every invalid argument, and nothing changes."""
    incident = await incidents.create("Disk is full", source="monitoring")
    call: Any = incidents.update_status
    assert await refused(call(0, "open", note="", expected_version=0)) == [
        "incident_id",
        "status",
        "note",
        "expected_version",
    ]
    for wrong in NO_IDS:
        assert await refused(call(wrong, "failed")) == ["incident_id"]
    for status in ("", "FAILED", None, 1):
        assert await refused(call(1, status)) == ["status"]
    for note in ("", "  \n ", "x" * 1001, "a\x00b", "\ud800", 7):
        assert await refused(call(1, "failed", note=note)) == ["note"]
    for version in (0, -1, True, "1", 1.0, 2**63):
        assert await refused(call(1, "failed", expected_version=version)) == ["expected_version"]
    assert await incidents.get(1) == incident
    assert len(await incidents.history(1)) == 1


@needs(Need.OUTSIDE_SQL, Need.GOING_ON)
async def test_nothing_changes_if_the_event_fails(incidents: Verbs, embodiment: Embodiment) -> None:
    """If its event cannot be written, the incident stays as it was."""
    incident = await incidents.create("Disk is full", source="monitoring")
    await embodiment.sql("ALTER TABLE incident_event RENAME COLUMN note TO remark")
    with pytest.raises(StoreError):
        await incidents.update_status(1, "failed")
    await embodiment.sql("ALTER TABLE incident_event RENAME COLUMN remark TO note")
    assert await incidents.list() == [incident]
    assert len(await incidents.history(1)) == 1

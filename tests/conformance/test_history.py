"""Notes, histories and actors."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from incidentkit import (
    EventKind,
    IdempotencyKeyReused,
    IncidentEvent,
    IncidentNotFound,
    IncidentStatus,
    NewIncident,
    StoreError,
    VersionConflict,
    VersionMatch,
    acting_as,
)
from tests.conformance.gaps import Need, needs
from tests.conformance.refusals import refused
from tests.conformance.test_get import NO_IDS

if TYPE_CHECKING:
    from tests.conformance.embodiments import Embodiment, Verbs


async def test_each_change_leaves_an_event(incidents: Verbs) -> None:
    """Creation, recurrence, status changes and notes are listed oldest first."""
    before = datetime.now(UTC).replace(microsecond=0)
    incident = await incidents.create("Disk is full", source="monitoring", dedup_key="disk")
    await incidents.create("Disk is at 100 %", source="monitoring", dedup_key="disk")
    await incidents.update_status(incident.incident_id, "failed", note="It is broken")
    note = await incidents.note(incident.incident_id, "A new disk is ordered")
    await incidents.create("Line is down", source="partner")
    events = await incidents.history(incident.incident_id)
    assert [
        (event.kind, event.from_status, event.to_status, event.actor, event.note)
        for event in events
    ] == [
        (EventKind.CREATED, None, IncidentStatus.NEW, None, None),
        (EventKind.RECURRED, None, None, None, "Disk is at 100 %"),
        (
            EventKind.STATUS_CHANGED,
            IncidentStatus.NEW,
            IncidentStatus.FAILED,
            None,
            "It is broken",
        ),
        (EventKind.NOTED, None, None, None, "A new disk is ordered"),
    ]
    assert note == events[3]
    assert {event.incident_id for event in events} == {incident.incident_id}
    assert len({event.cursor for event in events}) == 4
    for event in events:
        assert event.at.tzinfo is UTC
        assert event.at.microsecond == 0
        assert before <= event.at <= datetime.now(UTC) + timedelta(seconds=1)


async def test_fields_have_their_annotated_types(incidents: Verbs) -> None:
    """An event's enums, integers and strings keep their types."""
    await incidents.create("Disk is full", source="monitoring")
    await incidents.update_status(1, "failed", note="It is broken")
    event = (await incidents.history(1))[1]
    assert type(event) is IncidentEvent
    assert type(event.incident_id) is int
    assert type(event.cursor) is type(event.note) is str
    assert type(event.kind) is EventKind
    assert type(event.from_status) is type(event.to_status) is IncidentStatus


async def test_a_note_leaves_the_incident_unchanged(incidents: Verbs) -> None:
    """A note is stored without surrounding whitespace and does not change the incident."""
    incident = await incidents.create("Disk is full", source="monitoring")
    event = await incidents.note(1, " \tIt is db-1, 100 % :of it\n")
    assert (event.incident_id, event.kind) == (1, EventKind.NOTED)
    assert event.note == "It is db-1, 100 % :of it"
    assert await incidents.history(1) == [(await incidents.history(1))[0], event]
    assert await incidents.get(1) == incident
    assert await incidents.list() == [incident]


async def test_concurrent_notes_are_all_kept(incidents: Verbs) -> None:
    """Concurrent notes are all in the history, each with its own cursor."""
    await incidents.create("Disk is full", source="monitoring")
    noted = await asyncio.gather(*(incidents.note(1, f"note {n}") for n in range(30)))
    assert [event.note for event in noted] == [f"note {n}" for n in range(30)]
    history = (await incidents.history(1))[1:]
    assert sorted(history, key=lambda event: event.cursor) == sorted(
        noted, key=lambda event: event.cursor
    )
    assert len({event.cursor for event in history}) == 30


async def test_a_long_history_is_paged_by_cursor(incidents: Verbs) -> None:
    """Any cursor resumes the history right after its event."""
    for message in ("Disk is full", "Line is down"):
        await incidents.create(message, source="monitoring")
    for number in range(9):
        await incidents.note(1, f"note {number}")
        await incidents.note(2, "of another")
    whole = await incidents.history(1)
    assert len(whole) == 10
    for number, event in enumerate(whole, 1):
        assert await incidents.history(1, after=event.cursor) == whole[number:]
    parts: list[IncidentEvent] = []
    while part := await incidents.history(1, limit=3, after=parts[-1].cursor if parts else None):
        assert len(part) <= 3
        parts += part
    assert parts == whole


async def test_a_history_of_hundreds_of_events_is_complete(incidents: Verbs) -> None:
    """A history is returned in full up to its limit, also beyond a hundred events."""
    repeated = NewIncident("Disk is full", "monitoring", dedup_key="disk")
    await incidents.create_many([repeated] * 250)
    await incidents.create_many([NewIncident("Line is down", "partner")] * 3)
    events = await incidents.history(1)
    assert len(events) == 250
    assert len({event.cursor for event in events}) == 250
    assert {event.incident_id for event in events} == {1}
    assert events[0].kind == EventKind.CREATED
    for limit in (1, 99, 100, 101, 200, 249, 250, 251, 1000):
        assert await incidents.history(1, limit=limit) == events[:limit]
        later = await incidents.history(1, limit=limit, after=events[9].cursor)
        assert later == events[10:][:limit]


async def test_an_unknown_incident_is_not_found(incidents: Verbs) -> None:
    """An unknown id has no history and takes no note."""
    for incident_id in (99, 2**63 - 1):
        for call in (incidents.history(incident_id), incidents.note(incident_id, "Unknown")):
            with pytest.raises(IncidentNotFound) as caught:
                await call
            assert caught.value.incident_id == incident_id


async def test_invalid_notes_are_refused(incidents: Verbs) -> None:
    """A note has 1 to 1000 characters; an invalid id is named beside it."""
    await incidents.create("Disk is full", source="monitoring")
    call: Any = incidents.note
    assert await refused(call(0, "")) == ["incident_id", "note"]
    for note in ("", "  \n ", "x" * 1001, "a\x00b", "\ud800", None, 7):
        assert await refused(call(1, note)) == ["note"]
    for wrong in NO_IDS:
        assert await refused(call(wrong, "It is db-1")) == ["incident_id"]
    assert len(await incidents.history(1)) == 1


async def test_a_note_on_another_version_is_refused(incidents: Verbs) -> None:
    """A note may require a version, a tag or one of several, and leaves the version as it is."""
    incident = await incidents.create("Disk is full", source="monitoring")
    allowed: tuple[Any, ...] = (
        1,
        incident.tag,
        VersionMatch((7, incident.tag)),
        VersionMatch(none_of=(2, "1-5f1c9a0e77d2")),
        VersionMatch(),
    )
    for expected in allowed:
        await incidents.note(1, "It is db-1", expected_version=expected)
    others: tuple[Any, ...] = (
        2,
        "1-5f1c9a0e77d2",
        VersionMatch((2, 3)),
        VersionMatch(()),
        VersionMatch(none_of=(1,)),
        VersionMatch((1,), none_of=(incident.tag,)),
    )
    for expected in others:
        with pytest.raises(VersionConflict) as caught:
            await incidents.note(1, "It is db-2", expected_version=expected)
        assert caught.value.incident == incident
    assert len(await incidents.history(1)) == 1 + len(allowed)
    wrongs: tuple[Any, ...] = (0, "1", VersionMatch((0,)), VersionMatch(none_of=("x",)))
    for expected in wrongs:
        call = incidents.note(1, "It is db-1", expected_version=expected)
        assert await refused(call) == ["expected_version"]


async def test_a_repeated_note_returns_the_first_result(incidents: Verbs) -> None:
    """A repeated key adds no second note, and belongs to this note alone."""
    await incidents.create("Disk is full", source="monitoring")
    first = await incidents.note(1, "It is db-1", expected_version=1, idempotency_key="k")
    await incidents.update_status(1, "failed")
    again = await incidents.note(1, " It is db-1 ", expected_version=1, idempotency_key="k")
    assert again == first
    calls: tuple[Any, ...] = (
        incidents.note(1, "It is db-2", expected_version=1, idempotency_key="k"),
        incidents.note(1, "It is db-1", idempotency_key="k"),
        incidents.update_status(1, "new", idempotency_key="k"),
    )
    for call in calls:
        with pytest.raises(IdempotencyKeyReused):
            await call
    assert len(await incidents.history(1)) == 3


async def test_invalid_arguments_of_a_history_are_refused(incidents: Verbs) -> None:
    """One error names an invalid id, limit and cursor."""
    call: Any = incidents.history
    assert await refused(call(0, limit=1001, after="?")) == ["incident_id", "limit", "after"]
    for wrong in NO_IDS:
        assert await refused(call(wrong)) == ["incident_id"]
    for limit in (0, -1, 1001, True, "1", None):
        assert await refused(call(1, limit=limit)) == ["limit"]
    for after in ("", "?", 7, "latest", "A" * 43 + "="):
        assert await refused(call(1, after=after)) == ["after"]


async def test_a_cursor_from_elsewhere_is_refused(incidents: Verbs) -> None:
    """A history refuses the cursor of another incident and that of a search."""
    for _ in range(2):
        await incidents.create("Disk is full", source="monitoring")
    (of_another,) = await incidents.history(2)
    of_a_search = (await incidents.search(limit=1)).next
    for after in (of_another.cursor, of_a_search):
        assert await refused(incidents.history(1, after=after)) == ["after"]


@needs(Need.OUTSIDE_SQL, Need.GOING_ON)
async def test_a_failed_note_leaves_nothing(incidents: Verbs, embodiment: Embodiment) -> None:
    """A note that the database rejects is not in the history."""
    incident = await incidents.create("Disk is full", source="monitoring")
    await embodiment.sql("ALTER TABLE incident_event RENAME COLUMN note TO remark")
    with pytest.raises(StoreError):
        await incidents.note(1, "It is lost")
    await embodiment.sql("ALTER TABLE incident_event RENAME COLUMN remark TO note")
    assert await incidents.list() == [incident]
    assert len(await incidents.history(1)) == 1


# Actors


async def test_events_name_the_actor(incidents: Verbs) -> None:
    """Every verb that changes an incident records the actor in its event."""
    with acting_as("alice"):
        await incidents.create("Disk is full", source="monitoring", dedup_key="disk")
        await incidents.create("Disk is full", source="monitoring", dedup_key="disk")
        await incidents.update_status(1, "failed")
        await incidents.update_status(1, "failed", note="Twice")
        note = await incidents.note(1, "It is db-1")
    assert note.actor == "alice"
    assert [event.actor for event in await incidents.history(1)] == ["alice"] * 5


async def test_actors_nest(incidents: Verbs) -> None:
    """The innermost actor is recorded, and none outside the blocks."""
    await incidents.create("Disk is full", source="monitoring")
    with acting_as("alice"):
        with acting_as("bob"):
            await incidents.note(1, "inner")
        await incidents.note(1, "outer")
    await incidents.note(1, "nobody")
    events = (await incidents.history(1))[1:]
    assert [(event.note, event.actor) for event in events] == [
        ("inner", "bob"),
        ("outer", "alice"),
        ("nobody", None),
    ]


async def test_each_task_has_its_own_actor(incidents: Verbs) -> None:
    """Concurrent tasks keep their own actors, and child tasks inherit them."""
    names = [f"user {number}" for number in range(20)]

    async def work(name: str) -> int:
        with acting_as(name):
            created = asyncio.create_task(incidents.create("Disk is full", source="operator"))
            await asyncio.sleep(0)
            return (await created).incident_id

    ids = await asyncio.gather(*map(work, names))
    for name, incident_id in zip(names, ids, strict=True):
        assert [event.actor for event in await incidents.history(incident_id)] == [name]

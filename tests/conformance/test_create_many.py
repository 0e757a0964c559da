"""Creating many incidents at once, in order and all or none."""

from __future__ import annotations

from itertools import repeat
from typing import TYPE_CHECKING, Any

import pytest

from incidentkit import (
    EventKind,
    InvalidIncident,
    NewIncident,
    PartlyStored,
    StoreError,
    acting_as,
)
from tests.conformance.gaps import Need, needs
from tests.conformance.refusals import refused
from tests.feed import take

if TYPE_CHECKING:
    from incidentkit import Incident
    from tests.conformance.embodiments import Embodiment, Verbs


def disks(number: int) -> list[NewIncident]:
    """Return incidents that differ in their messages."""
    return [NewIncident(f"Disk {n} is full", "monitoring") for n in range(number)]


async def refuse_disk_19(embodiment: Embodiment) -> None:
    """Let the database refuse one of the disks."""
    if embodiment.on_sqlite:
        await embodiment.sql(
            'CREATE TRIGGER refuse BEFORE INSERT ON "Incident" WHEN new.incident_message '
            "LIKE '%19%' BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
    else:
        # Triggers deferred to the commit of a joined transaction would block ALTER TABLE.
        await embodiment.sql("SET CONSTRAINTS ALL IMMEDIATE")
        await embodiment.sql(
            'ALTER TABLE "Incident" ADD CONSTRAINT refuse CHECK (incident_message NOT LIKE '
            "'%19%')"
        )


async def test_incidents_keep_their_order(incidents: Verbs) -> None:
    """Each incident is stored and returned in its place, with its event and its actor."""
    wanted = [*disks(20), NewIncident("Disk was full", "partner", "completed")]
    with acting_as("import"):
        created = await incidents.create_many(iter(wanted))
    assert [(one.incident_message, one.source, one.incident_type) for one in created] == [
        (one.incident_message, one.source, one.incident_type) for one in wanted
    ]
    ids = [incident.incident_id for incident in created]
    assert ids == sorted(set(ids))
    assert created[-1].ended_at == created[-1].created_at
    assert await incidents.list(limit=100) == created[::-1]
    for incident in created:
        (event,) = await incidents.history(incident.incident_id)
        assert (event.kind, event.to_status) == (EventKind.CREATED, incident.incident_type)
        assert event.actor == "import"
        assert event.at >= incident.created_at


@needs(Need.CHANGES)
async def test_each_incident_is_in_the_feed(incidents: Verbs) -> None:
    """The feed delivers the creation of each incident once."""
    created = await incidents.create_many(disks(20))
    changes = await take(incidents, 20)
    assert {change.incident_id for change in changes} == {one.incident_id for one in created}
    assert {change.kind for change in changes} == {EventKind.CREATED}


@needs(Need.MANY)
async def test_thousands_are_stored_in_order(incidents: Verbs) -> None:
    """Thousands of incidents, too many for one statement, are stored in order."""
    created = await incidents.create_many(disks(2001))
    assert [incident.incident_message for incident in created] == [
        f"Disk {n} is full" for n in range(2001)
    ]
    assert await incidents.list(page=3, limit=1000) == created[0::-1]
    assert len(await incidents.history(created[-1].incident_id)) == 1


async def test_dedup_keys_count_within_one_call(incidents: Verbs) -> None:
    """A repeated key counts an occurrence with its message, even on an already open incident."""
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
    assert await incidents.get(created[0].incident_id) == created[6]


@needs(Need.OUTSIDE_SQL)
async def test_one_failure_stores_none(incidents: Verbs, embodiment: Embodiment) -> None:
    """If the database rejects one incident, no incident and no event is stored."""
    again = NewIncident("Disk is full", "monitoring", dedup_key="disk")
    before = await incidents.create(again)
    await refuse_disk_19(embodiment)
    with pytest.raises(StoreError):
        await incidents.create_many([again, *disks(20), again])
    assert await incidents.list() == [before]
    assert await embodiment.sql("SELECT count(*) FROM incident_event") == [(1,)]


@needs(Need.BATCHES)
async def test_batches_are_stored_as_one_call_would(incidents: Verbs) -> None:
    """In batches, incidents keep their order, and keys count across batches."""
    keys = ["a", "b", None, "c", "a", "d", "a", "ä"]
    new = [NewIncident(f"Said {n} times", "partner", dedup_key=key) for n, key in enumerate(keys)]
    with acting_as("import"):
        created = await incidents.create_many(iter(new), batch=3)
    assert [incident.dedup_key for incident in created] == keys
    assert [incident.occurrences for incident in created] == [1, 1, 1, 1, 2, 1, 3, 1]
    assert await incidents.get(created[0].incident_id) == created[6]
    for incident in created:
        history = await incidents.history(incident.incident_id)
        assert len(history) == (3 if incident.dedup_key == "a" else 1)
        assert {event.actor for event in history} == {"import"}


@needs(Need.BATCHES, Need.OUTSIDE_SQL)
async def test_a_failure_keeps_the_batches_before_it(
    incidents: Verbs, embodiment: Embodiment
) -> None:
    """The error holds the committed incidents; a retry with the key stores only the others."""
    await refuse_disk_19(embodiment)
    stored: tuple[Incident, ...] = ()
    for _ in range(2):
        with pytest.raises(PartlyStored, match="first 15 of 23 incidents are known") as caught:
            await incidents.create_many(disks(23), batch=5, idempotency_key="import 7")
        error = caught.value
        assert isinstance(error.__cause__, StoreError)
        assert error.reason == str(error.__cause__)
        stored = error.incidents
        assert [one.incident_message for one in stored] == [f"Disk {n} is full" for n in range(15)]
        assert await incidents.list(limit=100) == [*stored[::-1]]
    await embodiment.sql(
        "DROP TRIGGER refuse"
        if embodiment.on_sqlite
        else 'ALTER TABLE "Incident" DROP CONSTRAINT refuse'
    )
    created = await incidents.create_many(disks(23), batch=5, idempotency_key="import 7")
    assert created[:15] == [*stored]
    assert await incidents.list(limit=100) == created[::-1]


@needs(Need.BATCHES, Need.OUTSIDE_SQL)
async def test_a_failure_of_the_first_batch_is_raised_as_it_is(
    incidents: Verbs, embodiment: Embodiment
) -> None:
    """If no batch was committed, the error is that of a call without batches."""
    await refuse_disk_19(embodiment)
    with pytest.raises(StoreError):
        await incidents.create_many(disks(40), batch=20)
    assert await incidents.list() == []


async def test_invalid_batches_are_refused(incidents: Verbs) -> None:
    """A batch has 1 to 100,000 incidents."""
    wrongs: tuple[Any, ...] = (0, -1, 100_001, True, "5", 5.0)
    for wrong in wrongs:
        assert await refused(incidents.create_many(disks(2), batch=wrong)) == ["batch"]
    assert await incidents.list() == []


async def test_an_empty_list_stores_nothing(incidents: Verbs) -> None:
    """An empty list stores nothing, with or without an idempotency key."""
    assert await incidents.create_many([]) == []
    assert await incidents.create_many(iter(()), idempotency_key="k") == []
    assert await incidents.list() == []


async def test_other_objects_are_refused_by_position(incidents: Verbs) -> None:
    """An error names at most ten objects other than NewIncidents, by position."""
    wrong: Any = [*disks(1), "Disk is full", None]
    assert await refused(incidents.create_many(wrong)) == ["incidents[1]", "incidents[2]"]
    assert len(await refused(incidents.create_many(wrong * 10))) == 10
    assert await incidents.list() == []


async def test_an_endless_iterator_is_refused(incidents: Verbs) -> None:
    """An endless iterator is refused once it exceeds 100,000 incidents."""
    endless = repeat(NewIncident("Disk is full", "monitoring"))
    with pytest.raises(InvalidIncident, match="incidents must be at most 100000"):
        await incidents.create_many(endless)
    assert await incidents.list() == []

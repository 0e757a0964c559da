"""Creating an incident."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from incidentkit import (
    Incident,
    IncidentSource,
    IncidentStatus,
    InvalidIncident,
    NewIncident,
    StoreError,
)
from tests.conformance.gaps import Need, needs
from tests.conformance.refusals import refused

if TYPE_CHECKING:
    from tests.conformance.embodiments import Embodiment, Verbs


async def test_it_returns_the_stored_incident(incidents: Verbs) -> None:
    """`create` returns the incident with its id and the database's time, just as `get` does."""
    before = datetime.now(UTC).replace(microsecond=0)
    incident = await incidents.create("Disk is full", source="monitoring")
    assert incident == Incident(
        incident_id=1,
        incident_message="Disk is full",
        incident_type=IncidentStatus.NEW,
        source=IncidentSource.MONITORING,
        created_at=incident.created_at,
        version=1,
        dedup_key=None,
        occurrences=1,
        last_seen_at=incident.created_at,
        ended_at=None,
    )
    assert before <= incident.created_at <= datetime.now(UTC) + timedelta(seconds=1)
    assert await incidents.get(1) == incident


async def test_fields_have_their_annotated_types(incidents: Verbs) -> None:
    """Enums, integers, strings and UTC times keep their types, whichever verb returns them."""
    created = await incidents.create("Disk is full", source="monitoring", dedup_key="disk")
    for incident in (created, await incidents.get(1), *await incidents.list()):
        assert type(incident) is Incident
        assert type(incident.incident_id) is type(incident.version) is int
        assert type(incident.incident_message) is type(incident.dedup_key) is str
        assert type(incident.incident_type) is IncidentStatus
        assert type(incident.source) is IncidentSource
        assert incident.created_at.tzinfo is incident.last_seen_at.tzinfo is UTC
        assert incident.created_at.microsecond == incident.last_seen_at.microsecond == 0


@pytest.mark.parametrize(
    "message",
    ["\U0001f525" * 1000, '\'; DROP TABLE "Incident"; --', "a\x01b\u202ecd", "100 % :of {it} $1 ?"],
    ids=["long", "quotes", "control", "placeholders"],
)
async def test_a_valid_message_is_stored_unchanged(incidents: Verbs, message: str) -> None:
    """Length, quotes and unusual characters do not change a message."""
    incident = await incidents.create(message, source="partner")
    assert incident.incident_message == message
    assert (await incidents.get(incident.incident_id)).incident_message == message


async def test_surrounding_white_space_is_removed(incidents: Verbs) -> None:
    """Whitespace around a message is stripped."""
    incident = await incidents.create(" \t Disk is full on db-1\n", source="monitoring")
    assert incident.incident_message == "Disk is full on db-1"


@pytest.mark.parametrize("status", IncidentStatus)
async def test_it_starts_with_the_given_status(incidents: Verbs, status: IncidentStatus) -> None:
    """An incident can start with any status; unless it is `new`, it has already ended."""
    incident = await incidents.create("All is well", source="operator", incident_type=status)
    assert incident.incident_type is status
    assert incident.ended_at == (None if status is IncidentStatus.NEW else incident.created_at)
    assert await incidents.get(incident.incident_id) == incident


async def test_it_accepts_a_new_incident(incidents: Verbs) -> None:
    """`create` accepts a NewIncident instead of fields, but not together with them."""
    new = NewIncident("Disk is full", "operator", "failed")
    incident = await incidents.create(new)
    assert (incident.source, incident.incident_type) == ("operator", "failed")
    call: Any = incidents.create
    for fields in ({"source": "partner"}, {"incident_type": "failed"}, {"dedup_key": "disk"}):
        with pytest.raises(TypeError, match="without further fields"):
            await call(new, **fields)
    assert await incidents.list() == [incident]


async def test_equal_incidents_get_different_ids(incidents: Verbs) -> None:
    """Without a key, each call creates another incident with the next id."""
    first = await incidents.create("Disk is full", source="monitoring")
    second = await incidents.create(NewIncident("Disk is full", "monitoring"))
    assert (first.incident_id, second.incident_id) == (1, 2)
    assert second.dedup_key is None


async def test_every_invalid_field_is_named(incidents: Verbs) -> None:
    """One error names every invalid field and the allowed values."""
    wrong: Any = "wrong"
    with pytest.raises(InvalidIncident, match="operator, monitoring, partner") as caught:
        await incidents.create(" tEsT ", source=wrong, incident_type=wrong, dedup_key="")
    fields = [error.field for error in caught.value.errors]
    assert fields == ["incident_message", "source", "incident_type", "dedup_key"]
    assert await incidents.list() == []


async def test_invalid_values_are_refused(incidents: Verbs) -> None:
    """An invalid value is named, and nothing is stored."""
    create: Any = incidents.create
    for message in ("", "four", "x" * 1001, "NULL", "a\x00bcd", "\ud800abcd", None, 12345):
        assert await refused(create(message, source="partner")) == ["incident_message"]
    for source in (None, "", "PARTNER", 1):
        assert await refused(create("Disk is full", source=source)) == ["source"]
    assert await refused(create("Disk is full")) == ["source"]
    for status in (None, "open", "NEW", 1):
        call = create("Disk is full", source="partner", incident_type=status)
        assert await refused(call) == ["incident_type"]
    assert await incidents.list() == []


async def test_concurrent_creates_are_all_stored(incidents: Verbs) -> None:
    """More concurrent creates than connections all succeed, each with its own id."""
    created = await asyncio.gather(
        *(incidents.create(f"Disk {n} is full", source="monitoring") for n in range(60))
    )
    assert sorted(incident.incident_id for incident in created) == list(range(1, 61))
    assert [incident.incident_message for incident in created] == [
        f"Disk {n} is full" for n in range(60)
    ]


@needs(Need.OUTSIDE_SQL)
async def test_ids_are_never_reused(incidents: Verbs, embodiment: Embodiment) -> None:
    """The id of a deleted incident is not given to another one."""
    await incidents.create("Disk is full", source="monitoring")
    await embodiment.sql('DELETE FROM "Incident"')
    assert (await incidents.create("Disk is full", source="monitoring")).incident_id == 2


@needs(Need.OUTSIDE_SQL, Need.GOING_ON)
async def test_nothing_is_stored_if_the_event_fails(
    incidents: Verbs, embodiment: Embodiment
) -> None:
    """If its event cannot be written, the incident is not stored either."""
    await embodiment.sql("ALTER TABLE incident_event RENAME COLUMN note TO remark")
    with pytest.raises(StoreError):
        await incidents.create("Line is down", source="monitoring")
    await embodiment.sql("ALTER TABLE incident_event RENAME COLUMN remark TO note")
    assert await incidents.list() == []
    assert await embodiment.sql("SELECT * FROM incident_event") == []

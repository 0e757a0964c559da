"""What happened to an incident is remembered, with who did it, on both databases."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text

from incidentkit import (
    EventKind,
    IncidentClient,
    IncidentEvent,
    IncidentNotFound,
    IncidentStatus,
    InvalidIncident,
    StoreError,
    acting_as,
)
from incidentkit.domain.cursor import encode_cursor
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


def told(events: list[IncidentEvent]) -> list[tuple[Any, ...]]:
    """What events say, without their cursors and times."""
    return [
        (event.kind, event.from_status, event.to_status, event.actor, event.note)
        for event in events
    ]


async def test_each_change_leaves_an_event(incidents: IncidentClient) -> None:
    """Creation, changes of the status and notes are told in their order, by whom and why."""
    before = datetime.now(UTC).replace(microsecond=0)
    incident = await incidents.create("Disk is full", source="monitoring")
    with acting_as("alice"):
        await incidents.update_status(incident.incident_id, "failed", note=" Could not be mended ")
        note = await incidents.note(incident.incident_id, "A new disk is ordered")
    await incidents.update_status(incident.incident_id, "new")
    events = await incidents.history(incident.incident_id)
    assert told(events) == [
        (EventKind.CREATED, None, IncidentStatus.NEW, None, None),
        (
            EventKind.STATUS_CHANGED,
            IncidentStatus.NEW,
            IncidentStatus.FAILED,
            "alice",
            "Could not be mended",
        ),
        (EventKind.NOTED, None, None, "alice", "A new disk is ordered"),
        (EventKind.STATUS_CHANGED, IncidentStatus.FAILED, IncidentStatus.NEW, None, None),
    ]
    assert note == events[2]
    assert {event.incident_id for event in events} == {incident.incident_id}
    assert len({event.cursor for event in events}) == 4
    for event in events:
        assert event.at.tzinfo is UTC
        assert before <= event.at <= datetime.now(UTC) + timedelta(seconds=1)


async def test_setting_the_status_that_it_has_is_no_change(incidents: IncidentClient) -> None:
    """A repeated change leaves incident and history as they are, but for its note."""
    incident = await incidents.create("Disk is full", source="monitoring")
    done = await incidents.update_status(incident.incident_id, "completed")
    assert await incidents.update_status(incident.incident_id, "completed") == done
    assert len(await incidents.history(incident.incident_id)) == 2
    assert await incidents.update_status(incident.incident_id, "completed", note="Twice") == done
    assert told(await incidents.history(incident.incident_id))[2:] == [
        (EventKind.NOTED, None, None, None, "Twice")
    ]


async def test_version_and_end_follow_the_status(incidents: IncidentClient) -> None:
    """Each change counts the version; the end is when the status left `new`, and goes with it."""
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
    born_ended = await incidents.create("All is well", source="operator", incident_type="completed")
    assert born_ended.ended_at == born_ended.created_at


async def test_the_innermost_actor_counts_and_ends_with_its_block(
    incidents: IncidentClient,
) -> None:
    """Actors nest, and outside of their blocks nobody is named."""
    incident = await incidents.create("Disk is full", source="monitoring")
    with acting_as("alice"):
        with acting_as("bob"):
            await incidents.note(incident.incident_id, "inner")
        await incidents.note(incident.incident_id, "outer")
    await incidents.note(incident.incident_id, "nobody")
    events = await incidents.history(incident.incident_id)
    assert [(event.note, event.actor) for event in events[1:]] == [
        ("inner", "bob"),
        ("outer", "alice"),
        ("nobody", None),
    ]


async def test_each_task_has_its_own_actor(incidents: IncidentClient) -> None:
    """Concurrent tasks never write under each other's names, and tasks inherit the name."""
    names = [f"user {number}" for number in range(20)]

    async def work(name: str) -> int:
        with acting_as(name):
            created = asyncio.create_task(incidents.create("Disk is full", source="operator"))
            await asyncio.sleep(0)
            return (await created).incident_id

    ids = await asyncio.gather(*map(work, names))
    for name, incident_id in zip(names, ids, strict=True):
        assert [event.actor for event in await incidents.history(incident_id)] == [name]


@pytest.mark.parametrize("actor", ["", "x" * 256, "a\x00b", None, 7])
def test_an_actor_that_cannot_be_stored_is_refused(actor: Any) -> None:
    """A name has 1 to 255 characters, and is refused before anything is done."""
    with pytest.raises(InvalidIncident) as caught, acting_as(actor):
        raise AssertionError
    assert [error.field for error in caught.value.errors] == ["actor"]


@pytest.mark.parametrize("note", ["", "  \n ", "x" * 1001, "a\x00b", "\ud800", None, 7])
async def test_a_note_that_cannot_be_stored_is_refused(
    incidents: IncidentClient, note: Any
) -> None:
    """A note has 1 to 1000 characters; a wrong id is told beside it."""
    with pytest.raises(InvalidIncident) as caught:
        await incidents.note(0, note)
    assert [error.field for error in caught.value.errors] == ["incident_id", "note"]
    if note is not None:
        with pytest.raises(InvalidIncident) as caught:
            await incidents.update_status(0, "failed", note=note)
        assert [error.field for error in caught.value.errors] == ["incident_id", "note"]


async def test_a_long_history_is_read_in_parts(incidents: IncidentClient) -> None:
    """From any cursor the history goes on behind that event, to its end."""
    incident = await incidents.create("Disk is full", source="monitoring")
    other = await incidents.create("Line is down", source="monitoring")
    for number in range(9):
        await incidents.note(incident.incident_id, f"note {number}")
        await incidents.note(other.incident_id, "of another")
    whole = await incidents.history(incident.incident_id)
    assert len(whole) == 10
    parts: list[IncidentEvent] = []
    while part := await incidents.history(
        incident.incident_id, limit=3, after=parts[-1].cursor if parts else None
    ):
        assert len(part) <= 3
        parts += part
    assert parts == whole


async def test_faulty_arguments_of_a_history_are_all_told(incidents: IncidentClient) -> None:
    """A wrong id, limit and cursor come in one error, and so does another incident's cursor."""
    with pytest.raises(InvalidIncident) as caught:
        await incidents.history(0, limit=1001, after="?")
    assert [error.field for error in caught.value.errors] == ["incident_id", "limit", "after"]
    for after in (encode_cursor(1, 1, 1, 2), encode_cursor(1, 1, 1), "", 7, "A" * 43 + "="):
        with pytest.raises(InvalidIncident) as caught:
            await incidents.history(1, after=after)  # type: ignore[arg-type]
        assert [error.field for error in caught.value.errors] == ["after"]


async def test_nothing_is_known_of_an_incident_that_never_was(incidents: IncidentClient) -> None:
    """An unknown id has no history and takes no note."""
    with pytest.raises(IncidentNotFound):
        await incidents.history(99)
    with pytest.raises(IncidentNotFound):
        await incidents.note(99, "Nobody knows it")


async def test_an_incident_of_another_program_has_an_empty_history(
    incidents: IncidentClient, url: str
) -> None:
    """A row that SQL put there has every field, and its history begins with its first change."""
    engine = migration_engine(url)
    async with engine.begin() as connection:
        await connection.execute(
            text(
                'INSERT INTO "Incident" (incident_message, incident_type, source) '
                "VALUES ('By hand', 'new', 'operator')"
            )
        )
    await engine.dispose()
    (incident,) = await incidents.list()
    assert (incident.version, incident.occurrences, incident.dedup_key) == (1, 1, None)
    assert incident.last_seen_at == incident.created_at
    assert await incidents.history(incident.incident_id) == []
    await incidents.update_status(incident.incident_id, "completed")
    assert len(await incidents.history(incident.incident_id)) == 1


async def test_an_event_that_cannot_be_written_takes_its_change_back(
    incidents: IncidentClient, url: str
) -> None:
    """Incident and event are stored together or not at all."""
    kept = await incidents.create("Disk is full", source="monitoring")
    engine = migration_engine(url)
    async with engine.begin() as connection:
        await connection.execute(text("ALTER TABLE incident_event RENAME COLUMN note TO remark"))
    for call in (
        incidents.create("Line is down", source="monitoring"),
        incidents.update_status(kept.incident_id, "failed"),
        incidents.note(kept.incident_id, "It is lost"),
    ):
        with pytest.raises(StoreError):
            await call
    async with engine.begin() as connection:
        await connection.execute(text("ALTER TABLE incident_event RENAME COLUMN remark TO note"))
    await engine.dispose()
    assert await incidents.list() == [kept]
    assert len(await incidents.history(kept.incident_id)) == 1


async def test_concurrent_changes_are_an_unbroken_chain(incidents: IncidentClient) -> None:
    """However changes race, each begins with the status that the one before it left."""
    incident = await incidents.create("Disk is full", source="monitoring")
    statuses = [*IncidentStatus] * 15
    await asyncio.gather(
        *(incidents.update_status(incident.incident_id, status) for status in statuses)
    )
    events = await incidents.history(incident.incident_id)
    for earlier, later in pairwise(events):
        assert later.from_status is earlier.to_status
        assert later.to_status is not later.from_status
    now = await incidents.get(incident.incident_id)
    assert now.incident_type is events[-1].to_status
    assert now.version == len(events)

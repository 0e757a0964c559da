"""Following changes to all incidents."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from incidentkit import ChangePage, EventKind, UnknownCursor, acting_as
from tests.conformance.gaps import Need, needs
from tests.conformance.refusals import refused
from tests.feed import take

if TYPE_CHECKING:
    from incidentkit import IncidentEvent
    from tests.conformance.embodiments import Embodiment, Verbs

pytestmark = needs(Need.CHANGES)


async def some_changes(incidents: Verbs) -> None:
    """Make seven changes to two incidents."""
    with acting_as("alice"):
        first = await incidents.create("Disk is full", source="monitoring", dedup_key="disk")
        second = await incidents.create("Line is down", source="partner")
        await incidents.note(first.incident_id, "It is db-1")
        await incidents.update_status(second.incident_id, "failed", note="No line")
        await incidents.create("Disk is full", source="monitoring", dedup_key="disk")
        await incidents.update_status(first.incident_id, "completed")
        await incidents.update_status(second.incident_id, "new")


async def test_the_feed_has_every_change_once_in_order(incidents: Verbs) -> None:
    """The feed delivers every event of every history, in the order of the changes."""
    await some_changes(incidents)
    changes = await take(incidents, 7)
    assert [(change.incident_id, change.kind) for change in changes] == [
        (1, EventKind.CREATED),
        (2, EventKind.CREATED),
        (1, EventKind.NOTED),
        (2, EventKind.STATUS_CHANGED),
        (1, EventKind.RECURRED),
        (1, EventKind.STATUS_CHANGED),
        (2, EventKind.STATUS_CHANGED),
    ]
    assert {change.actor for change in changes} == {"alice"}
    for incident_id in (1, 2):
        own = [change for change in changes if change.incident_id == incident_id]
        assert own == await incidents.history(incident_id)


@pytest.mark.parametrize("limit", [1, 3, 1000])
async def test_polling_returns_the_same_changes(incidents: Verbs, limit: int) -> None:
    """Pages of any size deliver every change exactly once."""
    await some_changes(incidents)
    changes: list[IncidentEvent] = []
    after = None
    while len(changes) < 7:
        page = await incidents.read_changes(after, limit=limit, wait=10)
        assert len(page.changes) <= limit
        changes += page.changes
        after = page.next
    last = changes[-1].cursor
    assert after == last
    assert await incidents.read_changes(after, limit=limit) == ChangePage([], last)
    assert changes == await take(incidents, 7)


async def test_reading_resumes_after_any_cursor(incidents: Verbs) -> None:
    """A cursor from the feed or from a history resumes right after its change."""
    await some_changes(incidents)
    changes = await take(incidents, 7)
    for number, change in enumerate(changes[:-1], 1):
        assert await take(incidents, 7 - number, change.cursor) == changes[number:]
    (created, *_) = await incidents.history(2)
    assert await take(incidents, 5, created.cursor) == changes[2:]


@needs(Need.OTHER_CLIENT)
async def test_another_client_can_use_a_cursor(incidents: Verbs, other: Verbs) -> None:
    """One client resumes where another client stopped."""
    await some_changes(incidents)
    changes = await take(incidents, 7)
    assert await take(other, 4, changes[2].cursor) == changes[3:]
    assert await other.read_changes(changes[-1].cursor) == ChangePage([], changes[-1].cursor)


@pytest.mark.parametrize("after", [None, "latest"])
async def test_an_empty_feed_has_a_cursor(incidents: Verbs, after: str | None) -> None:
    """A reader that begins before the first change continues from its cursor, and misses none."""
    page = await incidents.read_changes(after)
    assert page.changes == []
    assert await incidents.read_changes(page.next, wait=0.01) == page
    created = await incidents.create("Disk is full", source="monitoring")
    assert await take(incidents, 1, page.next) == await incidents.history(created.incident_id)


@needs(Need.PURGE)
async def test_the_feed_goes_on_after_everything_was_purged(incidents: Verbs) -> None:
    """A cursor from before the first change, and one from after the purge, both continue."""
    empty = (await incidents.read_changes("latest")).next
    created = await incidents.create("Disk is full", source="monitoring")
    await incidents.update_status(created.incident_id, "completed")
    await take(incidents, 2, empty)
    assert await incidents.purge(datetime.now(UTC) + timedelta(hours=1)) == 1
    (purged,) = await take(incidents, 1, empty)
    assert purged.kind is EventKind.PURGED
    page = await incidents.read_changes("latest")
    assert page == ChangePage([], purged.cursor)
    await incidents.create("Line is down", source="partner")
    (change,) = await take(incidents, 1, page.next)
    assert change.kind is EventKind.CREATED


async def test_latest_skips_earlier_changes(incidents: Verbs) -> None:
    """Starting from `latest` skips earlier changes and delivers later ones."""
    await some_changes(incidents)
    # Other tests' transactions on the server may delay the feed.
    await take(incidents, 7)
    page = await incidents.read_changes("latest")
    assert page.changes == []
    await incidents.note(1, "later")
    (change,) = await take(incidents, 1, page.next)
    assert change.note == "later"


async def test_a_change_wakes_waiting_readers(incidents: Verbs) -> None:
    """Waiting readers and followers receive a change as soon as it is made."""
    waiting = [asyncio.ensure_future(incidents.read_changes(wait=30)) for _ in range(3)]
    following = asyncio.ensure_future(take(incidents, 1))
    created = await incidents.create("Disk is full", source="monitoring")
    pages = await asyncio.gather(*waiting)
    for changes in (*(page.changes for page in pages), await following):
        assert [change.incident_id for change in changes] == [created.incident_id]


@needs(Need.OTHER_CLIENT)
async def test_a_follower_receives_changes_from_another_client(
    incidents: Verbs, other: Verbs
) -> None:
    """A waiting follower receives the changes that another client makes."""
    taking = asyncio.ensure_future(take(incidents, 3))
    try:
        for number in range(3):
            await other.create(f"Disk {number} is full", source="monitoring")
        assert len(await incidents.list()) == 3
        assert [change.incident_id for change in await taking] == [1, 2, 3]
    finally:
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)


@needs(Need.PURGE)
async def test_a_cursor_survives_the_purge_of_its_incident(incidents: Verbs) -> None:
    """A cursor of a purged event still resumes, and the purge itself is delivered."""
    await some_changes(incidents)
    changes = await take(incidents, 7)
    await incidents.purge(datetime.now(UTC) + timedelta(hours=1))
    rest = await take(incidents, 3, changes[2].cursor)
    assert [(change.incident_id, change.kind) for change in rest] == [
        (2, EventKind.STATUS_CHANGED),
        (2, EventKind.STATUS_CHANGED),
        (1, EventKind.PURGED),
    ]


@needs(Need.OUTSIDE_SQL)
async def test_a_cursor_from_another_database_is_unknown(
    incidents: Verbs, embodiment: Embodiment
) -> None:
    """Polling and following refuse the cursor of an event that this database never had."""
    await incidents.create("Disk is full", source="monitoring")
    (change,) = await take(incidents, 1)
    await embodiment.sql("UPDATE incident_event SET nonce = nonce / 2 + 1")
    with pytest.raises(UnknownCursor):
        await incidents.read_changes(change.cursor)
    with pytest.raises(UnknownCursor):
        await take(incidents, 1, change.cursor)


async def test_invalid_arguments_are_refused(incidents: Verbs) -> None:
    """Polling and following name each invalid argument."""
    for _ in range(2):
        await incidents.create("Disk is full", source="monitoring")
    of_a_search = (await incidents.search(limit=1)).next
    faulty: list[tuple[dict[str, Any], list[str]]] = [
        ({"after": ""}, ["after"]),
        ({"after": "Latest"}, ["after"]),
        ({"after": of_a_search}, ["after"]),
        ({"after": 7, "limit": 0, "wait": 31}, ["after", "limit", "wait"]),
        ({"limit": 1001}, ["limit"]),
        ({"limit": None}, ["limit"]),
        ({"wait": -1}, ["wait"]),
        ({"wait": float("nan")}, ["wait"]),
        ({"wait": True}, ["wait"]),
    ]
    for arguments, fields in faulty:
        assert await refused(incidents.read_changes(**arguments)) == fields
        if "after" in arguments:
            assert await refused(take(incidents, 1, arguments["after"])) == ["after"]

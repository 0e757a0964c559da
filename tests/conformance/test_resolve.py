"""Ending open incidents by their deduplication keys."""

from __future__ import annotations

from itertools import count, pairwise
from typing import TYPE_CHECKING, Any

import pytest
from attrs import evolve

from incidentkit import (
    EventKind,
    IdempotencyKeyReused,
    IllegalTransition,
    IncidentStatus,
    NewIncident,
    StoreError,
    acting_as,
)
from tests.conformance.concurrency import run_all
from tests.conformance.gaps import Need, needs
from tests.conformance.refusals import refused
from tests.conformance.test_update_status import told

if TYPE_CHECKING:
    from incidentkit import Incident
    from tests.conformance.embodiments import Embodiment, Verbs


async def report(incidents: Verbs, key: str = "disk") -> Incident:
    """Report a full disk."""
    return await incidents.create("Disk is full", source="monitoring", dedup_key=key)


async def test_the_open_incident_of_the_key_ends(incidents: Verbs) -> None:
    """It is returned as ended, with its event; incidents of other keys stay open."""
    await report(incidents)
    opened = await report(incidents)
    others = [await report(incidents, key) for key in ("Disk", "disk ")]
    with acting_as("watchdog"):
        ended = await incidents.resolve("disk", note=" Logs were rotated ")
    assert ended is not None
    assert ended.ended_at is not None
    assert ended == evolve(
        opened, incident_type=IncidentStatus.COMPLETED, version=3, ended_at=ended.ended_at
    )
    assert await incidents.list() == [*others[::-1], ended]
    assert told((await incidents.history(ended.incident_id))[-1]) == (
        EventKind.STATUS_CHANGED,
        IncidentStatus.NEW,
        IncidentStatus.COMPLETED,
        "watchdog",
        "Logs were rotated",
    )


async def test_without_an_open_incident_nothing_happens(incidents: Verbs) -> None:
    """The answer is None for an unknown key, and for one whose incident has ended."""
    assert await incidents.resolve("disk") is None
    await report(incidents)
    failed = await incidents.resolve("disk", status="failed")
    assert failed is not None
    assert failed.incident_type is IncidentStatus.FAILED
    assert await incidents.resolve("disk", note="Once more") is None
    assert await incidents.get(failed.incident_id) == failed
    assert len(await incidents.history(failed.incident_id)) == 2


async def test_the_next_report_opens_another_incident(incidents: Verbs) -> None:
    """A key can be reported and resolved again and again; each incident ends once."""
    for number in range(1, 4):
        assert (await report(incidents)).incident_id == number
        ended = await incidents.resolve("disk")
        assert ended is not None
        assert (ended.incident_id, ended.version) == (number, 2)


async def test_many_end_in_the_order_of_their_keys(incidents: Verbs) -> None:
    """The answers are in the order of the keys: None where none is open, or was just ended."""
    opened = await incidents.create_many(
        [NewIncident(f"Disk {key} is full", "monitoring", dedup_key=key) for key in "abcd"]
    )
    await incidents.resolve("c")
    with acting_as("watchdog"):
        answers = await incidents.resolve_many(
            iter(["d", "x", "b", "c", "d"]), status="failed", note="Gave up"
        )
    assert [answer and answer.dedup_key for answer in answers] == ["d", None, "b", None, None]
    for answer in (answers[0], answers[2]):
        assert answer is not None
        assert (answer.incident_type, answer.version) == (IncidentStatus.FAILED, 2)
        assert await incidents.get(answer.incident_id) == answer
        assert told((await incidents.history(answer.incident_id))[-1]) == (
            EventKind.STATUS_CHANGED,
            IncidentStatus.NEW,
            IncidentStatus.FAILED,
            "watchdog",
            "Gave up",
        )
    assert await incidents.get(opened[0].incident_id) == opened[0]
    assert await incidents.resolve_many([]) == []


async def test_the_transitions_apply(embodiment: Embodiment) -> None:
    """An illegal end is refused if an incident is open, and then none of several ends."""
    async with embodiment.open(transitions={"new": ["failed"]}) as incidents:
        assert await incidents.resolve("disk") is None
        assert await incidents.resolve_many(["disk"]) == [None]
        opened = await report(incidents)
        await report(incidents, "line")
        for call in (incidents.resolve("disk"), incidents.resolve_many(["x", "disk", "line"])):
            with pytest.raises(IllegalTransition) as caught:
                await call
            assert caught.value.incident == opened
            assert caught.value.to_status is IncidentStatus.COMPLETED
        assert len(await incidents.history(opened.incident_id)) == 1
        answers = await incidents.resolve_many(["disk", "line"], status="failed")
        assert [answer and answer.version for answer in answers] == [2, 2]


async def test_a_retry_returns_the_first_answer(incidents: Verbs) -> None:
    """A repeated idempotency key changes nothing, also if the first answer was None."""
    assert await incidents.resolve("disk", idempotency_key="none") is None
    await report(incidents)
    await report(incidents, "line")
    assert await incidents.resolve("disk", idempotency_key="none") is None
    ended = await incidents.resolve("disk", note="Mended", idempotency_key="one")
    assert ended is not None
    many = await incidents.resolve_many(["disk", "line"], idempotency_key="many")
    assert [answer and answer.dedup_key for answer in many] == [None, "line"]
    await report(incidents)
    assert await incidents.resolve("disk", note="Mended", idempotency_key="one") == ended
    assert await incidents.resolve_many(iter(["disk", "line"]), idempotency_key="many") == many
    reused: tuple[Any, ...] = (
        incidents.resolve("disk", idempotency_key="one"),
        incidents.resolve_many(["disk"], note="Mended", idempotency_key="one"),
        incidents.resolve_many(["line", "disk"], idempotency_key="many"),
    )
    for call in reused:
        with pytest.raises(IdempotencyKeyReused):
            await call
    statuses = [incident.incident_type for incident in await incidents.list()]
    assert statuses == ["new", "completed", "completed"]


async def test_every_invalid_argument_is_named(incidents: Verbs) -> None:
    """One error names every invalid argument, a faulty key by its place; nothing ends."""
    opened = await report(incidents)
    one: Any = incidents.resolve
    many: Any = incidents.resolve_many
    fields = ["dedup_key", "status", "note"]
    assert await refused(one("", status="new", note="")) == fields
    assert await refused(many("disk", status="open", note=7)) == ["dedup_keys", *fields[1:]]
    for wrong in ("", "x" * 256, "a\x00b", "\ud800", None, 7, ["disk"]):
        assert await refused(one(wrong)) == ["dedup_key"]
        assert await refused(many(["disk", "b", "c", wrong, wrong])) == [
            "dedup_keys[3]",
            "dedup_keys[4]",
        ]
    for status in ("new", IncidentStatus.NEW, "", "COMPLETED", None, 1):
        assert await refused(one("disk", status=status)) == ["status"]
        assert await refused(many(["disk"], status=status)) == ["status"]
    for keys in ("disk", b"disk", {"disk": 1}, None, 7, map(str, count())):
        assert await refused(many(keys)) == ["dedup_keys"]
    assert len(await refused(many([""] * 100_000))) == 10
    assert await refused(one("disk", idempotency_key="")) == ["idempotency_key"]
    assert await incidents.list() == [opened]


async def check_chain(incidents: Verbs, clients: list[Verbs]) -> None:
    """Report and resolve the same keys concurrently, and check that nothing got lost."""
    keys = ("a", "b", "c")
    ended: list[Incident | None] = []

    async def reports(client: Verbs, key: str) -> None:
        for _ in range(6):
            await report(client, key)

    async def resolutions(client: Verbs, order: tuple[str, ...]) -> None:
        for number in range(4):
            if number % 2:
                ended.extend(await client.resolve_many(order))
            else:
                ended.append(await client.resolve(order[0]))

    await run_all(
        *(reports(client, key) for client in clients for key in keys),
        *(resolutions(client, order) for client in clients for order in (keys, keys[::-1])),
    )
    found = (await incidents.search(limit=1000)).incidents
    stored = [incident for incident in found if incident.dedup_key in keys]
    assert sum(incident.occurrences for incident in stored) == 6 * len(clients) * len(keys)
    gone = [incident.incident_id for incident in ended if incident is not None]
    assert len(gone) == len(set(gone))
    assert sorted(gone) == sorted(each.incident_id for each in stored if each.ended_at)
    for key in keys:
        of_key = [incident for incident in stored if incident.dedup_key == key]
        assert sum(incident.incident_type == "new" for incident in of_key) <= 1
    for incident in stored:
        events = await incidents.history(incident.incident_id)
        assert len(events) == incident.version
        assert [event.kind for event in events[1:-1]] == [EventKind.RECURRED] * (len(events) - 2)
        assert all(earlier.at <= later.at for earlier, later in pairwise(events))


async def test_concurrent_reports_and_resolutions_lose_nothing(incidents: Verbs) -> None:
    """Each report is counted once, each incident ends once, and no key has two open incidents."""
    await check_chain(incidents, [incidents])


@needs(Need.OTHER_CLIENT)
async def test_two_clients_lose_nothing(incidents: Verbs, other: Verbs) -> None:
    """The same holds for two clients, which end the same keys in opposite orders."""
    await report(incidents)
    assert await other.resolve("disk") is not None
    await check_chain(incidents, [incidents, other])


@needs(Need.OUTSIDE_SQL, Need.GOING_ON)
async def test_nothing_ends_if_the_event_fails(incidents: Verbs, embodiment: Embodiment) -> None:
    """If the event cannot be written, the incident stays open."""
    opened = await report(incidents)
    await embodiment.sql("ALTER TABLE incident_event RENAME COLUMN note TO remark")
    for call in (incidents.resolve("disk"), incidents.resolve_many(["disk"])):
        with pytest.raises(StoreError):
            await call
    await embodiment.sql("ALTER TABLE incident_event RENAME COLUMN remark TO note")
    assert await incidents.list() == [opened]
    assert len(await incidents.history(1)) == 1

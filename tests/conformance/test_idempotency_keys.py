"""Repeated writes with an idempotency key."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from incidentkit import (
    IdempotencyKeyReused,
    IncidentNotFound,
    IncidentStatus,
    NewIncident,
    StoreError,
    VersionConflict,
    acting_as,
)
from tests.conformance.concurrency import run_all
from tests.conformance.gaps import Need, needs
from tests.conformance.refusals import refused

if TYPE_CHECKING:
    from incidentkit import Incident
    from tests.conformance.embodiments import Embodiment, Verbs

DISK_FULL = NewIncident("Disk is full", "monitoring")


async def test_a_repeated_create_returns_the_first_result(incidents: Verbs) -> None:
    """A repeated key creates nothing, even after the incident has changed."""
    first = await incidents.create(DISK_FULL, idempotency_key="report 7")
    await incidents.update_status(first.incident_id, "failed")
    assert await incidents.create(DISK_FULL, idempotency_key="report 7") == first
    assert (
        await incidents.create(" Disk is full ", source="monitoring", idempotency_key="report 7")
        == first
    )
    assert len(await incidents.list()) == 1
    assert len(await incidents.history(first.incident_id)) == 2


async def test_a_repeated_change_returns_the_first_result(incidents: Verbs) -> None:
    """A status change is made once, even if another change came in between."""
    await incidents.create(DISK_FULL)
    done = await incidents.update_status(
        1, "completed", note="Mended", expected_version=1, idempotency_key="k"
    )
    await incidents.update_status(1, "new")
    again = await incidents.update_status(
        1, "completed", note="Mended", expected_version=1, idempotency_key="k"
    )
    assert again == done
    assert (await incidents.get(1)).incident_type is IncidentStatus.NEW
    assert len(await incidents.history(1)) == 3


async def test_a_repeated_create_many_returns_the_first_result(incidents: Verbs) -> None:
    """A repeated key returns the incidents as they were first created, and creates none."""
    new = [NewIncident(f"Disk {n} is full", "monitoring") for n in range(3)]
    first = await incidents.create_many(new, idempotency_key="import 7")
    await incidents.update_status(first[1].incident_id, "failed")
    assert await incidents.create_many(iter(new), idempotency_key="import 7") == first
    assert len(await incidents.list()) == 3


async def test_a_repeated_occurrence_is_counted_once(incidents: Verbs) -> None:
    """A retried report of an open incident counts once."""
    disk = NewIncident("Disk is full", "monitoring", dedup_key="disk")
    for _ in range(3):
        await incidents.create(disk)
    answers = [await incidents.create(disk, idempotency_key="k") for _ in range(3)]
    assert [answer.occurrences for answer in answers] == [4, 4, 4]
    assert (await incidents.get(1)).occurrences == 4


async def test_concurrent_retries_create_one(incidents: Verbs) -> None:
    """Concurrent retries all return the same result."""
    answers = await asyncio.gather(
        *(incidents.create(DISK_FULL, idempotency_key="k") for _ in range(15))
    )
    assert answers == [answers[0]] * 15
    assert len(await incidents.list()) == 1
    assert len(await incidents.history(1)) == 1


@needs(Need.OTHER_CLIENT)
async def test_concurrent_retries_from_two_clients_create_one(
    incidents: Verbs, other: Verbs
) -> None:
    """Concurrent retries from two clients all return the same result."""
    line_down = await incidents.create("Line is down", source="partner")
    answers = await run_all(
        *(client.create(DISK_FULL, idempotency_key="k") for client in (incidents, other) * 15)
    )
    assert answers == [answers[0]] * 30
    assert await incidents.list() == [answers[0], line_down]


async def test_a_key_cannot_be_reused_for_another_call(incidents: Verbs) -> None:
    """A used key with other parameters, or for another verb, is refused without effect."""
    incident = await incidents.create(DISK_FULL, idempotency_key="k")
    calls: tuple[Any, ...] = (
        incidents.create("Disk is full", source="operator", idempotency_key="k"),
        incidents.create("Disk is full", source="monitoring", dedup_key="d", idempotency_key="k"),
        incidents.create_many([DISK_FULL], idempotency_key="k"),
        incidents.update_status(1, "failed", idempotency_key="k"),
    )
    for call in calls:
        with pytest.raises(IdempotencyKeyReused) as caught:
            await call
        assert caught.value.idempotency_key == "k"
        assert [error.field for error in caught.value.errors] == ["idempotency_key"]
    assert await incidents.list() == [incident]
    assert len(await incidents.history(1)) == 1


async def test_a_key_of_create_many_cannot_be_reused_for_others(incidents: Verbs) -> None:
    """The key of a `create_many` is refused for more incidents and for a single one."""
    await incidents.create_many([DISK_FULL] * 3, idempotency_key="k")
    calls: tuple[Any, ...] = (
        incidents.create_many([DISK_FULL] * 4, idempotency_key="k"),
        incidents.create(DISK_FULL, idempotency_key="k"),
    )
    for call in calls:
        with pytest.raises(IdempotencyKeyReused):
            await call
    assert len(await incidents.list()) == 3


@needs(Need.BATCHES)
async def test_a_repeated_create_many_in_batches_returns_the_first_result(
    incidents: Verbs,
) -> None:
    """One key covers all batches: another size or another verb is refused."""
    new = [NewIncident(f"Disk {n} is full", "monitoring") for n in range(5)]
    first = await incidents.create_many(new, batch=2, idempotency_key="import 7")
    assert await incidents.create_many(new, batch=2, idempotency_key="import 7") == first
    calls: tuple[Any, ...] = (
        incidents.create_many(new, batch=3, idempotency_key="import 7"),
        incidents.create_many(new, idempotency_key="import 7"),
        incidents.create(DISK_FULL, idempotency_key="import 7"),
    )
    for call in calls:
        with pytest.raises(IdempotencyKeyReused):
            await call
    assert await incidents.list() == first[::-1]


@needs(Need.BATCHES, Need.ONE_KEY)
async def test_a_repeated_create_many_compares_all_batches(incidents: Verbs) -> None:
    """Other incidents in a later batch are refused before any batch is stored."""
    first = await incidents.create_many([DISK_FULL] * 5, batch=2, idempotency_key="import 7")
    other = [*[DISK_FULL] * 4, NewIncident("Line is down", "partner")]
    with pytest.raises(IdempotencyKeyReused):
        await incidents.create_many(other, batch=2, idempotency_key="import 7")
    assert await incidents.list() == first[::-1]


async def test_a_failed_write_frees_its_key(incidents: Verbs) -> None:
    """A refused write leaves its key free for the next attempt."""
    with pytest.raises(IncidentNotFound):
        await incidents.update_status(1, "failed", idempotency_key="k")
    await incidents.create(DISK_FULL)
    with pytest.raises(VersionConflict):
        await incidents.update_status(1, "failed", expected_version=2, idempotency_key="k")
    changed = await incidents.update_status(1, "failed", idempotency_key="k")
    assert changed.version == 2


async def test_invalid_keys_are_refused(incidents: Verbs) -> None:
    """Every verb that takes a key requires 1 to 255 characters."""
    await incidents.create(DISK_FULL)
    wrongs: tuple[Any, ...] = ("", "x" * 256, "a\x00b", "\ud800", 7)
    for key in wrongs:
        calls: tuple[Any, ...] = (
            incidents.create(DISK_FULL, idempotency_key=key),
            incidents.create_many([DISK_FULL], idempotency_key=key),
            incidents.update_status(1, "failed", idempotency_key=key),
            incidents.note(1, "It is hot", idempotency_key=key),
        )
        for call in calls:
            assert await refused(call) == ["idempotency_key"]
    assert len(await incidents.list()) == 1


@needs(Need.OUTSIDE_SQL)
async def test_a_key_expires_after_a_day(incidents: Verbs, embodiment: Embodiment) -> None:
    """After 24 hours, a key is free again, and other expired keys are removed."""
    for key in ("k", "other"):
        await incidents.create(DISK_FULL, idempotency_key=key)

    async def age(hours: float) -> None:
        at = embodiment.moment(datetime.now(UTC) - timedelta(hours=hours))
        await embodiment.sql(f"UPDATE incident_idempotency_key SET created_at = {at}")

    await age(23.9)
    await incidents.create(DISK_FULL, idempotency_key="k")
    assert len(await incidents.list()) == 2
    await age(24.1)
    again = await incidents.create("Line is down", source="operator", idempotency_key="k")
    assert again.incident_message == "Line is down"
    keys = await embodiment.sql("SELECT idempotency_key FROM incident_idempotency_key")
    assert keys == [("k",)]


@needs(Need.OUTSIDE_SQL)
async def test_nothing_is_stored_if_the_result_fails(
    incidents: Verbs, embodiment: Embodiment
) -> None:
    """If the result cannot be stored with the key, nothing is written."""
    await embodiment.sql("ALTER TABLE incident_idempotency_key RENAME COLUMN answer TO reply")
    with pytest.raises(StoreError):
        await incidents.create(DISK_FULL, idempotency_key="k")
    await embodiment.sql("ALTER TABLE incident_idempotency_key RENAME COLUMN reply TO answer")
    assert await incidents.list() == []
    for table in ("incident_event", "incident_idempotency_key"):
        assert await embodiment.sql(f"SELECT * FROM {table}") == []


async def test_each_actor_has_keys_of_its_own(incidents: Verbs) -> None:
    """A key of one actor, or of none, is free for another, whose retries get its own answers."""
    answers = {}
    for actor in (None, "alice", "bob"):
        with nullcontext() if actor is None else acting_as(actor):
            answers[actor] = await incidents.create(
                f"Disk of {actor} is full", source="monitoring", idempotency_key="k"
            )
            many = await incidents.create_many([DISK_FULL] * 2, idempotency_key="many")
            assert await incidents.create_many([DISK_FULL] * 2, idempotency_key="many") == many
    for actor, answer in answers.items():
        with nullcontext() if actor is None else acting_as(actor):
            again = await incidents.create(
                f"Disk of {actor} is full", source="monitoring", idempotency_key="k"
            )
            assert again == answer
            with pytest.raises(IdempotencyKeyReused):
                await incidents.create(DISK_FULL, idempotency_key="k")
    assert len(await incidents.list()) == 9


@needs(Need.OTHER_CLIENT)
async def test_concurrent_retries_of_two_actors_create_two(incidents: Verbs, other: Verbs) -> None:
    """Concurrent retries of each of two actors return that actor's one incident."""
    line_down = await incidents.create("Line is down", source="partner")

    async def create(client: Verbs, actor: str) -> Incident:
        with acting_as(actor):
            return await client.create(DISK_FULL, idempotency_key="k")

    actors = ["alice", "bob"] * 10
    clients = [incidents] * 10 + [other] * 10
    answers = await run_all(*map(create, clients, actors))
    assert answers == [*answers[:2]] * 10
    assert {one.incident_id for one in await incidents.list()} == {
        line_down.incident_id,
        *(answer.incident_id for answer in answers[:2]),
    }


@needs(Need.OUTSIDE_SQL)
async def test_a_key_lasts_a_day_though_that_of_another_actor_ends(
    incidents: Verbs, embodiment: Embodiment
) -> None:
    """An actor's key counts from its own first use, also if another actor used the key before."""
    with acting_as("alice"):
        await incidents.create(DISK_FULL, idempotency_key="k")
    at = embodiment.moment(datetime.now(UTC) - timedelta(hours=24.1))
    with acting_as("bob"):
        first = await incidents.create(DISK_FULL, idempotency_key="k")
        await embodiment.sql(
            f"UPDATE incident_idempotency_key SET created_at = {at} WHERE actor = 'alice'"
        )
        assert await incidents.create(DISK_FULL, idempotency_key="k") == first
        assert await incidents.create(DISK_FULL, idempotency_key="k") == first
    assert len(await incidents.list()) == 2


@needs(Need.OUTSIDE_SQL)
async def test_a_key_that_the_version_before_stored_is_found(
    incidents: Verbs, embodiment: Embodiment
) -> None:
    """A retry with an actor gets the answer that a process of the version before has stored."""
    with acting_as("alice"):
        first = await incidents.create(DISK_FULL, idempotency_key="k")
        await embodiment.sql("UPDATE incident_idempotency_key SET actor = NULL")
        assert await incidents.create(DISK_FULL, idempotency_key="k") == first
        with pytest.raises(IdempotencyKeyReused):
            await incidents.update_status(1, "failed", idempotency_key="k")
    assert await incidents.list() == [first]

"""Writes that are repeated: deduplication, idempotency and expected versions, on both databases."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text

from incidentkit import (
    DuplicateOpenIncident,
    EventKind,
    IdempotencyKeyReused,
    IncidentClient,
    IncidentNotFound,
    IncidentStatus,
    InvalidIncident,
    NewIncident,
    StoreError,
    StoreUnavailable,
    VersionConflict,
)
from incidentkit.store.migrate import migration_engine
from incidentkit.store.store import Store

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


async def run_sql(url: str, statement: str) -> list[Any]:
    """Run a statement as another program."""
    engine = migration_engine(url)
    async with engine.begin() as connection:
        result = await connection.execute(text(statement))
        rows = list(result.all()) if result.returns_rows else []
    await engine.dispose()
    return rows


# Deduplication


async def test_a_hundred_at_once_are_one_incident(incidents: IncidentClient, url: str) -> None:
    """Concurrent creates of several clients with one key make one incident, each counted once."""
    async with IncidentClient.open(url) as other:
        created = await asyncio.gather(
            *(
                client.create("Disk is full", source="monitoring", dedup_key="disk-full:db-1")
                for client in (incidents, other) * 50
            )
        )
    assert {incident.incident_id for incident in created} == {created[0].incident_id}
    assert sorted(incident.occurrences for incident in created) == [*range(1, 101)]
    (stored,) = await incidents.list()
    assert (stored.occurrences, stored.version) == (100, 100)
    kinds = [event.kind for event in await incidents.history(stored.incident_id)]
    assert kinds == [EventKind.CREATED, *[EventKind.RECURRED] * 99]


async def test_the_open_one_stays_as_it_is(incidents: IncidentClient, url: str) -> None:
    """A further occurrence changes only the count and the time; what it said is in the history."""
    first = await incidents.create("Disk is full", source="monitoring", dedup_key="disk")
    zone = "" if url.startswith("sqlite") else "+00"
    await run_sql(url, f"UPDATE \"Incident\" SET created_at = '2026-01-01 00:00:00{zone}'")
    again = await incidents.create("Disk is at 100 %", source="operator", dedup_key="disk")
    assert again.incident_id == first.incident_id
    assert again.incident_message == "Disk is full"
    assert again.source == "monitoring"
    assert again.created_at == datetime(2026, 1, 1, tzinfo=UTC)
    assert again.last_seen_at >= first.created_at
    assert await incidents.get(first.incident_id) == again
    await incidents.create("Disk is full", source="monitoring", dedup_key="disk")
    notes = [event.note for event in await incidents.history(first.incident_id)]
    assert notes == [None, "Disk is at 100 %", None]


async def test_after_its_end_the_key_opens_a_new_one(incidents: IncidentClient) -> None:
    """A key is for the incident that is open; after that has ended, for the next."""
    first = await incidents.create("Disk is full", source="monitoring", dedup_key="disk")
    await incidents.update_status(first.incident_id, "completed")
    second = await incidents.create("Disk is full", source="monitoring", dedup_key="disk")
    assert second.incident_id != first.incident_id
    assert second.occurrences == 1
    with pytest.raises(DuplicateOpenIncident) as caught:
        await incidents.update_status(first.incident_id, "new")
    assert caught.value.incident.incident_id == first.incident_id
    await incidents.update_status(second.incident_id, "failed")
    assert (await incidents.update_status(first.incident_id, "new")).ended_at is None


async def test_opening_again_and_creating_race_for_one_place(incidents: IncidentClient) -> None:
    """However opening and creating race, there is never more than one open with a key."""
    ended = []
    for _ in range(8):
        incident = await incidents.create("Disk is full", source="monitoring", dedup_key="disk")
        await incidents.update_status(incident.incident_id, "failed")
        ended.append(incident.incident_id)
    outcomes = await asyncio.gather(
        *(incidents.update_status(incident_id, "new") for incident_id in ended),
        *(
            incidents.create("Disk is full", source="monitoring", dedup_key="disk")
            for _ in range(8)
        ),
        return_exceptions=True,
    )
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            assert isinstance(outcome, (DuplicateOpenIncident, StoreUnavailable)), outcome
    assert len(await incidents.list(status="new")) == 1


async def test_without_a_key_each_is_a_new_one(incidents: IncidentClient) -> None:
    """Equal incidents without a key are two incidents."""
    first = await incidents.create("Disk is full", source="monitoring")
    second = await incidents.create(NewIncident("Disk is full", "monitoring"))
    assert first.incident_id != second.incident_id
    assert first.dedup_key is None


@pytest.mark.parametrize("key", ["", "x" * 256, "a\x00b", "\ud800", 7])
async def test_a_faulty_deduplication_key_is_refused(incidents: IncidentClient, key: Any) -> None:
    """A key has 1 to 255 characters."""
    with pytest.raises(InvalidIncident) as caught:
        await incidents.create("Disk is full", source="monitoring", dedup_key=key)
    assert [error.field for error in caught.value.errors] == ["dedup_key"]


@pytest.mark.parametrize("status", ["completed", "failed"])
async def test_a_key_is_for_what_starts_open(incidents: IncidentClient, status: str) -> None:
    """An incident that has ended from the start takes no key, as nothing could recur on it."""
    with pytest.raises(InvalidIncident, match="dedup_key needs the incident_type new"):
        await incidents.create(
            "Disk is full", source="monitoring", incident_type=status, dedup_key="disk"
        )


# Idempotency


async def test_a_repeated_create_returns_the_first_answer(incidents: IncidentClient) -> None:
    """With the same key nothing is made again, even after the incident changed."""
    new = NewIncident("Disk is full", "monitoring")
    first = await incidents.create(new, idempotency_key="report 7")
    await incidents.update_status(first.incident_id, "failed")
    assert await incidents.create(new, idempotency_key="report 7") == first
    assert (
        await incidents.create(" Disk is full ", source="monitoring", idempotency_key="report 7")
        == first
    )
    assert len(await incidents.list()) == 1
    assert len(await incidents.history(first.incident_id)) == 2


async def test_a_repeated_change_returns_the_first_answer(incidents: IncidentClient) -> None:
    """A change of the status is done once, also if another one came in between."""
    incident = await incidents.create("Disk is full", source="monitoring")
    done = await incidents.update_status(
        incident.incident_id, "completed", note="Mended", expected_version=1, idempotency_key="k"
    )
    await incidents.update_status(incident.incident_id, "new")
    again = await incidents.update_status(
        incident.incident_id, "completed", note="Mended", expected_version=1, idempotency_key="k"
    )
    assert again == done
    assert (await incidents.get(incident.incident_id)).incident_type is IncidentStatus.NEW
    assert len(await incidents.history(incident.incident_id)) == 3


async def test_a_counted_occurrence_is_counted_once(incidents: IncidentClient) -> None:
    """A retried occurrence of an open incident counts once."""
    for _ in range(3):
        await incidents.create("Disk is full", source="monitoring", dedup_key="disk")
    answers = [
        await incidents.create(
            "Disk is full", source="monitoring", dedup_key="disk", idempotency_key="k"
        )
        for _ in range(3)
    ]
    assert [answer.occurrences for answer in answers] == [4, 4, 4]
    assert (await incidents.list())[0].occurrences == 4


async def test_concurrent_retries_make_one(incidents: IncidentClient, url: str) -> None:
    """Retries at the same moment, from several clients, all get the one answer."""
    async with IncidentClient.open(url) as other:
        answers = await asyncio.gather(
            *(
                client.create("Disk is full", source="monitoring", idempotency_key="k")
                for client in (incidents, other) * 15
            )
        )
    assert len(await incidents.list()) == 1
    assert answers == [answers[0]] * 30


async def test_a_key_is_for_one_thing(incidents: IncidentClient) -> None:
    """Other parameters, or another verb, under a key that was used are refused; nothing happens."""
    incident = await incidents.create("Disk is full", source="monitoring", idempotency_key="k")
    for call in (
        incidents.create("Disk is full", source="operator", idempotency_key="k"),
        incidents.create("Disk is full", source="monitoring", dedup_key="d", idempotency_key="k"),
        incidents.update_status(incident.incident_id, "failed", idempotency_key="k"),
    ):
        with pytest.raises(IdempotencyKeyReused) as caught:
            await call
        assert caught.value.idempotency_key == "k"
    assert await incidents.list() == [incident]


async def test_what_failed_is_not_an_answer(incidents: IncidentClient) -> None:
    """A write that is refused leaves its key free for the next attempt."""
    with pytest.raises(IncidentNotFound):
        await incidents.update_status(1, "failed", idempotency_key="k")
    incident = await incidents.create("Disk is full", source="monitoring")
    with pytest.raises(VersionConflict):
        await incidents.update_status(
            incident.incident_id, "failed", expected_version=2, idempotency_key="k"
        )
    changed = await incidents.update_status(incident.incident_id, "failed", idempotency_key="k")
    assert changed.version == 2


async def test_a_key_is_kept_for_a_day(incidents: IncidentClient, url: str) -> None:
    """After 24 hours a key is free again, and others that are as old are removed."""
    for key in ("k", "other"):
        await incidents.create("Disk is full", source="monitoring", idempotency_key=key)

    async def age(hours: float) -> None:
        at = datetime.now(UTC) - timedelta(hours=hours)
        zone = "" if url.startswith("sqlite") else "+00"
        await run_sql(
            url, f"UPDATE incident_idempotency_key SET created_at = '{at:%Y-%m-%d %H:%M:%S}{zone}'"
        )

    await age(23.9)
    await incidents.create("Disk is full", source="monitoring", idempotency_key="k")
    assert len(await incidents.list()) == 2
    await age(24.1)
    again = await incidents.create("Line is down", source="operator", idempotency_key="k")
    assert again.incident_message == "Line is down"
    keys = await run_sql(url, "SELECT idempotency_key FROM incident_idempotency_key")
    assert [key for (key,) in keys] == ["k"]


@pytest.mark.parametrize("key", ["", "x" * 256, "a\x00b", 7])
async def test_a_faulty_idempotency_key_is_refused(incidents: IncidentClient, key: Any) -> None:
    """A key has 1 to 255 characters, for each verb that takes one."""
    for call in (
        incidents.create("Disk is full", source="monitoring", idempotency_key=key),
        incidents.update_status(1, "failed", idempotency_key=key),
    ):
        with pytest.raises(InvalidIncident) as caught:
            await call
        assert [error.field for error in caught.value.errors] == ["idempotency_key"]


async def test_a_commit_whose_answer_was_lost_is_repeated_without_a_duplicate(
    migrated_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the connection dies after the commit, the retry gets the answer of the first attempt."""
    async with IncidentClient.open(migrated_postgres_url) as incidents:
        store = incidents.store
        assert isinstance(store, Store)
        write, lost = store._write, 0

        async def lose_the_answer(*arguments: Any, **options: Any) -> Any:
            nonlocal lost
            await write(*arguments, **options)
            lost += 1
            raise StoreUnavailable("the connection was lost")

        with monkeypatch.context() as patch:
            patch.setattr(store, "_write", lose_the_answer)
            with pytest.raises(StoreUnavailable):
                await incidents.create("Disk is full", source="monitoring", idempotency_key="k")
        assert lost == 1
        incident = await incidents.create("Disk is full", source="monitoring", idempotency_key="k")
        assert await incidents.list() == [incident]


async def test_a_cancelled_create_can_be_repeated(incidents: IncidentClient) -> None:
    """Whenever the caller is cancelled, the same key makes one incident."""
    for step in range(12):
        key = f"step {step}"
        task = asyncio.ensure_future(
            incidents.create("Disk is full", source="monitoring", idempotency_key=key)
        )
        for _ in range(step):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await incidents.create("Disk is full", source="monitoring", idempotency_key=key)
    assert len(await incidents.list(limit=100)) == 12


async def test_an_answer_is_stored_with_its_write(incidents: IncidentClient, url: str) -> None:
    """If the answer cannot be stored, nothing is written."""
    await run_sql(url, "ALTER TABLE incident_idempotency_key RENAME COLUMN answer TO reply")
    with pytest.raises(StoreError):
        await incidents.create("Disk is full", source="monitoring", idempotency_key="k")
    await run_sql(url, "ALTER TABLE incident_idempotency_key RENAME COLUMN reply TO answer")
    assert await incidents.list() == []
    assert await run_sql(url, "SELECT * FROM incident_event") == []
    assert await run_sql(url, "SELECT * FROM incident_idempotency_key") == []


# Expected versions


async def test_only_the_expected_version_is_changed(incidents: IncidentClient) -> None:
    """A change that expects another version does nothing, and shows the incident as it is."""
    incident = await incidents.create("Disk is full", source="monitoring")
    failed = await incidents.update_status(incident.incident_id, "failed", expected_version=1)
    with pytest.raises(VersionConflict) as caught:
        await incidents.update_status(incident.incident_id, "completed", expected_version=1)
    assert caught.value.incident == failed
    assert await incidents.get(incident.incident_id) == failed
    done = await incidents.update_status(incident.incident_id, "completed", expected_version=2)
    assert done.version == 3


async def test_of_many_who_expect_the_same_version_one_wins(incidents: IncidentClient) -> None:
    """Of concurrent changes of one version exactly one happens."""
    incident = await incidents.create("Disk is full", source="monitoring")
    outcomes = await asyncio.gather(
        *(
            incidents.update_status(incident.incident_id, "failed", expected_version=1)
            for _ in range(20)
        ),
        return_exceptions=True,
    )
    won = [one for one in outcomes if not isinstance(one, BaseException)]
    lost = [one for one in outcomes if isinstance(one, VersionConflict)]
    assert len(won) == 1
    assert len(lost) == 19
    assert {conflict.incident.version for conflict in lost} == {2}


async def test_an_unknown_incident_has_no_version(incidents: IncidentClient) -> None:
    """What is not there is not found, whatever version is expected."""
    with pytest.raises(IncidentNotFound):
        await incidents.update_status(99, "failed", expected_version=1)


@pytest.mark.parametrize("version", [0, -1, True, "1", 1.0, 2**63])
async def test_a_faulty_version_is_refused(incidents: IncidentClient, version: Any) -> None:
    """A version is an integer from 1."""
    with pytest.raises(InvalidIncident) as caught:
        await incidents.update_status(1, "failed", expected_version=version)
    assert [error.field for error in caught.value.errors] == ["expected_version"]

"""The functions of the test kit, on clients of every kind."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import time
import unittest
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.testclient import TestClient

from incidentkit import (
    ClientClosed,
    IncidentClient,
    IncidentNotFound,
    InvalidIncident,
    InvalidSettings,
    NewIncident,
    SchemaOutOfDate,
    StoreError,
    StoreUnavailable,
    SyncIncidentClient,
    VersionConflict,
)
from incidentkit.http import create_app
from incidentkit.testing import (
    all_incidents,
    assert_history,
    assert_incident_opened,
    assert_no_incident,
    failing,
    frozen_clock,
    private_async_incidents,
    private_incidents,
    private_url,
    recording,
    slow,
)
from tests.test_public_api import run_python

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def incidents() -> Iterator[SyncIncidentClient]:
    """A synchronous client from the kit."""
    with private_incidents() as client:
        yield client


@pytest.fixture
def async_incidents() -> Iterator[IncidentClient]:
    """An asynchronous client from the kit."""
    with private_async_incidents() as client:
        yield client


class UnitTest(unittest.TestCase):
    """The kit needs no pytest."""

    def setUp(self) -> None:
        """Open a client for each test."""
        self.incidents = self.enterContext(private_incidents())

    def test_incident_is_recorded(self) -> None:
        """An incident of the test is there, and the assertion returns it."""
        self.incidents.create("Disk is full", source="monitoring")
        assert assert_incident_opened(self.incidents).incident_id == 1

    def test_another_test_has_another_database(self) -> None:
        """A failure is an AssertionError."""
        with self.assertRaises(AssertionError):  # noqa: PT027
            assert_incident_opened(self.incidents)


FILLED = (
    NewIncident("Disk of db-1 is full", "monitoring", dedup_key="disk db-1"),
    NewIncident("Disk of db-1 is still full", "monitoring", dedup_key="disk db-1"),
    NewIncident("Payments are slow", "partner", details={"region": "eu", "tries": [1, 2]}),
    NewIncident("Payments are slow", "partner", "failed"),
)
"""Three incidents, the first of which was reported twice."""

FITTING: list[tuple[dict[str, Any], int, int]] = [
    ({}, 3, 1),
    ({"message": "Disk of db-1 is full"}, 1, 1),
    ({"message": re.compile(r"db-\d is")}, 1, 1),
    ({"message": str.isascii}, 3, 1),
    ({"source": "partner"}, 2, 3),
    ({"source": "partner", "status": "failed"}, 1, 4),
    ({"dedup_key": "disk db-1"}, 1, 1),
    ({"dedup_key": re.compile("^disk")}, 1, 1),
    ({"dedup_key": lambda key: key is None}, 2, 3),
    ({"occurrences": 2, "status": "new"}, 1, 1),
    ({"details": {"tries": [1, 2]}}, 1, 3),
    ({"details": lambda details: details is None}, 2, 1),
]
"""Expected fields, the number of incidents that have them, and the id of the oldest."""


@pytest.mark.parametrize(("fields", "count", "oldest"), FITTING)
def test_incidents_with_the_expected_fields_are_found(
    incidents: SyncIncidentClient, fields: dict[str, Any], count: int, oldest: int
) -> None:
    """All given values, patterns and functions must match, for the expected number of incidents."""
    incidents.create_many(FILLED)
    found = assert_incident_opened(incidents, **fields, count=count)
    stored = incidents.get(oldest)
    assert (found, found.details) == (stored, stored.details)
    for other in {1, 2, 3, 4} - {count}:
        with pytest.raises(AssertionError, match=f"found {count} among 3"):
            assert_incident_opened(incidents, **fields, count=other)
    with pytest.raises(AssertionError, match=f"Expected no incident, found {count}"):
        assert_no_incident(incidents, **fields)


def test_a_failure_shows_the_nearest_incidents(incidents: SyncIncidentClient) -> None:
    """A failure shows at most five incidents, the most similar first, and marks differences."""
    incidents.create_many(NewIncident(f"Order {number} is lost", "partner") for number in range(9))
    incidents.create("Disc of db-1 is full", source="monitoring")
    with pytest.raises(AssertionError) as caught:
        assert_incident_opened(incidents, message="Disk of db-1 is full", source="monitoring")
    lines = str(caught.value).splitlines()
    assert lines[:11] == [
        "Expected 1 incident, found 0 among 10:",
        "    message      'Disk of db-1 is full'",
        "    source       'monitoring'",
        "Nearest:",
        "  incident 10",
        "  ! message      'Disc of db-1 is full'",
        "    source       'monitoring'",
        "    dedup_key    None",
        "    status       'new'",
        "    occurrences  1",
        "    details      None",
    ]
    assert sum(line.startswith("  incident ") for line in lines) == 5


def test_a_failure_says_that_there_is_none(incidents: SyncIncidentClient) -> None:
    """Without any incident, the message says so, and describes patterns and functions."""
    with pytest.raises(AssertionError) as caught:
        assert_incident_opened(incidents, message=re.compile("Disk"), dedup_key=str.isascii)
    assert str(caught.value).splitlines() == [
        "Expected 1 incident, found 0 among 0:",
        "    message      found by 'Disk'",
        "    dedup_key    accepted by isascii",
        "There are no incidents.",
    ]


def test_invalid_expectations_are_no_failed_assertions(incidents: SyncIncidentClient) -> None:
    """A status or source that does not exist, or a count of zero, is refused by name."""
    unknown: Any = "open"
    with pytest.raises(InvalidIncident, match="status must be one of"):
        assert_no_incident(incidents, status=unknown)
    with pytest.raises(InvalidIncident, match="source must be one of"):
        assert_no_incident(incidents, source=unknown)
    with pytest.raises(InvalidSettings, match="count must be at least 1"):
        assert_incident_opened(incidents, count=0)


def test_histories_are_compared_as_a_whole(incidents: SyncIncidentClient) -> None:
    """The kinds of all events must be as expected; a failure shows the events."""
    incident = incidents.create("Disk is full", source="monitoring")
    incidents.note(incident.incident_id, "Logs fill it")
    events = assert_history(incidents, incident, ["created", "noted"])
    assert [event.note for event in events] == [None, "Logs fill it"]
    assert assert_history(incidents, incident.incident_id, ["created", "noted"]) == events
    with pytest.raises(AssertionError) as caught:
        assert_history(incidents, incident, ["created"])
    assert "    expected  created\n    found     created, noted\n" in str(caught.value)
    assert "noted 'Logs fill it'" in str(caught.value)
    with pytest.raises(IncidentNotFound):
        assert_history(incidents, 7, ["created"])
    with pytest.raises(ValueError, match="updated"):
        assert_history(incidents, incident, ["updated"])


async def test_assertions_on_an_asynchronous_client_are_awaited(
    async_incidents: IncidentClient,
) -> None:
    """The same functions take an asynchronous client, and then return a coroutine."""
    await assert_no_incident(async_incidents)
    stored = await async_incidents.create("Disk is full", source="monitoring")
    assert await assert_incident_opened(async_incidents, message="Disk is full") == stored
    assert await all_incidents(async_incidents) == [stored]
    await assert_history(async_incidents, stored, ["created"])
    with pytest.raises(AssertionError, match="found 1"):
        await assert_no_incident(async_incidents)


@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_an_assertion_that_is_not_awaited_is_named(async_incidents: IncidentClient) -> None:
    """Python warns of a forgotten `await` with the name of the function."""
    for call in (
        lambda: assert_incident_opened(async_incidents),
        lambda: assert_no_incident(async_incidents),
        lambda: assert_history(async_incidents, 1, []),
        lambda: all_incidents(async_incidents),
    ):
        with pytest.warns(RuntimeWarning, match="'(assert|all)_[a-z_]+' was never awaited"):
            call()


def test_a_forked_process_is_refused() -> None:
    """A private database is never silently copied into a forked process."""
    program = """
import os
from incidentkit import StoreError
from incidentkit.testing import private_incidents

with private_incidents() as incidents:
    incidents.create("Disk is full", source="monitoring")
    if os.fork() == 0:
        try:
            incidents.create("Disk is full", source="monitoring")
        except StoreError as error:
            print(error, flush=True)
        os._exit(0)
    os.wait()
    print(len(incidents.list()))
"""
    refused, count = run_python(program).splitlines()
    assert "in the memory of the parent process" in refused
    assert count == "1"


def test_an_asynchronous_client_works_on_each_event_loop(async_incidents: IncidentClient) -> None:
    """The client opens itself on the running event loop, again after an earlier loop has ended."""

    async def report() -> None:
        await async_incidents.create("Disk is full", source="monitoring")
        async for change in async_incidents.changes():
            assert change.incident_id == 1
            break

    for _ in range(2):
        asyncio.run(report())
    assert len(asyncio.run(async_incidents.list())) == 2


def test_a_private_database_ends_with_its_block() -> None:
    """After the block, calls of its client raise ClientClosed."""
    with private_async_incidents() as client:
        pass
    with pytest.raises(ClientClosed):
        asyncio.run(client.list())


def test_a_file_has_the_schema(tmp_path: Path) -> None:
    """A private URL names a file that every client can open, with no incidents."""
    url = private_url(tmp_path / "private.db")
    with SyncIncidentClient.open(url) as one, SyncIncidentClient.open(url) as other:
        assert_no_incident(one)
        one.create("Disk is full", source="monitoring")
        assert_incident_opened(other, message="Disk is full")


class Application:
    """An application that holds a client in a module, on a database that must stay as it is."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.incidents = SyncIncidentClient.open(url)
        self.async_incidents = IncidentClient.open(url)

    def untouched(self) -> bool:
        """Whether nothing was recorded in its database."""
        with SyncIncidentClient.open(self.url) as client:
            return client.list() == []


@pytest.fixture
def application(tmp_path: Path) -> Iterator[Application]:
    """An application."""
    application = Application(private_url(tmp_path / "application.db"))
    yield application
    assert application.untouched()


def test_a_synchronous_client_records_elsewhere(application: Application) -> None:
    """In the block, a client that is not open works, and its own database stays as it is."""
    client = application.incidents
    with recording(client) as recorded:
        client.create("Disk is full", source="monitoring")
        assert_incident_opened(recorded, message="Disk is full")
        # The application may start and stop.
        with client:
            client.update_status(1, "completed")
        assert_incident_opened(recorded, status="completed")
    assert not client.connected
    with recording(client) as recorded:
        assert_no_incident(recorded)


def test_an_open_synchronous_client_stays_open(application: Application) -> None:
    """After the block, the client is open on its own database, even if it was closed in between."""
    with application.incidents as client:
        with recording(client) as recorded:
            client.create("Disk is full", source="monitoring")
            assert_incident_opened(recorded)
        assert client.list() == []
        with recording(client):
            client.close()
        assert client.list() == []


async def test_an_open_asynchronous_client_records_elsewhere(application: Application) -> None:
    """In the block, calls go to the private database, also from an open client."""
    async with application.async_incidents as client:
        assert await client.list() == []
        with recording(client):
            await client.create("Disk is full", source="monitoring")
            await assert_incident_opened(client)
            assert len(await client.list()) == 1
        assert await client.list() == []


def test_a_web_application_records_elsewhere(application: Application) -> None:
    """A test without an event loop sees what a service has recorded, which starts and stops."""
    client = application.async_incidents
    with recording(client) as recorded:
        with TestClient(create_app(client)) as service:
            body = {"incident_message": "Disk is full", "source": "monitoring"}
            assert service.post("/incident/create", json=body).status_code == 201
        incident = assert_incident_opened(recorded, message="Disk is full")
        assert_history(recorded, incident, ["created"])


def test_only_clients_can_record_elsewhere(application: Application) -> None:
    """Anything but a client is refused with its type."""
    other: Any = application
    with pytest.raises(TypeError, match="not Application"), recording(other):
        pass


def test_transitions_hold_while_recording(sqlite_url: str) -> None:
    """The client keeps its options."""
    client = SyncIncidentClient.open(sqlite_url, transitions={"new": ["completed"]})
    with recording(client):
        incident = client.create("Disk is full", source="monitoring")
        client.update_status(incident.incident_id, "completed")
        with pytest.raises(Exception, match="cannot go from completed to failed"):
            client.update_status(incident.incident_id, "failed")


def test_joined_connections_have_no_effect_while_recording(application: Application) -> None:
    """In the block, join records in the private database, and a rollback removes nothing there."""
    client = application.incidents
    engine = create_engine(application.url.replace("+aiosqlite", ""))
    with recording(client) as recorded, engine.connect() as connection:
        client.join(connection).create("An order was lost", source="partner")
        connection.rollback()
        assert_incident_opened(recorded, message="An order was lost")
    engine.dispose()


async def test_joined_connections_of_asyncio_have_no_effect_while_recording(
    application: Application,
) -> None:
    """The same holds for the asynchronous client."""
    client = application.async_incidents
    engine = create_async_engine(application.url)
    with recording(client):
        async with engine.connect() as connection:
            await client.join(connection).create("An order was lost", source="partner")
            await connection.rollback()
        await assert_incident_opened(client, message="An order was lost")
    await engine.dispose()


def test_calls_fail_as_often_as_asked(incidents: SyncIncidentClient) -> None:
    """The next calls of any verb raise the error and write nothing; the ones after succeed."""
    with failing(incidents, StoreUnavailable, times=2) as failures:
        with pytest.raises(StoreUnavailable, match="the test makes this call of create fail"):
            incidents.create("Disk is full", source="monitoring")
        with pytest.raises(StoreUnavailable):
            list(incidents.iterate())
        assert failures.count == 2
        incidents.create("Disk is full", source="monitoring")
    assert failures.count == 2
    assert_incident_opened(incidents)


def test_chosen_verbs_fail(incidents: SyncIncidentClient) -> None:
    """With verbs, only calls of these fail, every time; the error may be an instance."""
    error = StoreError("the disk is broken")
    with failing(incidents, error, verbs=("create", "list")):
        for _ in range(3):
            with pytest.raises(StoreError, match="the disk is broken"):
                incidents.create("Disk is full", source="monitoring")
        with pytest.raises(StoreError):
            incidents.list()
        assert_no_incident(incidents)
    incidents.create("Disk is full", source="monitoring")


async def test_calls_of_an_asynchronous_client_fail(application: Application) -> None:
    """Any client can be made to fail; a search counts as one call, and so does an iteration."""
    async with application.async_incidents as client:
        with failing(client, StoreUnavailable, times=3, verbs=["search", "iterate"]) as failures:
            with pytest.raises(StoreUnavailable):
                await client.search()
            with pytest.raises(StoreUnavailable):
                [each async for each in client.iterate()]
            with pytest.raises(StoreUnavailable):
                await client.search(status="new")
            assert failures.count == 3
            assert [each async for each in client.iterate()] == []
        with failing(client, StoreUnavailable, verbs="search"):
            assert [each async for each in client.iterate()] == []


def test_joined_calls_fail(application: Application) -> None:
    """The verbs in a joined transaction fail like those of their client."""
    with (
        application.incidents as client,
        closing(sqlite3.connect(application.url.removeprefix("sqlite+aiosqlite:///"))) as host,
        failing(client, StoreUnavailable),
    ):
        host.execute("BEGIN")
        with pytest.raises(StoreUnavailable):
            client.join(host).create("Disk is full", source="monitoring")
        host.rollback()


def test_a_service_answers_failures(application: Application) -> None:
    """A service on a failing client answers as in an outage."""
    client = application.async_incidents
    with (
        TestClient(create_app(client)) as service,
        failing(client, StoreUnavailable, verbs=["list"]),
    ):
        assert service.get("/incident/get").status_code == 503
    with TestClient(create_app(client)) as service:
        assert service.get("/incident/get").json() == []


def test_faults_are_taken_back(incidents: SyncIncidentClient) -> None:
    """Blocks can be nested, with those of recording too, and leave the client as it was."""
    before = dict(vars(incidents))
    with failing(incidents, StoreUnavailable, times=2, verbs=["create"]):
        with slow(incidents, 0.0), recording(incidents), pytest.raises(StoreUnavailable):
            incidents.create("Disk is full", source="monitoring")
        with pytest.raises(StoreUnavailable):
            incidents.create("Disk is full", source="monitoring")
        incidents.create("Disk is full", source="monitoring")
    assert vars(incidents) == before
    assert_incident_opened(incidents)


def test_only_clients_are_asserted_on(application: Application) -> None:
    """Anything else is refused at once, instead of a coroutine that a test does not await."""
    other: Any = application
    refused = pytest.raises(TypeError, match="a SyncIncidentClient, not Application")
    with refused:
        all_incidents(other)
    with refused:
        assert_incident_opened(other)
    with refused:
        assert_no_incident(other)
    with refused:
        assert_history(other, 1, ["created"])


def test_only_clients_can_fail(application: Application) -> None:
    """Anything else is refused, since its calls would not fail: also what holds a client."""
    other: Any
    for other in (application, None):
        name = type(other).__name__
        with pytest.raises(TypeError, match=f"not {name}$"), failing(other, StoreUnavailable):
            pass
        with pytest.raises(TypeError, match=f"not {name}$"), slow(other, 0.0):
            pass


async def test_slow_calls_wait(async_incidents: IncidentClient) -> None:
    """A call of a slow client takes the given time, so that a timeout of the host applies."""
    with slow(async_incidents, 60, verbs=["create"]):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await async_incidents.create("Disk is full", source="monitoring")
        await assert_no_incident(async_incidents)


def test_slow_calls_block_a_synchronous_caller(
    incidents: SyncIncidentClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A synchronous call sleeps in the thread of its caller."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    with slow(incidents, 1.5):
        incidents.list()
    assert slept == [1.5]


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"times": 0}, "times must be at least 1"),
        ({"times": True}, "times must be at least 1"),
        ({"times": 1.5}, "times must be at least 1"),
        ({"error": "down"}, "error must be an exception, or a class of exceptions"),
        (
            {"error": VersionConflict},
            "must be an instance, since the class VersionConflict needs arguments",
        ),
        (
            {"error": SchemaOutOfDate},
            "must be an instance, since the class SchemaOutOfDate needs arguments",
        ),
        ({"verbs": ["delete"]}, "verbs must not have 'delete'; the verbs are check, create, "),
    ],
)
def test_invalid_faults_are_refused(
    incidents: SyncIncidentClient, options: dict[str, Any], rule: str
) -> None:
    """An impossible fault is refused by name, before the application makes a call."""
    with (
        pytest.raises(InvalidSettings, match=rule),
        failing(incidents, **{"error": StoreError, **options}),
    ):
        pass
    text: Any = "1.5"
    for seconds in (-1, float("inf"), float("nan"), text):
        with pytest.raises(InvalidSettings, match="seconds"), slow(incidents, seconds):
            pass


def test_the_clock_stands_still(incidents: SyncIncidentClient) -> None:
    """Every time of the database is the frozen one, until the clock is moved."""
    start = datetime(2026, 1, 1, tzinfo=UTC)
    with frozen_clock(incidents, "2026-01-01T00:00:00Z") as clock:
        incident = incidents.create("Disk is full", source="monitoring", dedup_key="disk")
        assert incident.created_at == start
        clock.tick(timedelta(hours=2))
        assert incidents.create("Disk is full", source="monitoring", dedup_key="disk") == (
            incidents.get(incident.incident_id)
        )
        assert incidents.get(incident.incident_id).last_seen_at == start + timedelta(hours=2)
        clock.move_to(datetime(2026, 2, 1, tzinfo=UTC))
        clock.tick()
        ended = incidents.update_status(incident.incident_id, "completed").ended_at
        assert ended == datetime(2026, 2, 1, 0, 0, 1, tzinfo=UTC)
        times = [event.at for event in incidents.history(incident.incident_id)]
        assert times == [start, start + timedelta(hours=2), ended]
        assert clock.now == ended
    assert incidents.create("Disk is full", source="partner").created_at > clock.now


@pytest.mark.parametrize("year", [1, 999, 9999])
def test_the_clock_stands_still_in_any_year(incidents: SyncIncidentClient, year: int) -> None:
    """A year has four digits in the database."""
    with frozen_clock(incidents, datetime(year, 3, 1, tzinfo=UTC)):
        created = incidents.create("Disk is full", source="monitoring")
    assert created.created_at == datetime(year, 3, 1, tzinfo=UTC)


@pytest.mark.parametrize("time", ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z"])
def test_the_clock_is_never_where_no_search_finds_an_incident(
    incidents: SyncIncidentClient, time: str
) -> None:
    """Such a time is refused instead of changed, when the clock is stopped, set or moved on."""
    refused = pytest.raises(InvalidIncident, match="time must be after 0001-01-02 and before")
    with refused, frozen_clock(incidents, time):
        pass
    with frozen_clock(incidents, "9999-12-30T23:59:59Z") as clock:
        with refused:
            clock.move_to(time)
        with refused:
            clock.tick()
        incidents.create("Disk is full", source="monitoring")
        incident = assert_incident_opened(incidents)
    assert incident.created_at == clock.now == datetime(9999, 12, 30, 23, 59, 59, tzinfo=UTC)


def test_idempotency_keys_expire_by_the_frozen_clock(incidents: SyncIncidentClient) -> None:
    """A key is forgotten once the frozen clock is 24 hours later."""

    def create() -> int:
        incident = incidents.create("Disk is full", source="monitoring", idempotency_key="key")
        return incident.incident_id

    with frozen_clock(incidents, datetime(2026, 1, 1, tzinfo=UTC)) as clock:
        first = create()
        clock.tick(timedelta(hours=24))
        assert create() == first
        clock.tick()
        assert create() != first


async def test_the_clock_of_a_recording_client_stands_still(application: Application) -> None:
    """An application's client has a frozen clock while it records in the kit's database."""
    client = application.async_incidents
    with (
        pytest.raises(TypeError, match=r"use the kit's fixtures.*recording\(\)"),
        frozen_clock(client, "2026-01-01T00:00:00Z"),
    ):
        pass
    with recording(client), frozen_clock(client, "2026-01-01T00:00:00Z") as clock:
        incident = await client.create("Disk is full", source="monitoring")
        assert incident.created_at == clock.now
    with pytest.raises(InvalidIncident, match="time must be an aware datetime"):
        clock.move_to(datetime(2026, 1, 1))  # noqa: DTZ001

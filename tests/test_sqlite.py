"""Calls on an SQLite file: waiting writes share a transaction without affecting each other."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing, contextmanager, nullcontext
from datetime import UTC, datetime
from threading import Event, Thread
from threading import enumerate as enumerate_threads
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incidentkit import (
    IncidentClient,
    IncidentNotFound,
    NewIncident,
    StoreError,
    StoreUnavailable,
    VersionConflict,
    acting_as,
)
from incidentkit.opening import store_on
from incidentkit.store import StoreOptions
from incidentkit.store.executor import SharedWork
from incidentkit.store.sqlite.dialect import SqliteDialect
from incidentkit.store.sqlite.threads import (
    OwnConnection,
    ThreadsExecutor,
    _Threads,
    _transact,
    _Write,
)
from incidentkit.store.store import Store
from tests.endless import ENDLESS, Endless, before_statements
from tests.strategies import characters, sources, statuses, stripped_messages

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from incidentkit import Incident
    from incidentkit.store.executor import Rows


@pytest.fixture
async def incidents(sqlite_url: str) -> AsyncIterator[IncidentClient]:
    """An open client on an empty file."""
    async with IncidentClient.open(sqlite_url) as client:
        yield client


@pytest.fixture
def path(sqlite_url: str) -> str:
    """The path of the file."""
    return sqlite_url.removeprefix("sqlite+aiosqlite:///")


@pytest.fixture
async def traced(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[tuple[IncidentClient, pytest.LogCaptureFixture]]:
    """A client that logs its statements, with the log."""
    async with IncidentClient.open(sqlite_url, options=StoreOptions(echo=True)) as client:
        caplog.set_level("INFO", logger="incidentkit.store")
        caplog.clear()
        yield client, caplog


def threads_of_files() -> set[Thread]:
    """Return the threads that run statements on SQLite files, in this process."""
    return {each for each in enumerate_threads() if each.name.startswith("incidentkit-sqlite")}


def inserts(log: pytest.LogCaptureFixture) -> int:
    """Return the number of logged statements that insert."""
    return sum(message.startswith("INSERT") for message in log.messages)


@contextmanager
def locked(path: str) -> Iterator[None]:
    """Lock the file for writers of other connections inside the block, as another program does."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


async def create(client: IncidentClient, number: int) -> list[Incident]:
    """Create incidents concurrently."""
    return await asyncio.gather(
        *(client.create(f"Disk {n} is full", source="partner") for n in range(number))
    )


async def test_writes_that_wait_share_a_transaction(
    traced: tuple[IncidentClient, pytest.LogCaptureFixture],
) -> None:
    """Many concurrent writes share a few transactions, in the order of the calls."""
    client, log = traced
    created = await create(client, 60)
    assert log.messages.count("COMMIT") <= 3
    assert [incident.incident_id for incident in created] == [*range(1, 61)]
    log.clear()
    await asyncio.gather(*(client.update_status(n, "failed") for n in range(1, 61)))
    assert log.messages.count("COMMIT") <= 3


async def test_creates_that_wait_share_statements(
    traced: tuple[IncidentClient, pytest.LogCaptureFixture],
) -> None:
    """All creates that share a transaction are stored with two statements."""
    client, log = traced
    created = await create(client, 60)
    assert inserts(log) == 2 * log.messages.count("COMMIT")
    assert [len(await client.history(each.incident_id)) for each in created] == [1] * 60


async def test_creates_that_arrive_one_by_one_share_statements(
    traced: tuple[IncidentClient, pytest.LogCaptureFixture], path: str
) -> None:
    """Creates that arrive at different times, while a write is running, share two statements."""
    client, log = traced
    with locked(path):
        calls = []
        for _ in range(20):
            calls.append(asyncio.ensure_future(create(client, 1)))
            await asyncio.wait(calls, timeout=0.002)
    await asyncio.gather(*calls)
    # The first one had the writer to itself.
    assert inserts(log) <= 4


async def test_creates_share_the_transaction_of_other_writes(
    traced: tuple[IncidentClient, pytest.LogCaptureFixture],
) -> None:
    """Creates and notes that run at the same time need no more transactions than either alone."""
    client, log = traced
    await create(client, 1)
    log.clear()
    notes = [client.note(1, f"Note {n}") for n in range(30)]
    _, *written = await asyncio.gather(create(client, 30), *notes)
    assert len(written) == 30
    assert log.messages.count("COMMIT") <= 2
    assert sum('INTO "Incident"' in message for message in log.messages) <= 2


def test_creates_that_share_statements_store_what_each_was_given() -> None:
    """Concurrent creates return and store each incident as given, with its actor."""
    details = st.none() | st.dictionaries(st.text(characters, max_size=9), st.integers(0, 9))
    new = st.builds(
        NewIncident, stripped_messages(), sources, incident_type=statuses, details=details
    )

    async def store(
        client: IncidentClient, given: list[tuple[NewIncident, str | None]]
    ) -> list[Incident]:
        async def one(incident: NewIncident, actor: str | None) -> Incident:
            with acting_as(actor) if actor is not None else nullcontext():
                return await client.create(incident)

        stored = await asyncio.gather(*(one(*each) for each in given))
        for incident, (_, actor) in zip(stored, given, strict=True):
            assert await client.get(incident.incident_id) == incident
            assert (incident.ended_at is None) is (incident.incident_type == "new")
            (event,) = await client.history(incident.incident_id)
            assert (event.kind, event.from_status, event.note) == ("created", None, None)
            assert (event.actor, event.to_status) == (actor, incident.incident_type)
            assert event.at >= incident.created_at
        return stored

    with asyncio.Runner() as runner:
        client = IncidentClient.open("sqlite+aiosqlite:///:memory:")
        runner.run(client.connect())

        @given(st.lists(st.tuples(new, st.none() | st.text(characters, min_size=1)), min_size=3))
        def check(given: list[tuple[NewIncident, str | None]]) -> None:
            for stored, (incident, _) in zip(runner.run(store(client, given)), given, strict=True):
                assert stored.incident_message == incident.incident_message
                assert stored.incident_type is incident.incident_type
                assert (stored.source, stored.details) == (incident.source, incident.details)

        check()
        runner.run(client.close())


async def test_a_create_that_a_trigger_suppresses_leaves_its_neighbours(
    incidents: IncidentClient, path: str
) -> None:
    """Of concurrent creates, one that a host's trigger suppresses fails; the others are stored."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(
            'CREATE TRIGGER suppress BEFORE INSERT ON "Incident" '
            "WHEN new.incident_message = 'Disk 3 is full' BEGIN SELECT RAISE(IGNORE); END"
        )
    outcomes = await asyncio.gather(
        *(incidents.create(f"Disk {n} is full", source="partner") for n in range(8)),
        return_exceptions=True,
    )
    assert isinstance(outcomes.pop(3), StoreError)
    stored = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
    messages = [f"Disk {n} is full" for n in (0, 1, 2, 4, 5, 6, 7)]
    assert [incident.incident_message for incident in stored] == messages
    assert {incident.incident_id for incident in stored} == {
        incident.incident_id for incident in await incidents.list()
    }


async def test_a_status_that_a_trigger_changes_is_returned(
    incidents: IncidentClient, path: str
) -> None:
    """Of concurrent creates, one whose status a host's trigger changes returns the new status."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(
            'CREATE TRIGGER fail AFTER INSERT ON "Incident" '
            "WHEN new.incident_message = 'Disk 5 is full' BEGIN UPDATE \"Incident\" "
            "SET incident_type = 'failed' WHERE incident_id = new.incident_id; END"
        )
    created = await create(incidents, 8)
    assert [n for n, incident in enumerate(created) if incident.incident_type == "failed"] == [5]
    for incident in created:
        assert await incidents.get(incident.incident_id) == incident
        (event,) = await incidents.history(incident.incident_id)
        assert event.to_status is incident.incident_type


async def test_creates_are_undone_unless_ids_follow_their_order() -> None:
    """A shared insert raises if the ids of the incidents are not in the given order."""
    at = datetime(2026, 11, 28, tzinfo=UTC)
    answers: list[Rows] = [
        [
            [number, f"Disk {n} is full", "new", "partner", at, 1, None, 1, None, None, None]
            for n, number in enumerate((2, 1))
        ],
        [(1, "new"), (2, "new")],
    ]

    async def fetch(*_: object) -> Rows:
        return answers.pop(0)

    given = [(NewIncident(f"Disk {n} is full", "partner"), None) for n in range(2)]
    with pytest.raises(StoreError):
        await SqliteDialect().create_together(fetch, given)


def test_a_write_that_was_given_up_is_not_done_with_others() -> None:
    """A write that its caller gave up in time is not among those that share statements."""

    async def alone(_: object) -> str:
        return "alone"

    async def together(_: object, items: Sequence[str]) -> list[str]:
        return [f"{item} of {len(items)}" for item in items]

    writes = [_Write(SharedWork(item, alone, together)) for item in "abc"]
    assert writes[1].claim()
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as driver:
        connection = OwnConnection(driver, {}, echo=False)
        assert _transact(connection, writes, lambda: None) == ["a of 2", None, "c of 2"]


async def test_a_write_alone_is_one_transaction_and_committed(
    traced: tuple[IncidentClient, pytest.LogCaptureFixture], path: str
) -> None:
    """A lone write is one transaction, committed before the call returns."""
    client, log = traced
    for number in range(1, 4):
        log.clear()
        await client.create("Disk is full", source="partner")
        assert log.messages.count("COMMIT") == 1
        with closing(sqlite3.connect(path)) as connection:
            (count,) = connection.execute('SELECT count(*) FROM "Incident"').fetchone()
        assert count == number


async def test_a_write_that_fails_leaves_its_neighbours(
    incidents: IncidentClient, path: str
) -> None:
    """Each of several writes in one transaction succeeds or fails on its own."""
    await create(incidents, 4)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(
            'CREATE TRIGGER refuse BEFORE INSERT ON "Incident" '
            "WHEN new.incident_message = 'No' || ' way' BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
    outcomes = await asyncio.gather(
        incidents.create("Disk is full", source="partner"),
        incidents.create("No way", source="partner"),
        incidents.update_status(99, "failed"),
        incidents.update_status(1, "failed", expected_version=7),
        incidents.update_status(2, "failed"),
        incidents.note(3, "It came back"),
        return_exceptions=True,
    )
    kinds = [type(outcome) for outcome in outcomes if isinstance(outcome, Exception)]
    assert kinds == [StoreError, IncidentNotFound, VersionConflict]
    assert len(await incidents.list()) == 5
    assert (await incidents.get(2)).version == 2
    assert (await incidents.get(1)).version == 1
    assert len(await incidents.history(1)) == 1
    assert len(await incidents.history(3)) == 2


async def test_half_a_write_is_taken_back(incidents: IncidentClient, path: str) -> None:
    """A write whose event is refused leaves no incident; writes in the same batch succeed."""
    await create(incidents, 1)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(
            "CREATE TRIGGER refuse BEFORE INSERT ON incident_event "
            "WHEN new.actor = 'nobody' BEGIN SELECT RAISE(ABORT, 'no'); END"
        )

    async def create_as(actor: str) -> Incident:
        with acting_as(actor):
            return await incidents.create("Disk is full", source="partner")

    outcomes = await asyncio.gather(
        *map(create_as, ("one", "nobody", "two")), return_exceptions=True
    )
    assert [isinstance(outcome, StoreError) for outcome in outcomes] == [False, True, False]
    assert len(await incidents.list()) == 3


async def test_a_cancelled_write_leaves_the_others(incidents: IncidentClient) -> None:
    """Cancelling callers that share a transaction loses none of their writes."""
    calls = [
        asyncio.ensure_future(incidents.create(f"Disk {n} is full", source="partner"))
        for n in range(10)
    ]
    await asyncio.sleep(0)
    calls[0].cancel()
    calls[5].cancel()
    await asyncio.wait(calls)
    assert sum(call.cancelled() for call in calls) == 2
    if incidents._opened()._writes:
        await asyncio.wait(incidents._opened()._writes)
    assert len(await incidents.list(limit=100)) == 10


async def test_reads_go_on_while_another_program_writes(sqlite_url: str, path: str) -> None:
    """While another program locks the file, writes wait and time out, and reads succeed."""
    options = StoreOptions(pool_timeout=30, statement_timeout=0.2)
    async with IncidentClient.open(sqlite_url, options=options) as client:
        (incident,) = await create(client, 1)
        with locked(path):
            write = asyncio.ensure_future(client.create("Disk is full", source="partner"))
            read = await asyncio.gather(*(client.get(1) for _ in range(50)))
            assert read == [incident] * 50
            assert await client.list() == [incident]
            with pytest.raises(StoreUnavailable):
                await write
        await create(client, 1)


async def test_a_write_that_was_given_up_is_not_done_later(sqlite_url: str, path: str) -> None:
    """A write that timed out is not carried out later."""
    options = StoreOptions(pool_timeout=0.3, statement_timeout=0.3)
    async with IncidentClient.open(sqlite_url, options=options) as client:
        with locked(path):
            writes = []
            for _ in range(5):
                writes.append(asyncio.ensure_future(create(client, 1)))
                await asyncio.wait(writes, timeout=0.15)
            outcomes = await asyncio.gather(*writes, return_exceptions=True)
            assert {type(outcome) for outcome in outcomes} == {StoreUnavailable}
    async with IncidentClient.open(sqlite_url) as client:
        assert await client.list() == []


async def test_a_close_that_is_cancelled_can_be_repeated(sqlite_url: str, path: str) -> None:
    """A close can be repeated after a timeout, and leaves no thread running."""
    threads = threads_of_files()
    store = store_on(sqlite_url)
    await store.open()
    with locked(path):
        write = asyncio.ensure_future(store.create(NewIncident("Disk is full", "partner")))
        await asyncio.wait([write], timeout=0.05)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await store.close()
    await write
    await store.close()
    assert threads_of_files() <= threads


async def test_a_write_that_has_begun_is_waited_for(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that has begun runs to completion; one that times out in the queue stores nothing."""
    async with IncidentClient.open(sqlite_url) as client:
        assert isinstance(client.store, Store)
        executor = client.store._connections
        assert isinstance(executor, ThreadsExecutor)
        begun, gate = Event(), Event()

        def hold(sql: str) -> None:
            if 'INSERT INTO "Incident"' in sql:
                begun.set()
                gate.wait(30)

        before_statements(monkeypatch, hold)
        patience, executor._patience = executor._patience, 2
        first = asyncio.ensure_future(create(client, 1))
        assert await asyncio.to_thread(begun.wait, 30)
        executor._patience = 0.1
        outcomes = await asyncio.gather(
            *(create(client, 1) for _ in range(3)), return_exceptions=True
        )
        executor._patience = patience
        # Longer than it would have waited to begin.
        done, _ = await asyncio.wait((first,), timeout=2.5)
        assert not done
        gate.set()
        assert await first == await client.list()
        assert {type(outcome) for outcome in outcomes} == {StoreUnavailable}


async def test_a_write_that_takes_back_all_leaves_its_neighbours(
    sqlite_url: str, path: str
) -> None:
    """A write that makes SQLite roll back the transaction, as a full disk does, fails alone."""
    async with IncidentClient.open(sqlite_url) as client:
        with closing(sqlite3.connect(path)) as other, other:
            other.execute(
                'CREATE TRIGGER refuse BEFORE INSERT ON "Incident" '
                "WHEN NEW.incident_message = 'Disk 3 is full' "
                "BEGIN SELECT RAISE(ROLLBACK, 'no'); END"
            )
        outcomes = await asyncio.gather(
            *(client.create(f"Disk {n} is full", source="partner") for n in range(6)),
            return_exceptions=True,
        )
        assert isinstance(outcomes.pop(3), StoreError)
        messages = [f"Disk {n} is full" for n in (0, 1, 2, 4, 5)]
        assert [getattr(outcome, "incident_message", "") for outcome in outcomes] == messages
        assert sorted(one.incident_message for one in await client.list()) == messages


async def test_a_slow_read_keeps_nobody_waiting(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read by id finishes while a slow search is still running."""
    async with IncidentClient.open(sqlite_url) as client:
        (incident,) = await create(client, 1)
        assert isinstance(client.store, Store)
        executor = client.store._connections
        assert isinstance(executor, ThreadsExecutor)
        gate = Event()

        def hold(sql: str) -> None:
            if "LIKE" in sql or "MATCH" in sql:
                gate.wait(30)

        before_statements(monkeypatch, hold)
        search = asyncio.ensure_future(client.search(text="disk"))
        async with asyncio.timeout(10):
            assert await client.get(incident.incident_id) == incident
        assert not search.done()
        gate.set()
        assert [found async for found in client.iterate(text="disk")] == [incident]
        assert (await search).incidents == [incident]


def threads_of(client: IncidentClient) -> _Threads:
    """Return the threads of a client."""
    assert isinstance(client.store, Store)
    executor = client.store._connections
    assert isinstance(executor, ThreadsExecutor)
    return executor._opened()


async def test_scans_have_threads_of_their_own(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 20 endless searches two run, and no other call waits for them."""
    async with IncidentClient.open(sqlite_url) as client:
        (first,) = await create(client, 1)
        endless = Endless(monkeypatch)
        searches = [
            asyncio.ensure_future(client.search(text="disk", total=n % 2 == 0)) for n in range(20)
        ]
        await endless.until_running(2)
        for n in range(10):
            assert await client.get(1) == first
            assert len(await client.list(limit=100)) == n + 1
            assert len((await client.search(source="partner")).incidents) == n + 1
            assert len(await client.history(1)) == 1
            assert len((await client.read_changes()).changes) == n + 1
            await client.store.check()
            await create(client, 1)
        assert endless.running == 2
        for search in searches:
            search.cancel()
        await asyncio.wait(searches)
        await endless.until_running(0)
        endless.on = False
        assert (await client.search(text="disk", total=True)).total == 11


async def test_a_deep_page_is_read_as_long_as_one_call_waits(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statement of a deep page is interrupted when all of its calls are gone."""
    async with IncidentClient.open(sqlite_url) as client:
        endless = Endless(monkeypatch)
        calls = [asyncio.ensure_future(client.list(page=101)) for _ in range(3)]
        await endless.until_running(1)
        for call in calls[:2]:
            call.cancel()
        await asyncio.wait(calls[:2])
        await client.store.check()
        assert endless.running == 1
        calls[2].cancel()
        await asyncio.wait(calls[2:])
        await endless.until_running(0)
        endless.on = False
        assert await client.list(page=101) == []


async def test_a_search_is_interrupted_at_its_time_limit(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search that takes too long fails, and its thread is free again."""
    options = StoreOptions(pool_size=1, statement_timeout=0.5)
    async with IncidentClient.open(sqlite_url, options=options) as client:
        await create(client, 1)
        endless = Endless(monkeypatch)
        with pytest.raises(StoreUnavailable, match="did not answer in time"):
            await client.search(text="disk")
        await endless.until_running(0)
        endless.on = False
        assert len((await client.search(text="disk")).incidents) == 1


async def test_a_search_waits_for_a_thread_only_so_long(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search that finds no thread in time fails, and says that other searches take them up."""
    options = StoreOptions(pool_size=1, pool_timeout=0.1, statement_timeout=60)
    async with IncidentClient.open(sqlite_url, options=options) as client:
        endless = Endless(monkeypatch)
        search = asyncio.ensure_future(client.search(text="disk"))
        await endless.until_running(1)
        with pytest.raises(StoreUnavailable, match="all 1 connections for searches"):
            await client.search(text="disk")
        search.cancel()
        await asyncio.wait([search])
        await endless.until_running(0)


async def test_a_place_is_free_once_its_thread_is(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An abandoned search keeps its place until its thread has noticed the interrupt."""
    options = StoreOptions(pool_size=1, pool_timeout=0.1)
    async with IncidentClient.open(sqlite_url, options=options) as client:
        gate = Event()
        endless = Endless(monkeypatch, gate)
        search = asyncio.ensure_future(client.search(text="disk"))
        await endless.until_running(1)
        search.cancel()
        await asyncio.wait([search])
        endless.on = False
        with pytest.raises(StoreUnavailable, match="all 1 connections for searches"):
            await client.search(text="disk")
        gate.set()
        await endless.until_running(0)
        assert (await client.search(text="disk")).incidents == []


def test_an_interrupt_is_repeated_after_the_event_loop_has_ended(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt that comes too early is repeated, even after the event loop has ended."""
    client = IncidentClient.open(sqlite_url)
    begun, gate = Event(), Event()

    def hold(sql: str) -> None:
        if sql == ENDLESS:
            begun.set()
            gate.wait(30)

    async def abandon() -> Endless:
        await client.connect()
        before_statements(monkeypatch, hold)
        endless = Endless(monkeypatch)
        search = asyncio.ensure_future(client.search(text="disk"))
        assert await asyncio.to_thread(begun.wait, 30)
        search.cancel()
        await asyncio.wait([search])
        return endless

    endless = asyncio.run(abandon())
    gate.set()
    try:
        asyncio.run(endless.until_running(0))
    finally:
        asyncio.run(client.close())


async def test_close_waits_for_a_scan_to_be_interrupted(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing after a search was abandoned leaves no thread and no connection behind."""
    threads = threads_of_files()
    async with IncidentClient.open(sqlite_url) as client:
        endless = Endless(monkeypatch)
        search = asyncio.ensure_future(client.search(text="disk"))
        waiting = [asyncio.ensure_future(client.search(text="disk")) for _ in range(5)]
        await endless.until_running(2)
        for call in (search, *waiting):
            call.cancel()
    assert endless.running == 0
    assert threads_of_files() <= threads


@pytest.mark.parametrize("memory", [False, True])
async def test_an_interrupt_hits_nothing_but_its_scan(sqlite_url: str, memory: bool) -> None:
    """Searches that are abandoned at any moment fail no other call, not even on one connection."""
    url = "sqlite+aiosqlite:///:memory:" if memory else sqlite_url
    async with IncidentClient.open(url) as client:
        await client.create_many([NewIncident("Disk is full", "partner")] * 500)

        async def abandon(turns: int) -> None:
            search = asyncio.ensure_future(client.search(text="disk full", limit=400, total=True))
            for _ in range(turns):
                await asyncio.sleep(0)
            search.cancel()
            await asyncio.wait([search])

        for n in range(60):
            _, created, found, page = await asyncio.gather(
                abandon(n),
                client.create(f"Disk {n} is full", source="partner"),
                client.get(1),
                client.search(text="full", limit=1),
            )
            assert found.incident_id == 1
            assert len(page.incidents) == 1
            assert created.incident_id == 501 + n
        assert (await client.search(text="disk", total=True)).total == 560


async def test_memory_is_one_connection() -> None:
    """In memory, reads and writes share a connection, and a read never sees half a write."""
    async with IncidentClient.open("sqlite+aiosqlite:///:memory:") as client:
        writes = [asyncio.ensure_future(create(client, 20))]
        while not all(write.done() for write in writes):
            found = await client.list(limit=100)
            events = (await client.read_changes(limit=100)).changes
            assert len(events) >= len(found)
        assert len(await client.list(limit=100)) == 20


async def test_each_database_in_memory_is_its_own(redis_url: str) -> None:
    """A client on a database in memory lists nothing of another one, even if they share a cache."""
    url = "sqlite+aiosqlite:///:memory:"
    async with IncidentClient.open(url, redis_url) as one:
        assert await one.list() == []
        async with IncidentClient.open(url, redis_url) as other:
            assert await one.store.token() != await other.store.token()
            incident = await other.create("Disk is full", source="partner")
            assert (await one.list(), await other.list()) == ([], [incident])


async def test_a_table_of_the_host_fails_no_write(sqlite_url: str, path: str) -> None:
    """A client's writes succeed after its host creates a table in the open file."""
    async with IncidentClient.open(sqlite_url):
        pass
    async with IncidentClient.open(sqlite_url) as client:
        with closing(sqlite3.connect(path)) as host:
            host.execute("CREATE TABLE orders (order_id INTEGER)")
        incident = await client.create("Order 1 is late", source="partner")
        assert await client.list() == [incident]

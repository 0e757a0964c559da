"""The synchronous client: signatures, threads, interrupts, event loops, and its closing."""

from __future__ import annotations

import asyncio
import gc
import inspect
import signal
import sqlite3
import threading
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import psycopg
import pytest

from incidentkit import (
    ClientClosed,
    IncidentClient,
    Incidents,
    InvalidIncident,
    JoinedIncidents,
    ListQuery,
    NewIncident,
    StoreUnavailable,
    SyncIncidentClient,
    SyncIncidents,
    SyncJoinedIncidents,
    WrongEventLoop,
    acting_as,
    client,
)
from incidentkit.store import AccessTokens
from incidentkit.sync.lifetime import Lifetime
from incidentkit.sync.portal import Portal
from incidentkit.sync.tokens import SyncAccessTokens
from tests.programs import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from incidentkit import IncidentEvent
    from incidentkit.domain.tokens import AccessToken

MEMORY: Final = "sqlite+aiosqlite:///:memory:"
LATER: Final = datetime.now(UTC) + timedelta(days=1)


@pytest.fixture
def portals() -> Callable[[], list[threading.Thread]]:
    """Return a function that returns the running threads of the clients that a test has opened."""
    before = set(threading.enumerate())

    def opened() -> list[threading.Thread]:
        return [
            each
            for each in threading.enumerate()
            if each.name == "incidentkit" and each not in before
        ]

    return opened


# Signatures

TWINS: Final = (
    (Incidents, SyncIncidents),
    (IncidentClient, SyncIncidentClient),
    (JoinedIncidents, SyncJoinedIncidents),
    (AccessTokens, SyncAccessTokens),
)
"""Each asynchronous class, and its synchronous twin."""

DIFFERENCES: Final = {
    "IncidentClient.open": {
        "database": "an engine or a pool of the host belongs to the host's event loop, and the "
        "synchronous client has one of its own",
    },
    "IncidentClient.join": {"connection": "each takes the connections of its own kind"},
}
"""Parameters that differ on purpose, by method, each with the reason."""

NAMES: Final = {
    "AsyncIterator[": "Iterator[",
    "JoinedIncidents": "SyncJoinedIncidents",
    "AccessTokens": "SyncAccessTokens",
    "storage.": "",
}
"""The types of the asynchronous classes that have other names in the synchronous ones."""


def members(cls: type) -> dict[str, Any]:
    """Return the public members of a class."""
    return {name: value for name, value in inspect.getmembers(cls) if not name.startswith("_")}


def twin_of(annotation: object) -> str:
    """Return the synchronous annotation that corresponds to an asynchronous one."""
    text = str(annotation)
    for name, other in NAMES.items():
        text = text.replace(name, other)
    return text


def parameters(function: Any, *, without: typing.Container[str]) -> list[tuple[object, ...]]:
    """Return name, kind, default and annotation of each parameter."""
    found = inspect.signature(function).parameters.values()
    return [
        (each.name, each.kind, each.default, twin_of(each.annotation))
        for each in found
        if each.name not in without
    ]


@pytest.mark.parametrize(("asynchronous", "synchronous"), TWINS)
def test_both_clients_have_the_same_methods(asynchronous: type, synchronous: type) -> None:
    """Every public method and property has the same name, arguments, defaults and types."""
    ours, theirs = members(synchronous), members(asynchronous)
    # Attributes that are set when the asynchronous client is made.
    attributes = {"observer", "store"} if asynchronous is IncidentClient else set()
    assert ours.keys() == theirs.keys() | attributes
    method: Any
    for name, method in theirs.items():
        if isinstance(method, property):
            assert isinstance(ours[name], property)
            method, ours[name] = method.fget, ours[name].fget  # noqa: PLW2901
        different = DIFFERENCES.get(f"{asynchronous.__name__}.{name}", {})
        pairs = [
            (method, ours[name]),
            *zip(typing.get_overloads(method), typing.get_overloads(ours[name]), strict=True),
        ]
        for theirs_, ours_ in pairs:
            assert parameters(theirs_, without=different) == parameters(ours_, without=different)
            answer = inspect.signature(theirs_).return_annotation
            assert twin_of(answer) == str(inspect.signature(ours_).return_annotation), name
        assert not inspect.iscoroutinefunction(ours[name])
        assert inspect.isgeneratorfunction(ours[name]) == inspect.isasyncgenfunction(method), name


CALLS: Final[dict[str, Callable[[Any], object]]] = {
    "create": lambda it: it.create("Disk is full", source="operator"),
    "create_many": lambda it: it.create_many([NewIncident("Disk is full", "operator")]),
    "update_status": lambda it: it.update_status(1, "completed"),
    "resolve": lambda it: it.resolve("disk"),
    "resolve_many": lambda it: it.resolve_many(["disk"]),
    "note": lambda it: it.note(1, "seen"),
    "get": lambda it: it.get(1),
    "list": lambda it: it.list(),
    "list_json": lambda it: it.list_json(ListQuery()),
    "search": lambda it: it.search(),
    "iterate": lambda it: next(it.iterate()),
    "history": lambda it: it.history(1),
    "changes": lambda it: next(it.changes()),
    "read_changes": lambda it: it.read_changes(wait=5),
    "purgeable": lambda it: it.purgeable(LATER),
    "purge": lambda it: it.purge(LATER, progress=print),
    "check": lambda it: it.check(),
    "feed_blocker": lambda it: it.feed_blocker(),
    "tokens": lambda it: it.tokens.any(),
}
"""A call of each verb."""

WITHOUT_CALLS: Final = {
    "open",
    "from_env",
    "from_settings",
    "connect",
    "close",
    "connected",
    "cache_available",
    "observer",
    "store",
    "join",
}
"""The other public members; `join` has tests of its own."""


def test_the_table_of_verbs_is_complete() -> None:
    """Every public member is tested below, or is known not to reach the database."""
    assert CALLS.keys() | WITHOUT_CALLS == members(SyncIncidentClient).keys()


# Threads


def test_the_actor_is_that_of_the_calling_thread(url: str) -> None:
    """`acting_as` holds for the calls of its thread, with many threads calling at once."""
    count = 8
    barrier = threading.Barrier(count)
    with SyncIncidentClient.open(url) as incidents, ThreadPoolExecutor(count) as threads:

        def report(actor: str) -> str | None:
            with acting_as(actor):
                barrier.wait(DEADLINE)
                incident = incidents.create("Disk is full", source="operator")
            return incidents.history(incident.incident_id)[0].actor

        names = [f"thread-{number}" for number in range(count)]
        assert list(threads.map(report, names)) == names
        assert (
            incidents.history(incidents.create("Disk is full", source="operator").incident_id)[
                0
            ].actor
            is None
        )


def test_threads_that_open_a_client_at_the_same_time_open_it_once(
    url: str, portals: Callable[[], list[threading.Thread]]
) -> None:
    """If several threads connect at once, one opens the client, and all can use it."""
    count = 8
    barrier = threading.Barrier(count)
    incidents = SyncIncidentClient.open(url)

    def connect(_: int) -> int:
        barrier.wait(DEADLINE)
        incidents.connect()
        return incidents.create("Disk is full", source="operator").incident_id

    with ThreadPoolExecutor(count) as threads:
        ids = list(threads.map(connect, range(count)))
    assert sorted(ids) == list(range(1, count + 1))
    assert len(portals()) == 1
    incidents.close()
    assert portals() == []


def test_a_failed_open_leaves_nothing_behind(
    tmp_path: Path, portals: Callable[[], list[threading.Thread]]
) -> None:
    """A database that cannot be opened raises its error, and leaves no thread."""
    incidents = SyncIncidentClient.open(f"sqlite+aiosqlite:///{tmp_path}")
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="cannot be opened"):
            incidents.connect()
        with pytest.raises(ClientClosed):
            incidents.list()
    assert portals() == []


def test_a_process_without_threads_to_spare_gets_a_typed_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If the system refuses a thread, `connect` raises StoreUnavailable."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    incidents = SyncIncidentClient.open(MEMORY)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(StoreUnavailable, match="can't start new thread"):
            incidents.connect()
    with incidents:
        incidents.check()


def test_a_client_opens_again_after_it_was_closed(url: str) -> None:
    """`connect` and `close` are idempotent, and a closed client can be opened again."""
    incidents = SyncIncidentClient.open(url)
    incidents.close()
    for number in (1, 2):
        incidents.connect()
        incidents.connect()
        assert incidents.connected
        assert incidents.create("Disk is full", source="operator").incident_id == number
        incidents.close()
        incidents.close()
        assert not incidents.connected


def test_a_closed_client_raises(migrated_sqlite_url: str) -> None:
    """Before the client is opened and after it is closed, every verb raises ClientClosed."""
    incidents = SyncIncidentClient.open(migrated_sqlite_url)
    for _ in range(2):
        for call in CALLS.values():
            with pytest.raises(ClientClosed, match="`with`"):
                call(incidents)
        with incidents:
            incidents.check()


def test_a_client_that_is_garbage_is_closed(
    url: str, portals: Callable[[], list[threading.Thread]]
) -> None:
    """The thread and the connections of a garbage-collected client end."""
    incidents = SyncIncidentClient.open(url)
    incidents.connect()
    (thread,) = portals()
    del incidents
    gc.collect()
    thread.join(DEADLINE)
    assert not thread.is_alive()


def test_an_exception_does_not_keep_its_call_alive(migrated_sqlite_url: str) -> None:
    """A failed call leaves no cycle of references behind."""
    with SyncIncidentClient.open(migrated_sqlite_url) as incidents:
        gc.collect()
        gc.disable()
        try:
            for _ in range(10):
                with pytest.raises(InvalidIncident):
                    incidents.create("x", source="operator")
            calls = [each for each in gc.get_objects() if type(each).__name__ == "_Call"]
        finally:
            gc.enable()
    assert len(calls) <= 1


# Event loops


async def test_a_thread_with_an_event_loop_is_refused(migrated_sqlite_url: str) -> None:
    """In a coroutine every method raises WrongEventLoop, which names IncidentClient."""
    incidents = SyncIncidentClient.open(migrated_sqlite_url)
    with pytest.raises(WrongEventLoop, match="IncidentClient"):
        incidents.connect()
    await asyncio.to_thread(incidents.connect)
    for call in (*CALLS.values(), SyncIncidentClient.close):
        with pytest.raises(WrongEventLoop, match="IncidentClient"):
            call(incidents)
    await asyncio.to_thread(incidents.check)
    await asyncio.to_thread(incidents.close)


class Reporting:
    """An observer that records an incident whenever a page is read."""

    client: SyncIncidentClient
    told: Final[list[str]] = []

    def __getattr__(self, _: str) -> Callable[..., Any]:
        return lambda *_: memoryview(b"")

    def cache_read(self, _: str) -> None:
        """Call the client from its own event loop."""
        try:
            self.client.create("Disk is full", source="operator")
        except WrongEventLoop as error:
            self.told.append(str(error))


def test_an_observer_that_calls_its_client_is_refused(migrated_sqlite_url: str) -> None:
    """A call on the client's own event loop raises WrongEventLoop instead of deadlocking."""
    observer = Reporting()
    observing: Any = observer
    with SyncIncidentClient.open(migrated_sqlite_url, observer=observing) as incidents:
        observer.client = incidents
        assert incidents.observer is observing
        assert incidents.list() == []
    assert all("IncidentClient" in each for each in observer.told)
    assert observer.told


# Purge


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Purge three incidents at a time."""
    monkeypatch.setattr(client, "PURGE_BATCH", 3)


@pytest.fixture
def ended(migrated_sqlite_url: str, batches: None) -> Iterator[SyncIncidentClient]:  # noqa: ARG001
    """A client with seven incidents that have ended."""
    with SyncIncidentClient.open(migrated_sqlite_url) as incidents:
        incidents.create_many([NewIncident("Disk is full", "operator", "completed")] * 7)
        yield incidents


def test_progress_is_called_in_the_thread_of_the_caller(ended: SyncIncidentClient) -> None:
    """`progress` may call the client, and stops the purge with False."""
    seen: list[tuple[int, int, int, bool]] = []

    def progress(purged: int, total: int) -> bool:
        here = threading.current_thread() is threading.main_thread()
        seen.append((purged, total, len(ended.list()), here))
        return len(seen) < 2

    assert ended.purge(LATER, progress=progress) == 6
    assert seen == [(3, 7, 4, True), (6, 7, 1, True)]
    assert ended.purge(LATER) == 1


def test_an_exception_of_progress_ends_the_purge(ended: SyncIncidentClient) -> None:
    """An exception of `progress` reaches the caller, and removed incidents stay removed."""

    def progress(purged: int, _: int) -> None:
        raise KeyboardInterrupt(purged)

    with pytest.raises(KeyboardInterrupt, match="3"):
        ended.purge(LATER, progress=progress)
    assert ended.purge(LATER) == 4


def test_progress_may_close_the_client(ended: SyncIncidentClient) -> None:
    """A purge whose `progress` closes the client raises ClientClosed."""
    with pytest.raises(ClientClosed):
        ended.purge(LATER, progress=lambda *_: ended.close())


@pytest.mark.usefixtures("batches")
async def test_progress_may_be_a_coroutine_function(migrated_sqlite_url: str) -> None:
    """The asynchronous client awaits what `progress` returns."""

    async def progress(purged: int, _: int) -> bool:
        return len(await incidents.list()) != 7 - purged

    async with IncidentClient.open(migrated_sqlite_url) as incidents:
        await incidents.create_many([NewIncident("Disk is full", "operator", "completed")] * 7)
        assert await incidents.purge(LATER, progress=progress) == 3


# The feed


def test_a_page_of_changes_takes_one_call(
    migrated_sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The generator asks the event loop once for each page, not for each change."""
    calls: list[object] = []

    def run(self: Lifetime, call: Any) -> Any:
        calls.append(call)
        return original(self, call)

    original: Any = Lifetime.run
    with SyncIncidentClient.open(migrated_sqlite_url) as incidents:
        incidents.create_many([NewIncident("Disk is full", "operator")] * 300)
        monkeypatch.setattr(Lifetime, "run", run)
        changes: Any = incidents.changes()
        assert [next(changes).incident_id for _ in range(300)] == list(range(1, 301))
        assert len(calls) == 1
        changes.close()


def test_closing_the_client_ends_a_generator_that_waits(url: str) -> None:
    """A thread that waits for a change gets ClientClosed when another thread closes the client."""
    incidents = SyncIncidentClient.open(url)
    incidents.connect()
    incidents.create("Disk is full", source="operator")
    seen: list[IncidentEvent] = []
    first = threading.Event()

    def follow() -> None:
        for change in incidents.changes():
            seen.append(change)
            first.set()

    with ThreadPoolExecutor(1) as threads:
        following = threads.submit(follow)
        assert first.wait(DEADLINE)
        incidents.close()
        with pytest.raises(ClientClosed):
            following.result(DEADLINE)
    assert [each.incident_id for each in seen] == [1]


# Interrupts


class InterruptError(BaseException):
    """Raised by a signal handler, like the time limit of a worker."""


@contextmanager
def interrupts(kind: type[BaseException]) -> Iterator[Callable[[], None]]:
    """Yield a function that sends a signal to make the main thread raise an exception."""
    number = signal.SIGINT if kind is KeyboardInterrupt else signal.SIGUSR1

    def handle(*_: object) -> None:
        raise kind

    def interrupt() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, number)

    before = signal.signal(number, handle)
    try:
        yield interrupt
    finally:
        signal.signal(number, before)


@contextmanager
def locked(url: str) -> Iterator[None]:
    """Keep every other program from writing."""
    if url.startswith("sqlite"):
        path = url.removeprefix("sqlite+aiosqlite:///")
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
    else:
        with psycopg.connect(url) as connection:
            connection.execute('LOCK TABLE "Incident" IN SHARE MODE')
            yield


def wait_until(reached: Callable[[], object]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + DEADLINE
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="this system has no such signals")
@pytest.mark.parametrize("kind", [KeyboardInterrupt, InterruptError])
def test_an_interrupt_never_parts_a_write(url: str, kind: type[BaseException]) -> None:
    """An interrupted create raises at once and is stored whole; `close` waits for it."""
    incidents = SyncIncidentClient.open(url)
    incidents.connect()
    session: Any = incidents._client._session

    with interrupts(kind) as interrupt, ThreadPoolExecutor(2) as threads:

        def interrupt_when_writing() -> None:
            wait_until(lambda: session._writes)
            interrupt()

        with locked(url):
            helper = threads.submit(interrupt_when_writing)
            with pytest.raises(kind):
                incidents.create("Disk is full", source="operator", dedup_key="disk")
            helper.result(DEADLINE)
            ending = threads.submit(incidents.close)
            wait_until(lambda: not session._open)
            assert not ending.done()
        ending.result(DEADLINE)
    with incidents:
        (incident,) = incidents.list()
        assert [each.kind for each in incidents.history(incident.incident_id)] == ["created"]


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="this system has no such signals")
def test_an_interrupt_ends_a_wait_for_changes_at_once(url: str) -> None:
    """Ctrl-C ends `changes()` while it waits, leaves no read behind, and the client still works."""
    with SyncIncidentClient.open(url) as incidents, interrupts(KeyboardInterrupt) as interrupt:
        feed: Any = incidents._client._opened()._feed

        def interrupt_when_waiting() -> None:
            wait_until(lambda: feed.readers)
            interrupt()

        helper = threading.Thread(target=interrupt_when_waiting)
        helper.start()
        with pytest.raises(KeyboardInterrupt):
            next(incidents.changes())
        helper.join()
        incidents.check()
        assert feed.readers == 0


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="this system has no such signals")
def test_a_client_whose_closing_was_interrupted_opens_again(url: str) -> None:
    """If Ctrl-C ends `close` while it waits for a write, `connect` waits for it and reopens."""
    incidents = SyncIncidentClient.open(url)
    incidents.connect()
    session: Any = incidents._client._session

    with interrupts(KeyboardInterrupt) as interrupt, ThreadPoolExecutor(2) as threads:

        def interrupt_when(reached: Callable[[], object]) -> None:
            wait_until(reached)
            interrupt()

        with locked(url):
            writing = threads.submit(incidents.create, "Disk is full", source="operator")
            wait_until(lambda: session._writes)
            helper = threads.submit(interrupt_when, lambda: not session._open)
            with pytest.raises(KeyboardInterrupt):
                incidents.close()
            helper.result(DEADLINE)
            opening = threads.submit(incidents.connect)
        opening.result(DEADLINE)
        with incidents:
            assert incidents.list() == [writing.result(DEADLINE)]


def test_a_client_whose_opening_was_interrupted_opens_again(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt at the very end of `connect` leaves nothing open."""
    incidents = SyncIncidentClient.open(url)

    def interrupted(*_: object) -> None:
        raise InterruptError

    with monkeypatch.context() as context:
        context.setattr("incidentkit.sync.lifetime.finalize", interrupted)
        with pytest.raises(InterruptError):
            incidents.connect()
    assert not incidents.connected
    with incidents:
        assert incidents.list() == []


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="this system has no such signals")
def test_a_portal_whose_closing_was_interrupted_closes_to_its_end() -> None:
    """The second `close` waits until the tasks on the event loop have been cancelled."""
    portal = Portal()
    cancelled = threading.Event()

    async def resist() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
            await asyncio.sleep(0.2)

    def interrupt_when_cancelled() -> None:
        assert cancelled.wait(DEADLINE)
        interrupt()

    with interrupts(KeyboardInterrupt) as interrupt, ThreadPoolExecutor(2) as threads:
        running = threads.submit(portal.run, resist())
        wait_until(lambda: portal._calls)
        threads.submit(interrupt_when_cancelled)
        with pytest.raises(KeyboardInterrupt):
            portal.close()
        portal.close()
        assert portal._loop.is_closed()
        with pytest.raises(ClientClosed):
            running.result(DEADLINE)


def test_a_thread_of_a_child_that_comes_second_uses_what_the_first_has_opened(url: str) -> None:
    """A call that finds the client closed, just before another thread opens it, still runs."""

    class Late(Lifetime):
        def _open_in_child(self) -> Portal:
            # Another thread was faster.
            self.connect()
            return super()._open_in_child()

    incidents = IncidentClient.open(url)
    lifetime = Late(incidents)
    lifetime._inherited = True
    try:
        assert lifetime.run(incidents.list()) == []
    finally:
        lifetime.close()


def test_tokens_are_created_listed_and_revoked(url: str) -> None:
    """`tokens` has the methods of the asynchronous client, without `await`."""
    with SyncIncidentClient.open(url) as incidents:
        tokens = incidents.tokens
        assert not tokens.any()
        created = tokens.create("ci", ["report", "read"])
        listed: list[AccessToken] = tokens.list()
        assert listed == [created.token]
        tokens.mark_used(created.token, LATER)
        assert tokens.revoke("ci").revoked_at is not None
        assert tokens.find("0" * 64) is None

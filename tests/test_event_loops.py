"""A client works on the event loop that opened it, and refuses every other one."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import asyncpg
import psycopg
import pytest
import trio
import uvloop
from sqlalchemy import NullPool
from sqlalchemy.ext.asyncio import create_async_engine

from incidentkit import (
    ClientClosed,
    IncidentClient,
    IncidentNotFound,
    JoinedIncidents,
    ListQuery,
    NewIncident,
    StoreUnavailable,
    WrongEventLoop,
)
from incidentkit.domain.commands import NoteAddition
from incidentkit.store import SearchQuery, migrate, store_from_url, store_on
from incidentkit.store.backends import sqlite_store
from incidentkit.store.ports import BEGINNING
from incidentkit.store.request_log import INSERT_REQUEST
from incidentkit.store.schema import SCHEMA_REVISION
from tests.hosts import host_engine, open_host, prepared, sqlalchemy_url
from tests.programs import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from sqlalchemy import Connection

    from incidentkit import Incidents

NOW: Final = datetime.now(UTC)

JOINED: Final[dict[str, Callable[[Incidents], Awaitable[object]]]] = {
    "create": lambda it: it.create("Disk is full", source="operator"),
    "create_many": lambda it: it.create_many([NewIncident("Disk is full", "operator")]),
    "update_status": lambda it: it.update_status(1, "completed"),
    "resolve": lambda it: it.resolve("disk"),
    "resolve_many": lambda it: it.resolve_many(["disk"]),
    "note": lambda it: it.note(1, "seen"),
    "get": lambda it: it.get(1),
    "list": lambda it: it.list(),
    "search": lambda it: it.search(),
    "iterate": lambda it: anext(aiter(it.iterate())),
    "history": lambda it: it.history(1),
}
"""A call of each verb that a joined transaction has too."""

VERBS: Final[dict[str, Callable[[Any], Awaitable[object]]]] = {
    **JOINED,
    "list_json": lambda it: it.list_json(ListQuery()),
    "changes": lambda it: anext(aiter(it.changes())),
    "read_changes": lambda it: it.read_changes(wait=5),
    "purgeable": lambda it: it.purgeable(NOW),
    "purge": lambda it: it.purge(NOW),
    "check": lambda it: it.check(),
    "feed_blocker": lambda it: it.feed_blocker(),
    "connect": lambda it: it.connect(),
    "close": lambda it: it.close(),
}
"""A call of each method that a client is awaited for."""

STORES: Final = ("sqlite", "memory", "sqlite-engine", "postgresql", "postgresql-engine", "pool")


@contextmanager
def two_loops() -> Iterator[tuple[asyncio.Runner, asyncio.Runner]]:
    """Yield two event loops of this thread."""
    with asyncio.Runner() as one, asyncio.Runner() as other:
        yield one, other


async def refused(call: Callable[[], Awaitable[object]]) -> str:
    """Return the message with which a call is refused on this event loop."""
    async with asyncio.timeout(DEADLINE):
        with pytest.raises(WrongEventLoop) as caught:
            await call()
    return str(caught.value)


async def idle() -> None:
    """Wait for what runs in the background, such as the filling of a cache."""
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others)


async def use(client: IncidentClient) -> None:
    """Write and read."""
    async with asyncio.timeout(DEADLINE):
        incident = await client.create("Disk is full", source="operator")
        await client.update_status(incident.incident_id, "completed")
        assert incident.incident_id in {each.incident_id for each in await client.list()}
        assert await client.history(incident.incident_id)


def test_the_table_of_verbs_is_complete() -> None:
    """Every method of a client that is awaited or iterated is tried on the wrong event loop."""
    methods = {
        name
        for name, method in inspect.getmembers(IncidentClient, inspect.isfunction)
        if not name.startswith("_")
        and (inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method))
    }
    assert methods == VERBS.keys()


@pytest.mark.parametrize("verb", VERBS)
def test_another_event_loop_is_refused_and_the_owner_goes_on(url: str, verb: str) -> None:
    """A call on another event loop raises WrongEventLoop, and the client works where it is open."""
    client = IncidentClient.open(url)
    with two_loops() as (owner, other):
        owner.run(client.connect())
        owner.run(use(client))
        for _ in range(2):
            assert "loop_scope" in other.run(refused(lambda: VERBS[verb](client)))
        owner.run(use(client))
        assert client.connected
        owner.run(client.close())


@pytest.mark.parametrize("verb", VERBS)
async def test_another_thread_is_refused_and_the_owner_goes_on(url: str, verb: str) -> None:
    """A call in another thread names the way into the owner's thread, which then works."""
    loop = asyncio.get_running_loop()
    async with IncidentClient.open(url) as client:
        await use(client)

        def elsewhere() -> str:
            message = asyncio.run(refused(lambda: VERBS[verb](client)))
            asyncio.run_coroutine_threadsafe(use(client), loop).result(DEADLINE)
            return message

        assert "run_coroutine_threadsafe" in await asyncio.to_thread(elsewhere)
        await use(client)


def test_joining_on_another_event_loop_is_refused(url: str) -> None:
    """`join` raises WrongEventLoop on another event loop."""
    client = IncidentClient.open(url)
    connection: Any = object()

    async def join() -> None:
        with pytest.raises(WrongEventLoop):
            client.join(connection)

    with two_loops() as (owner, other):
        owner.run(client.connect())
        other.run(join())
        owner.run(client.close())


@pytest.mark.parametrize("way", ["sqlite-connection", "postgresql-session", "asyncpg-connection"])
def test_a_joined_transaction_stays_on_its_event_loop(
    request: pytest.FixtureRequest, way: str
) -> None:
    """A joined verb on another event loop is refused, and the transaction can be committed."""
    name = "migrated_sqlite_url" if way.startswith("sqlite") else "migrated_postgres_url"
    url = str(request.getfixturevalue(name))
    client = IncidentClient.open(url)

    async def join(connection: Any) -> JoinedIncidents:
        return client.join(connection)

    with two_loops() as (owner, other):
        owner.run(prepared(url))
        opening = open_host(way, url)
        host = owner.run(opening.__aenter__())
        owner.run(client.connect())
        owner.run(host.begin())
        joined = owner.run(join(host.connection))
        owner.run(JOINED["create"](joined))  # type: ignore[arg-type]
        for call in JOINED.values():
            assert "loop_scope" in other.run(refused(partial(call, joined)))
        owner.run(JOINED["note"](joined))  # type: ignore[arg-type]
        owner.run(host.commit())
        assert len(owner.run(client.history(1))) == 2
        owner.run(client.close())
        owner.run(opening.__aexit__(None, None, None))


async def test_a_connection_of_another_event_loop_cannot_be_joined(
    migrated_postgres_url: str,
) -> None:
    """Joining asyncpg's connection on another event loop than its own is refused by its name."""
    other = asyncio.new_event_loop()
    thread = threading.Thread(target=other.run_forever)
    thread.start()

    def there(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, other).result(DEADLINE)

    connection = await asyncio.to_thread(there, asyncpg.connect(migrated_postgres_url))
    async with IncidentClient.open(migrated_postgres_url) as client:
        with pytest.raises(WrongEventLoop, match="The connection belongs to another event loop"):
            client.join(connection)
    await asyncio.to_thread(there, connection.close())
    other.call_soon_threadsafe(other.stop)
    thread.join()
    other.close()


def test_a_pool_of_another_event_loop_cannot_be_opened(migrated_postgres_url: str) -> None:
    """A client on a pool connects only on the pool's event loop, and works there afterwards."""
    with two_loops() as (owner, other):

        async def create() -> asyncpg.Pool[asyncpg.Record]:
            return await asyncpg.create_pool(migrated_postgres_url, min_size=1)

        pool = owner.run(create())
        client = IncidentClient.open(pool)
        assert "The pool belongs" in other.run(refused(client.connect))
        owner.run(client.connect())
        owner.run(use(client))
        owner.run(client.close())
        owner.run(pool.close())


def test_iterators_stay_on_their_event_loop(url: str) -> None:
    """An iterator that is moved to another event loop raises WrongEventLoop with its next read."""
    client = IncidentClient.open(url)
    with two_loops() as (owner, other):
        owner.run(client.connect())
        for _ in range(3):
            owner.run(use(client))
        changes = client.changes("latest")
        incidents = client.iterate(batch=1)
        owner.run(anext(incidents))  # type: ignore[arg-type]

        async def first_change() -> None:
            waiting = asyncio.ensure_future(anext(changes))
            while not waiting.done():
                await client.create("Disk is full", source="operator")
                await asyncio.wait((waiting,), timeout=0.01)

        owner.run(first_change())
        for iterator in (incidents, changes):

            async def exhaust(iterator: Any = iterator) -> None:
                async for _ in iterator:
                    pass

            assert "loop_scope" in other.run(refused(exhaust))
        owner.run(use(client))
        owner.run(client.close())


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # what the ended event loop left open
@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_client_can_be_opened_again_once_its_event_loop_has_ended(
    url: str, redis_url: str, factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """After an `asyncio.run` that did not close the client, verbs are refused until it connects."""
    client = IncidentClient.open(url, redis_url)

    async def leave_open() -> None:
        await client.connect()
        await use(client)
        await idle()

    async def open_again() -> None:
        assert not client.connected
        assert "asyncio.run" in await refused(client.list)
        async with asyncio.timeout(DEADLINE), client:
            await use(client)
            assert client.cache_available

    for _ in range(2):
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(leave_open())
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(open_again())
    gc.collect()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # what the ended event loop left open
def test_closing_after_the_event_loop_has_ended_releases_connections(
    migrated_postgres_url: str,
) -> None:
    """`close` on a new event loop disconnects from the server what the old one left open."""
    client = IncidentClient.open(migrated_postgres_url)

    async def leave_open() -> None:
        await client.connect()
        await use(client)
        await idle()

    async def close() -> None:
        async with asyncio.timeout(DEADLINE):
            await client.close()
            with pytest.raises(ClientClosed):
                await client.list()

    def others() -> int:
        ((count,),) = connection.execute(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND backend_type = 'client backend'"
        ).fetchall()
        return int(count)

    with psycopg.connect(migrated_postgres_url, autocommit=True) as connection:
        asyncio.run(leave_open())
        assert others() > 0
        asyncio.run(close())
        deadline = time.monotonic() + DEADLINE
        while others() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert others() == 0
    gc.collect()


def test_closing_after_the_event_loop_has_ended_ends_the_threads(migrated_sqlite_url: str) -> None:
    """`close` on a new event loop ends the threads and the connections of an SQLite file."""
    client = IncidentClient.open(migrated_sqlite_url)
    # Threads of an earlier test may still be ending.
    before = {*threading.enumerate()}

    def running() -> list[str]:
        names = [thread.name for thread in {*threading.enumerate()} - before]
        return [name for name in names if name.startswith("incidentkit-sqlite")]

    async def leave_open() -> None:
        await client.connect()
        await use(client)
        await idle()

    asyncio.run(leave_open())
    assert running()
    asyncio.run(asyncio.wait_for(client.close(), DEADLINE))
    assert not running()


def test_threads_that_open_a_client_at_the_same_time_get_one_owner(url: str) -> None:
    """Of threads that connect the same client at once, one opens it and the others are refused."""
    count = 4
    barrier = threading.Barrier(count)
    done = threading.Event()
    client = IncidentClient.open(url)

    def connect() -> str:
        async def main() -> str:
            barrier.wait(DEADLINE)
            try:
                await client.connect()
            except WrongEventLoop as error:
                return str(error)
            await asyncio.to_thread(done.wait, DEADLINE)
            await use(client)
            await client.close()
            return "opened"

        return asyncio.run(main())

    with ThreadPoolExecutor(count) as threads:
        calls = [threads.submit(connect) for _ in range(count)]
        while sum(call.done() for call in calls) < count - 1:
            time.sleep(0.01)
        done.set()
        outcomes = [call.result(DEADLINE) for call in calls]
    assert outcomes.count("opened") == 1


async def operations(store: Any) -> dict[str, Callable[[], Awaitable[object]]]:
    """Return calls of a store, as an application makes them that holds `client.store`."""
    incident = NewIncident("Disk is full", "operator", dedup_key="disk")
    return {
        "create": lambda: store.create(NewIncident("Disk is full", "operator")),
        "create with a key": lambda: store.create(incident),
        "create_many": lambda: store.create_many([incident]),
        "note": lambda: store.note(NoteAddition(1, "seen")),
        "get": lambda: store.get(1),
        "list": lambda: store.list(ListQuery()),
        "search": lambda: store.search(SearchQuery(text="disk", total=True)),
        "token": store.token,
        "history": lambda: store.history(1),
        "changes": lambda: store.changes(BEGINNING, 10),
        "check": store.check,
        "append": lambda: store.append(INSERT_REQUEST, []),
        "close": store.close,
        "open": store.open,
    }


@pytest.mark.parametrize("name", STORES)
def test_a_store_refuses_another_event_loop(request: pytest.FixtureRequest, name: str) -> None:
    """Calls of `client.store` are refused on another event loop too, and the owner goes on."""
    with two_loops() as (owner, other):

        async def pool() -> asyncpg.Pool[asyncpg.Record]:
            url = request.getfixturevalue("migrated_postgres_url")
            return await asyncpg.create_pool(url, min_size=1)

        host: Any = None
        if name.endswith("engine"):
            kind = "sqlite" if name.startswith("sqlite") else "postgres"
            url = sqlalchemy_url(request.getfixturevalue(f"migrated_{kind}_url"))
            host = create_async_engine(url, poolclass=NullPool)
        elif name == "pool":
            host = owner.run(pool())
        else:
            fixture = f"{name}_url".replace("postgresql", "migrated_postgres")
            host = request.getfixturevalue(fixture)
        store: Any = store_on(host)
        owner.run(store.open())
        calls = owner.run(operations(store))
        owner.run(calls["create"]())  # type: ignore[arg-type]
        for call in calls.values():
            other.run(refused(call))
        for operation, call in calls.items():
            if operation not in {"append", "open", "close"}:
                owner.run(call())  # type: ignore[arg-type]
        owner.run(store.close())
        if name == "pool":
            owner.run(host.close())


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # what the ended event loop left open
def test_a_store_can_be_opened_again_once_its_event_loop_has_ended(url: str) -> None:
    """A store that was left open on an event loop that has ended opens on another one."""
    store = store_from_url(url)

    async def leave_open() -> None:
        await store.open()
        await store.create(NewIncident("Disk is full", "operator"))

    async def reopen() -> None:
        async with asyncio.timeout(DEADLINE):
            await store.open()
            assert await store.get(1) is not None
            await store.close()

    asyncio.run(leave_open())
    asyncio.run(reopen())
    gc.collect()


class PlainStore:
    """A store of an application, which can be neither abandoned nor asked anything."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def open(self) -> None:
        """Note the call."""
        self.calls.append("open")

    async def close(self) -> None:
        """Note the call."""
        self.calls.append("close")


def test_a_custom_store_is_protected_too() -> None:
    """A client on an application's own store is refused, and reopened, as any other one."""
    store: Any = PlainStore()
    client = IncidentClient(store)
    with two_loops() as (owner, other):
        owner.run(client.connect())
        other.run(refused(lambda: client.get(1)))
    with asyncio.Runner() as runner:
        runner.run(client.connect())
        runner.run(client.close())
    assert store.calls == ["open", "open", "close"]


class FailingStore(PlainStore):
    """A store that can neither be opened nor be closed."""

    async def open(self) -> None:
        """Fail."""
        raise StoreUnavailable("it cannot be opened")

    async def close(self) -> None:
        """Fail."""
        raise StoreUnavailable("it cannot be closed")


def test_an_opening_that_failed_leaves_the_client_to_any_event_loop() -> None:
    """If cleaning up after a failed opening fails too, another event loop can still open it."""
    store: Any = FailingStore()
    client = IncidentClient(store)
    with two_loops() as loops:
        for loop in loops:
            with pytest.raises(StoreUnavailable, match="it cannot be opened"):
                loop.run(client.connect())


def test_joining_without_an_event_loop_is_refused(sqlite_url: str) -> None:
    """Outside of a coroutine, `join` says that no event loop runs, and what to do."""
    client = IncidentClient.open(sqlite_url)
    connection: Any = object()
    with asyncio.Runner() as runner:
        runner.run(client.connect())
        with pytest.raises(WrongEventLoop, match="No asyncio event loop is running here"):
            client.join(connection)
        runner.run(client.close())


def test_trio_is_refused_with_one_clear_error(sqlite_url: str) -> None:
    """Under trio, `connect` and every verb of an open client say that incidentkit needs asyncio."""
    client = IncidentClient.open(sqlite_url)

    async def under_trio(call: Callable[[Any], Awaitable[object]]) -> str:
        with pytest.raises(WrongEventLoop) as caught:
            await call(client)
        return str(caught.value)

    assert "asyncio" in trio.run(under_trio, VERBS["connect"])
    with asyncio.Runner() as runner:
        runner.run(client.connect())
        for call in VERBS.values():
            assert "trio" in trio.run(under_trio, call)
        runner.run(use(client))
        runner.run(client.close())


@pytest.mark.parametrize(
    "function", [migrate.upgrade, migrate.downgrade, migrate.current, migrate.check]
)
def test_migrations_are_refused_under_trio(
    migrated_sqlite_url: str, function: Callable[[str], Awaitable[object]]
) -> None:
    """The functions that migrate say that incidentkit needs asyncio."""

    async def main() -> None:
        with pytest.raises(WrongEventLoop, match="asyncio"):
            await function(migrated_sqlite_url)

    trio.run(main)


def test_a_session_wide_client_in_tests_of_another_loop_scope_fails_at_once(
    url: str, tmp_path: Path
) -> None:
    """A test on another event loop than its fixture's fails with an error that says loop_scope."""
    (tmp_path / "test_app.py").write_text(
        f"""\
import pytest_asyncio
from incidentkit import IncidentClient


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def incidents():
    async with IncidentClient.open({url!r}) as client:
        await client.create("Disk is full", source="operator")
        yield client


async def test_write(incidents):
    await incidents.create("Disk is full", source="operator")


async def test_read(incidents):
    await incidents.list()
""",
        "utf-8",
    )
    options = ("-p", "no:cacheprovider", "-o", "asyncio_mode=auto", "--rootdir", str(tmp_path))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert "2 failed" in run.stdout
    failures = run.stdout.partition("short test summary info")[0]
    assert failures.count("WrongEventLoop: The client was opened on another event loop") == 2
    assert "same loop_scope" in run.stdout


def test_refused_calls_leave_nothing_running(url: str) -> None:
    """Many calls at once on the wrong event loop leave no task behind, and the owner goes on."""
    client = IncidentClient.open(url)

    async def many() -> None:
        async def one(call: Callable[[Any], Awaitable[object]]) -> None:
            with suppress(WrongEventLoop, IncidentNotFound):
                await call(client)

        await asyncio.gather(*(one(call) for call in VERBS.values() for _ in range(10)))
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with two_loops() as (owner, other):
        owner.run(client.connect())
        other.run(many())
        owner.run(use(client))
        owner.run(client.close())


@pytest.fixture
async def _migration_needs_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a migration begin only after a turn of the event loop."""
    prepare = migrate.prepare
    loop = asyncio.get_running_loop()

    def prepare_after_a_turn(connection: Connection, **options: Any) -> None:
        turn = threading.Event()
        loop.call_soon_threadsafe(turn.set)
        assert turn.wait(DEADLINE), "the event loop is blocked"
        prepare(connection, **options)

    monkeypatch.setattr(migrate, "prepare", prepare_after_a_turn)


@pytest.mark.usefixtures("_migration_needs_a_turn")
@pytest.mark.parametrize("name", ["sqlite_url", "empty_postgres_url"])
async def test_a_migration_does_not_block_the_event_loop(
    request: pytest.FixtureRequest, name: str
) -> None:
    """While a migration runs, other tasks of its caller's event loop run too."""
    database_url = request.getfixturevalue(name)
    await migrate.upgrade(database_url)
    await migrate.check(database_url)
    await migrate.downgrade(database_url)


@pytest.mark.usefixtures("_migration_needs_a_turn")
@pytest.mark.parametrize("name", ["sqlite_url", "memory_url"])
async def test_the_first_open_does_not_block_the_event_loop(
    request: pytest.FixtureRequest, name: str
) -> None:
    """While the first client on a database creates the schema, other tasks run too."""
    async with IncidentClient.open(request.getfixturevalue(name)) as client:
        await use(client)


@pytest.mark.usefixtures("_migration_needs_a_turn")
async def test_the_first_open_of_an_engine_does_not_block_the_event_loop(sqlite_url: str) -> None:
    """The same holds for a client on the application's engine on a file."""
    async with (
        host_engine(sqlite_url) as engine,
        IncidentClient.open(engine) as client,
    ):
        await use(client)


async def test_alembic_is_loaded_beside_the_event_loop(sqlite_url: str) -> None:
    """While the first client on a file loads Alembic, other tasks run too."""
    loop = asyncio.get_running_loop()

    def load() -> Any:
        turn = threading.Event()
        loop.call_soon_threadsafe(turn.set)
        assert turn.wait(DEADLINE), "the event loop is blocked"
        return migrate

    async with IncidentClient(sqlite_store(sqlite_url, None, load)) as client:
        await use(client)


@pytest.mark.parametrize("name", ["sqlite_url", "empty_postgres_url"])
async def test_a_cancelled_migration_has_ended_when_its_caller_goes_on(
    request: pytest.FixtureRequest, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upgrade whose caller is cancelled is undone or, on SQLite, carried through."""
    database_url = request.getfixturevalue(name)
    prepare = migrate.prepare
    loop = asyncio.get_running_loop()
    started, cancelled = asyncio.Event(), threading.Event()

    def prepare_once_cancelled(connection: Connection, **options: Any) -> None:
        loop.call_soon_threadsafe(started.set)
        assert cancelled.wait(DEADLINE)
        prepare(connection, **options)

    with monkeypatch.context() as patch:
        patch.setattr(migrate, "prepare", prepare_once_cancelled)
        upgrading = asyncio.ensure_future(migrate.upgrade(database_url))
        await started.wait()
        upgrading.cancel()
        for _ in range(10):
            # In these turns the caller passes the cancellation on.
            await asyncio.sleep(0)
        cancelled.set()
        with pytest.raises(asyncio.CancelledError):
            await upgrading
        assert not migrate._migrating.locked()
    on_sqlite = name == "sqlite_url"
    assert await migrate.current(database_url) == (SCHEMA_REVISION if on_sqlite else None)

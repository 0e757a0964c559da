"""The client as an application sees it, on both databases, with and without a cache."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from redis.asyncio import Redis

from incidentkit import (
    CacheUnavailable,
    ClientClosed,
    Incident,
    IncidentClient,
    InvalidSettings,
    ListQuery,
    StoreUnavailable,
)
from incidentkit.cache import MemoryCache
from incidentkit.store import store_from_url
from incidentkit.store.store import Store
from tests.servers import RedisServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from incidentkit.store.page import Page

ROOT = Path(__file__).resolve().parent.parent
MEMORY = "sqlite+aiosqlite:///:memory:"
KEY = "incidents:1:10:any:any"


@pytest.fixture(params=["memory", "sqlite", "sqlite-redis", "postgresql", "postgresql-redis"])
def urls(request: pytest.FixtureRequest) -> tuple[str, str | None]:
    """The URLs of an empty database, and of a Redis if there is one."""
    database, _, cache = request.param.partition("-")
    name = {"sqlite": "migrated_sqlite_url", "postgresql": "migrated_postgres_url"}.get(database)
    return (
        str(request.getfixturevalue(name)) if name else MEMORY,
        str(request.getfixturevalue("redis_url")) if cache else None,
    )


@pytest.fixture
async def incidents(urls: tuple[str, str | None]) -> AsyncIterator[IncidentClient]:
    """An open client on an empty database."""
    async with IncidentClient.open(*urls) as incidents:
        yield incidents


async def test_a_cancelled_write_is_carried_through(incidents: IncidentClient) -> None:
    """A cancelled create is stored whole or not at all, and lists agree with the database."""
    await incidents.list(limit=1000)
    for turns in range(10):
        creating = asyncio.ensure_future(incidents.create("Disk is full", source="operator"))
        for _ in range(turns):
            await asyncio.sleep(0)
        creating.cancel()
        await asyncio.gather(creating, return_exceptions=True)
        await incidents.list(limit=1000)
    marker = await incidents.create("The last one", source="operator")
    listed = await incidents.list(limit=1000)
    assert marker in listed
    for incident in listed:
        assert await incidents.get(incident.incident_id) == incident


async def test_a_closed_client_says_so() -> None:
    """Before it is opened and after it is closed, every call raises ClientClosed."""
    incidents = IncidentClient.open(MEMORY)
    calls = (
        lambda: incidents.create("Disk is full", source="operator"),
        incidents.list,
        lambda: incidents.get(1),
        lambda: incidents.update_status(1, "new"),
        incidents.check,
    )
    for call in calls:
        with pytest.raises(ClientClosed, match="async with"):
            await call()
    async with incidents:
        await incidents.create("Disk is full", source="operator")
    for call in calls:
        with pytest.raises(ClientClosed):
            await call()
    await incidents.close()


async def test_connecting_twice_does_nothing() -> None:
    """`connect` on an open client changes nothing."""
    async with IncidentClient.open(MEMORY) as incidents:
        await incidents.create("Disk is full", source="operator")
        await incidents.connect()
        assert len(await incidents.list()) == 1


@pytest.mark.parametrize("cached", [False, True])
def test_a_client_can_be_opened_again_on_another_loop(
    sqlite_url: str, redis_url: str, *, cached: bool
) -> None:
    """A client that was closed can be opened again on another event loop."""
    incidents = IncidentClient.open(sqlite_url, redis_url if cached else None)

    async def use() -> None:
        async with incidents:
            await asyncio.gather(
                *(incidents.create("Disk is full", source="operator") for _ in range(5)),
                *(incidents.list() for _ in range(5)),
            )

    asyncio.run(use())
    asyncio.run(use())


async def test_closing_waits_for_writes(sqlite_url: str) -> None:
    """Closing a client waits for a running write, which is stored."""
    incidents = IncidentClient.open(sqlite_url)
    await incidents.connect()
    creating = asyncio.ensure_future(incidents.create("Disk is full", source="operator"))
    await asyncio.sleep(0)
    await incidents.close()
    created = await creating
    async with IncidentClient.open(sqlite_url) as again:
        assert await again.list() == [created]


async def test_from_env_without_settings_is_sqlite_and_a_cache_in_the_process(
    tmp_path: Path,
) -> None:
    """Without settings, incidents are stored in a file in the working directory."""
    async with IncidentClient.from_env() as incidents:
        await incidents.create("Disk is full", source="operator")
        assert incidents.cache_available is None
    assert "incidentkit.db" in {path.name for path in tmp_path.iterdir()}  # noqa: ASYNC240


async def test_from_env_uses_the_servers_that_are_named(
    migrated_postgres_url: str, redis_url: str, tmp_path: Path
) -> None:
    """`from_env` uses the servers that `.env` names."""
    (tmp_path / ".env").write_text(
        f"INCIDENTKIT_DATABASE_URL={migrated_postgres_url}\nINCIDENTKIT_REDIS_URL={redis_url}\n"
    )
    async with IncidentClient.from_env() as incidents:
        await incidents.create("Disk is full", source="operator")
        await incidents.list()
    async with IncidentClient.open(migrated_postgres_url) as incidents:
        assert len(await incidents.list()) == 1
        assert incidents.cache_available is None


def test_a_write_of_another_process_shows_in_the_next_list(sqlite_url: str) -> None:
    """The next list shows an incident from another process, even if the page was cached."""
    program = (
        "import asyncio, sys\n"
        "from incidentkit import IncidentClient\n"
        "async def main():\n"
        "    async with IncidentClient.open(sys.argv[1]) as incidents:\n"
        "        await incidents.create('From elsewhere', source='partner')\n"
        "asyncio.run(main())\n"
    )

    async def main() -> list[Incident]:
        async with IncidentClient.open(sqlite_url) as incidents:
            assert await incidents.list() == []
            assert await incidents.list() == []
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                program,
                sqlite_url,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            assert await process.wait() == 0
            return await incidents.list()

    assert [incident.incident_message for incident in asyncio.run(main())] == ["From elsewhere"]


async def test_a_close_that_was_cancelled_can_be_repeated(sqlite_url: str) -> None:
    """If a close is cancelled before it reaches the cache, the next one closes the cache, once."""
    gate, closed = asyncio.Event(), 0

    class Slow(MemoryCache):
        async def clear(self) -> None:
            await gate.wait()

        async def close(self) -> None:
            nonlocal closed
            closed += 1

    client = IncidentClient(store_from_url(sqlite_url), cache=Slow())
    await client.connect()
    await client.create("Disk is full", source="partner")
    closing = asyncio.ensure_future(client.close())
    await asyncio.wait((closing,), timeout=0.2)
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
    assert closing.cancelled()
    gate.set()
    await client.close()
    assert closed == 1
    await client.close()
    assert closed == 1


def test_a_program_that_forgets_to_close_ends(sqlite_url: str) -> None:
    """A program that never closes its client still ends, and prints nothing."""
    program = (
        "import asyncio, sys\n"
        "from incidentkit import IncidentClient\n"
        "from incidentkit.cache import MemoryCache\n"
        "from incidentkit.store import store_from_url\n"
        "async def main():\n"
        "    incidents = IncidentClient(store_from_url(sys.argv[1]), cache=MemoryCache())\n"
        "    await incidents.connect()\n"
        "    for page in range(3):\n"
        "        await incidents.create('Disk is full', source='partner')\n"
        "        await incidents.list(page + 1)\n"
        "        await incidents.list(page + 2)\n"
        "asyncio.run(main())\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, sqlite_url],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert (ended.stdout, ended.stderr) == ("", "")


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    """A Redis that these tests may kill."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def faulty_redis(redis_server: RedisServer) -> Iterator[RedisServer]:
    """The same Redis, running before and after each test."""
    redis_server.start()
    yield redis_server
    redis_server.resume()
    redis_server.start()


async def test_killing_redis_under_load_changes_no_answer(
    faulty_redis: RedisServer, migrated_postgres_url: str
) -> None:
    """While Redis is killed, paused and restarted, every list is right and no call fails."""
    async with IncidentClient.open(migrated_postgres_url, faulty_redis.url) as incidents:
        stopped = asyncio.Event()
        done: asyncio.Queue[None] = asyncio.Queue()

        async def write_and_read() -> None:
            while not stopped.is_set():
                incident = await incidents.create("Disk is full", source="operator")
                assert incident in await incidents.list(limit=1000)
                changed = await incidents.update_status(incident.incident_id, "completed")
                listed = await incidents.list(limit=1000)
                assert changed in listed
                assert incident not in listed
                done.put_nowait(None)

        async def harm(count: int) -> None:
            for fault in (
                faulty_redis.kill,
                faulty_redis.start,
                faulty_redis.pause,
                faulty_redis.resume,
                faulty_redis.restart,
            ):
                for _ in range(count):
                    await done.get()
                await asyncio.to_thread(fault)
            stopped.set()

        async with asyncio.TaskGroup() as tasks:
            for _ in range(4):
                tasks.create_task(write_and_read())
            tasks.create_task(harm(8))


async def test_redis_away_at_the_start_is_no_error_unless_it_is_required(
    faulty_redis: RedisServer,
) -> None:
    """A client opens without its Redis unless `redis_required` is set."""
    faulty_redis.stop()
    async with IncidentClient.open(MEMORY, faulty_redis.url) as incidents:
        assert incidents.cache_available is False
        incident = await incidents.create("Disk is full", source="operator")
        assert await incidents.list() == [incident]
    required = IncidentClient.open(MEMORY, faulty_redis.url, redis_required=True)
    with pytest.raises(CacheUnavailable):
        await required.connect()
    assert not required.connected


async def test_a_page_that_redis_garbled_is_read_again(redis_url: str, sqlite_url: str) -> None:
    """A page that was altered in Redis is ignored, and the list comes from the database."""
    async with (
        IncidentClient.open(sqlite_url, redis_url) as writer,
        Redis.from_url(redis_url) as redis,
    ):
        incident = await writer.create("Disk is full", source="monitoring")
        await writer.list()
        sealed = await redis.get(KEY)
        assert isinstance(sealed, bytes)
        plain = sealed[sealed.index(b"[") : -1]
        for garbage in (
            *(b"", b"{}", b"[1]", b"\xff", b"[" * 100_000, b'[{"incident_id": 1}]', plain),
            *(sealed[:-1], sealed[:-2] + b"}", sealed.replace(b"incident_id", b"id")),
            sealed.replace(b"Disk", b"Dusk"),
        ):
            await redis.set(KEY, garbage)
            async with IncidentClient.open(sqlite_url, redis_url) as reader:
                assert await reader.list() == [incident]
        await redis.delete(KEY)
        await redis.lpush(KEY, b"not a string")
        async with IncidentClient.open(sqlite_url, redis_url) as reader:
            assert await reader.list() == [incident]


async def test_parts_of_ones_own(sqlite_url: str) -> None:
    """A client uses the store and the cache passed to it."""
    cache = MemoryCache()
    store = store_from_url(sqlite_url)
    async with IncidentClient(store, cache=cache) as incidents:
        assert await incidents.list() == []
        assert incidents.store is store
        await incidents._opened().pages.finish()
        assert json.loads(await cache.get(KEY) or b"")["incidents"] == []


async def test_a_page_in_redis_serves_every_process(
    redis_url: str, migrated_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client takes a page that another one has read from Redis, and keeps it in memory."""
    pages_read = 0
    read = Store.list

    async def counted(store: Store, query: ListQuery) -> Page:
        nonlocal pages_read
        pages_read += 1
        return await read(store, query)

    monkeypatch.setattr(Store, "list", counted)
    async with (
        IncidentClient.open(migrated_postgres_url, redis_url) as one,
        IncidentClient.open(migrated_postgres_url, redis_url) as two,
        Redis.from_url(redis_url) as redis,
    ):
        incident = await one.create("Disk is full", source="operator")
        assert await one.list() == [incident]
        await one._opened().pages.finish()
        assert await two.list() == [incident]
        assert pages_read == 1
        await redis.flushdb()
        assert await one.list() == await two.list() == [incident]
        assert pages_read == 1
        done = await two.update_status(incident.incident_id, "completed")
        assert await one.list() == [done]
        await one._opened().pages.finish()
        assert await two.list() == [done]
        assert pages_read == 2


def test_a_client_closed_while_lists_run_opens_on_another_loop(
    redis_url: str, migrated_postgres_url: str
) -> None:
    """Closing a client ends its running lists, and a reopened client has a working Redis."""
    incidents = IncidentClient.open(migrated_postgres_url, redis_url, redis_required=True)

    async def list_and_close(turns: int) -> None:
        await incidents.connect()
        calls = [asyncio.ensure_future(incidents.list(page)) for page in range(1, 60)]
        for _ in range(turns):
            await asyncio.sleep(0)
        await incidents.close()
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            assert outcome == [] or isinstance(outcome, (ClientClosed, StoreUnavailable))

    for turns in (0, 1, 5, 20, 100):
        asyncio.run(list_and_close(turns))

    async def list_all() -> None:
        async with incidents:
            assert await asyncio.gather(*(incidents.list(page) for page in range(1, 60)))
            assert incidents.cache_available is True

    for _ in range(2):
        asyncio.run(list_all())


async def test_a_client_that_is_closed_while_it_connects_is_closed(sqlite_url: str) -> None:
    """A close during `connect` waits for it, however far it is, and leaves the client closed."""
    for turns in (1, 2, 5, 10):
        incidents = IncidentClient.open(sqlite_url)
        connecting = asyncio.ensure_future(incidents.connect())
        for _ in range(turns):
            await asyncio.sleep(0)
        await incidents.close()
        await connecting
        assert not incidents.connected


async def test_max_staleness_trusts_a_token_for_that_long(sqlite_url: str) -> None:
    """With `max_staleness`, a list may miss other clients' changes but never the client's own."""
    async with (
        IncidentClient.open(sqlite_url, max_staleness=3600) as late,
        IncidentClient.open(sqlite_url) as other,
    ):
        assert await late.list() == []
        theirs = await other.create("Disk is full", source="operator")
        assert await other.list() == [theirs]
        assert await late.list() == []
        own = await late.create("Disk is full", source="operator")
        assert await late.list() == [own, theirs]


@pytest.mark.parametrize("seconds", [-1, -0.001, 3600.1, float("nan"), float("inf"), True, "1"])
def test_a_max_staleness_that_cannot_be_used_is_refused(seconds: Any) -> None:
    """`max_staleness` must be a number of seconds from 0 to 3600, as long as a page is kept."""
    with pytest.raises(InvalidSettings, match="max_staleness") as caught:
        IncidentClient.open(MEMORY, max_staleness=seconds)
    assert caught.value.name == "max_staleness"


async def test_a_database_that_is_away_is_a_typed_error() -> None:
    """`connect` to an unreachable database raises StoreUnavailable; the client stays closed."""
    incidents = IncidentClient.open("postgresql://postgres@127.0.0.1:1/x")
    with pytest.raises(StoreUnavailable):
        await incidents.connect()
    assert not incidents.connected


async def test_connecting_at_once_opens_one_store(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks that connect the same client at once open its store once."""
    opened = 0

    store = store_from_url(sqlite_url)
    open_once = store.open

    async def count() -> None:
        nonlocal opened
        opened += 1
        await open_once()

    monkeypatch.setattr(store, "open", count)
    incidents = IncidentClient(store)
    await asyncio.gather(*(incidents.connect() for _ in range(3)))
    assert opened == 1
    await incidents.close()


async def test_a_failed_write_without_a_caller_is_logged(
    sqlite_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that fails after its caller was cancelled is logged on one line, without values."""
    goes_on = asyncio.Event()

    async def fail(*_: object, **__: object) -> Incident:
        await goes_on.wait()
        raise StoreUnavailable("it is gone")

    store = store_from_url(sqlite_url)
    monkeypatch.setattr(store, "create", fail)
    async with IncidentClient(store) as incidents:
        creating = asyncio.ensure_future(incidents.create("A secret", source="operator"))
        await asyncio.sleep(0)
        creating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await creating
        goes_on.set()
    assert [record.getMessage() for record in caplog.records] == [
        "A write failed after its caller was cancelled: The database is unavailable: it is gone"
    ]

"""One bad thing does not stop the others: dead connections, and locks of other transactions."""

from __future__ import annotations

import asyncio
import gc
import socket
import struct
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from incidentkit import IncidentClient, NewIncident, StoreUnavailable
from incidentkit.store import StoreOptions
from incidentkit.store.share import Share
from incidentkit.store.turns import Turns
from tests.hosts import run_sql
from tests.servers import HOST

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

WAYS = ["url", "pool", "engine", "psycopg"]
"""How a client gets its connections."""

CONNECTIONS = 8


@asynccontextmanager
async def opened(way: str, url: str) -> AsyncIterator[IncidentClient]:
    """Open a client with eight connections at most, all of its own or of a host's."""
    if way == "url":
        options = StoreOptions(pool_size=CONNECTIONS, max_overflow=0)
        async with IncidentClient.open(url, options=options) as client:
            yield client
    elif way == "pool":
        async with (
            asyncpg.create_pool(url, min_size=0, max_size=CONNECTIONS) as pool,
            IncidentClient.open(pool) as client,
        ):
            yield client
    else:
        driver = {"engine": "asyncpg", "psycopg": "psycopg"}[way]
        engine = create_async_engine(
            url.replace("postgresql", f"postgresql+{driver}"),
            pool_size=CONNECTIONS,
            max_overflow=0,
        )
        async with IncidentClient.open(engine) as client:
            yield client
        await engine.dispose()


async def backends(url: str, condition: str = "true") -> int:
    """Count the other connections to the database of a URL."""
    ((count,),) = await run_sql(
        url,
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        f"AND pid <> pg_backend_pid() AND backend_type = 'client backend' AND {condition}",
    )
    return int(count)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(60):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


WAITING = "wait_event_type = 'Lock'"


@asynccontextmanager
async def locked(url: str) -> AsyncIterator[None]:
    """Keep every statement on incidents waiting."""
    host = await asyncpg.connect(url)
    try:
        async with host.transaction():
            await host.execute('LOCK TABLE "Incident"')
            yield
    finally:
        await host.close()


async def fill(client: IncidentClient, url: str) -> None:
    """Make a client open all of its connections, and leave them idle."""
    admin = await asyncpg.connect(url)
    async with admin.transaction():
        await admin.execute('LOCK TABLE "Incident"')
        pages = [
            asyncio.ensure_future(client.search(status=["new"], limit=limit))
            for limit in range(1, CONNECTIONS + 1)
        ]
        await until(lambda: _equals(backends(url, "wait_event_type = 'Lock'"), CONNECTIONS))
    await admin.close()
    await asyncio.gather(*pages)


async def _equals(number: Awaitable[int], wanted: int) -> bool:
    return await number == wanted


CALLS: dict[str, Callable[[IncidentClient, int], Awaitable[object]]] = {
    "get": lambda client, incident_id: client.get(incident_id),
    "list": lambda client, incident_id: client.list(limit=incident_id),
    "search": lambda client, _: client.search(text="disk"),
    "create": lambda client, _: client.create("Disk is full", source="partner"),
    "create_many": lambda client, _: client.create_many(
        [NewIncident("Disk is full", source="partner")] * 2
    ),
    "update_status": lambda client, incident_id: client.update_status(incident_id, "failed"),
    "note": lambda client, incident_id: client.note(incident_id, "It came back"),
    "check": lambda client, _: client.store.check(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("call", CALLS)
async def test_dead_idle_connections_fail_no_call(
    call: str, way: str, migrated_postgres_url: str
) -> None:
    """After the server has ended every idle connection, the next calls succeed, one by one."""
    url = migrated_postgres_url
    async with opened(way, url) as client:
        kept = await client.create("Disk is full", source="monitoring")
        await fill(client, url)
        await run_sql(
            url,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()",
        )
        await until(lambda: _equals(backends(url), 0))
        for _ in range(CONNECTIONS + 1):
            await CALLS[call](client, kept.incident_id)


class Relay:
    """Passes bytes between clients and the server of a URL, and can end connections in two ways.

    Attributes:
        url: The URL for clients.
    """

    SHUTDOWN = b"SFATAL\0VFATAL\0C57P01\0Mterminating connection\0\0"

    def __init__(self, url: str) -> None:
        self.url = url
        self._parts = urlsplit(url)
        self._clients: set[asyncio.StreamWriter] = set()
        self._forgotten: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, HOST)
        port = self._server.sockets[0].getsockname()[1]
        user = self._parts.netloc.rpartition("@")[0]
        self.url = urlunsplit(self._parts._replace(netloc=f"{user}@{HOST}:{port}"))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def announce(self) -> int:
        """Send every client the error of a shutdown, and leave the connections open.

        Returns:
            The number of clients.
        """
        length = (len(self.SHUTDOWN) + 4).to_bytes(4, "big")
        told = len(self._clients)
        while self._clients:
            writer = self._clients.pop()
            writer.write(b"E" + length + self.SHUTDOWN)
            await writer.drain()
        # The clients read it in the next turns of the event loop.
        for _ in range(5):
            await asyncio.sleep(0)
        return told

    def forget(self) -> int:
        """Reset each open connection when its client sends more, as a restarted firewall does.

        Returns:
            The number of connections.
        """
        self._forgotten = {*self._clients}
        return len(self._forgotten)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server = await asyncio.open_connection(self._parts.hostname, self._parts.port)
        self._clients.add(writer)
        for ends in ((reader, server[1]), (server[0], writer)):
            pump = asyncio.ensure_future(self._pump(*ends, client=writer))
            self._pumps.add(pump)

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        client: asyncio.StreamWriter,
    ) -> None:
        try:
            while data := await reader.read(65536):
                if client in self._forgotten:
                    linger = struct.pack("ii", 1, 0)
                    connection = client.get_extra_info("socket")
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    client.transport.abort()
                    return
                writer.write(data)
        finally:
            self._clients.discard(writer)
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("call", CALLS)
async def test_connections_whose_end_is_announced_fail_no_call(
    call: str, way: str, migrated_postgres_url: str
) -> None:
    """Once the server has announced the end of connections, and until they end, calls succeed."""
    url = migrated_postgres_url
    async with Relay(url) as relay, opened(way, relay.url) as client:
        kept = await client.create("Disk is full", source="monitoring")
        await fill(client, url)
        assert await relay.announce() == CONNECTIONS
        for _ in range(CONNECTIONS + 1):
            await CALLS[call](client, kept.incident_id)
        incidents = (await client.search(text="disk", limit=100)).incidents
        assert len(incidents) == 1 + MADE.get(call, 0) * (CONNECTIONS + 1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("call", ["get", "list", "search", "check"])
async def test_forgotten_connections_fail_no_read(
    call: str, way: str, migrated_postgres_url: str
) -> None:
    """After the network has forgotten every idle connection, the next reads succeed."""
    url = migrated_postgres_url
    async with Relay(url) as relay, opened(way, relay.url) as client:
        kept = await client.create("Disk is full", source="monitoring")
        await fill(client, url)
        assert relay.forget() == CONNECTIONS
        for _ in range(CONNECTIONS + 1):
            await CALLS[call](client, kept.incident_id)


MADE = {"create": 1, "create_many": 2}
"""Number of incidents that a call creates."""

WAITERS: dict[str, tuple[str, Callable[[IncidentClient, int], Awaitable[object]]]] = {
    "update_status": (
        'UPDATE "Incident" SET source = source WHERE incident_id = 1',
        lambda client, _: client.update_status(1, "failed"),
    ),
    "back to new": (
        'UPDATE "Incident" SET source = source WHERE incident_id = 1',
        lambda client, _: client.update_status(1, "new"),
    ),
    "note": (
        'UPDATE "Incident" SET source = source WHERE incident_id = 1',
        lambda client, n: client.note(1, f"Note {n}"),
    ),
    "dedup_key": (
        """INSERT INTO "Incident" (incident_message, incident_type, source, dedup_key)
        VALUES ('Order 1 is late', 'new', 'partner', 'order-1')""",
        lambda client, _: client.create("Order 1 is late", source="partner", dedup_key="order-1"),
    ),
    "create_many": (
        """INSERT INTO "Incident" (incident_message, incident_type, source, dedup_key)
        VALUES ('Order 1 is late', 'new', 'partner', 'order-1')""",
        lambda client, _: client.create_many(
            [NewIncident("Order 1 is late", source="partner", dedup_key="order-1")]
        ),
    ),
    "resolve": (
        'UPDATE "Incident" SET source = source WHERE incident_id = 1',
        lambda client, _: client.resolve("disk"),
    ),
    "resolve_many": (
        'UPDATE "Incident" SET source = source WHERE incident_id = 1',
        lambda client, _: client.resolve_many(["disk", "order-1"]),
    ),
    "idempotency_key": (
        "INSERT INTO incident_idempotency_key (idempotency_key, fingerprint) VALUES ('a', 'b')",
        lambda client, _: client.create("Disk is full", source="partner", idempotency_key="a"),
    ),
}
"""What a host's transaction does, and a call that waits for it."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("waiter", WAITERS)
async def test_a_lock_of_a_host_takes_one_connection(
    waiter: str, way: str, migrated_postgres_url: str
) -> None:
    """While 20 calls wait for one lock, one waits in the database, and others are answered."""
    url = migrated_postgres_url
    blocking, call = WAITERS[waiter]
    async with opened(way, url) as client:
        await client.create("Disk is full", source="monitoring", dedup_key="disk")
        neighbour = await client.create("Another disk is full", source="monitoring")
        host = await asyncpg.connect(url)
        transaction = host.transaction()
        await transaction.start()
        await host.execute(blocking)
        calls = [asyncio.ensure_future(call(client, n)) for n in range(20)]
        await until(lambda: _equals(backends(url, "wait_event_type = 'Lock'"), 1))
        for _ in range(CONNECTIONS + 1):
            await client.get(neighbour.incident_id)
            await client.list()
            await client.store.check()
            await client.create("A third disk is full", source="monitoring")
            await client.update_status(neighbour.incident_id, "completed")
            await client.update_status(neighbour.incident_id, "new")
            await client.create("Order 2 is late", source="partner", dedup_key="order-2")
        assert await backends(url, "wait_event_type = 'Lock'") == 1
        await transaction.rollback()
        await host.close()
        await asyncio.gather(*calls)


@pytest.mark.parametrize("way", WAYS)
async def test_locks_of_many_incidents_leave_connections(
    way: str, migrated_postgres_url: str
) -> None:
    """Calls that wait for as many locks as there are connections take half of them."""
    url = migrated_postgres_url
    async with opened(way, url) as client:
        ids = [
            (await client.create(f"Disk {n} is full", source="partner")).incident_id
            for n in range(CONNECTIONS + 1)
        ]
        host = await asyncpg.connect(url)
        transaction = host.transaction()
        await transaction.start()
        await host.execute('SELECT FROM "Incident" FOR UPDATE')
        calls = [asyncio.ensure_future(client.update_status(each, "failed")) for each in ids]
        waiting = "wait_event_type = 'Lock'"
        await until(lambda: _equals(backends(url, waiting), CONNECTIONS // 2))
        for incident_id in ids:
            await client.get(incident_id)
            await client.store.check()
            await client.create("Another disk is full", source="partner")
        assert await backends(url, waiting) == CONNECTIONS // 2
        await transaction.rollback()
        await host.close()
        changed: list[Any] = await asyncio.gather(*calls)
        assert [incident.incident_id for incident in changed] == ids


@pytest.mark.parametrize("way", WAYS)
async def test_writes_that_all_wait_leave_connections_to_reads(
    way: str, migrated_postgres_url: str
) -> None:
    """While a transaction keeps every write waiting, reads are answered."""
    url = migrated_postgres_url
    async with opened(way, url) as client:
        first = await client.create("Disk is full", source="partner")
        host = await asyncpg.connect(url)
        transaction = host.transaction()
        await transaction.start()
        # As CREATE INDEX does.
        await host.execute('LOCK TABLE "Incident" IN SHARE MODE')
        many = [NewIncident("Disk is full", source="partner")]
        calls = [asyncio.ensure_future(client.create_many(many)) for _ in range(2 * CONNECTIONS)]
        waiting = "wait_event_type = 'Lock'"
        writing = CONNECTIONS - CONNECTIONS // 4 - CONNECTIONS // 5
        await until(lambda: _equals(backends(url, waiting), writing))
        for _ in range(CONNECTIONS + 1):
            assert await client.get(first.incident_id) == first
            assert await client.list(limit=1) == [first]
            await client.store.check()
        await transaction.rollback()
        await host.close()
        await asyncio.gather(*calls)


SLOW_WORDS = """
    ALTER FUNCTION incident_characters_1(text) RENAME TO characters_of;
    CREATE FUNCTION incident_characters_1(message text) RETURNS text
    LANGUAGE plpgsql IMMUTABLE STRICT AS $$
    BEGIN
        IF message = 'slöwly' THEN
            PERFORM pg_sleep(600);
        END IF;
        RETURN characters_of(message);
    END $$
"""
"""Makes a search for this word take ten minutes."""

SLEEPING = "wait_event = 'PgSleep'"


async def make_slow(url: str) -> None:
    """Make a search for the word `slöwly` take ten minutes."""
    connection = await asyncpg.connect(url)
    await connection.execute(SLOW_WORDS)
    await connection.close()


@pytest.mark.parametrize("way", WAYS)
async def test_searches_leave_connections(way: str, migrated_postgres_url: str) -> None:
    """Of 20 slow searches as many run as scans may; no other call waits for them."""
    url = migrated_postgres_url
    async with opened(way, url) as client:
        first = await client.create("Disk is full", source="partner")
        await make_slow(url)
        searches = [
            asyncio.ensure_future(client.search(text="slöwly", total=n % 2 == 0)) for n in range(20)
        ]
        await until(lambda: _equals(backends(url, SLEEPING), CONNECTIONS // 5))
        for n in range(CONNECTIONS + 1):
            assert await client.get(first.incident_id) == first
            assert len(await client.list()) == n + 1
            assert len((await client.search(source="partner")).incidents) == n + 1
            assert len(await client.history(first.incident_id)) == 1
            assert (await client.read_changes("latest")).changes == []
            await client.store.check()
            await client.create("Another disk is full", source="partner")
            await client.update_status(n + 2, "failed")
            await client.update_status(n + 2, "new")
        assert await backends(url, SLEEPING) == CONNECTIONS // 5
        for search in searches:
            search.cancel()
        await asyncio.wait(searches)
        await until(lambda: _equals(backends(url, SLEEPING), 0))
        # Connection and place are free again.
        for _ in range(CONNECTIONS + 1):
            assert (await client.search(text="another", total=True)).total == CONNECTIONS + 1


SCANS: dict[str, Callable[[IncidentClient], Awaitable[object]]] = {
    "search": lambda client: client.search(text="disk"),
    "total": lambda client: client.search(text="disk", total=True),
    "export": lambda client: client.search(limit=1000),
    "deep page": lambda client: client.list(page=101),
    "purgeable": lambda client: client.store.purgeable(datetime(2026, 1, 1, tzinfo=UTC)),
}
"""Calls that read very much."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scan", SCANS)
async def test_an_abandoned_scan_is_cancelled(
    scan: str, way: str, migrated_postgres_url: str
) -> None:
    """The server stops an expensive statement whose caller is gone; its connection is reused."""
    url = migrated_postgres_url
    async with opened(way, url) as client:
        await client.create("Disk is full", source="partner")
        async with locked(url):
            for _ in range(CONNECTIONS + 1):
                call = asyncio.ensure_future(SCANS[scan](client))
                await until(lambda: _equals(backends(url, WAITING), 1))
                call.cancel()
                await asyncio.wait([call])
                assert call.cancelled()
                await until(lambda: _equals(backends(url, WAITING), 0))
        await SCANS[scan](client)


STUBBORN_WORDS = SLOW_WORDS.replace(
    "PERFORM pg_sleep(600);",
    """BEGIN
                PERFORM pg_sleep(600);
            EXCEPTION WHEN query_canceled THEN
                PERFORM pg_advisory_lock(1);
            END;""",
)
"""Keeps a cancelled search for `slöwly` running until no one else holds a lock."""


@asynccontextmanager
async def locked_by_advice(url: str) -> AsyncIterator[None]:
    """Keep a search for `slöwly` from ending when it is cancelled."""
    host = await asyncpg.connect(url)
    try:
        await host.execute(STUBBORN_WORDS)
        await host.execute("SELECT pg_advisory_lock(1)")
        yield
    finally:
        await host.close()


@pytest.mark.parametrize("way", WAYS)
async def test_a_place_is_free_once_the_server_has_stopped(
    way: str, migrated_postgres_url: str
) -> None:
    """Searches that are abandoned take no further connections until the server has stopped them."""
    url = migrated_postgres_url
    async with opened(way, url) as client:
        first = await client.create("Disk is full", source="partner")
        async with locked_by_advice(url):
            call = asyncio.ensure_future(client.search(text="slöwly"))
            await until(lambda: _equals(backends(url, SLEEPING), 1))
            call.cancel()
            await asyncio.wait([call])
            await until(lambda: _equals(backends(url, WAITING), 1))
            calls = [asyncio.ensure_future(client.search(text="slöwly")) for _ in range(20)]
            for _ in range(CONNECTIONS + 1):
                assert await client.get(first.incident_id) == first
                await client.create("Disk is full", source="partner")
            assert await backends(url, f"({SLEEPING} OR {WAITING})") == 1
            for call in calls:
                call.cancel()
            await asyncio.wait(calls)
        assert len((await client.search(text="disk")).incidents) == CONNECTIONS + 2


async def test_a_search_is_cancelled_at_its_time_limit(migrated_postgres_url: str) -> None:
    """A search that takes too long fails, and the server stops it."""
    url = migrated_postgres_url
    async with IncidentClient.open(url, options=StoreOptions(statement_timeout=2)) as client:
        await client.create("Disk is full", source="partner")
        await make_slow(url)
        with pytest.raises(StoreUnavailable, match="did not answer in time"):
            await client.search(text="slöwly")
        await until(lambda: _equals(backends(url, SLEEPING), 0))
        assert len((await client.search(text="disk")).incidents) == 1


async def test_a_search_waits_for_its_place_only_so_long(migrated_postgres_url: str) -> None:
    """A search that finds no place in time fails, and says that other searches take it up."""
    url = migrated_postgres_url
    options = StoreOptions(pool_size=5, max_overflow=0, pool_timeout=0.1)
    async with IncidentClient.open(url, options=options) as client:
        kept = await client.create("Disk is full", source="partner")
        await make_slow(url)
        search = asyncio.ensure_future(client.search(text="slöwly"))
        await until(lambda: _equals(backends(url, SLEEPING), 1))
        with pytest.raises(StoreUnavailable, match="all 1 connections for searches"):
            await client.search(text="disk")
        search.cancel()
        await asyncio.wait([search])
        assert (await client.search(text="disk")).incidents == [kept]


@pytest.mark.parametrize("way", WAYS)
async def test_a_search_that_is_ended_with_its_connection_runs_once_more(
    way: str, migrated_postgres_url: str
) -> None:
    """A search whose connection an administrator ends is sent a second time, and no third time."""
    url = migrated_postgres_url
    async with opened(way, url) as client:
        await fill(client, url)
        ended: set[int] = set()
        async with locked(url):
            search = asyncio.ensure_future(client.search(text="disk"))
            while not search.done():
                rows = await run_sql(
                    url,
                    "SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity "
                    f"WHERE datname = current_database() AND {WAITING}",
                )
                ended |= {row[0] for row in rows}
                await asyncio.sleep(0.01)
        assert len(ended) == 2
        with pytest.raises(StoreUnavailable):
            await search


async def test_a_shared_deep_page_is_read_as_long_as_one_call_waits(
    migrated_postgres_url: str,
) -> None:
    """The statement of a page that several calls wait for is stopped when all of them are gone."""
    url = migrated_postgres_url
    async with opened("url", url) as client:
        async with locked(url):
            *gone, last = (asyncio.ensure_future(client.list(page=101)) for _ in range(3))
            await until(lambda: _equals(backends(url, WAITING), 1))
            for call in gone:
                call.cancel()
            await asyncio.wait(gone)
            assert await backends(url, WAITING) == 1
        assert await last == []
        async with locked(url):
            calls = [asyncio.ensure_future(client.list(page=102)) for _ in range(3)]
            await until(lambda: _equals(backends(url, WAITING), 1))
            for call in calls:
                call.cancel()
            await asyncio.wait(calls)
            await until(lambda: _equals(backends(url, WAITING), 0))


async def test_a_call_waits_for_its_turn_only_so_long() -> None:
    """A call whose turn does not come in time raises an error: others wait for the lock."""
    turns = Turns(2, 0.01)
    async with turns([("incident_id", 1)]):
        with pytest.raises(StoreUnavailable, match="this incident_id waited"):
            async with turns([("incident_id", 1)]):
                pass
        async with turns([("incident_id", 2)]):
            with pytest.raises(StoreUnavailable, match="2 other calls"):
                async with turns([("incident_id", 3)]):
                    pass
    async with turns([("incident_id", 1), ("incident_id", 2)]):
        pass
    gc.collect()
    assert not turns._keys


async def test_a_cancelled_call_leaves_its_place() -> None:
    """A place that a cancelled call waits for, or holds, goes to the next one."""
    share = Share(1, 60, "all are in use")

    async def hold(event: asyncio.Event) -> None:
        async with share:
            await event.wait()

    never, now = asyncio.Event(), asyncio.Event()
    now.set()
    holding, waiting = (asyncio.ensure_future(hold(never)) for _ in range(2))
    await asyncio.sleep(0)
    waiting.cancel()
    last = asyncio.ensure_future(hold(now))
    await asyncio.sleep(0)
    holding.cancel()
    async with asyncio.timeout(60):
        await last

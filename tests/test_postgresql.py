"""The PostgreSQL store on a server that is slow, hung, killed or out of connections."""

from __future__ import annotations

import asyncio
import ssl
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from asyncpg.prepared_stmt import PreparedStatement
from attrs import asdict

from incidentkit import (
    IncidentClient,
    InvalidSettings,
    ListQuery,
    NewIncident,
    StoreUnavailable,
)
from incidentkit.domain.commands import StatusChange
from incidentkit.opening import store_on
from incidentkit.store import RequestRecord, StoreOptions
from incidentkit.store.migrate import upgrade
from incidentkit.store.ports import IncidentStore
from incidentkit.store.request_log import INSERT_REQUEST
from tests.servers import PostgresServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

DISK_FULL = NewIncident("Disk is full", source="monitoring")
QUICK = StoreOptions(
    pool_size=2, max_overflow=1, connect_timeout=1, pool_timeout=0.5, statement_timeout=0.5
)


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A server that these tests may kill."""
    with PostgresServer() as server:
        asyncio.run(upgrade(server.url))
        yield server


@pytest.fixture
async def store(server: PostgresServer) -> AsyncIterator[IncidentStore]:
    """A store with short timeouts on that server."""
    store = store_on(server.url, QUICK)
    await store.open()
    yield store
    server.resume()
    server.start()
    await store.close()


async def test_a_killed_server_is_unavailable_and_comes_back(
    server: PostgresServer, store: IncidentStore
) -> None:
    """Calls on a dead server raise StoreUnavailable, and succeed again after its restart."""
    kept = await store.create(DISK_FULL)
    server.kill()
    for call in (
        store.get(1),
        store.list(ListQuery()),
        store.create(DISK_FULL),
        store.update_status(StatusChange(1, "failed")),
        store.check(),
    ):
        with pytest.raises(StoreUnavailable):
            await call
    server.start()
    assert await store.get(kept.incident_id) == kept
    assert (await store.create(DISK_FULL)).incident_id > kept.incident_id


async def test_a_read_survives_a_restart_between_calls(
    server: PostgresServer, store: IncidentStore
) -> None:
    """The first read after a restart succeeds, although its pooled connection is dead."""
    kept = await store.create(DISK_FULL)
    await asyncio.gather(*(store.get(kept.incident_id) for _ in range(3)))
    server.restart()
    assert await store.get(kept.incident_id) == kept


async def test_a_connection_that_the_server_ends_is_replaced(
    server: PostgresServer, store: IncidentStore
) -> None:
    """A backend that an administrator terminates is replaced without an error in the caller."""
    kept = await store.create(DISK_FULL)
    admin = await asyncpg.connect(server.url)
    await admin.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
    )
    await admin.close()
    assert await store.get(kept.incident_id) == kept


async def test_a_connection_that_is_out_of_step_is_replaced(
    store: IncidentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection the driver has lost track of is closed, and the read is retried on another."""
    kept = await store.create(DISK_FULL)
    used: list[asyncpg.Connection[asyncpg.Record]] = []
    fetch = PreparedStatement.fetch

    async def fail_once(prepared: Any, *arguments: Any, **options: Any) -> Any:
        used.append(prepared._connection)
        if len(used) == 1:
            raise asyncpg.InternalClientError("another operation is in progress")
        return await fetch(prepared, *arguments, **options)

    monkeypatch.setattr(PreparedStatement, "fetch", fail_once)
    assert await store.get(kept.incident_id) == kept
    assert len(used) == 2
    assert used[0].is_closed()
    assert not used[1].is_closed()


async def test_a_hung_server_is_unavailable_within_the_timeouts(
    server: PostgresServer, store: IncidentStore
) -> None:
    """Calls on a server that accepts and never answers fail within the timeouts."""
    await store.create(DISK_FULL)
    server.pause()
    async with asyncio.timeout(20):
        outcomes = await asyncio.gather(*(store.get(1) for _ in range(6)), return_exceptions=True)
    assert all(isinstance(outcome, StoreUnavailable) for outcome in outcomes)
    server.resume()
    assert await store.get(1) is not None


@pytest.mark.parametrize("call", ["get", "append"])
async def test_a_cancelled_call_does_not_wait_for_a_hung_server(
    server: PostgresServer, call: str
) -> None:
    """A caller's own timeout ends a call on a hung server at once."""
    store: Any = store_on(server.url, StoreOptions(pool_timeout=3600, statement_timeout=3600))
    await store.open()
    record = asdict(RequestRecord(datetime.now(UTC), "GET", "/", 200, 1.0, "id"))
    server.pause()
    try:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await (store.get(1) if call == "get" else store.append(INSERT_REQUEST, [record]))
    finally:
        server.resume()
    assert await store.list(ListQuery()) is not None
    await store.close()


async def test_a_slow_statement_is_ended(server: PostgresServer, store: IncidentStore) -> None:
    """A statement that exceeds its timeout raises StoreUnavailable; the store stays usable."""
    kept = await store.create(DISK_FULL)
    host = await asyncpg.connect(server.url)
    async with host.transaction():
        await host.execute('LOCK TABLE "Incident"')
        with pytest.raises(StoreUnavailable, match="did not answer in time"):
            await store.get(kept.incident_id)
    await host.close()
    assert await store.get(kept.incident_id) == kept


async def test_waiting_for_a_connection_ends(server: PostgresServer, store: IncidentStore) -> None:
    """With every connection blocked, each call raises StoreUnavailable instead of hanging."""
    host = await asyncpg.connect(server.url)
    async with host.transaction():
        await host.execute('LOCK TABLE "Incident"')
        outcomes = await asyncio.gather(*(store.get(1) for _ in range(12)), return_exceptions=True)
    await host.close()
    assert all(isinstance(outcome, StoreUnavailable) for outcome in outcomes)


async def test_an_unknown_parameter_is_told(server: PostgresServer) -> None:
    """A parameter that the server does not know is named, by a client and by a migration."""
    for parameter in ("nonsense", "search_pathe", "statement_timeout"):
        url = f"{server.url}?{parameter}=nonsense"
        for work in (store_on(url, QUICK).open(), upgrade(url)):
            with pytest.raises(InvalidSettings, match=rf"database_url .*\b{parameter}\b"):
                await work


async def test_no_more_connections_than_the_pool_may_have(
    server: PostgresServer, store: IncidentStore
) -> None:
    """Under load there are at most `pool_size` + `max_overflow` connections."""
    await store.create(DISK_FULL)
    await asyncio.gather(*(store.get(1) for _ in range(50)))
    admin = await asyncpg.connect(server.url)
    # Connections of an earlier test may still be closing.
    async with asyncio.timeout(60):
        while True:
            open_connections = await admin.fetchval(
                "SELECT count(*) FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
            )
            if 1 <= open_connections <= QUICK.pool_size + QUICK.max_overflow:
                break
    await admin.close()


@pytest.mark.parametrize(
    ("account", "reason"),
    [
        ("postgres@{host}/nowhere", "no such database"),
        ("nobody@{host}/postgres", "does not admit this user"),
    ],
)
async def test_a_wrong_account_or_database_is_told(
    server: PostgresServer, account: str, reason: str
) -> None:
    """A refused login says whether the account or the database is wrong, and on which server."""
    host = server.url.partition("@")[2].partition("/")[0]
    store = store_on("postgresql://" + account.format(host=host), QUICK)
    with pytest.raises(StoreUnavailable, match=reason) as caught:
        await store.open()
    assert caught.value.place == f"{host}/{account.rpartition('/')[2]}"
    assert not caught.value.retryable


async def test_number_of_statements_of_each_call(
    migrated_postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each method sends the listed statements: most send one, without BEGIN, COMMIT or reset."""
    one, two = ListQuery(limit=5), [DISK_FULL] * 2
    caplog.set_level("INFO", "incidentkit.store")
    options = StoreOptions(echo=True)
    async with IncidentClient.open(migrated_postgres_url, options=options) as incidents:
        store = incidents.store
        calls: list[tuple[Callable[[], Awaitable[object]], list[str]]] = [
            (lambda: store.create(DISK_FULL), ["WITH"]),
            (lambda: incidents.create("Disk is full", source="partner", dedup_key="a"), ["WITH"]),
            (lambda: incidents.create("Disk is full", source="partner", dedup_key="a"), ["WITH"]),
            (lambda: incidents.get(1), ["SELECT"]),
            (lambda: incidents.list(status="new"), ["SELECT"]),
            # The page is cached; only the token is read.
            (lambda: incidents.list(status="new"), ["SELECT"]),
            (lambda: incidents.list_json(one), ["SELECT"]),
            (lambda: incidents.search(source="partner"), ["SELECT"]),
            (lambda: incidents.search(source="partner", total=True), ["SELECT"]),
            (lambda: incidents.search(limit=1, total=True), ["SELECT"] * 2),
            (lambda: incidents.search(text="disk", total=True), ["WITH"]),
            (lambda: incidents.search(text="disk", limit=1), ["WITH"]),
            (lambda: incidents.search(text="disk"), ["WITH"] * 2),
            (lambda: incidents.update_status(1, "failed"), ["WITH"]),
            (lambda: incidents.note(1, "It came back"), ["WITH"]),
            (lambda: incidents.history(1), ["SELECT"]),
            # A check that the order of the feed still holds, then the changes.
            (incidents.read_changes, ["SELECT"] * 2),
            (lambda: incidents.create_many(two), ["BEGIN", "WITH", "COMMIT"]),
            (
                lambda: incidents.create("Disk is full", source="partner", idempotency_key="once"),
                ["BEGIN", "DELETE", "INSERT", "WITH", "UPDATE", "COMMIT"],
            ),
        ]
        counted = []
        for call, _ in calls:
            caplog.clear()
            await call()
            counted.append([record.getMessage().split()[0] for record in caplog.records])
    assert counted == [expected for _, expected in calls]


async def test_a_write_is_answered_although_its_connection_is_lost_afterwards(
    migrated_postgres_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stored incident is returned even if the driver then fails to take its connection back."""
    async with (
        asyncpg.create_pool(migrated_postgres_url, min_size=1, max_size=1) as pool,
        IncidentClient.open(pool) as incidents,
    ):

        async def fail(*_: object, **__: object) -> None:
            raise asyncpg.InternalClientError("cannot switch to state 15")

        with monkeypatch.context() as patch:
            patch.setattr(asyncpg.Pool, "release", fail)
            try:
                incident = await incidents.create("Disk is full", source="monitoring")
            finally:
                pool.terminate()
        assert incident.incident_id == 1
    assert "lost when given back: InternalClientError" in caplog.text


async def test_a_certificate_that_is_refused_later_makes_the_database_unavailable(
    server: PostgresServer, store: IncidentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An open client that cannot connect again blames the database, not its URL."""
    await store.create(DISK_FULL)
    admin = await asyncpg.connect(server.url)
    await admin.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
    )
    await admin.close()

    async def refuse(*_: object, **__: object) -> None:
        raise ssl.SSLCertVerificationError("certificate has expired")

    monkeypatch.setattr("asyncpg.connect_utils._connect_addr", refuse)
    with pytest.raises(StoreUnavailable):
        await store.get(1)

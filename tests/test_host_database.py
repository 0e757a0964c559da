"""A client on an engine or pool that the application has opened."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from contextlib import AsyncExitStack, asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from threading import Event
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from attrs import asdict
from sqlalchemy import (
    AsyncAdaptedQueuePool,
    NullPool,
    QueuePool,
    create_engine,
    event,
    inspect,
    text,
)
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from incidentkit import (
    ClientClosed,
    DuplicateOpenIncident,
    IdempotencyKeyReused,
    IncidentClient,
    IncidentNotFound,
    InvalidSettings,
    NewIncident,
    SchemaOutOfDate,
    StoreError,
    StoreUnavailable,
    VersionConflict,
    acting_as,
)
from incidentkit.store import RequestRecord, StoreOptions
from incidentkit.store.hosts import sqlite_engine
from incidentkit.store.migrate import downgrade, upgrade
from incidentkit.store.ports import BEGINNING
from incidentkit.store.request_log import INSERT_REQUEST
from tests.endless import Endless
from tests.hosts import begin_by_itself, host_engine, run_sql

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

DATABASES = (
    "sqlite",
    "sqlite-begins",
    "sqlite-autocommit",
    "sqlite-driver-autocommit",
    "sqlite-unpooled",
    "memory",
    # Recommended by Python's documentation since 3.12.
    *(("sqlite-modern", "memory-modern") if hasattr(sqlite3.Connection, "autocommit") else ()),
    "engine",
    "engine-autocommit",
    "engine-serializable",
    "engine-unpooled",
    "pool",
    "pool-small",
    "pool-with-codecs",
)


async def _teach(connection: Any) -> None:
    await connection.set_type_codec(
        "jsonb", schema="pg_catalog", encoder=str, decoder=len, format="text"
    )
    await connection.execute("SET TIME ZONE 'Asia/Tokyo'")


OPTIONS: dict[str, dict[str, Any]] = {
    "sqlite-autocommit": {"isolation_level": "AUTOCOMMIT"},
    "sqlite-driver-autocommit": {"connect_args": {"isolation_level": None}},
    "sqlite-modern": {"connect_args": {"autocommit": False}},
    "memory-modern": {"connect_args": {"autocommit": False}},
    "sqlite-unpooled": {"poolclass": NullPool},
    "engine-autocommit": {"isolation_level": "AUTOCOMMIT"},
    "engine-serializable": {"isolation_level": "SERIALIZABLE", "pool_size": 1, "max_overflow": 0},
    "engine-unpooled": {"poolclass": NullPool},
    "pool-small": {"min_size": 1, "max_size": 1, "statement_cache_size": 0},
    "pool-with-codecs": {"init": _teach, "setup": _teach, "record_class": asyncpg.Record},
}


@asynccontextmanager
async def opened(name: str, url: str) -> AsyncIterator[AsyncEngine | asyncpg.Pool[asyncpg.Record]]:
    """Open an engine or a pool as a host would."""
    options = OPTIONS.get(name, {})
    if name.startswith("pool"):
        async with asyncpg.create_pool(url, **options) as pool:
            yield pool
    else:
        url = "sqlite+aiosqlite:///:memory:" if name.startswith("memory") else url
        async with host_engine(url, **options) as engine:
            if name == "sqlite-begins":
                begin_by_itself(engine)
            yield engine


async def works(database: AsyncEngine | asyncpg.Pool[asyncpg.Record]) -> bool:
    """Return whether the host can use its engine or pool."""
    if isinstance(database, AsyncEngine):
        async with database.connect() as connection:
            return (await connection.execute(text("SELECT 1"))).all() == [(1,)]
    return bool(await database.fetchval("SELECT 1"))


@pytest.fixture(params=DATABASES)
def name(request: pytest.FixtureRequest) -> str:
    """Each kind of engine and pool."""
    return str(request.param)


@pytest.fixture
def url(name: str, request: pytest.FixtureRequest) -> str:
    """The URL of the host's database."""
    on_postgres = name.startswith(("engine", "pool"))
    fixture = "migrated_postgres_url" if on_postgres else "migrated_sqlite_url"
    return str(request.getfixturevalue(fixture))


@pytest.fixture
async def database(
    name: str, url: str
) -> AsyncIterator[AsyncEngine | asyncpg.Pool[asyncpg.Record]]:
    """The host's engine or pool."""
    async with opened(name, url) as database:
        yield database


@pytest.fixture
async def client(
    database: AsyncEngine | asyncpg.Pool[asyncpg.Record],
) -> AsyncIterator[IncidentClient]:
    """A client on the host's engine or pool."""
    async with IncidentClient.open(
        database, transitions={"new": ["failed"], "failed": ["new"]}
    ) as client:
        yield client


async def test_everything_a_client_does_works(client: IncidentClient) -> None:
    """Writes, reads, keys, conflicts, the feed and the request log work as on a URL."""
    await client.check()
    with acting_as("shop"):
        created = await client.create(
            "Order 1 is late", source="partner", dedup_key="order-1", idempotency_key="key"
        )
        assert (
            await client.create(
                "Order 1 is late", source="partner", dedup_key="order-1", idempotency_key="key"
            )
            == created
        )
        with pytest.raises(IdempotencyKeyReused):
            await client.create("Order 2 is late", source="partner", idempotency_key="key")
    seen = await client.create("Order 1 is late", source="partner", dedup_key="order-1")
    assert (seen.incident_id, seen.occurrences) == (1, 2)
    with pytest.raises(VersionConflict):
        await client.update_status(1, "failed", expected_version=1, idempotency_key="other")
    failed = await client.update_status(1, "failed", note="Lost", idempotency_key="other")
    assert datetime.now(UTC) - created.created_at < timedelta(hours=1)
    second = await client.create("Order 1 is late", source="partner", dedup_key="order-1")
    with pytest.raises(DuplicateOpenIncident):
        await client.update_status(1, "new")
    with pytest.raises(IncidentNotFound):
        await client.note(99, "Lost")
    noted = await client.note(1, "Found")
    assert await client.get(1) == failed
    assert await client.list() == [second, failed]
    assert await client.list(status="failed") == [failed]
    history = await client.history(1)
    assert [str(each.kind) for each in history] == [
        "created",
        "recurred",
        "status_changed",
        "noted",
    ]
    assert history[0].actor == "shop"
    assert history[-1] == noted
    async with asyncio.timeout(60):
        while len(await client.store.changes(BEGINNING, 10)) < 5:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert await client.store.purge(datetime.now(UTC) + timedelta(hours=1), 10) == (1, False)
    assert await client.list() == [second]
    store: Any = client.store
    record = RequestRecord(datetime.now(UTC), "GET", "/", 200, 1.0, "id")
    await store.append(INSERT_REQUEST, [asdict(record)])


async def test_concurrent_calls_lose_nothing(client: IncidentClient) -> None:
    """Many concurrent calls all succeed, however few connections the host has."""
    await asyncio.gather(
        *(client.create("Order 1 is late", source="partner", dedup_key="1") for _ in range(10)),
        *(client.create("Order", source="partner", idempotency_key="key") for _ in range(5)),
        *(client.list() for _ in range(10)),
    )
    incidents = await client.list()
    assert sorted(one.occurrences for one in incidents) == [1, 10]
    assert sum([len(await client.history(one.incident_id)) for one in incidents]) == 11


async def test_what_the_host_opened_stays_open(
    database: AsyncEngine | asyncpg.Pool[asyncpg.Record],
) -> None:
    """Closing the client leaves the host's engine or pool open, and the client can be reopened."""
    client = IncidentClient.open(database)
    for number in (1, 2):
        async with client:
            created = await client.create("Order 1 is late", source="partner")
            assert created.incident_id == number
        assert await works(database)
        with pytest.raises(ClientClosed):
            await client.list()
        store: Any = client.store
        with pytest.raises(ClientClosed):
            await store.append(INSERT_REQUEST, [])
    # The pool of an engine on SQLite counts them only from SQLAlchemy 2.0.38 on.
    if isinstance(database, AsyncEngine) and isinstance(database.pool, QueuePool):
        assert database.pool.checkedout() == 0


@pytest.mark.parametrize("name", [name for name in DATABASES if not name.startswith("pool")])
async def test_nothing_of_the_hosts_is_configured(
    name: str, database: AsyncEngine | asyncpg.Pool[asyncpg.Record]
) -> None:
    """The client changes no settings of the host's connections, and its transactions still work."""
    assert isinstance(database, AsyncEngine)
    statements: list[str] = []
    async with IncidentClient.open(database) as client:
        event.listen(
            database.sync_engine, "before_cursor_execute", lambda *args: statements.append(args[2])
        )
        await client.create("Order 1 is late", source="partner", idempotency_key="key")
        await client.list()
        assert not [one for one in statements if one.startswith(("PRAGMA", "SET "))]
    async with database.connect() as connection:
        await connection.execute(text("DELETE FROM request_log"))
        await connection.execute(text("CREATE TABLE orders (order_id INTEGER)"))
        await connection.rollback()
        kept = "autocommit" in name
        names = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
        assert ("orders" in names) is kept


async def test_a_caller_that_is_cancelled_leaves_the_database_whole(
    client: IncidentClient, database: AsyncEngine | asyncpg.Pool[asyncpg.Record]
) -> None:
    """Whenever calls are cancelled, host and client stay usable and every incident is whole."""
    await client.create("Order 1 is late", source="partner")
    for turns in range(0, 24, 2):
        calls = [
            asyncio.ensure_future(call)
            for call in (
                client.create("Order 1 is late", source="partner", idempotency_key=f"k{turns}"),
                client.get(1),
                client.list(),
                client.history(1),
            )
        ]
        for _ in range(turns):
            await asyncio.sleep(0)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    # An in-memory database has one connection, which the host must not take during a write.
    store: Any = client.store
    running = getattr(store._connections, "_running", None)
    if running:
        await asyncio.wait(running)
    assert await works(database)
    incidents = await client.list(limit=1000)
    for incident in incidents:
        assert len(await client.history(incident.incident_id)) == 1


@pytest.mark.parametrize("name", [name for name in DATABASES if "autocommit" not in name])
async def test_a_transaction_of_the_host_can_be_joined(
    client: IncidentClient, database: AsyncEngine | asyncpg.Pool[asyncpg.Record]
) -> None:
    """A transaction on the host's engine or pool can be joined, then committed or rolled back."""
    for commits in (False, True):
        async with AsyncExitStack() as stack:
            if isinstance(database, AsyncEngine):
                session = await stack.enter_async_context(AsyncSession(database))
                joined = client.join(session)
                end: Any = session
            else:
                connection = await stack.enter_async_context(database.acquire())
                end = connection.transaction()
                await end.start()
                joined = client.join(connection)
            created = await joined.create("Order 1 is late", source="partner")
            assert await joined.list() == [created]
            await (end.commit() if commits else end.rollback())
        assert await client.list() == ([created] if commits else [])


async def test_options_are_only_for_a_url(
    database: AsyncEngine | asyncpg.Pool[asyncpg.Record],
) -> None:
    """Sizes and limits beside a host's engine or pool raise InvalidSettings."""
    with pytest.raises(InvalidSettings, match="options other than prepared_statements are only"):
        IncidentClient.open(database, options=StoreOptions(pool_size=1))
    IncidentClient.open(database, options=StoreOptions(prepared_statements=True))


async def test_other_objects_are_refused(tmp_path: Any) -> None:
    """Any other object raises InvalidSettings, which names what is accepted."""
    engine = create_engine(f"sqlite:///{tmp_path / 'x.db'}")
    wrongs: list[Any] = [None, 1, engine, AsyncSession(), asyncpg]
    for wrong in wrongs:
        with pytest.raises(InvalidSettings, match="an AsyncEngine on PostgreSQL"):
            IncidentClient.open(wrong)


@pytest.mark.parametrize("name", ["engine", "pool"])
async def test_another_schema_is_told(name: str, migrated_postgres_url: str) -> None:
    """Opening an outdated PostgreSQL schema raises an error that names the command to run."""
    await downgrade(migrated_postgres_url)
    async with opened(name, migrated_postgres_url) as database:
        with pytest.raises(SchemaOutOfDate, match="incidentkit db upgrade"):
            await IncidentClient.open(database).connect()
        assert await works(database)


async def test_a_file_is_brought_up_to_date(sqlite_url: str) -> None:
    """Opening migrates an SQLite file, even if the engine's URL has parameters for the driver."""
    async with host_engine(f"{sqlite_url}?timeout=20") as engine:
        async with IncidentClient.open(engine) as client:
            await client.create("Order 1 is late", source="partner")
        await downgrade(sqlite_url)
        async with IncidentClient.open(engine) as client:
            assert len(await client.list()) == 1


@pytest.mark.parametrize("name", ["engine", "engine-unpooled", "pool-small"])
async def test_a_connection_that_is_ended_is_replaced(
    name: str, migrated_postgres_url: str
) -> None:
    """A read on a terminated connection is retried; a write succeeds or raises an error."""
    end = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    async with (
        opened(name, migrated_postgres_url) as database,
        IncidentClient.open(database) as client,
    ):
        await client.create("Order 1 is late", source="partner")
        await run_sql(migrated_postgres_url, end)
        assert len(await client.list()) == 1
        await run_sql(migrated_postgres_url, end)
        try:
            await client.create("Order 2 is late", source="partner")
        except StoreUnavailable:
            await client.create("Order 2 is late", source="partner")
        assert len(await client.list()) == 2


@pytest.mark.parametrize("name", ["engine", "pool"])
async def test_a_server_that_is_away_is_unavailable(name: str) -> None:
    """Connecting to an unreachable server raises StoreUnavailable."""
    url = "postgresql://postgres@127.0.0.1:1/postgres"
    async with AsyncExitStack() as stack:
        if name == "engine":
            database = await stack.enter_async_context(opened(name, url))
        else:
            database = await stack.enter_async_context(asyncpg.create_pool(url, min_size=0))
        with pytest.raises(StoreUnavailable):
            await IncidentClient.open(database).connect()


@pytest.mark.parametrize("name", ["engine", "pool"])
async def test_a_host_that_has_closed_is_told(name: str, migrated_postgres_url: str) -> None:
    """A pool that the host has closed raises StoreError; a disposed engine still works."""
    async with opened(name, migrated_postgres_url) as database:
        client = IncidentClient.open(database)
        await client.connect()
        await (database.dispose() if isinstance(database, AsyncEngine) else database.close())
        if name == "engine":
            # A disposed engine opens new connections.
            assert await client.list() == []
        else:
            with pytest.raises(StoreError):
                await client.list()
        await client.close()


async def test_the_only_connection_is_left_to_its_transaction() -> None:
    """While a transaction has an in-memory database's only connection, other calls are refused."""
    async with (
        host_engine("sqlite+aiosqlite:///:memory:") as engine,
        IncidentClient.open(engine) as client,
    ):
        async with engine.begin() as connection:
            await connection.execute(text("CREATE TABLE orders (order_id INTEGER)"))
        async with engine.connect() as connection:
            await connection.execute(text("INSERT INTO orders VALUES (1)"))
            await client.join(connection).create("Order 1 is late", source="partner")
            for call in (client.list(), client.create("Order 2 is late", source="partner")):
                with pytest.raises(StoreUnavailable, match="only connection"):
                    await call
            await connection.commit()
            assert (await connection.execute(text("SELECT * FROM orders"))).all() == [(1,)]
        assert len(await client.list()) == 1


async def test_a_pool_that_is_not_open_is_told(migrated_postgres_url: str) -> None:
    """A pool that was not awaited yet raises StoreError."""
    pool = asyncpg.create_pool(migrated_postgres_url)
    with pytest.raises(StoreError):
        await IncidentClient.open(pool).connect()


async def test_a_file_of_another_schema_is_refused(sqlite_url: str) -> None:
    """A file whose schema is newer than the package is refused on a host's engine too."""
    await upgrade(sqlite_url)
    await run_sql(sqlite_url, "UPDATE incidentkit_version SET version_num = 'newer'")
    async with host_engine(sqlite_url) as engine:
        with pytest.raises(SchemaOutOfDate, match="pip install --upgrade"):
            await IncidentClient.open(engine).connect()


@pytest.mark.parametrize("name", ["sqlite", "sqlite-begins", "sqlite-unpooled"])
async def test_an_abandoned_search_leaves_a_host_its_connections(
    name: str, sqlite_url: str
) -> None:
    """On a host's engine, scans have a share; an abandoned one is interrupted, and nothing else."""
    async with opened(name, sqlite_url) as engine:
        assert isinstance(engine, AsyncEngine)
        async with IncidentClient.open(engine) as client:
            created = await client.create("Disk is full", source="partner")
            endless = Endless(engine.sync_engine)
            searches = [
                *(asyncio.ensure_future(client.search(text="disk", total=True)) for _ in range(9)),
                *(asyncio.ensure_future(client.list(page=101)) for _ in range(9)),
            ]
            await endless.until_running(3)
            for _ in range(5):
                assert await client.get(created.incident_id) == created
                await client.store.check()
                await client.create("Line is down", source="partner")
            assert endless.running == 3
            for search in searches:
                search.cancel()
            await asyncio.wait(searches)
            await endless.until_running(0)
            endless.on = False
            assert (await client.search(text="line", total=True)).total == 5
            assert await client.list(page=101) == []


@pytest.mark.parametrize("name", ["sqlite", "sqlite-begins", "sqlite-autocommit"])
async def test_a_write_that_was_given_up_is_not_done_later(
    name: str, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that timed out before it began stores nothing later."""
    async with opened(name, sqlite_url) as engine:
        async with IncidentClient.open(engine) as client:
            monkeypatch.setattr(sqlite_engine, "PATIENCE", 0.3)
            with closing(sqlite3.connect(sqlite_url.partition("///")[2])) as other:
                other.execute("BEGIN IMMEDIATE")
                with pytest.raises(StoreUnavailable, match="did not answer in time"):
                    await client.create("Disk is full", source="partner")
                other.execute("ROLLBACK")
            monkeypatch.undo()
        async with IncidentClient.open(engine) as client:
            assert await client.list() == []


async def test_a_write_that_has_begun_is_waited_for(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller of a write that has begun learns whether it was stored."""
    async with host_engine(sqlite_url) as engine, IncidentClient.open(engine) as client:

        @event.listens_for(engine.sync_engine, "before_cursor_execute")
        def hold(*arguments: Any) -> None:
            if 'INSERT INTO "Incident"' in arguments[2]:
                driver = arguments[0].connection.dbapi_connection
                driver.create_function("hold", 0, lambda: time.sleep(2))
                cursor = driver.cursor()
                cursor.execute("SELECT hold()")
                cursor.close()

        with monkeypatch.context() as patch:
            patch.setattr(sqlite_engine, "PATIENCE", 1)
            created = await client.create("Disk is full", source="partner")
        assert await client.list() == [created]


async def test_a_place_is_free_once_the_driver_has_stopped(sqlite_url: str) -> None:
    """Searches that are abandoned take no further connections until the driver stops them."""
    async with (
        # The default of SQLAlchemy 2.0 for a file has no size.
        host_engine(
            sqlite_url, poolclass=AsyncAdaptedQueuePool, pool_size=5, max_overflow=0
        ) as engine,
        IncidentClient.open(engine) as client,
    ):
        created = await client.create("Disk is full", source="partner")
        gate = Event()
        endless = Endless(engine.sync_engine, gate)
        searches = [asyncio.ensure_future(client.search(text="disk")) for _ in range(5)]
        await endless.until_running(1)
        for search in searches[:4]:
            search.cancel()
        await asyncio.wait(searches[:4])
        endless.on = False
        for _ in range(5):
            assert await client.get(created.incident_id) == created
        waits = not searches[4].done()
        gate.set()
        assert waits
        assert (await searches[4]).incidents == [created]
        assert endless.running == 0


async def test_a_search_in_memory_is_not_interrupted(memory_url: str) -> None:
    """With one connection for all, an abandoned search runs to its end: it harms no statement."""
    async with host_engine(memory_url) as engine, IncidentClient.open(engine) as client:
        await client.create_many([NewIncident("Disk is full", "partner")] * 300)
        for turns in range(40):
            search = asyncio.ensure_future(client.search(text="disk", limit=200, total=True))
            for _ in range(turns):
                await asyncio.sleep(0)
            search.cancel()
            await client.create("Line is down", source="partner")
            async with engine.begin() as connection:
                await connection.execute(text('UPDATE "Incident" SET version = version + 1'))
            await asyncio.wait([search])
        assert (await client.search(text="line", total=True)).total == 40

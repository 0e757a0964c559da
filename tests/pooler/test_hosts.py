"""A host's own pool, engine or connection behind a pooler is safe, or refused with the remedy."""

from __future__ import annotations

import itertools
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import NullPool

from incidentkit import IncidentClient, InvalidSettings
from incidentkit.store import StoreOptions
from tests.conformance.concurrency import run_all
from tests.hosts import WAYS, host_engine, naming_nothing, open_host, run_sql
from tests.sync_hosts import open_sync_host

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.servers import PgBouncer

CALLERS = 20
"""Concurrent calls, ten for each server connection."""

TRUSTED = StoreOptions(prepared_statements=True)

KINDS = {"pool": "postgresql", "asyncpg": "postgresql+asyncpg", "psycopg": "postgresql+psycopg"}
"""The scheme of the URL for each kind of database that a host opens."""

REMEDIES = {
    "pool": "create the pool with statement_cache_size=0",
    "asyncpg": '{"statement_cache_size": 0, "prepared_statement_name_func": str}',
    "psycopg": '{"prepare_threshold": None}',
}

each_kind = pytest.mark.parametrize("kind", KINDS)


@asynccontextmanager
async def database(kind: str, url: str, **options: Any) -> AsyncIterator[Any]:
    """Open a host's pool or engine, with options of its driver."""
    url = url.replace("postgresql", KINDS[kind], 1)
    opened = (
        asyncpg.create_pool(url, min_size=1, **options)
        if kind == "pool"
        else host_engine(url, connect_args=options)
    )
    async with opened as opened_database:
        yield opened_database


async def work(client: IncidentClient) -> None:
    """Make more concurrent calls than there are server connections, and check the answers."""
    created = await run_all(
        *(client.create(f"Number {n} is down", source="operator") for n in range(CALLERS))
    )
    # Unlike others, these calls share no statement.
    for _ in range(5):
        histories = await run_all(*(client.history(incident.incident_id) for incident in created))
        found = [event.incident_id for (event,) in histories]
        assert found == [incident.incident_id for incident in created]
    changed = await run_all(
        *(client.update_status(incident.incident_id, "completed") for incident in created)
    )
    assert {incident.incident_type for incident in changed} == {"completed"}


@each_kind
async def test_a_database_that_numbers_its_statements_is_refused(
    kind: str, pooled_url: str
) -> None:
    """The error names the pooler and the remedy."""
    async with database(kind, pooled_url) as opened:
        with pytest.raises(InvalidSettings, match="is behind a connection pooler") as refused:
            await IncidentClient.open(opened).connect()
    assert refused.value.name == "database"
    assert REMEDIES[kind] in refused.value.reason


@each_kind
async def test_a_refused_database_stays_usable_for_its_host(kind: str, pooled_url: str) -> None:
    """After the refusal the host's only connection is back in its pool, outside a transaction."""
    url = pooled_url.replace("postgresql", KINDS[kind], 1)
    if kind == "pool":
        async with asyncpg.create_pool(url, min_size=1, max_size=1) as pool:
            with pytest.raises(InvalidSettings):
                await IncidentClient.open(pool).connect()
            assert await pool.fetchval("SELECT 1") == 1
        return
    async with host_engine(url, pool_size=1, max_overflow=0) as engine:
        with pytest.raises(InvalidSettings):
            await IncidentClient.open(engine).connect()
        async with engine.connect() as connection:
            # The names of the probe and of SQLAlchemy may be taken: nothing is asked here.
            assert not connection.in_transaction()


@each_kind
async def test_a_database_that_names_nothing_works(kind: str, pooled_url: str) -> None:
    """A host that follows the remedy gets its own answers."""
    options = naming_nothing(KINDS[kind] + "://")
    async with (
        database(kind, pooled_url, **options) as opened,
        IncidentClient.open(opened) as client,
    ):
        await work(client)


@each_kind
async def test_a_host_can_vouch_for_its_pooler(
    kind: str, session_pooler: PgBouncer, migrated_postgres_url: str
) -> None:
    """With `prepared_statements=True`, a host may name statements: here in session mode."""
    async with (
        database(kind, session_pooler.through(migrated_postgres_url)) as opened,
        IncidentClient.open(opened, options=TRUSTED) as client,
    ):
        await work(client)


@pytest.mark.parametrize("kind", ["pool", "asyncpg"])
async def test_a_pooler_that_names_statements_itself_takes_any_host(
    kind: str, renaming_pooler: PgBouncer, migrated_postgres_url: str
) -> None:
    """Since 1.21, PgBouncer can make numbered names safe; before, such a host is refused."""
    async with database(kind, renaming_pooler.through(migrated_postgres_url)) as opened:
        client = IncidentClient.open(opened)
        if renaming_pooler.renames:
            async with client:
                await work(client)
        else:
            with pytest.raises(InvalidSettings, match="is behind a connection pooler"):
                await client.connect()


def _random_name() -> str:
    return f"__asyncpg_{uuid4()}__"


@pytest.mark.parametrize(
    "options",
    [
        {"poolclass": NullPool, "connect_args": {}},
        {"connect_args": {"prepared_statement_cache_size": 0}},
    ],
    ids=["new connections", "no cache"],
)
async def test_an_engine_with_unique_names_works(options: Any, pooled_url: str) -> None:
    """An engine may name statements with 64 random bits if it does not keep them."""
    options["connect_args"] |= {
        "statement_cache_size": 0,
        "prepared_statement_name_func": _random_name,
    }
    async with (
        host_engine(pooled_url, **options) as engine,
        IncidentClient.open(engine) as client,
    ):
        await work(client)


async def test_asyncpg_without_a_cache_names_nothing_from_0_31_on(pooled_url: str) -> None:
    """Older versions number the statements of SQLAlchemy even so, and are refused."""
    async with host_engine(pooled_url, connect_args={"statement_cache_size": 0}) as engine:
        client = IncidentClient.open(engine)
        if asyncpg.__version__ < "0.31":
            with pytest.raises(InvalidSettings, match="is behind a connection pooler"):
                await client.connect()
        else:
            async with client:
                await work(client)


@pytest.mark.parametrize(
    "connect_args",
    [
        {"prepared_statement_cache_size": 0},
        {"prepared_statement_name_func": _random_name, "prepared_statement_cache_size": 0},
        {"prepared_statement_name_func": _random_name, "statement_cache_size": 0},
        {
            "prepared_statement_name_func": map("statement_{}".format, itertools.count()).__next__,
            "statement_cache_size": 0,
            "prepared_statement_cache_size": 0,
        },
    ],
    ids=["asyncpg numbers", "asyncpg numbers beside unique names", "keeps names", "counts"],
)
async def test_an_engine_with_half_of_the_remedy_is_refused(
    connect_args: Any, pooled_url: str
) -> None:
    """An engine is refused if asyncpg still numbers, if it keeps named statements, or counts."""
    async with host_engine(pooled_url, connect_args=connect_args) as engine:
        with pytest.raises(InvalidSettings, match="is behind a connection pooler"):
            await IncidentClient.open(engine).connect()


POSTGRES_WAYS = [way for way in WAYS if not way.startswith("sqlite")]


@pytest.mark.parametrize("way", POSTGRES_WAYS)
@pytest.mark.parametrize("scheme", ["postgresql+asyncpg", "postgresql+psycopg"])
async def test_a_connection_that_numbers_its_statements_is_not_joined(
    way: str, scheme: str, pooled_url: str, migrated_postgres_url: str
) -> None:
    """The call is refused with the remedy, and the host can go on and commit."""
    await run_sql(migrated_postgres_url, "CREATE TABLE orders (order_id INTEGER PRIMARY KEY)")
    url = pooled_url if way.startswith("asyncpg") else pooled_url.replace("postgresql", scheme, 1)
    async with IncidentClient.open(pooled_url) as client:
        async with open_host(way, url) as host:
            await host.begin()
            await host.order(1)
            with pytest.raises(InvalidSettings, match="is behind a connection pooler") as refused:
                await client.join(host.connection).create("Order 1 is paid", source="operator")
            await host.commit()
        assert not await client.list()
    assert refused.value.name == "connection"
    assert await run_sql(migrated_postgres_url, "SELECT order_id FROM orders") == [(1,)]


@pytest.mark.parametrize("way", POSTGRES_WAYS)
async def test_a_host_can_vouch_for_the_pooler_of_a_connection(
    way: str, session_pooler: PgBouncer, migrated_postgres_url: str
) -> None:
    """With `prepared_statements=True`, a client joins connections that name statements."""
    await run_sql(migrated_postgres_url, "CREATE TABLE orders (order_id INTEGER PRIMARY KEY)")
    url = session_pooler.through(migrated_postgres_url)
    async with IncidentClient.open(url, options=TRUSTED) as client:
        async with open_host(way, url) as host:
            await host.begin()
            created = await client.join(host.connection).create(
                "Order 1 is paid", source="operator"
            )
            await host.commit()
        assert await client.list() == [created]


SYNC_WAYS = ["sync-sqlalchemy-postgresql", "sync-psycopg", "sync-django-postgresql"]


@pytest.mark.parametrize("way", SYNC_WAYS)
async def test_a_synchronous_connection_that_numbers_its_statements_is_not_joined(
    way: str, pooled_url: str, migrated_postgres_url: str
) -> None:
    """The call is refused with the remedy for each host, which can go on and commit."""
    await run_sql(migrated_postgres_url, "CREATE TABLE orders (order_id INTEGER PRIMARY KEY)")
    # Django names no statement unless its options say so.
    options = {"prepare_threshold": 1} if "django" in way else {}
    async with open_sync_host(way, pooled_url, options) as host:
        await host.begin()
        await host.order(1)
        with pytest.raises(InvalidSettings, match="prepare_threshold") as refused:
            await (await host.join()).create("Order 1 is paid", source="operator")
        await host.commit()
    assert refused.value.name == "connection"
    assert await run_sql(migrated_postgres_url, "SELECT order_id FROM orders") == [(1,)]


@pytest.mark.parametrize("way", SYNC_WAYS)
async def test_a_synchronous_host_can_vouch_for_its_pooler(
    way: str, session_pooler: PgBouncer, migrated_postgres_url: str
) -> None:
    """With `prepared_statements=True`, a client joins connections that name statements."""
    url = session_pooler.through(migrated_postgres_url)
    connect = {"prepare_threshold": 1}
    async with open_sync_host(way, url, connect, options=TRUSTED) as host:
        await host.begin()
        created = await (await host.join()).create("Order 1 is paid", source="operator")
        await host.commit()
    async with IncidentClient.open(url, options=TRUSTED) as client:
        assert await client.list() == [created]

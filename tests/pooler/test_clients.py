"""A client finds a pooler by itself, and a setting overrides what it finds."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from incidentkit import IncidentClient, StoreError
from incidentkit.store import StoreOptions
from incidentkit.store.migrate import check, current, upgrade
from tests.hosts import naming_nothing
from tests.pooler.test_hosts import KINDS, database, each_kind, work
from tests.programs import outcome, start
from tests.test_host_schema import by_role, check_reload

if TYPE_CHECKING:
    from tests.servers import PgBouncer

STATEMENT_MODE = "pooler is in statement mode.* transaction or session mode"

NAMES = "SELECT name FROM pg_prepared_statements"


async def names(url: str) -> list[str]:
    """Return the names of the statements that a server connection of the pooler has prepared."""
    connection = await asyncpg.connect(url, statement_cache_size=0)
    try:
        return [name for (name,) in await connection.fetch(NAMES)]
    finally:
        await connection.close()


async def test_nothing_is_named_behind_a_pooler(
    pooler: PgBouncer, migrated_postgres_url: str
) -> None:
    """Concurrent calls get their own answers, and leave no prepared statement."""
    url = pooler.through(migrated_postgres_url)
    async with IncidentClient.open(url) as client:
        await work(client)
        assert not await names(url)


@pytest.mark.parametrize("by_url", [False, True])
async def test_a_pooler_that_loses_names_never_confuses_them(by_url: bool, pooled_url: str) -> None:
    """A client that is told to prepare finds its statements gone, and stops preparing them."""
    parameter = "?prepared_statements=on" if by_url else ""
    options = None if by_url else StoreOptions(prepared_statements=True)
    async with IncidentClient.open(pooled_url + parameter, options=options) as client:
        await work(client)
    kept = await names(pooled_url)
    assert all(re.fullmatch(r"incidentkit_[0-9a-f]{16}", name) for name in kept)


async def test_every_statement_has_a_unique_name_in_session_mode(
    session_pooler: PgBouncer, migrated_postgres_url: str
) -> None:
    """A client that is told to prepare gives names with 64 random bits."""
    options = StoreOptions(pool_size=1, max_overflow=0, prepared_statements=True)
    url = session_pooler.through(migrated_postgres_url)
    async with IncidentClient.open(url, options=options) as client:
        await client.create("The disk is full", source="operator")
        store: Any = client.store
        connection = await store._connections._opened().connections.take()
        kept = [row["name"] for row in await connection.driver.fetch(NAMES)]
        await store._connections._opened().connections.put(connection)
    assert kept
    assert all(re.fullmatch(r"incidentkit_[0-9a-f]{16}", name) for name in kept)


async def test_own_statements_are_read_committed_behind_a_pooler(
    pooler: PgBouncer, migrated_postgres_url: str
) -> None:
    """If the pooler does not pass the setting on, a list still shows a single instant."""
    await by_role(migrated_postgres_url)
    async with IncidentClient.open(pooler.through(migrated_postgres_url)) as client:
        await check_reload(client, migrated_postgres_url)


@pytest.mark.parametrize("prepared_statements", [None, True])
async def test_a_pooler_that_names_statements_itself_takes_any_client(
    prepared_statements: bool | None, renaming_pooler: PgBouncer, migrated_postgres_url: str
) -> None:
    """A client works through a pooler that handles prepared statements, told about it or not."""
    options = StoreOptions(prepared_statements=prepared_statements)
    url = renaming_pooler.through(migrated_postgres_url)
    async with IncidentClient.open(url, options=options) as client:
        await work(client)


async def test_schemas_are_kept_apart(pooler: PgBouncer, empty_postgres_url: str) -> None:
    """Tables of several schemas are created and used through shared connections."""
    url, schemas = pooler.through(empty_postgres_url), ("north", "south")
    await asyncio.gather(*(upgrade(url, schema=schema) for schema in schemas))
    async with (
        IncidentClient.open(url, schema="north") as north,
        IncidentClient.open(url, schema="south") as south,
    ):
        for n in range(1, 6):
            await asyncio.gather(
                *(each.create("Disk is full", source="partner") for each in (north, south))
            )
            assert [len(await each.list()) for each in (north, south)] == [n, n]
    for schema in schemas:
        await check(url, schema=schema)
    assert await current(url) is None


async def test_statement_mode_is_refused_by_name(
    statement_pooler: PgBouncer, migrated_postgres_url: str
) -> None:
    """Opening, migrating and checking say that statement mode cannot work."""
    url = statement_pooler.through(migrated_postgres_url)
    for prepared_statements in (None, True, False):
        options = StoreOptions(prepared_statements=prepared_statements)
        with pytest.raises(StoreError, match=STATEMENT_MODE):
            await IncidentClient.open(url, options=options).connect()
    with pytest.raises(StoreError, match=STATEMENT_MODE):
        await upgrade(url)
    code, _, error = outcome(start("db", "check", "--database-url", url))
    assert code == 1
    assert re.search(STATEMENT_MODE, error)


@each_kind
async def test_a_host_in_statement_mode_is_refused_by_name(
    kind: str, statement_pooler: PgBouncer, migrated_postgres_url: str
) -> None:
    """A host's pool or engine behind a pooler in statement mode gets the same error.

    SQLAlchemy begins a transaction as it connects. Before 0.32, asyncpg drops what the pooler says.
    """
    url = statement_pooler.through(migrated_postgres_url)
    silent = kind == "asyncpg" and asyncpg.__version__ < "0.32"
    async with database(kind, url, **naming_nothing(KINDS[kind] + "://")) as opened:
        with pytest.raises(StoreError, match="lost" if silent else STATEMENT_MODE):
            await IncidentClient.open(opened).connect()

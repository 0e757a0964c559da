"""Tables in a schema that is named, beside those of other tenants and of the host."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from attrs import asdict
from redis import Redis
from sqlalchemy import Executable, MetaData, event, text
from sqlalchemy.ext.asyncio import AsyncSession

import incidentkit.store.postgresql.statements as on_postgresql
import incidentkit.store.sql.statements as on_both
from incidentkit import IncidentClient, InvalidSettings, SchemaOutOfDate, StoreError
from incidentkit.opening import check_exists
from incidentkit.settings import Settings
from incidentkit.store import RequestRecord, keep_out_of_autogenerate, migrate
from incidentkit.store.hosts.sqlalchemy import fetch_rows
from incidentkit.store.postgresql import driver
from incidentkit.store.postgresql.driver import compile_statement
from incidentkit.store.postgresql.namespace import Namespace
from incidentkit.store.request_log import INSERT_REQUEST
from incidentkit.store.schema import SCHEMA_REVISION
from incidentkit.store.sql import definitions, naming
from incidentkit.store.sql.tables import metadata, version_table
from tests.conftest import TENANTS
from tests.distributions import ROOT
from tests.hosts import host_engine, open_host, run_sql

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection

FAULTY = (
    "",
    "x" * 64,
    "ä" * 32,
    "a\x00b",
    "a\nb",
    'a"b',
    "a'b",
    "a\\b",
    "pg_catalog",
    "pg_toast",
    "information_schema",
    "\udc80",
)
"""Names that no schema of incidentkit can have."""


# Names


def statements() -> Iterator[tuple[str, Executable]]:
    """Yield every statement that PostgreSQL runs, with its name."""
    for module in (on_postgresql, on_both, definitions):
        for name, value in vars(module).items():
            if name == "SELECT_ON_SQLITE":
                continue
            for each in value.values() if isinstance(value, dict) else (value,):
                if isinstance(each, Executable):
                    yield name, each
    yield "INSERT_REQUEST", INSERT_REQUEST


def test_every_name_in_a_statement_gets_the_schema() -> None:
    """Each table, type and function of a statement is in the schema; without one, none is."""
    names = re.compile("|".join((*naming.TABLES, *naming.TYPES, *naming.FUNCTIONS)))
    found, namespace = set(), Namespace("Shop A")
    for name, statement in statements():
        if name == "SHIFT":
            # Only a migration runs it, which has the schema in its search path.
            continue
        sql = compile_statement(namespace(statement)).text
        for match in names.finditer(sql):
            before = sql[: match.start()]
            # A column that begins like a table, a constraint or an alias is no name of these.
            if re.match(r"[\w\"]", sql[match.end() :]) or re.search(r"[\w\"]$", before):
                continue
            assert before.endswith('"Shop A".'), (name, sql)
            found.add(match[0])
        assert "Shop A" not in compile_statement(statement).text
    assert found >= {*naming.TABLES, *naming.TYPES}


def test_the_names_are_those_of_the_tables() -> None:
    """The names that get a schema are every declared table and type."""
    tables = {*metadata.tables, version_table.name}
    assert {name.strip('"') for name in naming.TABLES} == tables
    types = {
        getattr(column.type, "name", None)
        for table in metadata.tables.values()
        for column in table.c
    }
    assert {*naming.TYPES} == types - {None}


async def test_functions_are_those_of_the_database(migrated_postgres_url: str) -> None:
    """The functions that statements call exist; triggers call the others."""
    rows = await run_sql(
        migrated_postgres_url,
        "SELECT proname FROM pg_proc WHERE pronamespace = CAST('public' AS regnamespace) "
        "AND prorettype <> CAST('trigger' AS regtype)",
    )
    assert {*naming.FUNCTIONS} == {name for (name,) in rows}


@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_name_is_refused(name: str) -> None:
    """The error names the setting and the rule, wherever the name is given."""
    rule = "must be the name of a schema: 1 to 63 bytes"
    url = "postgresql://app@db.example/app"
    with pytest.raises(InvalidSettings, match=rf"^schema {rule}"):
        IncidentClient.open(url, schema=name)
    with pytest.raises(InvalidSettings, match=rf"^schema {rule}"):
        asyncio.run(migrate.upgrade(url, schema=name))
    if name and "\x00" not in name:
        with pytest.raises(InvalidSettings, match=r"^INCIDENTKIT_SCHEMA (must|is not UTF-8)"):
            Settings.from_mapping({"INCIDENTKIT_DATABASE_URL": url, "INCIDENTKIT_SCHEMA": name})


async def test_sqlite_has_no_schemas(sqlite_url: str) -> None:
    """On SQLite, a schema is refused and no file is created."""
    reason = "schema is only for PostgreSQL"
    with pytest.raises(InvalidSettings, match=reason):
        IncidentClient.open(sqlite_url, schema="shop")
    for work in (migrate.upgrade, migrate.downgrade, migrate.current, migrate.check):
        with pytest.raises(InvalidSettings, match=reason):
            await work(sqlite_url, schema="shop")
    async with host_engine(sqlite_url) as engine:
        with pytest.raises(InvalidSettings, match=reason):
            IncidentClient.open(engine, schema="shop")
    for variables in ({}, {"INCIDENTKIT_DATABASE_URL": sqlite_url}):
        with pytest.raises(InvalidSettings, match=f"INCIDENTKIT_{reason.upper()[:6]} is only for"):
            Settings.from_mapping({**variables, "INCIDENTKIT_SCHEMA": "shop"})
    with pytest.raises(StoreError, match="no such file"):
        check_exists(sqlite_url, with_schema=False)


# Clients


@pytest.mark.parametrize("way", ["url", "pool", "engine", "psycopg"])
async def test_a_client_works_in_its_schema(way: str, tenants_url: str) -> None:
    """Every kind of client reads and writes its tenant's tables alone, the request log too."""
    schema = TENANTS[0]
    record = RequestRecord(datetime.now(UTC), "GET", "/", 200, 1.0, "id")
    url = tenants_url.replace("postgresql:", "postgresql+psycopg:") if way == "psycopg" else None
    async with (
        asyncpg.create_pool(tenants_url, min_size=1) as pool,
        host_engine(url or tenants_url) as engine,
    ):
        database: Any = {"url": tenants_url, "pool": pool}.get(way, engine)
        async with IncidentClient.open(database, schema=schema) as incidents:
            # The other tenants have used this key.
            created = await incidents.create(
                "Disk is full", source="partner", idempotency_key="key", dedup_key="disk"
            )
            assert created.incident_id == 1
            assert (await incidents.search(text="disk", total=True)).total == 1
            assert await _changed(incidents) == [1]
            store: Any = incidents.store
            await store.append(INSERT_REQUEST, [asdict(record)] * 2)
            assert await incidents.list() == [created]
    rows = await run_sql(tenants_url, f'SELECT count(*) FROM "{schema}".request_log')
    assert rows == [(2,)]


async def _changed(incidents: IncidentClient) -> list[int]:
    async with asyncio.timeout(30):
        while not (page := await incidents.read_changes()).changes:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return [change.incident_id for change in page.changes]


async def test_statements_live_as_long_as_their_client(tenants_url: str) -> None:
    """A process that opens a client for each of many tenants keeps no statements of those gone."""

    async def use() -> int:
        async with IncidentClient.open(tenants_url, schema=TENANTS[0]) as incidents:
            await incidents.list()
            await incidents.search(text="disk")
            return len(driver._compiled)

    await use()
    gc.collect()
    before = len(driver._compiled)
    assert await use() > before
    gc.collect()
    assert len(driver._compiled) == before


async def test_the_settings_name_the_schema(
    tenants_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`from_env` opens a client on the schema in the environment."""
    monkeypatch.setenv("INCIDENTKIT_DATABASE_URL", tenants_url)
    monkeypatch.setenv("INCIDENTKIT_SCHEMA", TENANTS[1])
    async with IncidentClient.from_env() as incidents:
        (incident,) = await incidents.list()
    assert incident.incident_message == "Disk of tenant_b is full"


async def test_errors_name_the_schema_and_the_command(tenants_url: str) -> None:
    """The error for a schema without tables names the schema, and so does the command."""
    with pytest.raises(SchemaOutOfDate) as caught:
        async with IncidentClient.open(tenants_url, schema="shop c"):
            pass
    assert (caught.value.current, caught.value.expected) == (None, SCHEMA_REVISION)
    assert caught.value.command == "incidentkit db upgrade --schema 'shop c'"
    assert "(schema shop c)" in str(caught.value)
    with pytest.raises(SchemaOutOfDate) as checked:
        await migrate.check(tenants_url, schema="shop c")
    assert str(checked.value) == str(caught.value).replace(" (SQLSTATE 42P01)", "")


async def test_tenants_share_a_redis_apart(tenants_url: str, redis_url: str) -> None:
    """Keys begin with the schema where there is one, and a tenant clears only its own."""
    with Redis.from_url(redis_url, decode_responses=True) as redis:
        async with (
            IncidentClient.open(tenants_url, redis_url) as public,
            IncidentClient.open(tenants_url, redis_url, schema=TENANTS[0]) as mine,
            IncidentClient.open(tenants_url, redis_url, schema=TENANTS[1]) as theirs,
        ):
            for incidents in (public, mine, theirs):
                await incidents.list()
            prefixes = ("", *(f"{schema}:" for schema in TENANTS))
            keys = {
                f"{prefix}{name}"
                for prefix in prefixes
                for name in ("incidents:1:10:any:any", "incidentkit:pages")
            }
            await _until(lambda: set(redis.keys()) == keys)
            await mine.create("Disk is full", source="partner")
            kept = {key for key in keys if not key.startswith(TENANTS[0])}
            await _until(lambda: set(redis.keys()) == kept)


async def _until(holds: Any) -> None:
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


# A host's own map of schemas


@pytest.fixture(params=["asyncpg", "psycopg", "sqlite"])
def mapped_url(request: pytest.FixtureRequest) -> str:
    """The URL of a host's engine, for each driver."""
    if request.param == "sqlite":
        return str(request.getfixturevalue("migrated_sqlite_url"))
    url = str(request.getfixturevalue("tenants_url"))
    return url.replace("postgresql:", f"postgresql+{request.param}:")


REFUSED = r"^schema_translate_map .* name their schema with schema="


async def test_a_map_of_an_engine_is_refused(mapped_url: str) -> None:
    """An engine that moves tables without a schema is refused, also once the client is open."""
    async with host_engine(mapped_url) as engine:
        moving = engine.execution_options(schema_translate_map={None: "elsewhere"})
        with pytest.raises(InvalidSettings, match=REFUSED):
            async with IncidentClient.open(moving):
                pass
        # These are about other tables.
        others = engine.execution_options(schema_translate_map={"shop": "shop_1"})
        unmoved = engine.execution_options(schema_translate_map={None: None})
        for harmless in (others, unmoved):
            async with IncidentClient.open(harmless) as incidents:
                await incidents.list()
        async with IncidentClient.open(engine) as incidents:

            def move(connection: Any) -> None:
                connection.execution_options(schema_translate_map={None: "elsewhere"})

            event.listen(engine.sync_engine, "engine_connect", move)
            for call in (
                incidents.list,
                partial(incidents.create, "Disk is full", source="partner"),
                partial(
                    incidents.create, "Disk is gone", source="partner", idempotency_key="other"
                ),
            ):
                with pytest.raises(InvalidSettings, match=REFUSED):
                    await call()
            event.remove(engine.sync_engine, "engine_connect", move)
            await incidents.list()


async def test_a_map_of_a_joined_connection_is_refused(mapped_url: str) -> None:
    """A connection or session that moves tables is refused, and the host's transaction lives."""
    url = mapped_url if "sqlite" in mapped_url else re.sub(r"\+\w+", "", mapped_url)
    moved: dict[str, Any] = {"schema_translate_map": {None: "elsewhere"}}
    async with host_engine(mapped_url) as engine, IncidentClient.open(url) as incidents:
        bind = engine.execution_options(**moved)
        async with bind.connect() as connection:
            await _refused(incidents, connection)
        async with engine.connect() as connection:
            await connection.execution_options(**moved)
            await _refused(incidents, connection)
        async with AsyncSession(bind) as session:
            await _refused(incidents, session)
        async with AsyncSession(engine) as session:
            await session.connection(execution_options=moved)
            await _refused(incidents, session)
        async with engine.connect() as connection:
            joined = incidents.join(connection)
            await joined.list()
            # Of the running transaction.
            await connection.execution_options(**moved)
            with pytest.raises(InvalidSettings, match=REFUSED):
                await joined.list()


async def _refused(incidents: IncidentClient, connection: Any) -> None:
    joined = incidents.join(connection)
    for call in (
        joined.list,
        partial(joined.create, "Disk is full", source="partner"),
        partial(joined.create, "Disk is gone", source="partner", idempotency_key="key 2"),
    ):
        with pytest.raises(InvalidSettings, match=REFUSED):
            await call()
    assert (await connection.execute(text("SELECT 1"))).all() == [(1,)]


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_named_schema_wins_over_a_map(driver: str, tenants_url: str) -> None:
    """On one engine, clients with a schema and without one work beside each other's maps."""
    schema = TENANTS[0]
    url = tenants_url.replace("postgresql:", f"postgresql+{driver}:")
    async with host_engine(url) as engine:
        others = engine.execution_options(schema_translate_map={"shop": "shop_1"})
        moving = engine.execution_options(schema_translate_map={None: "elsewhere"})
        async with (
            IncidentClient.open(others) as public,
            IncidentClient.open(moving, schema=schema) as mine,
        ):
            for n in range(2):
                assert len(await public.list()) == 1
                assert len(await mine.list()) == n
                async with moving.begin() as connection:
                    joined = mine.join(connection)
                    created = await joined.create(
                        "Disk is full", source="partner", idempotency_key=f"{n}"
                    )
                assert created.incident_id == n + 1
                assert await mine.get(n + 1) == created


async def test_the_search_of_a_mapped_engine_is_refused_too(tenants_url: str) -> None:
    """No statement that a client runs escapes the check."""
    async with host_engine(tenants_url) as engine:
        moving = engine.execution_options(schema_translate_map={None: "elsewhere"})
        async with moving.connect() as connection:
            for name, statement in statements():
                with pytest.raises(InvalidSettings, match=REFUSED):
                    await fetch_rows(connection, statement, {})
                assert name


# Migrations


async def test_an_upgrade_makes_the_schema_and_leaves_others_alone(
    empty_postgres_url: str,
) -> None:
    """Tables, types and functions go to the schema, beside tables of the same names elsewhere."""
    for statement in (
        "CREATE TABLE request_log (color text)",
        'CREATE TABLE "Incident" (color text)',
        "CREATE TYPE incidentstatus AS ENUM ('red')",
        "CREATE FUNCTION incident_words(text) RETURNS int LANGUAGE sql RETURN 1",
    ):
        await run_sql(empty_postgres_url, statement)
    url, objects = empty_postgres_url, partial(_objects, empty_postgres_url)
    public = await objects("public")
    assert await migrate.current(url, schema="shop") is None
    assert (await migrate.upgrade(url, schema="shop")).schema == "shop"
    assert await migrate.current(url, schema="shop") == SCHEMA_REVISION
    assert (await migrate.upgrade(url, schema="other")).schema == "other"
    assert await objects("other") == await objects("shop")
    assert await objects("public") == public
    async with IncidentClient.open(url, schema="shop") as incidents:
        await incidents.create("Disk is full", source="partner")
        assert (await incidents.search(text="disk", total=True)).total == 1
    await migrate.downgrade(url, "base", schema="shop")
    assert await objects("shop") == [("pg_class", "incidentkit_version"), *_ROW_TYPES]
    await migrate.check(url, schema="other")
    assert await objects("public") == public


_ROW_TYPES = [("pg_type", "_incidentkit_version"), ("pg_type", "incidentkit_version")]


async def _objects(url: str, schema: str) -> list[tuple[str, str]]:
    """Return the kinds and names of everything in a schema."""
    parts = [
        f"SELECT '{kind}', CAST({column} AS text) FROM {kind} "
        f"WHERE {namespace} = CAST('{schema}' AS regnamespace)"
        for kind, column, namespace in (
            ("pg_class", "relname", "relnamespace"),
            ("pg_type", "typname", "typnamespace"),
            ("pg_proc", "proname", "pronamespace"),
        )
    ]
    # An index that belongs to a key of the version's table has the name of the key.
    rows = await run_sql(url, f"{' UNION ALL '.join(parts)} ORDER BY 1, 2")
    return [(kind, name) for kind, name in rows if not name.endswith("_version_pkc")]


async def test_a_downgrade_makes_no_schema(empty_postgres_url: str) -> None:
    """Only an upgrade creates the schema that is named."""
    await migrate.downgrade(empty_postgres_url, "base", schema="shop")
    with pytest.raises(SchemaOutOfDate):
        await migrate.check(empty_postgres_url, schema="shop")
    found = "SELECT 1 FROM pg_namespace WHERE nspname = 'shop'"
    assert await run_sql(empty_postgres_url, found) == []


async def test_an_upgrade_does_not_take_the_tables_of_another_schema(
    migrated_postgres_url: str,
) -> None:
    """With tables further down the search path than new ones would be, a schema must be named."""
    await run_sql(migrated_postgres_url, "CREATE SCHEMA shop")
    url = f"{migrated_postgres_url}?options=-csearch_path%3Dshop,public"
    reason = (
        "schema must be named: the search path finds the tables in the schema public, but would "
        "create new ones in shop"
    )
    for work in (migrate.upgrade, migrate.downgrade):
        with pytest.raises(InvalidSettings, match=reason):
            await work(url)
    assert (await migrate.upgrade(url, schema="shop")).schema == "shop"
    assert (await migrate.upgrade(url)).schema == "shop"
    await migrate.check(url, schema="public")
    await migrate.downgrade(url, "base")
    await migrate.check(url, schema="public")


async def test_several_upgrades_of_a_schema_run_at_once(empty_postgres_url: str) -> None:
    """One process makes the schema and its tables, and the others find them."""
    command = (sys.executable, "-m", "incidentkit", "db", "upgrade", "--schema", "shop")
    environment = {**os.environ, "INCIDENTKIT_DATABASE_URL": empty_postgres_url}
    running = [
        await asyncio.create_subprocess_exec(
            *command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(3)
    ]
    for process in running:
        out, err = await process.communicate()
        assert process.returncode == 0
        # The others say that they wait.
        assert err.endswith(b"The tables are in the schema shop.\n")
        assert out == f"{SCHEMA_REVISION} (head)\n".encode()


def test_alembic_works_in_the_schema_of_the_environment(empty_postgres_url: str) -> None:
    """`alembic upgrade head` makes the tables there, and autogenerate finds no difference."""
    environment = {
        **os.environ,
        "INCIDENTKIT_DATABASE_URL": empty_postgres_url,
        "INCIDENTKIT_SCHEMA": "shop",
    }
    for arguments in (["upgrade", "head"], ["check"]):
        command = [sys.executable, "-m", "alembic", *arguments]
        ended = subprocess.run(
            command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
    asyncio.run(migrate.check(empty_postgres_url, schema="shop"))
    assert asyncio.run(migrate.current(empty_postgres_url)) is None


async def test_autogenerate_tells_a_hosts_tables_by_their_schema(tenants_url: str) -> None:
    """Tables are kept out in the schema that is named, and found in the others."""

    async def found(**options: Any) -> set[str | None]:
        def compare(connection: Connection) -> set[str | None]:
            keep_out = partial(keep_out_of_autogenerate, **options)
            context = MigrationContext.configure(
                connection, opts={"include_name": keep_out, "include_schemas": True}
            )
            differences = compare_metadata(context, MetaData())
            return {each[1].schema for each in differences if each[0] == "remove_table"}

        async with host_engine(tenants_url) as engine, engine.connect() as connection:
            return await connection.run_sync(compare)

    assert await found() == {*TENANTS}
    assert await found(schema=TENANTS[0]) == {None, TENANTS[1]}


# `db check`


async def test_check_refuses_what_a_client_refuses(migrated_postgres_url: str) -> None:
    """In a copy whose events come after those to come, `check` and a client raise the same."""
    url = migrated_postgres_url
    async with IncidentClient.open(url) as incidents:
        await incidents.create("Disk is full", source="partner")
    await run_sql(url, "UPDATE incident_event SET transaction_id = transaction_id + 1000000000")
    with pytest.raises(StoreError, match="copied from another server") as checked:
        await migrate.check(url)
    with pytest.raises(StoreError) as opened:
        async with IncidentClient.open(url):
            pass
    assert str(checked.value) == str(opened.value)
    command = [sys.executable, "-m", "incidentkit", "db", "check", "--database-url", url]
    ended = await asyncio.create_subprocess_exec(
        *command, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    out, err = await ended.communicate()
    assert (ended.returncode, out) == (1, b"")
    assert err.decode().strip().endswith(str(opened.value))
    await migrate.upgrade(url)
    await migrate.check(url)


async def test_a_host_joins_a_tenant(tenants_url: str) -> None:
    """A host's pool that sets no search path joins with the client's schema."""
    async with (
        IncidentClient.open(tenants_url, schema=TENANTS[0]) as incidents,
        open_host("asyncpg-pool", tenants_url) as host,
    ):
        await host.begin()
        created = await incidents.join(host.connection).create("Disk is full", source="partner")
        await host.commit()
        assert await incidents.list() == [created]

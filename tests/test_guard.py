"""The guard of the token: its triggers, and all that decides which incidents a list shows."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import Column, String, create_engine

from incidentkit import ChangePage, IncidentClient, IncidentNotFound, SchemaOutOfDate, StoreError
from incidentkit.store import StoreOptions, store_from_url
from incidentkit.store.migrate import check, downgrade, upgrade
from incidentkit.store.schema import REVISIONS
from incidentkit.store.sql.definitions import numbered
from incidentkit.store.sql.triggers import SQLITE_TRIGGERS
from tests.hosts import run_sql
from tests.servers import PostgresServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

PROGRAMS = PostgresServer()._programs

INSERT = (
    'INSERT INTO "Incident" (incident_message, incident_type, source) '
    "VALUES ('By hand', 'new', 'operator')"
)
UPDATE = "UPDATE \"Incident\" SET incident_message = incident_message || '!'"


async def _run(url: str, *statements: str) -> None:
    """Run statements on one new connection to PostgreSQL."""
    connection = await asyncpg.connect(url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


async def _messages(client: IncidentClient) -> list[str]:
    return [incident.incident_message for incident in await client.list()]


async def _stored(url: str) -> list[str]:
    rows = await run_sql(url, 'SELECT incident_message FROM "Incident" ORDER BY 1')
    return [message for (message,) in rows]


@asynccontextmanager
async def _open_with_two(url: str, **options: Any) -> AsyncIterator[IncidentClient]:
    """Open a client on a database with two incidents, whose list it has cached."""
    async with IncidentClient.open(url, **options) as client:
        await client.create("Disk is full", source="monitoring")
        await client.create("Network is down", source="partner")
        assert len(await client.list()) == 2
        yield client


# Copies


def _dump(url: str, *options: str) -> str:
    """Return the dump of a database of PostgreSQL, as SQL."""
    command = [str(PROGRAMS / "pg_dump"), url, *options]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout


def _restore(url: str, dump: str) -> None:
    """Run a dump in a database."""
    command = [str(PROGRAMS / "psql"), "--quiet", "--no-psqlrc", "--set=ON_ERROR_STOP=1", url]
    subprocess.run(command, input=dump, capture_output=True, check=True, text=True)


def _copy_files(source: PostgresServer, target: PostgresServer) -> None:
    """Give a stopped server the files of another one, as a standby's."""
    assert source.folder is not None
    assert target.folder is not None
    shutil.rmtree(target.folder / "data")
    subprocess.run(["cp", "-a", source.folder / "data", target.folder / "data"], check=True)
    (target.folder / "data" / "standby.signal").touch()


@pytest.mark.parametrize("form", [(), ("--inserts",)])
async def test_a_copy_without_the_incidents_is_not_served_their_pages(
    migrated_postgres_url: str, empty_postgres_url: str, redis_url: str, form: Sequence[str]
) -> None:
    """A copy without the incidents lists its own, even over the Redis of the original."""
    async with _open_with_two(migrated_postgres_url, redis_url=redis_url) as original:
        before = await original.list()
        dump = _dump(migrated_postgres_url, '--exclude-table-data="Incident"', *form)
        _restore(empty_postgres_url, dump)
        async with IncidentClient.open(empty_postgres_url, redis_url) as copy:
            tokens = [
                await run_sql(url, "SELECT slot, token FROM incident_token ORDER BY slot")
                for url in (migrated_postgres_url, empty_postgres_url)
            ]
            assert tokens[0] == tokens[1]
            assert await copy.list() == []
            assert await copy.store.token() not in (None, await original.store.token())
            assert await original.list() == before


async def test_a_copy_of_the_token_in_another_file_is_another_token(
    sqlite_url: str, redis_url: str
) -> None:
    """On SQLite too, the row of the token means nothing in another file."""
    async with _open_with_two(sqlite_url, redis_url=redis_url) as original:
        ((slot, token),) = await run_sql(sqlite_url, "SELECT slot, token FROM incident_token")
        other_url = f"{sqlite_url}.copy"
        async with IncidentClient.open(other_url, redis_url) as copy:
            await run_sql(other_url, f"UPDATE incident_token SET slot = {slot}, token = '{token}'")
            assert await copy.list() == []
            assert await copy.store.token() != await original.store.token()
            await run_sql(other_url, "DELETE FROM incident_token")
            await run_sql(other_url, f"INSERT INTO incident_token VALUES ({slot}, '{token}')")
            assert await copy.list() == []
            assert await copy.store.token() not in (None, await original.store.token())


async def test_old_tokens_that_were_put_back_are_new_ones(migrated_postgres_url: str) -> None:
    """Tokens of a dump that replace the present ones bring no cached page back."""
    async with _open_with_two(migrated_postgres_url) as client:
        old = await client.store.token()
        connection = await asyncpg.connect(migrated_postgres_url)
        rows = await connection.fetch("SELECT slot, token FROM incident_token")
        await connection.execute('DELETE FROM "Incident"')
        await connection.execute("TRUNCATE incident_token")
        await connection.copy_records_to_table("incident_token", records=map(tuple, rows))
        await connection.close()
        assert await client.store.token() not in (None, old)
        assert await client.list() == []


async def test_a_standby_has_the_token_of_its_primary() -> None:
    """A copy of all files, which is what a standby has, serves the pages of its primary."""
    with PostgresServer() as primary, PostgresServer() as standby:
        await upgrade(primary.url)
        async with IncidentClient.open(primary.url) as client:
            await client.create("Disk is full", source="monitoring")
            token = await client.store.token()
        for server in (primary, standby):
            server.stop()
        _copy_files(primary, standby)
        standby.start()
        assert await run_sql(standby.url, "SELECT pg_is_in_recovery()") == [(True,)]
        async with IncidentClient.open(standby.url) as client:
            assert await client.store.token() == token is not None


# Definitions


REDACT = "ALTER TABLE \"Incident\" ALTER incident_message TYPE varchar USING 'Redacted'"
CHANGES_OF_THE_TABLE = {
    "a new type": (REDACT,),
    "a child": (
        'CREATE TABLE archived (LIKE "Incident" INCLUDING ALL)',
        INSERT.replace('"Incident"', "archived"),
        'ALTER TABLE archived INHERIT "Incident"',
    ),
}


@pytest.mark.parametrize("statements", CHANGES_OF_THE_TABLE.values(), ids=CHANGES_OF_THE_TABLE)
async def test_a_change_of_the_table_shows_in_the_next_list(
    migrated_postgres_url: str, redis_url: str, statements: Sequence[str]
) -> None:
    """Rows that ALTER TABLE changes without firing a trigger are listed as they are."""
    async with _open_with_two(migrated_postgres_url, redis_url=redis_url) as client:
        for statement in statements:
            await _messages(client)
            await _run(migrated_postgres_url, statement)
            assert sorted(await _messages(client)) == await _stored(migrated_postgres_url)


async def test_triggers_that_were_off_for_a_transaction_replace_the_token(
    migrated_postgres_url: str,
) -> None:
    """Rows that a transaction changes between disabling the triggers and enabling them show."""
    always = 'ALTER TABLE "Incident" ENABLE ALWAYS TRIGGER incident_token_'
    async with _open_with_two(migrated_postgres_url) as client:
        before = await client.store.token()
        await _run(
            migrated_postgres_url,
            f'BEGIN; ALTER TABLE "Incident" DISABLE TRIGGER ALL; {UPDATE}; '
            f"{always}change; {always}truncate; COMMIT",
        )
        await client.check()
        assert sorted(await _messages(client)) == await _stored(migrated_postgres_url)
        assert await client.store.token() not in (None, before)


async def test_columns_that_swap_their_names_show_in_the_next_list(
    migrated_postgres_url: str,
) -> None:
    """A column that takes the name of another one, without a row being written, is listed."""
    add = "ALTER TABLE \"Incident\" ADD redacted varchar NOT NULL DEFAULT 'Redacted'"
    await _run(migrated_postgres_url, add)
    async with _open_with_two(migrated_postgres_url) as client:
        before = await client.store.token()
        await _run(
            migrated_postgres_url,
            'ALTER TABLE "Incident" RENAME incident_message TO former; '
            'ALTER TABLE "Incident" RENAME redacted TO incident_message',
        )
        assert await _messages(client) == ["Redacted"] * 2
        assert await client.store.token() not in (None, before)


async def test_a_table_that_a_crash_empties_is_listed_empty(redis_url: str) -> None:
    """While the table is unlogged no list is cached: after a crash of the server it has no rows."""
    with PostgresServer() as server:
        await upgrade(server.url)
        async with _open_with_two(server.url, redis_url=redis_url) as client:
            await _run(server.url, 'ALTER TABLE "Incident" SET UNLOGGED')
            assert len(await client.list()) == 2
            server.kill()
            server.start()
            assert await _stored(server.url) == await _messages(client) == []
            await _run(server.url, 'ALTER TABLE "Incident" SET LOGGED')
            assert await client.store.token() is not None


async def test_children_keep_lists_out_of_the_cache(migrated_postgres_url: str) -> None:
    """A child's own changes fire no trigger of the table: its rows are listed, never cached."""
    async with _open_with_two(migrated_postgres_url) as client:
        before = await client.store.token()
        await _run(
            migrated_postgres_url,
            'CREATE TABLE archived (LIKE "Incident" INCLUDING ALL)',
            'ALTER TABLE archived INHERIT "Incident"',
        )
        assert await client.store.token() is None
        for _ in range(2):
            await _run(migrated_postgres_url, INSERT.replace('"Incident"', "archived"))
            assert sorted(await _messages(client)) == await _stored(migrated_postgres_url)
        await _run(migrated_postgres_url, "DROP TABLE archived")
        assert len(await client.list()) == 2
        assert await client.store.token() not in (None, before)


# Lost parts


WEAKENED = {
    "disabled": ('ALTER TABLE "Incident" DISABLE TRIGGER ALL',),
    "restored by pg_restore": (
        'ALTER TABLE "Incident" DISABLE TRIGGER ALL',
        'ALTER TABLE "Incident" ENABLE TRIGGER ALL',
    ),
    "one disabled": ('ALTER TABLE "Incident" DISABLE TRIGGER incident_token_truncate',),
    "dropped": ('DROP TRIGGER incident_token_change ON "Incident"',),
    "renamed": ('ALTER TRIGGER incident_token_change ON "Incident" RENAME TO "Other"',),
    "replica": ('ALTER TABLE "Incident" ENABLE REPLICA TRIGGER incident_token_change',),
    "another event": (
        'DROP TRIGGER incident_token_truncate ON "Incident"',
        (
            'CREATE TRIGGER incident_token_truncate AFTER INSERT ON "Incident" '
            "FOR EACH STATEMENT EXECUTE FUNCTION incident_token_change()"
        ),
        'ALTER TABLE "Incident" ENABLE ALWAYS TRIGGER incident_token_truncate',
    ),
}
UNSEEN = (
    f'SET session_replication_role = replica; ALTER TABLE "Incident" DISABLE TRIGGER ALL; {UPDATE}'
)


@pytest.mark.parametrize("statements", WEAKENED.values(), ids=WEAKENED)
async def test_a_weakened_guard_is_noticed_and_mended(
    migrated_postgres_url: str, redis_url: str, statements: Sequence[str]
) -> None:
    """Without its triggers, a list is read from the database; `upgrade` restores them."""
    url = migrated_postgres_url
    async with _open_with_two(url, redis_url=redis_url) as client:
        before = await client.store.token()
        await _run(url, *statements)
        assert await client.store.token() is None
        for statement in (UPDATE, "SET session_replication_role = replica; " + UPDATE):
            await _run(url, statement)
            assert sorted(await _messages(client)) == await _stored(url)
        with pytest.raises(SchemaOutOfDate, match="the trigger incident_token_") as caught:
            await client.check()
        assert caught.value.command == "incidentkit db upgrade"
        with pytest.raises(SchemaOutOfDate, match="the trigger incident_token_"):
            await check(url)
        with pytest.raises(SchemaOutOfDate, match="the trigger incident_token_"):
            await store_from_url(url).open()
        restored = (await upgrade(url)).restored
        assert restored
        assert all(part.startswith("the trigger incident_token_") for part in restored)
        await check(url)
        await client.check()
        assert (await upgrade(url)).restored == ()
        assert await client.store.token() not in (None, before)
        assert sorted(await _messages(client)) == await _stored(url)
        await _run(url, UPDATE)
        assert sorted(await _messages(client)) == await _stored(url)


PARTLY = """
DO $$
DECLARE definition text := (
    SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE tgname = 'incident_token_change'
);
BEGIN
    DROP TRIGGER incident_token_change ON "Incident";
    EXECUTE replace(definition, ' UPDATE ', ' UPDATE OF source ');
    ALTER TABLE "Incident" ENABLE ALWAYS TRIGGER incident_token_change;
END $$
"""
"""Lets the trigger fire for changes of one column only."""


async def test_a_trigger_for_some_columns_is_noticed_and_mended(migrated_postgres_url: str) -> None:
    """A trigger that misses changes of a column is another one."""
    await _run(migrated_postgres_url, PARTLY)
    with pytest.raises(SchemaOutOfDate, match="the trigger incident_token_change was changed"):
        await check(migrated_postgres_url)
    restored = (await upgrade(migrated_postgres_url)).restored
    assert restored == ("the trigger incident_token_change",)


async def test_a_lost_table_of_tokens_is_noticed_and_mended(url: str) -> None:
    """Without the table of tokens nothing works: `check` names it, and `upgrade` restores it."""
    async with _open_with_two(url) as client:
        await run_sql(url, "DROP TABLE incident_token")
        missing = "the table incident_token is missing"
        with pytest.raises(SchemaOutOfDate, match=missing):
            await client.check()
        with pytest.raises(SchemaOutOfDate, match=missing):
            await check(url)
        assert missing.removesuffix(" is missing") in (await upgrade(url)).restored
        await check(url)
        await client.create("Line is down", source="partner")
        assert len(await client.list()) == 3
        assert await client.store.token() is not None


LOST = {
    "the trigger incident_token_change": (
        "CREATE OR REPLACE FUNCTION incident_token_change() RETURNS trigger LANGUAGE plpgsql "
        "AS $$ BEGIN RETURN NULL; END $$"
    ),
    "the function incident_words_1": (
        'DROP INDEX "ix_Incident_incident_message"; DROP FUNCTION incident_words_1(text)'
    ),
    "the function incident_text_1": "ALTER FUNCTION incident_text_1(text) VOLATILE",
    "the index ix_Incident_source": 'DROP INDEX "ix_Incident_source"',
    "the index ux_Incident_dedup_key": (
        'DROP INDEX "ux_Incident_dedup_key"; '
        'CREATE INDEX "ux_Incident_dedup_key" ON "Incident" (dedup_key)'
    ),
    "the index ix_incident_event_incident_id": (
        "DROP INDEX ix_incident_event_incident_id; "
        "CREATE INDEX ix_incident_event_incident_id ON incident_event (event_id, incident_id)"
    ),
    "the index ix_Incident_ended_at": (
        "UPDATE pg_index SET indisvalid = false "
        "WHERE indexrelid = CAST('\"ix_Incident_ended_at\"' AS regclass)"
    ),
    "the index ix_Incident_incident_message": 'DROP INDEX "ix_Incident_incident_message"',
    "the constraint ck_incident_event_writer": (
        "ALTER TABLE incident_event DROP CONSTRAINT ck_incident_event_writer; "
        "INSERT INTO incident_event (nonce, transaction_id, incident_id, kind, at) "
        "SELECT 1, transaction_id, incident_id, 'noted', at FROM incident_event LIMIT 1"
    ),
    "the rows of incident_token": "DELETE FROM incident_token WHERE slot = 3",
}


@pytest.mark.parametrize("part", LOST)
async def test_each_part_that_differs_is_restored(
    migrated_postgres_url: str, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    """`check` names each part that differs, and `upgrade` restores it."""
    url = migrated_postgres_url
    async with _open_with_two(url) as client:
        before = await client.store.token()
        await _run(url, LOST[part])
        if part != "the rows of incident_token":
            with pytest.raises(SchemaOutOfDate, match=f"{part} (is missing|was changed)"):
                await check(url)
        if any(kind in part for kind in ("index", "function", "constraint")):
            # The lists are true: what works goes on.
            await client.check()
            store = store_from_url(url)
            await store.open()
            await store.close()
            assert f"In the schema, {part} " in caplog.text
        assert part in (await upgrade(url)).restored
        await check(url)
        assert (await upgrade(url)).restored == ()
        if "token" in part:
            assert await client.store.token() not in (None, before)
        await client.create("Disk is full", source="partner", dedup_key="disk")
        await client.create("Disk is full", source="partner", dedup_key="disk")
        assert len(await client.list()) == 3
        assert len((await client.search(text="disk")).incidents) == 2


def _alter_as_a_host_does(url: str) -> None:
    """Change a column as a host's migration on SQLite does, which creates the table again."""
    engine = create_engine(url.replace("+aiosqlite", ""))
    with engine.begin() as connection:
        op = Operations(MigrationContext.configure(connection))
        with op.batch_alter_table("Incident", recreate="always") as batch:
            batch.alter_column("incident_message", type_=String(2000))
        connection.exec_driver_sql("UPDATE \"Incident\" SET incident_message = 'Redacted'")
    engine.dispose()


async def test_a_table_that_a_host_recreates_is_noticed_and_mended(
    sqlite_url: str, redis_url: str
) -> None:
    """After Alembic's batch mode, lists are true, `check` names the triggers, opening mends."""
    async with _open_with_two(sqlite_url, redis_url=redis_url) as client:
        before = await client.store.token()
        _alter_as_a_host_does(sqlite_url)
        assert await client.store.token() is None
        assert await _messages(client) == ["Redacted"] * 2
        await run_sql(sqlite_url, UPDATE)
        assert await _messages(client) == ["Redacted!"] * 2
        with pytest.raises(SchemaOutOfDate, match="the trigger incident_token_insert is missing"):
            await client.check()
        with pytest.raises(SchemaOutOfDate, match="the trigger incident_text_insert is missing"):
            await check(sqlite_url)
        async with IncidentClient.open(sqlite_url, redis_url) as other:
            await check(sqlite_url)
            await client.check()
            assert await client.store.token() not in (None, before)
            assert await _messages(client) == await _messages(other) == ["Redacted!"] * 2
            assert len((await other.search(text="redacted")).incidents) == 2
            assert (await other.search(text="disk")).incidents == []
            await run_sql(sqlite_url, UPDATE)
            assert await _messages(client) == await _messages(other) == ["Redacted!!"] * 2
    assert (await upgrade(sqlite_url)).restored == ()


@pytest.mark.parametrize("options", [{}, {"sqlite_autoincrement": True}], ids=["lost", "kept"])
@pytest.mark.parametrize("table", ["Incident", "incident_event"])
async def test_ids_of_a_recreated_table_are_not_given_out_again(
    sqlite_url: str, table: str, options: dict[str, Any]
) -> None:
    """Alembic's batch mode loses how SQLite counts: opening mends it, and keeps all of the host."""
    async with IncidentClient.open(sqlite_url) as client:
        for n in range(3):
            await client.create(f"Disk {n} is full", source="partner", incident_type="failed")
        await client.purge(datetime.now(UTC) + timedelta(days=1))
        await client.create("Line is down", source="partner", dedup_key="line")
        await client.create("Line is cut", source="partner", incident_type="failed")
        await client.purge(datetime.now(UTC) + timedelta(days=1))
    engine = create_engine(sqlite_url.replace("+aiosqlite", ""))
    with engine.begin() as connection:
        operations = Operations(MigrationContext.configure(connection))
        with operations.batch_alter_table(table, recreate="always", table_kwargs=options) as batch:
            batch.add_column(Column("host", String(), server_default="one, (two)"))
    engine.dispose()
    of_host = (
        f"CREATE INDEX host_index ON \"{table}\" (lower(host)) WHERE host <> 'x'",
        f'CREATE TRIGGER host_trigger BEFORE DELETE ON "{table}" BEGIN SELECT 1; END',
        f'ALTER TABLE "{table}" ADD loud GENERATED ALWAYS AS (upper(host)) VIRTUAL',
        f'CREATE VIEW host_view AS SELECT * FROM "{table}"',
    )
    for statement in of_host:
        await run_sql(sqlite_url, statement)
    if not options:
        with pytest.raises(SchemaOutOfDate, match=f"the table {table} was changed"):
            await check(sqlite_url)
    async with IncidentClient.open(sqlite_url) as client:
        await check(sqlite_url)
        assert await _messages(client) == ["Line is down"]
        again = await client.create("Still down", source="partner", dedup_key="line")
        assert again.occurrences == 2
        new = await client.create("Door is open", source="partner")
        assert new.incident_id > 5
        history = await client.history(new.incident_id)
        assert [str(event.kind) for event in history] == ["created"]
        assert len((await client.search(text="line")).incidents) == 1
    names = "SELECT name FROM sqlite_master WHERE name LIKE 'host%' ORDER BY 1"
    assert len(await run_sql(sqlite_url, names)) == 3
    rows = await run_sql(sqlite_url, "SELECT DISTINCT host, loud FROM host_view")
    assert rows == [("one, (two)", "ONE, (TWO)")]


@pytest.mark.parametrize(
    ("definition", "numbered_definition"),
    [
        (
            'CREATE TABLE "t" (id INTEGER NOT NULL, a, CONSTRAINT "pk, t" PRIMARY KEY ("id"), b)',
            'CREATE TABLE "n" (id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, a, b)',
        ),
        (
            "create table t(other_id integer, `id` integer primary key)",
            'CREATE TABLE "n" (other_id integer, `id` integer NOT NULL PRIMARY KEY AUTOINCREMENT)',
        ),
        ("CREATE TABLE t (id INTEGER PRIMARY KEY AUTOINCREMENT)", None),
        ("CREATE TABLE t (id TEXT PRIMARY KEY)", None),
    ],
)
def test_a_definition_of_a_table_gets_a_key(
    definition: str, numbered_definition: str | None
) -> None:
    """The key is found however a host has written it; otherwise the table is left alone."""
    assert numbered(definition, "id", "n") == (numbered_definition or definition)


@pytest.mark.parametrize("name", SQLITE_TRIGGERS)
@pytest.mark.parametrize("other", ["", "CREATE TRIGGER {} AFTER DELETE ON {} BEGIN SELECT 1; END"])
async def test_each_trigger_of_a_file_is_restored(
    migrated_sqlite_url: str, name: str, other: str
) -> None:
    """A trigger that was dropped, or replaced by another one, is named and restored."""
    table = "incident_event" if "event" in name else '"Incident"'
    await run_sql(migrated_sqlite_url, f"DROP TRIGGER {name}")
    if other:
        await run_sql(migrated_sqlite_url, other.format(name, table))
    fault = f"the trigger {name} {'was changed' if other else 'is missing'}"
    with pytest.raises(SchemaOutOfDate, match=fault):
        await check(migrated_sqlite_url)
    assert (await upgrade(migrated_sqlite_url)).restored == (f"the trigger {name}",)
    await check(migrated_sqlite_url)


async def test_an_index_of_a_file_is_restored(migrated_sqlite_url: str) -> None:
    """An index that was dropped, or lost its condition, is named and restored."""
    await run_sql(migrated_sqlite_url, 'DROP INDEX "ix_Incident_source"')
    await run_sql(migrated_sqlite_url, 'DROP INDEX "ux_Incident_dedup_key"')
    await run_sql(
        migrated_sqlite_url, 'CREATE UNIQUE INDEX "ux_Incident_dedup_key" ON "Incident" (dedup_key)'
    )
    with pytest.raises(SchemaOutOfDate) as caught:
        await check(migrated_sqlite_url)
    assert sorted(caught.value.differences) == [
        "the index ix_Incident_source is missing",
        "the index ux_Incident_dedup_key was changed",
    ]
    async with IncidentClient.open(migrated_sqlite_url):
        await check(migrated_sqlite_url)


async def test_a_schema_change_of_a_file_replaces_the_token(sqlite_url: str) -> None:
    """Each change of the schema of a file replaces the token: it can have created the table."""
    async with _open_with_two(sqlite_url) as client:
        before = await client.store.token()
        await run_sql(sqlite_url, "CREATE TABLE orders (order_id INTEGER PRIMARY KEY)")
        assert await client.store.token() not in (None, before)


@pytest.mark.parametrize("upgraded", REVISIONS[1:])
async def test_the_parts_are_those_of_every_way_to_the_newest_revision(
    sqlite_url: str, empty_postgres_url: str, upgraded: str
) -> None:
    """A database that comes from any revision has all parts: nothing is restored twice."""
    for url in (sqlite_url, empty_postgres_url):
        await upgrade(url, upgraded)
        assert (await upgrade(url)).restored == ()
        await check(url)
        await downgrade(url, upgraded)
        assert (await upgrade(url)).restored == ()
        await check(url)


async def test_settings_of_the_server_make_no_difference(migrated_postgres_url: str) -> None:
    """How a server writes names and strings makes no part of the schema another one."""
    url = f"{migrated_postgres_url}?quote_all_identifiers=on&standard_conforming_strings=off"
    await check(url)
    assert (await upgrade(url)).restored == ()
    async with IncidentClient.open(url) as client:
        await client.create("Disk 磁盘 C:\\1 is full", source="partner")
        assert (await client.search(text="盘 c:\\1", total=True)).total == 1
    await _run(migrated_postgres_url, 'ALTER TABLE "Incident" DISABLE TRIGGER USER')
    assert (await upgrade(url)).restored
    await check(migrated_postgres_url)


async def test_opening_sends_no_more_statements(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """One statement at the opening reads the revision and looks at the parts of the schema."""
    store = store_from_url(url)
    await store.open()
    await store.close()
    caplog.set_level("INFO", logger="incidentkit.store")
    store = store_from_url(url, StoreOptions(echo=True))
    await store.open()
    statements = [each for each in caplog.messages if "SELECT" in each and "version" in each]
    assert len(statements) == 1
    assert "incidentkit_version" in statements[0]
    assert len([each for each in caplog.messages if "SELECT" in each]) <= 2
    await store.close()


# Names of schemas


@asynccontextmanager
async def _in_schema(url: str, schema: str) -> AsyncIterator[IncidentClient]:
    at = f"{url}?search_path={schema}"
    async with IncidentClient.open(at) as client:
        yield client


async def test_a_schema_can_be_renamed(migrated_postgres_url: str) -> None:
    """After a rename, writes work and replace the token; so do those of a new schema in its place.

    A transaction that changes incidents of both replaces the tokens of both.
    """
    url = migrated_postgres_url
    await _run(url, "CREATE SCHEMA shop")
    await upgrade(f"{url}?search_path=shop")
    async with _in_schema(url, "shop") as client:
        await client.create("Disk is full", source="monitoring")
    await _run(url, "ALTER SCHEMA shop RENAME TO former")
    async with _in_schema(url, "former") as former:
        assert len(await former.list()) == 1
        await former.create("Network is down", source="partner")
        assert len(await former.list()) == 2
        await check(f"{url}?search_path=former")
        await _run(url, "CREATE SCHEMA shop")
        await upgrade(f"{url}?search_path=shop")
        async with _in_schema(url, "shop") as client:
            assert await client.list() == []
            tokens = [(await former.store.token(), await client.store.token())]
            one, two = (
                INSERT.replace('"Incident"', f'{name}."Incident"') for name in ("former", "shop")
            )
            for statements in ((one,), (two,), (one, two), (two, one)):
                await _run(url, f"BEGIN; {'; '.join(statements)}; COMMIT")
                tokens.append((await former.store.token(), await client.store.token()))
            assert (len(await former.list()), len(await client.list())) == (5, 3)
    firsts, seconds = zip(*tokens, strict=True)
    assert None not in firsts + seconds
    assert [a != b for a, b in pairwise(firsts)] == [True, False, True, True]
    assert [a != b for a, b in pairwise(seconds)] == [False, True, True, True]


async def test_a_copy_of_a_schema_under_another_name_has_its_own_triggers(
    migrated_postgres_url: str,
) -> None:
    """In two schemas restored from one dump, each notices its first change of a transaction."""
    url = migrated_postgres_url
    for schema in ("first", "second"):
        await _run(url, f"CREATE SCHEMA {schema}")
    await upgrade(f"{url}?search_path=first")
    dump = _dump(url, "--schema=first")
    _restore(url, dump.replace("CREATE SCHEMA first", "--").replace("first.", "second."))
    await check(f"{url}?search_path=second")
    async with _in_schema(url, "first") as one, _in_schema(url, "second") as two:
        before = await one.store.token(), await two.store.token()
        both = [INSERT.replace('"Incident"', f'{name}."Incident"') for name in ("first", "second")]
        await _run(url, f"BEGIN; {'; '.join(both)}; COMMIT")
        assert await one.store.token() not in (None, before[0])
        assert await two.store.token() not in (None, before[1])


@pytest.mark.parametrize("revision", ["e4a81c3f5d27", "9b3f6d20c7e8", "c7d15a82e9b4"])
async def test_a_renamed_schema_of_an_earlier_revision_is_upgraded(
    empty_postgres_url: str, revision: str
) -> None:
    """A schema that was renamed while its function had the old name is upgraded."""
    await _run(empty_postgres_url, "CREATE SCHEMA shop")
    shop = f"{empty_postgres_url}?search_path=shop"
    await upgrade(shop, revision)
    await _run(
        empty_postgres_url,
        INSERT.replace('"Incident"', 'shop."Incident"').replace("'new'", "'failed'"),
        "ALTER SCHEMA shop RENAME TO former",
    )
    former = f"{empty_postgres_url}?search_path=former"
    await upgrade(former)
    await check(former)
    async with _in_schema(empty_postgres_url, "former") as client:
        await client.create("Disk is full", source="partner")
        assert len(await client.list()) == 2


# Isolation


async def test_serializable_writers_leave_few_tokens(migrated_postgres_url: str) -> None:
    """If every transaction is SERIALIZABLE, the number of tokens stays bounded."""
    async with AsyncExitStack() as stack:
        writers = []
        for _ in range(40):
            writer = await asyncpg.connect(migrated_postgres_url)
            stack.push_async_callback(writer.close)
            writers.append(writer)
        for _ in range(15):
            # Overlapping transactions, of which several have the same token to replace.
            for writer in writers:
                await writer.execute(f"BEGIN ISOLATION LEVEL SERIALIZABLE; {INSERT}")
            for writer in writers:
                await writer.execute("COMMIT")
        count = await writers[0].fetchval("SELECT count(*) FROM incident_token")
    assert 16 < count <= 16 + len(writers)
    assert len(await _stored(migrated_postgres_url)) == 600


# Row security


TENANT: ContextVar[str] = ContextVar("TENANT", default="nobody")
"""The tenant of the current request."""

POLICIES = """
ALTER TABLE "Incident" ADD tenant text DEFAULT current_setting('app.tenant', true);
ALTER TABLE incident_event ADD tenant text DEFAULT current_setting('app.tenant', true);
CREATE ROLE {role} LOGIN;
GRANT SELECT, INSERT, UPDATE, DELETE ON "Incident", incident_event, incident_idempotency_key
    TO {role};
GRANT SELECT ON incident_token, incident_purged_event, incidentkit_version TO {role};
GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {role};
"""
ENABLE = """
ALTER TABLE "Incident" ENABLE ROW LEVEL SECURITY;
CREATE POLICY tenants ON "Incident" USING (tenant = current_setting('app.tenant', true));
ALTER TABLE incident_event ENABLE ROW LEVEL SECURITY;
CREATE POLICY tenants ON incident_event USING (tenant = current_setting('app.tenant', true));
"""


@pytest.fixture
async def role(migrated_postgres_url: str) -> AsyncIterator[str]:
    """A role that each policy applies to; the name of its database tells it from others."""
    name = f"tenant_{migrated_postgres_url.rpartition('_')[2]}"
    await _run(migrated_postgres_url, POLICIES.format(role=name))
    yield name
    await _run(migrated_postgres_url, f"DROP OWNED BY {name}", f"DROP ROLE {name}")


@asynccontextmanager
async def _pool_of_tenants(url: str, role: str) -> AsyncIterator[asyncpg.Pool[asyncpg.Record]]:
    """Open a pool whose sessions are those of the tenant of their borrower."""

    async def set_tenant(connection: Any) -> None:
        await connection.execute("SELECT set_config('app.tenant', $1, false)", TENANT.get())

    at = url.replace("postgres@", f"{role}@")
    async with asyncpg.create_pool(at, min_size=1, max_size=6, setup=set_tenant) as pool:
        yield pool


def _as_tenant(tenant: str, call: Any) -> asyncio.Task[Any]:
    """Run a call for a tenant."""

    async def run() -> Any:
        TENANT.set(tenant)
        return await call()

    return asyncio.ensure_future(run())


async def test_each_tenant_sees_its_own_rows_under_policies(
    migrated_postgres_url: str, redis_url: str, role: str
) -> None:
    """Where policies are active, no call shares the answer, the page or the session of another."""
    await _run(migrated_postgres_url, ENABLE)
    async with (
        _pool_of_tenants(migrated_postgres_url, role) as pool,
        IncidentClient.open(pool, redis_url) as client,
    ):
        tenants = ["one", "two", "three"]
        messages = {tenant: [f"Disk of {tenant}, {n}" for n in range(3)] for tenant in tenants}
        created = await asyncio.gather(
            *(
                _as_tenant(tenant, lambda text=text: client.create(text, source="partner"))
                for n in range(3)
                for tenant, text in [(tenant, messages[tenant][n]) for tenant in tenants]
            )
        )
        for _ in range(2):
            lists = await asyncio.gather(
                *(_as_tenant(tenant, client.list) for tenant in tenants * 3)
            )
            for tenant, incidents in zip(tenants * 3, lists, strict=True):
                assert sorted(each.incident_message for each in incidents) == messages[tenant]
        gets = await asyncio.gather(
            *(
                _as_tenant(tenant, lambda each=each: client.get(each.incident_id))
                for tenant in tenants
                for each in created
            ),
            return_exceptions=True,
        )
        for tenant, answers in zip(tenants, (gets[:9], gets[9:18], gets[18:]), strict=True):
            for incident, answer in zip(created, answers, strict=True):
                if incident.incident_message in messages[tenant]:
                    assert answer == incident
                else:
                    assert isinstance(answer, IncidentNotFound)
        changed = await asyncio.gather(
            *(
                _as_tenant(
                    tenant, lambda each=each: client.update_status(each.incident_id, "failed")
                )
                for tenant in tenants
                for each in created
            ),
            return_exceptions=True,
        )
        assert sum(isinstance(each, IncidentNotFound) for each in changed) == 18
        assert sum(not isinstance(each, Exception) for each in changed) == 9

        async def all_changes() -> ChangePage:
            # A transaction of another test on the server can hold changes up.
            async with asyncio.timeout(60):
                while len((page := await client.read_changes()).changes) < 6:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            return page

        feeds = await asyncio.gather(*(_as_tenant(tenant, all_changes) for tenant in tenants * 2))
        for tenant, page in zip(tenants * 2, feeds, strict=True):
            ids = {
                incident.incident_id for incident in created if tenant in incident.incident_message
            }
            assert {change.incident_id for change in page.changes} == ids
            assert len(page.changes) == 6


async def test_policies_that_are_enabled_under_an_open_client_hold(
    migrated_postgres_url: str, redis_url: str, role: str
) -> None:
    """Once row security is enabled, no cached page and no shared statement is used any more."""
    async with (
        _pool_of_tenants(migrated_postgres_url, role) as pool,
        IncidentClient.open(pool, redis_url) as client,
    ):
        TENANT.set("one")
        first = await client.create("Disk is full", source="partner")
        assert await client.list() == [first]
        await client.list()
        # Written in the session of no caller, since nothing was known of tenants.
        await _run(migrated_postgres_url, "UPDATE \"Incident\" SET tenant = 'one'", ENABLE)
        assert await client.store.token() is None
        for tenant, expected in (("two", []), ("one", [first]), ("two", [])):
            assert await _as_tenant(tenant, client.list) == expected
        both = await asyncio.gather(
            *(
                _as_tenant(tenant, lambda: client.get(first.incident_id))
                for tenant in ("one", "two") * 4
            ),
            return_exceptions=True,
        )
        for answer in both[::2]:
            assert answer == first
        for answer in both[1::2]:
            assert isinstance(answer, IncidentNotFound)


async def test_policies_that_are_enabled_under_readers_of_the_feed_hold(
    migrated_postgres_url: str, role: str
) -> None:
    """Readers that wait at one place when row security is enabled get their own events alone."""
    tenants = ["one", "two"] * 3
    async with (
        _pool_of_tenants(migrated_postgres_url, role) as pool,
        IncidentClient.open(pool) as client,
    ):
        first = await client.create("Disk is full", source="partner")
        async with asyncio.timeout(60):
            # A transaction of another test on the server can hold changes up.
            while not (page := await client.read_changes()).changes:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        cursor = page.changes[-1].cursor
        waiting = [
            _as_tenant(tenant, lambda: client.read_changes(cursor, wait=2)) for tenant in tenants
        ]
        feed: Any = client._opened().feed
        async with asyncio.timeout(30):
            while len(feed._change._waiters) < len(waiting):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await _run(migrated_postgres_url, ENABLE)
        async with (
            _pool_of_tenants(migrated_postgres_url, role) as other_pool,
            IncidentClient.open(other_pool) as other,
        ):
            second = await _as_tenant("two", lambda: other.create("Disk is full", source="partner"))
            third = await _as_tenant("one", lambda: other.create("Disk is full", source="partner"))
        for tenant, changes in zip(tenants, await asyncio.gather(*waiting), strict=True):
            # One that reads in the session of another tenant gets its own with its next call.
            expected = second if tenant == "two" else third
            found = [change.incident_id for change in changes.changes]
            assert found in ([expected.incident_id], [])
        for tenant, expected in (("nobody", first), ("two", second), ("one", third)):
            changes = await _as_tenant(tenant, client.read_changes)
            assert [change.incident_id for change in changes.changes] == [expected.incident_id]


async def test_policies_on_events_alone_keep_writes_apart(
    migrated_postgres_url: str, role: str
) -> None:
    """With row security on the events only, each event is written in its caller's session."""
    async with (
        _pool_of_tenants(migrated_postgres_url, role) as pool,
        IncidentClient.open(pool) as client,
    ):
        await _run(migrated_postgres_url, ENABLE[ENABLE.index("ALTER TABLE incident_event") :])
        tenants = ["one", "two"] * 5
        created = await asyncio.gather(
            *(
                _as_tenant(tenant, lambda: client.create("Disk is full", source="partner"))
                for tenant in tenants
            )
        )
        written = await run_sql(
            migrated_postgres_url, "SELECT tenant FROM incident_event ORDER BY incident_id"
        )
        ordered = sorted(zip(created, tenants, strict=True), key=lambda pair: pair[0].incident_id)
        assert [tenant for (tenant,) in written][1:] == [tenant for _, tenant in ordered][1:]


async def test_a_page_of_an_owner_is_not_served_to_a_role(
    migrated_postgres_url: str, redis_url: str, role: str
) -> None:
    """No page of the owner, who bypasses policies, is served to a role that they apply to."""
    await _run(migrated_postgres_url, ENABLE)
    owned = f"{migrated_postgres_url}?app.tenant=one"
    async with IncidentClient.open(owned, redis_url) as owner:
        await owner.create("Disk is full", source="partner")
        assert len(await owner.list()) == len(await owner.list()) == 1
        at = f"{migrated_postgres_url.replace('postgres@', f'{role}@')}?app.tenant=two"
        async with IncidentClient.open(at, redis_url) as other:
            assert await other.list() == []
            assert await other.store.token() is None
            assert len(await owner.list()) == 1


async def test_a_role_that_must_not_read_gets_no_page(
    migrated_postgres_url: str, redis_url: str, role: str
) -> None:
    """A role that lost the right to read incidents is not served a cached page of them."""
    membership = f"group_of_{role}"
    await _run(
        migrated_postgres_url,
        f'REVOKE SELECT ON "Incident" FROM {role}',
        f"CREATE ROLE {membership}",
        f'GRANT SELECT ON "Incident" TO {membership}',
        f"GRANT {membership} TO {role}",
    )
    try:
        at = f"{migrated_postgres_url.replace('postgres@', f'{role}@')}?app.tenant=one"
        async with IncidentClient.open(at, redis_url) as client:
            await _run(migrated_postgres_url, INSERT)
            assert len(await client.list()) == 1
            await _run(migrated_postgres_url, f"REVOKE {membership} FROM {role}")
            with pytest.raises(StoreError, match="privilege"):
                await client.list()
    finally:
        await _run(migrated_postgres_url, f"DROP OWNED BY {membership}", f"DROP ROLE {membership}")

"""Effects of upgrades and downgrades on a database and its rows."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import threading
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData, inspect, text
from sqlalchemy.ext.asyncio import create_async_engine

from incidentkit import (
    Incident,
    IncidentClient,
    IncidentSource,
    IncidentStatus,
    InvalidSettings,
    SchemaOutOfDate,
    StoreError,
    StoreUnavailable,
)
from incidentkit.store import migrate
from incidentkit.store.migrations import MIGRATIONS
from incidentkit.store.schema import REVISIONS, SCHEMA_REVISION, VERSION_TABLE, migrations_to
from incidentkit.store.sql.tables import TEXT_INDEX, TEXT_TABLES, keep_out_of_autogenerate, metadata
from tests.hosts import run_sql, sqlalchemy_url

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent

ORIGIN_SCHEMA = """
CREATE TABLE alembic_version (
    version_num VARCHAR(32) NOT NULL CONSTRAINT alembic_version_pkc PRIMARY KEY
);
INSERT INTO alembic_version VALUES ('dadc1db062ae');
CREATE TYPE incidentstatus AS ENUM ('new', 'completed', 'failed');
CREATE TYPE incidentsource AS ENUM ('operator', 'monitoring', 'partner');
CREATE TABLE "Incident" (
    incident_id SERIAL NOT NULL,
    incident_message VARCHAR,
    incident_type incidentstatus,
    source incidentsource,
    created_at TIMESTAMP WITH TIME ZONE,
    CONSTRAINT "pk_Incident" PRIMARY KEY (incident_id)
);
"""

ORIGIN_ROWS = """
INSERT INTO "Incident" (incident_message, incident_type, source, created_at) VALUES
    ('Disk is full', 'new', 'monitoring', '2025-01-01 10:00:00.25+00'),
    ('', 'completed', 'operator', '2025-01-01 11:00:00+00'),
    (NULL, NULL, NULL, NULL),
    ('test', 'failed', 'partner', '2025-01-01 12:00:00+03');
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database."""
    name = {"sqlite": "sqlite_url", "postgresql": "empty_postgres_url"}[request.param]
    return str(request.getfixturevalue(name))


@pytest.fixture
async def origin_url(empty_postgres_url: str) -> str:
    """The URL of a database that the origin created and filled."""
    await _execute(empty_postgres_url, ORIGIN_SCHEMA + ORIGIN_ROWS)
    return empty_postgres_url


async def _execute(url: str, *statements: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


async def _fetch(url: str, statement: str) -> list[tuple[Any, ...]]:
    connection = await asyncpg.connect(url)
    try:
        return [tuple(row) for row in await connection.fetch(statement)]
    finally:
        await connection.close()


async def _inspected(url: str, look: Callable[[Connection], Any]) -> Any:
    engine = create_async_engine(sqlalchemy_url(url))
    try:
        async with engine.connect() as connection:
            return await connection.run_sync(look)
    finally:
        await engine.dispose()


def _schema(connection: Connection) -> dict[str, Any]:
    """Return everything the database reports about our tables."""
    found = inspect(connection)
    return {
        name: {
            "columns": [
                {key: str(value) for key, value in column.items() if key != "comment"}
                for column in found.get_columns(name)
            ],
            "primary key": found.get_pk_constraint(name)["constrained_columns"],
            "checks": sorted(check["name"] or "" for check in found.get_check_constraints(name)),
            "indexes": sorted(
                (index["name"] or "", tuple(index["column_names"]))
                for index in found.get_indexes(name)
                if index["name"] != TEXT_INDEX
            ),
        }
        for name in metadata.tables
    }


def _incident_columns(connection: Connection) -> dict[str, tuple[str, bool]]:
    return {
        column["name"]: (str(column["type"]), column["nullable"])
        for column in inspect(connection).get_columns("Incident")
    }


async def test_upgraded_schema_is_the_declared_one(empty_url: str) -> None:
    """The migrated schema equals the declared tables, on either database."""

    def differences(connection: Connection) -> Any:
        context = MigrationContext.configure(
            connection,
            opts={
                "compare_server_default": True,
                "include_name": lambda name, *_: (
                    name not in (VERSION_TABLE, TEXT_INDEX, *TEXT_TABLES)
                ),
            },
        )
        return compare_metadata(context, metadata)

    def create_and_inspect(connection: Connection) -> dict[str, Any]:
        metadata.create_all(connection)
        found = _schema(connection)
        connection.rollback()
        return found

    await migrate.upgrade(empty_url)
    assert await _inspected(empty_url, differences) == []

    migrated = await _inspected(empty_url, _schema)
    if empty_url.startswith("sqlite"):
        declared = await _inspected(empty_url + ".declared", create_and_inspect)
    else:
        for name in [*metadata.tables, VERSION_TABLE]:
            await _execute(empty_url, f'DROP TABLE "{name}"')
        await _execute(empty_url, "DROP TYPE incidentstatus", "DROP TYPE incidentsource")
        declared = await _inspected(empty_url, create_and_inspect)
    assert migrated == declared


def test_the_package_runs_every_migration(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package runs every migration that Alembic's own command finds, in the same order."""
    # Alembic adds the checkout to the path.
    monkeypatch.setattr(sys, "path", sys.path.copy())
    scripts = ScriptDirectory.from_config(Config(str(ROOT / "alembic.ini")))
    found = [script.revision for script in scripts.walk_revisions()]
    assert tuple(reversed(found)) == tuple(module.revision for module in MIGRATIONS) == REVISIONS
    assert REVISIONS[0] == "dadc1db062ae"


async def test_down_and_up_again_through_every_revision(empty_url: str) -> None:
    """Every revision can be downgraded and upgraded again, and `current` reports each step."""
    await migrate.upgrade(empty_url)
    for revision in [*reversed(REVISIONS[:-1]), None]:
        await migrate.downgrade(empty_url)
        assert await migrate.current(empty_url) == revision
    for revision in REVISIONS:
        await migrate.upgrade(empty_url, revision)
        assert await migrate.current(empty_url) == revision
    await migrate.check(empty_url)


def _of_the_origin(incident: Incident) -> tuple[Any, ...]:
    """Return the fields that the origin's schema has."""
    return (
        incident.incident_id,
        incident.incident_message,
        incident.incident_type,
        incident.source,
        incident.created_at,
    )


async def test_rows_outlive_the_way_to_the_origins_schema_and_back(empty_url: str) -> None:
    """A downgrade to the origin's revision and the upgrade after it keep every row."""
    await migrate.upgrade(empty_url)
    async with IncidentClient.open(empty_url) as incidents:
        await incidents.create("Disk is full", source="monitoring")
        second = await incidents.create("Network is down", source="partner")
        await incidents.update_status(second.incident_id, "failed")
        before = [_of_the_origin(incident) for incident in await incidents.list()]
    await migrate.downgrade(empty_url, "dadc1db062ae")
    columns = await _inspected(empty_url, _incident_columns)
    assert len(columns) == 5
    assert columns["incident_id"] == ("INTEGER", False)
    assert all(nullable for name, (_, nullable) in columns.items() if name != "incident_id")
    await migrate.upgrade(empty_url)
    async with IncidentClient.open(empty_url) as incidents:
        assert [_of_the_origin(incident) for incident in await incidents.list()] == before
        third = await incidents.create("Third one", source="operator")
        assert third.incident_id == second.incident_id + 1


@pytest.mark.parametrize("revision", REVISIONS[:-1])
async def test_rows_of_every_revision_are_kept(empty_url: str, revision: str) -> None:
    """Rows stored by an earlier version can be read, searched and changed after the upgrade."""
    await migrate.upgrade(empty_url, revision)
    engine = create_async_engine(sqlalchemy_url(empty_url))
    async with engine.begin() as connection:
        zone = "" if connection.dialect.name == "sqlite" else "+00"
        for status in ("new", "failed"):
            values = f"'Disk is {status}', '{status}', 'partner', '2026-01-01 10:00:00{zone}'"
            await connection.execute(
                text(
                    'INSERT INTO "Incident" (incident_message, incident_type, source, created_at) '
                    f"VALUES ({values})"
                )
            )
    await engine.dispose()
    await migrate.upgrade(empty_url)
    async with IncidentClient.open(empty_url) as incidents:
        failed, new = await incidents.list()
        assert (new.incident_message, failed.incident_message) == ("Disk is new", "Disk is failed")
        for incident in (new, failed):
            assert incident.created_at == datetime(2026, 1, 1, 10, tzinfo=UTC)
            assert (incident.version, incident.occurrences) == (1, 1)
            assert incident.last_seen_at == incident.created_at
            assert await incidents.history(incident.incident_id) == []
        assert new.ended_at is None
        if REVISIONS.index(revision) < REVISIONS.index("9b3f6d20c7e8"):
            # The migration that adds the column sets it for the rows that have ended.
            assert failed.ended_at is not None
            assert failed.ended_at > failed.created_at
        assert (await incidents.search(text="disk", total=True)).total == 2
        changed = await incidents.update_status(new.incident_id, "completed")
        assert changed.version == 2
        assert await incidents.purge(datetime(2026, 1, 2, tzinfo=UTC)) == 0


async def test_a_database_of_the_origin_is_taken_over(origin_url: str) -> None:
    """Upgrading a database that the origin filled loses no row and needs no manual step."""
    with pytest.raises(SchemaOutOfDate) as caught:
        await migrate.check(origin_url)
    assert caught.value.current == "dadc1db062ae"
    await migrate.upgrade(origin_url)
    async with IncidentClient.open(origin_url) as incidents:
        rows = sorted(await incidents.list(), key=lambda incident: incident.incident_id)
        assert [row.incident_message for row in rows] == [
            "Disk is full",
            "",
            "(no message)",
            "test",
        ]
        assert rows[0].created_at == datetime(2025, 1, 1, 10, tzinfo=UTC)
        assert rows[2].incident_type is IncidentStatus.NEW
        assert rows[2].source is IncidentSource.OPERATOR
        # The latest known time of the rows before it.
        assert rows[2].created_at == datetime(2025, 1, 1, 11, tzinfo=UTC)
        assert rows[3].created_at == datetime(2025, 1, 1, 9, tzinfo=UTC)
        # An incident whose message breaks today's rules can still change its status.
        assert (await incidents.update_status(2, "failed")).incident_type is IncidentStatus.FAILED
        assert (await incidents.create("A new one", source="operator")).incident_id == 5


async def test_the_origins_own_record_is_left_alone(origin_url: str) -> None:
    """The origin's `alembic_version` never changes, so the origin can run again later."""
    await migrate.upgrade(origin_url)
    assert await _fetch(origin_url, "SELECT version_num FROM alembic_version") == [
        ("dadc1db062ae",)
    ]
    await migrate.downgrade(origin_url, "dadc1db062ae")
    assert len(await _fetch(origin_url, 'SELECT * FROM "Incident"')) == 4
    # The origin inserts without an id, as SQLAlchemy does by default.
    await _execute(origin_url, 'INSERT INTO "Incident" (incident_message) VALUES (NULL)')
    await migrate.upgrade(origin_url)
    assert len(await _fetch(origin_url, 'SELECT * FROM "Incident"')) == 5


async def test_a_first_null_time_becomes_the_epoch(empty_postgres_url: str) -> None:
    """A row without a time gets 1970-01-01 if no earlier row has one."""
    await _execute(
        empty_postgres_url,
        ORIGIN_SCHEMA,
        "INSERT INTO \"Incident\" (incident_message) VALUES ('No time known')",
    )
    await migrate.upgrade(empty_postgres_url)
    async with IncidentClient.open(empty_postgres_url) as incidents:
        (incident,) = await incidents.list()
    assert incident.created_at == datetime(1970, 1, 1, tzinfo=UTC)


async def test_naive_times_and_capital_labels_are_mended(empty_postgres_url: str) -> None:
    """Naive times are read as UTC, and enum labels stored by name become values."""
    await _execute(
        empty_postgres_url,
        ORIGIN_SCHEMA,
        'ALTER TABLE "Incident" ALTER created_at TYPE timestamp',
        "ALTER TYPE incidentstatus RENAME VALUE 'new' TO 'NEW'",
        "ALTER TYPE incidentsource RENAME VALUE 'partner' TO 'PARTNER'",
        "SET TIME ZONE 'Asia/Tokyo'",
        'INSERT INTO "Incident" (incident_message, incident_type, source, created_at) '
        "VALUES ('Naive time', 'NEW', 'PARTNER', '2025-01-01 10:00:00')",
    )
    await migrate.upgrade(empty_postgres_url)
    async with IncidentClient.open(empty_postgres_url) as incidents:
        incident = await incidents.get(1)
    assert incident.created_at == datetime(2025, 1, 1, 10, tzinfo=UTC)
    assert incident.incident_type is IncidentStatus.NEW
    assert incident.source is IncidentSource.PARTNER


async def test_ids_pass_32_bits(migrated_postgres_url: str) -> None:
    """After an upgrade, ids continue past 2^31."""
    await _execute(
        migrated_postgres_url, "SELECT setval('\"Incident_incident_id_seq\"', 2147483647)"
    )
    async with IncidentClient.open(migrated_postgres_url) as incidents:
        incident = await incidents.create("Past 32 bits", source="operator")
        assert incident.incident_id == 2**31
        assert await incidents.get(2**31) == incident


async def test_a_strangers_table_is_not_touched(empty_url: str) -> None:
    """An "Incident" table that is not the origin's stops the upgrade with a clear error."""
    engine = create_async_engine(sqlalchemy_url(empty_url))
    async with engine.begin() as connection:
        await connection.execute(text('CREATE TABLE "Incident" (color VARCHAR(9))'))
    await engine.dispose()
    with pytest.raises(StoreError, match="in the way"):
        await migrate.upgrade(empty_url)
    assert await _inspected(empty_url, lambda c: inspect(c).get_table_names()) == ["Incident"]


async def test_a_database_of_the_future_is_refused(empty_url: str) -> None:
    """A revision that this version does not know is refused with advice to upgrade the package."""
    await migrate.upgrade(empty_url)
    engine = create_async_engine(sqlalchemy_url(empty_url))
    async with engine.begin() as connection:
        await connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = 'ffffffffffff'"))
    await engine.dispose()
    for refused in (migrate.upgrade(empty_url), migrate.check(empty_url)):
        with pytest.raises(SchemaOutOfDate, match="pip install --upgrade incidentkit"):
            await refused
    with pytest.raises(SchemaOutOfDate):
        await IncidentClient.open(empty_url).connect()


async def test_postgresql_is_checked_and_never_changed(empty_postgres_url: str) -> None:
    """Opening a client on an empty PostgreSQL names the upgrade command and creates nothing."""
    with pytest.raises(SchemaOutOfDate, match="incidentkit db upgrade") as caught:
        await IncidentClient.open(empty_postgres_url).connect()
    assert caught.value.command == "incidentkit db upgrade"
    assert await _inspected(empty_postgres_url, lambda c: inspect(c).get_table_names()) == []


async def test_sqlite_upgrades_itself(sqlite_url: str) -> None:
    """Opening a client on an older SQLite file brings it up to date."""
    await migrate.upgrade(sqlite_url, REVISIONS[1])
    async with IncidentClient.open(sqlite_url):
        assert await migrate.current(sqlite_url) == SCHEMA_REVISION


async def test_an_unknown_revision_is_a_typed_error(empty_url: str) -> None:
    """A revision that does not exist is refused and changes nothing."""
    for revision in ("nonsense", "", "@", "head+1", "-1"):
        with pytest.raises(InvalidSettings, match="revision"):
            await migrate.upgrade(empty_url, revision)
    assert await migrate.current(empty_url) is None
    await migrate.upgrade(empty_url, REVISIONS[1])
    for revision in (REVISIONS[2], "+1", "head"):
        with pytest.raises(InvalidSettings, match="revision cannot be reached"):
            await migrate.downgrade(empty_url, revision)
    await migrate.upgrade(empty_url, "base")
    assert await migrate.current(empty_url) == REVISIONS[1]


@pytest.mark.parametrize(
    ("target", "at", "number"),
    [
        ("head", 0, len(REVISIONS)),
        ("heads", 2, len(REVISIONS)),
        ("base", 4, 0),
        (REVISIONS[2], 0, 3),
        (REVISIONS[2][:3], 0, 3),
        ("+1", 2, 3),
        ("-2", 2, 0),
        ("head-1", 0, len(REVISIONS) - 1),
        ("base+2", 4, 2),
        (f"{REVISIONS[2]}-1", 0, 2),
    ],
)
def test_a_target_may_be_relative(target: str, at: int, number: int) -> None:
    """A revision, the beginning of one, `head` and `base` are targets, with or without steps."""
    assert migrations_to(target, at) == number


@pytest.mark.parametrize(
    "target",
    [
        "",
        "@",
        "nonsense",
        "heads@base",
        "head+1",
        "-3",
        f"+{len(REVISIONS)}",
        "base-1",
        " head",
        "9b3f6d20c7e8x",
    ],
)
def test_other_targets_are_refused(target: str) -> None:
    """Anything else is not a revision, whatever Alembic makes of it."""
    with pytest.raises(InvalidSettings, match="revision"):
        migrations_to(target, 2)


def test_revisions_are_recorded_as_alembic_records_them(empty_url: str) -> None:
    """The version table is the one that Alembic's own command creates."""

    def version_table(connection: Connection) -> tuple[str, ...]:
        found = inspect(connection)
        columns = [{**column, "type": str(column["type"])} for column in found.get_columns(table)]
        rows = connection.execute(text(f"SELECT * FROM {table}")).all()
        return str(columns), str(found.get_pk_constraint(table)), str(rows)

    def drop(connection: Connection) -> None:
        connection.execute(text(f"DROP TABLE {table}"))
        connection.commit()

    table = VERSION_TABLE
    assert _alembic(empty_url, "upgrade", "head").returncode == 0
    by_alembic = asyncio.run(_inspected(empty_url, version_table))
    asyncio.run(migrate.downgrade(empty_url, "base"))
    asyncio.run(_inspected(empty_url, drop))
    asyncio.run(migrate.upgrade(empty_url))
    assert asyncio.run(_inspected(empty_url, version_table)) == by_alembic


async def test_no_server_is_a_typed_error() -> None:
    """An unreachable PostgreSQL raises StoreUnavailable, without the password in its message."""
    with pytest.raises(StoreUnavailable) as caught:
        await migrate.upgrade("postgresql://somebody:secret@127.0.0.1:1/nowhere")
    assert "secret" not in str(caught.value)


async def test_concurrent_upgrades_of_tasks_are_safe(empty_url: str) -> None:
    """Many tasks may upgrade the same database at once."""
    await asyncio.gather(*(migrate.upgrade(empty_url) for _ in range(5)))
    await migrate.check(empty_url)


def test_concurrent_upgrades_of_threads_are_safe(empty_url: str) -> None:
    """Many threads, each with its own loop, may upgrade the same database at once."""
    failures: list[BaseException] = []

    def upgrade() -> None:
        try:
            asyncio.run(migrate.upgrade(empty_url))
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=upgrade) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    asyncio.run(migrate.check(empty_url))


def test_concurrent_upgrades_of_processes_are_safe(empty_url: str) -> None:
    """Many processes may upgrade and open the same database at once."""
    program = (
        "import asyncio, sys\n"
        "from incidentkit import IncidentClient\n"
        "from incidentkit.store.migrate import upgrade\n"
        "async def main():\n"
        "    await upgrade(sys.argv[1])\n"
        "    async with IncidentClient.open(sys.argv[1]) as incidents:\n"
        "        await incidents.create('From a process', source='operator')\n"
        "asyncio.run(main())\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, empty_url],
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for _ in range(4)
    ]
    outcomes = [(process.communicate()[1].decode(), process.returncode) for process in processes]
    assert [code for _, code in outcomes] == [0, 0, 0, 0], outcomes

    async def count() -> int:
        async with IncidentClient.open(empty_url) as incidents:
            return len(await incidents.list())

    assert asyncio.run(count()) == 4


async def test_a_migration_of_sqlite_locks_the_file_from_its_start(
    sqlite_url: str, tmp_path: Path
) -> None:
    """A migration locks the file against other writers before it reads anything."""
    await migrate.upgrade(sqlite_url)

    def write_beside(connection: Connection) -> None:
        other = sqlite3.connect(tmp_path / "incidents.db", timeout=0, isolation_level=None)
        with connection.begin(), pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        other.close()

    await migrate.run(sqlite_url, write_beside)


async def test_a_cancelled_migration_of_sqlite_leaves_the_next_one_alone(
    sqlite_url: str, tmp_path: Path
) -> None:
    """A caller can stop waiting for a locked file, and the next migration of it succeeds."""
    holder = sqlite3.connect(tmp_path / "incidents.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(migrate.upgrade(sqlite_url), 0.1)
    following = asyncio.create_task(migrate.upgrade(sqlite_url))
    await asyncio.sleep(0)
    holder.execute("COMMIT")
    holder.close()
    await following
    assert await migrate.current(sqlite_url) == SCHEMA_REVISION


async def test_a_file_is_migrated_without_aiosqlite(sqlite_url: str) -> None:
    """SQLite needs no asynchronous driver, except for a host's own engine."""
    program = f"""
import asyncio, sys
sys.modules["aiosqlite"] = None
from incidentkit import IncidentClient
from incidentkit.store import migrate

async def main():
    async with IncidentClient.open({sqlite_url!r}) as incidents:
        await incidents.create("Disk is full", source="monitoring")
    await migrate.downgrade({sqlite_url!r})
    await migrate.upgrade({sqlite_url!r})

asyncio.run(main())
"""
    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", program], check=True)


async def test_a_failed_upgrade_leaves_nothing_behind(empty_url: str) -> None:
    """A failed upgrade is rolled back completely, on either database."""
    await migrate.upgrade(empty_url, REVISIONS[0])
    engine = create_async_engine(sqlalchemy_url(empty_url))
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE request_log (color VARCHAR(9))"))
    await engine.dispose()
    before = await _inspected(empty_url, _incident_columns)
    with pytest.raises(StoreError):
        await migrate.upgrade(empty_url)
    assert await migrate.current(empty_url) == REVISIONS[0]
    assert await _inspected(empty_url, _incident_columns) == before


async def test_a_hosts_own_alembic_history_is_left_alone(empty_url: str) -> None:
    """A host's `alembic_version` stays as it is, and its autogenerate does not see our tables."""
    engine = create_async_engine(sqlalchemy_url(empty_url))
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32))"))
        await connection.execute(text("INSERT INTO alembic_version VALUES ('0123456789ab')"))
        await connection.execute(text("CREATE TABLE customer (name VARCHAR(9))"))
    await engine.dispose()
    await migrate.upgrade(empty_url)

    def hosts_differences(connection: Connection) -> list[str]:
        host = MetaData()
        context = MigrationContext.configure(
            connection, opts={"include_name": keep_out_of_autogenerate}
        )
        return [f"{kind} {table.name}" for kind, table in compare_metadata(context, host)]

    assert await _inspected(empty_url, hosts_differences) == ["remove_table customer"]

    def host_revision(connection: Connection) -> str:
        return str(connection.scalar(text("SELECT version_num FROM alembic_version")))

    assert await _inspected(empty_url, host_revision) == "0123456789ab"
    await migrate.downgrade(empty_url, "base")
    assert await _inspected(empty_url, host_revision) == "0123456789ab"


@pytest.mark.unmeasured
@pytest.mark.parametrize(
    "arguments",
    [["upgrade", "head"], ["downgrade", "-1"], ["current"], ["check"]],
)
def test_alembics_own_command_line_works(empty_url: str, arguments: list[str]) -> None:
    """Alembic's own commands work from the repository root on the configured URL."""
    asyncio.run(migrate.upgrade(empty_url))
    result = _alembic(empty_url, *arguments)
    assert result.returncode == 0, result.stderr
    expected = REVISIONS[-2] if arguments[0] == "downgrade" else SCHEMA_REVISION
    assert asyncio.run(migrate.current(empty_url)) == expected


@pytest.mark.unmeasured
def test_alembic_restores_what_is_lost(empty_url: str) -> None:
    """`alembic upgrade head` mends what `db upgrade` mends; Alembic's other commands do not."""
    asyncio.run(migrate.upgrade(empty_url))
    on_postgresql = empty_url.startswith("postgresql")
    trigger = "incident_token_change" if on_postgresql else "incident_token_insert"
    drop = f"DROP TRIGGER {trigger}" + (' ON "Incident"' if on_postgresql else "")
    asyncio.run(run_sql(empty_url, drop))
    if on_postgresql:
        cache = "ALTER SEQUENCE incident_event_event_id_seq CACHE 10"
        asyncio.run(run_sql(empty_url, cache))
    assert _alembic(empty_url, "current").returncode == 0
    with pytest.raises(SchemaOutOfDate, match=trigger):
        asyncio.run(migrate.check(empty_url))
    result = _alembic(empty_url, "upgrade", "head")
    assert result.returncode == 0, result.stderr
    assert f"Restored the trigger {trigger}." in result.stdout
    asyncio.run(migrate.check(empty_url))


def test_autogenerate_makes_an_empty_revision(empty_url: str, tmp_path: Path) -> None:
    """`alembic revision --autogenerate` on an upgraded database finds nothing to do."""
    asyncio.run(migrate.upgrade(empty_url))
    copied = tmp_path / "checkout"
    copied.mkdir()
    subprocess.run(
        ["cp", "-r", "alembic.ini", "migrations", "incidentkit", str(copied)], cwd=ROOT, check=True
    )
    result = _alembic(empty_url, "revision", "--autogenerate", "-m", "nothing new", root=copied)
    assert result.returncode == 0, result.stderr
    made = copied / "incidentkit" / "store" / "migrations" / "nothing_new.py"
    assert made.read_text().count("    pass\n") == 2


def _alembic(url: str, *arguments: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=root,
        env={**os.environ, "INCIDENTKIT_DATABASE_URL": url},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("called", [True, False])
async def test_ids_that_were_loaded_by_hand_are_passed(
    empty_postgres_url: str, *, called: bool
) -> None:
    """After rows are loaded with their ids, as from a dump, the next id is past the largest."""
    await _execute(
        empty_postgres_url,
        ORIGIN_SCHEMA,
        'INSERT INTO "Incident" (incident_id, incident_message) VALUES (1, NULL), (41, NULL)',
        f"SELECT setval('\"Incident_incident_id_seq\"', {41 if not called else 7}, {called})",
    )
    await migrate.upgrade(empty_postgres_url)
    async with IncidentClient.open(empty_postgres_url) as incidents:
        assert (await incidents.create("A new one", source="operator")).incident_id == 42


@pytest.mark.parametrize(
    "parted",
    [
        'ALTER SEQUENCE "Incident_incident_id_seq" OWNED BY NONE',
        (
            'ALTER SEQUENCE "Incident_incident_id_seq" OWNED BY NONE; '
            'ALTER TABLE "Incident" ALTER incident_id DROP DEFAULT; '
            'DROP SEQUENCE "Incident_incident_id_seq"'
        ),
        (
            'ALTER TABLE "Incident" ALTER incident_id DROP DEFAULT; '
            'DROP SEQUENCE "Incident_incident_id_seq"; '
            'ALTER TABLE "Incident" ALTER incident_id ADD GENERATED BY DEFAULT AS IDENTITY'
        ),
        # Owned but not the default; neither owned nor the default; a sequence that starts at 0.
        'ALTER TABLE "Incident" ALTER incident_id DROP DEFAULT',
        (
            'ALTER TABLE "Incident" ALTER incident_id DROP DEFAULT; '
            'ALTER SEQUENCE "Incident_incident_id_seq" OWNED BY NONE'
        ),
        'ALTER SEQUENCE "Incident_incident_id_seq" MINVALUE 0 START 0 RESTART',
        # A name that needs quoting; a sequence that another column owns.
        """ALTER SEQUENCE "Incident_incident_id_seq" RENAME TO "an 'Id'";
        ALTER SEQUENCE "an 'Id'" OWNED BY NONE""",
        (
            "CREATE TABLE host (id serial); "
            "ALTER TABLE \"Incident\" ALTER incident_id SET DEFAULT nextval('host_id_seq')"
        ),
    ],
)
async def test_a_column_parted_from_its_sequence_is_mended(
    empty_postgres_url: str, parted: str
) -> None:
    """An upgrade repairs a column whose sequence is detached, missing, foreign or an identity."""
    await _execute(empty_postgres_url, ORIGIN_SCHEMA, parted)
    await migrate.upgrade(empty_postgres_url)
    async with IncidentClient.open(empty_postgres_url) as incidents:
        assert (await incidents.create("The first", source="operator")).incident_id == 1
    await migrate.downgrade(empty_postgres_url, REVISIONS[0])
    await migrate.upgrade(empty_postgres_url)


async def test_replaced_ids_were_never_assigned_before(empty_postgres_url: str) -> None:
    """An id below 1 is replaced by one past all ids ever assigned, on an identity column too."""
    await _execute(
        empty_postgres_url,
        ORIGIN_SCHEMA,
        'ALTER TABLE "Incident" ALTER incident_id DROP DEFAULT',
        'DROP SEQUENCE "Incident_incident_id_seq"',
        'ALTER TABLE "Incident" ALTER incident_id ADD GENERATED ALWAYS AS IDENTITY',
        'INSERT INTO "Incident" (incident_message) VALUES (NULL), (NULL), (NULL)',
        'DELETE FROM "Incident" WHERE incident_id > 1',
        'INSERT INTO "Incident" (incident_id) OVERRIDING SYSTEM VALUE VALUES (0)',
    )
    await migrate.upgrade(empty_postgres_url)
    ids = await _fetch(empty_postgres_url, 'SELECT incident_id FROM "Incident" ORDER BY 1')
    assert ids == [(1,), (4,)]


async def test_impossible_times_and_ids_are_replaced(empty_postgres_url: str) -> None:
    """Times that Python cannot represent count as unknown, and ids below 1 are replaced."""
    await _execute(
        empty_postgres_url,
        ORIGIN_SCHEMA,
        'ALTER TABLE "Incident" ALTER created_at SET NOT NULL',
        'INSERT INTO "Incident" (incident_id, incident_message, created_at) VALUES '
        "(-5, 'Negative', '2025-01-01 10:00:00+00'), (0, 'Zero', 'infinity'), "
        "(1, 'Before Christ', '0044-03-15 12:00:00+00 BC'), "
        "(2, 'Far', '12025-01-01 00:00:00+00'), (3, 'Never', '-infinity')",
    )
    await migrate.upgrade(empty_postgres_url)
    async with IncidentClient.open(empty_postgres_url) as incidents:
        rows = {row.incident_message: row for row in await incidents.list()}
        assert sorted(row.incident_id for row in rows.values()) == [1, 2, 3, 4, 5]
        assert {rows["Negative"].incident_id, rows["Zero"].incident_id} == {4, 5}
        assert {row.created_at for row in rows.values()} == {datetime(2025, 1, 1, 10, tzinfo=UTC)}
        assert (await incidents.create("A new one", source="operator")).incident_id == 6
    with pytest.raises(asyncpg.CheckViolationError):
        await _execute(empty_postgres_url, "UPDATE \"Incident\" SET created_at = 'infinity'")


@pytest.mark.parametrize(
    ("obstacle", "reason"),
    [
        ("ALTER TYPE incidentstatus ADD VALUE 'closed'", "incidentstatus has a label .*: closed"),
        ('CREATE VIEW seen AS SELECT * FROM "Incident"', "the view seen is in the way"),
        ("CREATE TABLE request_log (color text)", 'a table "request_log" is in the way'),
        ('CREATE SEQUENCE "ix_Incident_source"', 'a relation "ix_Incident_source" is in the way'),
    ],
)
async def test_what_is_in_the_way_of_an_upgrade_is_told(
    origin_url: str, obstacle: str, reason: str
) -> None:
    """A blocked upgrade names the obstacle and leaves the database as it was."""
    await _execute(origin_url, obstacle)
    with pytest.raises(StoreError, match=reason):
        await migrate.upgrade(origin_url)
    assert await migrate.current(origin_url) == REVISIONS[0]
    assert len(await _fetch(origin_url, 'SELECT * FROM "Incident"')) == 4


async def test_ids_that_the_origin_cannot_hold_stop_a_downgrade(migrated_postgres_url: str) -> None:
    """A downgrade is refused once an id is past 2^31, even if its row is gone."""
    await _execute(
        migrated_postgres_url, "SELECT setval('\"Incident_incident_id_seq\"', 2147483647)"
    )
    async with IncidentClient.open(migrated_postgres_url) as incidents:
        await incidents.create("Past 32 bits", source="operator")
        with pytest.raises(StoreError, match="an id past 2147483647"):
            await migrate.downgrade(migrated_postgres_url, REVISIONS[0])
    assert await _fetch(migrated_postgres_url, 'SELECT incident_id FROM "Incident"') == [(2**31,)]
    # The row is gone, but the sequence is past 2^31.
    await _execute(migrated_postgres_url, 'DELETE FROM "Incident"')
    with pytest.raises(StoreError, match="an id past 2147483647"):
        await migrate.downgrade(migrated_postgres_url, REVISIONS[0])


async def test_a_host_may_have_a_request_log_in_another_schema(empty_postgres_url: str) -> None:
    """A `request_log` table in another schema does not block an upgrade."""
    await _execute(
        empty_postgres_url,
        "CREATE TABLE public.request_log (color text)",
        "CREATE SCHEMA incidents",
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET search_path = incidents, public', "
        "current_database()); END $$",
    )
    await migrate.upgrade(empty_postgres_url)
    await migrate.check(empty_postgres_url)


async def test_an_upgrade_does_not_wait_for_ever(
    origin_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upgrade gives up, after several attempts, while another session locks the table."""
    monkeypatch.setattr(migrate, "TABLE_LOCK_TIMEOUT", 0.1)
    monkeypatch.setattr(migrate, "TABLE_LOCK_PAUSE", 0.1)
    monkeypatch.setattr(migrate, "TABLE_LOCK_ATTEMPTS", 2)
    host = await asyncpg.connect(origin_url)
    async with host.transaction():
        await host.fetch('SELECT * FROM "Incident"')
        with pytest.raises(StoreUnavailable, match="another session"):
            await migrate.upgrade(origin_url)
    await host.close()
    await migrate.upgrade(origin_url)


async def test_an_upgrade_waits_as_long_as_another_one_runs(
    origin_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While another process migrates, an upgrade waits without a limit, and can be cancelled."""
    monkeypatch.setattr(migrate, "LOCK_POLL", 0.01)
    other = await asyncpg.connect(origin_url)
    async with other.transaction():
        await other.fetch(f"SELECT pg_advisory_xact_lock({0x696E636964656E74})")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(migrate.upgrade(origin_url), 0.5)
        waiting = asyncio.create_task(migrate.upgrade(origin_url))
        await asyncio.sleep(0.5)
        assert await migrate.current(origin_url) == REVISIONS[0]
    await other.close()
    await waiting
    assert {record.message.partition(" database ")[0] for record in caplog.records} == {
        "Another process is migrating the"
    }


async def test_what_the_origin_writes_until_the_last_moment_is_taken_over(origin_url: str) -> None:
    """A row from a transaction that was open when the upgrade began is migrated too."""
    host = await asyncpg.connect(origin_url)
    async with host.transaction():
        await host.execute('INSERT INTO "Incident" (incident_message) VALUES (NULL)')
        upgrade = asyncio.create_task(migrate.upgrade(origin_url))
        waiting = (
            "SELECT FROM pg_locks JOIN pg_database AS here ON here.oid = database "
            "WHERE NOT granted AND datname = current_database()"
        )
        async with asyncio.timeout(10):
            while not await _fetch(origin_url, waiting):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    await upgrade
    await host.close()
    async with IncidentClient.open(origin_url) as incidents:
        assert (await incidents.get(5)).incident_message == "(no message)"


async def test_a_broken_url_shows_no_password() -> None:
    """The traceback for a malformed URL does not show its password."""
    secret = "s3{}et".format("cr")
    with pytest.raises(InvalidSettings) as caught:
        await migrate.upgrade(f"postgresql://user:{secret}/x@127.0.0.1/db")
    assert secret not in "".join(traceback.format_exception(caught.value))

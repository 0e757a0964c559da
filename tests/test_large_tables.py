"""Upgrades of large tables: how long other programs wait, and what a kill leaves behind.

The ordinary run checks which locks are held. `nox -s large` fills a million rows and also measures.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from alembic import op
from sqlalchemy import Engine, event

from incidentkit import IncidentClient, SchemaOutOfDate, StoreError
from incidentkit.store import indexes, mending, migrate
from incidentkit.store.schema import REVISIONS, SCHEMA_REVISION
from incidentkit.store.sqlite import words as sqlite
from tests.test_migrations import ORIGIN_SCHEMA, ROOT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.unmeasured

ROWS = int(os.environ.get("INCIDENTKIT_TEST_ROWS", "5000"))

PATIENCE = max(60, ROWS / 2000)
"""Seconds to wait for a step of an upgrade."""

MAX_BLOCK = 10.0
"""Seconds for which a reader or a writer may wait, with a million rows."""

FILL = """
INSERT INTO "Incident" (incident_message, incident_type, source, created_at)
SELECT
    format('Disk is full on db-%s: %s', n, md5(n::text)),
    (ARRAY['new', 'completed', 'completed', 'failed'])[1 + n % 4]::incidentstatus,
    (ARRAY['operator', 'monitoring', 'partner'])[1 + n % 3]::incidentsource,
    timestamptz '2024-01-01' + n * interval '13 seconds'
FROM generate_series(1, $1::int) AS n
"""
FILL_FILE = """
WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < ?)
INSERT INTO "Incident" (incident_message, incident_type, source, created_at)
SELECT
    'Disk is full on db-' || n || ': ' || hex(randomblob(16)),
    CASE n % 4 WHEN 0 THEN 'new' WHEN 1 THEN 'failed' ELSE 'completed' END,
    CASE n % 3 WHEN 0 THEN 'operator' WHEN 1 THEN 'monitoring' ELSE 'partner' END,
    datetime(1704067200 + 13 * n, 'unixepoch')
FROM numbers
"""
READ = 'SELECT * FROM "Incident" ORDER BY incident_id DESC LIMIT 1'
WRITE = (
    'INSERT INTO "Incident" (incident_message, incident_type, source, created_at) '
    "VALUES ('Written meanwhile', 'new', 'partner', CURRENT_TIMESTAMP)"
)

INDEXES = {
    "ix_Incident_created_at",
    "ix_Incident_incident_type",
    "ix_Incident_source",
    "ix_Incident_incident_type_source",
    "ix_Incident_ended_at",
    "ix_Incident_dedup_key",
    "ix_Incident_incident_message",
}
SELECT_INDEXES = (
    "SELECT c.relname, i.indisvalid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid "
    """WHERE i.indrelid = '"Incident"'::regclass AND c.relname LIKE 'ix%'"""
)
SELECT_LOCKS = (
    """SELECT DISTINCT mode FROM pg_locks WHERE relation = '"Incident"'::regclass """
    "AND pid <> pg_backend_pid()"
)
WAITING_BUILD = (
    "SELECT pid FROM pg_stat_progress_create_index "
    "WHERE datname = current_database() AND phase = 'waiting for old snapshots'"
)
WAITING_FOR_TABLE = (
    """SELECT 1 FROM pg_locks WHERE relation = '"Incident"'::regclass AND NOT granted"""
)
PAUSED = (
    "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
)
PAUSE = """
CREATE FUNCTION pause() RETURNS event_trigger LANGUAGE plpgsql
AS 'BEGIN PERFORM pg_sleep(600); END';
CREATE EVENT TRIGGER pause ON ddl_command_end WHEN TAG IN ('CREATE FUNCTION')
EXECUTE FUNCTION pause()
"""

BEFORE_INDEXES = REVISIONS[REVISIONS.index("a61c08d5e372") - 1]
"""The revision of a database whose indexes are being built."""

COMMANDS = {
    "incidentkit": ["-m", "incidentkit", "db", "upgrade"],
    "alembic": ["-m", "alembic", "upgrade", "head"],
}


@pytest.fixture
async def large_url(empty_postgres_url: str) -> str:
    """The URL of a database of the origin with many incidents."""
    async with connected(empty_postgres_url) as connection:
        await connection.execute(ORIGIN_SCHEMA)
        await connection.execute(FILL, ROWS)
    return empty_postgres_url


@pytest.fixture
async def large_file(sqlite_url: str, tmp_path: Path) -> Path:
    """An SQLite file of the first revision with many incidents."""
    await migrate.upgrade(sqlite_url, REVISIONS[0])
    file = tmp_path / "incidents.db"
    # As a client does that opens it.
    run_on_file(file, "PRAGMA journal_mode = WAL")
    run_on_file(file, FILL_FILE, ROWS)
    return file


@pytest.fixture(params=COMMANDS)
def command(request: pytest.FixtureRequest) -> list[str]:
    """A command that upgrades a database."""
    return COMMANDS[request.param]


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Any]:
    """Connect to PostgreSQL."""
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def old_snapshot(url: str) -> AsyncIterator[Any]:
    """Hold a snapshot, for which every concurrent build of an index waits."""
    async with connected(url) as connection:
        await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
        yield connection


@contextmanager
def running(command: list[str], url: str) -> Iterator[subprocess.Popen[str]]:
    """Run a command that upgrades a database, and kill it at the end."""
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "INCIDENTKIT_DATABASE_URL": url},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


async def result(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return a command's exit code and what it has written to stderr, once it has ended."""
    _, err = await asyncio.to_thread(process.communicate)
    return process.returncode, err


async def until(connection: Any, statement: str) -> Any:
    """Return the first value of a statement, once it returns a row."""
    async with asyncio.timeout(PATIENCE):
        while not (value := await connection.fetchval(statement)):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        return value


async def until_logged(caplog: pytest.LogCaptureFixture, pattern: str, times: int = 1) -> None:
    """Wait until a pattern is logged."""

    def logged() -> int:
        return sum(bool(re.search(pattern, line)) for line in caplog.messages)

    async with asyncio.timeout(PATIENCE):
        while logged() < times:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def run_on_file(file: Path, statement: str, *values: object) -> None:
    """Run a statement on an SQLite file."""
    connection = sqlite3.connect(file)
    with connection:
        connection.execute(statement, values)
    connection.close()


async def check_upgraded(url: str, rows: int) -> None:
    """Assert that a database is at the newest revision, with all its rows and indexes."""
    async with connected(url) as connection:
        found = {tuple(row) for row in await connection.fetch(SELECT_INDEXES)}
        assert found == {(name, True) for name in INDEXES}
        without_end = """SELECT FROM "Incident" WHERE incident_type <> 'new' AND ended_at IS NULL"""
        assert await connection.fetch(without_end) == []
    await migrate.check(url)
    async with IncidentClient.open(url) as client:
        assert (await client.search(total=True)).total == rows
        assert (await client.search(text="db-7", limit=1)).incidents


async def test_others_go_on_while_indexes_are_built(large_url: str, command: list[str]) -> None:
    """Indexes are built under a lock that stops no reader or writer; late upgrades wait, too."""
    async with connected(large_url) as other, old_snapshot(large_url) as old:
        with running(command, large_url) as first:
            await until(other, WAITING_BUILD)
            modes = {row["mode"] for row in await other.fetch(SELECT_LOCKS)}
            assert modes == {"ShareUpdateExclusiveLock"}
            assert await migrate.current(large_url) == BEFORE_INDEXES
            await asyncio.wait_for(other.execute(WRITE), 5)
            await asyncio.wait_for(other.fetch(READ), 5)
            with running(command, large_url) as second, running(command, large_url) as third:
                for late in (second, third):
                    assert late.stderr is not None
                    line = ""
                    while "is migrating the database" not in line:
                        line = await asyncio.to_thread(late.stderr.readline)
                        assert line, "it has ended"
                # They wait in no statement, since a build would wait for its snapshot.
                waiting = await other.fetch("SELECT locktype FROM pg_locks WHERE NOT granted")
                assert {row["locktype"] for row in waiting} <= {"virtualxid"}
                await old.execute("COMMIT")
                for process in (first, second, third):
                    code, err = await result(process)
                    assert code == 0, err
    await check_upgraded(large_url, ROWS + 1)


@pytest.mark.parametrize("killed", ["client", "server process"])
async def test_a_kill_while_indexes_are_built_is_resumed(
    large_url: str, command: list[str], killed: str
) -> None:
    """The next upgrade waits for a build that the server continues, and repeats one that failed."""
    async with connected(large_url) as other, old_snapshot(large_url) as old:
        with running(command, large_url) as first:
            pid = await until(other, WAITING_BUILD)
            if killed == "client":
                first.kill()
            else:
                await other.execute("SELECT pg_terminate_backend($1)", pid)
                assert (await result(first))[0] == 1
        found = {tuple(row) for row in await other.fetch(SELECT_INDEXES)}
        assert found == {("ix_Incident_created_at", False)}
        await other.execute(WRITE)
        with running(command, large_url) as second:
            await until(other, WAITING_FOR_TABLE if killed == "client" else WAITING_BUILD)
            await asyncio.wait_for(other.execute(WRITE), 5)
            await asyncio.wait_for(other.fetch(READ), 5)
            await old.execute("COMMIT")
            code, err = await result(second)
            assert code == 0, err
    await check_upgraded(large_url, ROWS + 2)


async def test_a_kill_while_words_are_indexed_again_is_resumed(
    large_url: str, command: list[str]
) -> None:
    """The index by the previous rule of words is replaced while others work, also after a kill."""
    await migrate.upgrade(large_url, "a61c08d5e372")
    async with connected(large_url) as other, old_snapshot(large_url) as old:
        await other.execute(
            'CREATE INDEX "ix_Incident_incident_message" ON "Incident" '
            "USING gin (incident_words(incident_message))"
        )
        with running(command, large_url) as first:
            await until(other, WAITING_BUILD)
            modes = {row["mode"] for row in await other.fetch(SELECT_LOCKS)}
            assert modes == {"ShareUpdateExclusiveLock"}
            await asyncio.wait_for(other.execute(WRITE), 5)
            await asyncio.wait_for(other.fetch(READ), 5)
            first.kill()
        assert await migrate.current(large_url) == "a61c08d5e372"
        with running(command, large_url) as second:
            await until(other, WAITING_FOR_TABLE)
            await old.execute("COMMIT")
            code, err = await result(second)
            assert code == 0, err
    await check_upgraded(large_url, ROWS + 1)


async def test_others_go_on_while_lost_indexes_are_restored(large_url: str) -> None:
    """An upgrade at the newest revision builds lost indexes as a migration does."""
    await migrate.upgrade(large_url)
    lost = ("ix_Incident_incident_message", "ix_Incident_source", "ux_Incident_dedup_key")
    async with connected(large_url) as other, old_snapshot(large_url) as old:
        for name in lost:
            await other.execute(f'DROP INDEX "{name}"')
        upgrade = asyncio.create_task(migrate.upgrade(large_url))
        await until(other, WAITING_BUILD)
        await asyncio.wait_for(other.execute(WRITE), 5)
        await asyncio.wait_for(other.fetch(READ), 5)
        await old.execute("COMMIT")
        restored = (await upgrade).restored
    assert sorted(restored) == [f"the index {name}" for name in lost]
    await check_upgraded(large_url, ROWS + 1)


async def test_a_schema_with_rows_is_upgraded_step_by_step(empty_postgres_url: str) -> None:
    """Indexes are built in a schema of any name, beside tables of the same names."""
    url, schema = empty_postgres_url, "shop :a {1} %s"
    await migrate.upgrade(url, REVISIONS[0], schema=schema)
    async with connected(url) as host:
        await host.execute('CREATE TABLE "Incident" (color text)')
        await host.execute(f'SET search_path = "{schema}"')
        await host.execute(FILL, 100)
        for revision in REVISIONS[1:]:
            await migrate.upgrade(url, revision, schema=schema)
        found = {tuple(row) for row in await host.fetch(SELECT_INDEXES)}
        assert found == {(name, True) for name in INDEXES}
        await host.execute('DROP INDEX "ix_Incident_source", "ix_Incident_incident_message"')
        restored = (await migrate.upgrade(url, schema=schema)).restored
        assert len(restored) == 2
        for revision in reversed(REVISIONS[:-1]):
            await migrate.downgrade(url, revision, schema=schema)
        await migrate.upgrade(url, schema=schema)
        assert {tuple(row) for row in await host.fetch(SELECT_INDEXES)} == found
    await migrate.check(url, schema=schema)
    async with IncidentClient.open(url, schema=schema) as client:
        assert (await client.search(text="db-7", total=True)).total == 1
        created = await client.create("Disk is full on db-101", source="partner")
        assert await client.get(created.incident_id) == created


async def test_a_kill_while_the_table_changes_leaves_nothing_behind(
    large_url: str, command: list[str]
) -> None:
    """A kill in the transaction that changes the table leaves the table as it was."""
    async with connected(large_url) as other:
        await other.execute(PAUSE)
        with running(command, large_url) as first:
            pid = await until(other, PAUSED)
            first.kill()
        # The server goes on with the statement of a client that is gone.
        await other.execute("SELECT pg_terminate_backend($1, 10000)", pid)
        await other.execute("DROP EVENT TRIGGER pause")
        assert await migrate.current(large_url) == REVISIONS[0]
        assert len(await other.fetchrow(READ)) == 5
        with running(command, large_url) as second:
            code, err = await result(second)
            assert code == 0, err
    await check_upgraded(large_url, ROWS)


async def test_an_obstacle_to_the_indexes_is_found_first(large_url: str) -> None:
    """A name of an index that something else has stops the upgrade before it changes anything."""
    async with connected(large_url) as other:
        for name in sorted(INDEXES):
            await other.execute(f'CREATE SEQUENCE "{name}"')
            with pytest.raises(StoreError, match=f'a relation "{name}" is in the way'):
                await migrate.upgrade(large_url)
            assert await migrate.current(large_url) == REVISIONS[0]
            await other.execute(f'DROP SEQUENCE "{name}"')


async def test_others_pass_while_an_upgrade_waits_for_a_table(
    large_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While a session holds the table, the upgrade waits briefly, again and again."""
    monkeypatch.setattr(migrate, "TABLE_LOCK_TIMEOUT", 0.1)
    monkeypatch.setattr(migrate, "TABLE_LOCK_PAUSE", 0.1)
    async with connected(large_url) as host:
        await host.execute('BEGIN; SELECT 1 FROM "Incident" LIMIT 1')
        upgrade = asyncio.create_task(migrate.upgrade(large_url))
        await until_logged(caplog, "trying again", 2)
        await host.execute("COMMIT")
    await upgrade
    await migrate.check(large_url)


async def test_a_wait_for_a_table_repeats_one_step(
    large_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While the last step waits for the table, what came before is kept and not done again."""
    await migrate.upgrade(large_url, "a61c08d5e372")
    monkeypatch.setattr(migrate, "TABLE_LOCK_TIMEOUT", 0.1)
    monkeypatch.setattr(migrate, "TABLE_LOCK_PAUSE", 0.1)
    async with connected(large_url) as host:
        # No build of an index waits for a reader.
        await host.execute('BEGIN; SELECT 1 FROM "Incident" LIMIT 1')
        upgrade = asyncio.create_task(migrate.upgrade(large_url))
        await until_logged(caplog, "trying again", 2)
        assert await migrate.current(large_url) == "a6d40b7f21c8"
        await host.execute("COMMIT")
    await upgrade
    await migrate.check(large_url)


async def test_limits_of_the_account_do_not_stop_an_upgrade(large_url: str) -> None:
    """An upgrade lifts the time limits that its account has for statements and transactions."""
    async with connected(large_url) as other:
        database = await other.fetchval("SELECT current_database()")
        for name in ("statement_timeout", "idle_in_transaction_session_timeout"):
            await other.execute(f'ALTER DATABASE "{database}" SET {name} = 30')
    await migrate.upgrade(large_url)
    async with connected(large_url) as other:
        await other.execute(f'ALTER DATABASE "{database}" RESET ALL')
    await check_upgraded(large_url, ROWS)


async def test_progress_is_reported(
    large_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A long upgrade names the index that it builds, and the process that it waits for."""
    monkeypatch.setattr(migrate, "REPORT_INTERVAL", 0.05)
    caplog.set_level(logging.INFO, "incidentkit.store")
    async with old_snapshot(large_url) as old:
        upgrade = asyncio.create_task(migrate.upgrade(large_url))
        pid = await old.fetchval("SELECT pg_backend_pid()")
        waits = f"waiting for old snapshots.*transaction of the server process {pid}$"
        await until_logged(caplog, f"building the index ix_Incident_created_at: {waits}")
        await old.execute("COMMIT")
        await upgrade


class Probe(threading.Thread):
    """Runs a statement on PostgreSQL every 50 ms, and keeps the longest time that it took."""

    def __init__(self, place: str, statement: str) -> None:
        super().__init__()
        self.longest = 0.0
        self._place, self._statement = place, statement
        self._stopped = threading.Event()
        self.start()

    def run(self) -> None:
        """Run the statement until the probe is stopped."""
        asyncio.run(self._run_on_postgresql())

    async def _run_on_postgresql(self) -> None:
        async with connected(self._place) as connection:
            while not self._stopped.wait(0.05):
                began = time.monotonic()
                await connection.execute(self._statement)
                self.longest = max(self.longest, time.monotonic() - began)

    def stop(self) -> float:
        """End the probe, and return the longest time in seconds."""
        self._stopped.set()
        self.join()
        return self.longest


class FileProbe(Probe):
    """Runs a statement on an SQLite file every 50 ms, and keeps the longest time that it took."""

    def run(self) -> None:
        """Run the statement until the probe is stopped."""
        connection = sqlite3.connect(self._place, timeout=600, isolation_level=None)
        while not self._stopped.wait(0.05):
            began = time.monotonic()
            connection.execute(self._statement).fetchall()
            self.longest = max(self.longest, time.monotonic() - began)
        connection.close()


async def measure(url: str, read: Probe, write: Probe) -> None:
    """Upgrade a database, and compare the longest wait of a reader and a writer with the limit."""
    began = time.monotonic()
    try:
        await migrate.upgrade(url)
    finally:
        seconds = time.monotonic() - began
        waits = read.stop(), write.stop()
    logging.getLogger(__name__).info(
        "%s rows on %s: upgraded in %.1f s; a reader waited %.1f s at most, a writer %.1f s",
        *(ROWS, url.partition(":")[0], seconds, *waits),
    )
    assert max(waits) < MAX_BLOCK


async def test_readers_and_writers_wait_briefly(large_url: str) -> None:
    """During an upgrade of PostgreSQL, no reader and no writer waits for ten seconds."""
    await measure(large_url, Probe(large_url, READ), Probe(large_url, WRITE))


async def test_readers_and_writers_of_a_file_wait_briefly(
    sqlite_url: str, large_file: Path
) -> None:
    """During an upgrade of SQLite, no reader and no writer waits for ten seconds."""
    file = str(large_file)
    await measure(sqlite_url, FileProbe(file, READ), FileProbe(file, WRITE))


async def test_a_file_is_indexed_in_short_transactions(
    sqlite_url: str, large_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each index of a file is built in a transaction of its own; others write in between."""
    slow = ("CREATE INDEX IF NOT", "COMMIT", "INSERT INTO incident_text_filling (rowid")
    monkeypatch.setattr(mending, "STEP", 0)
    statements: list[str] = []

    def record(_: Any, __: Any, statement: str, *___: Any) -> None:
        if statement.startswith(slow):
            statements.append(statement.split(maxsplit=1)[0])

    event.listen(Engine, "before_cursor_execute", record)
    probe = FileProbe(str(large_file), WRITE)
    try:
        await migrate.upgrade(sqlite_url)
    finally:
        event.remove(Engine, "before_cursor_execute", record)
        probe.stop()
    committed, built, filled = (statements.count(step) for step in ("COMMIT", "CREATE", "INSERT"))
    assert built == 6
    assert filled >= ROWS // sqlite.BATCH
    # One before the columns are added, and one before each of these steps.
    assert committed == 1 + built + filled + 1
    step = ["COMMIT", "CREATE"]
    # The index of deduplication keys is the last.
    between = [*step * 5, *["COMMIT", "INSERT"] * filled, "COMMIT", *step]
    assert statements[1:] == between
    async with IncidentClient.open(sqlite_url) as client:
        assert (await client.search(text="db-7", limit=1)).incidents
        assert len(await client.list(limit=10, source="partner")) == 10
        written = (await client.search(text="meanwhile", total=True)).total
        assert written is not None
        assert written >= 5
        assert (await client.search(total=True)).total == ROWS + written


@pytest.mark.parametrize(
    ("step", "revision"),
    [
        ("ix_Incident_source", BEFORE_INDEXES),
        ("INSERT INTO incident_text_filling", "a61c08d5e372"),
    ],
    ids=["indexes", "words"],
)
async def test_a_kill_while_a_file_is_indexed_is_resumed(
    sqlite_url: str, large_file: Path, step: str, revision: str
) -> None:
    """After a kill between two transactions, opening the file finishes the upgrade."""
    times = 1 if "ix" in step else 5
    program = f"""
import asyncio, os, signal
from sqlalchemy import Engine, event
from incidentkit.store import mending
from incidentkit.store.migrate import upgrade

mending.STEP = 0
seen = []

@event.listens_for(Engine, "before_cursor_execute")
def kill(connection, cursor, statement, *others):
    if {step!r} in statement and "CREATE TRIGGER" not in statement:
        seen.append(statement)
        if len(seen) == {times}:
            os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(upgrade({sqlite_url!r}))
"""
    with running(["-c", program], sqlite_url) as process:
        code, _ = await result(process)
        assert code < 0
    assert await migrate.current(sqlite_url) == revision
    run_on_file(large_file, WRITE)
    run_on_file(
        large_file, 'UPDATE "Incident" SET incident_message = ? WHERE incident_id = 7', "Corrected"
    )
    run_on_file(large_file, 'DELETE FROM "Incident" WHERE incident_id = ?', 8)
    async with IncidentClient.open(sqlite_url) as client:
        assert await migrate.current(sqlite_url) == SCHEMA_REVISION
        assert (await client.search(text="db-9", limit=1)).incidents
        assert (await client.search(text="meanwhile", total=True)).total == 1
        assert (await client.search(text="corrected", total=True)).total == 1
        for changed in ("db-7", "db-8"):
            assert (await client.search(text=changed, total=True)).total == 0
        assert (await client.search(text="disk", total=True)).total == ROWS - 2
    connection = sqlite3.connect(large_file)
    rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'index'").fetchall()
    connection.close()
    assert {name for (name,) in rows} >= INDEXES - {"ix_Incident_incident_message"}


@pytest.mark.usefixtures("large_file")
async def test_several_processes_upgrade_a_file_together(sqlite_url: str) -> None:
    """Processes that continue each other's upgrade between its transactions all succeed."""
    program = f"""
import asyncio
from incidentkit.store import mending
from incidentkit.store.migrate import upgrade

mending.STEP = 0
asyncio.run(upgrade({sqlite_url!r}))
"""
    with (
        running(["-c", program], sqlite_url) as first,
        running(["-c", program], sqlite_url) as second,
    ):
        for process in (first, second):
            code, err = await result(process)
            assert code == 0, err
    await migrate.check(sqlite_url)
    async with IncidentClient.open(sqlite_url) as client:
        assert (await client.search(text="disk", total=True)).total == ROWS


WORDS_TRIGGERS = ("incident_text_insert", "incident_text_update", "incident_text_delete")


@pytest.mark.parametrize("lost", WORDS_TRIGGERS)
async def test_others_write_while_lost_words_are_restored(
    sqlite_url: str, large_file: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """An upgrade at the newest revision indexes words in short transactions, also after a kill."""
    await migrate.upgrade(sqlite_url)
    async with IncidentClient.open(sqlite_url) as client:
        run_on_file(large_file, f"DROP TRIGGER {lost}")
        for statement in (
            WRITE,
            """UPDATE "Incident" SET incident_message = 'Corrected' WHERE incident_id = 7""",
            'DELETE FROM "Incident" WHERE incident_id = 8',
        ):
            run_on_file(large_file, statement)
        monkeypatch.setattr(mending, "STEP", 0)
        monkeypatch.setattr(indexes, "GAP", 0)
        with monkeypatch.context() as patch:
            patch.setattr(mending, "start_transaction", write_and_stop(large_file))
            with pytest.raises(Killed):
                await migrate.upgrade(sqlite_url)
        # It is not complete, but has what is written meanwhile.
        with pytest.raises(SchemaOutOfDate, match="incident_text"):
            await migrate.check(sqlite_url)
        assert (await client.search(text="between", total=True)).total == 1
        indexed: list[Any] = []
        with monkeypatch.context() as patch:
            index = sqlite.index_messages

            def count(*arguments: Any, **options: Any) -> int | None:
                indexed.append(arguments)
                return index(*arguments, **options)

            patch.setattr(sqlite, "index_messages", count)
            assert set((await migrate.upgrade(sqlite_url)).restored) == {
                f"the trigger {name}" for name in WORDS_TRIGGERS
            }
        # It has gone on where the first one was.
        assert len(indexed) == ROWS // sqlite.BATCH
        await migrate.check(sqlite_url)
        for text, total in (
            *(("meanwhile", 1), ("between", 1), ("corrected", 1)),
            *(("db-7", 0), ("db-8", 0), ("disk", ROWS - 2)),
        ):
            assert (await client.search(text=text, total=True)).total == total, text


class Killed(BaseException):
    """Stands for the end of the process."""


def write_and_stop(file: Path) -> Callable[[], None]:
    """Return what takes the place of the gap between two transactions, in which a kill follows."""

    def start_transaction() -> None:
        op.execute("COMMIT")
        run_on_file(file, WRITE.replace("meanwhile", "between"))
        raise Killed

    return start_transaction


async def test_several_processes_restore_lost_words_together(
    sqlite_url: str, large_file: Path
) -> None:
    """Processes that restore the words of a file at the same time share the work."""
    await migrate.upgrade(sqlite_url)
    run_on_file(large_file, "DROP TRIGGER incident_text_insert")
    run_on_file(large_file, WRITE)
    program = f"""
import asyncio
from incidentkit.store import indexes, mending
from incidentkit.store.migrate import upgrade

mending.STEP = 0
indexes.GAP = 0.01
asyncio.run(upgrade({sqlite_url!r}))
"""
    with (
        running(["-c", program], sqlite_url) as first,
        running(["-c", program], sqlite_url) as second,
    ):
        for process in (first, second):
            code, err = await result(process)
            assert code == 0, err
    await migrate.check(sqlite_url)
    async with IncidentClient.open(sqlite_url) as client:
        assert (await client.search(text="disk", total=True)).total == ROWS
        assert (await client.search(text="meanwhile", total=True)).total == 1


async def test_an_opener_that_waits_says_so(
    sqlite_url: str, large_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that opens a file which another process migrates logs once that it waits."""

    async def open_client() -> None:
        async with IncidentClient.open(sqlite_url):
            pass

    holder = sqlite3.connect(large_file, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    opening = asyncio.create_task(open_client())
    await until_logged(caplog, "waiting for it")
    # Looking at the revision does not wait.
    assert await migrate.current(sqlite_url) == REVISIONS[0]
    holder.execute("COMMIT")
    holder.close()
    await opening
    (line,) = [line for line in caplog.messages if "waiting for it" in line]
    assert "incidents.db" in line

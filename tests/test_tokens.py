"""The token of the incidents: every committed change replaces it, from any program."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from incidentkit import IncidentClient, IncidentNotFound, ListQuery, NewIncident
from incidentkit.domain.commands import StatusChange
from incidentkit.store import StoreOptions, store_from_url
from incidentkit.store.migrate import upgrade
from tests.hosts import run_sql

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import TypeAlias

    from incidentkit.store.ports import IncidentStore

    Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

DISK_FULL = NewIncident("Disk is full", source="monitoring")

INSERT = (
    'INSERT INTO "Incident" (incident_message, incident_type, source) '
    "VALUES ('By hand', 'new', 'operator')"
)
UPDATE = "UPDATE \"Incident\" SET incident_message = 'By hand'"
DELETE = 'DELETE FROM "Incident"'
WITH_ID = (
    '"Incident" (incident_id, incident_message, incident_type, source) '
    "VALUES ({}, 'By hand', 'new', 'operator')"
)
SUBTRANSACTION = """
DO $$ BEGIN
    UPDATE "Incident" SET incident_message = 'By hand', incident_id = incident_id - 1000;
EXCEPTION WHEN check_violation THEN NULL;
END $$
"""
CONFLICT = f"INSERT INTO {WITH_ID.format(1)} ON CONFLICT (incident_id) DO "

IN_ANOTHER_PROCESS = """
import asyncio, json, sys
from incidentkit import IncidentClient

async def main():
    async with IncidentClient.open(sys.argv[1]) as client:
        for line in sys.stdin:
            if line != "\\n":
                await client.create(line.strip(), source="operator")
            incidents = await client.list()
            print(json.dumps([each.incident_message for each in incidents]), flush=True)

asyncio.run(main())
"""


@pytest.fixture
async def store(url: str) -> AsyncIterator[IncidentStore]:
    """An open store with one incident in it."""
    async with _open(url) as store:
        await store.create(DISK_FULL)
        yield store


@pytest.fixture
def postgres_url(migrated_postgres_url: str) -> str:
    """The URL of a PostgreSQL database with the schema."""
    return migrated_postgres_url


@pytest.fixture
async def postgres_store(postgres_url: str) -> AsyncIterator[IncidentStore]:
    """An open store on PostgreSQL with one incident in it."""
    async with _open(postgres_url) as store:
        await store.create(DISK_FULL)
        yield store


@pytest.fixture
async def host(postgres_url: str) -> AsyncIterator[Connection]:
    """A host's own connection to PostgreSQL."""
    async with _connections(postgres_url, 1) as (connection,):
        yield connection


@asynccontextmanager
async def _open(url: str) -> AsyncIterator[IncidentStore]:
    store = store_from_url(url)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def _connections(url: str, count: int) -> AsyncIterator[list[Connection]]:
    async with AsyncExitStack() as stack:
        connections = []
        for _ in range(count):
            connection = await asyncpg.connect(url, command_timeout=30)
            stack.push_async_callback(connection.close)
            connections.append(connection)
        yield connections


async def _run_script(connection: Connection, *statements: str) -> None:
    for statement in statements:
        await connection.execute(statement)


async def _messages(client: IncidentClient) -> list[str]:
    return [incident.incident_message for incident in await client.list()]


async def test_every_write_of_a_store_replaces_the_token(store: IncidentStore) -> None:
    """Each create and each change of a status produces a new token."""
    tokens = [await store.token()]
    for _ in range(25):
        created = await store.create(DISK_FULL)
        tokens.append(await store.token())
        await store.update_status(StatusChange(created.incident_id, "failed"))
        tokens.append(await store.token())
    assert None not in tokens
    assert len(set(tokens)) == 51


@pytest.mark.parametrize(
    "statement",
    [
        INSERT,
        UPDATE,
        f"{UPDATE} WHERE incident_id = 1",
        'UPDATE "Incident" SET incident_message = incident_message',
        DELETE,
        f"{DELETE} WHERE incident_id = 1",
        f"{CONFLICT} UPDATE SET incident_message = 'By hand'",
    ],
)
async def test_sql_of_others_replaces_the_token(
    store: IncidentStore, url: str, statement: str
) -> None:
    """A statement committed by another program replaces the token."""
    before = await store.token()
    await run_sql(url, statement)
    assert await store.token() not in (None, before)


@pytest.mark.parametrize(
    "statement",
    [
        f"INSERT OR IGNORE INTO {WITH_ID.format(2)}",
        f"INSERT OR REPLACE INTO {WITH_ID.format(1)}",
        f"REPLACE INTO {WITH_ID.format(1)}",
        f"INSERT OR ABORT INTO {WITH_ID.format(2)}",
        f"INSERT OR FAIL INTO {WITH_ID.format(2)}",
        f"INSERT OR ROLLBACK INTO {WITH_ID.format(2)}",
        "UPDATE OR IGNORE \"Incident\" SET incident_message = 'By hand'",
        'UPDATE OR REPLACE "Incident" SET incident_id = 7',
    ],
)
async def test_the_conflict_clauses_of_sqlite_replace_the_token(
    sqlite_url: str, statement: str
) -> None:
    """A write with any of SQLite's conflict clauses replaces the token."""
    async with _open(sqlite_url) as store:
        await store.create(DISK_FULL)
        before = await store.token()
        await run_sql(sqlite_url, statement)
        assert await store.token() not in (None, before)


async def test_copy_and_truncate_replace_the_token(
    postgres_store: IncidentStore, host: Connection
) -> None:
    """COPY and TRUNCATE on PostgreSQL replace the token."""
    tokens = [await postgres_store.token()]
    await host.copy_records_to_table(
        "Incident",
        columns=["incident_message", "incident_type", "source"],
        records=[("By hand", "new", "operator")] * 3,
    )
    assert len((await postgres_store.list(ListQuery())).incidents) == 4
    tokens.append(await postgres_store.token())
    await host.execute('TRUNCATE "Incident"')
    assert (await postgres_store.list(ListQuery())).incidents == []
    tokens.append(await postgres_store.token())
    assert None not in tokens
    assert len(set(tokens)) == 3


async def test_what_changes_nothing_keeps_the_token(store: IncidentStore, url: str) -> None:
    """Reads, rolled-back writes and writes that match no row keep the token."""
    before = await store.token()
    await store.get(1)
    page = await store.list(ListQuery())
    assert page.token == before
    with pytest.raises(IncidentNotFound):
        await store.update_status(StatusChange(99, "failed"))
    for statement in (INSERT, UPDATE, DELETE):
        await run_sql(url, statement, commit=False)
    await run_sql(url, f"{DELETE} WHERE incident_id = 99")
    await run_sql(url, f"{CONFLICT} NOTHING")
    assert await store.token() == before
    assert await store.list(ListQuery()) == page


async def test_a_page_and_its_token_are_one_statement(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One statement reads a page with its token, even an empty page."""
    store = store_from_url(url, StoreOptions(echo=True))
    await store.open()
    caplog.set_level("INFO", logger="incidentkit.store")
    for count in range(2):
        caplog.clear()
        page = await store.list(ListQuery())
        statements = [each for each in caplog.messages if "incident_token" in each]
        assert len(statements) == 1
        assert page.token == await store.token()
        assert len(page.incidents) == count
        await store.create(DISK_FULL)
    await store.close()


async def test_a_page_has_the_token_of_its_snapshot(store: IncidentStore, url: str) -> None:
    """During concurrent writes, two pages are equal exactly when their tokens are."""
    writing = asyncio.gather(*(_write(url, 15) for _ in range(3)))
    pages = []
    while not writing.done():
        pages += await asyncio.gather(*(store.list(ListQuery(limit=1000)) for _ in range(3)))
    await writing
    pages.append(await store.list(ListQuery(limit=1000)))
    seen: dict[str | None, set[int]] = {}
    for page in pages:
        ids = {incident.incident_id for incident in page.incidents}
        assert seen.setdefault(page.token, ids) == ids
    assert None not in seen
    assert len({frozenset(ids) for ids in seen.values()}) == len(seen)


async def _write(url: str, count: int) -> None:
    async with _open(url) as store:
        for _ in range(count):
            await store.create(DISK_FULL)


@pytest.mark.parametrize("cache", [None, "redis_url", "redis_cluster_url", "redis_sentinel_url"])
async def test_the_next_list_shows_what_others_wrote(
    request: pytest.FixtureRequest, url: str, cache: str | None
) -> None:
    """With any cache, each client's next list shows a write by plain SQL."""
    redis_url = None if cache is None else request.getfixturevalue(cache)
    async with (
        IncidentClient.open(url, redis_url) as one,
        IncidentClient.open(url, redis_url) as two,
    ):
        await one.create(DISK_FULL)
        steps: list[tuple[str, list[str]]] = [
            (INSERT, ["By hand", "Disk is full"]),
            (UPDATE, ["By hand", "By hand"]),
            (f"{DELETE} WHERE incident_id = 1", ["By hand"]),
            (DELETE, []),
        ]
        expected = ["Disk is full"]
        for statement, after in steps:
            for client in (one, two, one):
                assert await _messages(client) == expected
            await run_sql(url, statement)
            expected = after
            for lists in await asyncio.gather(_messages(one), _messages(two)):
                assert lists == expected


async def test_two_clients_never_show_each_other_stale_lists(url: str) -> None:
    """Each client's next list shows the other's latest write, although both cache pages."""
    async with IncidentClient.open(url) as one, IncidentClient.open(url) as two:
        for number in range(10):
            writer, reader = (one, two) if number % 2 else (two, one)
            assert len(await reader.list()) == number
            created = await writer.create(DISK_FULL)
            assert (await reader.list())[0] == created
            changed = await writer.update_status(created.incident_id, "failed")
            assert (await reader.list())[0] == changed


async def test_two_processes_never_show_each_other_stale_lists(sqlite_url: str) -> None:
    """Each of two processes on one SQLite file lists what the other has just written."""
    async with IncidentClient.open(sqlite_url) as client:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", IN_ANOTHER_PROCESS, sqlite_url),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None
        expected: list[str] = []
        for number in range(6):
            theirs = f"Theirs {number}" if number % 2 else ""
            if theirs:
                expected.insert(0, theirs)
            else:
                expected.insert(0, f"Ours {number}")
                await client.create(f"Ours {number}", source="operator")
            stdin.write(f"{theirs}\n".encode())
            assert json.loads(await asyncio.wait_for(stdout.readline(), 60)) == expected
            assert await _messages(client) == expected
        stdin.close()
        assert await process.wait() == 0


async def test_a_token_that_is_gone_is_mended_by_writes(url: str) -> None:
    """Without the rows of the token no list is served from a cache; writes restore them."""
    async with IncidentClient.open(url) as client:
        await client.create(DISK_FULL)
        assert await _messages(client) == ["Disk is full"]
        before = await client.store.token()
        await run_sql(url, "DELETE FROM incident_token")
        assert await client.store.token() is None
        assert (await client.store.list(ListQuery())).token is None
        await run_sql(url, UPDATE)
        for _ in range(2):
            assert await _messages(client) == ["By hand"]
        if url.startswith("postgresql"):
            # Each backend restores the row of its own slot.
            await _write_from_every_slot(url)
        after = await client.store.token()
        assert after not in (None, before)
        await client.create(DISK_FULL)
        assert await client.store.token() not in (None, before, after)


async def _write_from_every_slot(url: str) -> None:
    """Write from new backends until each slot of the token was used."""
    async with AsyncExitStack() as stack:
        slots: set[int] = set()
        while len(slots) < 16:
            (connection,) = await stack.enter_async_context(_connections(url, 1))
            slots.add(connection.get_server_pid() % 16)
            await connection.execute(INSERT)


async def test_a_token_that_is_partly_gone_cannot_be_told(
    postgres_store: IncidentStore, host: Connection
) -> None:
    """If one of its rows is missing on PostgreSQL, the token is None."""
    await host.execute("DELETE FROM incident_token WHERE slot = 7")
    assert await postgres_store.token() is None


async def test_a_long_transaction_holds_up_nobody(
    postgres_store: IncidentStore, postgres_url: str, host: Connection
) -> None:
    """An open transaction with a write neither blocks other writers nor changes the token."""
    before = await postgres_store.token()
    await _run_script(host, "BEGIN", INSERT)
    assert await postgres_store.token() == before
    await _write_from_every_slot(postgres_url)
    between = await postgres_store.token()
    assert between != before
    await host.execute("COMMIT")
    assert await postgres_store.token() not in (before, between)


@pytest.mark.parametrize(
    "statements",
    [
        ("SAVEPOINT a", INSERT, "ROLLBACK TO a", INSERT),
        (INSERT, "SAVEPOINT a", INSERT, "ROLLBACK TO a"),
        (INSERT, "SAVEPOINT a", UPDATE, "RELEASE a", DELETE),
        ("SAVEPOINT a", INSERT, "SAVEPOINT b", UPDATE, "ROLLBACK TO b", "RELEASE a"),
        ("SAVEPOINT a", INSERT, "SET CONSTRAINTS ALL IMMEDIATE", "ROLLBACK TO a", INSERT),
        (INSERT, "SAVEPOINT a", "SET CONSTRAINTS ALL IMMEDIATE", "ROLLBACK TO a"),
        ("SET CONSTRAINTS ALL IMMEDIATE", INSERT, UPDATE),
        (INSERT, "SET CONSTRAINTS ALL IMMEDIATE", UPDATE),
        ("SET CONSTRAINTS ALL IMMEDIATE", "SAVEPOINT a", INSERT, "ROLLBACK TO a", INSERT),
        (INSERT, "SET CONSTRAINTS ALL IMMEDIATE", 'TRUNCATE "Incident"', INSERT),
        ("SAVEPOINT a", 'TRUNCATE "Incident"', "ROLLBACK TO a", INSERT),
        ("SET LOCAL session_replication_role = replica", INSERT),
        ("SET LOCAL session_replication_role = replica", 'TRUNCATE "Incident"'),
        (SUBTRANSACTION, INSERT),
        (INSERT, SUBTRANSACTION),
    ],
)
async def test_however_a_transaction_goes_its_commit_replaces_the_token(
    postgres_store: IncidentStore, host: Connection, statements: tuple[str, ...]
) -> None:
    """Only the commit replaces the token, regardless of savepoints, constraints and role."""
    for _ in range(2):
        before = await postgres_store.token()
        await _run_script(host, "BEGIN", *statements[:-1])
        if not any("TRUNCATE" in statement for statement in statements):
            # A truncated table is locked, its tokens are not.
            assert (await postgres_store.list(ListQuery())).token == before
        await _run_script(host, statements[-1])
        assert await postgres_store.token() == before
        await host.execute("COMMIT")
        assert await postgres_store.token() not in (None, before)


async def test_a_rolled_back_transaction_keeps_the_token(
    postgres_store: IncidentStore, host: Connection
) -> None:
    """A rollback keeps the token, even if the transaction had already replaced it."""
    before = await postgres_store.token()
    await _run_script(
        host, "BEGIN", INSERT, "SET CONSTRAINTS ALL IMMEDIATE", 'TRUNCATE "Incident"', "ROLLBACK"
    )
    assert await postgres_store.token() == before


async def test_a_prepared_transaction_replaces_the_token_when_it_commits(
    two_phase_url: str,
) -> None:
    """In a two-phase commit, the second phase replaces the token."""
    async with _open(two_phase_url) as store, _connections(two_phase_url, 1) as (host,):
        before = await store.token()
        await _run_script(host, "BEGIN", INSERT, "PREPARE TRANSACTION 'one'")
        assert await store.token() == before
        await host.execute("COMMIT PREPARED 'one'")
        assert await store.token() not in (None, before)


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
async def test_a_held_token_holds_up_no_writer(two_phase_url: str, level: str) -> None:
    """A write whose token a prepared transaction holds succeeds, and replaces the token."""
    async with _open(two_phase_url) as store, AsyncExitStack() as stack:
        slots: dict[int, Connection] = {}
        while len(slots) < 16:
            (other,) = await stack.enter_async_context(_connections(two_phase_url, 1))
            slots.setdefault(other.get_server_pid() % 16, other)
        one, two, free = (slots[slot] for slot in (0, 7, 8))
        for held in (one, two):
            await _run_script(
                held,
                "BEGIN",
                INSERT,
                f"PREPARE TRANSACTION '{held.get_server_pid()}'",
                f"SET default_transaction_isolation = '{level}'",
            )
        tokens = [await store.token()]
        for writer in (one, two, one, two, one):
            await writer.execute(INSERT)
            tokens.append(await store.token())
        # Each backend has a token more. Unless a write is SERIALIZABLE, it removes the other's.
        assert await _count_tokens(free) == (18 if level == "SERIALIZABLE" else 17)
        await free.execute(INSERT)
        tokens.append(await store.token())
        assert await _count_tokens(free) == 16
        for held in (one, two):
            await held.execute(f"COMMIT PREPARED '{held.get_server_pid()}'")
            tokens.append(await store.token())
        assert len((await store.list(ListQuery())).incidents) == 8
        assert None not in tokens
        assert len(set(tokens)) == len(tokens)


async def _count_tokens(connection: Connection) -> Any:
    return await connection.fetchval("SELECT count(*) FROM incident_token")


async def test_a_transaction_keeps_its_settings(postgres_url: str, host: Connection) -> None:
    """Replacing or adding a token leaves the settings of the host's transaction as they were."""
    async with _connections(postgres_url, 1) as (other,):
        slot = host.get_server_pid() % 16
        await _run_script(host, "SET lock_timeout = '7s'", "SET enable_seqscan = on")
        for held in (False, True):
            if held:
                lock = f"SELECT FROM incident_token WHERE slot = {slot} FOR UPDATE"
                await _run_script(other, "BEGIN", lock)
            await _run_script(host, "BEGIN", INSERT, "SET CONSTRAINTS ALL IMMEDIATE")
            assert await host.fetchval("SHOW lock_timeout") == "7s"
            assert await host.fetchval("SHOW enable_seqscan") == "on"
            await host.execute("COMMIT")
        assert await _count_tokens(host) == 17


async def test_a_lock_of_the_tokens_table_is_waited_for(
    postgres_url: str, postgres_store: IncidentStore, host: Connection
) -> None:
    """A write waits while maintenance such as VACUUM FULL locks the table of the tokens."""
    async with _connections(postgres_url, 1) as (other,):
        before = await postgres_store.token()
        await _run_script(other, "BEGIN", "LOCK TABLE incident_token")
        writing = asyncio.ensure_future(host.execute(INSERT))
        waits = (
            "SELECT count(*) FROM pg_locks WHERE relation = CAST('incident_token' AS regclass) "
            "AND waitstart < clock_timestamp() - interval '0.05 s'"
        )
        while not writing.done() and not await other.fetchval(waits):
            pass
        await other.execute("COMMIT")
        await writing
        assert await postgres_store.token() not in (None, before)


async def test_a_write_does_not_scan_the_tokens(host: Connection) -> None:
    """A write finds tokens by the index: a scan would read all versions that a snapshot keeps."""
    scans = "SELECT seq_scan FROM pg_stat_xact_user_tables WHERE relname = 'incident_token'"
    async with host.transaction():
        await _run_script(host, INSERT, "SET CONSTRAINTS ALL IMMEDIATE")
        assert await host.fetchval(scans) == 0


async def test_a_role_needs_no_rights_to_the_tokens(
    postgres_store: IncidentStore, postgres_url: str, host: Connection
) -> None:
    """A role with only insert rights replaces the token, even if it shadows the token's table."""
    role = f"writer_{host.get_server_pid()}"
    before = await postgres_store.token()
    await host.execute(f"CREATE ROLE {role}")
    try:
        async with _connections(postgres_url, 1) as (other,):
            await host.execute(f'GRANT INSERT ON "Incident" TO {role}')
            await host.execute(f"GRANT USAGE ON SEQUENCE {await _sequence(host)} TO {role}")
            await _run_script(
                other,
                f"SET ROLE {role}",
                "CREATE TEMPORARY TABLE incident_token (slot bigint PRIMARY KEY, token uuid)",
                "SET search_path = pg_temp, pg_catalog",
                INSERT.replace('"Incident"', 'public."Incident"'),
            )
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await other.execute("SELECT * FROM public.incident_token")
            assert await other.fetchval("SELECT count(*) FROM incident_token") == 0
        assert await postgres_store.token() not in (None, before)
    finally:
        await host.execute(f"DROP OWNED BY {role}")
        await host.execute(f"DROP ROLE {role}")


async def _sequence(connection: Connection) -> Any:
    return await connection.fetchval(
        """SELECT pg_get_serial_sequence('"Incident"', 'incident_id')"""
    )


@pytest.mark.parametrize("analyzed", [False, True])
@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_no_isolation_fails_for_the_tokens(
    postgres_store: IncidentStore,
    postgres_url: str,
    host: Connection,
    level: str,
    *,
    analyzed: bool,
) -> None:
    """Overlapping transactions all commit, and the next write removes their extra tokens."""
    if analyzed:
        # With statistics, another plan reads more of the table, and SERIALIZABLE tracks it all.
        await host.execute("ANALYZE incident_token")
    tokens = [await postgres_store.token()]
    async with _connections(postgres_url, 40) as others:
        for _ in range(2):
            for other in others:
                await _run_script(other, f"BEGIN ISOLATION LEVEL {level}", INSERT)
            for other in others:
                await other.execute("COMMIT")
                tokens.append(await postgres_store.token())
    assert len((await postgres_store.list(ListQuery(limit=1000))).incidents) == 81
    assert await host.fetchval("SELECT count(*) FROM incident_token") > 16
    await postgres_store.create(DISK_FULL)
    tokens.append(await postgres_store.token())
    assert await host.fetchval("SELECT count(*) FROM incident_token") == 16
    assert None not in tokens
    assert len(set(tokens)) == 82


@pytest.mark.parametrize(
    "statements",
    [
        ('TRUNCATE "Incident"', INSERT),
        ('TRUNCATE "Incident"', 'TRUNCATE "Incident"'),
        (INSERT, "SET CONSTRAINTS ALL IMMEDIATE", 'TRUNCATE "Incident"'),
    ],
)
async def test_a_snapshot_that_is_behind_can_change_the_token_twice(
    postgres_store: IncidentStore,
    postgres_url: str,
    host: Connection,
    statements: tuple[str, ...],
) -> None:
    """A transaction with an old snapshot can change the token twice before it commits."""
    await _run_script(host, "BEGIN ISOLATION LEVEL REPEATABLE READ", "SELECT 1")
    await _write_from_every_slot(postgres_url)
    before = await postgres_store.token()
    await _run_script(host, *statements, "COMMIT")
    assert await postgres_store.token() not in (None, before)


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
async def test_many_writers_at_once_all_succeed(
    postgres_store: IncidentStore, postgres_url: str, host: Connection, level: str
) -> None:
    """Forty concurrent writers neither fail nor deadlock."""
    await host.execute("ANALYZE incident_token")
    before = await postgres_store.token()
    async with _connections(postgres_url, 40) as writers:
        await asyncio.gather(*(_write_by_hand(writer, level) for writer in writers))
    assert len((await postgres_store.list(ListQuery(limit=1000))).incidents) == 401
    assert await postgres_store.token() not in (None, before)


async def _write_by_hand(connection: Connection, level: str) -> None:
    for _ in range(10):
        await _run_script(connection, f"BEGIN ISOLATION LEVEL {level}", INSERT, "COMMIT")


async def test_many_rows_replace_the_token_once(host: Connection) -> None:
    """A transaction that writes 50,000 rows writes one token."""
    written = (
        "SELECT n_tup_ins + n_tup_upd + n_tup_del FROM pg_stat_xact_user_tables "
        "WHERE relname = 'incident_token'"
    )
    many = INSERT.replace("VALUES (", "SELECT ").removesuffix(")")
    async with host.transaction():
        await host.execute(f"{many} FROM generate_series(1, 50000)")
        await host.execute(UPDATE)
        await host.execute("SET CONSTRAINTS ALL IMMEDIATE")
        assert await host.fetchval(written) == 1


async def test_each_schema_has_tokens_of_its_own(postgres_url: str, host: Connection) -> None:
    """A transaction replaces only the tokens of the schemas whose incidents it changes."""
    await host.execute("CREATE SCHEMA \"an 'odd' one\"")
    await host.execute("CREATE SCHEMA plain")
    urls = [
        f"{postgres_url}?options=-c%20search_path%3D{path}"
        for path in ("%22an%5C%20%27odd%27%5C%20one%22", "plain")
    ]
    for url in urls:
        await upgrade(url)
    one, two = (
        INSERT.replace('"Incident"', f'{schema}."Incident"')
        for schema in ("\"an 'odd' one\"", "plain")
    )
    async with _open(urls[0]) as first, _open(urls[1]) as second:
        tokens = [(await first.token(), await second.token())]
        for statements in ((one,), (two,), (one, two), (two, one), (one, two, one, two)):
            await _run_script(host, "BEGIN", *statements, "COMMIT")
            tokens.append((await first.token(), await second.token()))
    firsts, seconds = zip(*tokens, strict=True)
    assert None not in firsts + seconds
    assert [a != b for a, b in pairwise(firsts)] == [True, False, *[True] * 3]
    assert [a != b for a, b in pairwise(seconds)] == [False, *[True] * 4]

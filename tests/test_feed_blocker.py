"""What holds the change feed up on PostgreSQL, as the client and `db check` tell it."""

from __future__ import annotations

import sqlite3
from contextlib import AsyncExitStack, asynccontextmanager, closing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import asyncpg
import psycopg
import pytest
from psycopg.sql import SQL, Identifier

from incidentkit import ClientClosed, FeedBlocker, IncidentClient
from incidentkit.cli.text import held_up
from incidentkit.store import records
from tests.hosts import host_engine
from tests.test_cli import run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import TypeAlias

    Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

NUMBERED = "SELECT pg_current_xact_id()"
"""Gives a transaction a number, as its first write does."""

INSERT = (
    'INSERT INTO "Incident" (incident_message, incident_type, source) '
    "VALUES ('By hand', 'new', 'operator')"
)
CREATED = (
    "INSERT INTO incident_event (writer, transaction_id, nonce, incident_id, kind, at) SELECT 2, "
    "CAST(CAST(pg_current_xact_id() AS text) AS bigint), 1, 1, 'noted', "
    "date_trunc('second', clock_timestamp())"
)
"""Adds an event, as a change does."""

SINCE = "Warning: the change feed has been held up since "


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a transaction of any age hold the feed up."""
    monkeypatch.setattr(records, "HELD_UP_AFTER", 0.0)


@pytest.fixture
async def client(two_phase_url: str) -> AsyncIterator[IncidentClient]:
    """An open client."""
    async with IncidentClient.open(two_phase_url) as client:
        yield client


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Connection]:
    """Open a connection as another program would, named `orders`."""
    connection = await asyncpg.connect(url, server_settings={"application_name": "orders"})
    try:
        yield connection
    finally:
        await connection.close()


async def run_script(connection: Connection, *statements: str) -> None:
    """Run statements one after the other."""
    for statement in statements:
        await connection.execute(statement)


async def blocker_of(client: IncidentClient) -> FeedBlocker:
    """Return what holds the feed up."""
    blocker = await client.feed_blocker()
    assert blocker is not None
    return blocker


@pytest.mark.parametrize("way", ["url", "pool", "asyncpg", "psycopg"])
async def test_a_long_transaction_is_named(two_phase_url: str, way: str) -> None:
    """The blocker says since when, by which process, and whether a change waits for it."""
    async with AsyncExitStack() as stack:
        database: Any = two_phase_url
        if way == "pool":
            database = await stack.enter_async_context(asyncpg.create_pool(two_phase_url))
        elif way != "url":
            scheme = f"postgresql+{way}://"
            url = two_phase_url.replace("postgresql://", scheme)
            database = await stack.enter_async_context(host_engine(url))
        client = await stack.enter_async_context(IncidentClient.open(database))
        host = await stack.enter_async_context(connected(two_phase_url))
        assert await client.feed_blocker() is None
        await run_script(host, "BEGIN", NUMBERED)
        began_at = await host.fetchval(
            "SELECT xact_start FROM pg_stat_activity WHERE pid = pg_backend_pid()"
        )
        expected = FeedBlocker(
            since=began_at,
            pid=host.get_server_pid(),
            prepared=None,
            database=urlsplit(two_phase_url).path.strip("/"),
            user="postgres",
            application="orders",
            state="idle in transaction",
            waiting=False,
        )
        assert await client.feed_blocker() == expected
        assert expected.since.tzinfo is UTC
        assert expected.holder == f"process {host.get_server_pid()}"
        await client.create("Disk is full", source="monitoring")
        assert (await blocker_of(client)).waiting
        assert (await client.read_changes()).changes == []
        await host.execute("ROLLBACK")
        assert await client.feed_blocker() is None
        assert len((await client.read_changes()).changes) == 1


@pytest.mark.parametrize("statement", [NUMBERED, INSERT])
async def test_a_prepared_transaction_is_named(
    client: IncidentClient, two_phase_url: str, statement: str
) -> None:
    """The blocker has the identifier of a forgotten prepared transaction, which has no process."""
    async with connected(two_phase_url) as host:
        await run_script(host, "BEGIN", statement, "PREPARE TRANSACTION 'order 17'")
        prepared_at = await host.fetchval("SELECT prepared FROM pg_prepared_xacts")
    await client.create("Line is down", source="partner")
    database = urlsplit(two_phase_url).path.strip("/")
    blocker = await blocker_of(client)
    assert blocker == FeedBlocker(
        prepared_at, None, "order 17", database, "postgres", None, None, waiting=True
    )
    assert blocker.holder == "the prepared transaction 'order 17'"


async def test_a_transaction_in_another_database_is_named(
    client: IncidentClient, two_phase_url: str
) -> None:
    """A transaction in any database of the server holds the feed up; the blocker names it."""
    elsewhere = urlsplit(two_phase_url)._replace(path="/postgres").geturl()
    async with connected(elsewhere) as host:
        await run_script(host, "BEGIN", NUMBERED)
        await client.create("Line is down", source="partner")
        blocker = await blocker_of(client)
        assert (blocker.database, blocker.pid) == ("postgres", host.get_server_pid())
        assert blocker.waiting
        await run_script(host, "PREPARE TRANSACTION 'elsewhere'")
        try:
            blocker = await blocker_of(client)
            assert (blocker.database, blocker.prepared) == ("postgres", "elsewhere")
        finally:
            await host.execute("ROLLBACK PREPARED 'elsewhere'")


async def test_the_oldest_transaction_is_named(client: IncidentClient, two_phase_url: str) -> None:
    """Of several transactions, the blocker is the one that was the first to write."""
    async with connected(two_phase_url) as one, connected(two_phase_url) as two:
        await run_script(one, "BEGIN")
        await run_script(two, "BEGIN", NUMBERED)
        await run_script(one, NUMBERED)
        assert (await blocker_of(client)).pid == two.get_server_pid()
        await two.execute("COMMIT")
        assert (await blocker_of(client)).pid == one.get_server_pid()


async def test_a_transaction_that_only_reads_holds_nothing_up(
    client: IncidentClient, two_phase_url: str
) -> None:
    """A long snapshot, as of a dump, does not hold the feed up."""
    async with connected(two_phase_url) as host:
        await run_script(host, "BEGIN ISOLATION LEVEL REPEATABLE READ", 'TABLE "Incident"')
        await client.create("Line is down", source="partner")
        assert await client.feed_blocker() is None
        assert len((await client.read_changes()).changes) == 1


async def test_a_short_transaction_is_no_blocker(
    client: IncidentClient, two_phase_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transaction becomes a blocker only after some seconds, even if a change waits for it."""
    monkeypatch.setattr(records, "HELD_UP_AFTER", 3600.0)
    async with connected(two_phase_url) as host:
        await run_script(host, "BEGIN", NUMBERED)
        await client.create("Line is down", source="partner")
        assert await client.feed_blocker() is None


async def test_a_hidden_transaction_counts_from_the_first_change_that_waits(
    two_phase_url: str,
) -> None:
    """Without the right to see its start, it holds the feed up since a change waits for it."""
    async with connected(two_phase_url) as host, connected(two_phase_url) as other:
        role = f"reader_{host.get_server_pid()}"
        await host.execute(f"CREATE ROLE {role} LOGIN")
        await host.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
        try:
            url = two_phase_url.replace("postgres@", f"{role}@")
            async with IncidentClient.open(url) as client:
                await run_script(host, "BEGIN", NUMBERED)
                assert await client.feed_blocker() is None
                await run_script(other, CREATED, CREATED)
                first = await other.fetchval("SELECT min(at) FROM incident_event")
                blocker = await blocker_of(client)
                assert (blocker.since, blocker.pid) == (first, host.get_server_pid())
                assert (blocker.application, blocker.state) == ("orders", None)
                await host.execute("ROLLBACK")
        finally:
            await host.execute(f"DROP OWNED BY {role}")
            await host.execute(f"DROP ROLE {role}")


async def test_a_writer_on_sqlite_holds_nothing_up(sqlite_url: str) -> None:
    """On SQLite there is no blocker, even while another program writes."""
    async with IncidentClient.open(sqlite_url) as client:
        with closing(sqlite3.connect(sqlite_url.removeprefix("sqlite+aiosqlite:///"))) as other:
            other.execute("BEGIN IMMEDIATE")
            assert await client.feed_blocker() is None


async def test_a_closed_client_knows_no_blocker(memory_url: str) -> None:
    """A client that is not open raises ClientClosed."""
    with pytest.raises(ClientClosed):
        await IncidentClient.open(memory_url).feed_blocker()


# `db check`


def check(url: str) -> list[str]:
    """Run `db check`, which must succeed, and return its warnings."""
    result = run("db", "check", "--database-url", url)
    assert (result.exit_code, result.stdout) == (0, "The schema is up to date.\n")
    return result.stderr.splitlines()


def test_db_check_warns_of_a_long_transaction(two_phase_url: str) -> None:
    """`db check` names the process, and the statement that ends it; the schema is in order."""
    assert check(two_phase_url) == []
    database = urlsplit(two_phase_url).path.strip("/")
    with psycopg.connect(two_phase_url, application_name="orders") as host:
        host.execute(NUMBERED)
        (line,) = check(two_phase_url)
        pid = host.info.backend_pid
        since, rest = line.removeprefix(SINCE).split(" UTC ")
        datetime.fromisoformat(since)
        assert rest == (
            f"by process {pid} (application orders, user postgres, database {database}, state "
            f"idle in transaction), no change waits yet: end it with `SELECT "
            f"pg_terminate_backend({pid})`"
        )
        with psycopg.connect(two_phase_url) as other:
            other.execute(CREATED)
        (line,) = check(two_phase_url)
        assert ", changes wait: " in line


def test_db_check_warns_of_a_prepared_transaction(two_phase_url: str) -> None:
    """Its warning has the statements that end a prepared transaction, as one harmless line."""
    gid = "it's\n\x1b[31m"
    quoted = gid.replace("'", "''")
    with psycopg.connect(two_phase_url, autocommit=True) as host:
        for statement in ("BEGIN", NUMBERED, f"PREPARE TRANSACTION '{quoted}'"):
            host.execute(statement)
    (line,) = check(two_phase_url)
    assert line.isprintable()
    assert r"""by the prepared transaction "it's\n\x1b[31m" (user postgres""" in line
    assert line.endswith(
        r"`COMMIT PREPARED 'it''s\n\x1b[31m'` or `ROLLBACK PREPARED 'it''s\n\x1b[31m'`"
    )


def test_db_check_succeeds_without_the_right_to_look(two_phase_url: str) -> None:
    """If the feed cannot be asked, `db check` says so, and still succeeds."""
    with psycopg.connect(two_phase_url, autocommit=True) as host:
        role = f"blind_{host.info.backend_pid}"
        for statement in (
            SQL("CREATE ROLE {} LOGIN"),
            SQL("GRANT SELECT ON ALL TABLES IN SCHEMA public TO {}"),
            SQL("REVOKE SELECT ON pg_stat_activity FROM public"),
        ):
            host.execute(statement.format(Identifier(role)))
        try:
            (line,) = check(two_phase_url.replace("postgres@", f"{role}@"))
        finally:
            for statement in (SQL("DROP OWNED BY {}"), SQL("DROP ROLE {}")):
                host.execute(statement.format(Identifier(role)))
    assert line.startswith("Warning: cannot tell whether the change feed is held up: ")


def test_a_transaction_that_is_not_shown_is_told_too() -> None:
    """On a standby, neither process nor identifier is known."""
    since = datetime(2026, 1, 1, tzinfo=UTC)
    blocker = FeedBlocker(since, None, None, None, None, None, None, waiting=True)
    assert held_up(blocker) == (
        "the change feed has been held up since 2026-01-01 00:00:00 UTC by a transaction that the "
        "server does not show, changes wait: end it on the primary server"
    )

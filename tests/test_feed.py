"""How the feed waits, shares reads, and handles outages, restarts and restored databases."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy.dialects.sqlite import dialect

from incidentkit import (
    ChangePage,
    ClientClosed,
    IncidentClient,
    IncidentEvent,
    IncidentStatus,
    NewIncident,
    SchemaOutOfDate,
    StoreError,
    StoreUnavailable,
    UnknownCursor,
    acting_as,
)
from incidentkit.domain.cursor import decode_cursor, encode_cursor
from incidentkit.feed import ChangeFeed
from incidentkit.store import migrate
from incidentkit.store.postgresql.driver import compile_statement
from incidentkit.store.sql.statements import SELECT_CHANGES, SELECT_HISTORY, SELECT_LATEST_CHANGE
from tests import follower
from tests.feed import take
from tests.servers import PostgresServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


ROOT = Path(__file__).parents[1]

ROUNDS = int(os.environ.get("INCIDENTKIT_TEST_FEED_ROUNDS", "4"))
"""Number of server restarts and connection cuts; a few hundred take many minutes."""


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """Open a connection as another program would."""
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


async def until(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def some_changes(incidents: IncidentClient) -> None:
    """Make seven changes of two incidents."""
    with acting_as("alice"):
        first = await incidents.create("Disk is full", source="monitoring", dedup_key="disk")
        second = await incidents.create("Line is down", source="partner")
        await incidents.note(first.incident_id, "It is db-1")
        await incidents.update_status(second.incident_id, "failed", note="No line")
        await incidents.create("Disk is full", source="monitoring", dedup_key="disk")
        await incidents.update_status(first.incident_id, "completed")
        await incidents.update_status(second.incident_id, "new")


@pytest.fixture
async def on_a_file(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[IncidentClient]:
    """A client on SQLite that polls for other processes' changes once an hour.

    On PostgreSQL, another test's transaction may delay a change until the next poll.
    """
    monkeypatch.setattr("incidentkit.feed.POLL_INTERVAL", 3600)
    async with IncidentClient.open(sqlite_url) as client:
        yield client


async def test_a_change_wakes_who_waits(on_a_file: IncidentClient) -> None:
    """A client's own change wakes all its waiting readers at once, without a poll."""
    incidents = on_a_file
    waiting = [asyncio.ensure_future(incidents.read_changes(wait=30)) for _ in range(5)]
    await until(lambda: _is_pausing(incidents, 5))
    created = await incidents.create("Disk is full", source="monitoring")
    for page in await asyncio.gather(*waiting):
        assert [change.incident_id for change in page.changes] == [created.incident_id]


def _is_pausing(incidents: IncidentClient, readers: int) -> bool:
    feed: Any = incidents._opened().feed
    return len(feed._change._waiters) == readers


async def test_readers_at_one_place_share_a_read(
    on_a_file: IncidentClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers that wait at the same place share each read of the database."""
    incidents = on_a_file
    reads = 0
    store: Any = incidents.store
    read = store.changes

    async def counted(*arguments: Any) -> Any:
        nonlocal reads
        reads += 1
        return await read(*arguments)

    monkeypatch.setattr(store, "changes", counted)
    waiting = [asyncio.ensure_future(incidents.read_changes(wait=30)) for _ in range(20)]
    await until(lambda: _is_pausing(incidents, 20))
    before = reads
    await incidents.create("Disk is full", source="monitoring")
    await asyncio.gather(*waiting)
    assert reads - before <= 2


async def test_readers_that_come_one_by_one_look_together(
    incidents: IncidentClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers that arrived one by one share the reads of each poll."""
    monkeypatch.setattr("incidentkit.feed.POLL_INTERVAL", 3600)
    waiting = []
    for number in range(1, 21):
        waiting.append(asyncio.ensure_future(incidents.read_changes(wait=30)))
        await until(lambda number=number: _is_pausing(incidents, number))  # type: ignore[misc]
    monkeypatch.setattr("incidentkit.feed.POLL_INTERVAL", 0.02)
    store: Any = incidents.store
    feed: Any = incidents._opened().feed
    reads, looks = 0, 0
    read, wake = store.changes, feed.wake

    async def counted(*arguments: Any) -> Any:
        nonlocal reads
        reads += 1
        return await read(*arguments)

    def counted_wake() -> None:
        nonlocal looks
        looks += 1
        wake()

    monkeypatch.setattr(store, "changes", counted)
    monkeypatch.setattr(feed, "wake", counted_wake)
    wake()
    await until(lambda: looks >= 10)
    assert reads <= 2 * (looks + 2)
    for task in waiting:
        task.cancel()


async def test_closing_ends_who_waits(url: str) -> None:
    """Closing a client raises ClientClosed in waiting readers; once reopened, it reads again."""
    client = IncidentClient.open(url)
    await client.connect()
    reading = [asyncio.ensure_future(client.read_changes(wait=30)) for _ in range(3)]
    following = asyncio.ensure_future(take(client, 1))
    await until(lambda: _is_pausing(client, 4))
    await client.close()
    for task in (*reading, following):
        with pytest.raises(ClientClosed):
            await task
    with pytest.raises(ClientClosed):
        await client.read_changes()
    async with client:
        await client.create("Disk is full", source="monitoring")
        assert len(await take(client, 1)) == 1


async def test_a_reader_that_is_cancelled_leaves_the_others(incidents: IncidentClient) -> None:
    """Cancelling one reader leaves the other readers waiting."""
    gone, stays = (asyncio.ensure_future(take(incidents, 1)) for _ in range(2))
    await until(lambda: _is_pausing(incidents, 2))
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    await incidents.create("Disk is full", source="monitoring")
    assert len(await stays) == 1


async def test_errors_that_stay_end_the_feed(incidents: IncidentClient) -> None:
    """A follower raises an error that a retry cannot fix."""

    class Broken:
        async def check_order(self) -> None:
            raise SchemaOutOfDate(None, "x")

    store: Any = Broken()
    incidents._opened()._feed = ChangeFeed(store)
    with pytest.raises(SchemaOutOfDate):
        await take(incidents, 1)


async def test_an_outage_is_waited_for(
    incidents: IncidentClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A follower waits out an outage of the database and resumes where it was."""
    monkeypatch.setattr("incidentkit.client.MIN_PAUSE", 0.001)
    store: Any = incidents.store
    read, failures = store.changes, 3

    async def failing(*arguments: Any) -> Any:
        nonlocal failures
        if failures:
            failures -= 1
            raise StoreUnavailable("it is away")
        return await read(*arguments)

    await some_changes(incidents)
    monkeypatch.setattr(store, "changes", failing)
    assert len(await take(incidents, 7)) == 7
    assert failures == 0


async def test_an_outage_hides_nothing_from_who_began_with_the_latest(
    incidents: IncidentClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A follower that starts at `latest` gets a change made during an outage."""
    monkeypatch.setattr("incidentkit.client.MIN_PAUSE", 0.001)
    await some_changes(incidents)
    await take(incidents, 7)
    store: Any = incidents.store
    read, calls = store.changes, 0

    async def failing_once(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != 2:
            return await read(*arguments)
        await incidents.note(1, "during the outage")
        # Wait until the change is final and the latest one.
        while not (found := await read(*arguments)):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert len(found) == 1
        raise StoreUnavailable("it is away")

    monkeypatch.setattr(store, "changes", failing_once)
    async with asyncio.timeout(60):
        (change,) = await take(incidents, 1, "latest")
    assert change.note == "during the outage"


async def test_latest_passes_over_what_was_committed_before(migrated_postgres_url: str) -> None:
    """While a transaction is open, `latest` begins after what was committed, and misses nothing."""
    url = migrated_postgres_url
    async with IncidentClient.open(url) as incidents, connected(url) as connection:

        async def shown(change: IncidentEvent) -> str:
            return change.note or (await incidents.get(change.incident_id)).incident_message

        feed: Any = incidents._opened().feed
        for readers in (2, 4):
            host = connection.transaction()
            await host.start()
            joined = incidents.join(connection)
            await joined.create("Open before", source="partner")
            committed = await incidents.create("Committed before", source="partner")
            await incidents.note(committed.incident_id, "before")
            following = asyncio.ensure_future(take(incidents, 4, "latest"))
            page = await incidents.read_changes("latest")
            assert page.changes == []
            async with asyncio.timeout(60):
                while len(feed._starts) < readers:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await incidents.note(committed.incident_id, "after")
            await joined.create("Open after", source="partner")
            await host.commit()
            await incidents.create("Later", source="partner")
            expected = ["Open before", "Open after", "after", "Later"]

            assert [await shown(change) for change in await following] == expected
            # Page by page, with a retry of each.
            polled: list[IncidentEvent] = []
            cursor = page.next
            async with asyncio.timeout(60):
                while len(polled) < 4:
                    first = await incidents.read_changes(cursor, limit=1, wait=1)
                    again = await incidents.read_changes(cursor, limit=1, wait=1)
                    assert again.changes[: len(first.changes)] == first.changes
                    polled += again.changes
                    cursor = again.next
            assert [await shown(change) for change in polled] == expected
            # Another process does not know the start: it delivers more, and misses nothing.
            async with IncidentClient.open(url) as other:
                assert len((await other.read_changes(page.next)).changes) == 6
            assert (await incidents.read_changes(polled[-1].cursor)).changes == []


async def test_closing_ends_who_waits_for_the_database(
    incidents: IncidentClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing a client ends a follower's pause between retries with ClientClosed."""
    monkeypatch.setattr("incidentkit.client.MIN_PAUSE", 3600)
    monkeypatch.setattr("incidentkit.client.MAX_PAUSE", 3600)
    store: Any = incidents.store

    async def failing(*_: Any) -> Any:
        raise StoreUnavailable("it is away")

    monkeypatch.setattr(store, "changes", failing)
    following = asyncio.ensure_future(take(incidents, 1))
    feed: Any = incidents._opened().feed
    await until(lambda: len(feed._closed._waiters) == 1)
    await incidents.close()
    with pytest.raises(ClientClosed):
        await asyncio.wait_for(following, 60)


# Databases with another history


async def test_a_copy_of_a_file_that_went_its_own_way_refuses(
    sqlite_url: str, tmp_path: Path
) -> None:
    """A cursor is valid in each copy of a file that has its change, and refused by one without."""
    async with IncidentClient.open(sqlite_url) as incidents:
        await some_changes(incidents)
    copy = tmp_path / "copy.db"
    shutil.copyfile(tmp_path / "incidents.db", copy)
    async with (
        IncidentClient.open(sqlite_url) as original,
        IncidentClient.open(f"sqlite+aiosqlite:///{copy}") as restored,
    ):
        shared = (await take(original, 7))[3].cursor
        for client in (original, restored):
            await client.note(1, "not the same")
            assert len((await client.read_changes(shared)).changes) == 4
        (later,) = (await original.read_changes(shared)).changes[-1:]
        assert (await original.read_changes(later.cursor)).changes == []
        with pytest.raises(UnknownCursor):
            await restored.read_changes(later.cursor)
        with pytest.raises(UnknownCursor):
            await take(restored, 1, later.cursor)


async def test_a_copy_of_a_database_that_went_its_own_way_refuses(
    migrated_postgres_url: str,
) -> None:
    """On PostgreSQL too, a copied database refuses a cursor whose change it lacks."""
    async with IncidentClient.open(migrated_postgres_url) as incidents:
        await some_changes(incidents)
    url = urlsplit(migrated_postgres_url)
    name = f"incidentkit_test_{uuid4().hex}"
    async with connected(url._replace(path="/postgres").geturl()) as admin:
        await admin.execute(f'CREATE DATABASE "{name}" TEMPLATE "{url.path.strip("/")}"')
        try:
            async with (
                IncidentClient.open(migrated_postgres_url) as original,
                IncidentClient.open(url._replace(path=f"/{name}").geturl()) as copy,
            ):
                shared = (await take(original, 7))[3].cursor
                for client in (original, copy):
                    await client.note(1, "not the same")
                (later,) = await take(original, 1, (await take(original, 7))[-1].cursor)
                assert len(await take(copy, 4, shared)) == 4
                with pytest.raises(UnknownCursor):
                    await copy.read_changes(later.cursor)
        finally:
            await admin.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


async def test_a_dump_from_a_server_with_larger_numbers_is_put_in_order(
    migrated_postgres_url: str,
) -> None:
    """A dump with larger numbers is refused until `db upgrade`, which keeps order and cursors."""
    async with IncidentClient.open(migrated_postgres_url) as incidents:
        await some_changes(incidents)
        changes = await take(incidents, 7)
        async with connected(migrated_postgres_url) as connection:
            for table in ("incident_event", '"Incident"'):
                await connection.execute(
                    f"UPDATE {table} SET transaction_id = transaction_id + 1000000000000"
                )
        with pytest.raises(StoreError, match="incidentkit db upgrade"):
            await incidents.read_changes()
    with pytest.raises(StoreError, match="incidentkit db upgrade"):
        await IncidentClient.open(migrated_postgres_url).connect()
    await migrate.upgrade(migrated_postgres_url)
    async with IncidentClient.open(migrated_postgres_url) as incidents:
        await incidents.update_status(2, "completed")
        after = await take(incidents, 8)
        assert [_of(change) for change in after[:7]] == [_of(change) for change in changes]
        assert after[7].to_status == "completed"
        rest = await take(incidents, 5, changes[2].cursor)
        assert [_of(change) for change in rest] == [_of(change) for change in after[3:]]
        await migrate.upgrade(migrated_postgres_url)
        assert await take(incidents, 8) == after


async def _restore_elsewhere(url: str) -> None:
    """Make a database as if it had been restored into a server that has run for a shorter time."""
    async with connected(url) as connection, connection.transaction():
        for table in ("incident_event", "incident_purged_event", '"Incident"'):
            await connection.execute(
                f"UPDATE {table} SET transaction_id = transaction_id + 1000000000000"
            )


COPIED = r"copied from another server.*incidentkit db upgrade"


async def test_no_write_is_lost_after_a_restore_under_a_running_client(
    migrated_postgres_url: str,
) -> None:
    """After a restore, no write is acknowledged until `db upgrade`; then readers get the next."""
    url = migrated_postgres_url
    many = [NewIncident("Disk is full", "partner", dedup_key=key) for key in (None, "b")]
    async with IncidentClient.open(url) as incidents, connected(url) as connection:
        await incidents.create("Disk is full", source="partner", dedup_key="a")
        await incidents.create("Disk is full", source="partner", incident_type="failed")
        cursor = (await take(incidents, 2))[-1].cursor
        await _restore_elsewhere(url)

        def writes(verbs: Any) -> list[Any]:
            return [
                lambda: verbs.create("Line is down", source="partner"),
                lambda: verbs.create("Line is down", source="partner", dedup_key="a"),
                lambda: verbs.create("Line is down", source="partner", idempotency_key="key"),
                lambda: verbs.create_many(many),
                lambda: verbs.update_status(1, "failed"),
                lambda: verbs.update_status(2, "new"),
                lambda: verbs.note(1, "Lost"),
                # Of these, only one is still open once the writes above are made.
                lambda: verbs.resolve("a"),
                lambda: verbs.resolve_many(["b", "a"]),
            ]

        purge = lambda: incidents.purge(datetime.now(UTC) + timedelta(hours=1))  # noqa: E731
        for write in [*writes(incidents), purge, incidents.check]:
            with pytest.raises(StoreError, match=COPIED):
                await write()
        shared = [
            *(incidents.create("Line is down", source="partner") for _ in range(9)),
            *(incidents.update_status(1, "failed") for _ in range(3)),
        ]
        for outcome in await asyncio.gather(*shared, return_exceptions=True):
            assert re.search(COPIED, str(outcome))
        async with connection.transaction():
            for write in writes(incidents.join(connection)):
                with pytest.raises(StoreError, match=COPIED):
                    await write()
            # The transaction goes on.
            assert await connection.fetchval("SELECT count(*) FROM incident_event") == 2
        await migrate.upgrade(url)
        for write in writes(incidents):
            await write()
        assert len(await take(incidents, 9, cursor)) == 9
        async with connection.transaction():
            # The transaction's own events are not taken for those of another server.
            for write in writes(incidents.join(connection))[:4]:
                await write()
        assert len(await take(incidents, 13, cursor)) >= 13


@pytest.mark.parametrize("part", ["whole", "data"])
async def test_a_dump_of_another_server_is_followed_on(part: str) -> None:
    """A cursor stays valid in a dump, or an export of the data, that was loaded under a client."""
    with PostgresServer() as old, PostgresServer() as new:

        def run(program: str, *arguments: str, given: str | None = None) -> str:
            command = [str(old._programs / program), *arguments]
            done = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
            return done.stdout

        for server in (old, new):
            await migrate.upgrade(server.url)
        async with connected(old.url) as connection:
            await connection.execute(
                "DO $$ BEGIN FOR n IN 1..5000 LOOP "
                "PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$"
            )
        async with IncidentClient.open(old.url) as incidents:
            await some_changes(incidents)
            changes = await take(incidents, 7)
        async with IncidentClient.open(new.url) as running:
            assert await running.list() == []
            if part == "whole":
                async with connected(new.url) as connection:
                    await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
            options = ("--data-only",) if part == "data" else ()
            # Two tables have their rows already: that of tokens, and that of the revision.
            run("psql", "-q", new.url, given=run("pg_dump", *options, old.url))
            with pytest.raises(StoreError, match=COPIED):
                await running.create("Line is down", source="partner")
            await migrate.upgrade(new.url)
            created = await running.create("Line is down", source="partner")
            await running.note(1, "Found")
            after = await take(running, 2, changes[-1].cursor)
            assert [change.incident_id for change in after] == [created.incident_id, 1]
            again = await take(running, 9)
            assert [_of(change) for change in again[:7]] == [_of(change) for change in changes]
            assert len(await running.list()) == 3


async def test_only_events_of_the_other_server_are_moved(migrated_postgres_url: str) -> None:
    """Events that this server wrote before `db upgrade` stay after a reader's old cursor."""
    url = migrated_postgres_url
    event = """
        INSERT INTO incident_event (writer, event_id, transaction_id, nonce, incident_id, kind, at)
        SELECT 2, {}, pg_current_xact_id()::text::bigint, 1, 1, 'noted', now()
    """
    async with IncidentClient.open(url) as incidents, connected(url) as connection:
        await incidents.create("Disk is full", source="partner")
        for n in range(3):
            await incidents.note(1, f"Note {n}")
        old = await take(incidents, 4)
        await _restore_elsewhere(url)
        # As a program would that does not look: before and after the events that were restored.
        await connection.execute("UPDATE incident_event SET event_id = event_id + 100")
        await connection.execute(event.format(7))
        await connection.execute(event.format(1000))
        cursor = await connection.fetchrow(
            "SELECT transaction_id, event_id, nonce, incident_id FROM incident_event "
            "WHERE event_id = 104"
        )
        assert cursor is not None
        await migrate.upgrade(url)
        assert [_of(each)[1:] for each in await take(incidents, 4)] == [
            _of(each)[1:] for each in old
        ]
        after = await take(incidents, 2, encode_cursor(*cursor))
        assert [decode_cursor(each.cursor, 4)[1] for each in after] == [7, 1000]


async def test_an_export_of_incidents_alone_does_not_strand_the_feed(
    migrated_postgres_url: str,
) -> None:
    """Incidents from another server, without its events, are followed after `db upgrade`."""
    url = migrated_postgres_url
    async with IncidentClient.open(url) as incidents, connected(url) as connection:
        await incidents.create("Disk is full", source="partner")
        await connection.execute("TRUNCATE incident_event")
        await connection.execute(
            'UPDATE "Incident" SET transaction_id = transaction_id + 1000000000000'
        )
        await migrate.upgrade(url)
        await incidents.update_status(1, "failed")
        (change,) = await take(incidents, 1)
        assert change.to_status == "failed"


async def test_an_export_of_incidents_alone_is_noticed(migrated_postgres_url: str) -> None:
    """Until `db upgrade`, only the first change is accepted, and none is lost."""
    url = migrated_postgres_url
    async with IncidentClient.open(url) as incidents, connected(url) as connection:
        await incidents.create("Disk is full", source="partner")
        await connection.execute("TRUNCATE incident_event")
        await connection.execute(
            'UPDATE "Incident" SET transaction_id = transaction_id + 1000000000000'
        )
        await incidents.create("Line is down", source="partner")
        cursor = (await take(incidents, 1))[0].cursor
        await incidents.update_status(1, "failed")
        with pytest.raises(StoreError, match=COPIED):
            await incidents.note(2, "Lost")
        with pytest.raises(StoreError, match=COPIED):
            await incidents.read_changes()
        await migrate.upgrade(url)
        await incidents.note(2, "Found")
        changes = await take(incidents, 2, cursor)
        assert {(change.incident_id, str(change.kind)) for change in changes} == {
            (1, "status_changed"),
            (2, "noted"),
        }


async def test_an_export_without_sequences_gives_no_id_out_again(
    migrated_postgres_url: str,
) -> None:
    """After rows were copied without their sequences, `db upgrade` lets ids go on after them."""
    url = migrated_postgres_url
    async with IncidentClient.open(url) as incidents, connected(url) as connection:
        for n in range(3):
            await incidents.create(f"Disk {n} is full", source="partner", incident_type="failed")
        await incidents.purge(datetime.now(UTC) + timedelta(days=1))
        for sequence in ('"Incident_incident_id_seq"', "incident_event_event_id_seq"):
            await connection.execute(f"ALTER SEQUENCE {sequence} RESTART")
        await migrate.upgrade(url)
        new = await incidents.create("Line is down", source="partner")
        assert [str(each.kind) for each in await incidents.history(new.incident_id)] == ["created"]
        await incidents.note(new.incident_id, "Found")
        changes = await take(incidents, 5)
        assert [str(change.kind) for change in changes][-2:] == ["created", "noted"]
        # A sequence that is ahead stays.
        await connection.execute("ALTER SEQUENCE incident_event_event_id_seq RESTART 1000")
        await migrate.upgrade(url)
        assert await connection.fetchval("SELECT nextval('incident_event_event_id_seq')") == 1000


async def test_a_cursor_of_a_purged_change_stays_good(migrated_postgres_url: str) -> None:
    """A cursor at a purged change survives `db upgrade`; one with another nonce is refused."""
    async with IncidentClient.open(migrated_postgres_url) as incidents:
        await some_changes(incidents)
        await take(incidents, 7)
        seen = []
        for distance in (10**12, 10**13):
            async with connected(migrated_postgres_url) as connection:
                for table in ("incident_event", '"Incident"'):
                    await connection.execute(
                        f"UPDATE {table} SET transaction_id = transaction_id + {distance}"
                    )
                row = await connection.fetchrow(
                    "SELECT transaction_id, event_id, nonce, incident_id FROM incident_event "
                    "WHERE event_id = 3"
                )
                assert row is not None
                seen.append(encode_cursor(*row))
            await migrate.upgrade(migrated_postgres_url)
            seen.append((await take(incidents, 7))[2].cursor)
        for cursor in seen:
            assert len(await take(incidents, 4, cursor)) == 4
        await incidents.purge(datetime.now(UTC) + timedelta(hours=1))
        for cursor in seen:
            rest = await take(incidents, 3, cursor)
            assert [change.incident_id for change in rest] == [2, 2, 1]
            *place, nonce, incident_id = decode_cursor(cursor, 4)
            with pytest.raises(UnknownCursor):
                await incidents.read_changes(encode_cursor(*place, nonce + 1, incident_id))


async def test_a_purged_place_of_another_history_is_refused(
    sqlite_url: str, tmp_path: Path
) -> None:
    """A restored backup refuses the cursor of a later change, even once its incident is purged."""
    async with IncidentClient.open(sqlite_url) as incidents:
        await incidents.create("Disk is full", source="partner", incident_type="failed")
    backup = tmp_path / "backup.db"
    shutil.copyfile(tmp_path / "incidents.db", backup)
    async with IncidentClient.open(sqlite_url) as incidents:
        await incidents.note(1, "after the backup")
        last = (await take(incidents, 2))[-1].cursor
        await incidents.purge(datetime.now(UTC) + timedelta(hours=1))
        assert len(await take(incidents, 1, last)) == 1
    async with IncidentClient.open(f"sqlite+aiosqlite:///{backup}") as restored:
        await restored.purge(datetime.now(UTC) + timedelta(hours=1))
        with pytest.raises(UnknownCursor):
            await restored.read_changes(last)


async def test_a_purged_place_is_kept_for_a_month(sqlite_url: str) -> None:
    """The first purge after 30 days forgets a purged change, and its cursor is refused."""
    async with IncidentClient.open(sqlite_url) as incidents:
        await incidents.create("Disk is full", source="partner", incident_type="failed")
        (change,) = await take(incidents, 1)
        await incidents.purge(datetime.now(UTC) + timedelta(hours=1))
        path = sqlite_url.removeprefix("sqlite+aiosqlite:///")
        with closing(sqlite3.connect(path)) as file, file:
            file.execute("UPDATE incident_purged_event SET purged_at = datetime('now', '-31 days')")
        assert len(await take(incidents, 1, change.cursor)) == 1
        await incidents.purge(datetime.now(UTC))
        with pytest.raises(UnknownCursor):
            await incidents.read_changes(change.cursor)


async def test_db_upgrade_gives_up_on_locked_tables(
    migrated_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`db upgrade` stops waiting for locked tables, so that writers do not queue up behind it."""
    monkeypatch.setattr(migrate, "TABLE_LOCK_TIMEOUT", 0.05)
    monkeypatch.setattr(migrate, "TABLE_LOCK_PAUSE", 0.05)
    async with IncidentClient.open(migrated_postgres_url) as incidents:
        await some_changes(incidents)
    async with connected(migrated_postgres_url) as connection:
        await connection.execute("UPDATE incident_event SET transaction_id = 10000000000")
        async with connection.transaction():
            await connection.execute('UPDATE "Incident" SET version = version')
            with pytest.raises(StoreUnavailable):
                await asyncio.wait_for(migrate.upgrade(migrated_postgres_url), 60)


async def test_who_waits_while_numbers_are_changed_goes_on(migrated_postgres_url: str) -> None:
    """If transaction ids are lowered while a reader waits, it gets the next change, once."""
    async with IncidentClient.open(migrated_postgres_url) as incidents:
        await some_changes(incidents)
        last = (await take(incidents, 7))[-1]
        waiting = asyncio.ensure_future(incidents.read_changes(last.cursor, wait=30))
        await until(lambda: _is_pausing(incidents, 1))
        async with connected(migrated_postgres_url) as connection:
            for table in ("incident_event", '"Incident"'):
                # Below the server's own ids, so that the reader's place is ahead of the events.
                await connection.execute(f"UPDATE {table} SET transaction_id = transaction_id - 9")
        await incidents.note(1, "later")
        page = await waiting
        assert [change.note for change in page.changes] == ["later"]
        assert await incidents.read_changes(page.next) == ChangePage([], page.next)


async def test_who_waits_notices_that_the_database_was_replaced(
    migrated_postgres_url: str,
) -> None:
    """A waiting reader fails if a copy from before its cursor replaces the database."""
    url = urlsplit(migrated_postgres_url)
    name = url.path.strip("/")
    async with IncidentClient.open(migrated_postgres_url) as incidents:
        await some_changes(incidents)
    async with connected(url._replace(path="/postgres").geturl()) as admin:
        await admin.execute(f'CREATE DATABASE "{name}_old" TEMPLATE "{name}"')
        try:
            async with IncidentClient.open(migrated_postgres_url) as incidents:
                await incidents.note(1, "of this history alone")
                last = (await take(incidents, 8))[-1]
                waiting = asyncio.ensure_future(incidents.read_changes(last.cursor, wait=30))
                await until(lambda: _is_pausing(incidents, 1))
                await admin.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
                await admin.execute(f'CREATE DATABASE "{name}" TEMPLATE "{name}_old"')
                async with IncidentClient.open(migrated_postgres_url) as other:
                    await other.note(1, "of another history")
                with pytest.raises((UnknownCursor, StoreUnavailable)):
                    await waiting
                with pytest.raises(UnknownCursor):
                    await incidents.read_changes(last.cursor)
        finally:
            await admin.execute(f'DROP DATABASE IF EXISTS "{name}_old" WITH (FORCE)')


def _of(change: IncidentEvent) -> tuple[Any, ...]:
    return change.incident_id, change.kind, change.from_status, change.to_status, change.note


async def test_a_feed_and_a_history_are_read_from_their_indexes(
    migrated_postgres_url: str, sqlite_url: str
) -> None:
    """Pages of the feed and of a history are read from an index, without sorting."""
    fill = (
        "INSERT INTO incident_event (transaction_id, nonce, incident_id, kind, at, writer) "
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000) "
        "SELECT {place}, i, i % 100, 'noted', {now}, 2 FROM n"
    )
    values = {"transaction_id": 0, "event_id": 0, "incident_id": 7, "limit": 10}
    async with connected(migrated_postgres_url) as connection:
        await connection.execute(fill.format(place="i - 100000", now="now()"))
        await connection.execute("ANALYZE incident_event")
        for statement in (SELECT_CHANGES, SELECT_HISTORY, SELECT_LATEST_CHANGE):
            compiled = compile_statement(statement)
            plan = await connection.fetch(
                f"EXPLAIN {compiled.text}", *(values[name] for name in compiled.parameters)
            )
            lines = "\n".join(line for (line,) in plan)
            assert "Index Scan" in lines
            assert "Sort" not in lines
            assert "Seq Scan" not in lines
    async with IncidentClient.open(sqlite_url):
        pass
    with closing(sqlite3.connect(sqlite_url.removeprefix("sqlite+aiosqlite:///"))) as file:
        file.execute(fill.format(place="0", now="CURRENT_TIMESTAMP"))
        for statement in (SELECT_CHANGES, SELECT_HISTORY, SELECT_LATEST_CHANGE):
            clause: Any = statement
            text = clause.compile(dialect=dialect()).string
            steps = [
                row[3] for row in file.execute(f"EXPLAIN QUERY PLAN {text}", [0] * text.count("?"))
            ]
            assert len(steps) == 1, steps
            assert steps[0].startswith("SEARCH incident_event USING"), steps


# Overlapping transactions on PostgreSQL


async def test_what_an_old_transaction_commits_late_is_not_missed(
    migrated_postgres_url: str,
) -> None:
    """Changes of younger transactions wait for an older one and follow its changes."""
    async with AsyncExitStack() as stack:
        incidents = await stack.enter_async_context(IncidentClient.open(migrated_postgres_url))
        connection = await stack.enter_async_context(connected(migrated_postgres_url))
        async with connection.transaction():
            await incidents.join(connection).create("Disk is full", source="monitoring")
            await incidents.create("Line is down", source="partner")
            assert (await incidents.read_changes()).changes == []
        changes = await take(incidents, 2)
        assert [change.incident_id for change in changes] == [1, 2]


async def test_an_incidents_changes_are_in_order_whoever_began_first(
    migrated_postgres_url: str,
) -> None:
    """An incident's changes keep their order, even if an older transaction changes it last."""
    async with AsyncExitStack() as stack:
        incidents = await stack.enter_async_context(IncidentClient.open(migrated_postgres_url))
        connection = await stack.enter_async_context(connected(migrated_postgres_url))
        incident = await incidents.create("Disk is full", source="monitoring")
        async with connection.transaction():
            # The transaction gets its id here.
            await connection.fetchval("SELECT pg_current_xact_id()")
            await incidents.update_status(incident.incident_id, "failed")
            await incidents.note(incident.incident_id, "by a younger one")
            joined = incidents.join(connection)
            await joined.update_status(incident.incident_id, "completed")
            await joined.note(incident.incident_id, "by the older one")
        await incidents.update_status(incident.incident_id, "new")
        changes = await take(incidents, 6)
        assert changes == await incidents.history(incident.incident_id)
        assert [change.to_status for change in changes] == [
            "new",
            "failed",
            None,
            "completed",
            None,
            "new",
        ]


async def test_a_rollback_leaves_nothing(migrated_postgres_url: str) -> None:
    """A change that was rolled back never reaches the feed and delays nothing."""
    async with AsyncExitStack() as stack:
        incidents = await stack.enter_async_context(IncidentClient.open(migrated_postgres_url))
        connection = await stack.enter_async_context(connected(migrated_postgres_url))
        transaction = connection.transaction()
        await transaction.start()
        await incidents.join(connection).create("Disk is full", source="monitoring")
        await transaction.rollback()
        await incidents.create("Line is down", source="partner")
        (change,) = await take(incidents, 1)
        assert change.incident_id == 2


async def test_many_writers_with_restarts_and_cut_connections() -> None:
    """Every reader, even one that resumes, gets each change exactly once and in order."""
    with PostgresServer() as server:
        await migrate.upgrade(server.url)
        await _write_and_follow(server, ROUNDS)


async def _write_and_follow(server: PostgresServer, rounds: int) -> None:  # noqa: C901, PLR0915
    """Write from several clients while the server is restarted and connections are cut."""
    async with AsyncExitStack() as stack:
        writers = [
            await stack.enter_async_context(IncidentClient.open(server.url)) for _ in range(3)
        ]
        reader = await stack.enter_async_context(IncidentClient.open(server.url))
        ids = [
            (await writers[0].create("Disk is full", source="monitoring")).incident_id
            for _ in range(4)
        ]
        acknowledged: list[str] = []
        followed: list[IncidentEvent] = []
        resumed: list[IncidentEvent] = []
        stop = asyncio.Event()

        async def write(client: IncidentClient, number: int) -> None:
            count = 0
            while not stop.is_set():
                count += 1
                note = f"{number}-{count}"
                status = tuple(IncidentStatus)[count % 3]
                try:
                    await client.note(ids[count % 4], note)
                    acknowledged.append(note)
                    await client.update_status(ids[(count + number) % 4], status)
                except StoreUnavailable:
                    await asyncio.sleep(0.02)

        async def join_late(client: IncidentClient) -> None:
            while not stop.is_set():
                try:
                    async with connected(server.url) as connection, connection.transaction():
                        await connection.fetchval("SELECT pg_current_xact_id()")
                        for incident_id in ids:
                            await client.note(incident_id, f"beside {uuid4()}")
                        joined = client.join(connection)
                        await joined.note(ids[0], "late")
                except (
                    StoreUnavailable,
                    OSError,
                    asyncpg.PostgresError,
                    asyncpg.InterfaceError,
                    asyncpg.InternalClientError,
                ):
                    await asyncio.sleep(0.02)

        async def follow() -> None:
            async for change in reader.changes():
                followed.append(change)  # noqa: PERF401

        async def resume() -> None:
            while True:
                after = resumed[-1].cursor if resumed else None
                try:
                    resumed.extend((await reader.read_changes(after, limit=7, wait=1)).changes)
                except StoreUnavailable:
                    await asyncio.sleep(0.02)

        following = [asyncio.ensure_future(follow()), asyncio.ensure_future(resume())]
        writing = [
            asyncio.ensure_future(write(client, number))
            for number, client in enumerate(writers * 4)
        ]
        writing += [asyncio.ensure_future(join_late(writers[0])) for _ in range(2)]
        for number in range(rounds):
            goal = len(acknowledged) + 60
            await until(lambda goal=goal: len(acknowledged) >= goal)  # type: ignore[misc]
            if number % 2:
                server.stop()
                server.start()
                continue
            async with connected(server.url) as connection:
                await connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
                )
        stop.set()
        await asyncio.gather(*writing)
        async with connected(server.url) as connection:
            stored = await connection.fetchval("SELECT count(*) FROM incident_event")
        await until(
            lambda: (
                min(len(followed), len(resumed)) >= stored or any(task.done() for task in following)
            )
        )
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)
        assert followed == resumed
        assert len(followed) == stored
        assert len({change.cursor for change in followed}) == stored
        notes = [change.note for change in followed]
        assert set(acknowledged) <= set(notes)
        for incident_id in ids:
            own = [change for change in followed if change.incident_id == incident_id]
            history = [change async for change in _whole_history(reader, incident_id)]
            assert own == history
            statuses = [change for change in own if change.to_status is not None]
            for earlier, later in pairwise(statuses):
                assert later.from_status == earlier.to_status


def test_processes_through_restarts_and_cut_connections(tmp_path: Path) -> None:
    """Processes that follow the feed get each change once and in one order, even if killed."""
    with PostgresServer() as server, ExitStack() as stack:
        asyncio.run(migrate.upgrade(server.url))
        asyncio.run(_make(server.url, follower.INCIDENTS))

        def run(*arguments: str) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.follower", *arguments],
                cwd=ROOT,
                stdin=subprocess.PIPE,
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            return process

        logs = [tmp_path / f"writer{number}" for number in range(3)]
        feeds = [tmp_path / "steady", tmp_path / "killed"]
        writing = [run("write", server.url, str(log), log.name) for log in logs]
        following = [run("follow", server.url, str(feed)) for feed in feeds]

        def more(count: int) -> None:
            """Wait until this many more writes are acknowledged."""
            goal = len(_lines(*logs)) + count
            _wait(lambda: len(_lines(*logs)) >= goal, [*writing, following[0]])

        for number in range(ROUNDS):
            more(60)
            following[1].kill()
            following[1].wait()
            if number % 2:
                server.stop()
                server.start()
            else:
                asyncio.run(_cut_connections(server.url))
            more(20)
            following[1] = run("follow", server.url, str(feeds[1]))
        more(20)
        for process in writing:
            process.communicate(timeout=60)
            assert process.returncode == 0
        stored = asyncio.run(_count(server.url))
        _wait(lambda: all(len(_lines(feed)) >= stored for feed in feeds), following)
        steady, killed = ([json.loads(line) for line in _lines(feed)] for feed in feeds)
    assert steady == killed
    assert len(steady) == len({change["cursor"] for change in steady}) == stored
    notes = [change["note"] for change in steady]
    assert set(_lines(*logs)) <= set(notes)
    for incident_id in range(1, follower.INCIDENTS + 1):
        own = [change for change in steady if change["incident_id"] == incident_id]
        statuses = [change for change in own if change["to_status"] is not None]
        assert statuses[0]["kind"] == "created"
        for earlier, later in pairwise(statuses):
            assert later["from_status"] == earlier["to_status"]


async def _make(url: str, count: int) -> None:
    async with IncidentClient.open(url) as incidents:
        for _ in range(count):
            await incidents.create("Disk is full", source="monitoring")


async def _count(url: str) -> int:
    async with connected(url) as connection:
        return int(await connection.fetchval("SELECT count(*) FROM incident_event"))


async def _cut_connections(url: str) -> None:
    async with connected(url) as connection:
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )


def _lines(*files: Path) -> list[str]:
    """Return the complete lines of those files that exist."""
    texts = [file.read_text() if file.exists() else "" for file in files]
    return [line for text in texts for line in text.split("\n")[:-1]]


def _wait(condition: Callable[[], bool], running: list[subprocess.Popen[bytes]]) -> None:
    """Wait until the condition holds; fail if a process ends first."""
    deadline = time.monotonic() + 120
    while not condition():
        assert [process.poll() for process in running] == [None] * len(running)
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def _whole_history(
    incidents: IncidentClient, incident_id: int
) -> AsyncIterator[IncidentEvent]:
    after = None
    while events := await incidents.history(incident_id, after=after):
        for event in events:
            yield event
        after = events[-1].cursor

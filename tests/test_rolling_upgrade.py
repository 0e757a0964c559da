"""Processes of the previous version that still run after an upgrade of the schema."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from alembic import op

from benchmarks.before import check_out
from incidentkit import IncidentClient, IncidentEvent, IncidentStatus, StoreError, acting_as
from incidentkit.store import mending
from incidentkit.store.migrate import current, downgrade, upgrade
from incidentkit.store.migrations import search_words
from incidentkit.store.schema import REVISIONS
from tests.hosts import run_sql

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.unmeasured

BEFORE_WRITERS = "d27e77b1c3b3b8373dc1109931980484bd3610e0"
"""The last commit whose statements write no number."""

BEFORE_ACTORS = "453525fe4c48a72c594c086931d870bb2aeee279"
"""The last commit that keeps idempotency keys for all actors."""

BEFORE_DETAILS = "ae7470e843cb74ac810219b2eeed7d60331a5065"
"""The last commit whose incidents have no details."""

RETRIES = """
import asyncio, json, sys
from incidentkit import IncidentClient, acting_as

async def main(url):
    async with IncidentClient.open(url) as incidents:
        for line in sys.stdin:
            with acting_as("alice"):
                created = await incidents.create(
                    "Disk is full", source="partner", idempotency_key=line.strip()
                )
            print(json.dumps(created.incident_id), flush=True)

asyncio.run(main(sys.argv[1]))
"""

WORKER = """
import asyncio, json, sys
from datetime import UTC, datetime
from incidentkit import IncidentClient, IncidentKitError, NewIncident

async def find(incidents):
    found = [await incidents.search(text="disk fu", total=total) for total in (False, True)]
    assert [one.incident_id for each in found for one in each.incidents] == [2, 1, 2, 1]

async def follow(incidents):
    first = (await incidents.history(1))[0]
    changes = []
    # A transaction of another test on the server can hold changes up.
    while len(changes) < 2:
        changes = (await incidents.read_changes(first.cursor, wait=1)).changes
    assert [change.kind for change in changes] == ["created", "status_changed"]

async def main(url):
    new = NewIncident("Disk is full", source="partner")
    statuses = iter(["failed", "completed"])
    async with IncidentClient.open(url) as incidents:
        calls = {
            "create": lambda: incidents.create("Disk is full", source="partner"),
            "count": lambda: incidents.create("Disk is full", source="partner", dedup_key="disk-1"),
            "create_many": lambda: incidents.create_many([new]),
            "update_status": lambda: incidents.update_status(1, next(statuses)),
            "note": lambda: incidents.note(1, "It came back"),
            "purge": lambda: incidents.purge(ended_before=datetime(2999, 1, 1, tzinfo=UTC)),
            "get": lambda: incidents.get(1),
            "list": lambda: incidents.list(),
            "search": lambda: find(incidents),
            "history": lambda: incidents.history(1),
            "follow": lambda: asyncio.wait_for(follow(incidents), 60),
        }
        for line in sys.stdin:
            try:
                await calls[line.strip()]()
                answer = None
            except IncidentKitError as error:
                answer = str(error)
            print(json.dumps(answer), flush=True)

asyncio.run(main(sys.argv[1]))
"""

WRITES = ("create", "count", "create_many", "update_status", "note", "purge")
REFUSE_OTHERS = {
    "postgresql": [
        "ALTER TABLE incident_event DROP CONSTRAINT ck_incident_event_writer",
        (
            "ALTER TABLE incident_event ADD CONSTRAINT ck_incident_event_writer "
            "CHECK (writer = 1000) NOT VALID"
        ),
    ],
    "sqlite": [
        "DROP TRIGGER ck_incident_event_writer",
        (
            "CREATE TRIGGER ck_incident_event_writer BEFORE INSERT ON incident_event "
            "WHEN new.writer <> 1000 BEGIN SELECT RAISE(ABORT, 'ck_incident_event_writer'); END"
        ),
    ],
}
"""What a migration to a version with other statements does to the events."""

READS = ("get", "list", "search", "history")


@pytest.fixture(scope="session")
def version_before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the version before."""
    return check_out(BEFORE_WRITERS, tmp_path_factory.mktemp("before") / "checkout")


@contextmanager
def running(folder: Path, url: str, program: str = WORKER) -> Iterator[Callable[[str], Any]]:
    """Run a process of another version; the function makes one call and returns its answer."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    with subprocess.Popen(
        [sys.executable, "-c", program, url],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        sent, answers = process.stdin, process.stdout

        def call(name: str) -> Any:
            sent.write(f"{name}\n")
            sent.flush()
            return json.loads(answers.readline())

        try:
            yield call
        finally:
            sent.close()
            process.wait(timeout=60)


def upgrade_to_version(folder: Path, url: str) -> None:
    """Bring a database to the schema of another version."""
    subprocess.run(
        [sys.executable, "-m", "incidentkit", "db", "upgrade"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "INCIDENTKIT_DATABASE_URL": url},
        capture_output=True,
        check=True,
    )


@pytest.fixture(params=["sqlite_url", "empty_postgres_url"])
def url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database."""
    return str(request.getfixturevalue(request.param))


async def test_the_version_before_reads_and_no_longer_writes(
    version_before: Path, url: str
) -> None:
    """After the upgrade, an older process can still read; its writes fail and store nothing."""
    upgrade_to_version(version_before, url)
    with running(version_before, url) as call:
        assert call("count") is None
        assert call("update_status") is None
        await upgrade(url)
        async with IncidentClient.open(url) as client:
            # It keeps what the version before has written, and its cursors.
            written = await client.history(1)
            assert [event.kind for event in written] == ["created", "status_changed"]
            after = written[0].cursor
            opened = await client.create("Disk is full", source="partner", dedup_key="disk-1")
            before = await client.search(total=True), await client.history(opened.incident_id)
            for name in WRITES:
                assert "constraint" in (call(name) or ""), name
            assert (await client.search(total=True), await client.history(2)) == before
            assert [call(name) for name in READS] == [None] * len(READS)
            # A transaction of another test on the server can hold changes up.
            async with asyncio.timeout(60):
                following: list[IncidentEvent] = []
                while len(following) < 2:
                    following = (await client.read_changes(after, wait=1)).changes
            assert [event.kind for event in following] == ["status_changed", "created"]


async def test_the_version_before_comes_through_every_step(version_before: Path, url: str) -> None:
    """Every step up keeps data, cursors and older readers; every step down, older writers too."""
    upgrade_to_version(version_before, url)
    older = await current(url)
    assert older is not None
    steps = REVISIONS[REVISIONS.index(older) :]
    assert len(steps) > 1
    with running(version_before, url) as call:
        for name in ("create", "count", "update_status"):
            assert call(name) is None
        for revision in steps:
            await upgrade(url, revision)
            assert [call(name) for name in (*READS, "follow")] == [None] * 5, revision
            # Only its writes are refused.
            assert revision == older or call("create") is not None, revision
        async with IncidentClient.open(url) as client:
            page = await client.search(text='"disk" fu', total=True)
            assert [one.incident_id for one in page.incidents] == [2, 1]
            found = page.incidents, await client.history(1), await client.history(2)
            # The place of an event is a cursor for the new version as well.
            async with asyncio.timeout(60):
                changes: list[IncidentEvent] = []
                while len(changes) < 2:
                    changes = (await client.read_changes(found[1][0].cursor, wait=1)).changes
            assert [change.kind for change in changes] == ["created", "status_changed"]
        for revision in reversed(steps[:-1]):
            await downgrade(url, revision)
            assert [call(name) for name in (*READS, "follow")] == [None] * 5, revision
        assert call("note") is None
        assert call("count") is None
    await upgrade(url)
    async with IncidentClient.open(url) as client:
        assert (await client.search(total=True)).total == 2
        assert [event.kind for event in await client.history(1)][-1] == "noted"
        assert [event.kind for event in await client.history(2)][-1] == "recurred"


async def test_an_upgrade_that_was_killed_can_be_taken_back(
    version_before: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a kill while words are indexed and a downgrade, the version before searches again."""
    upgrade_to_version(version_before, url)
    older = await current(url)
    assert older is not None
    with running(version_before, url) as call:
        for name in ("create", "count", "update_status"):
            assert call(name) is None
        with monkeypatch.context() as patch:
            patch.setattr(mending, "STEP", 0)
            patch.setattr(mending, "start_transaction", commit_and_end)
            patch.setattr(search_words, "build_index", end)
            with pytest.raises(Killed):
                await upgrade(url)
        assert await current(url) == "a61c08d5e372"
        await downgrade(url, older)
        assert [call(name) for name in READS] == [None] * len(READS)
        if url.startswith("postgresql"):
            indexes = await run_sql(url, "SELECT indexdef FROM pg_indexes")
            assert any("gin (incident_words(" in index for (index,) in indexes)
        for name in ("note", "count"):
            assert call(name) is None
    await upgrade(url)
    async with IncidentClient.open(url) as client:
        page = await client.search(text="disk fu", total=True)
        assert [one.incident_id for one in page.incidents] == [2, 1]


class Killed(BaseException):
    """Stands for the end of the process."""


def end(*_: object) -> None:
    """End the process."""
    raise Killed


def commit_and_end() -> None:
    """End the process between two transactions on SQLite."""
    op.execute("COMMIT")
    raise Killed


async def test_other_writers_go_on_after_an_upgrade(version_before: Path, url: str) -> None:
    """The origin and SQL by hand can still write to the table of incidents."""
    upgrade_to_version(version_before, url)
    await upgrade(url)
    await run_sql(
        url,
        'INSERT INTO "Incident" (incident_message, incident_type, source) '
        "VALUES ('By hand', 'new', 'operator')",
    )
    await run_sql(url, "UPDATE \"Incident\" SET incident_type = 'failed'")
    async with IncidentClient.open(url) as client:
        (found,) = await client.list()
    assert (found.incident_message, found.incident_type) == ("By hand", IncidentStatus.FAILED)


async def test_a_newer_schema_names_itself(url: str) -> None:
    """A client whose schema was upgraded under it says that its process must be restarted."""
    await upgrade(url)
    async with IncidentClient.open(url) as client:
        await client.create("Disk is full", source="partner")
        for statement in REFUSE_OTHERS[url.partition("+")[0].partition(":")[0]]:
            await run_sql(url, statement)
        with pytest.raises(StoreError, match="a newer version of incidentkit has upgraded"):
            await client.create("Disk is full", source="partner")
        assert len(await client.list()) == 1


async def test_a_retry_finds_its_key_in_either_version(
    tmp_path_factory: pytest.TempPathFactory, url: str
) -> None:
    """While two versions run, a retry of an actor gets its first answer from the other one."""
    before = check_out(BEFORE_ACTORS, tmp_path_factory.mktemp("before") / "checkout")
    upgrade_to_version(before, url)
    with running(before, url, RETRIES) as retry:
        first = retry("k")
        await upgrade(url)
        async with IncidentClient.open(url) as client:
            with acting_as("alice"):
                again = await client.create("Disk is full", source="partner", idempotency_key="k")
                new = await client.create("Disk is full", source="partner", idempotency_key="l")
            assert (again.incident_id, retry("l")) == (first, new.incident_id)
            assert len(await client.list()) == 2


async def test_the_version_before_details_works_on(
    url: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Before, between and after an upgrade and a downgrade, its reads and its writes succeed."""
    before = check_out(BEFORE_DETAILS, tmp_path_factory.mktemp("before") / "checkout")
    upgrade_to_version(before, url)
    with running(before, url) as call:
        assert [call(name) for name in ("create", "count", *READS)] == [None] * 6
        await upgrade(url)
        writes = ("create", "count", "create_many", "update_status", "note")
        assert [call(name) for name in (*writes, "get", "list", "history")] == [None] * 8
        async with IncidentClient.open(url) as client:
            key: dict[str, Any] = {"source": "partner", "dedup_key": "disk-2"}
            created = await client.create("Disk is full", **key, details={"host": "db-1"})
            assert call("list") is None
            page = await client.search(details=True)
            assert [each.details for each in page.incidents] == [{"host": "db-1"}, *[None] * 4]
            assert (await client.get(created.incident_id)).details == {"host": "db-1"}
        await downgrade(url)
        assert [call(name) for name in (*writes, "get", "list")] == [None] * 7
        await upgrade(url)
    async with IncidentClient.open(url) as client:
        again = await client.get(created.incident_id)
        assert (again, again.details) == (created, None)

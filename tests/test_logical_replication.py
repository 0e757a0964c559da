"""A move to another server by logical replication, with the commands of the deployment guide."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import psycopg
import pytest
from attrs import evolve
from psycopg.conninfo import conninfo_to_dict

from incidentkit import IncidentClient, IncidentEvent, StoreError
from incidentkit.store import migrate
from tests.distributions import ROOT
from tests.hosts import run_sql
from tests.servers import PostgresServer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

GUIDE = ROOT / "docs" / "how-to" / "deploy.md"


def commands(old_url: str) -> dict[str, list[str]]:
    """Return the statements of the guide, by the first words of each block."""
    section = GUIDE.read_text("utf-8").partition("### Move to another server")[2]
    section = section.partition("\n### ")[0]
    blocks: list[str] = re.findall(r"```sql\n(.*?)```", section, re.DOTALL)
    connection = " ".join(f"{k}={v}" for k, v in conninfo_to_dict(old_url).items())
    return {
        " ".join(block.split()[:2]): [
            each.strip().replace("host=old dbname=app", connection)
            for each in block.split(";")
            if each.strip()
        ]
        for block in blocks
    }


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[str, str]]:
    """The URLs of two servers; the first has assigned many more numbers of transactions."""
    settings = {"wal_level": "logical"}
    with PostgresServer(settings=settings) as old, PostgresServer(settings=settings) as new:
        with psycopg.connect(old.url, autocommit=True) as connection:
            for _ in range(2000):
                connection.execute("SELECT pg_current_xact_id()")
        yield old.url, new.url


async def test_a_subscriber_takes_over(servers: tuple[str, str]) -> None:
    """After the switch nothing is missing: ids ascend, and readers continue with their cursors."""
    old, new = servers
    steps = commands(old)
    for url in servers:
        await migrate.upgrade(url)
    async with IncidentClient.open(old) as incidents:
        await incidents.create("Disk is full", source="partner", idempotency_key="key")
        await incidents.update_status(1, "failed")
        read = (await _changes(incidents, None, 2))[-1]
        for statement in steps["CREATE PUBLICATION"]:
            await run_sql(old, statement)
        _run_alone(new, steps["CREATE SUBSCRIPTION"])
        await incidents.create("Line is down", source="partner")
        await incidents.create("Pump is off", source="partner", incident_type="failed")
        await incidents.purge(datetime.now(UTC) + timedelta(hours=1))
        await incidents.note(2, "Looking")
        unread = await _changes(incidents, read.cursor, 4)
        expected = await incidents.list()
    (caught_up,) = steps["SELECT replay_lsn"]
    async with asyncio.timeout(60):
        # Empty until the subscriber has connected.
        while await run_sql(old, caught_up) != [(True,)]:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        while (await run_sql(new, "SELECT count(*) FROM incident_event"))[0] != (  # noqa: ASYNC110
            await run_sql(old, "SELECT count(*) FROM incident_event")
        )[0]:
            await asyncio.sleep(0.1)
    with pytest.raises(StoreError, match="copied from another server"):
        async with IncidentClient.open(new):
            pass
    _run_alone(new, steps["DROP SUBSCRIPTION"])
    await migrate.upgrade(new)
    async with IncidentClient.open(new) as incidents:
        assert await incidents.list() == expected
        again = await incidents.create("Disk is full", source="partner", idempotency_key="key")
        assert again.incident_id == 1
        created = await incidents.create("Fan is loud", source="partner")
        assert created.incident_id == 4
        changes = await _changes(incidents, read.cursor, len(unread) + 1)
        assert list(map(_told, changes[:-1])) == list(map(_told, unread))
        assert changes[-1].incident_id == created.incident_id
        # A reader that had read everything on the old server misses nothing.
        (last,) = await _changes(incidents, unread[-1].cursor, 1)
        assert last == changes[-1]


def _run_alone(url: str, statements: list[str]) -> None:
    """Run statements, none of which may be in a transaction."""
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


def _told(event: IncidentEvent) -> IncidentEvent:
    """Return an event without its cursor, which has its place in the order of a server."""
    return evolve(event, cursor="")


async def _changes(
    incidents: IncidentClient, after: str | None, count: int
) -> Sequence[IncidentEvent]:
    async with asyncio.timeout(30):
        while True:
            page = await incidents.read_changes(after, limit=1000)
            if len(page.changes) >= count:
                return page.changes
            await asyncio.sleep(0.01)

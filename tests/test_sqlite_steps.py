"""SQLite's own step counts: no call takes more steps in a larger table or on a deeper page."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Pool, event

from incidentkit import (
    IncidentClient,
    NewIncident,
    OrderName,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

LARGE = 20_000

FILL = """
    INSERT INTO "Incident" (incident_message, incident_type, source, dedup_key)
    WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {size})
    SELECT 'Disk is full', iif(i % 3, 'new', 'failed'), iif(i % 2, 'partner', 'operator'),
        'disk-' || i FROM n;
    INSERT INTO incident_event (transaction_id, nonce, incident_id, kind, at, writer)
    SELECT 0, incident_id, incident_id, 'noted', created_at, 2 FROM "Incident";
    INSERT INTO incident_idempotency_key (idempotency_key, fingerprint, answer)
    SELECT 'key-' || incident_id, '', '' FROM "Incident";
"""
"""Incidents created within one second, each with an event and an idempotency key."""


class Steps:
    """Counts the steps, in tens, that SQLite takes on the stores' connections."""

    def __init__(self) -> None:
        self.taken = 0

    def count(self) -> int:
        """Count ten more steps, and let SQLite continue."""
        self.taken += 1
        return 0

    def connect(self, connection: object, _: object) -> None:
        """Count the steps of this connection."""
        # Probes and migrations use connections of another type.
        if isinstance(connection, sqlite3.Connection):
            connection.set_progress_handler(self.count, 10)

    async def of(self, call: Awaitable[object]) -> int:
        """Return the number of tens of steps that a call takes."""
        before = self.taken
        await call
        return self.taken - before


@pytest.fixture
def steps() -> Iterator[Steps]:
    """The step counter."""
    steps = Steps()
    event.listen(Pool, "connect", steps.connect)
    yield steps
    event.remove(Pool, "connect", steps.connect)


async def filled(path: Path, size: int) -> IncidentClient:
    """Return a client on a file with this many incidents; the caller closes it."""
    client = IncidentClient.open(f"sqlite+aiosqlite:///{path}")
    await client.connect()
    with closing(sqlite3.connect(path)) as file, file:
        file.executescript(FILL.format(size=size))
    return client


CALLS: dict[str, Callable[[IncidentClient, int], Awaitable[object]]] = {
    "list": lambda client, _: client.list(),
    "list of a status": lambda client, _: client.list(status="failed"),
    "list of a status and a source": lambda client, _: client.list(
        status="failed", source="partner"
    ),
    "get": lambda client, middle: client.get(middle),
    "search": lambda client, _: client.search(),
    "search until a time": lambda client, _: client.search(
        created_before=datetime(2026, 1, 1, tzinfo=UTC)
    ),
    "history": lambda client, middle: client.history(middle),
    "first changes": lambda client, _: client.read_changes(limit=20),
    "latest change": lambda client, _: client.read_changes("latest"),
    "create": lambda client, _: client.create("Disk is full", source="partner"),
    "create with an idempotency key": lambda client, _: client.create(
        "Disk is full", source="partner", idempotency_key="one"
    ),
    "repeat a create": lambda client, middle: client.create(
        "Disk is full", source="partner", dedup_key=f"disk-{middle}"
    ),
    "create many": lambda client, _: client.create_many([NewIncident("Disk is full", "partner")]),
    "update the status": lambda client, middle: client.update_status(middle, "completed"),
    "note": lambda client, middle: client.note(middle, "Looked at"),
    "purge nothing": lambda client, _: client.purge(datetime(2026, 1, 1, tzinfo=UTC)),
    "check": lambda client, _: client.check(),
}


async def test_no_call_costs_more_in_a_larger_table(tmp_path: Path, steps: Steps) -> None:
    """Each call takes about the same number of steps in a table a hundred times as large."""
    taken: dict[int, dict[str, int]] = {}
    for size in (LARGE // 100, LARGE):
        client = await filled(tmp_path / f"{size}.db", size)
        taken[size] = {
            name: await steps.of(call(client, size // 2)) for name, call in CALLS.items()
        }
        await client.close()
    small, large = taken.values()
    assert {name: large[name] for name in CALLS if large[name] > 2 * small[name] + 50} == {}


@pytest.mark.parametrize("order", ["newest", "oldest"])
@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"status": "failed"},
        {"status": ["failed", "completed"], "source": ["partner", "operator"]},
        {"text": "disk"},
    ],
)
async def test_a_page_costs_the_same_at_any_depth_of_one_second(
    tmp_path: Path, steps: Steps, order: OrderName, filters: dict[str, Any]
) -> None:
    """A page after a cursor costs the same at any depth, even among incidents of one second."""
    async with await filled(tmp_path / "incidents.db", LARGE) as client:
        first = await steps.of(client.search(limit=20, order=order, **filters))
        after: str | None = None
        for _ in range(5):
            after = (await client.search(limit=1000, order=order, after=after, **filters)).next
        deep = await steps.of(client.search(limit=20, order=order, after=after, **filters))
        assert deep < 2 * first + 50


@pytest.mark.parametrize("order", ["newest", "oldest"])
async def test_a_time_passes_over_nothing(tmp_path: Path, steps: Steps, order: OrderName) -> None:
    """A search before a time does not scan the incidents of that time's second."""
    async with await filled(tmp_path / "incidents.db", LARGE) as client:
        incident = await client.get(1)
        older = client.search(created_before=incident.created_at, order=order)
        assert await steps.of(older) < 50


async def test_the_feed_costs_the_same_at_any_place(tmp_path: Path, steps: Steps) -> None:
    """Reading changes after a cursor does not scan the changes before it."""
    async with await filled(tmp_path / "incidents.db", LARGE) as client:
        first = await steps.of(client.read_changes(limit=20))
        (event,) = await client.history(LARGE - 20)
        last = await steps.of(client.read_changes(event.cursor, limit=20))
        assert last < 2 * first + 50

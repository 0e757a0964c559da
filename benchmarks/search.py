"""Measures searches and the feed by the size of the tables.

In each table a hundred incidents have failed and contain a rare word; all contain a common one. The
older half was created in one second, as an import leaves it. Each incident has one event.
"""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import AsyncExitStack, ExitStack, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import asyncpg
import uvloop

from benchmarks.databases import create_database
from benchmarks.results import Result, at_most
from benchmarks.rounds import medians_in_turn, one_core
from incidentkit import IncidentClient
from incidentkit.store.migrate import upgrade
from tests.servers import PostgresServer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from typing import TypeAlias

    Call: TypeAlias = Callable[[], Awaitable[object]]

FLAT: Final = 1.2
MUST_BE_FLAT: Final = (
    "search, first page",
    "search, middle page",
    "search, last page",
    "feed, latest changes",
)
LARGE_PAGE: Final = "search, a common word, 1,000 a page"
SMALL_PAGE: Final = "search, a common word, 100 a page"
READ_MUCH: Final = ("search, a common word", SMALL_PAGE, LARGE_PAGE, "search, with the total")

SLOWER: Final = 2.0
"""Target of a large page: the time of ten small ones, times this."""

RARE: Final = 100
"""Incidents of the rare kind in each table."""

LATEST: Final = 20
"""Changes that follow the cursor from which the feed is read."""

START: Final = datetime(2026, 1, 1, tzinfo=UTC)

FILL: Final = (
    'INSERT INTO "Incident" (incident_message, incident_type, source, created_at) '
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {size}) "
    "SELECT CASE WHEN i % {step} = 0 THEN 'Disk needle is full' "
    "ELSE 'Disk is full on db ' || i END, {type}, {source}, {at} FROM n"
)

FILL_FEED: Final = (
    "INSERT INTO incident_event (transaction_id, nonce, incident_id, kind, to_status, at, writer) "
    "SELECT {transaction}, incident_id, incident_id, 'created', 'new', created_at, 2 "
    'FROM "Incident" ORDER BY incident_id'
)


async def fill_postgresql(url: str, size: int) -> None:
    """Create the schema and the incidents."""
    await upgrade(url)
    connection = await asyncpg.connect(url)
    await connection.execute(
        FILL.format(
            size=size,
            step=size // RARE,
            type=f"CAST(CASE WHEN i % {size // RARE} = 0 THEN 'failed' ELSE 'completed' END "
            "AS incidentstatus)",
            source="CAST(CASE WHEN i % 2 = 0 THEN 'partner' ELSE 'operator' END AS incidentsource)",
            at="CAST('2026-01-01 00:00:00+00' AS timestamptz) "
            f"+ greatest(i - {size // 2}, 0) * interval '1 second'",
        ),
        timeout=600,
    )
    # Numbered as if each transaction came before all of the server's own.
    feed = FILL_FEED.format(transaction=f"incident_id - {size + 1}")
    await connection.execute(feed, timeout=600)
    await connection.execute('VACUUM ANALYZE "Incident", incident_event', timeout=600)
    await connection.close()


def fill_sqlite(path: Path, size: int) -> None:
    """Create the schema and the incidents."""
    asyncio.run(upgrade(f"sqlite+aiosqlite:///{path}"))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            FILL.format(
                size=size,
                step=size // RARE,
                type=f"CASE WHEN i % {size // RARE} = 0 THEN 'failed' ELSE 'completed' END",
                source="CASE WHEN i % 2 = 0 THEN 'partner' ELSE 'operator' END",
                at=f"datetime('2026-01-01', '+' || max(i - {size // 2}, 0) || ' seconds')",
            )
        )
        connection.execute(FILL_FEED.format(transaction="0"))
        connection.execute("ANALYZE")


async def calls(client: IncidentClient, size: int) -> dict[str, Call]:
    """Return the timed calls by name."""
    # The second newest of these is the last incident of the older half.
    middle = (await client.search(created_before=START + timedelta(seconds=2), limit=2)).next
    (last_seen,) = await client.history(size - LATEST)

    def search(**filters: Any) -> Call:
        return lambda: client.search(**filters)

    return {
        "search, first page": search(),
        "search, middle page": search(after=middle),
        "search, last page": search(order="oldest"),
        "search, one rare status": search(status="failed"),
        "search, two statuses, one source": search(status={"failed", "new"}, source="partner"),
        "search, a rare word": search(text="needle"),
        "search, a common word": search(text="disk"),
        SMALL_PAGE: search(text="disk", limit=100, after=middle),
        LARGE_PAGE: search(text="disk", limit=1000, after=middle),
        "search, with the total": search(total=True),
        "feed, latest changes": lambda: client.read_changes(last_seen.cursor),
    }


async def run(*, sizes: Sequence[int], rounds: int) -> Result:
    """Measure every search and the feed on both databases.

    Args:
        sizes: Incidents in the tables, at least 100, smallest first.
        rounds: Calls of each kind; calls that read much get a twentieth.
    """
    result = Result([], rounds=f"{rounds} calls of each kind, interleaved")
    with ExitStack() as stack:
        stack.enter_context(one_core())
        folder = Path(stack.enter_context(TemporaryDirectory()))
        server = stack.enter_context(PostgresServer())
        urls: dict[str, list[str]] = {"PostgreSQL": [], "SQLite": []}
        for size in sizes:
            urls["PostgreSQL"].append(await create_database(server.url, f"n{size}"))
            await fill_postgresql(urls["PostgreSQL"][-1], size)
            await asyncio.to_thread(fill_sqlite, folder / f"{size}.db", size)
            urls["SQLite"].append(f"sqlite+aiosqlite:///{folder / f'{size}.db'}")
        for database, its_urls in urls.items():
            async with AsyncExitStack() as clients:
                opened = [
                    await clients.enter_async_context(IncidentClient.open(url)) for url in its_urls
                ]
                await _compare(result, opened, sizes, rounds, database)
    return result


async def _compare(
    result: Result,
    clients: Sequence[IncidentClient],
    sizes: Sequence[int],
    rounds: int,
    database: str,
) -> None:
    """Add the figures of one database, with the sizes interleaved."""
    by_size = [await calls(client, size) for client, size in zip(clients, sizes, strict=True)]
    table = [["read", *(f"{size:,}, ms" for size in sizes)]]
    largest: dict[str, float] = {}
    for name in by_size[0]:
        medians = await medians_in_turn(
            lambda place, _, name=name: by_size[place][name](),  # type: ignore[misc]
            len(sizes),
            max(rounds // 20, 3) if name in READ_MUCH else rounds,
        )
        table.append([name, *(f"{median * 1000:.3f}" for median in medians)])
        largest[name] = medians[-1]
        if name in MUST_BE_FLAT:
            what = f"{sizes[-1]:,} incidents on {database}: {name}"
            against = f"the time with {sizes[0]:,}"
            result.rows.append(at_most(what, against, FLAT, medians[-1] / medians[0]))
    what = f"{sizes[-1]:,} incidents on {database}: {LARGE_PAGE}"
    slower = largest[LARGE_PAGE] / largest[SMALL_PAGE] / 10
    result.rows.append(at_most(what, "ten pages of 100", SLOWER, slower))
    result.details[f"Searches and the feed on {database}, by number of incidents"] = table


def start(*, quick: bool, sizes: Sequence[int] | None = None, rounds: int | None = None) -> Result:
    """Measure on uvloop, the event loop of the service."""
    sizes = sizes or ([1_000, 10_000, 100_000] if quick else [1_000, 100_000, 1_000_000])
    return uvloop.run(run(sizes=sizes, rounds=rounds or (40 if quick else 400)))

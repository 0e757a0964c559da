"""What the size of the tables costs a search, and the feed.

In each table a hundred incidents have failed and have a rare word; all have a common one. The older
half is of one second, as an import leaves it. Each has an event.
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
from incidentkit.domain.cursor import encode_cursor
from incidentkit.store.migrate import upgrade
from tests.servers import PostgresServer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from typing import TypeAlias

    Call: TypeAlias = Callable[[], Awaitable[object]]

FLAT: Final = 1.2
MUST_BE_FLAT: Final = (
    "search, the first page",
    "search, a page in the middle",
    "search, the last page",
    "the feed, its end",
)
READ_MUCH: Final = ("search, a common word", "search, the total")

RARE: Final = 100
"""Incidents of a table that are of a rare kind."""

LATEST: Final = 20
"""Changes behind the place in the feed that is gone on from."""

START: Final = datetime(2026, 1, 1, tzinfo=UTC)

FILL: Final = (
    'INSERT INTO "Incident" (incident_message, incident_type, source, created_at) '
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {size}) "
    "SELECT CASE WHEN i % {step} = 0 THEN 'Disk needle is full' "
    "ELSE 'Disk is full on db ' || i END, {type}, {source}, {at} FROM n"
)

FILL_FEED: Final = (
    "INSERT INTO incident_event (transaction_id, nonce, incident_id, kind, to_status, at) "
    "SELECT {transaction}, incident_id, incident_id, 'created', 'new', created_at "
    'FROM "Incident" ORDER BY incident_id'
)


async def fill_postgresql(url: str, size: int) -> None:
    """Make the schema and so many incidents."""
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
    # As if each were of a transaction before all that the server has had.
    feed = FILL_FEED.format(transaction=f"incident_id - {size + 1}")
    await connection.execute(feed, timeout=600)
    await connection.execute('VACUUM ANALYZE "Incident", incident_event', timeout=600)
    await connection.close()


def fill_sqlite(path: Path, size: int) -> None:
    """Make the schema and so many incidents."""
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
    """Return what is timed, by name."""
    microseconds = (START - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    middle = encode_cursor(microseconds, size // 2, 0)
    (last_seen,) = await client.history(size - LATEST)

    def search(**filters: Any) -> Call:
        return lambda: client.search(**filters)

    return {
        "search, the first page": search(),
        "search, a page in the middle": search(after=middle),
        "search, the last page": search(order="oldest"),
        "search, one rare status": search(status="failed"),
        "search, two statuses, one source": search(status={"failed", "new"}, source="partner"),
        "search, a rare word": search(text="needle"),
        "search, a common word": search(text="disk"),
        "search, the total": search(total=True),
        "the feed, its end": lambda: client.read_changes(last_seen.cursor),
    }


async def run(*, sizes: Sequence[int], rounds: int) -> Result:
    """Measure every search, and the feed, on both databases.

    Args:
        sizes: Incidents of the tables, at least 100, the smallest first.
        rounds: Calls of each kind; a twentieth of them of what reads much.
    """
    result = Result([], rounds=f"{rounds} calls of each kind, in turn")
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
    """Add the figures of one database, from all sizes in turn."""
    by_size = [await calls(client, size) for client, size in zip(clients, sizes, strict=True)]
    table = [["read", *(f"{size:,}, ms" for size in sizes)]]
    for name in by_size[0]:
        medians = await medians_in_turn(
            lambda place, _, name=name: by_size[place][name](),  # type: ignore[misc]
            len(sizes),
            max(rounds // 20, 3) if name in READ_MUCH else rounds,
        )
        table.append([name, *(f"{median * 1000:.3f}" for median in medians)])
        if name in MUST_BE_FLAT:
            what = f"{sizes[-1]:,} incidents on {database}: {name}"
            against = f"the time with {sizes[0]:,}"
            result.rows.append(at_most(what, against, FLAT, medians[-1] / medians[0]))
    result.details[f"Searches and the feed on {database}, by incidents in the table"] = table


def start(*, quick: bool, sizes: Sequence[int] | None = None, rounds: int | None = None) -> Result:
    """Measure on the event loop that the service runs on."""
    sizes = sizes or ([1_000, 10_000, 100_000] if quick else [1_000, 100_000, 1_000_000])
    return uvloop.run(run(sizes=sizes, rounds=rounds or (40 if quick else 400)))

"""What the size of the table costs a search.

In each table a hundred incidents have failed and have a rare word; all have a common one.
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
from incidentkit.cursor import encode_cursor
from incidentkit.store.migrate import upgrade
from tests.servers import PostgresServer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from typing import TypeAlias

    Call: TypeAlias = Callable[[], Awaitable[object]]

FLAT: Final = 1.2
FLAT_PAGES: Final = ("the first page", "a page in the middle", "the last page")
READ_MUCH: Final = ("a common word", "the total")

RARE: Final = 100
"""Incidents of a table that are of a rare kind."""

START: Final = datetime(2026, 1, 1, tzinfo=UTC)

FILL: Final = (
    'INSERT INTO "Incident" (incident_message, incident_type, source, created_at) '
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {size}) "
    "SELECT CASE WHEN i % {step} = 0 THEN 'Disk needle is full' "
    "ELSE 'Disk is full on db ' || i END, {type}, {source}, {at} FROM n"
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
            at="CAST('2026-01-01 00:00:00+00' AS timestamptz) + i * interval '1 second'",
        ),
        timeout=600,
    )
    await connection.execute('VACUUM ANALYZE "Incident"', timeout=600)
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
                at="datetime('2026-01-01', '+' || i || ' seconds')",
            )
        )
        connection.execute("ANALYZE")


def calls(client: IncidentClient, size: int) -> dict[str, Call]:
    """Return what is timed, by name."""
    half = START + timedelta(seconds=size // 2)
    microseconds = (half - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    middle = encode_cursor(microseconds, size // 2, 0)

    def search(**filters: Any) -> Call:
        return lambda: client.search(**filters)

    return {
        "the first page": search(),
        "a page in the middle": search(after=middle),
        "the last page": search(order="oldest"),
        "one rare status": search(status="failed"),
        "two statuses, one source": search(status={"failed", "new"}, source="partner"),
        "a rare word": search(text="needle"),
        "a common word": search(text="disk"),
        "the total": search(total=True),
    }


async def run(*, sizes: Sequence[int], rounds: int) -> Result:
    """Measure every search on both databases.

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
    by_size = [calls(client, size) for client, size in zip(clients, sizes, strict=True)]
    table = [["search", *(f"{size:,}, ms" for size in sizes)]]
    for name in by_size[0]:
        medians = await medians_in_turn(
            lambda place, _, name=name: by_size[place][name](),  # type: ignore[misc]
            len(sizes),
            max(rounds // 20, 3) if name in READ_MUCH else rounds,
        )
        table.append([name, *(f"{median * 1000:.3f}" for median in medians)])
        if name in FLAT_PAGES:
            what = f"{sizes[-1]:,} incidents on {database}: search, {name}"
            against = f"the time with {sizes[0]:,}"
            result.rows.append(at_most(what, against, FLAT, medians[-1] / medians[0]))
    result.details[f"Searches on {database}, by incidents in the table"] = table


def start(*, quick: bool, sizes: Sequence[int] | None = None, rounds: int | None = None) -> Result:
    """Measure on the event loop that the service runs on."""
    sizes = sizes or ([1_000, 10_000, 100_000] if quick else [1_000, 100_000, 1_000_000])
    return uvloop.run(run(sizes=sizes, rounds=rounds or (40 if quick else 400)))

"""What the size of the table costs a search: `nox -s bench`, or `nox -s bench -- --quick`.

Databases with a thousand, a hundred thousand and a million incidents take turns, call by call, so
that whatever else the machine does falls on all alike. The ratio is that of the medians to the
smallest. In each a hundred incidents have failed and have a rare word; all have a common one.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import sqlite3
import statistics
import time
from contextlib import AsyncExitStack, ExitStack, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import asyncpg

from incidentkit import IncidentClient
from incidentkit.cursor import encode_cursor
from incidentkit.store.migrate import upgrade
from tests.servers import PostgresServer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import TypeAlias

    Call: TypeAlias = Callable[[], Awaitable[object]]

WARM_UP: Final = 10
"""Rounds that come first and are not counted."""

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


async def compare(clients: dict[int, IncidentClient], rounds: int, database: str) -> None:
    """Print a line for each call, from all sizes in turn."""
    by_size = {size: calls(client, size) for size, client in clients.items()}
    for name in next(iter(by_size.values())):
        seconds: dict[int, list[float]] = {size: [] for size in clients}
        count = max(rounds // 20, 3) if name in ("a common word", "the total") else rounds
        for _ in range(WARM_UP + count):
            for size in clients:
                start = time.perf_counter()
                await by_size[size][name]()
                seconds[size].append(time.perf_counter() - start)
        medians = [statistics.median(its_seconds[WARM_UP:]) for its_seconds in seconds.values()]
        cells = [database, name, f"{count:,}", f"{medians[0] * 1e3:.2f}"]
        cells += [f"{median / medians[0]:.2f}" for median in medians[1:]]
        print(f"| {' | '.join(cells)} |", flush=True)


async def run(*, quick: bool) -> None:
    """Fill the databases, run every comparison and print one table."""
    sizes = (1000, 10_000, 100_000) if quick else (1000, 100_000, 1_000_000)
    rounds = 40 if quick else 200
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        servers = {size: stack.enter_context(PostgresServer()) for size in sizes}
        for size in sizes:
            await fill_postgresql(servers[size].url, size)
            await asyncio.to_thread(fill_sqlite, folder / f"{size}.db", size)
        connection = await asyncpg.connect(servers[sizes[0]].url)
        version = await connection.fetchval("SHOW server_version")
        await connection.close()
        print(
            f"PostgreSQL {version.split()[0]}, SQLite {sqlite3.sqlite_version}, "
            f"Python {platform.python_version()}, {os.cpu_count()} cores\n"
        )
        print("| Database | Search | Rounds | p50 at 1,000, ms |", end="")
        print("".join(f" Ratio at {size:,} |" for size in sizes[1:]))
        print("| --- | --- | ---: | ---: |" + " ---: |" * (len(sizes) - 1))
        urls = {
            "PostgreSQL": {size: server.url for size, server in servers.items()},
            "SQLite": {size: f"sqlite+aiosqlite:///{folder / f'{size}.db'}" for size in sizes},
        }
        for database, its_urls in urls.items():
            async with AsyncExitStack() as clients:
                opened = {
                    size: await clients.enter_async_context(IncidentClient.open(url))
                    for size, url in its_urls.items()
                }
                await compare(opened, rounds, database)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller tables")
    asyncio.run(run(quick=parser.parse_args().quick))


if __name__ == "__main__":
    main()

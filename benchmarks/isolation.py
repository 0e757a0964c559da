"""Measures whether expensive or blocked calls hold up others.

The crowd is one of callers. Beside it, a quick call may have to wait for a thread, a connection or
a lock.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
import string
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

import asyncpg
import psycopg

from benchmarks import services
from benchmarks.crowd import HOT
from benchmarks.databases import create_database
from benchmarks.decoys import NUMBERS, QUICK, crowd, measure, report
from benchmarks.results import Result
from incidentkit.store.migrate import upgrade
from tests.servers import PostgresServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from benchmarks.services import Service

INCIDENTS: Final = 40_000
WORDS: Final = 20
"""Words of a message."""

EXPENSIVE: Final = {
    "searches": "32 searches for 32 letters, with a total",
    "abandoned": "32 such searches that are abandoned after 0.2 seconds",
    "totals": "32 totals",
    "deep": "32 deep pages",
    "exports": "32 exports, 1,000 incidents a page",
    "histories": "32 histories of 1,000 events",
    "changes": "32 readers of all changes, 1,000 a page",
}
CALLERS: Final = 32
WAITERS: Final = 200
BESIDE_A_HOT_ROW: Final = f"{WAITERS} changes of an incident that a transaction has locked"

START: Final = datetime(2026, 1, 1, tzinfo=UTC)


def _update() -> str:
    # Each incident twice, so that every call changes something.
    turn = next(NUMBERS)
    status = "completed" if turn // 1000 % 2 else "failed"
    return f"PATCH /incident/update-status?incident_id={turn % 1000 + 2}&status={status}"


NEIGHBORS: Final[dict[str, Callable[[], str]]] = {
    **QUICK,
    "update-status of others": _update,
    "readiness": lambda: "GET /health/ready",
}
"""The measured calls beside a hot row."""


def rows_to_fill(incidents: int) -> Iterator[tuple[str, str, str, datetime]]:
    """Yield the incidents of a database: messages of random words, and one a second."""
    choose = random.Random(incidents)  # noqa: S311
    letters = string.ascii_lowercase + string.digits
    words = ["".join(choose.choices(letters, k=choose.randint(3, 9))) for _ in range(5_000)]
    for number in range(incidents):
        at = START + timedelta(seconds=number)
        yield " ".join(choose.choices(words, k=WORDS)), "new", "partner", at


COLUMNS: Final = ("incident_message", "incident_type", "source", "created_at")

FILL_HISTORY: Final = (
    "INSERT INTO incident_event (transaction_id, nonce, incident_id, kind, note, at, writer) "
    "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000) "
    f"SELECT {{transaction}}, i, {HOT}, 'noted', 'It came back', {{at}}, 2 FROM n"
)
"""Gives one incident a long history."""


async def _fill_postgresql(url: str, incidents: int) -> None:
    await upgrade(url)
    connection = await asyncpg.connect(url)
    rows = list(rows_to_fill(incidents))
    await connection.copy_records_to_table("Incident", records=rows, columns=COLUMNS)
    # Numbered as if each transaction came before all of the server's own.
    history = FILL_HISTORY.format(transaction="i - 1001", at="date_trunc('second', now())")
    await connection.execute(history)
    await connection.execute("VACUUM ANALYZE", timeout=600)
    await connection.close()


def _fill_sqlite(path: Path, incidents: int) -> None:
    asyncio.run(upgrade(f"sqlite+aiosqlite:///{path}"))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executemany(
            f'INSERT INTO "Incident" ({", ".join(COLUMNS)}) VALUES (?, ?, ?, ?)',
            ((*row, f"{at:%Y-%m-%d %H:%M:%S}") for *row, at in rows_to_fill(incidents)),
        )
        connection.execute(FILL_HISTORY.format(transaction="0", at="CURRENT_TIMESTAMP"))


async def run(*, rounds: int, seconds: float, incidents: int) -> Result:
    """Measure quick calls beside every crowd, on both databases.

    Args:
        rounds: Measurements of each call beside each crowd and its decoy.
        seconds: Length of one.
        incidents: Incidents in each database, at least 1,002.
    """
    result = Result([], rounds=f"{rounds} rounds of {seconds:g} seconds for each call, interleaved")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        for name in ("a", "b"):
            await asyncio.to_thread(_fill_sqlite, folder / f"{name}.db", incidents)
        with ExitStack() as running:
            sides = [
                running.enter_context(
                    services.ours(f"sqlite+aiosqlite:///{folder / name}.db", None, folder / name)
                )
                for name in ("a", "b")
            ]
            await _beside_expensive(
                result, "SQLite", sides, rounds=rounds, seconds=seconds, incidents=incidents
            )
        server = stack.enter_context(PostgresServer(durable=True))
        urls = [await create_database(server.url, name) for name in ("a", "b")]
        for url in urls:
            await _fill_postgresql(url, incidents)
        sides = [
            stack.enter_context(services.ours(url, None, folder / f"{place}.log"))
            for place, url in enumerate(urls)
        ]
        await _beside_expensive(
            result, "PostgreSQL", sides, rounds=rounds, seconds=seconds, incidents=incidents
        )
        await _beside_hot_row(result, urls, sides, rounds, seconds)
    return result


async def _beside_expensive(  # noqa: PLR0913
    result: Result,
    database: str,
    sides: Sequence[Service],
    *,
    rounds: int,
    seconds: float,
    incidents: int,
) -> None:
    for kind, what in EXPENSIVE.items():
        crowds = [
            partial(crowd, "benchmarks.crowd", side.url, kind, CALLERS, incidents) for side in sides
        ]
        measured = await measure(sides[0].url, QUICK, crowds, rounds, seconds)
        report(result, f"{database}: {what}", measured)


async def _beside_hot_row(
    result: Result, urls: Sequence[str], sides: Sequence[Service], rounds: int, seconds: float
) -> None:
    with ExitStack() as stack:
        for url in urls:
            host = stack.enter_context(psycopg.connect(url))
            host.execute('SELECT FROM "Incident" WHERE incident_id = %s FOR UPDATE', [HOT])
        crowds = [partial(crowd, "benchmarks.crowd", side.url, "hot", WAITERS, 0) for side in sides]
        measured = await measure(sides[0].url, NEIGHBORS, crowds, rounds, seconds)
    report(result, f"PostgreSQL: {BESIDE_A_HOT_ROW}", measured)


def start(*, quick: bool, seconds: float | None = None) -> Result:
    """Measure, in a short run with few incidents or in a long one."""
    return asyncio.run(
        run(
            rounds=1 if quick else 3,
            seconds=seconds or (0.5 if quick else 2.0),
            incidents=2_000 if quick else INCIDENTS,
        )
    )

"""Measures whether expensive or blocked calls hold up others.

A crowd of callers keeps a service busy while the latency of quick calls is measured: once with the
crowd at the same service, and once with the crowd at a decoy, a service with a database of its own.
The cores are as busy either way, so that a difference is the time that a call waits for a thread, a
connection or a lock.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sqlite3
import string
import subprocess
import sys
import time
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import asyncpg
import psycopg

from benchmarks import services
from benchmarks.crowd import HOT
from benchmarks.databases import create_database
from benchmarks.results import Result, at_most
from benchmarks.rounds import VoidRoundError, percentiles
from incidentkit.store.migrate import upgrade
from tests.servers import PostgresServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

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

TIMES: Final = 3.0
MORE: Final = 10.0
AGAINST: Final = "3 times the p99 beside a decoy, or 10 ms more"
"""What is allowed: the larger of both."""

SETTLE: Final = 1.0
"""Seconds from the start of a crowd to the first measured call."""

START: Final = datetime(2026, 1, 1, tzinfo=UTC)

_numbers: Final = itertools.count(HOT + 1)


def _create() -> str:
    return "POST /incident/create"


def _update() -> str:
    # Each incident twice, so that every call changes something.
    turn = next(_numbers)
    status = "completed" if turn // 1000 % 2 else "failed"
    return f"PATCH /incident/update-status?incident_id={turn % 1000 + 2}&status={status}"


QUICK: Final[dict[str, Callable[[], str]]] = {
    "get": lambda: f"GET /incident/get/{next(_numbers) % 1000 + 2}",
    "list, cached": lambda: "GET /incident/get?page=1&limit=10",
    "create": _create,
}
NEIGHBORS: Final[dict[str, Callable[[], str]]] = {
    **QUICK,
    "update-status of others": _update,
    "readiness": lambda: "GET /health/ready",
}
"""The measured calls beside a hot row."""

BODY: Final = b'{"incident_message": "Line to the warehouse is down", "source": "partner"}'


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
        crowds = [partial(_crowd, side.url, kind, CALLERS, incidents) for side in sides]
        measured = await _measure(sides[0].url, QUICK, crowds, rounds, seconds)
        _report(result, f"{database}: {what}", measured)


async def _beside_hot_row(
    result: Result, urls: Sequence[str], sides: Sequence[Service], rounds: int, seconds: float
) -> None:
    with ExitStack() as stack:
        for url in urls:
            host = stack.enter_context(psycopg.connect(url))
            host.execute('SELECT FROM "Incident" WHERE incident_id = %s FOR UPDATE', [HOT])
        crowds = [partial(_crowd, side.url, "hot", WAITERS, 0) for side in sides]
        measured = await _measure(sides[0].url, NEIGHBORS, crowds, rounds, seconds)
    _report(result, f"PostgreSQL: {BESIDE_A_HOT_ROW}", measured)


@contextmanager
def _crowd(url: str, kind: str, callers: int, incidents: int) -> Iterator[None]:
    """Keep a service busy from another process."""
    arguments = ("-m", "benchmarks.crowd", url, kind, str(callers), str(incidents))
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=services.ROOT, stdin=subprocess.PIPE
    )
    try:
        yield
    finally:
        process.communicate()


async def _measure(
    url: str,
    calls: Mapping[str, Callable[[], str]],
    crowds: Sequence[Callable[[], AbstractContextManager[None]]],
    rounds: int,
    seconds: float,
) -> dict[str, list[float]]:
    """Return the p99 of each call in milliseconds, beside each crowd: the median of the rounds."""
    found: dict[str, list[list[float]]] = {name: [[] for _ in crowds] for name in calls}
    for _ in range(rounds):
        for place, crowd in enumerate(crowds):
            with crowd():
                await asyncio.sleep(SETTLE)
                for name, call in calls.items():
                    times = await _times(url, name, call, seconds)
                    found[name][place].append(percentiles(times)[99])
    return {name: [median(each) for each in measured] for name, measured in found.items()}


def _report(result: Result, beside: str, measured: Mapping[str, Sequence[float]]) -> None:
    """Add the row of a crowd: the call that comes closest to what is allowed, or exceeds it."""
    shares = {
        name: there / max(TIMES * decoy, decoy + MORE) for name, (there, decoy) in measured.items()
    }
    result.rows.append(at_most(f"p99 beside {beside}", AGAINST, 1, max(shares.values())))
    table = result.details.setdefault(
        "p99 of a call, in milliseconds",
        [["beside", "call", "there", "beside a decoy", "of what is allowed"]],
    )
    table += [
        [beside, name, f"{there:.1f}", f"{decoy:.1f}", f"{shares[name]:.2f}"]
        for name, (there, decoy) in measured.items()
    ]


async def _times(url: str, name: str, call: Callable[[], str], seconds: float) -> list[float]:
    """Return the seconds that a call takes, made again and again by one caller."""
    reader, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)
    times: list[float] = []
    ends_at = time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < ends_at:  # noqa: PLR2004
        request = call()
        body = BODY if request.startswith("POST") else b""
        head = f"{request} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        kind = "Content-Type: application/json\r\n" if body else ""
        started = time.perf_counter()
        writer.write(f"{head}{kind}\r\n".encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = int(answer.lower().partition(b"content-length: ")[2].split()[0])
        await reader.readexactly(length)
        times.append(time.perf_counter() - started)
        status = int(answer.split(b" ", 2)[1])
        if status >= 400:  # noqa: PLR2004
            raise VoidRoundError(f"{name} was answered with {status}")
    writer.close()
    return times


def start(*, quick: bool, seconds: float | None = None) -> Result:
    """Measure, in a short run with few incidents or in a long one."""
    return asyncio.run(
        run(
            rounds=1 if quick else 3,
            seconds=seconds or (0.5 if quick else 2.0),
            incidents=2_000 if quick else INCIDENTS,
        )
    )

"""Measures the synchronous client in threads, against SQLAlchemy's ORM with psycopg."""

from __future__ import annotations

import asyncio
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

from benchmarks.databases import create_database, make
from benchmarks.in_process import IncidentRow
from benchmarks.results import Result, at_least
from benchmarks.rounds import Round, interleave, percentiles, ratio, summary
from incidentkit import SyncIncidentClient
from incidentkit.store import StoreOptions
from tests.servers import PostgresServer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

THREADS: Final = 16
INCIDENTS: Final = 1_000

OF_ONE_THREAD: Final = 3.0
OF_ORM: Final = 1.0


async def run(*, rounds: int, calls: int) -> Result:
    """Measure creates by one and by sixteen threads.

    Args:
        rounds: Rounds of each side.
        calls: Creates in a round of sixteen threads; one thread makes a quarter of them.
    """
    result = Result([], rounds=f"{rounds} rounds of {calls:,} creates by {THREADS} threads")
    table = [["database", "side", "threads", "calls/s", "p50, ms", "p95, ms", "p99, ms"]]
    result.details["Creates in threads"] = table
    async with AsyncExitStack() as stack:
        postgres = stack.enter_context(PostgresServer(durable=True))
        folder = Path(stack.enter_context(TemporaryDirectory()))
        ours, others = [await create_database(postgres.url, name) for name in ("a", "b")]
        await make(ours, [others], INCIDENTS)
        options = StoreOptions(pool_size=THREADS, max_overflow=0)
        engine = create_engine(
            others.replace("postgresql://", "postgresql+psycopg://"), pool_size=THREADS
        )
        stack.callback(engine.dispose)
        new_session = sessionmaker(engine, expire_on_commit=False)
        threads = stack.enter_context(ThreadPoolExecutor(THREADS))

        async def opened(url: str) -> SyncIncidentClient:
            client = SyncIncidentClient.open(url, options=options)
            # The client refuses a thread with an event loop.
            await asyncio.to_thread(client.connect)
            stack.push_async_callback(asyncio.to_thread, client.close)
            return client

        def with_orm(number: int) -> object:
            row = IncidentRow(
                incident_message=f"Disk {number} is full",
                incident_type="new",
                source="monitoring",
                created_at=datetime.now(UTC).replace(microsecond=0),
            )
            with new_session() as session:
                session.add(row)
                session.commit()
            return row.incident_id

        def with_client(client: SyncIncidentClient) -> Callable[[int], object]:
            return lambda number: client.create(f"Disk {number} is full", source="monitoring")

        def side(create: Callable[[int], object], count: int) -> Callable[[int], Awaitable[Round]]:
            each = calls // count if count > 1 else calls // 4
            return lambda _: asyncio.to_thread(_creates, threads, create, count, each)

        on_postgres = with_client(await opened(ours))
        on_sqlite = with_client(await opened(f"sqlite+aiosqlite:///{folder / 'incidents.db'}"))
        kinds = {
            ("PostgreSQL", "incidentkit"): on_postgres,
            ("PostgreSQL", "ORM, psycopg"): with_orm,
            ("SQLite", "incidentkit"): on_sqlite,
        }
        measured = await interleave(
            {
                f"{database}, {name}, {count}": side(create, count)
                for (database, name), create in kinds.items()
                for count in (1, THREADS)
            },
            rounds,
        )
    for name, each in measured.items():
        of = summary(each)
        figures = (f"{of['rate']:,.0f}", *(f"{of[p]:.3f}" for p in ("p50", "p95", "p99")))
        database, *kind, count = name.split(", ")
        table.append([database, ", ".join(kind), count, *figures])
    for database in ("PostgreSQL", "SQLite"):
        many, one = (measured[f"{database}, incidentkit, {count}"] for count in (THREADS, 1))
        what = f"synchronous client on {database}, create, {THREADS} threads"
        result.rows.append(at_least(what, "one thread", OF_ONE_THREAD, ratio(many, one)))
    ours_, orm = (
        measured[f"PostgreSQL, {name}, {THREADS}"] for name in ("incidentkit", "ORM, psycopg")
    )
    what = f"synchronous client on PostgreSQL, create, {THREADS} threads"
    against = "SQLAlchemy ORM with psycopg, as many threads"
    result.rows.append(at_least(what, against, OF_ORM, ratio(ours_, orm)))
    return result


def _creates(
    threads: ThreadPoolExecutor, create: Callable[[int], object], count: int, each: int
) -> Round:
    numbers = itertools.count()
    seconds: list[float] = []

    def work(_: int) -> None:
        for _ in range(each):
            started = time.perf_counter()
            create(next(numbers))
            seconds.append(time.perf_counter() - started)

    started = time.perf_counter()
    list(threads.map(work, range(count)))
    return Round(count * each / (time.perf_counter() - started), percentiles(seconds))


def start(*, rounds: int, calls: int) -> Result:
    """Measure on the event loop of asyncio, on which the client runs too."""
    return asyncio.run(run(rounds=rounds, calls=calls))

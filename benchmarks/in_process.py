"""Measures the SDK in process against asyncpg and SQLAlchemy's ORM: reads, and a bulk create."""

from __future__ import annotations

import asyncio
import itertools
import time
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import asyncpg
import uvloop
from attrs import frozen
from sqlalchemy import BigInteger, DateTime, Enum
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from benchmarks.databases import create_database, make
from benchmarks.results import Result, at_least, at_most
from benchmarks.rounds import Round, interleave, one_core, percentiles, ratio, summary
from incidentkit import IncidentClient, NewIncident
from incidentkit.store import StoreOptions
from tests.servers import PostgresServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

INCIDENTS: Final = 100_000
POOL: Final = 20
MANY_CALLERS: Final = 32
BY_ID: Final = (
    "SELECT incident_id, incident_message, incident_type::text, source::text, created_at "
    'FROM "Incident" WHERE incident_id = $1'
)

OF_ORM: Final = 4.0
OF_ASYNCPG: Final = 1.3
OF_COPY: Final = 0.5


class Base(DeclarativeBase):
    """The mapped classes."""


class IncidentRow(Base):
    """The table, mapped as an application would map it."""

    __tablename__ = "Incident"

    incident_id: Mapped[int] = mapped_column(BigInteger(), primary_key=True)
    incident_message: Mapped[str]
    incident_type: Mapped[str] = mapped_column(
        Enum("new", "completed", "failed", name="incidentstatus")
    )
    source: Mapped[str] = mapped_column(
        Enum("operator", "monitoring", "partner", name="incidentsource")
    )
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))


async def run(*, rounds: int, calls: int, many: int) -> Result:
    """Measure reads by one and by many callers, and a bulk create.

    Args:
        rounds: Rounds of each side.
        calls: Reads in a round.
        many: Incidents of one bulk create.
    """
    result = Result(
        [], rounds=f"{rounds} rounds of {calls:,} calls; 3 of {many:,} incidents for create_many"
    )
    table = [["concurrency", "side", "calls/s", "p50, ms", "p95, ms", "p99, ms"]]
    result.details["Reads by id, in process"] = table
    with one_core():
        async with _sides(INCIDENTS) as sides:
            measured = await _reads(table, sides, 1, rounds, calls)
    what = "SDK in process, get, concurrency 1"
    against = "asyncpg's time, on a pool without reset"
    of_orm = ratio(measured["incidentkit"], measured["ORM"])
    of_asyncpg = 1 / ratio(measured["incidentkit"], measured["asyncpg, no reset"])
    result.rows.append(at_least(what, "SQLAlchemy ORM", OF_ORM, of_orm))
    result.rows.append(at_most(what, against, OF_ASYNCPG, of_asyncpg))
    async with _sides(INCIDENTS) as sides:
        await _reads(table, sides, MANY_CALLERS, rounds, calls)
        await _many(result, sides, many)
    return result


@frozen
class _Sides:
    """The compared sides; asyncpg and the ORM share a database."""

    client: IncidentClient
    pool: asyncpg.Pool[asyncpg.Record]
    pool_without_reset: asyncpg.Pool[asyncpg.Record]
    new_session: Callable[[], Any]


@asynccontextmanager
async def _sides(incidents: int) -> AsyncIterator[_Sides]:
    async with AsyncExitStack() as stack:
        postgres = stack.enter_context(PostgresServer(durable=True))
        ours, others = [await create_database(postgres.url, name) for name in ("a", "b")]
        await make(ours, [others], incidents)
        options = StoreOptions(pool_size=POOL, max_overflow=0)
        engine = create_async_engine(
            others.replace("postgresql://", "postgresql+asyncpg://"), pool_size=POOL
        )
        stack.push_async_callback(engine.dispose)
        yield _Sides(
            await stack.enter_async_context(IncidentClient.open(ours, options=options)),
            await stack.enter_async_context(
                asyncpg.create_pool(others, min_size=POOL, max_size=POOL)
            ),
            await stack.enter_async_context(
                asyncpg.create_pool(others, min_size=POOL, max_size=POOL, reset=_keep_state)
            ),
            async_sessionmaker(engine),
        )


async def _keep_state(_: Any) -> None:
    """Skip the reset, which saves a round trip."""


async def _reads(
    table: list[list[str]], sides: _Sides, concurrency: int, rounds: int, calls: int
) -> dict[str, list[Round]]:
    """Read by id on every side, add the figures to the table, and return the rounds."""

    async def with_orm(incident_id: int) -> object:
        async with sides.new_session() as session:
            return await session.get(IncidentRow, incident_id)

    async def with_asyncpg(incident_id: int) -> object:
        return await sides.pool.fetchrow(BY_ID, incident_id)

    async def without_reset(incident_id: int) -> object:
        return await sides.pool_without_reset.fetchrow(BY_ID, incident_id)

    def round_of(
        read: Callable[[int], Awaitable[object]],
    ) -> Callable[[int], Awaitable[Round]]:
        return lambda number: _calls(read, concurrency, calls, number)

    reads: dict[str, Callable[[int], Awaitable[object]]] = {
        "incidentkit": sides.client.get,
        "asyncpg": with_asyncpg,
        "asyncpg, no reset": without_reset,
        "ORM": with_orm,
    }
    measured = await interleave({name: round_of(read) for name, read in reads.items()}, rounds)
    for name, each in measured.items():
        of = summary(each)
        cells = [f"{of['rate']:,.0f}", *(f"{of[p]:.3f}" for p in ("p50", "p95", "p99"))]
        table.append([str(concurrency), name, *cells])
    return measured


async def _calls(
    read: Callable[[int], Awaitable[object]], concurrency: int, calls: int, number: int
) -> Round:
    ids = itertools.islice(itertools.count(number * calls), calls)
    seconds: list[float] = []

    async def worker() -> None:
        for n in ids:
            started = time.perf_counter()
            found = await read(n * 7919 % INCIDENTS + 1)
            seconds.append(time.perf_counter() - started)
            if found is None:
                raise LookupError(n)

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return Round(calls / (time.perf_counter() - started), percentiles(seconds))


async def _many(result: Result, sides: _Sides, many: int) -> None:
    incidents = [NewIncident(f"Disk {n} of many is full", "partner") for n in range(many)]
    records = [(f"Disk {n} of many is full", "new", "partner") for n in range(many)]

    async def create_many(_: int) -> Round:
        started = time.perf_counter()
        created = await sides.client.create_many(incidents)
        seconds = time.perf_counter() - started
        return Round(many / seconds, {}, errors=many - len(created))

    async def copy(_: int) -> Round:
        started = time.perf_counter()
        await sides.pool.copy_records_to_table(
            "Incident", records=records, columns=["incident_message", "incident_type", "source"]
        )
        return Round(many / (time.perf_counter() - started), {})

    measured = await interleave({"create_many": create_many, "COPY": copy}, 3)
    compared = ratio(measured["create_many"], measured["COPY"])
    what = f"`create_many` of {many:,}, with history and token"
    result.rows.append(at_least(what, "asyncpg's COPY", OF_COPY, compared))
    result.details["Bulk create"] = [
        ["side", "incidents/s"],
        *(
            [name, f"{sum(r.rate for r in each) / len(each):,.0f}"]
            for name, each in measured.items()
        ),
    ]


def start(*, rounds: int, calls: int, many: int) -> Result:
    """Measure on uvloop, the event loop of the service."""
    return uvloop.run(run(rounds=rounds, calls=calls, many=many))

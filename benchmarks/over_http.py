"""Measures the service against its rivals: on PostgreSQL with Redis, and on SQLite alone."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

from benchmarks import services
from benchmarks.databases import create_database, fill_sqlite, make
from benchmarks.results import Result, at_least, at_most
from benchmarks.rounds import Round, VoidRoundError, interleave, ratio, summary
from benchmarks.services import memory_of
from incidentkit.store.migrate import upgrade
from tests.servers import PostgresServer, RedisServer

if TYPE_CHECKING:
    from benchmarks.services import Service

INCIDENTS: Final = 100_000
ON_SQLITE: Final = 10_000

WANTED: Final = {
    "list_cached": ("list, cached, `max_staleness=0`", 10.0, 0.6),
    "list_uncached": ("list, not cached", 4.0, 0.9),
    "get": ("get", 8.0, 1.2),
    "create": ("create, with history and token", 8.0, 1.5),
    "update": ("update-status, with history and token", 8.0, 1.5),
    "mixed": ("95 % list, 5 % update-status", 8.0, None),
}
"""The name of each scenario, and its targets against `plain` and against `floor`."""

ON_SQLITE_WANTED: Final = {"list_cached": ("list, cached", 5.0), "create": ("create", 3.0)}
COLUMNS: Final = ("what", "side", "calls/s", "p50, ms", "p95, ms", "p99, ms", "CPU")
MEMORY_WANTED: Final = 0.8
FLAT: Final = 1.05


async def run(*, rounds: int, seconds: float) -> Result:
    """Measure every scenario against the rivals, and the peak memory of each service.

    Args:
        rounds: Rounds per scenario and side.
        seconds: Length of a round.
    """
    result = Result([], rounds=f"{rounds} rounds of {seconds:g} seconds")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        postgres = stack.enter_context(PostgresServer(durable=True))
        redis = stack.enter_context(RedisServer("--appendonly", "no"))
        databases = [await create_database(postgres.url, name) for name in ("a", "b", "c")]
        await make(databases[0], databases[1:], INCIDENTS)
        server = redis.url.rpartition("/")[0]
        sides = {
            "incidentkit": stack.enter_context(
                services.ours(databases[0], f"{server}/1", folder / "ours.log")
            ),
            "plain": stack.enter_context(
                services.plain(databases[1], f"{server}/2", folder / "plain.log")
            ),
            "floor": stack.enter_context(services.floor(databases[2], folder / "floor.log")),
        }
        for side in sides.values():
            side.servers = (postgres, redis)
        await _scenarios(result, sides, rounds, seconds)
        _memory(result, sides)
        result.details["Peak memory"] += [
            ["PostgreSQL, all three databases, at the end", _mebibytes(memory_of(postgres))],
            ["Redis, at the end", _mebibytes(memory_of(redis))],
        ]
    return result


async def run_soak(*, seconds: float, looks: int) -> Result:
    """Watch the memory of a worker under mixed load.

    Args:
        seconds: Length of the run.
        looks: Samples to take, at least 10.
    """
    result = Result([], rounds=f"one run of {seconds:g} seconds, sampled {looks} times")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        postgres = stack.enter_context(PostgresServer(durable=True))
        redis = stack.enter_context(RedisServer("--appendonly", "no"))
        database = await create_database(postgres.url, "a")
        await make(database, [], INCIDENTS)
        side = stack.enter_context(services.ours(database, redis.url, folder / "ours.log"))
        await _soak(result, side, seconds, looks)
    return result


async def _scenarios(
    result: Result, sides: dict[str, Service], rounds: int, seconds: float
) -> None:
    table = [[*COLUMNS, "CPU of PostgreSQL", "of Redis"]]
    rates: dict[str, list[list[float]]] = {name: [] for name in sides}
    for place, (scenario, (what, of_plain, of_floor)) in enumerate(WANTED.items()):

        async def one(number: int, name: str, scenario: str = scenario) -> Round:
            # The floor caches no list; its limit is a response of fixed bytes.
            asked = "fixed" if (name, scenario) == ("floor", "list_cached") else scenario
            return await sides[name].load(asked, INCIDENTS, seconds, number)

        measured = await interleave({name: partial(one, name=name) for name in sides}, rounds)
        result.rows.append(
            at_least(what, "`plain`", of_plain, ratio(measured["incidentkit"], measured["plain"]))
        )
        if of_floor is not None:
            against = "fixed bytes" if scenario == "list_cached" else "`floor`"
            result.rows.append(
                at_least(what, against, of_floor, ratio(measured["incidentkit"], measured["floor"]))
            )
        for name, each in measured.items():
            table.append([what, name, *_cells(each)])
            rates[name].append([place, summary(each)["rate"]])
    result.details["PostgreSQL and Redis, 32 connections"] = table
    result.series["requests per second"] = rates


def _cells(rounds: list[Round]) -> list[str]:
    of = summary(rounds)
    return [
        f"{of['rate']:,.0f}",
        *(f"{of[name]:.2f}" for name in ("p50", "p95", "p99")),
        *(f"{used:.2f}" for name, used in of.items() if name.startswith("cpu")),
    ]


def _memory(result: Result, sides: dict[str, Service]) -> None:
    peaks = {name: side.peak() for name, side in sides.items()}
    what = "peak memory of a worker under load"
    result.rows.append(
        at_most(what, "`plain`", MEMORY_WANTED, peaks["incidentkit"] / peaks["plain"])
    )
    result.details["Peak memory"] = [
        ["side", "MiB"],
        *([name, _mebibytes(peak)] for name, peak in peaks.items()),
    ]


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.0f}"


async def _soak(result: Result, side: Service, seconds: float, looks: int) -> None:
    """Sample the memory under mixed load; the first tenth of the samples does not count."""
    step = seconds / looks
    points: list[list[float]] = []
    for number in range(looks):
        scenario = ("mixed", "get", "list_uncached", "create")[number % 4]
        done = await side.load(scenario, INCIDENTS, step, number)
        if done.errors:
            raise VoidRoundError(f"{done.errors} calls failed")
        points.append([(number + 1) * step, side.memory() / 2**20])
    early, late = points[looks // 10 : 3 * looks // 10], points[-looks // 5 :]
    grown = max(memory for _, memory in late) / max(memory for _, memory in early)
    what = f"memory after {seconds / 60:g} minutes of load"
    result.rows.append(at_most(what, "memory near the start", FLAT, grown))
    result.series["memory under load, MiB"] = {"incidentkit": points}
    table = [[f"{second:.0f}", f"{memory:.0f}"] for second, memory in points[:: looks // 10]]
    result.details["Memory under load"] = [["seconds", "MiB"], *table]


async def run_sqlite(*, rounds: int, seconds: float) -> Result:
    """Measure on SQLite, without servers.

    Args:
        rounds: Rounds per scenario and side.
        seconds: Length of a round.
    """
    result = Result([], rounds=f"{rounds} rounds of {seconds:g} seconds")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        ours, plain = folder / "ours.db", folder / "plain.db"
        await upgrade(f"sqlite+aiosqlite:///{ours}")
        await asyncio.to_thread(fill_sqlite, ours, plain, ON_SQLITE)
        sides = {
            "incidentkit": stack.enter_context(
                services.ours(f"sqlite+aiosqlite:///{ours}", None, folder / "ours.log")
            ),
            "plain": stack.enter_context(
                services.plain(f"sqlite+aiosqlite:///{plain}", None, folder / "plain.log")
            ),
        }
        table = [[*COLUMNS]]
        for scenario, (what, of_plain) in ON_SQLITE_WANTED.items():

            async def one(number: int, name: str, scenario: str = scenario) -> Round:
                return await sides[name].load(scenario, ON_SQLITE, seconds, number)

            measured = await interleave({name: partial(one, name=name) for name in sides}, rounds)
            compared = ratio(measured["incidentkit"], measured["plain"])
            result.rows.append(
                at_least(f"SQLite, no servers: {what}", "`plain`", of_plain, compared)
            )
            table += [[what, name, *_cells(each)] for name, each in measured.items()]
        result.details["SQLite, 32 connections"] = table
    return result

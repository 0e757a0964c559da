"""Measures how costs change as things grow: the table, a history, readers, processes."""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import time
from contextlib import AsyncExitStack, ExitStack, closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

import uvloop

from benchmarks import services
from benchmarks.databases import create_database, make
from benchmarks.results import Result, at_least, at_most
from benchmarks.rounds import WARM_UP, Round, interleave, medians_in_turn, one_core, ratio
from incidentkit import IncidentClient, ListQuery
from tests.servers import PostgresServer, RedisServer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import TypeAlias

    Call: TypeAlias = Callable[[IncidentClient, int], Awaitable[object]]

FLAT: Final = 1.2
DEEP: Final = 5.0
HITS: Final = (1, 10, 100, 1000)
READERS: Final = (1, 10, 100)
PROCESSES: Final = (1, 2, 4, 8, 16)
FOREIGN_KEYS: Final = 1_000_000
FAR_DOWN: Final = {
    "deep": "pages from 50,000 on, not cached",
    "deep_changed": "pages from 50,000 on, each after a status change",
}


async def run(*, sizes: list[int], rounds: int, seconds: float, quick: bool) -> Result:
    """Measure every kind of growth.

    Args:
        sizes: Incidents in the tables, smallest first.
        rounds: Rounds of each comparison, one call each.
        seconds: How long processes are kept busy.
        quick: Whether to use fewer keys.
    """
    result = Result([], rounds=f"{rounds} calls of each kind, interleaved")
    with one_core(), PostgresServer() as postgres, RedisServer("--appendonly", "no") as redis:
        databases = await _databases(postgres.url, sizes, [])
        await _sizes(result, databases, sizes, rounds)
        await _hits(result, databases[0], rounds)
        await _readers(result, databases[0], rounds)
        await _foreign_keys(result, databases[0], redis, rounds, quick=quick)
    with (
        PostgresServer(settings={"max_connections": "300"}) as postgres,
        RedisServer("--appendonly", "no") as redis,
    ):
        rival = await create_database(postgres.url, "rival")
        middle, largest = await _databases(postgres.url, sizes[1:], [rival])
        await _processes(result, middle, redis.url, seconds)
        await _far_down(result, largest, rival, redis.url, sizes[-1], seconds)
    return result


async def _databases(server: str, sizes: list[int], rivals: list[str]) -> list[str]:
    """Create a database of each size; rivals get the largest."""
    databases = [await create_database(server, f"n{size}") for size in sizes]
    for size, database in zip(sizes, databases, strict=True):
        await make(database, rivals if size == sizes[-1] else [], size)
    return databases


def _calls(size: int) -> dict[str, Call]:
    return {
        "list, first page, not cached": lambda client, n: client.store.list(
            ListQuery(1 + n % 5, 10)
        ),
        "list, by status and source, not cached": lambda client, n: client.store.list(
            ListQuery(1 + n % 5, 10, "new", "partner")
        ),
        "get": lambda client, n: client.get(1 + n % min(size, 1000)),
        "create": lambda client, n: client.create(f"Disk {n} is full", source="partner"),
    }


async def _sizes(result: Result, databases: list[str], sizes: list[int], rounds: int) -> None:
    table = [["call", *(f"{size:,}, ms" for size in sizes)]]
    lines: dict[str, list[list[float]]] = {}
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(IncidentClient.open(database)) for database in databases
        ]
        cursors = [await _cursor(client, size) for client, size in zip(clients, sizes, strict=True)]
        kinds: dict[str, Callable[[int, int], Awaitable[object]]] = {
            name: partial(_one, clients, name, sizes) for name in _calls(sizes[0])
        }
        kinds["search, from a cursor in the middle"] = lambda place, _: clients[place].search(
            after=cursors[place]
        )
        for name, call in kinds.items():
            medians = await medians_in_turn(call, len(sizes), rounds)
            table.append([name, *(f"{median * 1000:.3f}" for median in medians)])
            lines[name] = [
                [size, median * 1000] for size, median in zip(sizes, medians, strict=True)
            ]
            what = f"{sizes[-1]:,} incidents: {name}"
            against = f"the time with {sizes[0]:,}"
            result.rows.append(at_most(what, against, FLAT, medians[-1] / medians[0]))
    result.details["Time by number of incidents"] = table
    result.series["milliseconds per call, by number of incidents"] = lines


def _one(
    clients: list[IncidentClient], name: str, sizes: list[int], place: int, number: int
) -> Awaitable[object]:
    return _calls(sizes[place])[name](clients[place], number)


async def _cursor(client: IncidentClient, size: int) -> str | None:
    """Return a cursor from the middle of all incidents."""
    (incident,) = (await client.store.list(ListQuery(size // 2, 1))).incidents
    page = await client.search(created_before=incident.created_at, limit=1)
    return page.next


async def _hits(result: Result, database: str, rounds: int) -> None:
    """Repeat deduplication keys: the thousandth repetition must cost what the first does."""
    keys = max(2, rounds // 20)
    async with IncidentClient.open(database) as client:

        async def occur(place: int, number: int) -> None:
            key = f"key-{HITS[place]}-{number}"
            await client.create("Disk is full", source="partner", dedup_key=key)

        for place, hits in enumerate(HITS):
            for number in range(keys + WARM_UP):
                for _ in range(hits):
                    await occur(place, number)
        medians = await medians_in_turn(occur, len(HITS), keys)
    points = [[hits, median * 1000] for hits, median in zip(HITS, medians, strict=True)]
    result.series["milliseconds per repetition, by earlier repetitions"] = {"create": points}
    what = f"a repetition after {HITS[-1]:,} others"
    result.rows.append(at_most(what, "the time of the first", FLAT, medians[-1] / medians[0]))


async def _readers(result: Result, database: str, rounds: int) -> None:
    """Measure how soon all waiting readers have a change."""
    points: list[list[float]] = []
    async with IncidentClient.open(database) as client:
        for readers in READERS:
            seconds = []
            latest = (await client.read_changes("latest")).next
            for number in range(max(5, rounds // 10)):
                waiting = [
                    asyncio.ensure_future(client.read_changes(latest, wait=10.0))
                    for _ in range(readers)
                ]
                await asyncio.sleep(0.02)
                started = time.perf_counter()
                await client.create(f"Disk {number} is full", source="partner")
                pages = await asyncio.gather(*waiting)
                seconds.append(time.perf_counter() - started)
                latest = pages[0].next
            points.append([readers, statistics.median(seconds) * 1000])
    result.series["milliseconds until every reader has the change"] = {"readers": points}
    result.details["Feed latency"] = [
        ["readers", "until all have the change, ms"],
        *([f"{readers:.0f}", f"{median:.2f}"] for readers, median in points),
    ]


async def _foreign_keys(
    result: Result, database: str, redis: RedisServer, rounds: int, *, quick: bool
) -> None:
    """Fill Redis with unrelated keys, which must not slow down a write and a list."""
    count = FOREIGN_KEYS // 10 if quick else FOREIGN_KEYS
    server = redis.url.rpartition("/")[0]
    with closing(redis.client()) as filler:
        filler.select(5)
        for first in range(0, count, 10_000):
            filler.mset({f"foreign:{n}": b"x" * 20 for n in range(first, first + 10_000)})
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(IncidentClient.open(database, f"{server}/{number}"))
            for number in (4, 5)
        ]

        async def write_and_list(place: int, number: int) -> None:
            await clients[place].create(f"Disk {number} is full", source="partner")
            await clients[place].list()

        medians = await medians_in_turn(write_and_list, 2, rounds)
    what = f"a write and a list, with {count:,} unrelated keys in Redis"
    result.rows.append(at_most(what, "the time with none", FLAT, medians[1] / medians[0]))


async def _processes(result: Result, database: str, redis: str, seconds: float) -> None:
    """Count the calls of several client processes that list and write together."""
    rates: dict[int, list[float]] = {processes: [] for processes in PROCESSES}
    for _ in range(3):
        for processes, measured in rates.items():
            measured.append(await _together(processes, database, redis, seconds))
    points = [[float(processes), statistics.median(of)] for processes, of in rates.items()]
    result.series["calls per second of all client processes"] = {"95 % list, 5 % create": points}
    result.details["Client processes on one database"] = [
        ["processes", "calls/s in total"],
        *([f"{processes:.0f}", f"{rate:,.0f}"] for processes, rate in points),
    ]


async def _together(processes: int, database: str, redis: str, seconds: float) -> float:
    """Start processes, release them once all are ready, and return their calls per second."""
    running = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.growth", database, redis, str(seconds)),
            cwd=services.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(processes)
    ]
    for process in running:
        if process.stdout is not None:
            await process.stdout.readline()
    outputs = await asyncio.gather(*(process.communicate(b"go\n") for process in running))
    return sum(float(output) for output, _ in outputs)


async def _work(database: str, redis: str, seconds: float) -> float:
    async with IncidentClient.open(database, redis) as client:
        await client.list()
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        started = time.perf_counter()
        ends_at = started + seconds
        calls = 0

        async def worker() -> None:
            nonlocal calls
            while time.perf_counter() < ends_at:
                calls += 1
                if calls % 20:
                    await client.list()
                else:
                    await client.create("Disk is full", source="partner")

        await asyncio.gather(*(worker() for _ in range(8)))
        return calls / (time.perf_counter() - started)


async def _far_down(  # noqa: PLR0913, PLR0917
    result: Result, database: str, rival: str, redis: str, size: int, seconds: float
) -> None:
    """Request deep pages by number, as the origin's clients can, each of them once."""
    server = redis.rpartition("/")[0]
    with TemporaryDirectory() as folder, ExitStack() as stack:
        sides = {
            "incidentkit": stack.enter_context(
                services.ours(database, f"{server}/6", Path(folder) / "ours.log")
            ),
            "plain": stack.enter_context(
                services.plain(rival, f"{server}/7", Path(folder) / "plain.log")
            ),
        }

        for scenario, what in FAR_DOWN.items():

            async def one(number: int, name: str, scenario: str = scenario) -> Round:
                place = number * (size // 10 - 50_000) // 4
                return await sides[name].load(scenario, size, min(seconds, 2.0), place)

            measured = await interleave({name: partial(one, name=name) for name in sides}, 3)
            compared = ratio(measured["incidentkit"], measured["plain"])
            result.rows.append(at_least(what, "`plain`", DEEP, compared))


def start(
    *,
    quick: bool,
    sizes: list[int] | None = None,
    rounds: int | None = None,
    seconds: float | None = None,
) -> Result:
    """Measure on uvloop, the event loop of the service."""
    sizes = sizes or ([1_000, 10_000, 600_000] if quick else [1_000, 100_000, 1_000_000])
    rounds = rounds or (40 if quick else 400)
    seconds = seconds or (1.0 if quick else 4.0)
    return uvloop.run(run(sizes=sizes, rounds=rounds, seconds=seconds, quick=quick))


if __name__ == "__main__":
    print(uvloop.run(_work(sys.argv[1], sys.argv[2], float(sys.argv[3]))))

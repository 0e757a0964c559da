"""Measures calls of the incidentkit on PYTHONPATH: `python -P side.py DATABASE INCIDENTS`.

The first line of output is the file of the package that was imported. After that each line of input
is a request, ``[call, callers, seconds]``, and is answered by a line with the rate.

This program uses public names only, because it runs on checkouts of different ages.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from typing import TYPE_CHECKING, Any

import uvloop

import incidentkit
from incidentkit import IncidentClient, NewIncident

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

CONSTRUCTED = 100
"""Incidents constructed between two reads of the clock."""


def single_calls(
    client: IncidentClient, incidents: int
) -> dict[str, Callable[[int], Awaitable[Any]]]:
    """Return the calls that are made one by one, by name."""
    return {
        "get": lambda n: client.get(n * 7919 % incidents + 1),
        "create": lambda n: client.create(f"Disk {n} is full", source="partner"),
        "list": lambda _: client.list(),
        "search": lambda _: client.search(),
    }


async def rate_of_calls(
    call: Callable[[int], Awaitable[Any]], callers: int, seconds: float, numbers: Iterator[int]
) -> float:
    """Return the calls per second that some callers reach together."""
    started = time.perf_counter()
    ends_at = started + seconds
    done = 0

    async def caller() -> None:
        nonlocal done
        while True:
            await call(next(numbers))
            done += 1
            if time.perf_counter() >= ends_at:
                return

    await asyncio.gather(*(caller() for _ in range(callers)))
    return done / (time.perf_counter() - started)


async def rate_of_create_many(client: IncidentClient, many: int) -> float:
    """Return the incidents per second that one `create_many` stores."""
    incidents = [NewIncident(f"Disk {n} of many is full", "partner") for n in range(many)]
    started = time.perf_counter()
    await client.create_many(incidents)
    return many / (time.perf_counter() - started)


def rate_of_construction(seconds: float) -> float:
    """Return how many incidents are constructed and validated per second."""
    started = time.perf_counter()
    ends_at = started + seconds
    done = 0
    while time.perf_counter() < ends_at or not done:
        for n in range(CONSTRUCTED):
            NewIncident(f"Disk {n} is full", "partner")
        done += CONSTRUCTED
    return done / (time.perf_counter() - started)


def main() -> None:
    """Open a client, print the file of its package, and run the requested measurements."""
    database, incidents = sys.argv[1], int(sys.argv[2])
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        client = IncidentClient.open(database)
        runner.run(client.connect())
        print(json.dumps(incidentkit.__file__), flush=True)
        calls, numbers = single_calls(client, incidents), itertools.count()
        for line in sys.stdin:
            call, callers, seconds = json.loads(line)
            if call == "construct":
                rate = rate_of_construction(seconds)
            elif call == "create_many":
                rate = runner.run(rate_of_create_many(client, callers))
            else:
                rate = runner.run(rate_of_calls(calls[call], callers, seconds, numbers))
            print(json.dumps(rate), flush=True)
        runner.run(client.close())


if __name__ == "__main__":
    main()

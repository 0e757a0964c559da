"""Rounds in which the sides that are compared take turns, and what comes of them."""

from __future__ import annotations

import os
import statistics
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from attrs import frozen

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

PERCENTILES: Final = (50, 95, 99)

WARM_UP: Final = 10
"""Single calls that come first and are not counted."""


class VoidRoundError(RuntimeError):
    """A round had an error, so that its figures mean nothing."""


@frozen
class Round:
    """What one side did in one round.

    Attributes:
        rate: Calls a second.
        latency: Milliseconds by percentile.
        cpu: Seconds of a processor for each second, of the process that is measured.
        errors: Calls that failed.
        servers: The same as ``cpu`` of PostgreSQL and of Redis.
    """

    rate: float
    latency: Mapping[int, float]
    cpu: float = 0.0
    errors: int = 0
    servers: Sequence[float] = ()


async def interleave(
    sides: Mapping[str, Callable[[int], Awaitable[Round]]], rounds: int
) -> dict[str, list[Round]]:
    """Let the sides take turns, so that whatever else the machine does falls on all alike.

    Args:
        sides: By name, what runs one round; it is told which.
        rounds: Rounds of each side. One more comes first, and is not counted.

    Raises:
        VoidRoundError: If a round had an error.
    """
    measured: dict[str, list[Round]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            done = await run(number)
            if done.errors:
                raise VoidRoundError(f"{done.errors} calls of {name} failed")
            if number:
                measured[name].append(done)
    return measured


async def medians_in_turn(
    call: Callable[[int, int], Awaitable[object]], places: int, rounds: int
) -> list[float]:
    """Return the median of the seconds that a call takes at each place, in turn."""
    seconds: list[list[float]] = [[] for _ in range(places)]
    for number in range(WARM_UP + rounds):
        for place in range(places):
            started = time.perf_counter()
            await call(place, number)
            if number >= WARM_UP:
                seconds[place].append(time.perf_counter() - started)
    return [statistics.median(each) for each in seconds]


@contextmanager
def one_core() -> Iterator[None]:
    """Keep this process, and what it starts meanwhile, on one processor, where the system can.

    Of calls that are made one after the other, what they take is compared then, and not where the
    system has put the process behind each connection: to wake another processor takes longer than
    many a statement.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def ratio(ours: Sequence[Round], others: Sequence[Round]) -> float:
    """Return the median of the ratios of the rates, round by round."""
    return statistics.median(one.rate / other.rate for one, other in zip(ours, others, strict=True))


def percentiles(seconds: Sequence[float]) -> dict[int, float]:
    """Return the percentiles of some times, in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {percent: cuts[percent - 1] * 1000 for percent in PERCENTILES}


def summary(rounds: Sequence[Round]) -> dict[str, float]:
    """Return the medians of what some rounds were like."""
    return {
        "rate": statistics.median(each.rate for each in rounds),
        "cpu": statistics.median(each.cpu for each in rounds),
        **{
            f"cpu of server {number}": statistics.median(cpus)
            for number, cpus in enumerate(zip(*(each.servers for each in rounds), strict=True))
        },
        **{
            f"p{percent}": statistics.median(each.latency[percent] for each in rounds)
            for percent in PERCENTILES
        },
    }

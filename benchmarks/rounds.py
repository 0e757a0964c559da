"""Interleaved rounds, and the statistics made of them."""

from __future__ import annotations

import os
import statistics
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from attrs import field, frozen

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

PERCENTILES: Final = (50, 95, 99)

WARM_UP: Final = 10
"""Single calls that run first and are not counted."""

WARM_UP_ROUNDS: Final = 1
"""Rounds of each side that run first and are not counted."""


class VoidRoundError(RuntimeError):
    """A call in a round failed, so the figures of the run are void."""


@frozen
class Round:
    """The figures of one side in one round.

    Attributes:
        rate: Calls per second.
        latency: Milliseconds by percentile.
        cpu: Cores that the measured process kept busy: CPU seconds per second.
        errors: Calls that failed.
        servers: The same as ``cpu``, for PostgreSQL and for Redis.
        costs: Other costs of one call, by name.
    """

    rate: float
    latency: Mapping[int, float]
    cpu: float = 0.0
    errors: int = 0
    servers: Sequence[float] = ()
    costs: Mapping[str, float] = field(factory=dict)


async def interleave(
    sides: Mapping[str, Callable[[int], Awaitable[Round]]],
    rounds: int,
    *,
    alternate: bool = False,
) -> dict[str, list[Round]]:
    """Run the sides in turn, so that other load on the machine affects all of them alike.

    Args:
        sides: A function for each side that runs one round, given its number.
        rounds: Rounds of each side, which follow :data:`WARM_UP_ROUNDS`.
        alternate: Whether every other round runs the sides in reverse order.

    Raises:
        VoidRoundError: If a call failed.
    """
    measured: dict[str, list[Round]] = {name: [] for name in sides}
    for number in range(1 - WARM_UP_ROUNDS, rounds + 1):
        turns = list(sides.items())
        for name, run in reversed(turns) if alternate and number % 2 else turns:
            done = await run(number)
            if done.errors:
                raise VoidRoundError(f"{done.errors} calls of {name} failed")
            if number > 0:
                measured[name].append(done)
    return measured


async def medians_in_turn(
    call: Callable[[int, int], Awaitable[object]], places: int, rounds: int
) -> list[float]:
    """Return the median seconds of a call at each place, with the places taken in turn."""
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
    """Pin this process, and every process that it starts meanwhile, to one core.

    Waking another core takes longer than many statements do. Without pinning, sequential calls
    measure where the scheduler has placed the process behind each connection. On a system that
    cannot pin processes, this does nothing.
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
    """Return the median of the round-by-round ratios of the rates."""
    return statistics.median(one.rate / other.rate for one, other in zip(ours, others, strict=True))


def percentiles(seconds: Sequence[float]) -> dict[int, float]:
    """Return percentiles of durations, in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {percent: cuts[percent - 1] * 1000 for percent in PERCENTILES}


def summary(rounds: Sequence[Round]) -> dict[str, float]:
    """Return the median of each figure over rounds."""
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

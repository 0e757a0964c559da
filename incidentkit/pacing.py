"""Let other tasks and threads run during a long computation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from time import perf_counter
from typing import Final, TypeVar
from weakref import WeakKeyDictionary

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

BURST: Final = 0.001
"""Seconds of a computation after which others run."""

PAUSE: Final = 0.001
"""Seconds for which others run.

A turn of the event loop would not be enough. It releases the interpreter for so short a time that a
waiting thread does not get it, and starts its wait again.
"""


STEP: Final = 50
"""Number of items in a part; the clock is read after each part."""

_turns: Final[WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock]] = WeakKeyDictionary()


NOTHING_ELSE_RUNS: Final[ContextVar[bool]] = ContextVar(
    "incidentkit_nothing_else_runs", default=False
)
"""Whether a computation lets nothing run in between, since its coroutine must not suspend."""


async def in_parts(
    compute: Callable[[Sequence[_Item]], _Result], items: Sequence[_Item]
) -> list[_Result]:
    """Process many items in parts, and let other tasks run in between.

    On each event loop, one caller computes at a time, and for at most half of the time. Other tasks
    wait for at most one burst, however many callers there are.

    Args:
        compute: Called with at most :data:`STEP` items, which should take well less than
            :data:`BURST`; with all of them if nothing else runs.
        items: The items.

    Returns:
        The result for each part, in order.
    """
    if len(items) <= STEP or NOTHING_ELSE_RUNS.get():
        return [compute(items)]
    results = []
    async with _turns.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
        due = perf_counter() + BURST
        for start in range(0, len(items), STEP):
            results.append(compute(items[start : start + STEP]))
            if perf_counter() >= due:
                await asyncio.sleep(PAUSE)
                due = perf_counter() + BURST
    return results

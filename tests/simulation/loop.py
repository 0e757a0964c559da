"""An event loop with simulated time, whose order of events is determined by a seed."""

from __future__ import annotations

import asyncio
import heapq
from contextvars import Context, ContextVar
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, TypeVarTuple, Unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from random import Random

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")

_Ready: TypeAlias = "tuple[asyncio.Handle, str | None]"

PROCESS: ContextVar[str | None] = ContextVar("PROCESS", default=None)
"""The simulated process that is running; None: none of them."""

SERVERS = Context()
"""The context of events outside all processes, which are never held."""


class SimulatedLoop(asyncio.BaseEventLoop):
    """An event loop without input, output or threads.

    A random one of the ready callbacks runs next. Callbacks take no time: when none is ready, the
    time advances to the next timer.

    Args:
        random: Chooses the next callback.
    """

    def __init__(self, random: Random) -> None:
        super().__init__()
        self._random = random
        self._now = 0.0
        self._order = count()
        self._soon: list[_Ready] = []
        self._later: list[tuple[float, int, _Ready]] = []
        self._held: dict[str, list[_Ready]] = {}

    def time(self) -> float:
        """Return the simulated seconds since the start."""
        return self._now

    def call_soon(
        self,
        callback: Callable[[Unpack[_Ts]], object],
        *args: *_Ts,
        context: Context | None = None,
    ) -> asyncio.Handle:
        """Schedule a callback for the current time, in random order."""
        handle = asyncio.Handle(callback, args, self, context)
        self._soon.append((handle, _process_of(context)))
        return handle

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[_Ts]], object],
        *args: *_Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Schedule a callback for that time."""
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._later, (when, next(self._order), (handle, _process_of(context))))
        return handle

    def hold(self, process: str) -> None:
        """Suspend the process."""
        self._held.setdefault(process, [])

    def release(self, process: str) -> None:
        """Resume the process with all the callbacks that it missed."""
        self._soon += self._held.pop(process, [])

    def release_all(self) -> None:
        """Resume every process."""
        for process in list(self._held):
            self.release(process)

    def run(self, main: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine, cancel the tasks that it left behind, and return its result."""
        asyncio.events._set_running_loop(self)
        try:
            task = self.create_task(main)
            self._run_until(task.done)
            # The tasks of a killed process end only now.
            self.set_exception_handler(_ignore)
            self.release_all()
            while left := asyncio.all_tasks(self):
                for one in left:
                    one.cancel()
                self._run_until(partial(_are_done, left))
            return task.result()
        finally:
            asyncio.events._set_running_loop(None)
            self.close()

    def _run_until(self, done: Callable[[], bool]) -> None:
        while not done():
            if not self._soon:
                self._advance()
            last = len(self._soon) - 1
            chosen = self._random.randint(0, last) if last else 0
            self._soon[chosen], self._soon[last] = self._soon[last], self._soon[chosen]
            handle, process = self._soon.pop()
            if process is not None and process in self._held:
                self._held[process].append((handle, process))
            elif not handle.cancelled():
                handle._run()

    def _advance(self) -> None:
        """Advance the time to the next timer."""
        if not self._later:
            raise RuntimeError("Deadlock: every task waits, and there is no timer left")
        self._now = max(self._now, self._later[0][0])
        while self._later and self._later[0][0] <= self._now:
            self._soon.append(heapq.heappop(self._later)[2])


def _are_done(tasks: set[asyncio.Task[Any]]) -> bool:
    return all(task.done() for task in tasks)


def _ignore(_: asyncio.AbstractEventLoop, __: dict[str, Any]) -> None:
    """Ignore errors of calls that were ended."""


def _process_of(context: Context | None) -> str | None:
    return PROCESS.get() if context is None else context.get(PROCESS)

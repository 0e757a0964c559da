"""Concurrent calls for the same thing that share one run."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable

PATIENCE: Final = 0.1
"""Seconds that a run waits for the one before it, which may have met a server that hangs."""

_K = TypeVar("_K", bound="Hashable")
_T = TypeVar("_T")


class Coalescer(Generic[_K, _T]):
    """Lets calls with the same key share a run, but only one that has not started.

    So an answer is never older than the call that gets it. A run waits for the one before it with
    the same key, for :data:`PATIENCE` at most; meanwhile calls gather. A call that is cancelled
    leaves the others; a run that nobody waits for any more is cancelled.

    Args:
        run: What is to be run for a key. What it raises, every call that shares the run raises.
    """

    def __init__(self, run: Callable[[_K], Awaitable[_T]]) -> None:
        self._run = run
        self._latest: dict[_K, _Run[_T]] = {}
        self._running: set[asyncio.Task[_T]] = set()

    async def __call__(self, key: _K) -> _T:
        """Return what a run returns that starts during this call."""
        latest = self._latest.get(key)
        if latest is None or latest.started:
            latest = self._latest[key] = self._begin(key, latest)
        return await latest.result()

    async def finish(self) -> None:
        """Wait until every run has ended."""
        while self._running:
            await asyncio.wait(self._running)

    def _begin(self, key: _K, previous: _Run[_T] | None) -> _Run[_T]:
        async def start() -> _T:
            if previous is not None and not previous.task.done():
                await asyncio.wait([previous.task], timeout=PATIENCE)
            run.started = True
            return await self._run(key)

        def forget(task: asyncio.Task[_T]) -> None:
            self._running.discard(task)
            if self._latest.get(key) is run:
                del self._latest[key]

        run = _Run(asyncio.ensure_future(start()))
        self._running.add(run.task)
        run.task.add_done_callback(forget)
        return run


class _Run(Generic[_T]):
    """One run, and how many calls wait for it."""

    def __init__(self, task: asyncio.Task[_T]) -> None:
        self.task = task
        self.started = False
        self._callers = 0

    async def result(self) -> _T:
        self._callers += 1
        try:
            return await asyncio.shield(self.task)
        finally:
            self._callers -= 1
            if not self._callers and not self.task.done():
                # Nobody may join a run that is about to end.
                self.started = True
                self.task.cancel()

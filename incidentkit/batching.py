"""Let concurrent calls share one run: a statement, or a round trip.

A call joins only a run that has not started. No answer is therefore older than the call that gets
it, and without load a call starts its own run at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextvars import Context
from copy import copy
from functools import partial
from itertools import chain
from typing import Final, Generic, TypeAlias, TypeVar

from incidentkit.domain.errors import IncidentKitError
from incidentkit.observing import CALLERS

PATIENCE: Final = 0.1
"""Maximum seconds that calls wait for earlier runs, whose server may hang."""

_K = TypeVar("_K", bound=Hashable)
_I = TypeVar("_I")
_T = TypeVar("_T")


_Callers: TypeAlias = tuple[object, ...]


class Batcher(Generic[_I, _T]):
    """Gathers the items of calls into batches, and runs a limited number of batches at a time.

    While the maximum number of batches is running, calls gather for the next batch, for at most
    :data:`PATIENCE`. A batch belongs to no caller: it runs in its own context, without the context
    variables of any caller; :data:`~incidentkit.observing.CALLERS` has those of all. A cancelled
    call does not affect the others; if its batch has not started, the batch does not contain its
    item. A batcher belongs to the event loop of its first call.

    Args:
        run: Takes the items of a batch and returns an answer for each. An answer that is an
            exception is raised in its call alone. An exception raised by ``run`` is raised in
            every call of the batch.
        running: Maximum number of batches that run at a time, at least 1.
        patient: Whether calls wait for earlier batches for as long as these take.
        size: Maximum number of items in a batch, at least 1; None: no maximum.
        when_idle: Called when the last batch has ended and no call is waiting.
        abandon: Whether a batch is cancelled once all its calls are cancelled.
        forget: Whether waiting items are dropped if a batch is cancelled, as at the end of the
            event loop; for items whose answer is not awaited.
    """

    def __init__(  # noqa: PLR0913
        self,
        run: Callable[[list[_I]], Awaitable[Sequence[_T | Exception]]],
        *,
        running: int = 1,
        patient: bool = False,
        size: int | None = None,
        when_idle: Callable[[], object] | None = None,
        abandon: bool = False,
        forget: bool = False,
    ) -> None:
        self._run = run
        self._limit = running
        self._patient = patient
        self._size = size
        self._when_idle = when_idle
        self._abandon = abandon
        self._forget = forget
        self._waiting: list[tuple[_I, asyncio.Future[_T], _Callers]] = []
        self._running: set[asyncio.Task[None]] = set()
        # The newest of these, until it takes the waiting items.
        self._starting: asyncio.Task[None] | None = None
        self._patience: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __call__(self, item: _I) -> asyncio.Future[_T]:
        """Return the answer for the item, from a batch that starts during this call."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        answer: asyncio.Future[_T] = self._loop.create_future()
        self._waiting.append((item, answer, CALLERS.get()))
        if self._starting is None:
            self._schedule()
        return answer

    def __len__(self) -> int:
        """Return the number of calls that wait for a batch to start."""
        return len(self._waiting)

    async def finish(self) -> None:
        """Wait until every call has been answered, and every batch has ended."""
        while self._running or self._waiting:
            if self._running:
                await asyncio.wait(self._running)
            else:
                # A batch of one has answered; its end, in the next turn, starts the next batch.
                await asyncio.sleep(0)

    def _schedule(self) -> None:
        """Start a batch for the waiting items, now or when the patience ends."""
        if len(self._running) < self._limit:
            self._start()
        elif self._patience is None and not self._patient:
            loop = asyncio.get_running_loop()
            self._patience = loop.call_later(PATIENCE, self._start, context=Context())

    def _stop_timer(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _start(self) -> None:
        self._stop_timer()
        # Not loop.create_task(): an eager task factory would run the batch at once, with one item.
        context = Context()
        self._starting = task = asyncio.Task(self._work(), loop=self._loop, context=context)
        self._running.add(task)
        task.add_done_callback(self._end, context=context)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if task is self._starting:
            # Cancelled before its first step, as when every task of the loop is cancelled.
            self._starting = None
        if self._forget and task.cancelled():
            self._waiting.clear()
            self._stop_timer()
        if self._waiting:
            if self._starting is None:
                self._schedule()
        elif not self._running and self._when_idle is not None:
            self._when_idle()

    async def _work(self) -> None:
        # Take the items only now, so that all calls of this turn of the loop share the batch.
        task, self._starting = self._starting, None
        count = len(self._waiting) if self._size is None else self._size
        waiting, self._waiting = self._waiting[:count], self._waiting[count:]
        if self._waiting:
            self._schedule()
        batch = [(item, answer) for item, answer, _ in waiting if not answer.done()]
        if task is None or not batch:
            return
        callers = chain.from_iterable(each for _, answer, each in waiting if not answer.done())
        CALLERS.set((*{id(caller): caller for caller in callers}.values(),))
        if self._abandon:
            _cancel_with([answer for _, answer in batch], task)
        results = await _run(batch, self._run)
        if len(batch) == 1:
            # Free the slot now for a lone caller. With many, keep it: the next batch grows.
            self._running.discard(task)
        for (_, answer), result in zip(batch, results, strict=True):
            if answer.done():
                continue
            if isinstance(result, Exception):
                answer.set_exception(result)
            else:
                answer.set_result(result)


def _cancel_with(answers: list[asyncio.Future[_T]], batch: asyncio.Task[None]) -> None:
    """Cancel a batch once all its answers are cancelled."""

    def check(_: asyncio.Future[_T]) -> None:
        if all(answer.cancelled() for answer in answers):
            batch.cancel()

    for answer in answers:
        answer.add_done_callback(check)


async def _run(
    batch: list[tuple[_I, asyncio.Future[_T]]],
    run: Callable[[list[_I]], Awaitable[Sequence[_T | Exception]]],
) -> Sequence[_T | Exception]:
    """Run a batch, and return the answer for each call; an exception is raised in the call."""
    try:
        answers = await run([item for item, _ in batch])
    except Exception as error:  # noqa: BLE001
        return [error, *(_copy_of(error) for _ in batch[1:])]
    except BaseException:
        for _, answer in batch:
            answer.cancel()
        raise
    if len(answers) != len(batch):
        # It is unknown which answer belongs to which call.
        return [RuntimeError(f"{len(answers)} answers for {len(batch)} calls")] * len(batch)
    return answers


def _copy_of(error: Exception) -> Exception:
    """Return a copy for another call, so that a note added by one caller is not seen by others."""
    if type(error).__module__ != IncidentKitError.__module__:
        # Only our own exceptions can be copied safely.
        return error
    other = copy(error).with_traceback(error.__traceback__)
    if hasattr(error, "__notes__"):
        other.__notes__ = list(error.__notes__)
    other.__cause__ = error.__cause__
    return other


class Coalescer(Generic[_K, _T]):
    """Lets calls with the same key share a run; calls with different keys are independent.

    Args:
        run: Returns the answer for a key. An exception is raised in every call that shares the run.
        verify: Called with an answer before several calls get it. None: any answer can be shared.
        abandon: Whether a run is cancelled once all its calls are cancelled.
    """

    def __init__(
        self,
        run: Callable[[_K], Awaitable[_T]],
        *,
        verify: Callable[[_T], Awaitable[None]] | None = None,
        abandon: bool = False,
    ) -> None:
        self._run = run
        self._verify = verify
        self._abandon = abandon
        self._batchers: dict[_K, Batcher[None, _T]] = {}

    def __call__(self, key: _K) -> asyncio.Future[_T]:
        """Return the answer of a run that starts during this call."""
        batcher = self._batchers.get(key)
        if batcher is None:
            batcher = self._batchers[key] = Batcher(
                partial(self._run_for_all, key),
                when_idle=lambda: self._forget(key, batcher),
                abandon=self._abandon,
            )
        return batcher(None)

    async def finish(self) -> None:
        """Wait until every run has ended."""
        while self._batchers:
            await asyncio.gather(*(batcher.finish() for batcher in self._batchers.values()))

    def _forget(self, key: _K, batcher: Batcher[None, _T] | None) -> None:
        # A newer batcher may have replaced this one while its last runs were ending.
        if self._batchers.get(key) is batcher:
            del self._batchers[key]

    async def _run_for_all(self, key: _K, calls: Sequence[None]) -> Sequence[_T]:
        answer = await self._run(key)
        if self._verify is not None and len(calls) > 1:
            await self._verify(answer)
        return [answer] * len(calls)

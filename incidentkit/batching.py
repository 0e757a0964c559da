"""Calls that wait at the same time and share one run: a statement, or a round trip.

A call joins only a run that has not started. So no answer is older than the call that gets it, and
where there is no load a call starts a run of its own at once.
"""

from __future__ import annotations

import asyncio
from contextvars import Context
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from incidentkit.domain.errors import IncidentKitError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable, Sequence

PATIENCE: Final = 0.1
"""Seconds that calls wait for runs before theirs, which may have met a server that hangs."""

_K = TypeVar("_K", bound="Hashable")
_I = TypeVar("_I")
_T = TypeVar("_T")


class Batcher(Generic[_I, _T]):
    """Gathers the items of calls into batches, of which only some run at a time.

    While as many run as may, calls gather for the next batch, for :data:`PATIENCE` at most. A
    batch runs in a context of its own, in which no context variable of a caller is set. A call
    that is cancelled leaves the others; one that is cancelled before its batch starts takes its
    item along. It belongs to the event loop that it is first used in.

    Args:
        run: Takes the items of a batch and returns an answer for each: an exception is raised to
            that call alone. What it raises itself, each call of the batch raises.
        running: Batches that run at a time, at least 1.
        patient: Whether calls wait for the batches before theirs as long as these take.
        size: Items that a batch has at most, at least 1; None means any number.
        when_idle: Called when the last batch has ended and no call waits.
        abandon: Whether a batch is cancelled once every call in it has been.
        forget: Whether what waits is forgotten if a batch is cancelled, as at the end of the loop;
            for what nobody waits for.
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
        self._waiting: list[tuple[_I, asyncio.Future[_T]]] = []
        self._running: set[asyncio.Task[None]] = set()
        # The youngest of these, if it has yet to take what waits.
        self._starting: asyncio.Task[None] | None = None
        self._patience: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __call__(self, item: _I) -> asyncio.Future[_T]:
        """Return the answer for the item, from a batch that starts during this call."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        answer: asyncio.Future[_T] = self._loop.create_future()
        self._waiting.append((item, answer))
        if self._starting is None:
            self._go_on()
        return answer

    def __len__(self) -> int:
        """Return how many calls wait for a batch to start."""
        return len(self._waiting)

    async def finish(self) -> None:
        """Wait until every call has been answered, and every batch has ended."""
        while self._running or self._waiting:
            if self._running:
                await asyncio.wait(self._running)
            else:
                # The end of a batch of one is about to begin the next.
                await asyncio.sleep(0)

    def _go_on(self) -> None:
        """Begin a batch for what waits, or see to it that one begins."""
        if len(self._running) < self._limit:
            self._begin()
        elif self._patience is None and not self._patient:
            loop = asyncio.get_running_loop()
            self._patience = loop.call_later(PATIENCE, self._begin, context=Context())

    def _stop_timer(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _begin(self) -> None:
        self._stop_timer()
        # Not made by the loop, whose factory might run it at once; and in no context of a caller,
        # since it is the batch of several.
        context = Context()
        self._starting = task = asyncio.Task(self._work(), loop=self._loop, context=context)
        self._running.add(task)
        task.add_done_callback(self._end, context=context)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if task is self._starting:
            # It never began, as when somebody cancels every task of the loop.
            self._starting = None
        if self._forget and task.cancelled():
            self._waiting.clear()
            self._stop_timer()
        if self._waiting:
            if self._starting is None:
                self._go_on()
        elif not self._running and self._when_idle is not None:
            self._when_idle()

    async def _work(self) -> None:
        # Not before now, so that the calls of one moment share the batch.
        task, self._starting = self._starting, None
        count = len(self._waiting) if self._size is None else self._size
        waiting, self._waiting = self._waiting[:count], self._waiting[count:]
        if self._waiting:
            self._go_on()
        batch = [(item, answer) for item, answer in waiting if not answer.done()]
        if task is None or not batch:
            return
        if self._abandon:
            _cancel_with([answer for _, answer in batch], task)
        results = await _run(batch, self._run)
        if len(batch) == 1:
            # Who calls alone, and again at once, need not wait for its end. Of many more gather
            # until then.
            self._running.discard(task)
        for (_, answer), result in zip(batch, results, strict=True):
            if answer.done():
                continue
            if isinstance(result, Exception):
                answer.set_exception(result)
            else:
                answer.set_result(result)


def _cancel_with(answers: list[asyncio.Future[_T]], batch: asyncio.Task[None]) -> None:
    """See to it that a batch is cancelled if every one of its answers is."""

    def look(_: asyncio.Future[_T]) -> None:
        if all(answer.cancelled() for answer in answers):
            batch.cancel()

    for answer in answers:
        answer.add_done_callback(look)


async def _run(
    batch: list[tuple[_I, asyncio.Future[_T]]],
    run: Callable[[list[_I]], Awaitable[Sequence[_T | Exception]]],
) -> Sequence[_T | Exception]:
    """Run a batch, and return what each of its calls is to have."""
    try:
        answers = await run([item for item, _ in batch])
    except Exception as error:  # noqa: BLE001
        return [error, *(_like(error) for _ in batch[1:])]
    except BaseException:
        for _, answer in batch:
            answer.cancel()
        raise
    if len(answers) != len(batch):
        # Nobody knows whose they are.
        return [RuntimeError(f"{len(answers)} answers for {len(batch)} calls")] * len(batch)
    return answers


def _like(error: Exception) -> Exception:
    """Return an error like this one: what a caller notes in one is its own."""
    if type(error).__module__ != IncidentKitError.__module__:
        # Only of ours it is known how another one is made.
        return error
    other = copy(error).with_traceback(error.__traceback__)
    if hasattr(error, "__notes__"):
        other.__notes__ = list(error.__notes__)
    other.__cause__ = error.__cause__
    return other


class Coalescer(Generic[_K, _T]):
    """Lets calls with the same key share a run. Other keys neither share nor wait.

    Args:
        run: What is to be run for a key. What it raises, every call that shares the run raises.
    """

    def __init__(self, run: Callable[[_K], Awaitable[_T]]) -> None:
        self._run = run
        self._batchers: dict[_K, Batcher[None, _T]] = {}

    def __call__(self, key: _K) -> asyncio.Future[_T]:
        """Return what a run returns that starts during this call."""
        batcher = self._batchers.get(key)
        if batcher is None:
            batcher = self._batchers[key] = Batcher(
                partial(self._run_for_all, key), when_idle=lambda: self._forget(key, batcher)
            )
        return batcher(None)

    async def finish(self) -> None:
        """Wait until every run has ended."""
        while self._batchers:
            await asyncio.gather(*(batcher.finish() for batcher in self._batchers.values()))

    def _forget(self, key: _K, batcher: Batcher[None, _T] | None) -> None:
        # An older one may end its last runs after a younger one has begun.
        if self._batchers.get(key) is batcher:
            del self._batchers[key]

    async def _run_for_all(self, key: _K, calls: Sequence[None]) -> Sequence[_T]:
        return [await self._run(key)] * len(calls)

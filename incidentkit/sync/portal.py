"""Run coroutines on an event loop in a background thread."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import Context, ContextVar, copy_context
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any, Final, Generic, TypeVar

from incidentkit.affinity import OTHER_PROCESS, keep, running_loop
from incidentkit.domain.errors import (
    ClientClosed,
    IncidentKitError,
    StoreUnavailable,
    WrongEventLoop,
)
from incidentkit.sync.patching import check_threads

_T = TypeVar("_T")

EVENT_LOOP: Final = (
    "An event loop is running in this thread, and a synchronous call would block it: use "
    "IncidentClient and await its methods, or call in another thread with asyncio.to_thread()"
)


class Portal:
    """An event loop in a background thread, on which other threads run coroutines.

    Coroutines of several threads run concurrently, each in the context of its caller. There is no
    lock, so no thread is held up by one that was interrupted, or that is missing after a fork.

    Raises:
        WrongEventLoop: If an event loop is running in this thread, or gevent or eventlet has
            replaced the threads of this process.
        StoreUnavailable: If no thread can be started.
    """

    def __init__(self) -> None:
        check_caller()
        check_threads()
        self._loop = asyncio.new_event_loop()
        # Calls that have not ended.
        self._calls: set[_Call[Any]] = set()
        # Calls that the event loop has not received yet, with the contexts of their callers. Waking
        # it is a system call, so one caller wakes it for all calls that arrive before its next
        # turn. _woken is the last turn for which it was woken.
        self._arrived: deque[tuple[_Call[Any], Context]] = deque()
        self._turn = 0
        self._woken = -1
        self._closing = False
        # Gets one item when the event loop is closed.
        self._ended: SimpleQueue[None] = SimpleQueue()
        self._in_loop: Callable[..., object] = self._loop.call_soon_threadsafe
        # A daemon, since it runs until the client is closed.
        self._thread = Thread(target=self._serve, name="incidentkit", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            self._loop.close()
            reason = f"no thread can be started for the client ({error})"
            raise StoreUnavailable(reason, retryable=True) from error
        except BaseException:
            # Interrupted: the thread has started, or is about to.
            self._in_loop(self._stop)
            raise

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine to completion, and return its result.

        If the calling thread is interrupted meanwhile, the coroutine is cancelled.

        Raises:
            WrongEventLoop: If an event loop is running in this thread.
            ClientClosed: If the portal is closed before the end.
        """
        try:
            check_caller()
        except WrongEventLoop:
            # Otherwise Python would warn that it was never awaited.
            coroutine.close()
            raise
        call = _Call(coroutine)
        try:
            self._begin(call)
            call.wait()
        except BaseException:
            with suppress(RuntimeError):
                self._in_loop(self._cancel, call)
            raise
        return call.result()

    def _begin(self, call: _Call[Any]) -> None:
        self._calls.add(call)
        self._arrived.append((call, copy_context()))
        # Read after the call has arrived: a turn that has not begun will receive the call.
        turn = self._turn
        if self._woken == turn:
            return
        try:
            self._in_loop(self._receive)
        except RuntimeError:
            call.refuse(ClientClosed())
        else:
            # Only now: the thread may be interrupted before it has woken the event loop.
            self._woken = turn

    def _receive(self) -> None:
        self._turn += 1
        while self._arrived:
            self._start(*self._arrived.popleft())

    def _start(self, call: _Call[Any], context: Context) -> None:
        if call not in self._calls:
            # Its thread was interrupted.
            return
        if self._closing:
            call.refuse(ClientClosed())
            return
        context.run(_caller.set, partial(self._ask, call))
        call.task = self._loop.create_task(call.coroutine, context=context)
        call.task.add_done_callback(partial(self._end, call))

    def _end(self, call: _Call[Any], task: asyncio.Task[Any]) -> None:
        self._calls.discard(call)
        if not task.cancelled():
            # Retrieve the failure of a call whose thread was interrupted.
            task.exception()
        call.requests.put(None)

    def _cancel(self, call: _Call[Any]) -> None:
        if call.task is not None:
            call.task.cancel()
        elif call in self._calls:
            # Interrupted before the event loop received it.
            call.refuse(ClientClosed())
        self._calls.discard(call)

    async def _ask(self, call: _Call[Any], request: Callable[[], _T]) -> _T:
        """Call a function in the thread that waits for a call, and return its result."""
        answer: asyncio.Future[_T] = self._loop.create_future()

        def run() -> None:
            result = request()
            # The client may have been closed meanwhile.
            with suppress(RuntimeError):
                self._in_loop(_answer, answer, result)

        call.requests.put(run)
        return await answer

    def close(self) -> None:
        """Stop the event loop and wait for its thread to end; later calls raise ClientClosed."""
        with suppress(RuntimeError):
            self._in_loop(self._stop)
        # After an interrupted join(), the next one returns at once, even if the thread still runs.
        if not self._loop.is_closed():
            self._ended.get()
        self._thread.join()

    def close_after(self, last: Coroutine[Any, Any, object]) -> None:
        """Stop the event loop when a coroutine has ended, without waiting."""
        try:
            self._in_loop(self._end_after, last)
        except RuntimeError:
            last.close()

    def _end_after(self, last: Coroutine[Any, Any, object]) -> None:
        self._loop.create_task(last).add_done_callback(lambda _: self._stop())

    def _stop(self) -> None:
        # A second stop, after an interrupt, would cut short the cleanup in _serve().
        if not self._closing:
            self._closing = True
            self._loop.stop()

    def fork(self) -> None:
        """Leave the event loop to the parent process; called in a newly forked process."""
        keep(self._loop)
        self._in_loop = _refuse
        self._turn += 1
        for call in [*self._calls]:
            call.refuse(WrongEventLoop(OTHER_PROCESS))

    def _serve(self) -> None:
        """Run the event loop until it is stopped, and close it."""
        try:
            self._loop.run_forever()
        finally:
            self._closing = True
            try:
                self._loop.run_until_complete(_cancel_all())
                self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            finally:
                # Not shutdown_default_executor(), which cannot start a thread when Python exits.
                self._loop.close()
                # Later calls try to wake the event loop, and find that it is closed.
                self._turn += 1
                with suppress(KeyError):
                    while True:
                        self._calls.pop().refuse(ClientClosed())
                self._ended.put(None)


class _Call(Generic[_T]):
    """A coroutine, and the thread that waits for it.

    Attributes:
        coroutine: The coroutine to run.
        task: Runs it; None: not started yet.
        requests: Functions for the waiting thread to call; None: the call has ended.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, _T]) -> None:
        self.coroutine = coroutine
        self.task: asyncio.Task[_T] | None = None
        self.requests: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._error: IncidentKitError | None = None

    def refuse(self, error: IncidentKitError) -> None:
        """Make the waiting thread raise an error, when the event loop no longer runs the call."""
        self._error = error
        if self.task is None:
            # Otherwise Python would warn that it was never awaited.
            self.coroutine.close()
        self.requests.put(None)

    def wait(self) -> None:
        """Wait for the end of the call, and run the functions that it requests."""
        while (request := self.requests.get()) is not None:
            request()

    def result(self) -> _T:
        """Return the result of the coroutine, or raise its exception."""
        task, self.task = self.task, None
        try:
            if self._error is not None:
                raise self._error
            if task is None or task.cancelled():
                raise ClientClosed
            return task.result()
        finally:
            # The traceback of an exception must not keep the exception alive.
            del task, self


_caller: Final[ContextVar[Callable[[Callable[[], Any]], Coroutine[Any, Any, Any]]]] = ContextVar(
    "incidentkit_caller"
)
"""Calls a function in the thread that waits for the running call."""


async def in_caller(function: Callable[..., _T], *arguments: object) -> _T:
    """Call a function in the thread that waits for the running call, and return its result.

    If it raises an exception, the call is cancelled and that thread raises the exception.
    """
    result: _T = await _caller.get()(partial(function, *arguments))
    return result


def _answer(answer: asyncio.Future[_T], result: _T) -> None:
    if not answer.done():
        answer.set_result(result)


def check_caller() -> None:
    """Raise if a blocking call would stop an event loop.

    Raises:
        WrongEventLoop: If an event loop is running in this thread.
    """
    if running_loop() is not None:
        raise WrongEventLoop(EVENT_LOOP)


def _refuse(*_: object) -> object:
    raise RuntimeError("The event loop belongs to another process")


async def _cancel_all() -> None:
    """Cancel every other task."""
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        for task in others:
            task.cancel()
        await asyncio.wait(others)

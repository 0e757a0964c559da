"""Synchronous verbs, called by the asynchronous tests of the suite."""

from __future__ import annotations

import asyncio
import functools
import inspect
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from concurrent.futures import Executor

END = object()


class Awaited:
    """Runs each verb of a synchronous client in a thread, in the context of its caller.

    Args:
        verbs: The synchronous client or joined transaction.
        threads: Runs the calls.
    """

    def __init__(self, verbs: Any, threads: Executor) -> None:
        self._verbs = verbs
        self._threads = threads

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._verbs, name)
        if name == "tokens":
            return Awaited(value, self._threads)
        if not inspect.ismethod(value):
            return value
        return self._yielding(value) if inspect.isgeneratorfunction(value) else self._call(value)

    def _call(self, verb: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(verb)
        async def call(*arguments: Any, **options: Any) -> Any:
            return await self._in_thread(functools.partial(verb, *arguments, **options))

        return call

    def _yielding(self, verb: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(verb)
        async def values(*arguments: Any, **options: Any) -> AsyncIterator[Any]:
            generator = verb(*arguments, **options)
            try:
                while (value := await self._in_thread(lambda: next(generator, END))) is not END:
                    yield value
            finally:
                await self._in_thread(generator.close)

        return values

    async def _in_thread(self, call: Callable[[], Any]) -> Any:
        context = copy_context()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, context.run, call)

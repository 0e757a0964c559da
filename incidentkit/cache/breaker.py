"""What keeps a cache that fails, is slow or hangs from being in the way."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TypeVar

from incidentkit.domain.errors import CacheUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from incidentkit.cache.base import IncidentCache

logger = logging.getLogger("incidentkit.cache")

CALL_TIMEOUT: Final = 0.5
"""Seconds that a call on the cache may take."""

RETRY_AFTER: Final = 1.0
"""Seconds for which a cache that failed is left alone."""

_T = TypeVar("_T")


class CircuitBreaker:
    """A cache whose failures are nobody's but the log's.

    - A call has :data:`CALL_TIMEOUT` seconds. One that fails opens the circuit: the cache is left
      alone for :data:`RETRY_AFTER` seconds, in which it has nothing and keeps nothing. Then one
      call tries it again.
    - A failure is logged once, and once more when the cache is back.

    Args:
        cache: What may fail.
        clock: Returns the time in seconds, never going back.
    """

    def __init__(
        self, cache: IncidentCache, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cache = cache
        self._clock = clock
        self._open = False
        self._retry_at = 0.0

    @property
    def available(self) -> bool:
        """Whether the cache is in use, rather than left alone after a failure."""
        return not self._open

    async def get(self, key: str) -> bytes | None:
        """Return the value, or None if there is none, or no cache to ask."""
        value: object = await self._try(self._cache.get, key)
        # A cache of one's own may return anything.
        return value if isinstance(value, bytes) else None

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        """Keep the value for at most ``ttl`` seconds, if the cache works."""
        await self._try(self._cache.set, key, value, ttl)

    async def clear(self) -> None:
        """Forget every value, if the cache works."""
        await self._try(self._cache.clear)

    async def probe(self) -> None:
        """Learn whether the cache answers, unless it is to be left alone."""
        await self._try(self._cache.ping)

    async def ping(self) -> None:
        """Ask the cache whether it answers.

        Raises:
            CacheUnavailable: If it does not.
        """
        await self._call(self._cache.ping)

    async def close(self) -> None:
        """Close the cache; a failure to do so is of no consequence."""
        with suppress(CacheUnavailable):
            await self._call(self._cache.close)

    async def _try(self, call: Callable[..., Awaitable[_T]], *arguments: object) -> _T | None:
        if self._open:
            if self._clock() < self._retry_at:
                return None
            # Nobody else tries meanwhile.
            self._retry_at = self._clock() + RETRY_AFTER
        try:
            answer = await self._call(call, *arguments)
        except CacheUnavailable:
            return None
        if self._open:
            self._open = False
            logger.info("The cache is back")
        return answer

    async def _call(self, call: Callable[..., Awaitable[_T]], *arguments: object) -> _T:
        try:
            async with asyncio.timeout(CALL_TIMEOUT):
                return await call(*arguments)
        except (Exception, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task and task.cancelling():
                raise
            reason = "it did not answer in time" if isinstance(error, TimeoutError) else "it failed"
            self._retry_at = self._clock() + RETRY_AFTER
            if not self._open:
                self._open = True
                logger.warning(
                    "The cache is unavailable (%s), lists are read without it",
                    type(error).__name__,
                )
            raise CacheUnavailable(reason) from error

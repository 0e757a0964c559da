"""A circuit breaker: skips a cache that fails, is slow or hangs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, TypeVar

from incidentkit.cache.base import IncidentCache
from incidentkit.domain.errors import CacheUnavailable

logger = logging.getLogger("incidentkit.cache")

CALL_TIMEOUT: Final = 0.5
"""Maximum seconds for one call of the cache."""

RETRY_AFTER: Final = 1.0
"""Seconds from a failure to the next attempt."""

_T = TypeVar("_T")


class CircuitBreaker:
    """Wraps a cache: failures are logged, never raised.

    - A call fails after :data:`CALL_TIMEOUT` seconds. A failure opens the circuit: for
      :data:`RETRY_AFTER` seconds, the cache finds nothing and stores nothing. Then one call tries
      it again.
    - The first failure is logged, and then the recovery.

    Args:
        cache: The cache that may fail. Messages name it by its attribute ``address`` if it has
            one, otherwise by its class.
        clock: Returns the time in seconds; it must be monotonic.
    """

    def __init__(
        self, cache: IncidentCache, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cache = cache
        self._clock = clock
        self._name: str = getattr(cache, "address", type(cache).__name__)
        self._open = False
        self._retry_at = 0.0

    @property
    def available(self) -> bool:
        """Whether the circuit is closed: the cache has not failed since its last success."""
        return not self._open

    async def get(self, key: str) -> bytes | None:
        """Return the value, or None if it is missing or the cache fails."""
        value: object = await self._try(self._cache.get, key)
        # An application's own cache may return any object.
        return value if isinstance(value, bytes) else None

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        """Store a value for at most ``ttl`` seconds, if the cache works."""
        await self._try(self._cache.set, key, value, ttl)

    async def clear(self) -> None:
        """Remove every value, if the cache works."""
        await self._try(self._cache.clear)

    async def probe(self) -> None:
        """Ping the cache to update :attr:`available`, unless it failed just now."""
        await self._try(self._cache.ping)

    async def ping(self) -> None:
        """Ping the cache.

        Raises:
            CacheUnavailable: If it does not answer.
        """
        await self._call(self._cache.ping)

    async def close(self) -> None:
        """Close the cache, and ignore a failure."""
        with suppress(CacheUnavailable):
            await self._call(self._cache.close)

    async def _try(self, call: Callable[..., Awaitable[_T]], *arguments: object) -> _T | None:
        if self._open:
            if self._clock() < self._retry_at:
                return None
            # Only this call tries; concurrent ones skip the cache.
            self._retry_at = self._clock() + RETRY_AFTER
        try:
            answer = await self._call(call, *arguments)
        except CacheUnavailable:
            return None
        if self._open:
            self._open = False
            logger.info("The cache is available again: %s", self._name)
        return answer

    async def _call(self, call: Callable[..., Awaitable[_T]], *arguments: object) -> _T:
        try:
            async with asyncio.timeout(CALL_TIMEOUT):
                return await call(*arguments)
        except (Exception, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task and task.cancelling():
                raise
            unavailable = self._failed(error)
        # Outside the handler, without a cause: a server may repeat the password in its error.
        raise unavailable

    def _failed(self, error: BaseException) -> CacheUnavailable:
        """Open the circuit, and return the error that names the cache and the kind of failure."""
        self._retry_at = self._clock() + RETRY_AFTER
        failed = f"failed with {type(error).__name__}"
        how = "did not answer in time" if isinstance(error, TimeoutError) else failed
        unavailable = CacheUnavailable(f"{self._name} {how}")
        if not self._open:
            self._open = True
            logger.warning("%s; lists are read from the database", unavailable)
        return unavailable

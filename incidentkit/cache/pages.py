"""What keeps a cache from ever being in the way: of an answer's truth, or of its time.

This is the one place that decides when a cached page may be served and when it may be stored.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TypeVar

from incidentkit.cache.base import TTL
from incidentkit.errors import CacheUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from incidentkit.cache.base import IncidentCache

logger = logging.getLogger("incidentkit.cache")

CALL_TIMEOUT: Final = 0.5
"""Seconds that a call on the cache may take."""

RETRY_AFTER: Final = 1.0
"""Seconds for which a cache that failed is left alone."""

_T = TypeVar("_T")


class PageCache:
    """Pages of the list in a cache that may fail, be slow, or hang.

    - A page is served, and stored, only while every clear that was asked for has succeeded: after
      a failure the cache is left alone for a second, then cleared before it is trusted again.
    - A page is stored only if no clear was asked for since before it was read from the database.
    - A failure is logged once, and once more when the cache is back.

    Args:
        cache: Where the pages are kept.
        clock: Returns the time in seconds, never going back.
    """

    def __init__(
        self, cache: IncidentCache, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cache = cache
        self._clock = clock
        self._asked = 0
        self._cleared = 0
        self._away = False
        self._retry_at = 0.0
        self._storing = 0
        self._nothing_stored = asyncio.Event()
        self._nothing_stored.set()
        self._data_version: int | None = None

    @property
    def available(self) -> bool:
        """Whether the cache is in use, rather than left alone after a failure."""
        return not self._away

    @property
    def generation(self) -> int:
        """A number that every clear changes; take it before a page is read from the database."""
        return self._asked

    async def ping(self) -> None:
        """Ask the cache whether it answers.

        Raises:
            CacheUnavailable: If it does not.
        """
        await self._call(self._cache.ping)

    async def get(self, key: str) -> bytes | None:
        """Return the page, or None if there is none that may be served."""
        if not await self._trusted():
            return None
        try:
            return await self._call(self._cache.get, key)
        except CacheUnavailable:
            return None

    async def set(self, key: str, page: bytes, generation: int) -> None:
        """Store the page, unless a clear was asked for since the generation was taken."""
        if generation != self._asked or self._away:
            return
        self._storing += 1
        self._nothing_stored.clear()
        try:
            await self._call(self._cache.set, key, page, TTL)
        except CacheUnavailable:
            pass
        finally:
            self._storing -= 1
            if not self._storing:
                self._nothing_stored.set()

    async def clear(self) -> None:
        """Let no page be served that was stored before now."""
        self._asked += 1
        if not self._away or self._may_retry():
            await self._clear()

    async def notice(self, data_version: int | None) -> None:
        """Clear if the version says that another process has changed the database."""
        if data_version is not None and data_version != self._data_version:
            self._data_version = data_version
            await self.clear()

    async def close(self) -> None:
        """Close the cache; a failure to do so is of no consequence."""
        with suppress(CacheUnavailable):
            await self._call(self._cache.close)

    async def _trusted(self) -> bool:
        if self._away and self._may_retry():
            await self._clear()
        return self._asked == self._cleared and not self._away

    def _may_retry(self) -> bool:
        """Tell whether it is time to try a cache that failed, and if so let nobody else do it."""
        if self._clock() < self._retry_at:
            return False
        self._retry_at = self._clock() + RETRY_AFTER
        return True

    async def _clear(self) -> None:
        while True:
            asked = self._asked
            # A page on its way would be stored after the clear.
            await self._nothing_stored.wait()
            try:
                await self._call(self._cache.clear)
            except CacheUnavailable:
                return
            self._cleared = max(self._cleared, asked)
            if not self._away:
                return
            if asked == self._asked:
                break
            # Nobody else makes up for what was asked for while the cache was away.
        self._away = False
        logger.info("The cache is back")

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
            if not self._away:
                self._away = True
                logger.warning(
                    "The cache is unavailable (%s), lists are read from the database",
                    type(error).__name__,
                )
            raise CacheUnavailable(reason) from error

"""An open client: its store, its pages, its feed and its running writes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from attrs import frozen

from incidentkit.cache.base import IncidentCache
from incidentkit.cache.pages import PageCache
from incidentkit.domain.errors import CacheUnavailable, ClientClosed
from incidentkit.feed import ChangeFeed
from incidentkit.store.idempotency import Idempotency, Parameters, idempotency
from incidentkit.store.ports import IncidentStore, StoreOperations

_T = TypeVar("_T")

logger = logging.getLogger("incidentkit")


class Session:
    """Opens and closes the parts of a client, and runs its writes to completion.

    It can be opened again once closed, also on another event loop.

    Args:
        store: Where incidents are kept.
        cache: A cache that several processes share; None: there is none.
        cache_required: Whether opening fails if the cache does not answer.
        max_staleness: Seconds for which a token of the incidents is trusted.
    """

    def __init__(
        self,
        store: IncidentStore,
        cache: IncidentCache | None,
        *,
        cache_required: bool,
        max_staleness: float,
    ) -> None:
        self._store = store
        self._cache = cache
        self._cache_required = cache_required
        self._max_staleness = max_staleness
        self._pages: PageCache | None = None
        self._feed: ChangeFeed | None = None
        self._opening = asyncio.Lock()
        self._writes: set[asyncio.Task[Any]] = set()
        self.connected = False

    async def open(self) -> None:
        """Open the store and ping the cache; if the session is already open, do nothing."""
        async with self._opening:
            if self.connected:
                return
            self._pages = PageCache(self._store, self._cache, max_staleness=self._max_staleness)
            self._feed = ChangeFeed(self._store)
            try:
                await self._store.open()
                await self._ping_cache(self._pages)
            except BaseException:
                await self._close()
                raise
            self.connected = True

    async def _ping_cache(self, pages: PageCache) -> None:
        try:
            await pages.ping()
        except CacheUnavailable:
            if self._cache_required:
                raise

    async def close(self) -> None:
        """Wait for running writes, then release every connection; once closed, do nothing."""
        async with self._opening:
            await self._close()
        # The next opening may be on another event loop.
        self._opening = asyncio.Lock()

    async def _close(self) -> None:
        self.connected = False
        if self._feed is not None:
            self._feed.close()
        if self._writes:
            await asyncio.wait(self._writes)
        await self._store.close()
        if self._feed is not None:
            await self._feed.finish()
        # Last, since a list that was running until now still stores its page in the cache.
        if self._pages is not None:
            await self._pages.close()
        # Not earlier, so that a cancelled close can be repeated.
        self._feed = self._pages = None

    @property
    def cache_available(self) -> bool | None:
        """Whether the shared cache is in use; None without a cache, or if not open."""
        return None if self._pages is None else self._pages.available

    @property
    def store(self) -> IncidentStore:
        """The store.

        Raises:
            ClientClosed: If the client is not open.
        """
        if not self.connected:
            raise ClientClosed
        return self._store

    @property
    def pages(self) -> PageCache:
        """The pages of the list.

        Raises:
            ClientClosed: If the client is not open.
        """
        if not self.connected or self._pages is None:
            raise ClientClosed
        return self._pages

    @property
    def feed(self) -> ChangeFeed:
        """The feed of changes.

        Raises:
            ClientClosed: If the client is not open.
        """
        if not self.connected or self._feed is None:
            raise ClientClosed
        return self._feed

    def join(self, connection: object) -> HostTransaction:
        """Return the transaction of a host's connection.

        Raises:
            ClientClosed: If the client is not open.
        """
        return HostTransaction(self.store.join(connection))

    def once(self, idempotency_key: str, verb: str, parameters: Parameters) -> Idempotency:
        """Return the idempotency key of a write, with the fingerprint of its parameters."""
        return idempotency(idempotency_key, verb, parameters)

    async def write(self, write: Coroutine[Any, Any, _T]) -> _T:
        """Run a write, wake the feed and forget the pages, even if the caller is cancelled."""
        task = asyncio.ensure_future(self._write_and_forget(write))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_log_failure)
            raise

    async def _write_and_forget(self, write: Coroutine[Any, Any, _T]) -> _T:
        try:
            return await write
        finally:
            # Also after an error, which may hide a commit.
            if self._feed is not None and self._feed.readers:
                self._feed.wake()
            if self._pages is not None:
                self._pages.forget()


@frozen
class HostTransaction:
    """The transaction of a host's connection, which ends when the host ends it.

    Attributes:
        store: The operations on that connection.
    """

    store: StoreOperations

    async def write(self, write: Coroutine[Any, Any, _T]) -> _T:
        """Run an operation of the store that writes."""
        return await write

    def once(self, idempotency_key: str, verb: str, parameters: Parameters) -> Idempotency:
        """Return the idempotency key of a write, with the fingerprint of its parameters."""
        return idempotency(idempotency_key, verb, parameters)


def _log_failure(write: asyncio.Task[Any]) -> None:
    """Log the failure of a write whose caller is gone."""
    error = None if write.cancelled() else write.exception()
    if error is not None:
        logger.warning("A write failed after its caller was cancelled: %s", error)

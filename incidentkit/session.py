"""An open client: its store, its pages, its feed and its running writes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar, runtime_checkable

from incidentkit.affinity import Abandonable, Affinity, Severable, running_loop
from incidentkit.cache.base import IncidentCache
from incidentkit.cache.pages import PageCache
from incidentkit.domain.errors import CacheUnavailable, ClientClosed
from incidentkit.domain.values import ChangePage
from incidentkit.feed import ChangeFeed
from incidentkit.observing import Observer
from incidentkit.store.idempotency import Idempotency, Parameters, idempotency
from incidentkit.store.ports import IncidentStore, StoreOperations

_T = TypeVar("_T")

logger = logging.getLogger("incidentkit")


class Feed(Protocol):
    """Delivers changes to waiting readers.

    Attributes:
        readers: Number of readers that a change by this process has to wake.
    """

    readers: int

    async def read(self, after: str | None, limit: int, wait: float) -> ChangePage:
        """Return changes after a cursor, and wait for one if there is none."""
        ...

    async def pause(self, seconds: float) -> None:
        """Wait for a number of seconds, or until the feed is closed."""

    def wake(self) -> None:
        """Make waiting readers look for changes now."""

    def close(self) -> None:
        """Make waiting readers raise :class:`~incidentkit.ClientClosed`."""

    async def finish(self) -> None:
        """Wait until every read has finished."""


@runtime_checkable
class BringsFeed(Protocol):
    """A store that delivers changes itself, such as the store of a service."""

    def feed(self) -> Feed:
        """Return a new feed."""
        ...


class Session:
    """Opens and closes the parts of a client, and runs its writes to completion.

    It can be opened again once closed, also on another event loop. Once its event loop has ended,
    or in a forked process, it can be opened again without having been closed.

    Args:
        store: Where incidents are kept.
        cache: A cache that several processes share; None: there is none.
        cache_required: Whether opening fails if the cache does not answer.
        max_staleness: Seconds for which a token of the incidents is trusted.
        observer: Observes reads of the cache and delivered changes; None: nothing is observed.
    """

    def __init__(
        self,
        store: IncidentStore,
        cache: IncidentCache | None,
        *,
        cache_required: bool,
        max_staleness: float,
        observer: Observer | None = None,
    ) -> None:
        self._store = store
        self._cache = cache
        self._cache_required = cache_required
        self._max_staleness = max_staleness
        self._observer = observer
        self._pages: PageCache | None = None
        self._feed: Feed | None = None
        self._writes: set[asyncio.Task[Any]] = set()
        self._open = False
        # None: nothing is open.
        self._owner: _Owner | None = None

    @property
    def connected(self) -> bool:
        """Whether the session is open, on an event loop that has not ended."""
        return self._open and self._owner is not None and not self._owner.affinity.ended

    async def open(self) -> None:
        """Open the store and ping the cache; if the session is already open, do nothing.

        Raises:
            WrongEventLoop: If the session is open on another event loop.
        """
        while True:
            owner = self._own()
            async with owner.opening:
                # Otherwise the session was closed meanwhile.
                if owner is self._owner:
                    await self._open_parts(owner)
                    return

    def _own(self) -> _Owner:
        """Return the owner of the open parts: the running event loop.

        Raises:
            WrongEventLoop: If it is another event loop that has not ended.
        """
        new = _Owner(Affinity())
        cache: object = self._cache
        if isinstance(cache, Severable):
            new.affinity.on_fork = cache.sever
        # Nothing is called in between: other threads may open the session at the same time.
        if self._owner is None:
            self._owner = new
        owner = self._owner
        if owner.affinity.here:
            return owner
        owner.affinity.check_free()
        new.left_open = True
        self._owner = new
        self._open = False
        self._feed = self._pages = None
        self._writes = set()
        return new

    async def _open_parts(self, owner: _Owner) -> None:
        if self._open:
            return
        await self._abandon(owner)
        self._pages = PageCache(
            self._store,
            self._cache,
            max_staleness=self._max_staleness,
            observer=self._observer,
        )
        self._feed = self._new_feed()
        try:
            await self._store.open()
            await self._ping_cache(self._pages)
        except BaseException:
            try:
                await self._close()
            except Exception:  # noqa: BLE001
                # A failure to close must not replace the error, or bind the session to this loop.
                self._feed = self._pages = self._owner = None
            raise
        self._open = True

    def _new_feed(self) -> Feed:
        store: object = self._store
        if isinstance(store, BringsFeed):
            return store.feed()
        return ChangeFeed(self._store, observer=self._observer)

    async def _abandon(self, owner: _Owner) -> None:
        """Release the parts that were left open on an event loop that has ended."""
        if not owner.left_open:
            return
        parts: tuple[object, ...] = (self._store, self._cache)
        for part in parts:
            if isinstance(part, Abandonable):
                # A statement that is still running in a thread has to end first.
                await asyncio.to_thread(part.abandon)
        owner.left_open = False

    async def _ping_cache(self, pages: PageCache) -> None:
        try:
            await pages.ping()
        except CacheUnavailable:
            if self._cache_required:
                raise

    async def close(self) -> None:
        """Wait for running writes, then release every connection; once closed, do nothing.

        Raises:
            WrongEventLoop: If the session is open on another event loop that has not ended.
        """
        if self._owner is None:
            return
        owner = self._own()
        async with owner.opening:
            if owner.left_open:
                await self._abandon(owner)
                self._owner = None
            elif owner is self._owner:
                await self._close()

    async def _close(self) -> None:
        self._open = False
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
        self._feed = self._pages = self._owner = None

    @property
    def cache_available(self) -> bool | None:
        """Whether the shared cache is in use; None without a cache, or if not open."""
        return None if self._pages is None else self._pages.available

    @property
    def commits(self) -> bool:
        """True: the store commits each write."""
        return True

    @property
    def store(self) -> IncidentStore:
        """The store.

        Raises:
            ClientClosed: If the client is not open.
            WrongEventLoop: If it is open on another event loop.
        """
        self._check()
        return self._store

    @property
    def pages(self) -> PageCache:
        """The pages of the list.

        Raises:
            ClientClosed: If the client is not open.
            WrongEventLoop: If it is open on another event loop.
        """
        self._check()
        if self._pages is None:
            raise ClientClosed
        return self._pages

    @property
    def feed(self) -> Feed:
        """The feed of changes.

        Raises:
            ClientClosed: If the client is not open.
            WrongEventLoop: If it is open on another event loop.
        """
        self._check()
        if self._feed is None:
            raise ClientClosed
        return self._feed

    def join(self, connection: object) -> HostTransaction:
        """Return the transaction of a host's connection.

        Raises:
            ClientClosed: If the client is not open.
            WrongEventLoop: If it is open on another event loop.
        """
        affinity = self._check()
        return HostTransaction(self._store.join(connection), affinity)

    def _check(self) -> Affinity:
        """Return where the session is open; raise unless that is the running event loop."""
        owner = self._owner
        if not self._open or owner is None:
            raise ClientClosed
        affinity = owner.affinity
        if affinity.loop is not running_loop():
            raise affinity.error()
        return affinity

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


class _Owner:
    """The event loop on which a session is open.

    Args:
        affinity: The event loop.

    Attributes:
        opening: Held while the session is opened or closed.
        left_open: Whether the parts are still open on another event loop, which has ended.
    """

    def __init__(self, affinity: Affinity) -> None:
        self.affinity = affinity
        self.opening = asyncio.Lock()
        self.left_open = False


class HostTransaction:
    """The transaction of a host's connection, which ends when the host ends it.

    Args:
        store: The operations on that connection.
        affinity: The event loop of the connection; None: it belongs to none.
    """

    def __init__(self, store: StoreOperations, affinity: Affinity | None = None) -> None:
        self._store = store
        self._affinity = affinity

    @property
    def commits(self) -> bool:
        """False: the host commits."""
        return False

    @property
    def store(self) -> StoreOperations:
        """The operations on that connection.

        Raises:
            WrongEventLoop: If it belongs to another event loop.
        """
        if self._affinity is not None and self._affinity.loop is not running_loop():
            raise self._affinity.error()
        return self._store

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

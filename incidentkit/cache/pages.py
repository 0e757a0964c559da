"""Serve pages of the list from caches, and never a stale one.

This is the only module that decides whether a cached page may be served. A page in the process
carries the token that the incidents had in the same snapshot of the database. A page in a shared
cache carries a proof instead: a keyed hash of its key and its content, with the token as the secret
key. A page is served only if the incidents have that token during the call. A cache can therefore
deliver late, lose, mix up, forge or never clear pages: they are not served.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from hmac import compare_digest, digest
from typing import Final, Protocol, TypeAlias

import incidentkit.wire as wire_format
from incidentkit.batching import Batcher, Coalescer
from incidentkit.cache.base import TTL, IncidentCache
from incidentkit.cache.breaker import CircuitBreaker
from incidentkit.cache.memory import DEFAULT_MAX_BYTES, LruCache
from incidentkit.domain.queries import ListQuery
from incidentkit.domain.values import Incident
from incidentkit.observing import CacheRead, Observer
from incidentkit.store.page import Page

IncidentList: TypeAlias = "list[Incident]"
"""An alias, because ``list`` is a method in the classes below."""

INTERVAL: Final = 0.01
"""Minimum seconds between two background writes, or two clears, of the shared cache."""

MAX_WRITES: Final = 10
"""Maximum number of pages in one background write; further pages are skipped. A page that is
requested often gets its turn, and the others would only evict it."""

OBJECTS_PER_JSON: Final = 3
"""Approximate size of the incidents of a page in memory, in sizes of its JSON."""

logger = logging.getLogger("incidentkit.cache")


class PageStore(Protocol):
    """The part of a store that :class:`PageCache` needs."""

    async def list(self, query: ListQuery) -> Page:
        """Return a page with the token of the incidents, from one snapshot."""
        ...

    async def token(self) -> str | None:
        """Return the token of the incidents; None: it is unknown."""
        ...


def seal(key: str, token: str, page: bytes) -> bytes:
    """Return the value for a shared cache: a JSON object of the page and its proof.

    The value does not reveal the token, so a program with access to the cache alone cannot forge a
    value that :func:`unseal` accepts.
    """
    return b'{"proof":"%b","incidents":%b}' % (_proof(key, token, page), page)


def unseal(value: bytes, key: str, token: str | None) -> bytes | None:
    """Return the page in a value from a cache, or None unless key and token sealed that value.

    A token that is None matches no value.
    """
    if token is None:
        return None
    page = value[_PAGE_START:-1]
    return page if compare_digest(value, seal(key, token, page)) else None


def _proof(key: str, token: str, page: bytes) -> bytes:
    return digest(token.encode(), b"%b\n%b" % (key.encode(), page), "sha256").hex().encode()


_PAGE_START: Final = len(seal("", "", b"")) - len(b"}")


def _size(page: Page) -> int:
    return len(page.json) * (1 + OBJECTS_PER_JSON)


class PageCache:
    """Keeps pages of the list in the process, and in a cache that several processes share.

    Args:
        store: Reads pages and tokens from the database.
        shared: A cache that may fail, be slow or hang; None: no shared cache.
        max_staleness: Seconds for which a token is trusted after its reading. 0: each call reads
            the token, or shares a reading that has not started.
        clock: Returns the time in seconds; it must be monotonic.
        observer: Counts where each page comes from; None: nothing is observed.
    """

    def __init__(
        self,
        store: PageStore,
        shared: IncidentCache | None = None,
        *,
        max_staleness: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        observer: Observer | None = None,
    ) -> None:
        self._store = store
        self._memory = LruCache(_size, DEFAULT_MAX_BYTES, clock=clock)
        self._shared = None if shared is None else CircuitBreaker(shared, clock=clock)
        self._max_staleness = max_staleness
        self._clock = clock
        self._observer = observer
        # A deep page that no call waits for any more takes the place of another.
        self._reads = Coalescer(self._read, abandon=True)
        self._tokens: Batcher[None, str | None] = Batcher(self._read_token)
        self._clears = Batcher(_clear, forget=True)
        self._writes: Batcher[tuple[str, Page, int], None] = Batcher(self._write, forget=True)
        self._trusted: tuple[str | None, float] | None = None
        self._changes = 0
        # Whether the last page had no token.
        self._unknown = not getattr(store, "has_token", True)

    @property
    def available(self) -> bool | None:
        """Whether the shared cache works; None if there is none."""
        return None if self._shared is None else self._shared.available

    async def list(self, query: ListQuery) -> IncidentList:
        """Return the incidents of the page, in a new list."""
        return (await self.page(query)).incidents.copy()

    async def page(self, query: ListQuery) -> Page:
        """Return the page as the database has it at a moment during this call.

        A page without a token is neither kept nor shared: under row security, each session may see
        different rows.
        """
        if not self._unknown:
            page = await self._current(query.cache_key) or await self._reads(query)
            if page.token is not None:
                return page
        self._tell("bypassed")
        page = await self._store.list(query)
        self._unknown = page.token is None
        return page

    def forget(self) -> None:
        """Remove every page after this process has changed an incident.

        The removal frees memory and ends the trust in the last token. Lists are correct without
        it, so the shared cache is cleared in the background.
        """
        self._changes += 1
        self._trusted = None
        if self._memory.kept_bytes:
            self._memory.clear()
        if self._shared is not None:
            self._clears(self._shared)

    async def ping(self) -> None:
        """Ping the shared cache, if there is one.

        Raises:
            CacheUnavailable: If it does not answer.
        """
        if self._shared is not None:
            await self._shared.ping()

    async def probe(self) -> None:
        """Ping the shared cache to update :attr:`available`, unless it failed just now."""
        if self._shared is not None:
            await self._shared.probe()

    async def finish(self) -> None:
        """Wait for running lists, and for background writes to the shared cache."""
        await self._reads.finish()
        await self._tokens.finish()
        await self._writes.finish()
        await self._clears.finish()

    async def close(self) -> None:
        """Wait as :meth:`finish` does, then remove every page and close the shared cache."""
        await self.finish()
        self._memory.clear()
        if self._shared is not None:
            await self._shared.close()

    async def _current(self, key: str) -> Page | None:
        """Return the page in the process if it is current; otherwise remove it, for good."""
        page = self._memory.get(key)
        if page is None:
            return None
        if page.token is not None and page.token == await self._token():
            self._tell("process")
            return page
        self._tell("stale")
        self._memory.discard(key, page)
        return None

    def _tell(self, result: CacheRead) -> None:
        if self._observer is not None:
            self._observer.cache_read(result)

    async def _read(self, query: ListQuery) -> Page:
        key = query.cache_key
        # A call before this one may have read the page.
        current = await self._current(key)
        if current is not None:
            return current
        if self._shared is None:
            self._tell("missing")
            return await self._fill(query)
        # Read the token and the page concurrently. Without a page nothing awaits the token, and
        # cancelling its statement would cost the database more than answering it.
        token = self._token()
        token.add_done_callback(_retrieve_exception)
        value = await self._shared.get(key)
        page = None if value is None else _decode(value, key, await token)
        if page is None:
            missing: CacheRead = "missing" if self._shared.available else "unavailable"
            if value is not None:
                self._tell("stale")
            self._tell(missing)
            return await self._fill(query)
        self._tell("shared")
        self._memory.set(key, page, TTL)
        return page

    async def _fill(self, query: ListQuery) -> Page:
        key, now, changes = query.cache_key, self._clock(), self._changes
        page = await self._store.list(query)
        self._trust(page.token, now, changes)
        if page.token is None:
            return page
        # Keep the bytes alone: every garbage collection would visit the objects.
        self._memory.set(key, Page(partial(_read, page.json), page.token, page.json), TTL)
        if self._shared is not None and len(self._writes) < MAX_WRITES:
            self._writes((key, page, changes))
        return page

    def _token(self) -> asyncio.Future[str | None]:
        trusted = self._trusted
        if trusted is None or self._clock() - trusted[1] >= self._max_staleness:
            return self._tokens(None)
        token: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        token.set_result(trusted[0])
        return token

    def _trust(self, token: str | None, since: float, changes: int) -> None:
        """Trust the newest token, unless this process has changed an incident meanwhile."""
        if changes == self._changes and (self._trusted is None or since > self._trusted[1]):
            self._trusted = token, since

    async def _read_token(self, calls: Sequence[None]) -> Sequence[str | None]:
        now, changes = self._clock(), self._changes
        token = await self._store.token()
        self._trust(token, now, changes)
        return [token] * len(calls)

    async def _write(self, pages: Sequence[tuple[str, Page, int]]) -> Sequence[None]:
        if self._shared is not None:
            # A page that was read before a change by this process has an old token: skip it.
            sealed = [
                (key, seal(key, page.token, page.json))
                for key, page, changes in pages
                if changes == self._changes and page.token is not None
            ]
            await asyncio.gather(*(self._shared.set(key, value, TTL) for key, value in sealed))
        await asyncio.sleep(INTERVAL)
        return [None] * len(pages)


async def _clear(calls: Sequence[CircuitBreaker]) -> Sequence[None]:
    await calls[0].clear()
    # Under many writes, one clear serves all that arrive meanwhile.
    await asyncio.sleep(INTERVAL)
    return [None] * len(calls)


def _read(page: bytes) -> list[Incident]:
    # Through the lazy face: the converter is loaded with the first page that is decoded.
    return wire_format.decode_incidents(page)


def _decode(value: bytes, key: str, token: str | None) -> Page | None:
    page = unseal(value, key, token)
    if page is None:
        return None
    try:
        return Page(_read(page), token, page)
    except ValueError:
        logger.warning("Ignoring the value of %s in the shared cache: it is not a page", key)
        return None


def _retrieve_exception(token: asyncio.Future[str | None]) -> None:
    """Retrieve a failure, so that asyncio does not log it if nothing awaits the token."""
    if not token.cancelled():
        token.exception()

"""What makes every list true: when a cached page may be served.

This is the one place that decides it. A page carries the token that the incidents had when it was
read, in one snapshot with it; it is served only if they have that token during the call. So a page
in a cache can be late, lost, old or another's, and is then not served.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from incidentkit.batching import Batcher, Coalescer
from incidentkit.cache.base import TTL
from incidentkit.cache.breaker import CircuitBreaker
from incidentkit.cache.memory import DEFAULT_MAX_BYTES, Memory
from incidentkit.store.page import Page
from incidentkit.wire import decode_incidents, dump_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from incidentkit.cache.base import IncidentCache
    from incidentkit.domain.queries import ListQuery
    from incidentkit.domain.values import Incident

Incidents: TypeAlias = "list[Incident]"
"""An alias because inside the class ``list`` is the verb."""

INTERVAL: Final = 0.01
"""Seconds from one change of the shared cache by this process, for which nobody waits, to the next
of its kind."""

KEPT: Final = 10
"""Pages that are put into the shared cache at a time; of more than these the others are left out.
A page that is asked for often has its turn, and pages that are not would only displace it."""

BESIDE_JSON: Final = 3
"""How many times as much as its JSON the incidents of a page take in memory, at most about."""

logger = logging.getLogger("incidentkit.cache")


class PageStore(Protocol):
    """The part of a store that pages are read from."""

    async def list(self, query: ListQuery) -> Page:
        """Return a page and the token of the incidents, from one snapshot."""
        ...

    async def token(self) -> str | None:
        """Return the token of the incidents; None means that it cannot be told."""
        ...


def seal(key: str, token: str | None, page: bytes) -> bytes:
    """Return what a cache holds under the key, a JSON object that says whose page it is."""
    return _head(key, token) + page + b"}"


def unseal(value: bytes, key: str, token: str | None) -> bytes | None:
    """Return the page if it is the one of this key and token, or None.

    None for the token matches nothing.
    """
    head = _head(key, token)
    if token is None or not value.startswith(head) or not value.endswith(b"}"):
        return None
    return value[len(head) : -1]


def _head(key: str, token: str | None) -> bytes:
    return dump_json({"key": key, "token": token})[:-1] + b',"incidents":'


def _size(page: Page) -> int:
    return len(page.json) * (1 + BESIDE_JSON)


class PageCache:
    """Pages of the list in the process, and in a cache that several processes share.

    Args:
        store: Where pages and tokens are read.
        shared: A cache that may fail, be slow or hang; None means that there is none.
        max_staleness: Seconds for which a token is trusted once it was read. 0 means that each
            call reads one, or shares a reading that has not started.
        clock: Returns the time in seconds, never going back.
    """

    def __init__(
        self,
        store: PageStore,
        shared: IncidentCache | None = None,
        *,
        max_staleness: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._memory = Memory(_size, DEFAULT_MAX_BYTES, clock=clock)
        self._shared = None if shared is None else CircuitBreaker(shared, clock=clock)
        self._max_staleness = max_staleness
        self._clock = clock
        self._reads = Coalescer(self._read)
        self._tokens: Batcher[None, str | None] = Batcher(self._read_token)
        self._clears = Batcher(_clear, forget=True)
        self._keeps: Batcher[tuple[str, Page, int], None] = Batcher(self._keep, forget=True)
        self._trusted: tuple[str | None, float] | None = None
        self._changes = 0

    @property
    def available(self) -> bool | None:
        """Whether the shared cache is in use; None if there is none."""
        return None if self._shared is None else self._shared.available

    async def list(self, query: ListQuery) -> Incidents:
        """Return the incidents of the page, in a list of the caller's own."""
        return (await self.page(query)).incidents.copy()

    async def page(self, query: ListQuery) -> Page:
        """Return the page as the database has it at some instant during this call."""
        return await self._kept(query.cache_key) or await self._reads(query)

    def forget(self) -> None:
        """Remove every page, since this process has changed an incident.

        Nothing hangs on it but memory, and the time for which a token is trusted. So nobody waits
        for the shared cache.
        """
        self._changes += 1
        self._trusted = None
        if self._memory.size:
            self._memory.clear()
        if self._shared is not None:
            self._clears(self._shared)

    async def ping(self) -> None:
        """Ask the shared cache, if there is one, whether it answers.

        Raises:
            CacheUnavailable: If it does not.
        """
        if self._shared is not None:
            await self._shared.ping()

    async def probe(self) -> None:
        """Learn whether the shared cache answers, unless it has just failed."""
        if self._shared is not None:
            await self._shared.probe()

    async def finish(self) -> None:
        """Wait for lists that are under way, and until the shared cache has what it is to have."""
        await self._reads.finish()
        await self._tokens.finish()
        await self._keeps.finish()
        await self._clears.finish()

    async def close(self) -> None:
        """Wait for what is under way, then forget every page and close the shared cache."""
        await self.finish()
        self._memory.clear()
        if self._shared is not None:
            await self._shared.close()

    async def _kept(self, key: str) -> Page | None:
        """Return the page in the process if it is current; otherwise forget it, for ever."""
        page = self._memory.get(key)
        if page is None:
            return None
        if page.token is not None and page.token == await self._token():
            return page
        self._memory.discard(key, page)
        return None

    async def _read(self, query: ListQuery) -> Page:
        key = query.cache_key
        # It may have been read by a call before this one.
        kept = await self._kept(key)
        if kept is not None:
            return kept
        if self._shared is None:
            return await self._fill(query)
        # Asked for at the same time. Where the shared cache does not have the page nobody waits
        # for it; to cancel it would cost the database more than to answer.
        token = self._token()
        token.add_done_callback(_take_note)
        value = await self._shared.get(key)
        page = None if value is None else _decode(value, key, await token)
        if page is None:
            return await self._fill(query)
        self._memory.set(key, page, TTL)
        return page

    async def _fill(self, query: ListQuery) -> Page:
        key, now, changes = query.cache_key, self._clock(), self._changes
        page = await self._store.list(query)
        self._trust(page.token, now, changes)
        # Of what is kept the bytes alone: objects would be looked at by every garbage collection.
        self._memory.set(
            key, Page(partial(decode_incidents, page.json), page.token, page.json), TTL
        )
        if self._shared is not None and len(self._keeps) < KEPT:
            # Nobody waits for it.
            self._keeps((key, page, changes))
        return page

    def _token(self) -> asyncio.Future[str | None]:
        trusted = self._trusted
        if trusted is None or self._clock() - trusted[1] >= self._max_staleness:
            return self._tokens(None)
        token: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        token.set_result(trusted[0])
        return token

    def _trust(self, token: str | None, since: float, changes: int) -> None:
        """Keep the newest token, unless this process has changed an incident meanwhile."""
        if changes == self._changes and (self._trusted is None or since > self._trusted[1]):
            self._trusted = token, since

    async def _read_token(self, calls: Sequence[None]) -> Sequence[str | None]:
        now, changes = self._clock(), self._changes
        token = await self._store.token()
        self._trust(token, now, changes)
        return [token] * len(calls)

    async def _keep(self, given: Sequence[tuple[str, Page, int]]) -> Sequence[None]:
        if self._shared is not None:
            # What was read before this process changed something has an old token.
            sealed = [
                (key, seal(key, page.token, page.json))
                for key, page, changes in given
                if changes == self._changes
            ]
            await asyncio.gather(*(self._shared.set(key, value, TTL) for key, value in sealed))
        await asyncio.sleep(INTERVAL)
        return [None] * len(given)


async def _clear(calls: Sequence[CircuitBreaker]) -> Sequence[None]:
    await calls[0].clear()
    # Under a storm of writes one for many of them will do.
    await asyncio.sleep(INTERVAL)
    return [None] * len(calls)


def _decode(value: bytes, key: str, token: str | None) -> Page | None:
    page = unseal(value, key, token)
    if page is None:
        return None
    try:
        return Page(decode_incidents(page), token, page)
    except ValueError:
        logger.warning("The cache holds something else under %s", key)
        return None


def _take_note(token: asyncio.Future[str | None]) -> None:
    """Take note of a failure that nobody may wait for."""
    if not token.cancelled():
        token.exception()

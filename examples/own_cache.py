"""Give the client a cache of one's own: here one that counts what another one saves.

.. code-block:: console

    $ pip install incidentkit
    $ python examples/own_cache.py
"""

import asyncio

from incidentkit import IncidentClient
from incidentkit.cache import IncidentCache, MemoryCache
from incidentkit.store import store_from_url


class CountingCache:
    """Counts how many pages were asked for and found; any object with these methods is a cache.

    A cache may raise: the client logs it, reads from the database, and comes back later.
    """

    def __init__(self, cache: IncidentCache) -> None:
        self.asked = 0
        self.found = 0
        self._cache = cache

    async def get(self, key: str) -> bytes | None:
        """Return the page, or None."""
        page = await self._cache.get(key)
        self.asked += 1
        self.found += page is not None
        return page

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        """Keep the page for at most `ttl` seconds."""
        await self._cache.set(key, value, ttl)

    async def clear(self) -> None:
        """Forget every page: the client asks for that after every change."""
        await self._cache.clear()

    async def ping(self) -> None:
        """Raise unless the cache answers."""
        await self._cache.ping()

    async def close(self) -> None:
        """Give back every connection."""
        await self._cache.close()


async def main() -> None:
    """Let two clients list incidents again and again, with a change in between."""
    cache = CountingCache(MemoryCache())
    one, other = (IncidentClient(store_from_url(), cache=cache) for _ in range(2))
    async with one, other:
        for _ in range(2):
            await one.create("Queue is growing", source="monitoring")
            for _ in range(5):
                await one.list(status="new")
                await other.list(status="new")
            # Changes that follow each other at once may share a clearing of the cache.
            await asyncio.sleep(0.05)
    print(f"The cache was asked for a page {cache.asked} times and had it {cache.found} times")


asyncio.run(main())

"""Pass your own cache to the client: here a wrapper that counts the hits of another cache.

Run it in a checkout:

.. code-block:: console

    $ python -m pip install .
    $ python examples/own_cache.py
"""

import asyncio

from incidentkit import IncidentClient
from incidentkit.cache import IncidentCache, MemoryCache
from incidentkit.store import store_from_url


class CountingCache:
    """Counts the pages that were requested and found.

    Any object with these methods is a cache. It may raise: the client logs the failure, reads from
    the database, and tries the cache again later.
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
        """Store the page for at most `ttl` seconds."""
        await self._cache.set(key, value, ttl)

    async def clear(self) -> None:
        """Remove every page; the client calls this after every change."""
        await self._cache.clear()

    async def ping(self) -> None:
        """Raise unless the cache answers."""
        await self._cache.ping()

    async def close(self) -> None:
        """Close every connection."""
        await self._cache.close()


async def main() -> None:
    """List incidents with two clients, and create one in between."""
    cache = CountingCache(MemoryCache())
    one, other = (IncidentClient(store_from_url(), cache=cache) for _ in range(2))
    async with one, other:
        for _ in range(2):
            await one.create("Queue is growing", source="monitoring")
            for _ in range(5):
                await one.list(status="new")
                await other.list(status="new")
            # Wait, since changes in quick succession may share one clear of the cache.
            await asyncio.sleep(0.05)
    print(f"The cache was asked for a page {cache.asked} times and had it {cache.found} times")


asyncio.run(main())

"""Pages kept in Redis, shared by every process that uses it."""

from __future__ import annotations

from typing import Final

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from incidentkit.cache.base import INDEX_KEY
from incidentkit.errors import InvalidSettings

SOCKET_TIMEOUT: Final = 0.25
"""Seconds to wait for a connection, and for each answer."""

POOL_TIMEOUT: Final = 0.5
"""Seconds to wait for a free connection when many calls share them."""

MAX_CONNECTIONS: Final = 20

# Atomic, so that no page can be stored and left behind while the others are removed.
_CLEAR: Final = """
local names = redis.call('SMEMBERS', KEYS[1])
for first = 1, #names, 1000 do
    redis.call('UNLINK', unpack(names, first, math.min(first + 999, #names)))
end
redis.call('UNLINK', KEYS[1])
"""


class RedisCache:
    """A cache in Redis.

    The names of the pages are kept in a set, ``incidentkit:pages``: a page is only read if it
    stands there, so that one that somebody else stored, or that outlived the set, is never
    served; and a clear removes just what stands there, whatever else the Redis holds.

    Args:
        redis: A client of one's own, which stays open when the cache is closed. Give it short
            timeouts and no retries: redis-py's defaults hold a call for up to a minute.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._owns_redis = False
        self._clear = redis.register_script(_CLEAR)

    @classmethod
    def from_url(cls, redis_url: str) -> RedisCache:
        """Return a cache with connections of its own.

        Args:
            redis_url: ``redis://user:password@host:port/db``, ``rediss://`` for TLS.

        Raises:
            InvalidSettings: If the URL cannot be read.
        """
        try:
            pool = BlockingConnectionPool.from_url(
                redis_url,
                max_connections=MAX_CONNECTIONS,
                timeout=POOL_TIMEOUT,
                socket_timeout=SOCKET_TIMEOUT,
                socket_connect_timeout=SOCKET_TIMEOUT,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise InvalidSettings("redis_url", "is not a Redis URL") from error
        cache = cls(Redis.from_pool(pool))
        cache._owns_redis = True
        return cache

    async def get(self, key: str) -> bytes | None:
        """Return the value if its name stands in the set."""
        async with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.sismember(INDEX_KEY, key)
            pipeline.get(key)
            known, value = await pipeline.execute()
        return value if known else None

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        """Keep the value and its name, both or neither."""
        seconds = max(1, round(ttl))
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.sadd(INDEX_KEY, key)
            pipeline.expire(INDEX_KEY, seconds)
            pipeline.set(key, value, ex=seconds)
            await pipeline.execute()

    async def clear(self) -> None:
        """Remove every page whose name stands in the set, and the set."""
        await self._clear(keys=[INDEX_KEY])

    async def ping(self) -> None:
        """Send PING."""
        await self._redis.ping()

    async def close(self) -> None:
        """Close the connections that are the cache's own."""
        if self._owns_redis:
            await self._redis.aclose()

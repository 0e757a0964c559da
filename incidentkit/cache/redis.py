"""Pages kept in Redis, shared by every process that uses it."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import parse_qsl, urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from incidentkit.cache.base import INDEX_KEY
from incidentkit.errors import InvalidSettings

SOCKET_TIMEOUT: Final = 0.25
"""Seconds to wait for a connection, and for each answer."""

MAX_CONNECTIONS: Final = 20

MAX_PAGES: Final = 10_000
"""Pages that are kept at a time: what a clear costs a Redis that others share is bounded."""

_SET: Final = """
if redis.call('SISMEMBER', KEYS[1], KEYS[2]) == 0 then
    if redis.call('SCARD', KEYS[1]) >= tonumber(ARGV[3]) then
        return
    end
    redis.call('SADD', KEYS[1], KEYS[2])
end
redis.call('EXPIRE', KEYS[1], ARGV[2])
redis.call('SET', KEYS[2], ARGV[1], 'EX', ARGV[2])
"""

# Atomic, so that no page can be stored and left behind while the others are removed.
_CLEAR: Final = """
local names = redis.call('SMEMBERS', KEYS[1])
for first = 1, #names, 1000 do
    redis.call('UNLINK', unpack(names, first, math.min(first + 999, #names)))
end
redis.call('UNLINK', KEYS[1])
"""

_DATABASE: Final = re.compile(r"/?|/[0-9]+")


class RedisCache:
    """A cache in Redis.

    The names of the pages are kept in a set, ``incidentkit:pages``: a page is only read if its
    name stands there, so that one that outlived the set, or that somebody else stored under a
    name that does not stand there, is not served; and a clear removes just what stands there,
    whatever else the Redis holds. Two databases of incidents need two databases of Redis.

    Args:
        redis: A client of one's own, which stays open when the cache is closed. Give it short
            timeouts and no retries: redis-py's defaults hold a call for up to a minute.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._owns_redis = False
        self._set = redis.register_script(_SET)
        self._clear = redis.register_script(_CLEAR)

    @classmethod
    def from_url(cls, redis_url: str) -> RedisCache:
        """Return a cache with connections of its own.

        Args:
            redis_url: ``redis://user:password@host:port/db``, ``rediss://`` for TLS,
                ``unix:///path?db=0`` for a socket; with parameters as redis-py takes them.

        Raises:
            InvalidSettings: If any part of the URL cannot be used.
        """
        try:
            _check_parts(redis_url)
            pool = BlockingConnectionPool.from_url(
                redis_url,
                max_connections=MAX_CONNECTIONS,
                # The client bounds the time of a call, waiting for a connection included.
                timeout=None,
                socket_timeout=SOCKET_TIMEOUT,
                socket_connect_timeout=SOCKET_TIMEOUT,
                retry=Retry(NoBackoff(), 0),
            )
            # The pool would only find out on the first call what a connection does not take.
            pool.connection_class(**pool.connection_kwargs)
        except (ValueError, TypeError, AttributeError, RedisError):
            # The exception may have the password in its text.
            raise InvalidSettings("redis_url", "is not a URL that redis-py can use") from None
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
        """Keep the value and its name, both or, with too many pages kept already, neither."""
        await self._set(keys=[INDEX_KEY, key], args=[value, max(1, round(ttl)), MAX_PAGES])

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


def _check_parts(redis_url: str) -> None:
    """Raise ValueError for what redis-py would pass over without a word."""
    parts = urlsplit(redis_url)
    # An unencoded "#" or "/" in a password ends up in one of these.
    right_path = bool(parts.path) if parts.scheme == "unix" else _DATABASE.fullmatch(parts.path)
    if not right_path or parts.fragment:
        raise ValueError("The path or the fragment is not one of a Redis URL")
    if not all(value for _, value in parse_qsl(parts.query, keep_blank_values=True)):
        raise ValueError("A parameter is empty")

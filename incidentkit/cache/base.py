"""What a cache does, and the choice of one from a URL."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, Protocol

from incidentkit.domain.errors import InvalidSettings, MissingDependency

if TYPE_CHECKING:
    from incidentkit.cache.redis import RedisCache

TTL: Final = 3600
"""Seconds that a page is kept."""

INDEX_KEY: Final = "incidentkit:pages"
"""Where a shared cache may keep the names of the pages that it holds: outside ``incidents:*``."""


class IncidentCache(Protocol):
    """Where pages of the list are kept, by name.

    A cache may raise anything and may be slow: the client bounds the time of each call, and goes
    on without the cache while it fails.
    """

    async def get(self, key: str) -> bytes | None:
        """Return what :meth:`set` kept under the key since the last :meth:`clear`, or None."""
        ...

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        """Keep the value under the key for at most ``ttl`` seconds."""

    async def clear(self) -> None:
        """Forget every value, whichever process kept it."""

    async def ping(self) -> None:
        """Raise unless the cache answers."""

    async def close(self) -> None:
        """Give back every connection; calling it again does nothing."""


_SCHEME: Final = re.compile(r"rediss?(\+cluster|\+sentinel)?|unix")


def check_redis_url(redis_url: str) -> None:
    """Return if the URL is one for a Redis, whatever else it holds.

    Raises:
        InvalidSettings: If it is for something else.
    """
    scheme, separator, _ = redis_url.partition("://")
    if not separator or not _SCHEME.fullmatch(scheme):
        raise InvalidSettings(
            "redis_url",
            "must start with redis://, redis+cluster:// or redis+sentinel://, with rediss for TLS, "
            "or unix://",
        )


def cache_from_url(redis_url: str) -> RedisCache:
    """Return the cache, not yet connected, for the URL of a Redis.

    Raises:
        InvalidSettings: If the URL cannot be used.
        MissingDependency: If the package ``redis`` is not installed.
    """
    check_redis_url(redis_url)
    try:
        from incidentkit.cache.redis import RedisCache  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if error.name != "redis":
            raise
        raise MissingDependency("redis", extra="redis") from error
    return RedisCache.from_url(redis_url)

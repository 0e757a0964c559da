"""Choose a cache by URL, and load redis-py only for a Redis."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from incidentkit.domain.errors import InvalidSettings, MissingDependency

if TYPE_CHECKING:
    from incidentkit.cache.redis import RedisCache  # loads redis-py, which is an extra

_SCHEME: Final = re.compile(r"rediss?(\+cluster|\+sentinel)?|unix")


def check_redis_url(redis_url: str) -> None:
    """Check the scheme of a URL, and no other part of it.

    Raises:
        InvalidSettings: If it is not the scheme of a Redis.
    """
    scheme, separator, _ = redis_url.partition("://")
    if not separator or not _SCHEME.fullmatch(scheme):
        raise InvalidSettings(
            "redis_url",
            "must start with redis://, redis+cluster:// or redis+sentinel://, with rediss for TLS, "
            "or unix://",
        )


def cache_from_url(redis_url: str, *, prefix: str = "") -> RedisCache:
    """Return the cache that a URL names, not yet connected.

    Args:
        redis_url: The URL of a Redis, a Redis Cluster or Sentinels.
        prefix: The beginning of every key, to keep several databases apart.

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
    return RedisCache.from_url(redis_url, prefix=prefix)

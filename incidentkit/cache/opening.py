"""The choice of a cache by its URL."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from incidentkit.domain.errors import InvalidSettings, MissingDependency

if TYPE_CHECKING:
    from incidentkit.cache.redis import RedisCache

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

"""The protocol of a cache, and the constants that every cache shares."""

from __future__ import annotations

from typing import Final, Protocol

from incidentkit.domain.values import MAX_STALENESS

TTL: Final = MAX_STALENESS
"""Seconds that a page is kept."""

PAGE_PREFIX: Final = "incidents:"
"""How the name of every page begins."""

INDEX_KEY: Final = "incidentkit:pages"
"""Key under which a shared cache can keep the names of its pages: outside ``incidents:*``."""


class IncidentCache(Protocol):
    """Keeps pages of the list, by name.

    A cache may raise any exception and may be slow: the client limits the time of each call, and
    continues without the cache while it fails.

    A cache may also have two plain methods: ``abandon()`` releases every connection without the
    event loop that opened it, which has ended. ``sever()`` disconnects a process that was just
    forked, and must reach neither the server nor the event loop.
    """

    async def get(self, key: str) -> bytes | None:
        """Return the value that :meth:`set` stored since the last :meth:`clear`, or None."""
        ...

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        """Store a value for at most ``ttl`` seconds."""

    async def clear(self) -> None:
        """Remove every value, including those that other processes stored."""

    async def ping(self) -> None:
        """Raise unless the cache answers."""

    async def close(self) -> None:
        """Release every connection; a second call does nothing."""

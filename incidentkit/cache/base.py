"""What a cache does, and the choice of one from a URL."""

from __future__ import annotations

from typing import Final, Protocol

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

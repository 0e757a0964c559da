"""A least-recently-used cache in the process."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Generic, NamedTuple, TypeVar

DEFAULT_MAX_BYTES: Final = 8 * 1024 * 1024
"""Default maximum size of the pages in the process, in bytes."""

ENTRY_BYTES: Final = 400
"""Approximate cost of an entry in addition to its key and its value."""

_T = TypeVar("_T")


class _Entry(NamedTuple, Generic[_T]):
    value: _T
    expires_at: float
    cost: int


class LruCache(Generic[_T]):
    """Keeps values up to a total size; the least recently used ones make room.

    Args:
        size: Returns the size of a value in bytes. A value larger than the cache is not kept.
        max_bytes: Maximum total size of the values, their keys and a fixed cost for each entry.
        clock: Returns the time in seconds; it must be monotonic.

    Attributes:
        kept_bytes: Total size of the entries.
    """

    def __init__(
        self, size: Callable[[_T], int], max_bytes: int, *, clock: Callable[[], float]
    ) -> None:
        self._size = size
        self._max_bytes = max_bytes
        self._clock = clock
        self._entries: OrderedDict[str, _Entry[_T]] = OrderedDict()
        self.kept_bytes = 0

    def get(self, key: str) -> _T | None:
        """Return the value, or None if it is missing or has expired."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if self._clock() >= entry.expires_at:
            self._remove(key)
            return None
        self._entries.move_to_end(key)
        return entry.value

    def set(self, key: str, value: _T, ttl: float) -> None:
        """Keep a value for ``ttl`` seconds, and evict others to make room."""
        self._remove(key)
        cost = ENTRY_BYTES + len(key) + self._size(value)
        if cost > self._max_bytes:
            return
        self._entries[key] = _Entry(value, self._clock() + ttl, cost)
        self.kept_bytes += cost
        while self.kept_bytes > self._max_bytes:
            self._remove(next(iter(self._entries)))

    def discard(self, key: str, value: _T) -> None:
        """Remove the value, unless the key has another value by now."""
        entry = self._entries.get(key)
        if entry is not None and entry.value is value:
            self._remove(key)

    def clear(self) -> None:
        """Remove every value."""
        self._entries.clear()
        self.kept_bytes = 0

    def _remove(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.kept_bytes -= entry.cost


class MemoryCache:
    """A least-recently-used cache in the process.

    Args:
        max_bytes: Maximum total size of the values, their keys and a fixed cost for each page. A
            larger value is not kept.
        clock: Returns the time in seconds; it must be monotonic.
    """

    def __init__(
        self, max_bytes: int = DEFAULT_MAX_BYTES, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._values: LruCache[bytes] = LruCache(len, max_bytes, clock=clock)

    async def get(self, key: str) -> bytes | None:
        """Return the value, or None if it is missing or has expired."""
        return self._values.get(key)

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        """Keep a value for ``ttl`` seconds, and evict others to make room."""
        self._values.set(key, value, ttl)

    async def clear(self) -> None:
        """Remove every value."""
        self._values.clear()

    async def ping(self) -> None:
        """Do nothing: the process is always there."""

    async def close(self) -> None:
        """Remove every value."""
        self._values.clear()

"""Pages kept in the process."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_MAX_BYTES: Final = 32 * 1024 * 1024

ENTRY_BYTES: Final = 400
"""What a page costs beside its key and its value, about."""


class MemoryCache:
    """A bounded cache in the process; what was used longest ago makes room first.

    Args:
        max_bytes: How many bytes are kept, counting a value, its key and a fixed cost for each
            page. A value larger than that is not kept.
        clock: Returns the time in seconds, never going back.
    """

    def __init__(
        self, max_bytes: int = DEFAULT_MAX_BYTES, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_bytes = max_bytes
        self._clock = clock
        self._values: OrderedDict[str, tuple[bytes, float]] = OrderedDict()
        self._bytes = 0

    async def get(self, key: str) -> bytes | None:
        """Return the value unless it is too old."""
        value, expires_at = self._values.get(key, (None, 0.0))
        if value is None:
            return None
        if self._clock() >= expires_at:
            self._remove(key)
            return None
        self._values.move_to_end(key)
        return value

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        """Keep the value, and make room for it."""
        self._remove(key)
        if _cost(key, value) > self._max_bytes:
            return
        self._values[key] = (value, self._clock() + ttl)
        self._bytes += _cost(key, value)
        while self._bytes > self._max_bytes:
            self._remove(next(iter(self._values)))

    async def clear(self) -> None:
        """Forget every value."""
        self._values.clear()
        self._bytes = 0

    async def ping(self) -> None:
        """Do nothing: the process answers."""

    async def close(self) -> None:
        """Forget every value."""
        await self.clear()

    def _remove(self, key: str) -> None:
        if key in self._values:
            value, _ = self._values.pop(key)
            self._bytes -= _cost(key, value)


def _cost(key: str, value: bytes) -> int:
    return len(key) + len(value) + ENTRY_BYTES

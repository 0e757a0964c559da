"""Pages kept in the process."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Final, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_MAX_BYTES: Final = 8 * 1024 * 1024

ENTRY_BYTES: Final = 400
"""What a page costs beside its key and its value, about."""

_T = TypeVar("_T")


class Memory(Generic[_T]):
    """A bounded number of bytes by name; what was used longest ago makes room first.

    Args:
        size: Returns the bytes of a value. One that has more than fit is not kept.
        max_bytes: How many bytes are kept, counting a value, its key and a fixed cost for each.
        clock: Returns the time in seconds, never going back.

    Attributes:
        size: The number of bytes that are kept.
    """

    def __init__(
        self, size: Callable[[_T], int], max_bytes: int, *, clock: Callable[[], float]
    ) -> None:
        self._size = size
        self._max_bytes = max_bytes
        self._clock = clock
        # With the time until which it is kept, and what it costs.
        self._values: OrderedDict[str, tuple[_T, float, int]] = OrderedDict()
        self.size = 0

    def get(self, key: str) -> _T | None:
        """Return the value unless it is too old."""
        kept = self._values.get(key)
        if kept is None:
            return None
        if self._clock() >= kept[1]:
            self._remove(key)
            return None
        self._values.move_to_end(key)
        return kept[0]

    def set(self, key: str, value: _T, ttl: float) -> None:
        """Keep the value for so many seconds, and make room for it."""
        self._remove(key)
        cost = ENTRY_BYTES + len(key) + self._size(value)
        if cost > self._max_bytes:
            return
        self._values[key] = (value, self._clock() + ttl, cost)
        self.size += cost
        while self.size > self._max_bytes:
            self._remove(next(iter(self._values)))

    def discard(self, key: str, value: _T) -> None:
        """Forget the value, unless there is another one under the key by now."""
        if self._values.get(key, (None,))[0] is value:
            self._remove(key)

    def clear(self) -> None:
        """Forget every value."""
        self._values.clear()
        self.size = 0

    def _remove(self, key: str) -> None:
        if key in self._values:
            self.size -= self._values.pop(key)[2]


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
        self._values: Memory[bytes] = Memory(len, max_bytes, clock=clock)

    async def get(self, key: str) -> bytes | None:
        """Return the value unless it is too old."""
        return self._values.get(key)

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        """Keep the value, and make room for it."""
        self._values.set(key, value, ttl)

    async def clear(self) -> None:
        """Forget every value."""
        self._values.clear()

    async def ping(self) -> None:
        """Do nothing: the process answers."""

    async def close(self) -> None:
        """Forget every value."""
        self._values.clear()

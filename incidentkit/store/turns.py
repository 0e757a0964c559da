"""Let calls that may wait for the same lock run one after the other."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TypeAlias

from incidentkit.store.share import Share

Key: TypeAlias = tuple[str, int | str | None]
"""What is locked: the name of a field, and its value."""


class Turns:
    """Bounds the connections of calls that wait for locks of other transactions.

    A host's transaction can hold the lock of an incident or of a key for a long time. Each call
    that needs it would take a connection, until none is left for calls that wait for nothing. With
    turns, one lock takes one connection, and all locks together a share.

    Args:
        places: Maximum number of calls that run at a time, at least 1.
        timeout: Seconds to wait for a turn, and for a place.
    """

    def __init__(self, places: int, timeout: float) -> None:
        self._timeout = timeout
        self._places = Share(
            places, timeout, f"{places} other calls waited {timeout:g} seconds for locks"
        )
        # The share of a key is one place.
        self._keys: dict[Key, Share] = {}
        self._calls: dict[Key, int] = {}

    @asynccontextmanager
    async def __call__(self, keys: Sequence[Key]) -> AsyncIterator[None]:
        """Wait until it is the caller's turn for every key, in their order, and for a place.

        Raises:
            StoreUnavailable: If that takes too long.
        """
        async with AsyncExitStack() as turn:
            for key in keys:
                await turn.enter_async_context(self._turn(key))
            await turn.enter_async_context(self._places)
            yield

    @asynccontextmanager
    async def _turn(self, key: Key) -> AsyncIterator[None]:
        share = self._keys.get(key)
        if share is None:
            reason = f"other calls with this {key[0]} waited {self._timeout:g} seconds for its lock"
            share = self._keys[key] = Share(1, self._timeout, reason)
        self._calls[key] = self._calls.get(key, 0) + 1
        try:
            async with share:
                yield
        finally:
            self._calls[key] -= 1
            if not self._calls[key]:
                del self._calls[key], self._keys[key]

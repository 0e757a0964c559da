"""Let calls that may wait for the same lock run one after the other."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TypeAlias
from weakref import WeakValueDictionary

from incidentkit.affinity import Affinity, running_loop
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
        timeout: Seconds to wait for each key, and for a place.
    """

    def __init__(self, places: int, timeout: float) -> None:
        self._timeout = timeout
        self._places = Share(
            places, timeout, f"{places} other calls waited {timeout:g} seconds for locks"
        )
        # A key goes when no call holds it or waits for it.
        self._keys: WeakValueDictionary[Key, Share] = WeakValueDictionary()
        self._affinity = Affinity()

    @asynccontextmanager
    async def __call__(self, keys: Sequence[Key]) -> AsyncIterator[None]:
        """Hold every key, in their order, and a place.

        Args:
            keys: What the call may lock. Calls name keys that they share in the same order.

        Raises:
            StoreUnavailable: If that takes too long.
            WrongEventLoop: On another event loop than that of the other calls.
        """
        if self._affinity.loop is not running_loop():
            raise self._affinity.error()
        held: list[Share] = []
        try:
            for share in (*map(self._key, keys), self._places):
                await share.take()
                held.append(share)
            yield
        finally:
            for share in held:
                share.give()

    def _key(self, key: Key) -> Share:
        """Return the share of a key, which one call holds at a time."""
        share = self._keys.get(key)
        if share is None:
            seconds = f"{self._timeout:g} seconds"
            reason = f"other calls with this {key[0]} waited {seconds} for a lock"
            share = self._keys[key] = Share(1, self._timeout, reason)
        return share

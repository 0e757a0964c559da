"""Let calls that may wait for the same lock run one after the other."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import TypeAlias

from incidentkit.affinity import Affinity, running_loop
from incidentkit.domain.errors import StoreUnavailable
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
        self.timeout = timeout
        self.places = Share(
            places, timeout, f"{places} other calls waited {timeout:g} seconds for locks"
        )
        # The keys that are taken, each with the calls that wait for it.
        self._waiting: dict[Key, deque[asyncio.Future[None]]] = {}
        self._affinity = Affinity()

    def __call__(self, keys: Sequence[Key]) -> Turn:
        """Return the turn of a call, to be awaited with ``async with``.

        Args:
            keys: What the call may lock. Calls name keys that they share in the same order.

        Raises:
            WrongEventLoop: On another event loop than that of the other calls.
        """
        if self._affinity.loop is not running_loop():
            raise self._affinity.error()
        return Turn(self, keys)

    async def take(self, key: Key) -> None:
        """Wait for a key.

        Raises:
            StoreUnavailable: If that takes too long.
        """
        waiting = self._waiting.get(key)
        if waiting is None:
            self._waiting[key] = deque()
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting.append(waiter)
        try:
            async with asyncio.timeout(self.timeout):
                await waiter
        except BaseException as error:
            if waiter.done() and not waiter.cancelled():
                # It got the key in the moment in which the caller gave up.
                self.give(key)
            if isinstance(error, TimeoutError):
                reason = (
                    f"other calls with this {key[0]} waited {self.timeout:g} seconds for a lock"
                )
                raise StoreUnavailable(reason) from None
            raise

    def give(self, key: Key) -> None:
        """Pass a key to the next call that waits for it, or free it."""
        waiting = self._waiting[key]
        while waiting:
            waiter = waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        del self._waiting[key]


class Turn:
    """The turn of one call: every key, in their order, and a place."""

    __slots__ = ("_held", "_keys", "_turns")

    def __init__(self, turns: Turns, keys: Sequence[Key]) -> None:
        self._turns = turns
        self._keys = keys
        self._held: list[Key] = []

    async def __aenter__(self) -> None:
        """Wait for the turn.

        Raises:
            StoreUnavailable: If that takes too long.
        """
        try:
            for key in self._keys:
                await self._turns.take(key)
                self._held.append(key)
            await self._turns.places.take()
        except BaseException:
            self._give_keys()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._turns.places.give()
        self._give_keys()

    def _give_keys(self) -> None:
        for key in self._held:
            self._turns.give(key)

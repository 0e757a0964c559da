"""Bound the connections that one kind of call uses, so that the other kinds always find some."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from incidentkit.domain.errors import StoreUnavailable


class Share:
    """The connections that one kind of call may use; ``async with`` takes one of them.

    Args:
        places: Maximum number of calls that run at a time, at least 1.
        timeout: Seconds to wait for a place.
        reason: What the error says if there is none.

    Attributes:
        waiting: Number of calls that wait for a place.
        on_timeout: Called when a call has waited in vain; None: nothing is.
    """

    def __init__(self, places: int, timeout: float, reason: str) -> None:
        self._places = asyncio.Semaphore(places)
        self._timeout = timeout
        self._reason = reason
        self.waiting = 0
        self.on_timeout: Callable[[], object] | None = None

    async def take(self) -> None:
        """Wait for a place.

        Raises:
            StoreUnavailable: If none is free in time.
        """
        if not self._places.locked():
            # Returns at once.
            await self._places.acquire()
            return
        self.waiting += 1
        try:
            async with asyncio.timeout(self._timeout):
                await self._places.acquire()
        except TimeoutError:
            if self.on_timeout is not None:
                self.on_timeout()
            raise StoreUnavailable(self._reason) from None
        finally:
            self.waiting -= 1

    def give(self) -> None:
        """Leave the place to another call."""
        self._places.release()

    def give_after(self, tasks: Sequence[asyncio.Future[Any]]) -> None:
        """Leave the place to another call once these have ended."""
        if tasks:
            asyncio.gather(*tasks, return_exceptions=True).add_done_callback(lambda _: self.give())
        else:
            self.give()

    async def __aenter__(self) -> None:
        """Wait for a place, as :meth:`take` does."""
        await self.take()

    async def __aexit__(self, *_: object) -> None:
        self.give()


def writing_share(maximum: int, timeout: float) -> Share:
    """Return the share of writes, which leave a quarter of the connections to reads, at least one.

    Another transaction can keep all writes waiting, as one that builds an index does. Reads wait
    for none. Of five connections or more, writes also leave those of scans.
    """
    places = max(1, maximum - max(1, maximum // 4) - maximum // 5)
    reason = f"all {places} connections for writing were in use for {timeout:g} seconds"
    return Share(places, timeout, reason)


def scanning_share(maximum: int, timeout: float) -> Share:
    """Return the share of scans: a fifth of the connections, at least one."""
    return scans(max(1, maximum // 5), timeout)


def scans(places: int, timeout: float) -> Share:
    """Return a share of this size for scans."""
    reason = (
        f"all {places} connections for searches, totals and deep pages were in use for "
        f"{timeout:g} seconds"
    )
    return Share(places, timeout, reason)

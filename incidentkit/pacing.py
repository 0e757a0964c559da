"""Let other tasks and threads run during a long computation."""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import Final

BURST: Final = 0.001
"""Seconds of a computation after which others run."""

PAUSE: Final = 0.001
"""Seconds for which others run.

A turn of the event loop would not be enough. It releases the interpreter for so short a time that a
waiting thread does not get it, and starts its wait again.
"""


class Pace:
    """Interrupts a computation of the event loop, so that it takes at most half of the time.

    Await :meth:`pause` after every part of the computation; a part should take well less than
    :data:`BURST`.
    """

    def __init__(self) -> None:
        self._due = perf_counter() + BURST

    async def pause(self) -> None:
        """Let others run, if the computation has taken its time."""
        if perf_counter() >= self._due:
            await asyncio.sleep(PAUSE)
            self._due = perf_counter() + BURST

"""A long computation lets other tasks and threads run."""

from __future__ import annotations

import asyncio
from itertools import count
from typing import TYPE_CHECKING

from incidentkit import pacing
from incidentkit.pacing import BURST, PAUSE, Pace

if TYPE_CHECKING:
    import pytest


async def test_it_pauses_as_long_as_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """After every burst it sleeps for as long, which lets waiting threads run too."""
    assert PAUSE >= BURST > 0
    pauses: list[float] = []
    now = count()
    # Each part takes a second and looks at the clock once, or twice if there is a pause.
    monkeypatch.setattr(pacing, "perf_counter", lambda: next(now))
    monkeypatch.setattr(pacing, "BURST", 3)

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    pace = Pace()
    for _ in range(30):
        await pace.pause()
    assert pauses == [PAUSE] * 10


async def test_a_short_computation_does_not_pause() -> None:
    """A computation that takes no time is not slowed down."""
    pace = Pace()
    task = asyncio.ensure_future(pace.pause())
    await asyncio.sleep(0)
    assert task.done()

"""A long computation lets other tasks and threads run."""

from __future__ import annotations

import asyncio
import json
from itertools import count, pairwise
from typing import TYPE_CHECKING

import pytest

from incidentkit import pacing
from incidentkit.http.answers import encode_array
from incidentkit.pacing import BURST, PAUSE, STEP, in_parts
from incidentkit.wire import dump_json

if TYPE_CHECKING:
    from collections.abc import Sequence


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
    await in_parts(len, range(30 * STEP))
    assert pauses == [PAUSE] * 10


async def test_a_short_computation_does_not_pause() -> None:
    """A computation of few items is not slowed down."""
    task = asyncio.ensure_future(in_parts(list, range(STEP)))
    await asyncio.sleep(0)
    assert task.done()
    assert task.result() == [list(range(STEP))]


async def test_one_computation_runs_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With many callers, other tasks run after each part, not after a part of each caller."""
    monkeypatch.setattr(pacing, "BURST", 0)
    seen: list[str] = []

    def compute(part: Sequence[int]) -> int:
        seen.append("computed")
        return len(part)

    async def watch() -> None:
        while True:
            seen.append("turn")
            await asyncio.sleep(0)

    watching = asyncio.ensure_future(watch())
    found = await asyncio.gather(*(in_parts(compute, range(4 * STEP)) for _ in range(8)))
    watching.cancel()
    assert found == [[STEP] * 4] * 8
    assert ("computed", "computed") not in {*pairwise(seen)}


async def test_a_caller_that_gives_up_leaves_its_turn() -> None:
    """A cancelled computation, waiting or begun, keeps no other one from running."""
    many = range(1000 * STEP)
    tasks = [asyncio.ensure_future(in_parts(sum, many)) for _ in range(3)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    async with asyncio.timeout(60):
        assert await in_parts(sum, range(2 * STEP)) == [
            sum(range(STEP)),
            sum(range(STEP, 2 * STEP)),
        ]


def test_each_event_loop_has_its_turn() -> None:
    """Event loops that run one after another do not share a turn."""

    async def compete() -> list[list[int]]:
        return await asyncio.gather(*(in_parts(len, range(3 * STEP)) for _ in range(3)))

    assert [asyncio.run(compete()) for _ in range(2)] == [[[STEP] * 3] * 3] * 2


@pytest.mark.parametrize("number", [0, 1, STEP, STEP + 1, 333])
async def test_an_array_is_whole(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An array that is encoded in parts, of any length, is whole and in order."""
    monkeypatch.setattr(pacing, "BURST", 0)
    numbers = list(range(number))
    assert json.loads(await encode_array(numbers, dump_json)) == numbers

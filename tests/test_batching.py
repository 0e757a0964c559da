"""Concurrent calls share a run, but never one that started before they were made."""

from __future__ import annotations

import asyncio
import types
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from incidentkit import StoreUnavailable, batching
from incidentkit.batching import Batcher, Coalescer

if TYPE_CHECKING:
    from collections.abc import Coroutine, Generator


class Source:
    """Answers each call with the number of its run, once that run's gate is open."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.ended: list[str] = []
        self.gates: dict[int, asyncio.Event] = {}
        self.error: Exception | None = None

    async def __call__(self, key: str) -> int:
        """Wait for the gate of this run, if there is one."""
        self.started.append(key)
        number = len(self.started)
        try:
            if number in self.gates:
                await self.gates[number].wait()
            if self.error is not None:
                raise self.error
        finally:
            self.ended.append(key)
        return number

    def gate(self, *numbers: int) -> None:
        """Make these runs wait until their gate is opened."""
        for number in numbers:
            self.gates[number] = asyncio.Event()


@pytest.fixture
def source() -> Source:
    """The source of the answers."""
    return Source()


@pytest.fixture
def ask(source: Source, monkeypatch: pytest.MonkeyPatch) -> Coalescer[str, int]:
    """A coalescer on the source that waits a minute for earlier runs."""
    monkeypatch.setattr(batching, "PATIENCE", 60.0)
    return Coalescer(source)


async def turns() -> None:
    """Run every task that is ready."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_calls_of_one_moment_share_a_run(ask: Coalescer[str, int]) -> None:
    """Concurrent calls share one run and its answer."""
    assert await asyncio.gather(*(ask("a") for _ in range(100))) == [1] * 100
    assert await ask("a") == 2


async def test_a_run_under_way_is_not_joined(ask: Coalescer[str, int], source: Source) -> None:
    """Calls made during a run share the next one, which starts when the first ends."""
    source.gate(1)
    first = asyncio.ensure_future(ask("a"))
    await turns()
    later = [asyncio.ensure_future(ask("a")) for _ in range(3)]
    await turns()
    assert source.started == ["a"]
    source.gates[1].set()
    assert await asyncio.gather(first, *later) == [1, 2, 2, 2]


async def test_keys_do_not_wait_for_each_other(ask: Coalescer[str, int], source: Source) -> None:
    """A run for one key neither answers nor delays another key."""
    source.gate(1)
    first = asyncio.ensure_future(ask("a"))
    await turns()
    assert await ask("b") == 2
    source.gates[1].set()
    assert await first == 1


async def test_a_run_that_hangs_does_not_hold_up_the_next(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once patience runs out, the next run starts beside a hanging one."""
    monkeypatch.setattr(batching, "PATIENCE", 0.01)
    ask = Coalescer(source)
    source.gate(1)
    hanging = asyncio.ensure_future(ask("a"))
    await turns()
    assert await ask("a") == 2
    source.gates[1].set()
    assert await hanging == 1


async def test_a_cancelled_call_leaves_the_others(ask: Coalescer[str, int], source: Source) -> None:
    """If one of several callers is cancelled, first or last, the rest still get their answer."""
    for gone in (0, 2):
        source.gate(len(source.started) + 1)
        calls = [asyncio.ensure_future(ask("a")) for _ in range(3)]
        await turns()
        calls[gone].cancel()
        await turns()
        assert calls[gone].cancelled()
        source.gates[len(source.started)].set()
        rest = [call for call in calls if call is not calls[gone]]
        assert await asyncio.gather(*rest) == [len(source.started)] * 2


async def test_a_run_that_nobody_waits_for_never_starts(
    ask: Coalescer[str, int], source: Source
) -> None:
    """A waiting run whose callers are all cancelled never starts; a running one continues."""
    source.gate(1)
    first = asyncio.ensure_future(ask("a"))
    await turns()
    second = asyncio.ensure_future(ask("a"))
    await turns()
    second.cancel()
    first.cancel()
    await turns()
    assert source.ended == []
    source.gates[1].set()
    await turns()
    assert source.ended == ["a"]
    assert await ask("a") == 2


async def test_an_error_is_that_of_everybody_who_shares_it(
    ask: Coalescer[str, int], source: Source
) -> None:
    """All callers of a failed run get its error, and the next call starts a new run."""
    source.error = LookupError("not there")
    outcomes = await asyncio.gather(*(ask("a") for _ in range(3)), return_exceptions=True)
    assert outcomes == [source.error] * 3
    source.error = None
    assert await ask("a") == 2


@dataclass(frozen=True)
class RegionDown(StoreUnavailable):
    """An immutable error of another store."""

    region: str


@pytest.mark.parametrize("has_notes", [False, True])
async def test_a_note_in_an_error_is_for_one_caller_alone(
    ask: Coalescer[str, int], source: Source, *, has_notes: bool
) -> None:
    """Each caller of a failed run gets its own copy of the error, with the cause."""
    cause = OSError("connection reset")
    source.error = StoreUnavailable("the connection was lost")
    source.error.__cause__ = cause
    notes = ["of the store"] if has_notes else []
    for note in notes:
        source.error.add_note(note)
    errors = await asyncio.gather(*(ask("a") for _ in range(3)), return_exceptions=True)
    assert len(source.started) == 1
    for number, error in enumerate(errors):
        assert isinstance(error, StoreUnavailable)
        assert error.reason == "the connection was lost"
        assert error.__cause__ is cause
        assert error.__suppress_context__
        assert error.__traceback__ is not None
        error.add_note(f"while call {number} was handled")
        assert error.__notes__ == [*notes, f"while call {number} was handled"]


async def test_an_error_that_is_not_ours_is_raised_to_all(
    ask: Coalescer[str, int], source: Source
) -> None:
    """An error that cannot be copied still reaches every caller."""
    source.error = RegionDown("west")
    errors = await asyncio.gather(*(ask("a") for _ in range(3)), return_exceptions=True)
    assert errors == [source.error] * 3


async def test_nothing_is_kept_of_runs_that_have_ended(ask: Coalescer[str, int]) -> None:
    """No key is kept after its runs have ended."""
    await asyncio.gather(*(ask(str(number)) for number in range(100)))
    await turns()
    assert ask._batchers == {}


async def test_runs_can_be_waited_for(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """`finish` returns once every run has ended, including an overtaken one."""
    monkeypatch.setattr(batching, "PATIENCE", 0.01)
    ask = Coalescer(source)
    source.gate(1)
    hanging = asyncio.ensure_future(ask("a"))
    await turns()
    assert await ask("a") == 2
    finishing = asyncio.ensure_future(ask.finish())
    await turns()
    assert not finishing.done()
    source.gates[1].set()
    await finishing
    assert hanging.done() or await hanging == 1


class Sums:
    """Runs batches: answers each number with its double, and records the batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate: asyncio.Event | None = None

    async def __call__(self, numbers: list[int]) -> list[int | Exception]:
        """Refuse 13 alone, and 99 with its whole batch."""
        self.batches.append(numbers)
        if self.gate is not None:
            await self.gate.wait()
        if 99 in numbers:
            raise LookupError("the batch")
        return [LookupError("the item") if number == 13 else 2 * number for number in numbers]


async def test_a_faulty_item_leaves_its_neighbours() -> None:
    """An item's error is raised only in its own call; an error of the batch, in every call."""
    double: Batcher[int, int] = Batcher(Sums())
    answers = await asyncio.gather(*map(double, (1, 13, 2)), return_exceptions=True)
    assert [str(answer) for answer in answers] == ["2", "the item", "4"]
    answers = await asyncio.gather(*map(double, (1, 99)), return_exceptions=True)
    assert [str(answer) for answer in answers] == ["the batch", "the batch"]


async def test_batches_have_a_size_and_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of a batch and the number of running batches are limited."""
    monkeypatch.setattr(batching, "PATIENCE", 60.0)
    sums = Sums()
    sums.gate = asyncio.Event()
    double: Batcher[int, int] = Batcher(sums, running=2, size=3)
    answers = [double(number) for number in range(10)]
    await turns()
    assert sums.batches == [[0, 1, 2], [3, 4, 5]]
    sums.gate.set()
    assert await asyncio.gather(*answers) == [2 * number for number in range(10)]
    assert sums.batches[2:] == [[6, 7, 8], [9]]


async def test_an_item_goes_with_its_call_until_its_batch_starts() -> None:
    """A call that is cancelled before its batch starts is not in the batch."""
    sums = Sums()
    sums.gate = asyncio.Event()
    double: Batcher[int, int] = Batcher(sums)
    first = [double(number) for number in (1, 2)]
    await turns()
    second = [double(number) for number in (3, 4)]
    first[0].cancel()
    second[0].cancel()
    sums.gate.set()
    assert (await first[1], await second[1]) == (4, 8)
    assert sums.batches == [[1, 2], [4]]


async def test_a_batch_that_never_began_keeps_nobody_waiting() -> None:
    """If a batch's task is cancelled before its first step, the next batch takes its calls."""
    sums = Sums()
    double: Batcher[int, int] = Batcher(sums)
    first = double(1)
    for task in double._running:
        task.cancel()
    await turns()
    assert [await first, await double(2)] == [2, 4]


async def test_a_call_without_neighbours_starts_at_once() -> None:
    """Without load, a batch starts on the next iteration of the event loop, without a timer."""
    sums = Sums()
    double: Batcher[int, int] = Batcher(sums)
    answer = double(1)
    await asyncio.sleep(0)
    assert sums.batches == [[1]]
    assert await answer == 2


async def test_a_batch_that_all_have_left_can_be_ended() -> None:
    """With `abandon`, a batch is cancelled along with its last call, and not before."""
    sums = Sums()
    sums.gate = asyncio.Event()
    double: Batcher[int, int] = Batcher(sums, abandon=True)
    first, second = double(1), double(2)
    await turns()
    first.cancel()
    await turns()
    assert len(double._running) == 1
    second.cancel()
    await turns()
    assert not double._running
    third = double(3)
    sums.gate.set()
    assert await third == 6


@types.coroutine
def go_on(first: Any, steps: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Finish a coroutine that has started and is waiting."""
    while True:
        yield first
        try:
            first = steps.send(None)
        except StopIteration as end:
            return end.value


def begin_at_once(
    loop: asyncio.AbstractEventLoop, steps: Any, **options: Any
) -> asyncio.Future[Any]:
    """Run the first step of a task at its creation, as eager tasks of Python 3.12 do."""
    try:
        first = steps.send(None)
    except StopIteration as end:
        answer = loop.create_future()
        answer.set_result(end.value)
        return answer

    async def rest() -> Any:
        return await go_on(first, steps)

    return asyncio.Task(rest(), loop=loop, **options)


async def test_a_loop_that_begins_tasks_at_once_answers_as_well() -> None:
    """With a host's eager task factory, calls still share batches and get their answers."""
    sums = Sums()
    double: Batcher[int, int] = Batcher(sums)
    loop = asyncio.get_running_loop()
    loop.set_task_factory(begin_at_once)
    assert await loop.create_task(asyncio.sleep(0, "begun")) == "begun"
    async with asyncio.timeout(10):
        assert [await answer for answer in (double(1), double(2))] == [2, 4]
    assert sums.batches == [[1, 2]]


async def test_a_batch_is_in_nobodys_context() -> None:
    """A batch does not see the context variables of its callers."""
    tenant = ContextVar("tenant", default="nobody")
    seen: list[str] = []

    async def look(items: list[str]) -> list[str]:
        seen.append(tenant.get())
        await asyncio.sleep(0)
        return items

    ask: Batcher[str, str] = Batcher(look)

    async def one(name: str) -> None:
        tenant.set(name)
        for _ in range(3):
            assert await ask(name) == name
        assert tenant.get() == name

    await asyncio.gather(*(asyncio.create_task(one(name)) for name in "abc"))
    assert set(seen) == {"nobody"}


async def test_a_wrong_number_of_answers_fails_every_call() -> None:
    """With a wrong number of answers, every call of the batch fails and none hangs."""

    async def lose_one(items: list[int]) -> list[int]:
        return items[1:]

    ask: Batcher[int, int] = Batcher(lose_one)
    outcomes = await asyncio.gather(ask(1), ask(2), return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["1 answers for 2 calls"] * 2
    await ask.finish()


async def test_what_waits_behind_a_call_that_was_alone_is_waited_for() -> None:
    """`finish` waits for every call, even if the first caller awaits it on getting its answer."""
    sums = Sums()
    sums.gate = asyncio.Event()
    double: Batcher[int, int] = Batcher(sums)

    async def first() -> None:
        await double(1)
        await double.finish()
        assert all(call.done() for call in waiting)

    ending = asyncio.create_task(first())
    await turns()
    waiting = [double(number) for number in range(3)]
    await turns()
    sums.gate.set()
    await ending


async def test_patience_can_be_endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `patient`, no batch starts beside a hanging one, and cancelled calls are dropped."""
    monkeypatch.setattr(batching, "PATIENCE", 0.0)
    sums = Sums()
    sums.gate = asyncio.Event()
    double: Batcher[int, int] = Batcher(sums, patient=True)
    first = double(1)
    await turns()
    left, stayed = double(2), double(3)
    await asyncio.sleep(0.01)
    left.cancel()
    assert sums.batches == [[1]]
    sums.gate.set()
    assert [await first, await stayed] == [2, 6]
    assert sums.batches == [[1], [3]]


async def test_an_older_batcher_does_not_hide_a_younger_one(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When two runs of a key end together, a run started on their answer is still tracked."""
    monkeypatch.setattr(batching, "PATIENCE", 0.0)
    source.gate(1, 2, 3)
    ask = Coalescer(source)

    async def again() -> int:
        await ask("k")
        return await ask("k")

    first = ask("k")
    await turns()
    second = asyncio.create_task(again())
    await turns()
    assert len(source.started) == 2
    source.gates[1].set()
    source.gates[2].set()
    await first
    await turns()
    assert len(source.started) == 3
    ending = asyncio.create_task(ask.finish())
    await turns()
    assert not ending.done()
    source.gates[3].set()
    await ending
    assert await second == 3

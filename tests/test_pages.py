"""When a cached page may be served and stored, whatever the cache does."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from incidentkit import CacheUnavailable
from incidentkit.cache import MemoryCache
from incidentkit.cache.pages import CALL_TIMEOUT, RETRY_AFTER, PageCache

if TYPE_CHECKING:
    from collections.abc import Callable

KEY = "incidents:1:10:any:any"


class FaultyCache(MemoryCache):
    """A cache that fails or hangs when it is told to, and records what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.fails = False
        self.hangs: set[str] = set()
        self.answers_late: set[str] = set()
        self.changed = asyncio.Event()
        self.calls: list[str] = []

    def works(self) -> None:
        """Let every call go on."""
        self.fails = False
        self.hangs.clear()
        self.answers_late.clear()
        self.changed.set()

    async def _reached(self, call: str) -> None:
        self.calls.append(call)
        while call in self.hangs:
            await self.changed.wait()
        if self.fails:
            raise ConnectionError("redis://:secret@somewhere refused")

    async def get(self, key: str) -> bytes | None:
        """Fail, hang, or return the value."""
        await self._reached("get")
        return await super().get(key)

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        """Fail, hang, or keep the value."""
        await self._reached("set")
        await super().set(key, value, ttl)

    async def clear(self) -> None:
        """Fail, hang, or forget every value."""
        await self._reached("clear")
        await super().clear()
        while "clear" in self.answers_late:
            await self.changed.wait()

    async def ping(self) -> None:
        """Fail or hang."""
        await self._reached("ping")


class Clock:
    """A clock that is set by hand, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def cache() -> FaultyCache:
    """A cache that works until told otherwise."""
    return FaultyCache()


@pytest.fixture
def clock() -> Clock:
    """The clock of the pages."""
    return Clock()


@pytest.fixture
def pages(cache: FaultyCache, clock: Clock) -> PageCache:
    """Pages in that cache."""
    return PageCache(cache, clock=clock)


async def test_a_page_is_served_until_a_clear(pages: PageCache) -> None:
    """What was stored is served, and no more once a clear was asked for."""
    await pages.set(KEY, b"[]", pages.generation)
    assert await pages.get(KEY) == b"[]"
    await pages.clear()
    assert await pages.get(KEY) is None


async def test_a_page_read_before_a_clear_is_not_stored(pages: PageCache) -> None:
    """A page that was read from the database before a write cleared the cache stays out of it."""
    generation = pages.generation
    await pages.clear()
    await pages.set(KEY, b"stale", generation)
    assert await pages.get(KEY) is None


async def test_a_page_on_its_way_does_not_outlive_a_clear(
    pages: PageCache, cache: FaultyCache
) -> None:
    """A clear waits for a page that is just being stored, so that it is removed with the others."""
    cache.hangs = {"set"}
    storing = asyncio.ensure_future(pages.set(KEY, b"stale", pages.generation))
    await asyncio.sleep(0)
    clearing = asyncio.ensure_future(pages.clear())
    await asyncio.sleep(0)
    assert cache.calls == ["set"]
    cache.works()
    await asyncio.gather(storing, clearing)
    assert cache.calls == ["set", "clear"]
    assert await pages.get(KEY) is None


async def test_nothing_is_served_while_a_clear_is_under_way(
    pages: PageCache, cache: FaultyCache
) -> None:
    """From the moment that a clear is asked for until it has succeeded, every page is a miss."""
    await pages.set(KEY, b"stale", pages.generation)
    cache.hangs = {"clear"}
    clearing = asyncio.ensure_future(pages.clear())
    await asyncio.sleep(0)
    assert await pages.get(KEY) is None
    cache.works()
    await clearing


async def test_each_of_two_clears_has_to_succeed() -> None:
    """With two clears under way, the end of the first does not yet let pages be served."""
    gates = [asyncio.Event(), asyncio.Event()]

    class GatedCache(MemoryCache):
        started = 0

        async def clear(self) -> None:
            gate = gates[self.started]
            self.started += 1
            await gate.wait()

    cache = GatedCache()
    pages = PageCache(cache)
    first = asyncio.ensure_future(pages.clear())
    second = asyncio.ensure_future(pages.clear())
    await asyncio.sleep(0)
    await cache.set(KEY, b"stale", 10)
    gates[0].set()
    await first
    assert await pages.get(KEY) is None
    gates[1].set()
    await second
    assert await pages.get(KEY) == b"stale"


@pytest.mark.parametrize("fault", ["fails", "hangs"])
@pytest.mark.parametrize("call", ["get", "set", "clear"])
async def test_a_fault_is_never_the_callers(
    pages: PageCache, cache: FaultyCache, call: str, fault: str
) -> None:
    """A cache that fails or hangs makes no call fail, and none last longer than its timeout."""
    cache.fails = fault == "fails"
    if fault == "hangs":
        cache.hangs = {call}
    calls: dict[str, Callable[[], object]] = {
        "get": lambda: pages.get(KEY),
        "set": lambda: pages.set(KEY, b"[]", pages.generation),
        "clear": pages.clear,
    }
    async with asyncio.timeout(CALL_TIMEOUT * 20):
        outcome = await calls[call]()  # type: ignore[misc]
    assert outcome is None
    assert not pages.available


async def test_a_faulty_cache_is_left_alone_for_a_while(
    pages: PageCache, cache: FaultyCache, clock: Clock
) -> None:
    """After a failure no call reaches the cache until it is time to try again, then just one."""
    cache.fails = True
    await pages.get(KEY)
    cache.calls.clear()
    for _ in range(100):
        await pages.get(KEY)
        await pages.set(KEY, b"[]", pages.generation)
        await pages.clear()
    assert cache.calls == []
    clock.now += RETRY_AFTER
    await asyncio.gather(*(pages.get(KEY) for _ in range(100)))
    assert cache.calls == ["clear"]


async def test_a_cache_that_comes_back_is_cleared_before_it_is_trusted(
    pages: PageCache, cache: FaultyCache, clock: Clock
) -> None:
    """A page that could not be removed while the cache was away is never served afterwards."""
    await pages.set(KEY, b"stale", pages.generation)
    cache.fails = True
    await pages.clear()
    cache.fails = False
    assert await pages.get(KEY) is None
    clock.now += RETRY_AFTER
    assert await pages.get(KEY) is None
    assert pages.available
    await pages.set(KEY, b"fresh", pages.generation)
    assert await pages.get(KEY) == b"fresh"


async def test_a_clear_missed_during_the_recovery_is_made_up(
    pages: PageCache, cache: FaultyCache, clock: Clock
) -> None:
    """A write while the recovery's clear is answered makes the recovery clear once more."""
    cache.fails = True
    await pages.clear()
    cache.fails = False
    clock.now += RETRY_AFTER
    cache.answers_late = {"clear"}
    recovering = asyncio.ensure_future(pages.get(KEY))
    await asyncio.sleep(0)
    await MemoryCache.set(cache, KEY, b"stale, from another process", 10)
    await pages.clear()
    cache.works()
    assert await recovering is None
    assert cache.calls[-2:] == ["clear", "get"]
    await pages.set(KEY, b"fresh", pages.generation)
    assert await pages.get(KEY) == b"fresh"


async def test_an_outage_is_logged_once(
    pages: PageCache, cache: FaultyCache, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """However many calls an outage meets, the log has one line for it and one for its end."""
    caplog.set_level("INFO", logger="incidentkit.cache")
    cache.fails = True
    for _ in range(5):
        await asyncio.gather(*(pages.get(KEY) for _ in range(20)))
        clock.now += RETRY_AFTER
    cache.fails = False
    await pages.get(KEY)
    await pages.get(KEY)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "WARNING",
            "The cache is unavailable (ConnectionError), lists are read from the database",
        ),
        ("INFO", "The cache is back"),
    ]
    assert "secret" not in caplog.text


async def test_a_change_by_another_process_clears(pages: PageCache, cache: FaultyCache) -> None:
    """A database version that was not seen before clears; the same one, or none, does not."""
    await pages.notice(1)
    await pages.set(KEY, b"[]", pages.generation)
    cache.calls.clear()
    await pages.notice(1)
    await pages.notice(None)
    assert cache.calls == []
    assert await pages.get(KEY) == b"[]"
    await pages.notice(2)
    assert await pages.get(KEY) is None


async def test_ping_tells_whether_the_cache_answers(pages: PageCache, cache: FaultyCache) -> None:
    """`ping` is the one call that raises: CacheUnavailable, without the driver's words."""
    await pages.ping()
    cache.fails = True
    with pytest.raises(CacheUnavailable) as caught:
        await pages.ping()
    assert "secret" not in str(caught.value)


async def test_a_cancelled_call_is_no_fault(pages: PageCache, cache: FaultyCache) -> None:
    """A caller that gives up does not make the cache count as away."""
    cache.hangs = {"get"}
    reading = asyncio.ensure_future(pages.get(KEY))
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert pages.available


class RaisingCache(MemoryCache):
    """A cache that raises when it is called, rather than when it is awaited, or cancels itself."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def get(self, key: str) -> Any:  # noqa: ARG002
        """Raise at once."""
        raise self.error

    async def clear(self) -> None:
        """Raise when awaited."""
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError(), asyncio.CancelledError()])
async def test_no_error_of_a_cache_is_the_callers(error: BaseException) -> None:
    """Whatever a cache raises, also when it is only called, is a failure of the cache."""
    pages = PageCache(RaisingCache(error))
    assert await pages.get(KEY) is None
    assert not pages.available
    pages = PageCache(RaisingCache(error))
    await pages.clear()
    assert not pages.available

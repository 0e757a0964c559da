"""The circuit breaker hides a cache that fails, is slow or hangs."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from incidentkit import CacheUnavailable
from incidentkit.cache import MemoryCache
from incidentkit.cache.breaker import CALL_TIMEOUT, RETRY_AFTER, CircuitBreaker

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

KEY = "incidents:1:10:any:any"


class FaultyCache(MemoryCache):
    """A cache that fails or hangs on demand, and records its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.fails = False
        self.hangs = False
        self.calls: list[str] = []

    async def _reached(self, call: str) -> None:
        self.calls.append(call)
        if self.hangs:
            await asyncio.Event().wait()
        if self.fails:
            raise ConnectionError("redis://:secret@somewhere refused")

    async def get(self, key: str) -> bytes | None:
        """Fail, hang, or return the value."""
        await self._reached("get")
        return await super().get(key)

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        """Fail, hang, or store the value."""
        await self._reached("set")
        await super().set(key, value, ttl)

    async def clear(self) -> None:
        """Fail, hang, or remove every value."""
        await self._reached("clear")
        await super().clear()

    async def ping(self) -> None:
        """Fail or hang."""
        await self._reached("ping")

    async def close(self) -> None:
        """Fail or hang."""
        await self._reached("close")


class Clock:
    """A clock in seconds that tests set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def cache() -> FaultyCache:
    """A cache that works until a test changes it."""
    return FaultyCache()


@pytest.fixture
def clock() -> Clock:
    """The clock of the breaker."""
    return Clock()


@pytest.fixture
def breaker(cache: FaultyCache, clock: Clock) -> CircuitBreaker:
    """A breaker around the cache."""
    return CircuitBreaker(cache, clock=clock)


async def test_a_cache_that_works_is_used(breaker: CircuitBreaker) -> None:
    """The breaker stores, returns and clears values."""
    await breaker.set(KEY, b"[]", 10)
    assert await breaker.get(KEY) == b"[]"
    await breaker.clear()
    assert await breaker.get(KEY) is None
    assert breaker.available


@pytest.mark.parametrize("fault", ["fails", "hangs"])
@pytest.mark.parametrize("call", ["get", "set", "clear", "probe", "close"])
async def test_a_fault_is_never_the_callers(
    breaker: CircuitBreaker, cache: FaultyCache, call: str, fault: str
) -> None:
    """A cache that fails or hangs neither fails a call nor delays it beyond the timeout."""
    setattr(cache, fault, True)
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "get": lambda: breaker.get(KEY),
        "set": lambda: breaker.set(KEY, b"[]", 10),
        "clear": breaker.clear,
        "probe": breaker.probe,
        "close": breaker.close,
    }
    async with asyncio.timeout(CALL_TIMEOUT * 20):
        assert await calls[call]() is None
    assert not breaker.available


async def test_a_faulty_cache_is_left_alone_for_a_while(
    breaker: CircuitBreaker, cache: FaultyCache, clock: Clock
) -> None:
    """After a failure, no call reaches the cache until a single call retries it."""
    cache.fails = True
    await breaker.get(KEY)
    cache.calls.clear()
    for _ in range(100):
        await breaker.get(KEY)
        await breaker.set(KEY, b"[]", 10)
        await breaker.clear()
        await breaker.probe()
    assert cache.calls == []
    clock.now += RETRY_AFTER
    await asyncio.gather(*(breaker.get(KEY) for _ in range(100)))
    assert cache.calls == ["get"]


async def test_a_cache_that_comes_back_is_used_again(
    breaker: CircuitBreaker, cache: FaultyCache, clock: Clock
) -> None:
    """The first call that succeeds after a failure puts the cache back into use."""
    cache.fails = True
    await breaker.clear()
    cache.fails = False
    await breaker.set(KEY, b"lost", 10)
    clock.now += RETRY_AFTER
    await breaker.probe()
    assert breaker.available
    assert await breaker.get(KEY) is None
    await breaker.set(KEY, b"[]", 10)
    assert await breaker.get(KEY) == b"[]"


async def test_an_outage_is_logged_once(
    breaker: CircuitBreaker, cache: FaultyCache, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """An outage writes two log lines: one when it starts and one when it ends."""
    caplog.set_level("INFO", logger="incidentkit.cache")
    cache.fails = True
    for _ in range(5):
        await asyncio.gather(*(breaker.get(KEY) for _ in range(20)))
        clock.now += RETRY_AFTER
    cache.fails = False
    await breaker.get(KEY)
    await breaker.get(KEY)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "WARNING",
            (
                "The cache is unavailable: FaultyCache failed with ConnectionError; "
                "lists are read from the database"
            ),
        ),
        ("INFO", "The cache is available again: FaultyCache"),
    ]
    assert "secret" not in caplog.text


async def test_ping_tells_whether_the_cache_answers(
    breaker: CircuitBreaker, cache: FaultyCache
) -> None:
    """`ping` raises CacheUnavailable, without the text of the driver's exception."""
    await breaker.ping()
    cache.fails = True
    with pytest.raises(CacheUnavailable) as caught:
        await breaker.ping()
    assert "secret" not in str(caught.value)


async def test_a_cancelled_call_is_no_fault(breaker: CircuitBreaker, cache: FaultyCache) -> None:
    """A cancelled call does not count as a failure of the cache."""
    cache.hangs = True
    reading = asyncio.ensure_future(breaker.get(KEY))
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert cache.calls == ["get"]
    assert breaker.available


class RaisingCache(MemoryCache):
    """A cache whose `get` raises when called and whose `clear` raises when awaited."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def get(self, key: str) -> Any:  # noqa: ARG002
        """Raise at once."""
        raise self.error

    async def clear(self) -> None:
        """Raise when awaited."""
        raise self.error


@pytest.mark.parametrize("value", ["[]", 1, {}])
async def test_what_is_no_bytes_is_a_miss(value: Any) -> None:
    """A value of the wrong type from an application's cache counts as a miss."""

    class OddCache(MemoryCache):
        async def get(self, key: str) -> Any:  # noqa: ARG002
            return value

    assert await CircuitBreaker(OddCache()).get(KEY) is None


@pytest.mark.parametrize("error", [RuntimeError(), asyncio.CancelledError()])
async def test_no_error_of_a_cache_is_the_callers(error: BaseException) -> None:
    """Any exception from a cache, even one raised before awaiting, counts as its failure."""
    breaker = CircuitBreaker(RaisingCache(error))
    assert await breaker.get(KEY) is None
    assert not breaker.available
    breaker = CircuitBreaker(RaisingCache(error))
    await breaker.clear()
    assert not breaker.available

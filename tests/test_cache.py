"""What every cache does, and what the one in Redis does to a Redis that others share."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from redis.asyncio import Redis

from incidentkit import IncidentClient, InvalidSettings
from incidentkit.cache import INDEX_KEY, TTL, MemoryCache, cache_from_url
from incidentkit.cache.redis import RedisCache

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from incidentkit import Incident
    from incidentkit.cache import IncidentCache

KEY = "incidents:1:10:any:any"
OTHER = "incidents:2:10:new:partner"


@pytest.fixture(params=["memory", "redis"])
async def cache(request: pytest.FixtureRequest) -> AsyncIterator[IncidentCache]:
    """An empty cache."""
    if request.param == "memory":
        cache: IncidentCache = MemoryCache()
    else:
        cache = cache_from_url(request.getfixturevalue("redis_url"))
    yield cache
    await cache.close()


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    """A plain client of the Redis that the cache uses, too."""
    async with Redis.from_url(redis_url) as redis:
        yield redis


@pytest.fixture
async def redis_cache(redis_url: str) -> AsyncIterator[RedisCache]:
    """An empty cache in Redis."""
    cache = cache_from_url(redis_url)
    yield cache
    await cache.close()


async def test_a_value_is_kept_as_it_is(cache: IncidentCache) -> None:
    """What was set comes back byte for byte, also if it is empty, and a later value replaces it."""
    for value in (b"[]", b"", b"\x00\xff", b"x" * 1_000_000):
        await cache.set(KEY, value, TTL)
        assert await cache.get(KEY) == value
    assert await cache.get(OTHER) is None


async def test_a_clear_forgets_everything(cache: IncidentCache) -> None:
    """After a clear nothing that was set comes back, and new values are kept again."""
    for page in range(2500):
        await cache.set(f"incidents:{page}:10:any:any", b"[]", TTL)
    await cache.clear()
    assert [await cache.get(f"incidents:{page}:10:any:any") for page in (0, 1, 2499)] == [None] * 3
    await cache.set(KEY, b"[1]", TTL)
    assert await cache.get(KEY) == b"[1]"


async def test_an_empty_cache_can_be_cleared(cache: IncidentCache) -> None:
    """A clear with nothing to forget is no error."""
    await cache.clear()
    await cache.clear()


async def test_a_cache_answers_a_ping_and_closes_twice(cache: IncidentCache) -> None:
    """A cache that works raises nothing when pinged, nor when closed again."""
    await cache.ping()
    await cache.close()
    await cache.close()


async def test_memory_is_bounded() -> None:
    """The cache in the process never holds more than its bytes; what was least used goes first."""
    cache = MemoryCache(max_bytes=10_000)
    await cache.set("a", b"x" * 4_000, TTL)
    await cache.set("b", b"x" * 4_000, TTL)
    assert await cache.get("a") is not None
    await cache.set("c", b"x" * 4_000, TTL)
    assert [await cache.get(key) is not None for key in "abc"] == [True, False, True]
    await cache.set("d", b"x" * 10_000, TTL)
    assert await cache.get("d") is None
    await cache.set("c", b"y" * 5_000, TTL)
    assert [await cache.get(key) is not None for key in "ac"] == [True, True]


async def test_memory_is_bounded_in_pages_that_are_empty() -> None:
    """However small the pages are, what keeping them costs counts."""
    cache = MemoryCache(max_bytes=100_000)
    for page in range(1000):
        await cache.set(f"incidents:{page}:10:any:any", b"[]", TTL)
    kept = [await cache.get(f"incidents:{page}:10:any:any") for page in range(1000)]
    assert 100 < len(kept) - kept.count(None) < 250


async def test_memory_forgets_what_is_too_old() -> None:
    """A value in the process is gone once its seconds have passed."""
    now = 0.0
    cache = MemoryCache(clock=lambda: now)
    await cache.set(KEY, b"[]", 10)
    now = 9.9
    assert await cache.get(KEY) == b"[]"
    now = 10.0
    assert await cache.get(KEY) is None


async def test_redis_holds_the_documented_keys(
    redis_url: str, redis: Redis, sqlite_url: str
) -> None:
    """A list is cached under the contract's key, as the array that REST returns, for an hour."""
    async with IncidentClient.open(sqlite_url, redis_url) as incidents:
        incident = await incidents.create("Disk is full", source="monitoring")
        await incidents.list()
        await incidents.list(page=2, limit=5, status="failed", source="partner")
        time = incident.created_at.strftime("%Y-%m-%d %H:%M:%S")
        assert (
            await redis.get("incidents:1:10:any:any")
            == (
                '[{"incident_id":1,"incident_message":"Disk is full","incident_type":"new",'
                f'"source":"monitoring","created_at":"{time}"}}]'
            ).encode()
        )
        assert await redis.get("incidents:2:5:failed:partner") == b"[]"
        assert 3590 <= await redis.ttl("incidents:1:10:any:any") <= TTL
        assert TTL == 3600


async def test_a_write_leaves_none_of_our_keys_and_all_of_the_others(
    redis_url: str, redis: Redis, sqlite_url: str
) -> None:
    """After a create or a status change no page is left, and foreign keys are untouched."""
    await redis.set("incidents-of-others", b"1")
    await redis.set("incidents:foreign:key", b"2")
    async with IncidentClient.open(sqlite_url, redis_url) as incidents:
        await incidents.create("Disk is full", source="monitoring")
        writes: list[Callable[[], Awaitable[Incident]]] = [
            lambda: incidents.create("Disk is full", source="monitoring"),
            lambda: incidents.update_status(1, "failed"),
        ]
        for write in writes:
            for page in range(1, 5):
                await incidents.list(page=page)
            assert len(await redis.keys("incidents:*")) == 5
            await write()
            assert sorted(await redis.keys("*")) == [
                b"incidents-of-others",
                b"incidents:foreign:key",
            ]


async def test_a_clear_costs_the_same_whatever_else_redis_holds(
    redis_cache: RedisCache, redis: Redis
) -> None:
    """Neither KEYS nor SCAN is sent, and the commands of a clear do not grow with foreign keys."""

    async def commands_of_a_clear() -> dict[str, int]:
        await redis_cache.set(KEY, b"[]", TTL)
        await redis.config_resetstat()
        await redis_cache.clear()
        statistics = await redis.info("commandstats")
        return {name: entry["calls"] for name, entry in statistics.items()}

    await redis_cache.clear()
    before = await commands_of_a_clear()
    await redis.mset({f"incidents:foreign:{number}": b"" for number in range(10_000)})
    after = await commands_of_a_clear()
    for command in ("cmdstat_keys", "cmdstat_scan"):
        assert command not in after
    assert before["cmdstat_unlink"] == after["cmdstat_unlink"]
    assert before["cmdstat_smembers"] == after["cmdstat_smembers"] == 1


async def test_a_page_that_somebody_else_stored_is_not_served(
    redis_cache: RedisCache, redis: Redis
) -> None:
    """A value whose name is not in our index, such as one of the origin's, is a miss."""
    await redis.set(KEY, b"[]")
    assert await redis_cache.get(KEY) is None
    await redis_cache.set(KEY, b"[1]", TTL)
    await redis.delete(INDEX_KEY)
    assert await redis_cache.get(KEY) is None


async def test_the_index_does_not_outlive_its_pages(redis_cache: RedisCache, redis: Redis) -> None:
    """The index expires with the last page, so that an idle Redis is left empty."""
    await redis_cache.set(KEY, b"[]", 100)
    assert 90 <= await redis.ttl(INDEX_KEY) <= 100


async def test_calls_are_one_round_trip_each(redis_cache: RedisCache, redis: Redis) -> None:
    """A hit is two commands, a fill is one script, and each is sent at once."""
    await redis_cache.set(KEY, b"[]", TTL)
    await redis.config_resetstat()
    await redis_cache.set(KEY, b"[]", TTL)
    await redis_cache.get(KEY)
    statistics = await redis.info("commandstats")
    calls = {name.removeprefix("cmdstat_"): entry["calls"] for name, entry in statistics.items()}
    del calls["config|resetstat" if "config|resetstat" in calls else "config"]
    assert calls == {"evalsha": 1, "expire": 1, "set": 1, "sismember": 2, "get": 1}


async def test_redis_holds_a_bounded_number_of_pages(
    redis_cache: RedisCache, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once enough pages are kept no further one is, and those that are kept can be replaced."""
    monkeypatch.setattr("incidentkit.cache.redis.MAX_PAGES", 3)
    for page in range(5):
        await redis_cache.set(f"incidents:{page}:10:any:any", b"[]", TTL)
    await redis_cache.set("incidents:0:10:any:any", b"[1]", TTL)
    assert len(await redis.keys("incidents:*")) == 3
    assert await redis_cache.get("incidents:0:10:any:any") == b"[1]"
    assert await redis_cache.get("incidents:4:10:any:any") is None


async def test_a_client_of_ones_own_stays_open(redis: Redis) -> None:
    """A Redis client that was handed over is used, and not closed with the cache."""
    cache = RedisCache(redis)
    await cache.set(KEY, b"[]", TTL)
    await cache.close()
    assert await redis.get(KEY) == b"[]"


async def test_more_calls_than_connections_are_served(redis_cache: RedisCache) -> None:
    """Many concurrent calls share a bounded number of connections, and all succeed."""
    await redis_cache.set(KEY, b"[]", TTL)
    values = await asyncio.gather(*(redis_cache.get(KEY) for _ in range(200)))
    assert values == [b"[]"] * 200


@pytest.mark.parametrize(
    "url", ["http://localhost", "nonsense", "", "redis://localhost:port/0", "redis://h/0?db=x"]
)
def test_other_urls_are_refused(url: str) -> None:
    """A URL that is none of Redis' is a typed error that does not repeat it."""
    with pytest.raises(InvalidSettings, match="redis_url"):
        cache_from_url(url)

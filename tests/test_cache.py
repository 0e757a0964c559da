"""How every cache behaves, and how the Redis cache behaves in a shared Redis."""

from __future__ import annotations

import asyncio
import hmac
import time
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

import pytest
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.crc import key_slot
from redis.exceptions import RedisClusterException, RedisError, ResponseError

from incidentkit import IncidentClient, InvalidSettings
from incidentkit.cache import INDEX_KEY, TTL, MemoryCache, cache_from_url
from incidentkit.cache.redis import BATCH, MAX_PAGES, SOCKET_TIMEOUT, RedisCache
from tests import servers
from tests.hosts import run_sql
from tests.programs import open_connections

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping

    from incidentkit import Incident
    from incidentkit.cache import IncidentCache

KEY = "incidents:1:10:any:any"
OTHER = "incidents:2:10:new:partner"

SHARED = ("redis_url", "redis_cluster_url", "redis_sentinel_url")

FAILURES = (RedisError, RedisClusterException)

SOON = 2
"""Seconds, far above the time limit of a call and far below redis-py's own."""


@asynccontextmanager
async def opened(redis_url: str) -> AsyncIterator[RedisCache]:
    """Open a cache and close it at the end."""
    cache = cache_from_url(redis_url)
    try:
        yield cache
    finally:
        await cache.close()


@pytest.fixture(params=["memory", *SHARED])
async def cache(request: pytest.FixtureRequest) -> AsyncIterator[IncidentCache]:
    """An empty cache of each kind."""
    if request.param == "memory":
        yield MemoryCache()
    else:
        async with opened(request.getfixturevalue(request.param)) as cache:
            yield cache


@pytest.fixture(params=SHARED)
def shared_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty Redis of each kind."""
    return str(request.getfixturevalue(request.param))


@pytest.fixture
async def shared(shared_url: str) -> AsyncIterator[RedisCache]:
    """An empty cache in a Redis of each kind."""
    async with opened(shared_url) as cache:
        yield cache


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    """A plain client of the Redis that the cache uses."""
    async with Redis.from_url(redis_url) as redis:
        yield redis


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[bytes, ...]]]:
    """Record every write to a Redis from here on, each as a list of its commands."""
    writes: list[list[tuple[bytes, ...]]] = []
    send = AbstractConnection.send_packed_command

    async def record(
        self: AbstractConnection,
        packed: Iterable[bytes],
        check_health: bool = True,  # noqa: FBT002
    ) -> None:
        packed = list(packed)
        lines = iter(b"".join(packed).split(b"\r\n"))
        writes.append(
            [
                tuple((next(lines), next(lines))[1] for _ in range(int(line[1:])))
                for line in lines
                if line
            ]
        )
        await send(self, packed, check_health)

    monkeypatch.setattr(AbstractConnection, "send_packed_command", record)
    return writes


@pytest.fixture(scope="module")
def _own_cluster() -> Iterator[servers.RedisCluster]:
    with servers.RedisCluster() as cluster:
        yield cluster


@pytest.fixture
def own_cluster(_own_cluster: servers.RedisCluster) -> servers.RedisCluster:
    """A cluster for the tests that damage one."""
    _own_cluster.mend()
    for node in _own_cluster.servers:
        with node.client() as client:
            client.flushall()
    return _own_cluster


def key_on(node: servers.RedisServer) -> str:
    """Return the key of a page that belongs to this node of a cluster."""
    with node.client() as client:
        for page in range(1000):
            key = f"incidents:{page}:10:any:any"
            # MovedError, from redis-py 7.2 on.
            with suppress(ResponseError):
                client.get(key)
                return key
    raise AssertionError("the node has no slots")


def move(key: str, nodes: list[servers.RedisServer], target: servers.RedisServer) -> None:
    """Move the key's empty slot to another node of the cluster."""
    with target.client() as client:
        target_id = client.execute_command("CLUSTER MYID")
    for node in nodes:
        with node.client() as client:
            client.execute_command("CLUSTER SETSLOT", key_slot(key.encode()), "NODE", target_id)


def text(names: Iterable[bytes | str]) -> set[str]:
    """Return the names as strings."""
    return {name if isinstance(name, str) else name.decode() for name in names}


async def keys(redis: Redis | RedisCluster) -> set[str]:
    """Return the names of all keys."""
    if isinstance(redis, RedisCluster):
        return text(await redis.keys("*", target_nodes=RedisCluster.ALL_NODES))
    return text(await redis.keys("*"))


async def connections(redis: Redis | RedisCluster, name: str) -> list[int]:
    """Return how many connections with this name each server has."""
    if isinstance(redis, RedisCluster):
        lists = [await redis.client_list(target_nodes=node) for node in redis.get_nodes()]
    else:
        lists = [await redis.client_list()]
    return [sum(client["name"] == name for client in clients) for clients in lists]


async def works(cache: IncidentCache, key: str, value: bytes) -> None:
    """Raise unless the cache keeps a value."""
    await cache.set(key, value, TTL)
    assert await cache.get(key) == value


async def eventually(condition: Callable[[], Awaitable[object]]) -> None:
    """Wait until the call succeeds quickly, or raise its last error."""
    deadline = time.monotonic() + 30
    while True:
        started = time.monotonic()
        try:
            await condition()
        except FAILURES:
            assert time.monotonic() < started + SOON
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.01)
        else:
            return


async def test_a_value_is_kept_as_it_is(cache: IncidentCache) -> None:
    """A value comes back byte for byte, even an empty one, and a later value replaces it."""
    for value in (b"[]", b"", b"\x00\xff", b"x" * 1_000_000):
        await cache.set(KEY, value, TTL)
        assert await cache.get(KEY) == value
    assert await cache.get(OTHER) is None


async def test_a_clear_forgets_everything(
    cache: IncidentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clear removes every value, and new values are kept again."""
    monkeypatch.setattr("incidentkit.cache.redis.BATCH", 10)
    for number in (9, 10, 11, 25):
        pages = [f"incidents:{page}:10:any:any" for page in range(number)]
        for page in pages:
            await cache.set(page, b"[]", TTL)
        assert [await cache.get(page) for page in pages] == [b"[]"] * number
        await cache.clear()
        assert [await cache.get(page) for page in pages] == [None] * number
    await cache.set(KEY, b"[1]", TTL)
    assert await cache.get(KEY) == b"[1]"


async def test_an_empty_cache_can_be_cleared(cache: IncidentCache) -> None:
    """Clearing an empty cache is not an error."""
    await cache.clear()
    await cache.clear()


async def test_a_cache_answers_a_ping_and_closes_twice(cache: IncidentCache) -> None:
    """Pinging a working cache, and closing it twice, raises nothing."""
    await cache.ping()
    await cache.close()
    await cache.close()


async def test_memory_is_bounded() -> None:
    """The in-process cache respects its size and evicts the least recently used value first."""
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
    """The fixed cost of an entry limits the number of empty pages."""
    cache = MemoryCache(max_bytes=100_000)
    for page in range(1000):
        await cache.set(f"incidents:{page}:10:any:any", b"[]", TTL)
    kept = [await cache.get(f"incidents:{page}:10:any:any") for page in range(1000)]
    assert 100 < len(kept) - kept.count(None) < 250


async def test_memory_forgets_what_is_too_old() -> None:
    """A value in the in-process cache expires after its TTL."""
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
    """A list is cached for an hour, as the array that REST returns with the documented proof."""
    async with IncidentClient.open(sqlite_url, redis_url) as incidents:
        incident = await incidents.create("Disk is full", source="monitoring")
        await incidents.list()
        await incidents.list(page=2, limit=5, status="failed", source="partner")
        await incidents._opened().pages.finish()
        time = incident.created_at.strftime("%Y-%m-%d %H:%M:%S")
        token = await incidents.store.token()
        assert token is not None
        expected = {
            "incidents:1:10:any:any": (
                '[{"incident_id":1,"incident_message":"Disk is full","incident_type":"new",'
                f'"source":"monitoring","created_at":"{time}","version":1,"dedup_key":null,'
                f'"occurrences":1,"last_seen_at":"{time}","ended_at":null}}]'
            ),
            "incidents:2:5:failed:partner": "[]",
        }
        for key, page in expected.items():
            proof = hmac.new(token.encode(), f"{key}\n{page}".encode(), "sha256").hexdigest()
            value = f'{{"proof":"{proof}","incidents":{page}}}'
            assert await redis.get(key) == value.encode()
        assert 3590 <= await redis.ttl("incidents:1:10:any:any") <= TTL
        assert TTL == 3600


async def test_redis_never_holds_the_token(redis_url: str, redis: Redis, url: str) -> None:
    """Neither a key nor a value of Redis tells the token, or a value that it is made of."""
    async with IncidentClient.open(url, redis_url) as incidents:
        for page in range(1, 4):
            await incidents.create("Disk is full", source="monitoring")
            await incidents._opened().pages.finish()
            await incidents.list()
            await incidents.list(page=page, status="new")
        await incidents._opened().pages.finish()
        secrets = {str(await incidents.store.token())}
    rows = await run_sql(url, "SELECT CAST(token AS text) FROM incident_token")
    secrets |= {form for (row,) in rows for form in (row, row.replace("-", ""))}
    secrets |= {part for each in secrets for part in each.split(" ") if len(part) > 15}
    names = await keys(redis)
    pages = [name for name in names if name.startswith("incidents:")]
    assert pages
    held = " ".join([*names, *text(await redis.smembers(INDEX_KEY))])
    held += " ".join(text([value for value in await redis.mget(pages) if value is not None]))
    assert not [secret for secret in secrets if secret in held]


async def test_a_write_leaves_none_of_our_keys_and_all_of_the_others(
    redis_url: str, redis: Redis, sqlite_url: str
) -> None:
    """A create or a status change removes every page, and no other key."""
    await redis.set("incidents-of-others", b"1")
    await redis.set("incidents:foreign:key", b"2")
    async with IncidentClient.open(sqlite_url, redis_url) as incidents:
        await incidents.create("Disk is full", source="monitoring")
        await incidents.create("Disk is full", source="monitoring", dedup_key="disk")
        writes: list[Callable[[], Awaitable[Incident | None]]] = [
            lambda: incidents.create("Disk is full", source="monitoring"),
            lambda: incidents.update_status(1, "failed"),
            lambda: incidents.resolve("disk"),
        ]
        for write in writes:
            await incidents._opened().pages.finish()
            for page in range(1, 5):
                await incidents.list(page=page)
            await incidents._opened().pages.finish()
            assert len(await redis.keys("incidents:*")) == 5
            await write()
            await incidents._opened().pages.finish()
            assert sorted(await redis.keys("*")) == [
                b"incidents-of-others",
                b"incidents:foreign:key",
            ]


async def test_each_call_of_a_client_is_so_many_commands(
    redis_url: str, sqlite_url: str, sent: list[list[tuple[bytes, ...]]]
) -> None:
    """A list reads Redis at most once, a write clears the cache, and no other call uses Redis."""
    fill = [b"EXPIRE", b"SADD", b"SCARD", b"SET"]
    async with (
        IncidentClient.open(sqlite_url, redis_url) as incidents,
        IncidentClient.open(sqlite_url, redis_url) as others,
    ):
        calls: list[tuple[IncidentClient, Callable[[], Awaitable[object]], list[bytes]]] = [
            (incidents, lambda: incidents.create("Disk is full", source="partner"), [b"SPOP"]),
            (incidents, incidents.list, [*fill[:1], b"MGET", *fill[1:]]),
            (incidents, incidents.list, []),
            (others, others.list, [b"MGET"]),
            (others, others.list, []),
            (others, lambda: others.get(1), []),
            (others, others.search, []),
            (others, lambda: others.history(1), []),
            (others, others.read_changes, []),
            (others, lambda: others.update_status(1, "failed"), [b"SPOP", b"UNLINK"]),
            (others, lambda: others.note(1, "It came back"), [b"SPOP"]),
        ]
        counted = []
        for client, call, _ in calls:
            sent.clear()
            await call()
            await client._opened().pages.finish()
            counted.append(sorted(verb for write in sent for verb, *_ in write))
    assert counted == [expected for *_, expected in calls]


async def test_a_call_is_a_few_commands_of_one_key_at_once(
    shared: RedisCache,
    sent: list[list[tuple[bytes, ...]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A read takes one round trip, a fill one per node, and a clear two."""
    key, other, index = KEY.encode(), OTHER.encode(), INDEX_KEY.encode()
    cluster = isinstance(shared._redis, RedisCluster)
    nodes = 3 if cluster else 1

    async def commands(call: Awaitable[object], writes: int) -> list[tuple[bytes, ...]]:
        sent.clear()
        await call
        assert len(sent) <= writes
        return sorted(command for write in sent for command in write)

    await shared.set(KEY, b"[]", TTL)
    await shared.set(OTHER, b"[]", TTL)
    await shared.ping()
    assert await commands(shared.ping(), 1) == [(b"PING",)]
    assert await commands(shared.get(KEY), 1) == [(b"GET" if cluster else b"MGET", key)]
    kept = [
        (b"EXPIRE", index, b"3600"),
        (b"SADD", index, key),
        (b"SCARD", index),
        (b"SET", key, b"[]", b"EX", b"3600"),
    ]
    monkeypatch.setattr("incidentkit.cache.redis.MAX_PAGES", 2)
    assert await commands(shared.set(KEY, b"[]", 3599.6), min(nodes, 2)) == kept
    popped, *unlinked = await commands(shared.clear(), 1 + nodes)
    assert popped == (b"SPOP", index, str(BATCH).encode())
    assert {each for _, *names in unlinked for each in names} == {key, other}
    assert [verb for verb, *_ in unlinked] == [b"UNLINK"] * (2 if cluster else 1)
    assert await commands(shared.clear(), 1) == [(b"SPOP", index, str(BATCH).encode())]
    await shared.set(OTHER, b"[]", TTL)
    monkeypatch.setattr("incidentkit.cache.redis.MAX_PAGES", 1)
    *others, pop, unlink = await commands(shared.set(KEY, b"[]", 3600), min(nodes, 2) + 2)
    assert others == kept
    assert pop == (b"SPOP", index, b"1")
    assert unlink in ((b"UNLINK", key), (b"UNLINK", other))


async def test_what_others_keep_costs_nothing_and_stays(
    shared: RedisCache, sent: list[list[tuple[bytes, ...]]]
) -> None:
    """A clear leaves other keys alone, and sends the same commands however many there are."""
    foreign = {f"incidents:foreign:{number}" for number in range(100)}
    sizes = []
    for _ in range(2):
        await shared.set(KEY, b"[]", TTL)
        sent.clear()
        await shared.clear()
        sizes.append(sum(map(len, sent)))
        for key in foreign:
            await shared._redis.set(key, b"")
    assert sizes[0] == sizes[1] == 2
    assert await keys(shared._redis) == foreign


async def test_keys_of_another_type_are_replaced(shared: RedisCache) -> None:
    """A page key of another type is a miss; an index of another type fails a single call."""
    await shared._redis.lpush(KEY, "not a string")
    assert await shared.get(KEY) is None
    await works(shared, KEY, b"[]")
    await shared.clear()
    for call in (partial(shared.set, KEY, b"[]", TTL), shared.clear):
        await shared._redis.set(INDEX_KEY, b"not a set")
        with pytest.raises(ResponseError):
            await call()
        await call()
        await shared.clear()
        assert await keys(shared._redis) <= {KEY}


async def test_the_index_does_not_outlive_its_pages(shared: RedisCache) -> None:
    """The index expires with the last page, so that an idle Redis is left empty."""
    await shared.set(KEY, b"[]", 100)
    assert 90 <= await shared._redis.ttl(INDEX_KEY) <= 100
    assert 90 <= await shared._redis.ttl(KEY) <= 100


async def test_redis_holds_a_bounded_number_of_pages(
    shared: RedisCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the maximum, a random page is evicted, even the newest; a kept page can be replaced."""
    monkeypatch.setattr("incidentkit.cache.redis.MAX_PAGES", 3)
    pages = {f"incidents:{page}:10:any:any" for page in range(5)}
    kept = set()
    for _ in range(50):
        for page in pages:
            await shared.set(page, b"[]", TTL)
        stay = await keys(shared._redis) & pages
        assert len(stay) == 3
        assert text(await shared._redis.smembers(INDEX_KEY)) == stay
        kept |= stay
        await works(shared, stay.pop(), b"[1]")
    assert kept == pages
    assert MAX_PAGES == 1000


async def test_a_set_removes_a_bounded_number_of_pages(
    shared: RedisCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call removes at most one batch of pages, however long the index is."""
    for page in range(10):
        await shared.set(f"incidents:{page}:10:any:any", b"[]", TTL)
    monkeypatch.setattr("incidentkit.cache.redis.MAX_PAGES", 3)
    monkeypatch.setattr("incidentkit.cache.redis.BATCH", 2)
    await shared.set(KEY, b"[]", TTL)
    assert len(await keys(shared._redis) - {INDEX_KEY}) == 8


async def test_a_key_that_is_no_page_is_never_removed(shared: RedisCache) -> None:
    """A clear removes no other key, even if another program adds its name to the set."""
    await shared.set(KEY, b"[]", TTL)
    await shared._redis.set("orders:1", b"1")
    await shared._redis.sadd(INDEX_KEY, "orders:1")
    await shared.clear()
    assert await keys(shared._redis) == {"orders:1"}


@pytest.mark.parametrize("kind", [Redis, RedisCluster])
async def test_a_client_of_ones_own_stays_open(
    kind: type[Redis | RedisCluster], request: pytest.FixtureRequest
) -> None:
    """An application's Redis client stays open when the cache is closed."""
    url = request.getfixturevalue("redis_url" if kind is Redis else "redis_cluster_url")
    async with kind.from_url(url.replace("redis+cluster", "redis").partition(",")[0]) as redis:
        cache = RedisCache(redis)
        await works(cache, KEY, b"[]")
        connection = await redis.client_id()
        await cache.close()
        assert await redis.client_id() == connection


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://cache", "cache"),
        ("redis://", "localhost"),
        ("rediss://ann:hunter2@cache:6390/15?socket_timeout=1", "cache:6390/15"),
        ("redis://[::1]:6379/0", "[::1]:6379/0"),
        ("redis+cluster://:hunter2@a:1,[::1]:2", "a:1,[::1]:2"),
        ("redis+sentinel://:hunter2@a:1,b:2/main/3?sentinel_password=hunter2", "a:1,b:2/main/3"),
        ("unix:///run/redis.sock?password=hunter2", "/run/redis.sock"),
        ("unix://:hunter/2@/run/redis.sock", "/run/redis.sock"),
    ],
)
def test_messages_name_the_servers_without_the_account(url: str, address: str) -> None:
    """A cache's place names hosts, ports and database, but no user, password or parameter."""
    assert RedisCache.from_url(url).address == f"Redis at {address}"


async def test_many_calls_share_a_few_connections(shared_url: str) -> None:
    """Many concurrent calls succeed over at most three connections to each server."""
    async with opened(f"{shared_url}?client_name=many") as cache:
        await cache.set(KEY, b"[]", TTL)
        values = await asyncio.gather(*(cache.get(KEY) for _ in range(200)))
        assert values == [b"[]"] * 200
        await asyncio.gather(*(cache.set(f"incidents:{n}:10:any:any", b"", 9) for n in range(50)))
        # A cluster has one more connection to one node, for discovery.
        assert max(await connections(cache._redis, "many")) <= 3


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1:1",
        "redis+cluster://127.0.0.1:1,127.0.0.1:2",
        "redis+sentinel://127.0.0.1:1,127.0.0.1:2/incidents",
    ],
)
async def test_a_redis_that_is_away_is_an_error_at_once(url: str) -> None:
    """Every call to an unreachable Redis raises without waiting."""
    started = time.monotonic()
    async with opened(url) as cache:
        for call in (cache.ping(), cache.get(KEY), cache.set(KEY, b"[]", TTL), cache.clear()):
            with pytest.raises(FAILURES):
                await call
    assert time.monotonic() < started + SOON


@pytest.mark.parametrize("harm", ["kill", "pause"])
async def test_a_node_of_a_cluster_that_is_away_costs_its_own_pages_only(
    own_cluster: servers.RedisCluster, harm: str
) -> None:
    """Calls to a dead or hanging node fail quickly, others succeed, and the node recovers."""
    away, *others = own_cluster.servers
    lost, *kept = map(key_on, (away, *others))
    async with opened(own_cluster.url) as cache, opened(own_cluster.url) as new:
        for key in (lost, *kept):
            await works(cache, key, b"[1]")
        getattr(away, harm)()
        for call in (cache.get(lost), cache.get(lost), cache.set(lost, b"[2]", TTL)):
            started = time.monotonic()
            with pytest.raises(RedisError):
                await call
            assert time.monotonic() < started + SOON
        for each in (cache, new):
            await eventually(each.ping)
            for key in kept:
                await eventually(partial(works, each, key, b"[2]"))
        own_cluster.mend()
        for each in (cache, new):
            await eventually(partial(works, each, lost, b"[3]"))


async def test_slots_of_a_cluster_may_move(own_cluster: servers.RedisCluster) -> None:
    """Pages of a slot that has moved are stored and read on its new node."""
    origin, _, target = own_cluster.servers
    async with opened(own_cluster.url) as cache:
        for _ in range(8):
            key = key_on(origin)
            await works(cache, key, b"[1]")
            await cache.clear()
            move(key, own_cluster.servers, target)
            assert await cache.get(key) is None
            await works(cache, key, b"[2]")
            await cache.clear()


async def test_slots_of_a_dead_node_may_be_taken_over(own_cluster: servers.RedisCluster) -> None:
    """Once another node owns a dead node's slots, their pages are stored and read there."""
    dead, *others = own_cluster.servers
    key = key_on(dead)
    async with opened(own_cluster.url) as cache:
        await works(cache, key, b"[1]")
        dead.kill()
        move(key, others, others[1])
        with pytest.raises(RedisError):
            await cache.set(key, b"[2]", TTL)
        await eventually(partial(works, cache, key, b"[2]"))


async def test_a_cluster_may_move_to_other_addresses(
    own_cluster: servers.RedisCluster, redis_cluster_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When all nodes have moved, the cache asks the hosts of the URL again."""
    monkeypatch.setattr("incidentkit.cache.redis.SOCKET_TIMEOUT", 0.25)
    ports = [own_cluster.servers[0].port, int(redis_cluster_url.rpartition(":")[2])]
    arguments = Connection._connection_arguments

    def resolve(connection: Connection) -> Mapping[str, str | int]:
        if connection.host == "cluster":
            return {"host": servers.HOST, "port": ports[0]}
        return arguments(connection)

    monkeypatch.setattr(Connection, "_connection_arguments", resolve)
    async with opened("redis+cluster://cluster") as cache:
        await works(cache, KEY, b"[1]")
        del ports[0]
        for node in own_cluster.servers:
            node.pause()
        await eventually(partial(works, cache, KEY, b"[2]"))


async def test_a_cluster_returns_after_a_long_outage(own_cluster: servers.RedisCluster) -> None:
    """After more failures than a node may have connections, the cache works with the cluster."""
    async with opened(f"{own_cluster.url}?max_connections=2") as cache:
        await works(cache, KEY, b"[1]")
        for node in own_cluster.servers:
            node.kill()
        for _ in range(6):
            with pytest.raises(FAILURES):
                await cache.get(KEY)
        own_cluster.mend()
        await eventually(partial(works, cache, KEY, b"[2]"))


async def test_no_connection_is_left_after_a_failure(own_cluster: servers.RedisCluster) -> None:
    """Closing the cache after a redirect to a hanging node leaves no connection open."""
    origin, hung, other = own_cluster.servers
    key = key_on(origin)
    async with RedisCluster(servers.HOST, other.port) as redis:
        async with opened(f"{own_cluster.url}?client_name=failed") as cache:
            await cache.get(key)
            assert sum(await connections(redis, "failed"))
            move(key, own_cluster.servers, hung)
            hung.pause()
            with pytest.raises(RedisError):
                await cache.get(key)
            hung.resume()
        deadline = time.monotonic() + 30
        while sum(await connections(redis, "failed")):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)


async def test_the_successor_of_a_dead_master_is_found() -> None:
    """Once Sentinel has replaced a dead master, pages are stored in its successor."""
    with servers.RedisSentinel(down_after=1) as behind:
        url = behind.url.replace("://", "://127.0.0.1:1,")
        async with opened(url) as cache, opened(url) as new:
            await works(cache, KEY, b"[1]")
            behind.servers[0].kill()
            with pytest.raises(RedisError):
                await cache.get(KEY)
            for each in (cache, new):
                await eventually(partial(works, each, KEY, b"[2]"))
        with behind.servers[1].client() as successor:
            assert successor.get(KEY) == b"[2]"


def unopened(redis: Redis | RedisCluster) -> tuple[Connection, list[Connection]]:
    """Return a connection for pages, and the connections for discovery."""
    if isinstance(redis, RedisCluster):
        asked = [node.acquire_connection() for node in redis.nodes_manager.startup_nodes.values()]
        return asked[0], asked
    pool = redis.connection_pool
    assert isinstance(pool, SentinelConnectionPool)
    pools = [pool, *(sentinel.connection_pool for sentinel in pool.sentinel_manager.sentinels)]
    made = [each.connection_class(**each.connection_kwargs) for each in pools]
    first, *others = (each for each in made if isinstance(each, Connection))
    return first, others


@pytest.mark.parametrize(
    ("url", "hosts"),
    [
        ("redis+cluster://cache", [("cache", 6379)]),
        ("redis+cluster://cache:1,[::1]:2,[::2]/0", [("cache", 1), ("::1", 2), ("::2", 6379)]),
        ("redis+sentinel://cache/incidents", [("cache", 26379)]),
        (
            "redis+sentinel://cache:1,[::1]:2,[::2]/incidents/",
            [("cache", 1), ("::1", 2), ("::2", 26379)],
        ),
    ],
)
def test_every_host_of_a_url_is_asked(url: str, hosts: list[tuple[str, int]]) -> None:
    """Discovery asks each host of the URL, on the default port unless the URL names one."""
    _, asked = unopened(cache_from_url(url)._redis)
    assert [(each.host, each.port) for each in asked] == hosts


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize(
    ("url", "database", "account"),
    [
        ("+cluster://ann:p%2F@cache?max_connections=3", 0, ("ann", "p/")),
        ("+sentinel://ann:p%2F@cache/a%2Fb?timeout=4&db=3", 3, (None, None)),
        (
            "+sentinel://ann:p%2F@cache/a%2Fb/3?sentinel_username=bob&sentinel_password=q%26",
            3,
            ("bob", "q&"),
        ),
    ],
)
def test_urls_have_accounts_databases_and_parameters(
    tls: bool, url: str, database: int, account: tuple[str | None, str | None]
) -> None:
    """Account and database apply to the server, Sentinels have their own, both share the rest."""
    url = ("rediss" if tls else "redis") + url + "&client_name=x" + "&ssl_cert_reqs=none" * tls
    redis = cache_from_url(url)._redis
    connection, (asked,) = unopened(redis)
    assert (connection.username, connection.password, connection.db) == ("ann", "p/", database)
    assert (asked.username, asked.password, asked.db) == (*account, 0)
    for each in (connection, asked):
        assert isinstance(each, SSLConnection) is tls
        assert each.client_name == "x"
        assert each.retry._retries == 0
        assert each.socket_timeout == each.socket_connect_timeout == SOCKET_TIMEOUT
    if isinstance(redis, Redis):
        assert isinstance(redis.connection_pool, SentinelConnectionPool)
        assert redis.connection_pool.service_name == "a/b"


@pytest.mark.parametrize(
    "url",
    [
        *("http://hunter2", "hunter2", "", "redis://hunter2:port/0", "redis://h/0?db=hunter2"),
        *("redis+unix://hunter2", "redis+://hunter2", "unix+cluster://hunter2", "+cluster://h"),
        *("redis+cluster://", "redis+cluster://,cache", "redis+cluster://cache,,cache2"),
        *("redis+cluster://cache:hunter2,cache2", "redis+cluster://cache,cache2:hunter2"),
        *("redis+cluster://cache:99999", "redis+cluster://[::1:7000", "redis+cluster://::1:7000"),
        *("redis+cluster://cache/1", "redis+cluster://cache?db=1", "redis+cluster://cache/hunter2"),
        *("redis+cluster://cache/0/0", "redis+cluster://cache/0#hunter2"),
        *("redis+cluster://ann:hunter#2@cache", "redis+cluster://ann:hunter/2@cache"),
        *("redis+cluster://ann:2/hunter2@cache", "redis+cluster://ann:2?hunter2@cache"),
        *("redis+cluster://cache?hunter2=x", "redis+cluster://cache?password="),
        *("redis+cluster://cache?timeout=1", "redis+cluster://cache?protocol=9"),
        *("redis+cluster://cache?read_from_replicas=1", "redis+cluster://cache?max_connections=0"),
        *(
            "rediss+cluster://cache?ssl_cert_reqs=hunter2",
            "redis+cluster://cache?ssl_cert_reqs=none",
        ),
        "redis+cluster://cache?sentinel_password=hunter2",
        *("redis+sentinel://cache", "redis+sentinel://cache/", "redis+sentinel://cache//0"),
        *("redis+sentinel:///incidents", "redis+sentinel://cache,/incidents"),
        *("redis+sentinel://cache/incidents/hunter2", "redis+sentinel://cache/incidents/0/0"),
        *("redis+sentinel://cache:hunter2/incidents", "redis+sentinel://ann:2/hunter2@cache/0"),
        *(
            "redis+sentinel://cache/incidents#hunter2",
            "redis+sentinel://cache/incidents?db=hunter2",
        ),
        *(
            "redis+sentinel://cache/incidents?hunter2=x",
            "redis+sentinel://cache/incidents?is_master=",
        ),
        "redis+sentinel://cache/incidents?sentinel_password=",
        "redis+sentinel://cache/incidents?is_master=hunter2",
        "rediss+sentinel://cache/incidents?ssl_cert_reqs=hunter2",
    ],
)
@pytest.mark.parametrize("build", [cache_from_url, RedisCache.from_url])
def test_other_urls_are_refused(build: Callable[[str], RedisCache], url: str) -> None:
    """A URL with an invalid part raises InvalidSettings without showing that part."""
    with pytest.raises(InvalidSettings) as caught:
        build(url)
    assert caught.value.name == "redis_url"
    assert "hunter" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__


@pytest.mark.parametrize("name", ["redis_url", "redis_cluster_url", "redis_sentinel_url"])
def test_a_closed_cache_serves_on_another_loop(request: pytest.FixtureRequest, name: str) -> None:
    """A cache that was closed works again on another event loop."""
    cache = cache_from_url(request.getfixturevalue(name))

    async def use() -> None:
        try:
            await cache.set(KEY, b"[]", TTL)
            assert await asyncio.gather(*(cache.get(KEY) for _ in range(100))) == [b"[]"] * 100
        finally:
            await cache.close()

    for _ in range(3):
        asyncio.run(use())


async def test_a_client_that_decodes_its_answers_serves(redis_url: str) -> None:
    """A cache also works on an application's Redis client that decodes its answers."""
    async with Redis.from_url(redis_url, decode_responses=True) as redis:
        cache = RedisCache(redis)
        await cache.set(KEY, '["é"]'.encode(), TTL)
        assert await cache.get(KEY) == '["é"]'.encode()
        await cache.clear()
        assert await cache.get(KEY) is None


async def test_a_severed_cache_has_no_connection_and_can_be_abandoned(shared_url: str) -> None:
    """`sever` ends every connection of this process without the event loop; `abandon` opens others.

    The old connections are never finalized: in a forked process, that would harm the parent.
    """
    before = open_connections()
    cache = cache_from_url(shared_url)
    await asyncio.gather(*(cache.set(f"{KEY}:{number}", b"[]", TTL) for number in range(10)))
    assert open_connections() > before
    cache.sever()
    assert open_connections() == before
    cache.abandon()
    assert await cache.get(f"{KEY}:0") == b"[]"
    await cache.close()


async def test_the_applications_redis_is_never_severed(redis_url: str) -> None:
    """A client of the application keeps its connections when the cache is severed or abandoned."""
    async with Redis.from_url(redis_url) as redis:
        cache = RedisCache(redis)
        await cache.set(KEY, b"[]", TTL)
        cache.sever()
        cache.abandon()
        assert await redis.get(KEY) == b"[]"

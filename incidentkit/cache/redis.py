"""Pages kept in Redis, shared by every process that uses it."""

from __future__ import annotations

import re
from asyncio import Semaphore
from contextlib import AsyncExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import Connection, SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisClusterException, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from incidentkit.batching import Batcher
from incidentkit.cache.base import INDEX_KEY
from incidentkit.domain.errors import InvalidSettings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from typing import TypeAlias

    _Opened: TypeAlias = tuple[Redis | RedisCluster, tuple[Callable[[], Awaitable[None]], ...]]

SOCKET_TIMEOUT: Final = 0.25
"""Seconds to wait for a connection, and for each answer."""

MAX_CONNECTIONS: Final = 20
"""Connections to one server, for the pages."""

MAX_PAGES: Final = 1000
"""Pages that are kept at a time."""

BATCH: Final = 1000
"""Pages that are removed at once."""

_DATABASE: Final = re.compile(r"/?|/[0-9]+")

_HOSTS: Final = re.compile(r"(rediss?)\+\w+://([^/?#]*@)?([^/?#]*)(.*)")
_SERVICE: Final = re.compile(r"([^/]+//[^/?#]*)/([^/?#@]+)([/?#].*)?")


class RedisCache:
    """A cache in a Redis, in a Redis Cluster, or in a Redis behind Sentinel.

    The names of the pages are kept in a set, ``incidentkit:pages``: a clear removes just what
    stands there, whatever else the Redis holds. Each command has one key and takes effect by
    itself, so that after a failure a page may be without its name, and stay until it is too old.

    The methods raise what redis-py raises.

    Args:
        redis: A client of one's own, which stays open when the cache is closed. Give it short
            timeouts and no retries: redis-py's defaults hold a call for up to a minute.
    """

    def __init__(self, redis: Redis | RedisCluster) -> None:
        self._open: Callable[[], _Opened] = lambda: (redis, ())
        self._use(redis, ())

    def _use(
        self, redis: Redis | RedisCluster, closers: tuple[Callable[[], Awaitable[None]], ...]
    ) -> None:
        self._redis = redis
        self._closers = closers
        # Pages that are asked for, or kept, at the same time travel together. A call that the
        # client gives up may hang for ever.
        self._gets = Batcher(self._get_all, running=2, size=BATCH, abandon=True)
        self._sets = Batcher(self._set_all, size=BATCH, abandon=True)
        # Where a pool lets its callers wait, a cluster's node refuses them a connection.
        self._turn = (
            Semaphore(redis.connection_kwargs["max_connections"])
            if isinstance(redis, RedisCluster)
            else nullcontext()
        )

    @classmethod
    def from_url(cls, redis_url: str) -> RedisCache:
        """Return a cache with connections of its own.

        Args:
            redis_url: ``redis://user:password@host:port/db``, ``unix:///path?db=0`` for a socket,
                ``redis+cluster://user:password@host:port,host:port`` with some of the nodes, or
                ``redis+sentinel://user:password@host:port,host:port/service/db`` with the
                Sentinels. ``rediss`` in place of ``redis`` is TLS. Parameters are as redis-py
                takes them; ``sentinel_username`` and ``sentinel_password`` are for the Sentinels.

        Raises:
            InvalidSettings: If any part of the URL cannot be used.
        """
        kind = redis_url.partition("://")[0].partition("+")[2]
        open_by = {"": _open_server, "cluster": _open_cluster, "sentinel": _open_sentinel}
        try:
            opened = open_by[kind](redis_url)
        except (
            *(ValueError, TypeError, AttributeError, KeyError),
            *(RedisError, RedisClusterException),
        ):
            # The exception may have the password in its text.
            raise InvalidSettings("redis_url", "is not a URL that redis-py can use") from None
        cache = cls(opened[0])
        cache._open = partial(open_by[kind], redis_url)
        cache._use(*opened)
        return cache

    async def get(self, key: str) -> bytes | None:
        """Return the value, or None if there is none, or one that is no string."""
        return await self._gets(key)

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        """Keep the value and its name, and if there are too many, remove some at random."""
        await self._sets((key, value, ttl))

    async def clear(self) -> None:
        """Remove every page whose name stands in the set, and the set."""
        while await self._remove(BATCH) == BATCH:
            pass

    async def ping(self) -> None:
        """Send PING, in a cluster to one of the nodes."""
        await self._send(("PING",))

    async def close(self) -> None:
        """Close the connections that are the cache's own; the next ones may be on another loop."""
        try:
            async with AsyncExitStack() as closing:
                for closer in self._closers:
                    closing.push_async_callback(closer)
        finally:
            self._use(*self._open())

    async def _get_all(self, keys: Sequence[str]) -> Sequence[bytes | None]:
        if isinstance(self._redis, RedisCluster):
            # Each node has some of them.
            values = await self._send(*(("GET", key) for key in keys), raise_on_error=False)
        else:
            (values,) = await self._send(("MGET", *keys))
        if len(values) != len(keys):
            raise ResponseError("not the answer to this question")
        return [_value(value) for value in values]

    async def _set_all(self, given: Sequence[tuple[str, bytes, float]]) -> Sequence[None]:
        seconds = [max(1, round(ttl)) for _, _, ttl in given]
        *_, kept = await self._send_with_index(
            *(
                ("SET", key, value, "EX", ttl)
                for (key, value, _), ttl in zip(given, seconds, strict=True)
            ),
            ("SADD", INDEX_KEY, *(key for key, _, _ in given)),
            ("EXPIRE", INDEX_KEY, max(seconds)),
            ("SCARD", INDEX_KEY),
        )
        if kept > MAX_PAGES:
            await self._remove(min(kept - MAX_PAGES, BATCH))
        return [None] * len(given)

    async def _remove(self, count: int) -> int:
        """Remove so many pages, or all if there are less, and return how many there were."""
        (names,) = await self._send_with_index(("SPOP", INDEX_KEY, count))
        if isinstance(self._redis, RedisCluster):
            await self._send(*(("UNLINK", name) for name in names))
        elif names:
            await self._send(("UNLINK", *names))
        return len(names)

    async def _send_with_index(self, *commands: tuple[str | bytes | int, ...]) -> list[Any]:
        """Send commands that need the set of names; if it is no set, remove it and raise."""
        try:
            return await self._send(*commands)
        except ResponseError as error:
            if _has_another_type(error):
                await self._send(("UNLINK", INDEX_KEY))
            raise

    async def _send(
        self, *commands: tuple[str | bytes | int, ...], raise_on_error: bool = True
    ) -> list[Any]:
        """Send the commands at once, to each server its own, and return the answers."""
        async with self._turn:
            pipeline = self._redis.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)
            try:
                return await pipeline.execute(raise_on_error)
            except (RedisConnectionError, RedisTimeoutError):
                if isinstance(self._redis, RedisCluster):
                    await _look_for_nodes(self._redis)
                raise


async def _look_for_nodes(cluster: RedisCluster) -> None:
    """Ask a cluster for its nodes anew, which redis-py only does where it is to try again."""
    for first in cluster.get_nodes()[:1]:
        # What has no key, such as the first question of a client, would always go to this one.
        cluster.nodes_manager.move_node_to_end_of_cached_nodes(first.name)
    await cluster.nodes_manager.initialize()


class _SentinelPool(SentinelConnectionPool, BlockingConnectionPool):
    """Connections to the master; who finds all of them in use waits for one."""


def _open_server(redis_url: str) -> _Opened:
    options = _options(redis_url)
    _check_options(options)
    # The client bounds the time of a call, waiting for a connection included.
    options.setdefault("timeout", None)
    redis = Redis.from_pool(BlockingConnectionPool(**options))
    return redis, (redis.aclose,)


def _open_cluster(redis_url: str) -> _Opened:
    hosts, options = _options_of_hosts(redis_url, port=6379)
    _check_options(options)
    options["ssl"] = options.pop("connection_class", None) is SSLConnection
    redis = RedisCluster(
        startup_nodes=[ClusterNode(host, port) for host, port in hosts],
        # All the nodes that were found may move to other addresses.
        dynamic_startup_nodes=False,
        **options,
    )
    nodes = redis.nodes_manager
    # A client that is to look for its nodes anew takes itself for closed.
    return redis, (redis.aclose, nodes.aclose, partial(nodes.aclose, "startup_nodes"))


def _open_sentinel(redis_url: str) -> _Opened:
    before, service, after = _groups(_SERVICE, redis_url)
    hosts, options = _options_of_hosts(before + after, port=26379)
    account = {name: options.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    _check_options(options)
    options["ssl"] = options.pop("connection_class", None) is SSLConnection
    options.setdefault("timeout", None)
    servers_own = {"db", "username", "password", "max_connections", "timeout"}
    asking = {name: value for name, value in options.items() if name not in servers_own} | account
    sentinel = Sentinel(hosts, sentinel_kwargs=asking)  # type: ignore[no-untyped-call]
    redis = sentinel.master_for(unquote(service), connection_pool_class=_SentinelPool, **options)
    return redis, (redis.aclose, sentinel.aclose)


def _options_of_hosts(redis_url: str, *, port: int) -> tuple[list[tuple[str, int]], dict[str, Any]]:
    """Return the hosts and ports of a URL that has several, and what holds for all of them."""
    scheme, account, hosts, rest = _groups(_HOSTS, redis_url)
    each = [_options(f"{scheme}://{account}{host}{rest}") for host in hosts.split(",")]
    return [(one.pop("host"), one.pop("port", port)) for one in each], each[0]


def _groups(pattern: re.Pattern[str], text: str) -> tuple[str, ...]:
    match = pattern.fullmatch(text)
    if match is None:
        raise ValueError("A part is missing")
    return match.groups("")


def _options(redis_url: str) -> dict[str, Any]:
    """Return the options of a URL, and ours where it has none."""
    _check_parts(redis_url)
    return {
        "max_connections": MAX_CONNECTIONS,
        "socket_timeout": SOCKET_TIMEOUT,
        "socket_connect_timeout": SOCKET_TIMEOUT,
        "retry": Retry(NoBackoff(), 0),
        **parse_url(redis_url),
    }


def _check_parts(redis_url: str) -> None:
    """Raise ValueError for what redis-py would pass over without a word."""
    parts = urlsplit(redis_url)
    # An unencoded "#" or "/" in a password ends up in one of these.
    right_path = bool(parts.path) if parts.scheme == "unix" else _DATABASE.fullmatch(parts.path)
    if not right_path or parts.fragment:
        raise ValueError("The path or the fragment is not one of a Redis URL")
    if not all(value for _, value in parse_qsl(parts.query, keep_blank_values=True)):
        raise ValueError("A parameter is empty")


def _check_options(options: dict[str, Any]) -> None:
    """Raise what only the first call would, for what a connection does not take."""
    if options["max_connections"] < 1:
        raise ValueError("No connection could be made")
    pools_own = {"connection_class", "max_connections", "timeout"}
    options.get("connection_class", Connection)(
        **{name: value for name, value in options.items() if name not in pools_own}
    )


def _value(answer: object) -> Any:
    """Return what a GET was answered: None for a value that is no string, or an error."""
    if isinstance(answer, ResponseError) and _has_another_type(answer):
        return None
    # A client of one's own may decode its answers.
    return answer.encode() if isinstance(answer, str) else answer


def _has_another_type(error: ResponseError) -> bool:
    return "WRONGTYPE" in str(error)

"""A cache in Redis, shared by every process that uses it."""

from __future__ import annotations

import re
from asyncio import Semaphore
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, nullcontext
from functools import partial
from typing import Any, Final, TypeAlias
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

from incidentkit.affinity import keep, sever
from incidentkit.batching import Batcher
from incidentkit.cache.base import INDEX_KEY, PAGE_PREFIX
from incidentkit.domain.errors import InvalidSettings

_Opened: TypeAlias = tuple[Redis | RedisCluster, tuple[Callable[[], Awaitable[None]], ...]]
"""A client, and the functions that close it."""

SOCKET_TIMEOUT: Final = 0.25
"""Maximum seconds for a connection, and for each answer."""

MAX_CONNECTIONS: Final = 20
"""Maximum number of connections to one server."""

MAX_PAGES: Final = 1000
"""Maximum number of pages in Redis."""

BATCH: Final = 1000
"""Maximum number of pages in one command."""

UNREADABLE_URL: Final = (
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    RedisError,
    RedisClusterException,
)
"""Exceptions of redis-py, and of this module, for a URL that cannot be used."""

_DATABASE: Final = re.compile(r"/?|/[0-9]+")

_HOSTS: Final = re.compile(r"(rediss?)\+\w+://([^/?#]*@)?([^/?#]*)(.*)")
_SERVICE: Final = re.compile(r"([^/]+//[^/?#]*)/([^/?#@]+)([/?#].*)?")


class RedisCache:
    """A cache in a Redis, in a Redis Cluster, or in a Redis behind Sentinel.

    The set ``incidentkit:pages`` holds the names of the pages: a clear removes these keys and no
    other. Each command takes effect separately. After a failure, a page may therefore be missing
    in the set; it then stays until it expires.

    The methods raise the exceptions of redis-py.

    Args:
        redis: A client of the application, which stays open when the cache is closed. Give it short
            timeouts and no retries: redis-py's defaults hold a call for up to a minute.
        prefix: The beginning of every key, also of ``incidentkit:pages``. Caches with different
            prefixes keep their pages apart.

    Attributes:
        address: Names the servers in messages, without user and password.
    """

    def __init__(self, redis: Redis | RedisCluster, *, prefix: str = "") -> None:
        self._prefix = prefix
        self._index = f"{prefix}{INDEX_KEY}"
        self.address = "the application's Redis"
        self._open: Callable[[], _Opened] = lambda: (redis, ())
        self._use(redis, ())

    def _use(
        self, redis: Redis | RedisCluster, closers: tuple[Callable[[], Awaitable[None]], ...]
    ) -> None:
        self._redis = redis
        self._closers = closers
        # Pages that are read, or written, at the same time share a round trip. A round trip whose
        # callers have all timed out may never end: cancel it.
        self._gets = Batcher(self._get_all, running=2, size=BATCH, abandon=True)
        self._sets = Batcher(self._set_all, size=BATCH, abandon=True)
        # Callers wait for a connection in a pool. A cluster's node has no queue: it raises.
        self._turn = (
            Semaphore(redis.connection_kwargs["max_connections"])
            if isinstance(redis, RedisCluster)
            else nullcontext()
        )

    @classmethod
    def from_url(cls, redis_url: str, *, prefix: str = "") -> RedisCache:
        """Return a cache that opens its own connections.

        Args:
            redis_url: ``redis://user:password@host:port/db``, ``unix:///path?db=0`` for a socket,
                ``redis+cluster://user:password@host:port,host:port`` with some of the nodes, or
                ``redis+sentinel://user:password@host:port,host:port/service/db`` with the
                Sentinels. ``rediss`` in place of ``redis`` selects TLS. The query takes
                redis-py's parameters, and ``sentinel_username`` and ``sentinel_password`` for the
                Sentinels.
            prefix: The beginning of every key.

        Raises:
            InvalidSettings: If a part of the URL cannot be used.
        """
        kind = redis_url.partition("://")[0].partition("+")[2]
        open_by = {"": _open_server, "cluster": _open_cluster, "sentinel": _open_sentinel}
        try:
            opened = open_by[kind](redis_url)
        except UNREADABLE_URL:
            # Without its cause, whose text may hold the password.
            raise InvalidSettings("redis_url", "is not a URL that redis-py can use") from None
        cache = cls(opened[0], prefix=prefix)
        cache.address = _address(redis_url)
        cache._open = partial(open_by[kind], redis_url)
        cache._use(*opened)
        return cache

    async def get(self, key: str) -> bytes | None:
        """Return the value, or None if the key is missing or holds another type."""
        return await self._gets(f"{self._prefix}{key}")

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        """Store a value and its name, and remove random pages above the maximum."""
        await self._sets((f"{self._prefix}{key}", value, ttl))

    async def clear(self) -> None:
        """Remove every page whose name is in the set, and the set."""
        while await self._remove(BATCH) == BATCH:
            pass

    async def ping(self) -> None:
        """Send PING, in a cluster to one of the nodes."""
        await self._send(("PING",))

    async def close(self) -> None:
        """Close the cache's own connections; later calls open new ones, on any event loop."""
        try:
            async with AsyncExitStack() as closing:
                for closer in self._closers:
                    closing.push_async_callback(closer)
        finally:
            self._use(*self._open())

    def abandon(self) -> None:
        """Disconnect the cache's own connections without their event loop, which has ended."""
        self._disconnect()
        self._use(*self._open())

    def sever(self) -> None:
        """Disconnect this process, which was forked, from the cache's own connections."""
        self._disconnect()
        keep(self._redis)

    def _disconnect(self) -> None:
        for transport in _transports(self._redis) if self._closers else ():
            sever(transport)

    async def _get_all(self, keys: Sequence[str]) -> Sequence[bytes | None]:
        if isinstance(self._redis, RedisCluster):
            # The keys are on different nodes.
            values = await self._send(*(("GET", key) for key in keys), raise_on_error=False)
        else:
            (values,) = await self._send(("MGET", *keys))
        if len(values) != len(keys):
            raise ResponseError("the answer has another number of values than the question")
        return [_value(value) for value in values]

    async def _set_all(self, given: Sequence[tuple[str, bytes, float]]) -> Sequence[None]:
        seconds = [max(1, round(ttl)) for _, _, ttl in given]
        *_, kept = await self._send_with_index(
            *(
                ("SET", key, value, "EX", ttl)
                for (key, value, _), ttl in zip(given, seconds, strict=True)
            ),
            ("SADD", self._index, *(key for key, _, _ in given)),
            ("EXPIRE", self._index, max(seconds)),
            ("SCARD", self._index),
        )
        if kept > MAX_PAGES:
            await self._remove(min(kept - MAX_PAGES, BATCH))
        return [None] * len(given)

    async def _remove(self, count: int) -> int:
        """Remove up to ``count`` pages, and return the number of names that were removed.

        Another program can add names to the set: a key that is no page is left alone.
        """
        (names,) = await self._send_with_index(("SPOP", self._index, count))
        pages = [name for name in names if self._is_page(name)]
        if isinstance(self._redis, RedisCluster):
            await self._send(*(("UNLINK", page) for page in pages))
        elif pages:
            await self._send(("UNLINK", *pages))
        return len(names)

    def _is_page(self, name: bytes | str) -> bool:
        """Return whether a key is the name of a page."""
        # An application's client may decode its answers.
        text = name if isinstance(name, str) else name.decode(errors="replace")
        return text.startswith(f"{self._prefix}{PAGE_PREFIX}")

    async def _send_with_index(self, *commands: tuple[str | bytes | int, ...]) -> list[Any]:
        """Send commands on the set of names; if the key is not a set, remove it and raise."""
        try:
            return await self._send(*commands)
        except ResponseError as error:
            if _has_another_type(error):
                await self._send(("UNLINK", self._index))
            raise

    async def _send(
        self, *commands: tuple[str | bytes | int, ...], raise_on_error: bool = True
    ) -> list[Any]:
        """Send all commands in one pipeline, and return the answers."""
        async with self._turn:
            pipeline = self._redis.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)
            try:
                return await pipeline.execute(raise_on_error)
            except (RedisConnectionError, RedisTimeoutError):
                if isinstance(self._redis, RedisCluster):
                    await _discover_nodes(self._redis)
                raise
            except RedisClusterException:
                if isinstance(self._redis, _Cluster):
                    await self._redis.start_over()
                raise


class _Cluster(RedisCluster):
    """A client that, after a failure, discovers a cluster from the nodes in its URL.

    redis-py starts from the nodes that it found last, and all of these may move.
    """

    def __init__(self, hosts: Sequence[tuple[str, int]], **options: Any) -> None:
        super().__init__(startup_nodes=[ClusterNode(*host) for host in hosts], **options)
        # redis-py 5 counts tries here, and ignores `retry`.
        self.cluster_error_retry_attempts = 1
        self._hosts = hosts

    def get_default_node(self) -> Any:
        """Return the node for commands without a key; redis-py 5 asks even if it is not known."""
        known: Any = super().get_default_node()
        return known or next(iter(self.get_nodes()), None)

    async def start_over(self) -> None:
        """Start the next discovery from the nodes in the URL.

        The nodes are new, since a node of redis-py 5 counts each failed connection as in use.
        """
        nodes = self.nodes_manager
        used = nodes.startup_nodes.values()
        given = [ClusterNode(*host, **self.connection_kwargs) for host in self._hosts]
        nodes.startup_nodes = {node.name: node for node in given}
        for node in used:
            await node.disconnect()


async def _discover_nodes(cluster: RedisCluster) -> None:
    """Ask a cluster for its nodes again; redis-py does so only before a retry."""
    if isinstance(cluster, _Cluster):
        await cluster.start_over()
    nodes = cluster.nodes_manager
    for first in cluster.get_nodes()[:1]:
        # Commands without a key, such as this question, always go to the first node.
        nodes.nodes_cache[first.name] = nodes.nodes_cache.pop(first.name)
    await nodes.initialize()


class _SentinelPool(SentinelConnectionPool, BlockingConnectionPool):
    """Connections to the master; callers wait for one that is free."""


def _open_server(redis_url: str) -> _Opened:
    options = _options(redis_url)
    _check_options(options)
    # The client limits the time of each call, including the wait for a connection.
    options.setdefault("timeout", None)
    redis = Redis.from_pool(BlockingConnectionPool(**options))
    return redis, (redis.aclose,)


def _open_cluster(redis_url: str) -> _Opened:
    hosts, options = _options_of_hosts(redis_url, port=6379)
    _check_options(options)
    options["ssl"] = options.pop("connection_class", None) is SSLConnection
    redis = _Cluster(hosts, **options)
    nodes = redis.nodes_manager
    # A client that is about to discover its nodes counts as closed: close the nodes too.
    return redis, (redis.aclose, nodes.aclose, partial(nodes.aclose, "startup_nodes"))


def _open_sentinel(redis_url: str) -> _Opened:
    before, service, after = _groups(_SERVICE, redis_url)
    hosts, options = _options_of_hosts(before + after, port=26379)
    account = {name: options.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    _check_options(options)
    options["ssl"] = options.pop("connection_class", None) is SSLConnection
    options.setdefault("timeout", None)
    server_only = {"db", "username", "password", "max_connections", "timeout"}
    shared = {name: value for name, value in options.items() if name not in server_only}
    sentinel = Sentinel(hosts, sentinel_kwargs=shared | account)  # type: ignore[no-untyped-call]
    redis = sentinel.master_for(unquote(service), connection_pool_class=_SentinelPool, **options)
    return redis, (redis.aclose, *(each.aclose for each in sentinel.sentinels))


def _transports(redis: Redis | RedisCluster) -> Iterator[Any]:
    """Yield the transports of a client's connections, for which redis-py has no public names."""
    for connection in _connections(redis):
        writer = getattr(connection, "_writer", None)
        if writer is not None:
            yield writer.transport


def _connections(redis: Redis | RedisCluster) -> Iterator[Any]:
    if isinstance(redis, RedisCluster):
        for node in (*redis.get_nodes(), *redis.nodes_manager.startup_nodes.values()):
            yield from getattr(node, "_connections", ())
        return
    pools = [redis.connection_pool]
    manager = getattr(redis.connection_pool, "sentinel_manager", None)
    if manager is not None:
        pools += [sentinel.connection_pool for sentinel in manager.sentinels]
    for pool in pools:
        yield from getattr(pool, "_available_connections", ())
        yield from getattr(pool, "_in_use_connections", ())


def _options_of_hosts(redis_url: str, *, port: int) -> tuple[list[tuple[str, int]], dict[str, Any]]:
    """Return the hosts with their ports of a URL that has several, and the shared options."""
    scheme, account, hosts, rest = _groups(_HOSTS, redis_url)
    each = [_options(f"{scheme}://{account}{host}{rest}") for host in hosts.split(",")]
    return [(one.pop("host"), one.pop("port", port)) for one in each], each[0]


def _groups(pattern: re.Pattern[str], text: str) -> tuple[str, ...]:
    match = pattern.fullmatch(text)
    if match is None:
        raise ValueError("a part is missing")
    return match.groups("")


def _options(redis_url: str) -> dict[str, Any]:
    """Return the options in a URL, and our defaults for the others."""
    _check_parts(redis_url)
    return {
        "max_connections": MAX_CONNECTIONS,
        "socket_timeout": SOCKET_TIMEOUT,
        "socket_connect_timeout": SOCKET_TIMEOUT,
        "retry": Retry(NoBackoff(), 0),
        **parse_url(redis_url),
    }


def _check_parts(redis_url: str) -> None:
    """Raise ValueError for a part that redis-py would silently ignore."""
    parts = urlsplit(redis_url)
    # A "#" or "/" that is not encoded in a password ends up in the fragment or the path.
    right_path = bool(parts.path) if parts.scheme == "unix" else _DATABASE.fullmatch(parts.path)
    if not right_path or parts.fragment:
        raise ValueError("the path or the fragment is not one of a Redis URL")
    if not all(value for _, value in parse_qsl(parts.query, keep_blank_values=True)):
        raise ValueError("a parameter is empty")


def _address(redis_url: str) -> str:
    """Return the servers in a URL that was accepted, without user, password and parameters."""
    servers = re.split("[?#]", redis_url.partition("://")[2])[0]
    return f"Redis at {servers.rpartition('@')[2] or 'localhost'}"


def _check_options(options: dict[str, Any]) -> None:
    """Reject now an option that redis-py would reject on first use."""
    if options["max_connections"] < 1:
        raise ValueError("max_connections must be at least 1")
    pool_only = {"connection_class", "max_connections", "timeout"}
    connection_class = options.get("connection_class", Connection)
    connection_class(**{name: value for name, value in options.items() if name not in pool_only})


def _value(answer: object) -> Any:
    """Return the bytes in an answer to GET, or the error; None if the key holds another type."""
    if isinstance(answer, ResponseError) and _has_another_type(answer):
        return None
    # An application's client may decode its answers.
    return answer.encode() if isinstance(answer, str) else answer


def _has_another_type(error: ResponseError) -> bool:
    return "WRONGTYPE" in str(error)

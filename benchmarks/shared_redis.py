"""What the size of a shared Redis costs: `nox -s bench`, or `nox -s bench -- --quick`.

Each comparison has two sides, A and B, with a Redis each and the same PostgreSQL. They take turns,
call by call, so that whatever else the machine does falls on both alike, and differ in one thing:

- a write is a create and the removal of the one page that is cached, in a Redis that holds nothing
  else, and in one that holds a million keys of somebody else;
- a cached list is one page, of one and of 1,000 that are cached: read from Redis, by a process that
  does not hold it, and then by one that does.

The times are those of calls through the loopback interface.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import statistics
import time
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from typing import TYPE_CHECKING

import asyncpg
from attrs import frozen

from incidentkit import IncidentClient, ListQuery
from incidentkit.cache.base import INDEX_KEY
from incidentkit.cache.pages import PageCache
from incidentkit.cache.redis import RedisCache
from incidentkit.store.migrate import upgrade
from tests.servers import PostgresServer, RedisServer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import TypeAlias

    Call: TypeAlias = Callable[[], Awaitable[object]]

WARM_UP = 20
"""Rounds that come first and are not counted."""

PAGES = 1000
"""Pages that are cached on the side that has many, one for each size of a page."""

BATCH = 10_000


@frozen
class Side:
    """One of the two that are compared.

    Attributes:
        name: What it has that the other has not.
        prepare: What comes before each call and is not timed.
        call: What is timed.
    """

    name: str
    prepare: Call
    call: Call


async def compare(what: str, sides: list[Side], rounds: int) -> list[str]:
    """Return two lines of the table, from calls of its sides A and B in turn."""
    seconds: list[list[float]] = [[], []]
    for _ in range(WARM_UP + rounds):
        for side, its_seconds in zip(sides, seconds, strict=True):
            await side.prepare()
            start = time.perf_counter()
            await side.call()
            its_seconds.append(time.perf_counter() - start)
    lines = []
    medians = [statistics.median(its_seconds[WARM_UP:]) for its_seconds in seconds]
    ratios = ("", f"{medians[1] / medians[0]:.2f}")
    for side, its_seconds, median, ratio in zip(sides, seconds, medians, ratios, strict=True):
        p95 = statistics.quantiles(its_seconds[WARM_UP:], n=20, method="inclusive")[-1]
        cells = (what, side.name, f"{rounds:,}", f"{median * 1e3:.3f}", f"{p95 * 1e3:.3f}", ratio)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def fill(server: RedisServer, keys: int) -> None:
    """Put keys of somebody else into a Redis."""
    with server.client() as redis:
        for first in range(0, keys, BATCH):
            redis.mset({f"foreign:{n}": b"x" * 20 for n in range(first, min(first + BATCH, keys))})


def check_pages(server: RedisServer, count: int) -> None:
    """Raise unless a Redis has so many cached pages: otherwise the times mean nothing."""
    with server.client() as redis:
        found = redis.scard(INDEX_KEY)
    if found != count:
        raise RuntimeError(f"{found} pages are cached in place of {count}")


async def cache_a_page(client: IncidentClient, server: RedisServer) -> None:
    """Cache one page, for the write to remove."""
    await client.list()
    check_pages(server, 1)


async def list_from_redis(client: IncidentClient, cache: RedisCache) -> None:
    """List as a process does that holds no page yet."""
    await PageCache(client.store, cache).list(ListQuery())


async def nothing() -> None:
    """Prepare nothing."""


async def writes(
    database: str, servers: tuple[RedisServer, RedisServer], rounds: int, foreign_keys: int
) -> list[str]:
    """Compare a write where Redis is empty with one where it is full."""
    fill(servers[1], foreign_keys)
    names = ("no other key", f"{foreign_keys:,} other keys")
    async with AsyncExitStack() as stack:
        sides = []
        for name, server in zip(names, servers, strict=True):
            client = IncidentClient.open(database, server.url, redis_required=True)
            await stack.enter_async_context(client)
            prepare = partial(cache_a_page, client, server)
            write = partial(client.create, "Disk is full", source="monitoring")
            sides.append(Side(name, prepare, write))
        lines = await compare("a write", sides, rounds)
    for server in servers:
        check_pages(server, 0)
    return lines


async def lists(database: str, servers: tuple[RedisServer, RedisServer], rounds: int) -> list[str]:
    """Compare a cached list where one page is cached with one where there are many."""
    sizes = ((ListQuery().limit,), range(1, PAGES + 1))
    names = ("1 page", f"{PAGES:,} pages")
    async with AsyncExitStack() as stack:
        from_redis, from_memory = [], []
        for name, server, limits in zip(names, servers, sizes, strict=True):
            with server.client() as redis:
                redis.flushall()
            client = IncidentClient.open(database, server.url, redis_required=True)
            await stack.enter_async_context(client)
            cache = RedisCache.from_url(server.url)
            stack.push_async_callback(cache.close)
            for limit in limits:
                await client.list(limit=limit)
            from_redis.append(Side(name, nothing, partial(list_from_redis, client, cache)))
            from_memory.append(Side(name, nothing, client.list))
        lines = [
            *await compare("a list from Redis", from_redis, rounds),
            *await compare("a list from memory", from_memory, rounds),
        ]
    for server, limits in zip(servers, sizes, strict=True):
        check_pages(server, len(limits))
    return lines


async def versions(database: str, server: RedisServer) -> str:
    """Return a line that says what was measured, and on what."""
    connection = await asyncpg.connect(database)
    postgresql = await connection.fetchval("SHOW server_version")
    await connection.close()
    with server.client() as redis:
        info = redis.info("server")
    name = str(info.get("server_name", "redis")).capitalize()
    version = info.get("valkey_version", info["redis_version"])
    return (
        f"PostgreSQL {postgresql.split()[0]}, {name} {version}, "
        f"Python {platform.python_version()}, {os.cpu_count()} cores"
    )


async def run(*, quick: bool) -> None:
    """Run every comparison and print one table."""
    rounds, foreign_keys = (100, 100_000) if quick else (1000, 1_000_000)
    with ExitStack() as stack:
        database = stack.enter_context(PostgresServer()).url
        # Rewriting its log would take a share of the machine at a time of its own choosing.
        servers = (
            stack.enter_context(RedisServer("--appendonly", "no")),
            stack.enter_context(RedisServer("--appendonly", "no")),
        )
        await upgrade(database)
        lines = [
            *await writes(database, servers, rounds, foreign_keys),
            *await lists(database, servers, rounds),
        ]
        print(await versions(database, servers[0]))
    print()
    print("| Call | In Redis | Rounds | p50, ms | p95, ms | Ratio of p50 |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    print("\n".join(lines))


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds and keys")
    asyncio.run(run(quick=parser.parse_args().quick))


if __name__ == "__main__":
    main()

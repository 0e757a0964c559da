"""Processes under load while they and their servers are killed, paused and emptied.

``INCIDENTKIT_TEST_FAULTS`` is the number of seconds for which rounds run, shared equally by the
tests; without it, each test runs one short round.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from functools import partial
from random import Random
from typing import TYPE_CHECKING

import pytest

from incidentkit.store.migrate import upgrade
from tests.faults.history import Verdict
from tests.faults.rounds import DEADLINE, Figures, Round, execute
from tests.faults.worker import GUARD_MUTANTS, STALE_MUTANTS, UNORDERED
from tests.servers import RedisCluster, RedisSentinel, RedisServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import Administrator

pytestmark = pytest.mark.unmeasured

SECONDS = float(os.environ.get("INCIDENTKIT_TEST_FAULTS", "0"))
TESTS = 6
ANSWERS = 400 if SECONDS else 50
CLIENTS = 3 if SECONDS else 2

logger = logging.getLogger(__name__)
random = Random()


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    """A Redis for these tests only."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def copy_url(_administrator: Administrator, _migrated_template: str) -> Iterator[str]:
    """The URL of another database with the schema and no incidents."""
    with _administrator.database(template=_migrated_template) as url:
        yield url


def folders(parent: Path, seconds: float = SECONDS / TESTS) -> Iterator[Path]:
    """Yield a new folder for each round, at least one, until the time is up."""
    end = time.monotonic() + seconds
    number = 0
    while not number or time.monotonic() < end:
        folder = parent / f"round{number}"
        folder.mkdir()
        yield folder
        number += 1


def run_rounds(
    rounds: Iterator[Round], faults_of: Callable[[Round], list[Callable[[], None]]]
) -> Figures:
    """Run rounds with these faults in random order, check each, and return the total figures."""
    total = Figures()
    for each in rounds:
        faults = faults_of(each)
        random.shuffle(faults)
        with each.running(CLIENTS):
            if each.redis is not None:
                each.keep_redis()
            for fault in faults:
                each.inject(fault)
        verdict, figures = each.check()
        logger.info("Round: %s", figures)
        assert verdict == Verdict(), figures
        total += figures
    logger.info("Total: %s", total)
    assert total.cached
    return total


def on_postgresql(
    database_url: str,
    redis: RedisServer | None,
    folders: Iterator[Path],
    mutant: str | None = None,
    *,
    group: RedisCluster | RedisSentinel | None = None,
    copy_url: str | None = None,
) -> Iterator[Round]:
    """Yield rounds on a database that is emptied for each, and a Redis that is not."""
    for folder in folders:
        asyncio.run(
            execute(database_url, 'TRUNCATE "Incident", incident_event, incident_idempotency_key')
        )
        yield Round(folder, database_url, redis, random, ANSWERS, mutant, group, copy_url)


def on_sqlite(folders: Iterator[Path], mutant: str | None = None) -> Iterator[Round]:
    """Yield rounds, each on a new file."""
    for folder in folders:
        database_url = f"sqlite+aiosqlite:///{folder / 'incidents.db'}"
        asyncio.run(upgrade(database_url))
        yield Round(folder, database_url, None, random, ANSWERS, mutant)


def of_workers(each: Round) -> list[Callable[[], None]]:
    """Return the faults of the processes of a round."""
    return [each.kill_worker, each.kill_sql, each.pause_worker]


def of_a_file(each: Round) -> list[Callable[[], None]]:
    """Return the faults of the processes of a round and of their file."""
    return [*of_workers(each), each.lose_triggers]


def of_the_guard(each: Round) -> list[Callable[[], None]]:
    """Return the faults that the token's statement has to see."""
    return [each.lose_triggers, each.forge_copy]


def of_redis(each: Round) -> list[Callable[[], None]]:
    """Return the faults of the processes of a round and of Redis."""
    return [
        *of_workers(each),
        each.kill_redis,
        each.pause_redis,
        each.restore_redis,
        each.flush_redis,
        each.drop_redis_connections,
    ]


def of_nodes(each: Round) -> list[Callable[[], None]]:
    """Return the faults of the processes of a round and of one of several servers."""
    return [*of_workers(each), each.kill_node, each.pause_node, each.kill_node, each.pause_node]


def of_all(each: Round) -> list[Callable[[], None]]:
    """Return the faults of the processes of a round and of both servers."""
    return [*of_workers(each), each.kill_redis, each.end_postgres_connections]


def of_restores(each: Round) -> list[Callable[[], None]]:
    """Return the faults of the processes of a round, and restores into another server."""
    return [each.kill_worker, each.restore_elsewhere, each.restore_elsewhere]


def test_faults_of_redis_and_of_processes(
    migrated_postgres_url: str, redis: RedisServer, tmp_path: Path
) -> None:
    """While Redis and processes fail, no call fails, no list is stale and no write is lost."""
    total = run_rounds(on_postgresql(migrated_postgres_url, redis, folders(tmp_path)), of_redis)
    assert not total.errors
    assert total.redis_hits


def test_ended_connections_to_postgresql(
    migrated_postgres_url: str, redis: RedisServer, tmp_path: Path
) -> None:
    """If PostgreSQL ends connections too, calls may fail, but no list is stale, no write lost."""
    run_rounds(on_postgresql(migrated_postgres_url, redis, folders(tmp_path)), of_all)


def test_restores_under_running_clients(
    migrated_postgres_url: str, redis: RedisServer, tmp_path: Path
) -> None:
    """After a restore into another server, writes are refused or reach a reader's old cursor."""
    run_rounds(on_postgresql(migrated_postgres_url, redis, folders(tmp_path)), of_restores)


def test_a_write_that_ignores_a_restore_is_found(
    migrated_postgres_url: str, tmp_path: Path
) -> None:
    """A deliberate bug that writes events out of order after a restore is detected."""
    for each in on_postgresql(migrated_postgres_url, None, folders(tmp_path, DEADLINE), UNORDERED):
        with each.running(CLIENTS):
            each.inject(each.restore_elsewhere)
        verdict, _ = each.check()
        if any("before the order was restored" in fault for fault in verdict.lost):
            return
    pytest.fail("the bug was not found")


@pytest.mark.parametrize(
    "kind", [RedisCluster, partial(RedisSentinel, down_after=1)], ids=["cluster", "sentinel"]
)
def test_faults_of_several_redis_servers(
    migrated_postgres_url: str, tmp_path: Path, kind: Callable[[], RedisCluster | RedisSentinel]
) -> None:
    """While nodes of a cluster or Sentinel group fail, no call fails and no list is stale."""
    with kind() as group:
        rounds = on_postgresql(migrated_postgres_url, None, folders(tmp_path), group=group)
        total = run_rounds(rounds, of_nodes)
    assert not total.errors


def test_lost_triggers_and_forged_copies(
    migrated_postgres_url: str, copy_url: str, redis: RedisServer, tmp_path: Path
) -> None:
    """Without triggers, or with a copy's pages in Redis, no list is stale and no write is lost.

    A write may fail, since both faults lock the table.
    """
    rounds = on_postgresql(migrated_postgres_url, redis, folders(tmp_path), copy_url=copy_url)
    run_rounds(rounds, of_the_guard)


def test_faults_of_processes_on_an_sqlite_file(tmp_path: Path) -> None:
    """While processes on a file are killed and paused, or its triggers lost, no list is stale."""
    run_rounds(on_sqlite(folders(tmp_path)), of_a_file)


def stale_lists(rounds: Iterator[Round], fault: str | None = None) -> list[str]:
    """Run rounds, with this fault at most, until a list is stale; return the stale lists."""
    for each in rounds:
        with each.running(CLIENTS):
            each.await_answers()
            if fault is not None:
                each.inject(getattr(each, fault))
        verdict, _ = each.check()
        assert not verdict.lost
        if verdict.stale:
            return verdict.stale
    return []


@pytest.mark.parametrize("mutant", STALE_MUTANTS)
def test_a_fault_of_incidentkit_is_found_on_postgresql(
    migrated_postgres_url: str, redis: RedisServer, tmp_path: Path, mutant: str
) -> None:
    """A deliberate bug that trusts outdated cached pages is detected by its stale lists."""
    paths = folders(tmp_path, DEADLINE)
    assert stale_lists(on_postgresql(migrated_postgres_url, redis, paths, mutant))


@pytest.mark.parametrize("mutant", STALE_MUTANTS)
def test_a_fault_of_incidentkit_is_found_on_sqlite(tmp_path: Path, mutant: str) -> None:
    """A deliberate bug that trusts outdated cached pages is detected by its stale lists."""
    assert stale_lists(on_sqlite(folders(tmp_path, DEADLINE), mutant))


@pytest.mark.parametrize("fault", ["lose_triggers", "forge_copy"])
def test_a_token_without_its_guard_is_found_on_postgresql(
    migrated_postgres_url: str, copy_url: str, redis: RedisServer, tmp_path: Path, fault: str
) -> None:
    """A token that does not see its triggers, or its place, is detected by stale lists."""
    (mutant,) = GUARD_MUTANTS
    paths = folders(tmp_path, DEADLINE)
    rounds = on_postgresql(migrated_postgres_url, redis, paths, mutant, copy_url=copy_url)
    assert stale_lists(rounds, fault)


@pytest.mark.parametrize("mutant", GUARD_MUTANTS)
def test_a_token_without_its_guard_is_found_on_sqlite(tmp_path: Path, mutant: str) -> None:
    """A token that does not see its triggers is detected by stale lists."""
    assert stale_lists(on_sqlite(folders(tmp_path, DEADLINE), mutant), "lose_triggers")

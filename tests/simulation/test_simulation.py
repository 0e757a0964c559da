"""No list is stale under any fault of processes, Redis and the database.

A list shows the database as it was at some instant between the start and the end of the call; with
``max_staleness``, at some instant during the call or at most that many seconds before it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import pytest
from attrs import evolve

from incidentkit.batching import Batcher
from incidentkit.cache import pages
from incidentkit.store.page import Page
from tests.simulation.schedule import KINDS, STALENESS, Figures, replay, simulate
from tests.simulation.world import Database, SimulatedStore

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from incidentkit import ListQuery
    from tests.simulation.world import Operation, Version

SEEDS = int(os.environ.get("INCIDENTKIT_TEST_SEEDS", "15"))
"""The number of seeds for each value of ``max_staleness``."""

BOUND = 20
"""The number of seeds within which broken code must show a stale list."""

REGRESSIONS: tuple[int, ...] = ()
"""Seeds that failed once."""

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.unmeasured


@pytest.mark.parametrize("max_staleness", STALENESS)
def test_every_list_is_true(max_staleness: float) -> None:
    """No list is stale under any fault, and many lists come from a cache."""
    total = Figures()
    for seed in (*REGRESSIONS, *range(SEEDS)):
        verdict = simulate(seed, max_staleness)
        wrong = [*verdict.stale, *verdict.failed]
        assert not wrong, "\n".join([replay(seed, max_staleness), *wrong])
        total += verdict.figures
    # Without a token, no call shares the page of another.
    assert total.hits > 0.2 * total.reads, total
    assert total.redis_hits > 0.1 * total.reads, total
    assert total.writes > 0.02 * total.reads, total
    assert set(total.faults) == {*KINDS, "crash"}, total


@pytest.mark.parametrize("max_staleness", STALENESS)
def test_a_seed_decides_everything(max_staleness: float) -> None:
    """The same seed gives the same results at the same times, in any process."""
    here = simulate(5, max_staleness)
    assert simulate(5, max_staleness) == here
    assert simulate(6, max_staleness).trace != here.trace
    program = (
        f"from tests.simulation.schedule import simulate\nprint(simulate(5, {max_staleness}).trace)"
    )
    for hash_seed in ("1", "2"):
        there = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert there.stdout.strip() == here.trace


def _joins_a_run_under_way(patch: pytest.MonkeyPatch) -> None:
    call: Any = Batcher.__call__
    latest: WeakKeyDictionary[Any, asyncio.Future[Any]] = WeakKeyDictionary()

    def join(batcher: Any, item: object) -> asyncio.Future[Any]:
        answer = latest.get(batcher)
        if item is not None or answer is None or answer.done():
            answer = latest[batcher] = call(batcher, item)
        return answer

    patch.setattr(Batcher, "__call__", join)


def _reads_the_token_after_the_page(patch: pytest.MonkeyPatch) -> None:
    read = SimulatedStore.list

    async def torn(store: SimulatedStore, query: ListQuery) -> Page:
        page = await read(store, query)
        return Page(page.incidents, await store.token())

    patch.setattr(SimulatedStore, "list", torn)


def _lets_no_token_match(patch: pytest.MonkeyPatch) -> None:
    unseal = pages.unseal

    async def page(cache: pages.PageCache, query: ListQuery) -> Page:
        return await cache._current(query.cache_key) or await cache._reads(query)

    patch.setattr(pages, "unseal", lambda value, key, token: unseal(value, key, token or ""))
    patch.setattr(pages.PageCache, "page", page)


def _ignores_the_key(patch: pytest.MonkeyPatch) -> None:
    prove = pages._proof
    patch.setattr(pages, "_proof", lambda _, token, page: prove("", token, page))


def _ignores_the_token(patch: pytest.MonkeyPatch) -> None:
    prove = pages._proof
    patch.setattr(pages, "_proof", lambda key, _, page: prove(key, "", page))


def _ignores_the_page(patch: pytest.MonkeyPatch) -> None:
    prove = pages._proof
    patch.setattr(pages, "_proof", lambda key, token, _: prove(key, token, b""))


def _stores_the_token(patch: pytest.MonkeyPatch) -> None:
    seal = pages.seal

    def told(key: str, token: str, page: bytes) -> bytes:
        return b'{"token":"%b",%b' % (token.encode(), seal(key, token, page)[1:])

    def read(value: bytes, key: str, token: str | None) -> bytes | None:
        sealed = re.sub(rb'"token":"[^"]*",', b"", value, count=1)
        page = sealed[pages._PAGE_START : -1]
        return page if token and sealed == seal(key, token, page) else None

    patch.setattr(pages, "seal", told)
    patch.setattr(pages, "unseal", read)


def _serves_forgeries(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pages, "compare_digest", lambda *_: True)


def _has_no_trigger(patch: pytest.MonkeyPatch, missing: Callable[[Operation, bool], bool]) -> None:
    trigger = Database.trigger

    def broken(database: Database, operation: Operation, *, by_client: bool) -> str | None:
        if missing(operation, by_client):
            return database.current.token
        return trigger(database, operation, by_client=by_client)

    patch.setattr(Database, "trigger", broken)


def _sees_no_trigger(patch: pytest.MonkeyPatch) -> None:
    see = Database.token_of

    def unguarded(database: Database, version: Version, place: str = "here") -> str | None:
        return see(database, evolve(version, guarded=True), place)

    patch.setattr(Database, "token_of", unguarded)


def _mends_without_a_new_token(patch: pytest.MonkeyPatch) -> None:
    def mend(database: Database) -> None:
        database._commit(evolve(database.current, guarded=True))

    patch.setattr(Database, "mend", mend)


def _sees_no_place(patch: pytest.MonkeyPatch) -> None:
    see = Database.token_of

    def anywhere(database: Database, version: Version, place: str = "here") -> str | None:
        del place
        return see(database, version)

    patch.setattr(Database, "token_of", anywhere)


def _trusts_a_token_from_before_a_write(patch: pytest.MonkeyPatch) -> None:
    trust = pages.PageCache._trust

    def careless(cache: pages.PageCache, token: str | None, since: float, _: int) -> None:
        trust(cache, token, since, cache._changes)

    patch.setattr(pages.PageCache, "_trust", careless)


def _keeps_its_trust_after_a_write(patch: pytest.MonkeyPatch) -> None:
    forget = pages.PageCache.forget

    def careless(cache: pages.PageCache) -> None:
        trusted = cache._trusted
        forget(cache)
        cache._trusted = trusted

    patch.setattr(pages.PageCache, "forget", careless)


def _trusts_for_too_long(patch: pytest.MonkeyPatch) -> None:
    begin: Any = pages.PageCache.__init__

    def careless(*arguments: Any, max_staleness: float, **options: Any) -> None:
        begin(*arguments, max_staleness=max_staleness + 0.1, **options)

    patch.setattr(pages.PageCache, "__init__", careless)


MUTANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], float]] = {
    "a call joins a run under way": (_joins_a_run_under_way, 0.0),
    "the token is read after the page": (_reads_the_token_after_the_page, 0.0),
    "no token matches no token": (_lets_no_token_match, 0.0),
    "the key is ignored": (_ignores_the_key, 0.0),
    "the token is ignored": (_ignores_the_token, 0.0),
    "the page is not part of its proof": (_ignores_the_page, 0.0),
    "the token stands beside the page": (_stores_the_token, 0.0),
    "forgeries are served": (_serves_forgeries, 0.0),
    "no trigger on insert": (
        partial(_has_no_trigger, missing=lambda operation, _: operation == "insert"),
        0.0,
    ),
    "no trigger on update": (
        partial(_has_no_trigger, missing=lambda operation, _: operation == "update"),
        0.0,
    ),
    "no trigger on delete": (
        partial(_has_no_trigger, missing=lambda operation, _: operation == "delete"),
        0.0,
    ),
    "no trigger for others": (
        partial(_has_no_trigger, missing=lambda _, by_client: not by_client),
        0.0,
    ),
    "no trigger for clients": (
        partial(_has_no_trigger, missing=lambda _, by_client: by_client),
        0.0,
    ),
    "a lost trigger is not seen": (_sees_no_trigger, 0.0),
    "triggers are restored without a new token": (_mends_without_a_new_token, 0.0),
    "a copy has the token of the original": (_sees_no_place, 0.0),
    "a token from before a write is trusted": (_trusts_a_token_from_before_a_write, 0.3),
    "a trusted token outlives a write": (_keeps_its_trust_after_a_write, 0.3),
    "a token is trusted for too long": (_trusts_for_too_long, 0.3),
    "max_staleness that was not asked for": (_trusts_for_too_long, 0.0),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_broken_code_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of broken code makes a list stale within a few seeds."""
    mutate, max_staleness = MUTANTS[name]
    mutate(monkeypatch)
    assert any(simulate(seed, max_staleness).stale for seed in range(BOUND)), name

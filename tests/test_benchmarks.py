"""The benchmarks run, notice failed calls, and write the same page from the same figures."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from attrs import evolve

from benchmarks import (
    before,
    decoys,
    growth,
    hostile,
    imports,
    in_process,
    isolation,
    over_http,
    remarks,
    report,
    results,
    rounds,
    search,
    services,
    threads,
)
from benchmarks.__main__ import SUBJECTS
from benchmarks.results import Result, at_least, at_most
from benchmarks.rounds import Round, VoidRoundError, interleave, percentiles, ratio

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = pytest.mark.unmeasured

THOROUGH = os.environ.get("INCIDENTKIT_TEST_PROFILE") == "thorough"


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure without warming up, and without waiting for decoys to settle."""
    monkeypatch.setattr(rounds, "WARM_UP_ROUNDS", 0)
    monkeypatch.setattr(decoys, "SETTLE", 0.1)


SHORT = pytest.mark.usefixtures("_short")


def of(*rates: float) -> list[Round]:
    """Return rounds of one side with these rates."""
    return [Round(rate, {50: 1.0, 95: 2.0, 99: 3.0}) for rate in rates]


def test_a_ratio_is_that_of_rounds_side_by_side() -> None:
    """A ratio is the median of the ratios of rounds that ran side by side."""
    assert ratio(of(10, 200, 30), of(10, 50, 10)) == 3
    assert percentiles([number / 1000 for number in range(101)])[95] == 95


async def test_sides_take_turns_and_the_first_round_does_not_count() -> None:
    """The sides run A B A B, and the warm-up round is left out."""
    turns: list[tuple[str, int]] = []

    def side(name: str) -> object:
        async def run(number: int) -> Round:
            turns.append((name, number))
            return of(number)[0]

        return run

    measured = await interleave({name: side(name) for name in "ab"}, 2)  # type: ignore[misc]
    assert turns == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert [each.rate for each in measured["b"]] == [1, 2]


async def test_a_round_with_an_error_voids_the_run() -> None:
    """A failed call makes the whole run void."""

    async def run(_: int) -> Round:
        return evolve(of(1)[0], errors=1)

    with pytest.raises(VoidRoundError, match="1 calls of one failed"):
        await interleave({"one": run}, 3)


def test_the_page_is_the_same_for_the_same_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page has a summary, a chart, each row with its command, and each missed target."""
    monkeypatch.setattr(report, "FOLDER", tmp_path / "performance")
    monkeypatch.setattr(report, "PAGE", tmp_path / "performance.md")
    monkeypatch.setitem(remarks.REMARKS, "slow / `plain`", "The reason.")
    measured = Result(
        [
            at_least("quick", "`floor`", 1.5, 1.509),
            at_least("quick", "`plain`", 4, 4.567),
            at_least("quicker", "`plain`", 4, 8),
            at_most("slow", "`plain`", 1.2, 1.201),
        ],
        {"A table": [["side", "figure"], ["one", "1"]]},
        {"growth": {"one": [[1, 2], [1000, 3]]}, report.BARS: {"plain": [[0, 1]]}},
        rounds="3 rounds",
        load="wrk",
    )
    pages = []
    for _ in range(2):
        report.write({"http": measured})
        plots = [path.read_bytes() for path in sorted((tmp_path / "performance").glob("*.svg"))]
        pages.append((report.PAGE.read_text("utf-8"), plots))
    assert pages[0] == pages[1]
    page, plots = pages[0]
    assert "| quick | `floor` | >= 1.5 | 1.50 | met | `nox -s bench -- http` |" in page
    assert "| slow | `plain` | <= 1.2 | 1.21 | **missed** |" in page
    assert "**slow, against `plain`.** The reason." in page
    assert "4.56 to 8.00 times as many requests per second" in " ".join(page.split())
    assert page.index("(performance/summary.svg)") < page.index("| quick |")
    assert "`wrk` keeps 32 connections busy" in " ".join(page.split())
    assert len(plots) == 3


def test_the_page_shows_what_was_measured_last() -> None:
    """The page shows the stored figures, and a remark on every missed target."""
    kept = results.load()
    page = report.PAGE.read_text("utf-8")
    assert list(kept) == [name for name in SUBJECTS if name in kept]
    for name, measured in kept.items():
        for row in measured.rows:
            assert f"| {row.what} | {row.against} | {row.target} | {row.value:.2f} |" in page
            reached = row.reached or f"{row.what} / {row.against}" in remarks.REMARKS
            assert reached, f"{row.what} of {name} is missed without a remark"


def check(measured: Result) -> None:
    """Fail unless there are positive figures and a table of details."""
    assert measured.rows
    assert all(row.value > 0 for row in measured.rows)
    assert measured.details


@SHORT
def test_the_service_and_its_rivals_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short run measures every scenario on every side without an error."""
    monkeypatch.setattr(over_http, "INCIDENTS", 300)
    monkeypatch.setattr(over_http, "ON_SQLITE", 100)
    check(asyncio.run(over_http.run(rounds=1, seconds=0.05)))
    check(asyncio.run(over_http.run_sqlite(rounds=1, seconds=0.05)))
    check(asyncio.run(over_http.run_soak(seconds=0.5, looks=10)))


@SHORT
def test_the_sdk_is_measured_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short run measures reads and creates beside asyncpg and the ORM."""
    monkeypatch.setattr(in_process, "INCIDENTS", 300)
    check(in_process.start(rounds=1, calls=64, many=100))


@SHORT
def test_threads_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short run measures the synchronous client in threads beside the ORM."""
    monkeypatch.setattr(threads, "INCIDENTS", 100)
    check(threads.start(rounds=1, calls=64))


@SHORT
def test_growth_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short run measures growth at every size."""
    monkeypatch.setattr(growth, "HITS", (1, 3))
    monkeypatch.setattr(growth, "READERS", (1, 3))
    monkeypatch.setattr(growth, "PROCESSES", (1, 2))
    monkeypatch.setattr(growth, "FOREIGN_KEYS", 100_000)
    check(growth.start(quick=True, sizes=[30, 60, 90], rounds=2, seconds=0.1))


@SHORT
def test_searches_are_measured() -> None:
    """A short run measures every search on both databases."""
    check(search.start(quick=True, sizes=[100, 200], rounds=2))


@SHORT
def test_isolation_is_measured() -> None:
    """A short run measures quick calls beside every crowd, and none of them fails."""
    check(isolation.start(quick=True, seconds=0.05))


@SHORT
def test_hostile_connections_are_measured() -> None:
    """A short run measures quick calls beside every kind of attackers, and none of them fails."""
    check(hostile.start(quick=True, seconds=0.05, connections=20))


@SHORT
def test_imports_are_measured() -> None:
    """Importing the package is measured against importing attrs and cattrs."""
    check(imports.run(rounds=1))


def row_of(new: list[float], old: list[float], unit: str = "calls/s") -> before.Row:
    """Return a row that compares new code with old."""
    return before.Row("a row", unit, new, old)


def test_slower_takes_the_median_and_the_upper_quartile() -> None:
    """A row counts as slower if its median is below 0.95 and its upper quartile below 1."""
    old = [100.0] * 5
    assert row_of([90, 92, 94, 96, 99], old).slower
    assert not row_of([90, 92, 96, 97, 98], old).slower
    assert not row_of([90, 92, 94, 101, 102], old).slower


def test_a_ratio_above_one_is_better_for_costs_too() -> None:
    """Rates are divided new by old, times and memory old by new."""
    assert row_of([30], [10]).ratios == [3]
    assert row_of([10], [30], "ms").ratios == [3]


@SHORT
def test_the_code_is_compared_with_another_checkout(tmp_path: Path) -> None:
    """A short run measures its rows on both sides, each from its own folder.

    It has those of SQLite, or all of them with the profile `thorough`.
    """
    old = tmp_path / "old"
    shutil.copytree(services.ROOT / "incidentkit", old / "incidentkit")
    file = tmp_path / "compared.json"
    rows = before.start(
        str(old),
        rounds=1,
        seconds=0.05,
        incidents=300,
        many=100,
        only="" if THOROUGH else "SQLite",
        json_file=file,
    )
    names = [row.name for row in rows]
    others = {*before.ON_POSTGRESQL, *before.ALONE, *before.TOGETHER} if THOROUGH else set()
    assert {*before.ON_SQLITE, *others, "open SQLite: peak memory"} <= {*names}
    # A short run may take less CPU time than the clock of processes can tell.
    timed = [row for row in rows if not row.name.endswith("CPU time")]
    assert [row.name for row in timed if min(row.ratios) <= 0] == []
    assert [row["name"] for row in json.loads(file.read_text("utf-8"))["rows"]] == names


def test_a_base_may_be_a_git_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A git revision is unpacked into a folder; anything else is refused with the reason."""
    repository = tmp_path / "repository"
    (repository / "incidentkit").mkdir(parents=True)
    (repository / "incidentkit" / "__init__.py").touch()
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@example.com"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "A commit"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(services, "ROOT", repository)
    unpacked = before.check_out("HEAD", tmp_path / "unpacked")
    assert (unpacked / "incidentkit" / "__init__.py").is_file()
    with pytest.raises(before.BaseError, match="nowhere is neither a checkout nor a git revision"):
        before.check_out("nowhere", tmp_path / "other")

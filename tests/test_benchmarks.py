"""The benchmarks run, count what fails, and say the same of the same figures."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from attrs import evolve

from benchmarks import growth, imports, in_process, over_http, remarks, report, results, search
from benchmarks.__main__ import SUBJECTS
from benchmarks.results import Result, at_least, at_most
from benchmarks.rounds import Round, VoidRoundError, interleave, percentiles, ratio

if TYPE_CHECKING:
    from pathlib import Path


def of(*rates: float) -> list[Round]:
    """Rounds of one side."""
    return [Round(rate, {50: 1.0, 95: 2.0, 99: 3.0}) for rate in rates]


def test_a_ratio_is_that_of_rounds_side_by_side() -> None:
    """Each round is held against the one beside it, and the middle of these ratios counts."""
    assert ratio(of(10, 200, 30), of(10, 50, 10)) == 3
    assert percentiles([number / 1000 for number in range(101)])[95] == 95


async def test_sides_take_turns_and_the_first_round_does_not_count() -> None:
    """The sides run A B A B, and what they do while they warm up is left out."""
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
    """Figures of calls that failed are not kept."""

    async def run(_: int) -> Round:
        return evolve(of(1)[0], errors=1)

    with pytest.raises(VoidRoundError, match="1 calls of one failed"):
        await interleave({"one": run}, 3)


def test_the_page_is_the_same_for_the_same_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page has each row with its command, says what is not reached, and has the plots."""
    monkeypatch.setattr(report, "FOLDER", tmp_path / "performance")
    monkeypatch.setattr(report, "PAGE", tmp_path / "performance.md")
    monkeypatch.setitem(remarks.REMARKS, "slow / `plain`", "The reason.")
    measured = Result(
        [at_least("quick", "`floor`", 1.5, 1.509), at_most("slow", "`plain`", 1.2, 1.201)],
        {"A table": [["side", "figure"], ["one", "1"]]},
        {"growth": {"one": [[1, 2], [1000, 3]]}, report.BARS: {"plain": [[0, 1]]}},
        rounds="3 rounds",
    )
    pages = []
    for _ in range(2):
        report.write({"http": measured}, "wrk")
        plots = [path.read_bytes() for path in sorted((tmp_path / "performance").glob("*.svg"))]
        pages.append((report.PAGE.read_text("utf-8"), plots))
    assert pages[0] == pages[1]
    page, plots = pages[0]
    assert "| quick | `floor` | >= 1.5 | 1.50 | reached | `nox -s bench -- http` |" in page
    assert "| slow | `plain` | <= 1.2 | 1.21 | **not reached** |" in page
    assert "**slow, against `plain`.** The reason." in page
    assert len(plots) == 2


def test_the_page_shows_what_was_measured_last() -> None:
    """The figures that are kept are those of the page, and each command on it is one there is."""
    kept = results.load()
    page = report.PAGE.read_text("utf-8")
    assert list(kept) == [name for name in SUBJECTS if name in kept]
    for name, measured in kept.items():
        for row in measured.rows:
            assert f"| {row.what} | {row.against} | {row.target} | {row.value:.2f} |" in page
            reached = row.reached or f"{row.what} / {row.against}" in remarks.REMARKS
            assert reached, f"{row.what} of {name} is not reached, and nothing is said of it"


def check(measured: Result) -> None:
    """Fail unless there are figures, and something to draw or to show."""
    assert measured.rows
    assert all(row.value > 0 for row in measured.rows)
    assert measured.details


def test_the_service_and_its_rivals_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every scenario runs on every side without an error, in short."""
    monkeypatch.setattr(over_http, "INCIDENTS", 300)
    monkeypatch.setattr(over_http, "ON_SQLITE", 100)
    check(asyncio.run(over_http.run(rounds=1, seconds=0.05)))
    check(asyncio.run(over_http.run_sqlite(rounds=1, seconds=0.05)))
    check(asyncio.run(over_http.run_soak(seconds=0.5, looks=10)))


def test_the_sdk_is_measured_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads and creates run beside asyncpg and the ORM, in short."""
    monkeypatch.setattr(in_process, "INCIDENTS", 300)
    check(in_process.start(rounds=1, calls=64, many=100))


def test_growth_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What grows is measured at every size, in short."""
    monkeypatch.setattr(growth, "HITS", (1, 3))
    monkeypatch.setattr(growth, "READERS", (1, 3))
    monkeypatch.setattr(growth, "PROCESSES", (1, 2))
    monkeypatch.setattr(growth, "FOREIGN_KEYS", 100_000)
    check(growth.start(quick=True, sizes=[30, 60, 90], rounds=2, seconds=0.1))


def test_searches_are_measured() -> None:
    """Every search runs on both databases, in short."""
    check(search.start(quick=True, sizes=[100, 200], rounds=2))


def test_imports_are_measured() -> None:
    """The import is measured beside that of the packages."""
    check(imports.run(rounds=1))

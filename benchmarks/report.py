"""Writes the page `docs/performance.md` and its plots from the stored results."""

from __future__ import annotations

import textwrap
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.remarks import REMARKS
from benchmarks.results import FOLDER, Result

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from benchmarks.results import Row

PAGE: Final = FOLDER.parent / "performance.md"
BARS: Final = "requests per second"
GROWN_FROM: Final = "the time with "
SIDES: Final = {"incidentkit": "#1f77b4", "plain": "#d95f02", "floor": "#7f7f7f"}

CHART: Final = "summary.svg"
CHART_SUBJECTS: Final = ("http", "sqlite")
PLAIN: Final = "`plain`"
FLOOR: Final = "`floor`"

METHOD: Final = """\
## How it is measured

`nox -s bench` measures everything on this page and rewrites it. Absolute figures depend on the
machine and the day. Ratios compare sides that took turns in one run. Where the sides run in rounds,
a ratio is the median of the round-by-round ratios; for single calls and imports it is the ratio of
the medians, and for memory that of the peaks. Ratios are rounded against incidentkit. One failed
call voids the run.

- **`plain`** is [the origin's](how-to/migrate-from-the-origin.md) service as one would write it
  today: FastAPI, Pydantic, SQLAlchemy's ORM and redis-py, with a log line per request. It keeps no
  history. Cached pages go through its `response_model`, as all of its responses do. It stores each
  page before it answers; incidentkit answers first, and skips a page while ten others wait to be
  stored, which happens under this load.
- **`floor`** is the limit of driver and server with one statement per request: a Starlette route,
  asyncpg and handwritten SQL, with no validation, history, cache or log. Its pool skips the query
  that resets a connection. Where incidentkit is ahead of it, requests share statements. A cached
  list is compared with a response of fixed bytes instead.

Both use the origin's table, with incidentkit's indexes on its columns. incidentkit runs as
`incidentkit serve`, with all of its features and its request log at the default. Each service is
one process with uvloop, httptools and a pool of 20 connections; in figures from before 2026-11-28,
incidentkit had its default of at most 15. `{load}` keeps 32 connections busy from a process of its
own. PostgreSQL syncs to the disk, as it does by default, except for `growth`
and `search`. Load, service, PostgreSQL and Redis share the cores of the machine; the latencies are
those under a load that never pauses.

Sequential calls are measured with all processes involved pinned to one core: reads in process by
one caller, `search`, and in `growth` the interleaved calls and the readers. Without pinning, such a
call takes up to twice as long, depending on where the system has placed the process behind a
connection.

`nox -s bench -- before --base REVISION` compares the code with an earlier state of itself. It
prints a table and leaves this page alone.
"""


def write(results: Mapping[str, Result]) -> None:
    """Write the page and its plots."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    load = results["http"].load if "http" in results else "wrk"
    parts = ["# Performance\n", _summary(results), _chart(results)]
    parts += ["## Targets and results\n", _table(results), _remarks(results)]
    parts.append(METHOD.format(load=load))
    for name, result in results.items():
        parts.append(_subject(name, result))
    PAGE.write_text("\n".join(part for part in parts if part), "utf-8")


def _summary(results: Mapping[str, Result]) -> str:
    """Return a sentence on each rival and one on growth, where there are figures."""
    of_plain = _rates(results, "http", PLAIN)
    of_floor = _rates(results, "http", FLOOR)
    on_sqlite = _rates(results, "sqlite", PLAIN)
    grown = [
        row
        for name in ("growth", "search")
        for row in _rows(results, name)
        if row.against.startswith(GROWN_FROM)
    ]
    sentences = []
    if of_plain:
        sqlite = f", and {_range(on_sqlite)} times as many on SQLite" if on_sqlite else ""
        sentences.append(
            f"On PostgreSQL, incidentkit answers {_range(of_plain)} times as many requests per "
            "second as the same service written with FastAPI, Pydantic and SQLAlchemy's ORM "
            f"(`plain`){sqlite}."
        )
    if of_floor:
        sentences.append(
            f"It answers {_range(of_floor)} times as many as a bare route with one asyncpg "
            "statement per request (`floor`), because concurrent requests share statements."
        )
    if grown:
        sentences.append(
            f"With {grown[0].what.partition(' ')[0]} incidents in the table, a list, a get, a "
            "create, a page of an unfiltered search and the latest changes of the feed take at "
            f"most {max(row.value for row in grown):.2f} times as long as with "
            f"{grown[0].against.removeprefix(GROWN_FROM)}."
        )
    return textwrap.fill(" ".join(sentences), 100, break_on_hyphens=False) + "\n"


def _rates(results: Mapping[str, Result], subject: str, against: str) -> list[float]:
    """Return the ratios of rates against a rival, of a subject that may be missing."""
    return [row.value for row in _rows(results, subject) if _is_rate(row, against)]


def _rows(results: Mapping[str, Result], subject: str) -> list[Row]:
    return results[subject].rows if subject in results else []


def _is_rate(row: Row, against: str) -> bool:
    return row.against == against and row.target.startswith(">=")


def _range(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def _chart(results: Mapping[str, Result]) -> str:
    """Draw the rates over HTTP as multiples of the rates of `plain`."""
    bars = [
        (row.what, row.value)
        for name in CHART_SUBJECTS
        for row in _rows(results, name)
        if _is_rate(row, PLAIN)
    ]
    if not bars:
        return ""
    with _drawing(3.0) as figure:
        axes = figure.subplots()
        names = [what.replace("`", "").replace(", with history and token", "") for what, _ in bars]
        values = [value for _, value in bars]
        drawn = axes.barh(names, values, color=SIDES["incidentkit"])
        axes.bar_label(drawn, [f"{value:.2f}" for value in values], padding=3)
        axes.axvline(1, color=SIDES["plain"], label="plain")
        axes.invert_yaxis()
        axes.set_title("requests per second, as a multiple of plain")
        axes.legend(fontsize=7, loc="lower right")
        axes.margins(x=0.1)
        figure.savefig(FOLDER / CHART, metadata={"Date": None}, facecolor="white")
    caption = "Requests per second of incidentkit, as a multiple of those of plain"
    return f"![{caption}, as in the table.](performance/{CHART})\n"


def command(name: str) -> str:
    """Return the command that measures a subject."""
    return f"nox -s bench -- {name}"


def _table(results: Mapping[str, Result]) -> str:
    lines = [
        "| what | against | target | measured | | command |",
        "|---|---|---:|---:|---|---|",
        *(
            f"| {row.what} | {row.against} | {row.target} | {row.value:.2f} "
            f"| {'met' if row.reached else '**missed**'} | `{command(name)}` |"
            for name, result in results.items()
            for row in result.rows
        ),
    ]
    return "\n".join(lines) + "\n"


def _remarks(results: Mapping[str, Result]) -> str:
    said = [
        f"**{row.what}, against {row.against}.** {REMARKS[f'{row.what} / {row.against}']}\n"
        for result in results.values()
        for row in result.rows
        if not row.reached and f"{row.what} / {row.against}" in REMARKS
    ]
    return "\n".join(["## Missed targets\n", *said]) if said else ""


def _subject(name: str, result: Result) -> str:
    found = ", ".join(f"{package} {version}" for package, version in result.versions.items())
    lines = [
        f"## `{command(name)}`\n",
        f"Measured on {result.measured_at}: {result.rounds}. {result.machine}. {found}.\n",
    ]
    for title, (head, *rows) in result.details.items():
        lines += [f"**{title}**\n", f"| {' | '.join(head)} |"]
        lines.append(f"|{'|'.join(['---', *['---:'] * (len(head) - 1)])}|")
        lines += [*(f"| {' | '.join(row)} |" for row in rows), ""]
    for number, (title, series) in enumerate(result.series.items()):
        file = FOLDER / f"{name}-{number}.svg"
        _plot(file, title, series, result)
        lines.append(
            f"![{title[0].upper()}{title[1:]}, as in the tables.](performance/{file.name})\n"
        )
    return "\n".join(lines)


@contextmanager
def _drawing(height: float) -> Iterator[Figure]:
    """Yield a figure whose file depends only on its content."""
    with mpl.rc_context({"svg.hashsalt": "incidentkit", "svg.fonttype": "none", "font.size": 9}):
        yield Figure(figsize=(7, height), layout="constrained")


def _plot(file: Path, title: str, series: dict[str, list[list[float]]], result: Result) -> None:
    """Draw the plot of a subject."""
    with _drawing(3.4) as figure:
        axes = figure.subplots()
        if title == BARS:
            names = list(dict.fromkeys(row[0] for row in next(iter(result.details.values()))[1:]))
            for number, (side, points) in enumerate(series.items()):
                axes.bar(
                    [place + (number - 1) * 0.27 for place, _ in points],
                    [rate for _, rate in points],
                    0.27,
                    label=side,
                    color=SIDES.get(side),
                )
            axes.set_xticks(range(len(names)), [name.partition(",")[0] for name in names])
        else:
            for line, points in series.items():
                axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=line)
            if max(x for points in series.values() for x, _ in points) >= 1000:  # noqa: PLR2004
                axes.set_xscale("log")
            axes.set_ylim(bottom=0)
        axes.set_title(title)
        axes.legend(fontsize=7)
        axes.grid(axis="y", alpha=0.3)
        figure.savefig(file, metadata={"Date": None}, facecolor="white")

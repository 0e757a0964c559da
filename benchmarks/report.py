"""The page `docs/performance.md` and its plots, from what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.remarks import REMARKS
from benchmarks.results import FOLDER, Result

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PAGE: Final = FOLDER.parent / "performance.md"
BARS: Final = "requests a second"
SIDES: Final = {"incidentkit": "#1f77b4", "plain": "#d95f02", "floor": "#7f7f7f"}

HEAD: Final = """\
# Performance

How fast incidentkit is, beside what one would write otherwise, and how that changes as the table
grows. Everything here is measured by `nox -s bench`, which writes this page anew. Absolute figures
belong to one machine and one day. The ratios are of sides that took turns in one run: of services
the median of the ratios round by round, of single calls and imports the ratio of the medians, of
memory that of the peaks. They are rounded to the worse side. A round in which a call failed makes
the run void.

- **`plain`** is the service as one would write it today: FastAPI, Pydantic, SQLAlchemy's ORM and
  redis-py, by [the origin's](how-to/migrate-from-the-origin.md) description, with a log of each
  request. It keeps no history. What it finds in the cache goes through its `response_model`, as
  every answer does. It stores each page before it answers; incidentkit answers first, and leaves
  out a page for which ten others wait to be stored, as happens under this load.
- **`floor`** is what the driver and the server allow with a statement for each request: a Starlette
  route, asyncpg and SQL by hand, with no validation, no history, no cache and no log. Its pool
  skips the query that resets a connection. Where incidentkit is ahead of it, requests share
  statements.

Both have the origin's table, with the indexes that incidentkit's has on those columns. incidentkit
runs as `incidentkit serve` with all its features, its request log at its default. Each service is
one process; all have uvloop, httptools and a pool of 20 connections. {load} keeps 32 connections
busy, from a process of its own. PostgreSQL syncs to the disk, as it does by default, but for
`growth` and `search`. Load, service, PostgreSQL and Redis share the cores of the machine; the
latencies are those of a load that never pauses.

Where single calls are made one after the other, all that takes part is kept on one core: reads in
process by one caller, `search`, and of `growth` what takes turns and the readers. Otherwise such a
call takes up to twice as long, by where the system happens to have put the process behind a
connection.
"""


def write(results: Mapping[str, Result], load_program: str) -> None:
    """Write the page and its plots."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    parts = [HEAD.format(load=f"`{load_program}`"), "## What is wanted, and what was measured\n"]
    parts.append(_table(results))
    parts.append(_remarks(results))
    for name, result in results.items():
        parts.append(_subject(name, result))
    PAGE.write_text("\n".join(part for part in parts if part), "utf-8")


def command(name: str) -> str:
    """Return what measures a subject."""
    return f"nox -s bench -- {name}"


def _table(results: Mapping[str, Result]) -> str:
    lines = [
        "| what | against | wanted | measured | | command |",
        "|---|---|---:|---:|---|---|",
        *(
            f"| {row.what} | {row.against} | {row.target} | {row.value:.2f} "
            f"| {'reached' if row.reached else '**not reached**'} | `{command(name)}` |"
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
    return "\n".join(["## What is not reached, and why\n", *said]) if said else ""


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
        lines.append(f"![{title.capitalize()}, as in the tables.](performance/{file.name})\n")
    return "\n".join(lines)


def _plot(file: Path, title: str, series: dict[str, list[list[float]]], result: Result) -> None:
    """Draw a plot that is the same each time it is drawn from the same figures."""
    with mpl.rc_context({"svg.hashsalt": "incidentkit", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(7, 3.4), layout="constrained")
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

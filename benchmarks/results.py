"""What was measured: rows for the table, and figures for the plots, kept as JSON."""

from __future__ import annotations

import json
import math
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from attrs import asdict, field, frozen

FOLDER: Final = Path(__file__).parents[1] / "docs" / "performance"
FILE: Final = FOLDER / "results.json"
PACKAGES: Final = (
    *("asyncpg", "uvicorn", "starlette", "uvloop", "httptools", "redis", "sqlalchemy"),
    *("fastapi", "pydantic"),
)


@frozen
class Row:
    """A line of the table.

    Attributes:
        what: What was compared.
        target: What is wanted, such as ``>= 10 x``.
        against: Whom it was compared with.
        value: What was measured, a ratio unless the unit says otherwise.
        reached: Whether it is what is wanted.
        unit: The unit of the value.
    """

    what: str
    against: str
    target: str
    value: float
    reached: bool
    unit: str = "x"


@frozen
class Result:
    """What one subject gave.

    Attributes:
        rows: Its lines of the table.
        details: Tables of figures by title: a head, and then rows of cells.
        series: Lines of plots by title: by the name of a line, its points.
        notes: What was measured, in sentences.
        versions: Of what took part.
        machine: On what.
        measured_at: When, as a date.
        rounds: How many rounds, and how long one was, in words.
    """

    rows: list[Row]
    details: dict[str, list[list[str]]] = field(factory=dict)
    series: dict[str, dict[str, list[list[float]]]] = field(factory=dict)
    notes: str = ""
    rounds: str = ""
    versions: dict[str, str] = field(factory=dict)
    machine: str = ""
    measured_at: str = ""


def at_least(what: str, against: str, target: float, value: float, unit: str = "x") -> Row:
    """Return the row of what must not be less, rounded down."""
    value = math.floor(value * 100) / 100
    return Row(what, against, f">= {target:g}", value, value >= target, unit)


def at_most(what: str, against: str, target: float, value: float, unit: str = "x") -> Row:
    """Return the row of what must not be more, rounded up."""
    value = math.ceil(value * 100) / 100
    return Row(what, against, f"<= {target:g}", value, value <= target, unit)


def machine() -> str:
    """Return what the machine is, without its name."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores of {cpu}, {memory:.0f} GiB, {platform.system()}"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages."""
    return {"Python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def load() -> dict[str, Result]:
    """Return what was measured last of each subject."""
    if not FILE.exists():
        return {}
    kept: dict[str, Any] = json.loads(FILE.read_text("utf-8"))
    return {
        name: Result(**{**each, "rows": [Row(**row) for row in each["rows"]]})
        for name, each in kept.items()
    }


def save(results: dict[str, Result]) -> None:
    """Keep what was measured."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: asdict(each) for name, each in results.items()}, indent=1)
    FILE.write_text(text + "\n", "utf-8")


def today() -> str:
    """Return the date."""
    return datetime.now(UTC).date().isoformat()

"""The results: rows of the table and figures of the plots, stored as JSON."""

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
    """A row of the table.

    Attributes:
        what: The name of the measurement.
        against: The side that it is compared with.
        target: The target, such as ``>= 10``.
        value: The measured value, a ratio unless the unit says otherwise.
        reached: Whether the target is met.
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
    """The results of one subject.

    Attributes:
        rows: Its rows of the table.
        details: Tables of figures by title: a header, then rows of cells.
        series: Plots by title: the points of each line, by the name of the line.
        notes: Remarks, in sentences.
        rounds: The number of rounds and the length of one, in words.
        versions: The versions of Python, packages and servers.
        machine: The machine, without its name.
        load: The program that made the load over HTTP.
        measured_at: The date of the run.
    """

    rows: list[Row]
    details: dict[str, list[list[str]]] = field(factory=dict)
    series: dict[str, dict[str, list[list[float]]]] = field(factory=dict)
    notes: str = ""
    rounds: str = ""
    versions: dict[str, str] = field(factory=dict)
    machine: str = ""
    load: str = ""
    measured_at: str = ""


def at_least(what: str, against: str, target: float, value: float, unit: str = "x") -> Row:
    """Return a row whose value must not be below the target; the value is rounded down."""
    value = math.floor(value * 100) / 100
    return Row(what, against, f">= {target:g}", value, value >= target, unit)


def at_most(what: str, against: str, target: float, value: float, unit: str = "x") -> Row:
    """Return a row whose value must not be above the target; the value is rounded up."""
    value = math.ceil(value * 100) / 100
    return Row(what, against, f"<= {target:g}", value, value <= target, unit)


def machine() -> str:
    """Describe the machine, without its name."""
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
    """Return the latest results of each subject."""
    if not FILE.exists():
        return {}
    kept: dict[str, Any] = json.loads(FILE.read_text("utf-8"))
    return {
        name: Result(**{**each, "rows": [Row(**row) for row in each["rows"]]})
        for name, each in kept.items()
    }


def save(results: dict[str, Result]) -> None:
    """Store the results."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: asdict(each) for name, each in results.items()}, indent=1)
    FILE.write_text(text + "\n", "utf-8")


def today() -> str:
    """Return the date in UTC."""
    return datetime.now(UTC).date().isoformat()

"""Measures the import of incidentkit against that of attrs and cattrs."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Final

from benchmarks.results import Result, at_most

WANTED: Final = 1.5
NOTHING: Final = "pass"
PACKAGES: Final = "import attrs, cattrs"
OURS: Final = "import incidentkit"


def run(*, rounds: int) -> Result:
    """Measure imports in interleaved processes, without the start of Python."""
    seconds: dict[str, list[float]] = {NOTHING: [], PACKAGES: [], OURS: []}
    for number in range(rounds + 1):
        for code, its_seconds in seconds.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            if number:
                its_seconds.append(time.perf_counter() - started)
    empty = statistics.median(seconds[NOTHING])
    packages, ours = (statistics.median(seconds[code]) - empty for code in (PACKAGES, OURS))
    row = at_most("`import incidentkit`", "`import attrs, cattrs`", WANTED, ours / packages)
    cells = [[f"`{code}`", f"{statistics.median(seconds[code]) * 1000:.0f}"] for code in seconds]
    table = [["a process that only runs", "median, ms"], *cells]
    return Result([row], {"Import": table}, rounds=f"{rounds} rounds")

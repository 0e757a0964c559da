"""Measures the import of incidentkit against that of attrs and cattrs."""

from __future__ import annotations

import statistics
import subprocess
import sys
from typing import Final

from benchmarks.results import Result, at_most

WANTED: Final = 1.5
PACKAGES: Final = "import attrs, cattrs"
FACE: Final = "import incidentkit"
OURS: Final = "from incidentkit import IncidentClient"

TIMED: Final = """\
import time
started = time.perf_counter()
{code}
print(time.perf_counter() - started)
"""
"""Prints the seconds that the code takes, without the start of Python."""


def run(*, rounds: int) -> Result:
    """Measure each import in a process of its own, interleaved."""
    seconds: dict[str, list[float]] = {PACKAGES: [], FACE: [], OURS: []}
    for number in range(rounds + 1):
        for code, its_seconds in seconds.items():
            command = [sys.executable, "-c", TIMED.format(code=code)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            if number:
                its_seconds.append(float(output))
    medians = {code: statistics.median(its_seconds) for code, its_seconds in seconds.items()}
    compared = medians[OURS] / medians[PACKAGES]
    row = at_most(f"`{OURS}`", f"`{PACKAGES}`", WANTED, compared)
    cells = [[f"`{code}`", f"{median * 1000:.1f}"] for code, median in medians.items()]
    return Result(
        [row], {"Import": [["statement", "median, ms"], *cells]}, rounds=f"{rounds} rounds"
    )

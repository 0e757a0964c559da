"""Run many simulations: `python -m tests.simulation --seeds 3000`, or `--first 7 --seeds 1`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from tests.simulation.schedule import STALENESS, Figures, Verdict, replay, simulate


def main() -> None:
    """Run the seeds for each ``max_staleness``, print the figures, and exit with 1 on a failure."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--seeds", type=int, default=3000, help="number of seeds")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--max-staleness", type=float, help="only this value, in seconds")
    given = parser.parse_args()
    staleness = STALENESS if given.max_staleness is None else (given.max_staleness,)
    failures = 0
    # A forked process would inherit its parent's state.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for seconds in staleness:
            began, total = time.monotonic(), Figures()
            seeds = range(given.first, given.first + given.seeds)
            verdicts = pool.map(simulate, seeds, [seconds] * len(seeds), chunksize=20)
            for seed, verdict in zip(seeds, verdicts, strict=True):
                total += verdict.figures
                failures += _print(seed, seconds, verdict)
            took = time.monotonic() - began
            sys.stdout.write(f"max_staleness {seconds:g}: {total} ({took:.0f} s)\n")
    sys.exit(failures > 0)


def _print(seed: int, max_staleness: float, verdict: Verdict) -> bool:
    """Print the faults of a verdict, and return whether there are any."""
    wrong = [*verdict.stale, *verdict.failed]
    if wrong:
        sys.stdout.write("\n  ".join([replay(seed, max_staleness), *wrong]) + "\n")
    return bool(wrong)


if __name__ == "__main__":
    main()

"""Remarks on missed targets: the cause, and the options."""

from __future__ import annotations

from typing import Final

REMARKS: Final[dict[str, str]] = {
    "pages from 50,000 on, each after a status change / `plain`": (
        "While nothing changes, the second of a run of consecutive pages, and every further one, "
        "starts where the page before it ended. After a change, the database skips all entries "
        "before the page again, in the index alone. That takes half of the time: about 25 "
        "milliseconds for 500,000 entries, where skipping the rows takes 54 if all of them are in "
        "memory. Skipping fewer entries would take a count of positions, kept up to date by every "
        "write for every filter. `search`, with cursors, costs the same at any depth, changes or "
        "not."
    ),
    "p99 beside PostgreSQL: 32 totals / 3 times the p99 beside a decoy, or 10 ms more": (
        "Of the three calls only `get` misses, with 11.3 milliseconds where 10.9 are allowed. Four "
        "totals are counted at a time, each in a process of the server that takes a whole core, "
        "and the machine has two cores for these, the service and its callers. Three runs gave "
        "0.73, 1.05 and 1.24. A smaller share of the connections would leave more of such a "
        "machine to other calls, but make searches wait longer on a larger one."
    ),
}
"""The remark on each row, by ``what / against``."""

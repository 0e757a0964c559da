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
}
"""The remark on each row, by ``what / against``."""

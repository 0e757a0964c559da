"""What is to be said of rows that are not reached: what was tried, and what stands in the way."""

from __future__ import annotations

from typing import Final

REMARKS: Final[dict[str, str]] = {
    "`page=50000` and on, with a change of status before each / `plain`": (
        "Of pages that follow each other the second and all further ones begin where the one "
        "before did, as long as nothing changes. After a change all that comes before a page is "
        "passed over once more, in the index alone, which takes half of the time: about 25 "
        "milliseconds for 500,000 entries, where the rows take 54 if all of them are in memory. "
        "To pass over less one would have to keep count of what stands where, in each write, for "
        "each filter. `search`, with cursors, costs the same at any depth whatever changes."
    ),
}
"""By what a row compares and with whom, as ``what / against``."""

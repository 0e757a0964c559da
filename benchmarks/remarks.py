"""What is to be said of rows that are not reached: what was tried, and what stands in the way."""

from __future__ import annotations

from typing import Final

REMARKS: Final[dict[str, str]] = {
    "list, not cached / `plain`": (
        "A page of 10 to 25 incidents that nobody has asked for. Sharing statements, JSON straight "
        "from the rows, connections at hand, fewer commands to Redis and fewer columns made it "
        "about three times as fast as it was, and about as fast as the floor, which looks for "
        "no page in a cache, checks nothing and logs nothing: four times `plain` would be well "
        "above the floor. What is left is mostly work on each row of a page: in process 130 "
        "microseconds a page, of which 20 take the rows from the wire, 35 make JSON of them, and "
        "30 ask Redis and fill it; HTTP and the log come on top. JSON made by PostgreSQL was "
        "tried: it takes more of the database's time than it saves here."
    ),
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

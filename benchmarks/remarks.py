"""What is to be said of rows that are not reached: what was tried, and what stands in the way."""

from __future__ import annotations

from typing import Final

_LIST: Final = (
    "A page of 10 to 25 incidents that nobody has asked for. Sharing statements, JSON "
    "straight from the rows, connections at hand and fewer commands to Redis made it nearly "
    "three times as fast as it was. What is left is mostly work on each row of a page: about "
    "40 microseconds a page to take them from the wire, as much to make JSON of them, and 45 "
    "for HTTP and the log; Redis takes about 30. JSON made by PostgreSQL was tried: it takes "
    "more of the database's time than it saves here."
)

REMARKS: Final[dict[str, str]] = {
    "list, not cached / `plain`": _LIST,
    "list, not cached / `floor`": _LIST,
    "update-status, with history and token / `floor`": (
        "In a statement of 32 PostgreSQL takes about 50 microseconds for each change: a new "
        "version of the row in each of its indexes, an event in three of its own, and the token. "
        "The floor changes the row and nothing else. One, two and four such statements at a time "
        "were tried."
    ),
    "SDK in process, get, concurrency 1 / SQLAlchemy ORM": (
        "asyncpg itself, on a pool that resets nothing, is here 4.5 times as fast as the ORM. "
        "incidentkit takes a fifth more than that: a turn of the event loop, in which reads of the "
        "same moment find each other, and a checked, frozen model for the row."
    ),
    "`page=50000` and on, not cached / `plain`": (
        "What is passed over is now read from the index alone, which halves the time: about 25 "
        "milliseconds for 500,000 entries, where the rows take 54 if all of them are in memory. "
        "To pass over less, one would have to know where a page begins, which every change of an "
        "incident may move."
    ),
}
"""By what a row compares and with whom, as ``what / against``."""

"""The writes and reads that processes logged, and a check that they are consistent.

Times are in nanoseconds, by the clock that all processes of a machine share. Each incident has a
unique message and one owner, which moves it through different statuses, one after the other, and
leaves it alone once the outcome of a change is unknown. A list therefore shows which writes of an
incident had happened.
"""

from __future__ import annotations

import json
from bisect import insort
from collections import Counter
from math import inf
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from attrs import Factory, asdict, astuple, define, field, frozen

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from incidentkit import SourceName, StatusName

Outcome: TypeAlias = Literal["done", "undone", "unknown"]
"""``undone`` means rolled back; a read is either done or unknown."""

Window: TypeAlias = tuple[float, float]
Key: TypeAlias = tuple[str, int]


@frozen
class Row:
    """An incident as a list shows it; the time is ``YYYY-MM-DD HH:MM:SS``."""

    incident_id: int
    message: str
    status: str
    source: str
    created_at: str

    @property
    def key(self) -> Key:
        """The sort key of lists, newest first."""
        return self.created_at, self.incident_id


@frozen
class Query:
    """The arguments of a list."""

    page: int
    limit: int
    status: StatusName | None = None
    source: SourceName | None = None


@frozen
class Write:
    """A create, or a later change of the status of the same message."""

    message: str
    status: str
    source: str
    start: int
    end: float = inf
    outcome: Outcome = "unknown"
    row: Row | None = None


@frozen
class Read:
    """A list that returned."""

    query: Query
    start: int
    end: int
    rows: tuple[Row, ...]


@define
class History:
    """Everything that the processes logged.

    Attributes:
        writes: The writes that began, with any outcome.
        reads: The lists that returned.
        errors: The errors that writes and reads raised, by name.
        filled: The number of pages read from the database rather than from a cache.
    """

    writes: list[Write] = Factory(list)
    reads: list[Read] = Factory(list)
    errors: Counter[str] = Factory(Counter)
    filled: int = 0


def note_write(call: int, write: Write) -> bytes:
    """Return the log line for the start of a write."""
    return _line(call=call, write=asdict(write, filter=lambda a, _: a.name in _INTENT))


def note_read(call: int, query: Query, start: int) -> bytes:
    """Return the log line for the start of a read."""
    return _line(call=call, query=asdict(query), start=start)


def note_end(
    call: int,
    end: int,
    outcome: Outcome,
    rows: Sequence[Row] = (),
    *,
    error: str | None = None,
    filled: int = 0,
) -> bytes:
    """Return the log line for the end of a call.

    Args:
        call: Its number.
        end: When it ended.
        outcome: Its outcome.
        rows: The rows that it returned.
        error: The name of the error that it raised.
        filled: How many pages the process has read from the database so far.
    """
    noted = [astuple(row) for row in rows]
    return _line(call=call, end=end, outcome=outcome, rows=noted, error=error, filled=filled)


_INTENT = ("message", "status", "source", "start")


def _line(**values: Any) -> bytes:
    return json.dumps(values).encode() + b"\n"


def read_log(lines: Iterable[bytes], history: History) -> None:
    """Add one process's log to the history; a killed process may leave an incomplete line.

    A write without a logged end may have been stored, or may still be stored.
    """
    begun: dict[int, Mapping[str, Any]] = {}
    filled = 0
    for line in lines:
        if not line.endswith(b"\n"):
            break
        note = json.loads(line)
        intent = begun.pop(note["call"], None)
        if intent is None:
            begun[note["call"]] = note
            continue
        rows = tuple(Row(*row) for row in note["rows"])
        filled = max(filled, note["filled"])
        if note["error"] is not None:
            verb = "write" if "write" in intent else "read"
            history.errors[f"{verb}: {note['error']}"] += 1
        if "write" in intent:
            done = note["outcome"] == "done"
            history.writes.append(
                Write(
                    **intent["write"],
                    end=note["end"] if done else inf,
                    outcome=note["outcome"],
                    row=rows[0] if done else None,
                )
            )
        elif note["outcome"] == "done":
            query = Query(**intent["query"])
            history.reads.append(Read(query, intent["start"], note["end"], rows))
    history.filled += filled
    history.writes.extend(Write(**note["write"]) for note in begun.values() if "write" in note)


@define
class Verdict:
    """The contradictions in a history."""

    stale: list[str] = Factory(list)
    lost: list[str] = Factory(list)


@define
class _Version:
    """A status of an incident.

    Attributes:
        start: The earliest time at which it can have begun.
        end: The time by which it had begun.
    """

    status: str
    start: float
    end: float


@define(eq=False)
class _Incident:
    row: Row
    versions: list[_Version] = field(factory=list)

    def spans(self, query: Query) -> Iterator[tuple[Window, Window]]:
        """Yield the windows in which it was possibly, and certainly, in the filtered list."""
        if query.source not in (None, self.row.source):
            return
        if query.status is None:
            first = self.versions[0]
            yield (first.start, inf), (first.end, inf)
            return
        for number, version in enumerate(self.versions):
            if version.status == query.status:
                later = self.versions[number + 1 : number + 2]
                start, end = (later[0].start, later[0].end) if later else (inf, inf)
                yield (version.start, end), (version.end, start)


def check(history: History, stored: Sequence[Row]) -> Verdict:
    """Return the contradictions in a history that left these rows in the database.

    A list is correct if, at some instant during the call, the database can have held exactly this
    page. A write has happened once it was acknowledged, or once a list that showed it returned.
    """
    verdict = Verdict()
    incidents = _incidents(history, stored, verdict)
    waiting = sorted(incidents.values(), key=lambda each: each.versions[0].start, reverse=True)
    begun: list[_Incident] = []
    for read in sorted(history.reads, key=lambda each: each.end):
        while waiting and waiting[-1].versions[0].start <= read.end:
            insort(begun, waiting.pop(), key=lambda each: each.row.key)
        fault = _fault(read, incidents, begun)
        if fault is not None:
            verdict.stale.append(f"{fault}: {_short(read)}")
    return verdict


def _short(read: Read) -> str:
    shown = ", ".join(f"{row.message}={row.status}" for row in read.rows[:12])
    return f"{read.query} from {read.start} to {read.end} showed {shown}"


def _incidents(history: History, stored: Sequence[Row], verdict: Verdict) -> dict[str, _Incident]:
    """Return the known versions of each incident, and check its stored row."""
    rows = {row.message: row for row in stored}
    writes: dict[str, list[Write]] = {row.message: [] for row in stored}
    undone: set[str] = set()
    for write in sorted(history.writes, key=lambda each: each.start):
        if write.outcome == "undone":
            undone.add(write.message)
        else:
            writes.setdefault(write.message, []).append(write)
    incidents = {}
    for message, its in writes.items():
        if not its:
            reason = "was rolled back" if message in undone else "was never written"
            verdict.lost.append(f"{message} is stored and {reason}")
            continue
        _judge_stored(rows.get(message), its, verdict)
        row = rows.get(message) or its[0].row
        if row is not None:
            versions = [_Version(write.status, write.start, write.end) for write in its]
            incidents[message] = _Incident(row, versions)
    return incidents


def _judge_stored(row: Row | None, writes: Sequence[Write], verdict: Verdict) -> None:
    done = [number for number, write in enumerate(writes) if write.outcome == "done"]
    if not done:
        return
    write = writes[done[-1]]
    if row is None:
        verdict.lost.append(f"{write.message} was acknowledged and is not stored")
    elif row.status not in [each.status for each in writes[done[-1] :]]:
        verdict.lost.append(f"{write.message} was made {write.status} and is {row.status}")
    for number in done:
        told = writes[number].row
        if row is not None and told is not None and _lasting(told) != _lasting(row):
            verdict.lost.append(f"{told} was acknowledged and {row} is stored")


def _lasting(row: Row) -> tuple[object, ...]:
    return row.key, row.message, row.source


def _fault(
    read: Read, incidents: Mapping[str, _Incident], begun: Sequence[_Incident]
) -> str | None:
    """Return the fault of a list, or None, and record the writes that it shows."""
    windows: list[Window] = [(read.start, read.end)]
    shown: list[_Version] = []
    for row in read.rows:
        incident = incidents.get(row.message)
        if incident is None or _lasting(incident.row) != _lasting(row):
            return f"{row.message} was never stored so"
        found = [
            number for number, each in enumerate(incident.versions) if each.status == row.status
        ]
        if not found:
            return f"{row.message} never was {row.status}"
        version, *later = incident.versions[found[0] :]
        shown.append(version)
        windows = _within(windows, version.start, later[0].end if later else inf)
        if not windows:
            return f"{row.message} was not {row.status}, or not when others were as shown"
    fault = _fault_of_form(read) or _fault_of_page(read, begun, windows)
    if fault is None:
        for version in shown:
            version.end = min(version.end, read.end)
    return fault


def _fault_of_form(read: Read) -> str | None:
    query, keys = read.query, [row.key for row in read.rows]
    if len(keys) > query.limit or keys != sorted(set(keys), reverse=True):
        return "the list is too long, or not newest first"
    for row in read.rows:
        if query.status not in (None, row.status) or query.source not in (None, row.source):
            return f"{row.message} does not match the filter"
    return None


def _fault_of_page(read: Read, begun: Sequence[_Incident], windows: list[Window]) -> str | None:
    """Return the fault in the bounds of a page, or None."""
    query, rows = read.query, read.rows
    messages = {row.message for row in rows}
    low = rows[-1].key if len(rows) == query.limit else ("", 0)
    before: list[_Incident] = []
    for incident in reversed(begun):
        if incident.row.key < low:
            break
        if query.page > 1 and (not rows or incident.row.key > rows[0].key):
            before.append(incident)
        elif incident.row.message not in messages:
            for _, certainly in incident.spans(query):
                windows = _without(windows, *certainly)
            if not windows:
                return f"{incident.row.message} is missing"
    skipped = (query.page - 1) * query.limit
    if query.page > 1 and not any(
        _can_precede(before, query, window, skipped, at_most=not rows) for window in windows
    ):
        return f"not {skipped} incidents were before the page"
    return None


def _can_precede(
    before: Sequence[_Incident], query: Query, window: Window, count: int, *, at_most: bool
) -> bool:
    """Return whether that many of these incidents can have been in the filtered list."""
    spans = [span for incident in before for span in incident.spans(query)]
    certain = sum(start <= window[0] and window[1] <= end for _, (start, end) in spans)
    possible = sum(start <= window[1] and window[0] <= end for (start, end), _ in spans)
    return certain <= count and (at_most or count <= possible)


def _within(windows: Sequence[Window], start: float, end: float) -> list[Window]:
    both = [(max(start, low), min(end, high)) for low, high in windows]
    return [window for window in both if window[0] <= window[1]]


def _without(windows: Sequence[Window], start: float, end: float) -> list[Window]:
    if start >= end:
        return list(windows)
    return [*_within(windows, -inf, start), *_within(windows, end, inf)]

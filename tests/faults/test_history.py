"""Consistent and contradictory histories, and the verdicts on them."""

from __future__ import annotations

from math import inf

import pytest

from tests.faults.history import (
    History,
    Query,
    Read,
    Row,
    Verdict,
    Write,
    check,
    note_end,
    note_read,
    note_write,
    read_log,
)

FIRST = Row(1, "first", "new", "partner", "2030-01-01 00:00:00")
SECOND = Row(2, "second", "new", "operator", "2030-01-01 00:00:00")
CHANGED = Row(1, "first", "failed", "partner", "2030-01-01 00:00:00")
UNKNOWN = Row(9, "other", "new", "partner", "2030-01-01 00:00:00")
ALL = Query(1, 10)


def write(row: Row, start: int, end: float) -> Write:
    """Return a write that was acknowledged with this row."""
    return Write(row.message, row.status, row.source, start, end, "done", row)


def unsure(row: Row, start: int) -> Write:
    """Return a write that may or may not have been stored."""
    return Write(row.message, row.status, row.source, start)


WRITES = [write(FIRST, 10, 20), write(SECOND, 30, 40), write(CHANGED, 50, 60)]
STORED = [CHANGED, SECOND]


def judge(*reads: Read, writes: list[Write] = WRITES, stored: list[Row] = STORED) -> Verdict:
    """Return the verdict on these reads of two incidents, the first of which was changed."""
    return check(History(writes, list(reads)), stored)


@pytest.mark.parametrize(
    ("start", "end", "rows"),
    [
        (1, 5, ()),
        (1, 12, ()),
        (1, 12, (FIRST,)),
        (25, 35, (FIRST,)),
        (25, 35, (SECOND, FIRST)),
        (45, 48, (SECOND, FIRST)),
        (45, 55, (SECOND, FIRST)),
        (45, 55, (SECOND, CHANGED)),
        (65, 70, (SECOND, CHANGED)),
        (1, 70, (FIRST,)),
    ],
)
def test_a_list_of_some_instant_is_right(start: int, end: int, rows: tuple[Row, ...]) -> None:
    """A list is accepted if the database can have held it at an instant during the call."""
    assert judge(Read(ALL, start, end, rows)) == Verdict()


@pytest.mark.parametrize(
    ("start", "end", "rows"),
    [
        (21, 25, ()),  # a create that was acknowledged is missing
        (1, 5, (FIRST,)),  # the create had not begun
        (41, 45, (FIRST,)),
        (61, 70, (SECOND, FIRST)),  # an old status
        (41, 45, (SECOND, CHANGED)),  # a status that is yet to come
        (1, 70, (CHANGED,)),  # never at the same time: the second existed before the change
        (41, 45, (FIRST, SECOND)),  # the wrong order
        (41, 45, (SECOND, FIRST, UNKNOWN)),
        (41, 45, (SECOND, Row(3, "first", "new", "partner", FIRST.created_at))),
        (41, 45, (SECOND, Row(1, "first", "completed", "partner", FIRST.created_at))),
    ],
)
def test_a_stale_list_is_found(start: int, end: int, rows: tuple[Row, ...]) -> None:
    """A list is stale if the database held it at no instant during the call."""
    verdict = judge(Read(ALL, start, end, rows))
    assert len(verdict.stale) == 1
    assert not verdict.lost


@pytest.mark.parametrize(
    ("query", "rows"),
    [
        (Query(1, 1), (FIRST,)),
        (Query(2, 1), (SECOND,)),
        (Query(2, 1), ()),
        (Query(3, 1), (CHANGED,)),
        (Query(1, 1), (SECOND, CHANGED)),
        (Query(1, 10, status="new"), (SECOND, FIRST)),
        (Query(1, 10, status="failed"), ()),
        (Query(1, 10, status="failed"), (SECOND,)),
        (Query(1, 10, source="partner"), (SECOND, CHANGED)),
        (Query(1, 10, source="operator"), ()),
    ],
)
def test_a_stale_page_is_found(query: Query, rows: tuple[Row, ...]) -> None:
    """A wrong page or filtered list is found to be stale."""
    assert len(judge(Read(query, 65, 70, rows)).stale) == 1


@pytest.mark.parametrize(
    ("query", "rows"),
    [
        (Query(1, 1), (SECOND,)),
        (Query(2, 1), (CHANGED,)),
        (Query(3, 1), ()),
        (Query(1, 10, status="new"), (SECOND,)),
        (Query(1, 10, status="failed"), (CHANGED,)),
        (Query(2, 1, status="failed"), ()),
        (Query(1, 10, status="completed"), ()),
        (Query(1, 10, source="operator"), (SECOND,)),
        (Query(1, 10, status="failed", source="operator"), ()),
    ],
)
def test_a_page_of_some_instant_is_right(query: Query, rows: tuple[Row, ...]) -> None:
    """A page or filtered list that the database held is accepted."""
    assert judge(Read(query, 65, 70, rows)) == Verdict()


def test_what_was_shown_stays_shown() -> None:
    """A list is stale if it lacks a write that an earlier list has shown."""
    reads = [Read(ALL, 51, 53, (SECOND, CHANGED)), Read(ALL, 54, 56, (SECOND, FIRST))]
    assert judge(*reads[:1]) == judge(*reads[1:]) == Verdict()
    assert len(judge(*reads).stale) == 1


@pytest.mark.parametrize("stored", [[FIRST], [CHANGED]])
def test_a_write_with_an_unknown_outcome_may_come_at_any_time(stored: list[Row]) -> None:
    """A list may show or lack a write with an unknown outcome, until another list has shown it."""
    writes = [write(FIRST, 10, 20), unsure(CHANGED, 50), unsure(SECOND, 50)]
    before, after = Read(ALL, 70, 80, (FIRST,)), Read(ALL, 100, 110, (CHANGED,))
    assert judge(before, writes=writes, stored=stored) == Verdict()
    assert judge(before, after, writes=writes, stored=[CHANGED]) == Verdict()
    again = Read(ALL, 120, 130, (FIRST,))
    assert len(judge(before, after, again, writes=writes, stored=[CHANGED]).stale) == 1


def test_a_lost_write_is_found() -> None:
    """Acknowledged writes that are missing or different at the end are found."""
    assert judge().lost == []
    assert len(judge(stored=[CHANGED]).lost) == 1
    assert len(judge(stored=[FIRST, SECOND]).lost) == 1
    assert len(judge(stored=[*STORED, UNKNOWN]).lost) == 1
    assert len(judge(stored=[CHANGED, Row(3, *SECOND_BUT_FOR_ITS_ID)]).lost) == 1


SECOND_BUT_FOR_ITS_ID = (SECOND.message, SECOND.status, SECOND.source, SECOND.created_at)


def test_what_was_rolled_back_never_was() -> None:
    """A rolled-back write that is shown or stored is found."""
    undone = Write("second", "new", "operator", 30, inf, "undone")
    writes = [write(FIRST, 10, 20), undone]
    assert judge(Read(ALL, 35, 45, (FIRST,)), writes=writes, stored=[FIRST]) == Verdict()
    shown = judge(Read(ALL, 35, 45, (SECOND, FIRST)), writes=writes, stored=[FIRST])
    assert len(shown.stale) == 1
    assert len(judge(writes=writes, stored=[FIRST, SECOND]).lost) == 1


def test_a_log_is_read_as_far_as_it_was_written() -> None:
    """A log is read up to its last complete line; a write without an end is unknown."""
    create, change, undone = (
        unsure(row, start) for row, start in ((FIRST, 1), (CHANGED, 4), (SECOND, 5))
    )
    lines = [
        note_write(1, create),
        note_read(2, ALL, 2),
        note_end(1, 3, "done", [FIRST]),
        note_write(3, change),
        note_end(2, 5, "done", [FIRST], filled=4),
        note_write(4, undone),
        note_end(4, 6, "undone"),
        note_read(5, ALL, 7),
        note_end(5, 8, "unknown", error="StoreUnavailable"),
        note_end(3, 9, "done", [CHANGED])[:-1],
    ]
    history = History()
    read_log(lines, history)
    assert history.writes == [
        write(FIRST, 1, 3),
        Write("second", "new", "operator", 5, inf, "undone"),
        unsure(CHANGED, 4),
    ]
    assert history.reads == [Read(ALL, 2, 5, (FIRST,))]
    assert history.errors == {"read: StoreUnavailable": 1}
    assert history.filled == 4

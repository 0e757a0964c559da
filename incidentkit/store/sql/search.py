"""The statements of a search, built once for each shape and without a database.

A page is read in the order of an index, starting at a place. With several statuses or sources, each
pair of them is a branch that reads its own index, and the branches are merged: an index without the
filters would be read past every incident that does not match.

The incidents with a deduplication key are found by its index, to be counted and sorted.

Words are found in two ways, since a database cannot tell in advance how many messages contain them.
If many do, a scan of the first incidents in the order of the page finds enough. If few do, the
index of words returns all of them, to be counted and sorted.

Details are looked up for the incidents of a page, once it is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

from attrs import evolve, frozen
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Executable,
    String,
    TextClause,
    bindparam,
    func,
    literal_column,
    or_,
    select,
    true,
    tuple_,
    union_all,
)

from incidentkit.store.sql.rows import UtcDateTime
from incidentkit.store.sql.statements import DETAILS, INCIDENT, text_parameter
from incidentkit.store.sql.tables import incident_table

_columns = incident_table.c


@frozen
class WordsMatch:
    """The conditions for a message that has each phrase of the parameter ``phrases``.

    Attributes:
        by_index: The condition in the form that the index of words answers.
        of_first: The condition in the form for the few rows of ``first``.
        incidents: The approximate number of all incidents, found without counting them; negative if
            it is unknown.
    """

    by_index: TextClause
    of_first: TextClause
    incidents: TextClause


@frozen
class Shape:
    """The properties of a search that determine its statement.

    Attributes:
        statuses: Number of wanted statuses; 0: any status.
        sources: Number of wanted sources; 0: any source.
        oldest_first: Whether the oldest incidents come first.
        words_match: The conditions for words; None: any message.
        with_key: Whether it is for the incidents with one deduplication key.
        pairs: Whether the database looks up a pair of a time and an id in an index. SQLite looks up
            the time alone, and scans all incidents of that second.
        onward: Whether the page starts after an incident, not at a time. Without ``pairs``, the
            incidents of the same second are then a range of their own; the place must lie between
            the times.
        most: A constant limit that lets the database keep one plan for smaller limits; None: none.
        details: Whether the last column of a page has the details of each incident.
    """

    statuses: int
    sources: int
    oldest_first: bool
    words_match: WordsMatch | None
    with_key: bool = False
    pairs: bool = True
    onward: bool = False
    most: int | None = None
    details: bool = False


def _time(name: str) -> ColumnElement[Any]:
    return bindparam(name, type_=UtcDateTime())


def _id(name: str) -> ColumnElement[Any]:
    return bindparam(name, type_=BigInteger())


def _between(columns: Any, low: str = "low", high: str = "high") -> list[ColumnElement[bool]]:
    """Return the conditions for an incident between two places."""
    place = tuple_(columns.created_at, columns.incident_id)
    return [
        place > tuple_(_time(f"{low}_at"), _id(f"{low}_id")),
        place < tuple_(_time(f"{high}_at"), _id(f"{high}_id")),
    ]


def _ranges(shape: Shape) -> list[list[ColumnElement[bool]]]:
    """Return the conditions for an incident between two places, for each range to read."""
    if shape.pairs:
        return [_between(_columns)]
    at, low, high = _columns.created_at, _time("low_at"), _time("high_at")
    if not shape.onward:
        return [[at >= low, at < high]]
    if shape.oldest_first:
        return [[at == low, _columns.incident_id > _id("low_id")], [at > low, at < high]]
    return [[at == high, _columns.incident_id < _id("high_id")], [at >= low, at < high]]


def _has_status(number: int, columns: Any = _columns) -> ColumnElement[bool]:
    parameter = text_parameter(f"status_{number}", columns.incident_type)
    matches: ColumnElement[bool] = columns.incident_type == parameter
    return matches


def _has_source(number: int, columns: Any = _columns) -> ColumnElement[bool]:
    matches: ColumnElement[bool] = columns.source == text_parameter(
        f"source_{number}", columns.source
    )
    return matches


def _branches(shape: Shape) -> Iterator[list[ColumnElement[bool]]]:
    """Yield the conditions of each branch, one for each pair of a status and a source."""
    statuses, sources = range(shape.statuses or 1), range(shape.sources or 1)
    for status, source, conditions in product(statuses, sources, _ranges(shape)):
        filters = [_has_status(status)] if shape.statuses else []
        if shape.sources:
            filters.append(_has_source(source))
        yield [*conditions, *filters]


# The last column is the stored time; an incident shows it in whole seconds.
_FOUND = (*INCIDENT, _columns.created_at.label("stored_at"))


def _in_order(statement: Any, columns: Any, shape: Shape, limit: str) -> Any:
    keys = (columns.created_at, columns.incident_id)
    if not shape.oldest_first:
        keys = tuple(key.desc() for key in keys)
    statement = statement.order_by(*keys)
    if shape.most is not None and limit == "limit":
        # A constant limit lets PostgreSQL reuse one plan for every page.
        most = statement.limit(literal_column(str(shape.most))).subquery("most")
        return _in_order(select(*most.c), most.c, evolve(shape, most=None), limit)
    return statement.limit(_id(limit))


def _first(shape: Shape, limit: str) -> Any:
    """Return the statement for the first incidents in the order of a page, with any words."""
    branches = [
        _in_order(select(*_FOUND).where(*conditions), _columns, shape, limit)
        for conditions in _branches(shape)
    ]
    if len(branches) == 1:
        return branches[0]
    # SQLite allows an order and a limit only inside a subselect.
    merged = union_all(
        *(select(branch.subquery(f"branch_{number}")) for number, branch in enumerate(branches))
    ).subquery("found")
    return _in_order(select(*merged.c), merged.c, shape, limit)


def _with_details(statement: Any, shape: Shape) -> Executable:
    """Return the statement for a page, with the details in the last column if they are wanted."""
    page: Executable = statement
    if not shape.details:
        return page
    found = statement.subquery("detailed")
    keys = (found.c.created_at, found.c.incident_id)
    details: Executable = (
        select(*found.c, DETAILS)
        .select_from(found.outerjoin(incident_table, _columns.incident_id == found.c.incident_id))
        .order_by(*(keys if shape.oldest_first else (key.desc() for key in keys)))
    )
    return details


@cache
def select_page(shape: Shape) -> Executable:
    """Return the statement for a page without words."""
    return _with_details(_first(shape, "limit"), shape)


@cache
def select_page_among_first(shape: Shape) -> Executable:
    """Return the statement for incidents with the words among the first ``scan`` incidents.

    The column ``COUNT`` of each row is the approximate number of all incidents.
    """
    if shape.words_match is None:
        return select_page(shape)
    first = _first(evolve(shape, words_match=None), "scan").cte("first")
    incidents: Any = shape.words_match.incidents.columns(incidents=BigInteger()).scalar_subquery()
    statement = select(*first.c, incidents.label("incidents")).where(shape.words_match.of_first)
    return _with_details(_in_order(statement, first.c, shape, "limit"), shape)


def _found(shape: Shape) -> Any:
    """Return the incidents that the index of words, or that of deduplication keys, finds.

    The database is made to use the index first. Otherwise the order of a page, or an index of its
    filters, could lead it to look for a rare word or key in one incident after another.
    """
    found = select(*_FOUND)
    if shape.words_match is not None:
        found = found.where(shape.words_match.by_index)
    if not shape.with_key:
        return found.cte("found").prefix_with("MATERIALIZED", dialect="postgresql")
    found = found.where(_columns.dedup_key == bindparam("dedup_key", type_=String()))
    return found.cte("found").prefix_with("MATERIALIZED")


def _filters(shape: Shape, found: Any) -> list[ColumnElement[bool]]:
    """Return the conditions for an incident of any page."""
    conditions = []
    if shape.statuses:
        conditions.append(or_(*(_has_status(n, found.c) for n in range(shape.statuses))))
    if shape.sources:
        conditions.append(or_(*(_has_source(n, found.c) for n in range(shape.sources))))
    return conditions


def _page_found(shape: Shape, found: Any) -> Any:
    statement = select(*found.c).where(*_between(found.c), *_filters(shape, found))
    return _in_order(statement, found.c, shape, "limit")


@cache
def select_page_found(shape: Shape) -> Executable:
    """Return the statement for a page of the incidents that an index of words or of keys finds."""
    return _with_details(_page_found(shape, _found(shape)), shape)


@cache
def select_page_and_total_found(shape: Shape) -> Executable:
    """Return the same with the number of incidents of all pages, in the column ``COUNT``.

    All pages lie between the places ``from`` and ``until``. An empty page is one row, with the
    total alone.
    """
    found = _found(shape)
    everything = [*_between(found.c, "from", "until"), *_filters(shape, found)]
    total = select(func.count().label("total")).select_from(found).where(*everything).cte("counted")
    page = _page_found(shape, found).subquery("page")
    keys = (page.c.created_at, page.c.incident_id)
    statement = (
        select(*page.c, total.c.total)
        .select_from(total.outerjoin(page, true()))
        .order_by(*(keys if shape.oldest_first else (key.desc() for key in keys)))
    )
    return _with_details(statement, shape)


@cache
def count_found(shape: Shape) -> Executable:
    """Return the statement that counts the incidents of all pages without words."""
    total: ColumnElement[Any] = literal_column("0")
    for conditions in _branches(shape):
        count = select(func.count()).select_from(incident_table).where(*conditions)
        total = total + count.scalar_subquery()
    return select(total)

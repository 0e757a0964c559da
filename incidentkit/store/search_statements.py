"""The statements of a search, built once for each shape and without a database.

A page is read in the order of an index, from a place on. Where several statuses or sources are
asked for, each pair of them is a branch that reads its own index that far, and the branches are
merged: one index that is not filtered would be read past all that does not match.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any

from attrs import frozen
from sqlalchemy import (
    BigInteger,
    bindparam,
    func,
    literal_column,
    select,
    tuple_,
    union_all,
)

from incidentkit.store.statements import INCIDENT, text_parameter
from incidentkit.store.tables import UtcDateTime, incident_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import ColumnElement, Executable, TextClause

_columns = incident_table.c


@frozen
class Shape:
    """What makes the statement of one search differ from that of another.

    Attributes:
        statuses: How many statuses are asked for; 0 means any.
        sources: How many sources are asked for; 0 means any.
        oldest_first: Whether the order is that.
        text_match: What is true of a message that has the words; None means any message.
    """

    statuses: int
    sources: int
    oldest_first: bool
    text_match: TextClause | None


def _time(name: str) -> ColumnElement[Any]:
    return bindparam(name, type_=UtcDateTime())


def _id(name: str) -> ColumnElement[Any]:
    return bindparam(name, type_=BigInteger())


def _branches(shape: Shape) -> Iterator[list[ColumnElement[bool] | TextClause]]:
    """Yield, for each pair of a status and a source, what an incident of it is."""
    place = tuple_(_columns.created_at, _columns.incident_id)
    between: list[ColumnElement[bool] | TextClause] = [
        place > tuple_(_time("low_at"), _id("low_id")),
        place < tuple_(_time("high_at"), _id("high_id")),
    ]
    if shape.text_match is not None:
        between.append(shape.text_match)
    for status, source in product(range(shape.statuses or 1), range(shape.sources or 1)):
        conditions = list(between)
        if shape.statuses:
            parameter = text_parameter(f"status_{status}", _columns.incident_type)
            conditions.append(_columns.incident_type == parameter)
        if shape.sources:
            parameter = text_parameter(f"source_{source}", _columns.source)
            conditions.append(_columns.source == parameter)
        yield conditions


@cache
def select_found(shape: Shape) -> Executable:
    """Return the statement for a page: the columns of an incident, and its time as it is stored."""
    columns = (*INCIDENT, _columns.created_at.label("stored_at"))

    def ordered(statement: Any, at: ColumnElement[Any], id_: ColumnElement[Any]) -> Any:
        keys = (at, id_) if shape.oldest_first else (at.desc(), id_.desc())
        return statement.order_by(*keys).limit(_id("limit"))

    branches = [
        ordered(select(*columns).where(*conditions), _columns.created_at, _columns.incident_id)
        for conditions in _branches(shape)
    ]
    if len(branches) == 1:
        statement: Executable = branches[0]
        return statement
    # SQLite takes an order and a limit only inside a subselect.
    merged = union_all(
        *(select(branch.subquery(f"branch_{number}")) for number, branch in enumerate(branches))
    ).subquery("found")
    found: Executable = ordered(select(*merged.c), merged.c.created_at, merged.c.incident_id)
    return found


@cache
def count_found(shape: Shape) -> Executable:
    """Return the statement that counts the incidents of all pages."""
    counts = [
        select(func.count()).select_from(incident_table).where(*conditions).scalar_subquery()
        for conditions in _branches(shape)
    ]
    total: ColumnElement[Any] = literal_column("0")
    for count in counts:
        total = total + count
    return select(total)

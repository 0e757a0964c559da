"""The statements that both databases run, built once and without a database."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any, Final, Literal, TypeAlias, get_args

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Select,
    String,
    Table,
    Text,
    bindparam,
    cast,
    delete,
    func,
    literal_column,
    or_,
    select,
    true,
    tuple_,
    union_all,
    update,
)

from incidentkit.domain.queries import ListQuery
from incidentkit.domain.values import MAX_LIMIT
from incidentkit.store.sql.functions import a_day_ago, current_token, feed_horizon
from incidentkit.store.sql.rows import ENUMS, EVENT_COLUMNS, INCIDENT_COLUMNS, UtcDateTime
from incidentkit.store.sql.tables import (
    idempotency_table,
    incident_event_table,
    incident_table,
    purged_event_table,
)

_columns = incident_table.c
_events = incident_event_table.c
_places = purged_event_table.c
_keys = idempotency_table.c


def text_parameter(name: str, target: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return a parameter for an enum column, sent as text."""
    return cast(bindparam(name, type_=String()), target.type)


def number_parameter(name: str) -> ColumnElement[Any]:
    """Return a parameter for an integer of 64 bits."""
    return bindparam(name, type_=BigInteger())


def _as_read(name: str) -> ColumnElement[Any]:
    return cast(_columns[name], Text).label(name) if name in ENUMS else _columns[name]


INCIDENT: Final = tuple(_as_read(name) for name in INCIDENT_COLUMNS)
"""The columns of an incident, for a list of columns to select or return."""

DETAILS: Final = cast(_columns.details, Text).label("details")
"""The details of an incident, which travel as text."""

DETAILED: Final = (*INCIDENT, DETAILS)
"""The columns of an incident with its details."""

EVENT: Final = tuple(_events[name] for name in EVENT_COLUMNS)
"""The columns of an event, for a list of columns to select or return."""

SELECT_INCIDENT: Final = select(*DETAILED).where(
    _columns.incident_id == number_parameter("incident_id")
)
"""Returns one incident with its details, by its id."""

SELECT_HISTORY: Final = (
    select(*EVENT)
    .where(
        _events.incident_id == number_parameter("incident_id"),
        _events.event_id > number_parameter("event_id"),
    )
    .order_by(_events.event_id)
    .limit(number_parameter("limit"))
)
"""Returns events of an incident after one of them, oldest first."""

SELECT_CHANGES: Final = (
    select(*EVENT)
    .where(
        tuple_(_events.transaction_id, _events.event_id)
        > tuple_(number_parameter("transaction_id"), number_parameter("event_id")),
        _events.transaction_id < feed_horizon(),
    )
    .order_by(_events.transaction_id, _events.event_id)
    .limit(number_parameter("limit"))
)
"""Returns the events after a place, up to the place where the order is final."""

SELECT_CHANGES_BY_ID: Final = (
    select(*EVENT)
    .where(_events.event_id > number_parameter("event_id"))
    .order_by(_events.event_id)
    .limit(number_parameter("limit"))
)
"""The same for a database with one writer at a time, where ids are in the order of commits."""

SELECT_LATEST_CHANGE: Final = (
    select(*EVENT)
    .where(_events.transaction_id < feed_horizon())
    .order_by(_events.transaction_id.desc(), _events.event_id.desc())
    .limit(literal_column("1"))
)
"""Returns the last event whose place is final."""

SELECT_WAITING: Final = (
    select(_events.transaction_id, _events.event_id, _events.nonce)
    .where(
        tuple_(_events.transaction_id, _events.event_id)
        > tuple_(number_parameter("transaction_id"), number_parameter("event_id"))
    )
    .order_by(_events.transaction_id, _events.event_id)
    .limit(number_parameter("limit"))
)
"""Returns place and nonce of the events after a place that are committed, even if others may still
come before them."""


def _select_place(events: Table) -> Select[*tuple[Any, ...]]:
    statement: Select[*tuple[Any, ...]] = select(events.c.transaction_id, events.c.event_id)
    return statement.where(
        events.c.event_id == number_parameter("event_id"),
        events.c.nonce == number_parameter("nonce"),
    )


SELECT_PLACE: Final = union_all(
    _select_place(incident_event_table), _select_place(purged_event_table)
)
"""Returns the place of an event, also after it was purged with its incident."""

DELETE_OLD_PLACES: Final = delete(purged_event_table).where(
    _places.event_id.in_(
        select(_places.event_id)
        .where(_places.purged_at < bindparam("purged_before", type_=UtcDateTime()))
        .order_by(_places.purged_at)
        .limit(number_parameter("limit"))
    )
)
"""Removes the places of events that were purged long ago."""

NEAR: Final = 200
"""Maximum ``offset + limit`` of a page that is read with one plan for all near pages."""

PageKind: TypeAlias = Literal["any", "near", "deep", "onward"]
"""How a page is read:

- ``any``: by a statement that suits every page;
- ``near``: by a statement whose plan PostgreSQL keeps for every page near the top;
- ``deep``: ids from the index first, then their rows;
- ``onward``: the same, starting from an incident that is known to come before the page.
"""


def _select_page(*, by_status: bool, by_source: bool, kind: PageKind) -> Select[*tuple[Any, ...]]:
    deep = kind in ("deep", "onward")
    statement: Select[*tuple[Any, ...]] = select(*((_columns.incident_id,) if deep else INCIDENT))
    if by_status:
        statement = statement.where(
            _columns.incident_type == text_parameter("status", _columns.incident_type)
        )
    if by_source:
        statement = statement.where(_columns.source == text_parameter("source", _columns.source))
    if kind == "onward":
        start = incident_table.alias("start")
        start_id = number_parameter("start_id")
        # With another token there is no start, so that the scan ends at once.
        start_at = select(start.c.created_at).where(
            start.c.incident_id == start_id,
            current_token() == bindparam("start_token", type_=Text()),
        )
        statement = statement.where(
            tuple_(_columns.created_at, _columns.incident_id)
            <= tuple_(start_at.scalar_subquery(), start_id)
        )
    statement = statement.order_by(_columns.created_at.desc(), _columns.incident_id.desc())
    if kind == "near":
        # A constant limit lets PostgreSQL reuse one plan for every page that is not deep.
        first = statement.limit(literal_column(str(NEAR))).subquery("first")
        statement = select(*first.c).order_by(first.c.created_at.desc(), first.c.incident_id.desc())
    page = (
        statement.limit(number_parameter("limit"))
        .offset(number_parameter("offset"))
        .subquery("page")
    )
    if deep:
        # Skipped incidents are read from the index alone. The constant limit tells the planner
        # that few rows are looked up afterwards.
        ids = select(page.c.incident_id).limit(literal_column(str(MAX_LIMIT))).subquery("ids")
        found = _columns.incident_id == ids.c.incident_id
        page = select(*INCIDENT).join(ids, found).subquery("deep_page")
    token = select(current_token().label("token")).subquery("current")
    # One statement has one snapshot at every isolation level.
    return (
        select(*page.c, token.c.token)
        .select_from(token.outerjoin(page, true()))
        .order_by(page.c.created_at.desc(), page.c.incident_id.desc())
    )


SELECT_PAGE: Final = {
    (by_status, by_source, kind): _select_page(by_status=by_status, by_source=by_source, kind=kind)
    for by_status, by_source in product((False, True), repeat=2)
    for kind in get_args(PageKind)
}
"""Returns a page and its token; by whether it filters by status and by source, and by the kind. An
empty page is one row, with the token alone."""


def page_statement(query: ListQuery, kind: PageKind) -> Select[*tuple[Any, ...]]:
    """Return the statement for a page."""
    return SELECT_PAGE[query.status is not None, query.source is not None, kind]


def page_values(query: ListQuery) -> Mapping[str, Any]:
    """Return the values of the statement for a page."""
    return {
        "status": query.status and query.status.value,
        "source": query.source and query.source.value,
        "limit": query.limit,
        "offset": query.offset,
    }


SELECT_TOKEN: Final = select(current_token().label("token"))
"""Returns the token of the incidents."""

COUNT_PURGEABLE: Final = select(func.count()).where(
    _columns.ended_at < bindparam("ended_before", type_=UtcDateTime()),
    _columns.incident_type != literal_column("'new'"),
)
"""Returns the number of incidents that ended before a time."""

SELECT_ANSWER: Final = select(
    _keys.idempotency_key, _keys.fingerprint, _keys.answer, _keys.actor
).where(
    or_(
        _keys.idempotency_key == bindparam("idempotency_key", type_=String()),
        _keys.idempotency_key == bindparam("own_key", type_=String()),
    ),
    _keys.created_at >= a_day_ago(),
)
"""Returns an idempotency key and that of one actor, each with its first answer if it was used in
the last 24 hours."""

UPDATE_ANSWER: Final = (
    update(idempotency_table)
    .where(_keys.idempotency_key == bindparam("key", type_=String()))
    .values(answer=bindparam("answer", type_=String()))
    .returning(_keys.idempotency_key)
)
"""Stores the first answer of an idempotency key, and returns a row."""

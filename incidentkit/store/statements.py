"""The statements that both databases take, built once and without a database.

A status and a source travel as text, so that asyncpg has no need to look up the enum types.
"""

from __future__ import annotations

import struct
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

from sqlalchemy import (
    BigInteger,
    Text,
    bindparam,
    cast,
    column,
    delete,
    func,
    literal_column,
    select,
    table,
    true,
    tuple_,
    union_all,
    update,
)
from sqlalchemy import String as _String

from incidentkit.domain.cursor import encode_cursor
from incidentkit.domain.errors import StoreError
from incidentkit.domain.values import (
    MAX_LIMIT,
    EventKind,
    Incident,
    IncidentEvent,
    IncidentSource,
    IncidentStatus,
)
from incidentkit.store.base import Page
from incidentkit.store.tables import (
    VERSION_TABLE,
    UtcDateTime,
    current_token,
    feed_horizon,
    idempotency_table,
    incident_event_table,
    incident_table,
    purged_event_table,
)
from incidentkit.wire import encode_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sqlalchemy import ColumnElement, Select, Table

_columns = incident_table.c


def text_parameter(name: str, target: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return a parameter for a column of an enum, which travels as text."""
    return cast(bindparam(name, type_=_String()), target.type)


INCIDENT: Final = (
    _columns.incident_id,
    _columns.incident_message,
    cast(_columns.incident_type, Text).label("incident_type"),
    cast(_columns.source, Text).label("source"),
    _columns.created_at,
    _columns.version,
    _columns.dedup_key,
    _columns.occurrences,
    _columns.last_seen_at,
    _columns.ended_at,
)

EVENT: Final = tuple(
    incident_event_table.c[name]
    for name in (
        "transaction_id",
        "event_id",
        "nonce",
        "incident_id",
        "kind",
        "from_status",
        "to_status",
        "actor",
        "note",
        "at",
    )
)


_STATUSES: Final = {status.value: status for status in IncidentStatus}
_SOURCES: Final = {source.value: source for source in IncidentSource}


def read_incident(row: Iterable[Any]) -> Incident:
    """Return the incident that a row of any of these statements is.

    Raises:
        StoreError: If no incident can be like that: the schema is not the one that we work on.
    """
    try:
        incident_id, message, status, source, created_at, *counts, last_seen_at, ended_at = row
        version, dedup_key, occurrences = counts
        return Incident(
            incident_id,
            message,
            _STATUSES[status],
            _SOURCES[source],
            created_at,
            version,
            dedup_key,
            occurrences,
            created_at if last_seen_at is None else last_seen_at,
            ended_at,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreError("a row holds what no incident can have") from error


def read_event(row: Iterable[Any]) -> IncidentEvent:
    """Return the event that a row of any of these statements is.

    Raises:
        StoreError: If no event can be like that: the schema is not the one that we work on.
    """
    try:
        transaction_id, event_id, nonce, incident_id, kind, from_status, to_status, *others = row
        return IncidentEvent(
            encode_cursor(transaction_id, event_id, nonce, incident_id),
            incident_id,
            EventKind(kind),
            None if from_status is None else IncidentStatus(from_status),
            None if to_status is None else IncidentStatus(to_status),
            *others,
        )
    except (AttributeError, TypeError, ValueError, struct.error) as error:
        raise StoreError("a row holds what no event can have") from error


def read_page(rows: Sequence[Any]) -> Page:
    """Return the page that the rows of a statement for one are.

    The token stands behind the incident in each row; that of an empty page has nothing else.

    Raises:
        StoreError: When it is asked for its incidents, if one of them cannot be like that.
    """
    width = len(INCIDENT)
    return Page(partial(_read_incidents, rows), rows[0][width], partial(_encode_rows, rows))


def _encode_rows(rows: Sequence[Any]) -> bytes:
    width = len(INCIDENT)
    try:
        return encode_rows(row[:width] for row in rows if row[0] is not None)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError("a row holds what no incident can have") from error


def _read_incidents(rows: Sequence[Any]) -> list[Incident]:
    width = len(INCIDENT)
    return [read_incident(row[:width]) for row in rows if row[0] is not None]


SELECT_INCIDENT: Final = select(*INCIDENT).where(
    _columns.incident_id == bindparam("incident_id", type_=BigInteger())
)

SELECT_HISTORY: Final = (
    select(*EVENT)
    .where(
        incident_event_table.c.incident_id == bindparam("incident_id", type_=BigInteger()),
        incident_event_table.c.event_id > bindparam("event_id", type_=BigInteger()),
    )
    .order_by(incident_event_table.c.event_id)
    .limit(bindparam("limit", type_=BigInteger()))
)

SELECT_CHANGES: Final = (
    select(*EVENT)
    .where(
        tuple_(incident_event_table.c.transaction_id, incident_event_table.c.event_id)
        > tuple_(
            bindparam("transaction_id", type_=BigInteger()),
            bindparam("event_id", type_=BigInteger()),
        ),
        incident_event_table.c.transaction_id < feed_horizon(),
    )
    .order_by(incident_event_table.c.transaction_id, incident_event_table.c.event_id)
    .limit(bindparam("limit", type_=BigInteger()))
)
"""What comes after a place in the order of events, as far as that is final."""

SELECT_CHANGES_BY_ID: Final = (
    select(*EVENT)
    .where(incident_event_table.c.event_id > bindparam("event_id", type_=BigInteger()))
    .order_by(incident_event_table.c.event_id)
    .limit(bindparam("limit", type_=BigInteger()))
)
"""The same where there is one writer at a time, so that the ids are in that order."""

SELECT_LATEST_CHANGE: Final = (
    select(*EVENT)
    .where(incident_event_table.c.transaction_id < feed_horizon())
    .order_by(incident_event_table.c.transaction_id.desc(), incident_event_table.c.event_id.desc())
    .limit(literal_column("1"))
)


def _select_place(events: Table) -> Select[*tuple[Any, ...]]:
    statement: Select[*tuple[Any, ...]] = select(events.c.transaction_id, events.c.event_id)
    return statement.where(
        events.c.event_id == bindparam("event_id", type_=BigInteger()),
        events.c.nonce == bindparam("nonce", type_=BigInteger()),
    )


SELECT_PLACE: Final = union_all(
    _select_place(incident_event_table), _select_place(purged_event_table)
)
"""Where an event is, or was before it went with its incident."""

DELETE_OLD_PLACES: Final = delete(purged_event_table).where(
    purged_event_table.c.event_id.in_(
        select(purged_event_table.c.event_id)
        .where(purged_event_table.c.purged_at < bindparam("purged_before", type_=UtcDateTime()))
        .order_by(purged_event_table.c.purged_at)
        .limit(bindparam("limit", type_=BigInteger()))
    )
)


NEAR: Final = 200
"""Incidents from which a page comes that is near."""

DEEP: Final = 1000
"""Incidents from which a page comes that is not deep."""

PageKind: TypeAlias = Literal["any", "near", "deep", "onward"]
"""How a page is read: in the one way that does for any, in the best one for where it lies, or from
an incident on that is known to come before it."""


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
        start_id = bindparam("start_id", type_=BigInteger())
        # With another token there is no start, and so nothing to pass over in vain.
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
        # The constant tells the planner that the same plan will do for all pages that are not deep.
        first = statement.limit(literal_column(str(NEAR))).subquery("first")
        statement = select(*first.c).order_by(first.c.created_at.desc(), first.c.incident_id.desc())
    page = (
        statement.limit(bindparam("limit", type_=BigInteger()))
        .offset(bindparam("offset", type_=BigInteger()))
        .subquery("page")
    )
    if deep:
        # What is passed over is read from the index alone. The constant tells the planner that few
        # are looked up then.
        ids = select(page.c.incident_id).limit(literal_column(str(MAX_LIMIT))).subquery("ids")
        found = _columns.incident_id == ids.c.incident_id
        page = select(*INCIDENT).join(ids, found).subquery("deep_page")
    token = select(current_token().label("token")).subquery("current")
    # One statement has one snapshot, whatever the level of isolation.
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
"""The statement for a page and its token, by whether it filters by status and by source. An empty
page is one row, with the token alone."""

SELECT_TOKEN: Final = select(current_token().label("token"))

COUNT_PURGEABLE: Final = select(func.count()).where(
    _columns.ended_at < bindparam("ended_before", type_=UtcDateTime())
)

SELECT_ANSWER: Final = select(idempotency_table.c.fingerprint, idempotency_table.c.answer).where(
    idempotency_table.c.idempotency_key == bindparam("idempotency_key", type_=_String())
)

UPDATE_ANSWER: Final = (
    update(idempotency_table)
    .where(idempotency_table.c.idempotency_key == bindparam("key", type_=_String()))
    .values(answer=bindparam("answer", type_=_String()))
)

SELECT_REVISION: Final = select(column("version_num", _String())).select_from(
    table(VERSION_TABLE, column("version_num"))
)

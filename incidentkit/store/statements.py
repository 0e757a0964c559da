"""Every statement that incidentkit runs on its tables, built once and without a database.

A status and a source travel as text, so that asyncpg has no need to look up the enum types.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import (
    BigInteger,
    Text,
    bindparam,
    cast,
    column,
    insert,
    select,
    table,
    true,
    update,
)
from sqlalchemy import String as _String

from incidentkit.errors import StoreError
from incidentkit.models import Incident, IncidentSource, IncidentStatus
from incidentkit.store.base import Page
from incidentkit.store.tables import (
    VERSION_TABLE,
    current_token,
    incident_table,
    request_log_table,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sqlalchemy import ColumnElement, Insert, Select

_columns = incident_table.c


def _text_parameter(name: str, target: ColumnElement[Any]) -> ColumnElement[Any]:
    return cast(bindparam(name, type_=_String()), target.type)


_INCIDENT: Final = (
    _columns.incident_id,
    _columns.incident_message,
    cast(_columns.incident_type, Text).label("incident_type"),
    cast(_columns.source, Text).label("source"),
    _columns.created_at,
)


def read_incident(row: Iterable[Any]) -> Incident:
    """Return the incident that a row of any of these statements is.

    Raises:
        StoreError: If no incident can be like that: the schema is not the one that we work on.
    """
    try:
        incident_id, message, incident_type, source, created_at = row
        return Incident(
            incident_id, message, IncidentStatus(incident_type), IncidentSource(source), created_at
        )
    except (AttributeError, ValueError) as error:
        raise StoreError("a row holds what no incident can have") from error


def read_page(rows: Sequence[Any]) -> Page:
    """Return the page that the rows of a statement in ``SELECT_PAGE`` are.

    Raises:
        StoreError: If an incident cannot be like that.
    """
    # An empty page is one row, with the token alone.
    return Page([read_incident(row[1:]) for row in rows if row[1] is not None], rows[0][0])


INSERT_INCIDENT: Final = (
    insert(incident_table)
    .values(
        incident_message=bindparam("incident_message", type_=_String()),
        incident_type=_text_parameter("incident_type", _columns.incident_type),
        source=_text_parameter("source", _columns.source),
    )
    .returning(*_INCIDENT)
)

SELECT_INCIDENT: Final = select(*_INCIDENT).where(
    _columns.incident_id == bindparam("incident_id", type_=BigInteger())
)

UPDATE_STATUS: Final = (
    update(incident_table)
    .where(_columns.incident_id == bindparam("id", type_=BigInteger()))
    .values(incident_type=_text_parameter("status", _columns.incident_type))
    .returning(*_INCIDENT)
)


def _select_page(*, by_status: bool, by_source: bool) -> Select[*tuple[Any, ...]]:
    statement: Select[*tuple[Any, ...]] = select(*_INCIDENT)
    if by_status:
        statement = statement.where(
            _columns.incident_type == _text_parameter("status", _columns.incident_type)
        )
    if by_source:
        statement = statement.where(_columns.source == _text_parameter("source", _columns.source))
    page = (
        statement.order_by(_columns.created_at.desc(), _columns.incident_id.desc())
        .limit(bindparam("limit", type_=BigInteger()))
        .offset(bindparam("offset", type_=BigInteger()))
        .subquery("page")
    )
    token = select(current_token().label("token")).subquery("current")
    # One statement has one snapshot, whatever the level of isolation.
    return (
        select(token.c.token, *page.c)
        .select_from(token.outerjoin(page, true()))
        .order_by(page.c.created_at.desc(), page.c.incident_id.desc())
    )


SELECT_PAGE: Final = {
    (by_status, by_source): _select_page(by_status=by_status, by_source=by_source)
    for by_status, by_source in product((False, True), repeat=2)
}
"""The statement for a page and its token, by whether it filters by status and by source."""

SELECT_TOKEN: Final = select(current_token().label("token"))

INSERT_REQUEST_LOG: Final[Insert] = (
    insert(request_log_table)
    .inline()
    .values(
        {
            name: bindparam(name, type_=request_log_table.c[name].type)
            for name in ("logged_at", "method", "route", "status", "duration_ms", "request_id")
        }
    )
)

SELECT_REVISION: Final = select(column("version_num", _String())).select_from(
    table(VERSION_TABLE, column("version_num"))
)

"""The table ``request_log``: one row for each answered HTTP request."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from attrs import fields, frozen
from sqlalchemy import Insert, bindparam, insert

from incidentkit.store.sql.tables import request_log_table


@frozen
class RequestRecord:
    """One answered HTTP request.

    Attributes:
        logged_at: When it was answered, aware.
        method: The HTTP method; ``(other)`` for a method that HTTP does not define.
        route: The path's template, such as ``/incident/get/{incident_id}``; ``(none)`` if no
            route answered.
        status: The HTTP status of the answer.
        duration_ms: From the start of the route to its answer, in milliseconds.
        request_id: The id in the answer's header ``X-Request-ID``.
        actor: The actor of the request; None: there is none.
        client_address: The client's IP address; None: it is unknown.
    """

    logged_at: datetime
    method: str
    route: str
    status: int
    duration_ms: float
    request_id: str
    actor: str | None = None
    client_address: str | None = None


INSERT_REQUEST: Final[Insert] = (
    insert(request_log_table)
    .inline()
    .values(
        {
            field.name: bindparam(field.name, type_=request_log_table.c[field.name].type)
            for field in fields(RequestRecord)
        }
    )
)
"""Inserts the row of one request."""

"""Answer errors with problem details (RFC 9457) that reveal no internals."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

from attrs import define, field, frozen
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from incidentkit.domain.errors import (
    ClientClosed,
    FieldError,
    IncidentConflict,
    IncidentNotFound,
    InvalidIncident,
    SchemaOutOfDate,
    StoreUnavailable,
    UnknownCursor,
    VersionConflict,
)
from incidentkit.domain.values import Incident
from incidentkit.http.request_id import request_id
from incidentkit.wire import dump_json, wire_converter

logger = logging.getLogger("incidentkit.http")

MEDIA_TYPE: Final = "application/problem+json"

RETRY_AFTER: Final = 5
"""Seconds that a client is asked to wait before it tries again."""

RETRY_HEADERS: Final[Mapping[str, str]] = {"Retry-After": str(RETRY_AFTER)}

TITLES: Final[Mapping[int, str]] = {
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    410: "Gone",
    412: "Precondition Failed",
    413: "Content Too Large",
    414: "URI Too Long",
    415: "Unsupported Media Type",
    421: "Misdirected Request",
    422: "Unprocessable Content",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}
"""The names by RFC 9110: those in ``http.HTTPStatus`` differ between versions of Python."""


@frozen
class Problem:
    """The content of an answer with an error.

    Attributes:
        type: Always ``about:blank``: the status is the kind of problem.
        title: The name of the status.
        status: The HTTP status.
        detail: What is wrong, in a sentence for people.
        request_id: The id in the answer's ``X-Request-ID``.
        errors: Every faulty field or parameter with its reason; empty if the fault lies elsewhere.
    """

    type: str
    title: str
    status: int
    detail: str
    request_id: str
    errors: tuple[FieldError, ...]


@frozen
class Conflict:
    """The incident that does not allow a change.

    Attributes:
        incident: Its current state.
    """

    incident: Incident


@define
class Refusal(Exception):
    """A request is refused, with this problem.

    Attributes:
        status: The HTTP status.
        detail: What is wrong, in a sentence for people.
        errors: Every faulty field or parameter.
        headers: Additional headers of the answer.
        members: Additional members of the problem.
    """

    status: int
    detail: str
    errors: tuple[FieldError, ...] = ()
    headers: Mapping[str, str] = field(factory=dict)
    members: Mapping[str, object] = field(factory=dict)


def problem_response(request: Request, error: Exception) -> Response:
    """Return the answer to an error, and log the error if it is the server's fault."""
    id_ = request_id(request.scope)
    refusal = refusal_for(error)
    match error:
        case SchemaOutOfDate() | StoreUnavailable() | ClientClosed():
            logger.warning("%s", error, extra={"request_id": id_})
        case _ if refusal.status == HTTPStatus.INTERNAL_SERVER_ERROR:
            logger.error("A request failed", exc_info=error, extra={"request_id": id_})
    problem = Problem(
        type="about:blank",
        title=TITLES.get(refusal.status) or HTTPStatus(refusal.status).phrase,
        status=refusal.status,
        detail=refusal.detail,
        request_id=id_,
        errors=refusal.errors,
    )
    return Response(
        dump_json({**wire_converter().unstructure(problem), **refusal.members}),
        refusal.status,
        refusal.headers,
        MEDIA_TYPE,
    )


def refusal_for(error: Exception) -> Refusal:
    """Return the refusal that reports an error to the client."""
    match error:
        case Refusal():
            refusal = error
        case InvalidIncident():
            detail = "; ".join(f"{fault.field} {fault.reason}" for fault in error.errors)
            refusal = Refusal(422, detail, error.errors)
        case IncidentNotFound() | UnknownCursor():
            gone = isinstance(error, UnknownCursor)
            refusal = Refusal(410, str(error)) if gone else Refusal(404, "Incident not found")
        case IncidentConflict():
            refusal = _refusal_for_conflict(error)
        case ClientDisconnect():
            refusal = Refusal(400, "The connection was closed before the request was complete")
        case SchemaOutOfDate() | StoreUnavailable():
            detail = "The database is unavailable, or its schema does not match the service"
            refusal = Refusal(503, detail, headers=RETRY_HEADERS)
        case ClientClosed():
            detail = "The service is not open: it is still starting, or already shutting down"
            refusal = Refusal(503, detail, headers=RETRY_HEADERS)
        case HTTPException(status_code=404):
            refusal = Refusal(404, "There is nothing at this path")
        case HTTPException(status_code=405, headers={"Allow": str(methods)}):
            methods = ", ".join(sorted(methods.split(", ")))
            refusal = Refusal(405, f"This path accepts only {methods}", headers={"Allow": methods})
        case _:
            refusal = Refusal(500, "The server failed to answer the request")
    return refusal


def etag(incident: Incident) -> str:
    """Return the entity tag of an incident."""
    return f'"{incident.tag}"'


def _refusal_for_conflict(error: IncidentConflict) -> Refusal:
    return Refusal(
        412 if isinstance(error, VersionConflict) else 409,
        str(error),
        headers={"ETag": etag(error.incident)},
        members=wire_converter().unstructure(Conflict(error.incident)),
    )

"""Errors as answers: problem details by RFC 9457, which say what is wrong and nothing more."""

from __future__ import annotations

import logging
from collections.abc import Mapping  # noqa: TC003
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from attrs import define, field, frozen
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
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
from incidentkit.domain.values import Incident  # noqa: TC001
from incidentkit.http.request_id import request_id
from incidentkit.wire import dump_json, wire_converter

if TYPE_CHECKING:
    from starlette.requests import Request

logger = logging.getLogger("incidentkit.http")

MEDIA_TYPE: Final = "application/problem+json"

RETRY_AFTER: Final = 5
"""Seconds after which a client is told to try again."""

RETRY_HEADERS: Final[Mapping[str, str]] = {"Retry-After": str(RETRY_AFTER)}

TITLES: Final[Mapping[int, str]] = {
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    410: "Gone",
    412: "Precondition Failed",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    422: "Unprocessable Content",
    500: "Internal Server Error",
    503: "Service Unavailable",
}
"""RFC 9110's names, which Python's own follow only from version to version."""


@frozen
class Problem:
    """What an answer with an error carries.

    Attributes:
        type: Always ``about:blank``: the status says what kind of problem it is.
        title: The name of the status.
        status: The HTTP status.
        detail: What is wrong, in a sentence for people.
        request_id: The id that the answer carries in ``X-Request-ID``.
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
    """What stands in the way of a change.

    Attributes:
        incident: The incident as it is.
    """

    incident: Incident


@define
class Refusal(Exception):
    """An answer that is an error.

    Attributes:
        status: The HTTP status.
        detail: What is wrong, in a sentence for people.
        errors: Every faulty field or parameter.
        headers: What the answer's head carries besides.
        members: What the problem carries besides.
    """

    status: int
    detail: str
    errors: tuple[FieldError, ...] = ()
    headers: Mapping[str, str] = field(factory=dict)
    members: Mapping[str, object] = field(factory=dict)


def problem_response(request: Request, error: Exception) -> Response:
    """Return the answer for an error, and log it if it is the server's fault."""
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
    """Return what a client is told of an error."""
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
            detail = "The database is unavailable, or its schema is not the one that is needed"
            refusal = Refusal(503, detail, headers=RETRY_HEADERS)
        case ClientClosed():
            detail = "The service is not open: it has not started, or is shutting down"
            refusal = Refusal(503, detail, headers=RETRY_HEADERS)
        case HTTPException(status_code=404):
            refusal = Refusal(404, "There is nothing at this path")
        case HTTPException(status_code=405, headers={"Allow": str(methods)}):
            methods = ", ".join(sorted(methods.split(", ")))
            refusal = Refusal(405, f"This path takes only {methods}", headers={"Allow": methods})
        case _:
            refusal = Refusal(500, "The server failed to answer the request")
    return refusal


def etag(incident: Incident) -> str:
    """Return the entity tag of an incident: its version."""
    return f'"{incident.version}"'


def _refusal_for_conflict(error: IncidentConflict) -> Refusal:
    return Refusal(
        412 if isinstance(error, VersionConflict) else 409,
        str(error),
        headers={"ETag": etag(error.incident)},
        members=wire_converter().unstructure(Conflict(error.incident)),
    )

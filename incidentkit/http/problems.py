"""Answer errors with problem details (RFC 9457) that reveal no internals."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Final
from urllib.parse import quote

from attrs import define, field, frozen
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Scope

from incidentkit.domain.errors import (
    ClientClosed,
    FieldError,
    IncidentConflict,
    IncidentNotFound,
    InvalidIncident,
    SchemaOutOfDate,
    StoreUnavailable,
    UnknownCursor,
)
from incidentkit.domain.values import Incident
from incidentkit.http.request_id import request_id
from incidentkit.wire import dump_json, wire_converter
from incidentkit.wire.kinds import Kind, kind_of

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

PAGE: Final = "/docs/problems"
"""The path of the page that describes every kind; the type of a problem is an anchor on it."""


@frozen
class Problem:
    """The content of an answer with an error.

    Attributes:
        type: A reference to the description of the kind of problem, on a page of the service.
        title: The kind of problem in words.
        status: The HTTP status.
        detail: What is wrong, in a sentence for people.
        code: The kind of problem, for programs.
        request_id: The id in the answer's ``X-Request-ID``.
        errors: Every faulty field or parameter with its reason; empty if the fault lies elsewhere.
    """

    type: str
    title: str
    status: int
    detail: str
    code: str
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
        kind: The kind of problem.
        detail: What is wrong, in a sentence for people.
        errors: Every faulty field or parameter.
        headers: Additional headers of the answer.
        members: Additional members of the problem.
    """

    kind: Kind
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
        case _ if refusal.kind.status == HTTPStatus.INTERNAL_SERVER_ERROR:
            logger.error("A request failed", exc_info=error, extra={"request_id": id_})
    problem = problem_for(refusal, request.scope)
    return Response(
        dump_json({**wire_converter().unstructure(problem), **refusal.members}),
        refusal.kind.status,
        refusal.headers,
        MEDIA_TYPE,
    )


def problem_for(refusal: Refusal, scope: Scope) -> Problem:
    """Return the problem of a refusal, for a request."""
    kind = refusal.kind
    return Problem(
        type=f"{quote(scope.get('root_path', ''))}{PAGE}#{kind.anchor}",
        title=kind.title,
        status=kind.status,
        detail=refusal.detail,
        code=kind.code,
        request_id=request_id(scope),
        errors=refusal.errors,
    )


def refusal_for(error: Exception) -> Refusal:
    """Return the refusal that reports an error to the client."""
    kind = kind_of(error)
    match error:
        case Refusal():
            refusal = error
        case InvalidIncident():
            detail = "; ".join(f"{fault.field} {fault.reason}" for fault in error.errors)
            refusal = Refusal(kind, detail, error.errors)
        case IncidentNotFound():
            refusal = Refusal(kind, "Incident not found")
        case IncidentConflict():
            headers = {"ETag": etag(error.incident)}
            members = wire_converter().unstructure(Conflict(error.incident))
            refusal = Refusal(kind, str(error), headers=headers, members=members)
        case UnknownCursor():
            refusal = Refusal(kind, str(error))
        case SchemaOutOfDate() | StoreUnavailable():
            detail = "The database is unavailable, or its schema does not match the service"
            refusal = Refusal(kind, detail, headers=RETRY_HEADERS)
        case ClientClosed():
            detail = "The service is not open: it is still starting, or already shutting down"
            refusal = Refusal(kind, detail, headers=RETRY_HEADERS)
        case _:
            refusal = _refusal_for_starlette(error)
    return refusal


def _refusal_for_starlette(error: Exception) -> Refusal:
    """Return the refusal that reports an error of Starlette, or one that nothing expects."""
    match error:
        case ClientDisconnect():
            detail = "The connection was closed before the request was complete"
            return Refusal(Kind.INCOMPLETE_REQUEST, detail)
        case HTTPException(status_code=404):
            return Refusal(Kind.UNKNOWN_PATH, "There is nothing at this path")
        case HTTPException(status_code=405, headers={"Allow": str(methods)}):
            methods = ", ".join(sorted(methods.split(", ")))
            detail = f"This path accepts only {methods}"
            return Refusal(Kind.METHOD_NOT_ALLOWED, detail, headers={"Allow": methods})
    return Refusal(kind_of(error), "The server failed to answer the request")


def etag(incident: Incident) -> str:
    """Return the entity tag of an incident."""
    return f'"{incident.tag}"'

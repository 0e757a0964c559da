"""Answer errors with problem details (RFC 9457) that reveal no internals."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from enum import Enum, unique
from functools import cached_property
from http import HTTPStatus
from typing import Final
from urllib.parse import quote

from attrs import define, field, frozen
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Scope

from incidentkit.domain.errors import (
    CacheUnavailable,
    ClientClosed,
    DuplicateOpenIncident,
    FieldError,
    IdempotencyKeyReused,
    IllegalTransition,
    IncidentConflict,
    IncidentKitError,
    IncidentNotFound,
    InvalidIncident,
    InvalidSettings,
    MissingDependency,
    NotInTransaction,
    PartlyStored,
    SchemaOutOfDate,
    StoreError,
    StoreUnavailable,
    TokenNotFound,
    UnknownCursor,
    VersionConflict,
    WrongEventLoop,
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

PAGE: Final = "/docs/problems"
"""The path of the page that describes every kind; the type of a problem is an anchor on it."""


@unique
class Kind(Enum):
    """The kinds of problems: the status of each, when it occurs, and the error that it reports.

    The code of a kind is its name in lower case. It never changes; new kinds may be added.
    """

    INVALID_INCIDENT = 422, "a field, a parameter or a header breaks a rule", InvalidIncident
    IDEMPOTENCY_KEY_REUSED = (
        422,
        "the idempotency key was used with other parameters",
        IdempotencyKeyReused,
    )
    INCIDENT_NOT_FOUND = 404, "no incident has this id", IncidentNotFound
    INCIDENT_CONFLICT = 409, "the incident does not allow the change", IncidentConflict
    VERSION_CONFLICT = 412, "the incident has another version than expected", VersionConflict
    ILLEGAL_TRANSITION = 409, "the status graph does not allow the change", IllegalTransition
    DUPLICATE_OPEN_INCIDENT = (
        409,
        "another incident with the same deduplication key is open",
        DuplicateOpenIncident,
    )
    UNKNOWN_CURSOR = 410, "the cursor does not belong to this database", UnknownCursor
    TOKEN_NOT_FOUND = 404, "no active access token has this name", TokenNotFound
    PARTLY_STORED = 500, "only some of the batches were stored", PartlyStored
    NOT_IN_TRANSACTION = 500, "the connection has no open transaction", NotInTransaction
    CLIENT_CLOSED = 503, "the service is still starting, or already shutting down", ClientClosed
    WRONG_EVENT_LOOP = 500, "the application uses the client on another event loop", WrongEventLoop
    INVALID_SETTINGS = 500, "a setting is invalid", InvalidSettings
    MISSING_DEPENDENCY = 500, "an optional package is not installed", MissingDependency
    CACHE_UNAVAILABLE = 500, "the required cache does not answer", CacheUnavailable
    STORE_ERROR = 500, "the database refuses what the service needs", StoreError
    STORE_UNAVAILABLE = 503, "the database cannot be reached, or did not answer", StoreUnavailable
    SCHEMA_OUT_OF_DATE = 503, "the schema of the database needs an upgrade", SchemaOutOfDate
    INCIDENTKIT_ERROR = 500, "incidentkit failed in another way", IncidentKitError
    INTERNAL_ERROR = 500, "the service failed"
    NOT_READY = 503, "the service is not ready"
    TOO_MANY_READERS = 429, "the maximum number of readers already follow changes"
    TOO_MANY_CONNECTIONS = 503, "the service has as many connections as it can serve"
    UNAUTHENTICATED = 401, "the access token is missing or invalid"
    INSUFFICIENT_SCOPE = 403, "the token has none of the scopes of the operation"
    ACTOR_NOT_ALLOWED = 403, "only a token with the scope act-as may name an actor"
    CROSS_SITE_REQUEST = 403, "a web page of another site made a browser send the request"
    FOREIGN_ORIGIN = 403, "a web page of another origin tried to change something"
    MISDIRECTED_REQUEST = 421, "the service does not answer for this host"
    TOO_MANY_FAILED_CHECKS = 429, "too many invalid tokens came from the address"
    TOO_MANY_REQUESTS = 429, "the token already has its maximum of requests or searches running"
    AUTHENTICATION_UNAVAILABLE = 503, "the service cannot authenticate requests at present"
    UNKNOWN_PATH = 404, "the service has no such path"
    METHOD_NOT_ALLOWED = 405, "the path does not take this method"
    MALFORMED_QUERY = 400, "the query is not percent-encoded UTF-8"
    MALFORMED_BODY = 400, "the body is not UTF-8 or not JSON"
    UNEXPECTED_BODY = 400, "the operation takes no body"
    INCOMPLETE_REQUEST = 400, "the connection ended within the request"
    BODY_TOO_LARGE = 413, "the body has too many bytes"
    UNSUPPORTED_MEDIA_TYPE = 415, "the body is not declared as JSON in UTF-8"
    UNSUPPORTED_ENCODING = 415, "the body is compressed"
    MALFORMED_REQUEST = 400, "the request is not valid HTTP/1.1"
    REQUEST_TIMEOUT = 408, "the request did not arrive in time"
    URI_TOO_LONG = 414, "the path and the query have too many bytes"
    HEADERS_TOO_LARGE = 431, "the headers or the trailers are too large, or too many"

    def __init__(self, status: int, when: str, error: type[Exception] | None = None) -> None:
        self.status = status
        self.when = when
        self.error = error

    @cached_property
    def code(self) -> str:
        """The stable code, for programs."""
        return self.name.lower()

    @cached_property
    def anchor(self) -> str:
        """The code as the anchor of a page, with hyphens."""
        return self.code.replace("_", "-")

    @cached_property
    def title(self) -> str:
        """The kind in words, the same for each problem of the kind."""
        return self.name.replace("_", " ").capitalize()


_BY_ERROR: Final = {kind.error: kind for kind in Kind if kind.error is not None}


def kind_of(error: Exception) -> Kind:
    """Return the kind of problem that reports an error."""
    found = (_BY_ERROR.get(class_) for class_ in type(error).__mro__)
    return next((kind for kind in found if kind is not None), Kind.INTERNAL_ERROR)


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

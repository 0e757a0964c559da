"""The kinds of problems that the service answers errors with: one table for service and client."""

from __future__ import annotations

from enum import Enum, unique
from functools import cached_property
from typing import Final

from incidentkit.domain.errors import (
    AccessDenied,
    CacheUnavailable,
    ClientClosed,
    DuplicateOpenIncident,
    IdempotencyKeyReused,
    IllegalTransition,
    IncidentConflict,
    IncidentKitError,
    IncidentNotFound,
    InvalidIncident,
    InvalidSettings,
    MissingDependency,
    NeedsDatabase,
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
    NEEDS_DATABASE = 500, "the service itself has no client on a database", NeedsDatabase
    CLIENT_CLOSED = 503, "the service is still starting, or already shutting down", ClientClosed
    WRONG_EVENT_LOOP = 500, "the application uses the client on another event loop", WrongEventLoop
    INVALID_SETTINGS = 500, "a setting is invalid", InvalidSettings
    MISSING_DEPENDENCY = 500, "an optional package is not installed", MissingDependency
    CACHE_UNAVAILABLE = 500, "the required cache does not answer", CacheUnavailable
    STORE_ERROR = 500, "the database refuses what the service needs", StoreError
    STORE_UNAVAILABLE = 503, "the database cannot be reached, or did not answer", StoreUnavailable
    SCHEMA_OUT_OF_DATE = 503, "the schema of the database needs an upgrade", SchemaOutOfDate
    ACCESS_DENIED = 500, "another service refuses the token of this one", AccessDenied
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

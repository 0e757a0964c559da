"""Turn answers of a service into the errors that a client on the database would raise."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias
from urllib.parse import urlsplit

from attrs import field, frozen

from incidentkit.domain.errors import (
    AccessDenied,
    DuplicateOpenIncident,
    FieldError,
    IdempotencyKeyReused,
    IllegalTransition,
    IncidentConflict,
    IncidentKitError,
    IncidentNotFound,
    InvalidIncident,
    SchemaOutOfDate,
    StoreError,
    StoreUnavailable,
    UnknownCursor,
    VersionConflict,
)
from incidentkit.domain.values import Incident
from incidentkit.remote.messages import PROBLEM, Answer, Call
from incidentkit.wire import wire_converter
from incidentkit.wire.kinds import Kind

DENIED: Final = (401, 403)
UNAVAILABLE: Final = (429, 502, 503, 504)
"""The statuses after which the same request may succeed later."""

_KINDS: Final = {kind.code: kind for kind in Kind}

_FIELDS: Final = {"if_match": "expected_version", "if_none_match": "expected_version"}
"""The arguments of the verbs, by the request parameters that have a different name."""


@frozen
class Problem:
    """An answer with an error of incidentkit.

    Attributes:
        status: The HTTP status.
        kind: The kind of problem; None: a kind that only a newer version knows.
        reason: The cause, in the words of the service, with the id of the request.
        members: All members of the problem document.
        url: The URL of the service.
        call: The request.
    """

    status: int
    kind: Kind | None
    reason: str
    members: Mapping[str, Any] = field(repr=False)
    url: str
    call: Call

    @property
    def incident(self) -> Incident:
        """The incident that does not allow a change."""
        return wire_converter(complete=False).structure(self.members["incident"], Incident)

    @property
    def errors(self) -> list[FieldError]:
        """The faulty arguments."""
        return [
            FieldError(_FIELDS.get(str(each["field"]), str(each["field"])), str(each["reason"]))
            for each in self.members["errors"]
        ]


Make: TypeAlias = Callable[[Problem], IncidentKitError]


def _illegal_transition(problem: Problem) -> IncidentKitError:
    status = problem.call.to_status
    return (
        IncidentConflict(problem.incident)
        if status is None
        else IllegalTransition(problem.incident, status)
    )


ERRORS: Final[Mapping[type[Exception], Make]] = {
    InvalidIncident: lambda problem: InvalidIncident(problem.errors),
    IdempotencyKeyReused: lambda problem: IdempotencyKeyReused(problem.call.idempotency_key),
    IncidentNotFound: lambda problem: IncidentNotFound(problem.call.incident_id),
    IncidentConflict: lambda problem: IncidentConflict(problem.incident),
    VersionConflict: lambda problem: VersionConflict(problem.incident),
    IllegalTransition: _illegal_transition,
    DuplicateOpenIncident: lambda problem: DuplicateOpenIncident(problem.incident),
    UnknownCursor: lambda _: UnknownCursor(),
    SchemaOutOfDate: lambda problem: SchemaOutOfDate(None, "", place=problem.url),
    StoreUnavailable: lambda problem: StoreUnavailable(problem.reason, place=problem.url),
    StoreError: lambda problem: StoreError(problem.reason, place=problem.url),
}
"""Makes each error that a verb may raise. All other problems concern the service itself."""


def is_passing(answer: Answer) -> bool:
    """Return whether the same request may soon succeed without any other action."""
    return answer.status in UNAVAILABLE and kind_of(answer) is not Kind.SCHEMA_OUT_OF_DATE


def kind_of(answer: Answer) -> Kind | None:
    """Return the kind of problem that an answer reports; None: an unknown kind, or no problem."""
    try:
        return _KINDS.get(_members(answer)["code"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def _members(answer: Answer) -> Any:
    return json.loads(answer.body) if answer.media_type == PROBLEM else None


def error_for(answer: Answer, url: str, call: Call) -> IncidentKitError:
    """Return the error that an answer stands for.

    Args:
        answer: An answer with the status of a failure.
        url: The URL of the service.
        call: The request.
    """
    try:
        members = _members(answer)
        code, detail = members["code"], str(members["detail"])
        reason = f"{detail} (request {members['request_id']})"
        kind = _KINDS.get(code)
        return _error(Problem(answer.status, kind, reason, members, url, call))
    except (KeyError, TypeError, ValueError, RecursionError):
        return _foreign(answer, url)


def _error(problem: Problem) -> IncidentKitError:
    kind = problem.kind
    make = None if kind is None or kind.error is None else ERRORS.get(kind.error)
    return (
        _by_status(problem.status, problem.reason, problem.url) if make is None else make(problem)
    )


def _by_status(status: int, reason: str, url: str) -> StoreError:
    """Return the error for a problem that no verb raises on a database."""
    if status in DENIED:
        return AccessDenied(reason, place=url)
    if status in UNAVAILABLE:
        return StoreUnavailable(reason, place=url)
    return StoreError(reason, place=url)


def _foreign(answer: Answer, url: str) -> StoreError:
    """Return the error for an answer that does not come from incidentkit, such as a proxy's."""
    status = answer.status
    if status in range(300, 400):
        reason = f"it redirects to {_origin(answer.headers.get('location', ''))}: use that URL"
    elif status == 404:  # noqa: PLR2004
        reason = "incidentkit does not answer here (status 404): check the path of the URL"
    elif status in (*DENIED, *UNAVAILABLE):
        reason = f"something other than incidentkit answered with status {status}"
    else:
        reason = f"something other than incidentkit answered with status {status}: check the URL"
    return _by_status(status, reason, url)


def _origin(location: str) -> str:
    """Return the scheme and the host of a URL; its other parts may be secret."""
    try:
        parts = urlsplit(location)
        if parts.scheme and parts.hostname:
            port = "" if parts.port is None else f":{parts.port}"
            return f"{parts.scheme}://{parts.hostname}{port}"
    except ValueError:
        pass
    return "another path"

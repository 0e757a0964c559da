"""Requests to a service and its answers, as values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from attrs import field, frozen

from incidentkit.domain.errors import FieldError, InvalidIncident
from incidentkit.domain.values import IncidentStatus, VersionMatch
from incidentkit.wire import dump_json

JSON: Final = "application/json"
PROBLEM: Final = "application/problem+json"

NO_INCIDENT: Final = '"-"'
"""An entity tag that no incident has."""


@frozen
class Call:
    """One request, with the arguments that its errors refer to.

    Attributes:
        method: The HTTP method.
        path: The path, below the URL of the service.
        query: The parameters of the query.
        headers: Its headers, in addition to those of every request.
        body: The JSON value to send; None: no body.
        patience: Seconds that the service may take beyond the deadline and the timeouts.
        waits: Whether it waits for changes.
        slow: Whether it is a search that may take long.
        single: Whether it is sent only once, since repeating it would change its answer.
        incident_id: The incident that it concerns; 0: no single one.
        to_status: The status that it requests; None: none.
        idempotency_key: The key of a write; empty for a read.
    """

    method: str
    path: str
    query: tuple[tuple[str, str], ...] = ()
    headers: Mapping[str, bytes] = field(factory=dict)
    body: bytes | None = field(default=None, repr=False)
    patience: float = 0.0
    waits: bool = False
    slow: bool = False
    single: bool = False
    incident_id: int = 0
    to_status: IncidentStatus | None = None
    idempotency_key: str = ""


@frozen
class Answer:
    """The answer of the service.

    Attributes:
        status: The HTTP status.
        headers: The headers, by their names in lower case.
        body: The bytes of the body.
        attempts: Number of attempts that the request took.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)
    attempts: int = 1

    @property
    def media_type(self) -> str:
        """The media type without its parameters, in lower case."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


def json_body(value: Any) -> dict[str, Any]:
    """Return the arguments of a :class:`Call` that sends a JSON value."""
    return {"body": dump_json(value)}


def header_value(name: str, text: str) -> bytes:
    """Encode a text as the value of a header.

    Raises:
        InvalidIncident: If a header cannot carry it unchanged.
    """
    if text != text.strip(" \t") or any(ord(each) < ord(" ") or each == "\x7f" for each in text):
        reason = "must not begin or end with a blank or contain control characters, for a service"
        raise InvalidIncident([FieldError(name, reason)])
    return text.encode()


def preconditions(expected: int | str | VersionMatch | None) -> dict[str, bytes]:
    """Return the headers that state the version that an incident must have."""
    if expected is None:
        return {}
    if not isinstance(expected, VersionMatch):
        expected = VersionMatch((expected,))
    headers = {}
    if expected.any_of is not None:
        headers["If-Match"] = (_tags(expected.any_of) or NO_INCIDENT).encode()
    if expected.none_of:
        headers["If-None-Match"] = _tags(expected.none_of).encode()
    return headers


def _tags(versions: tuple[int | str, ...]) -> str:
    return ", ".join(f'"{each}"' for each in versions)

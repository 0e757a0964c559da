"""Check the parameters of operations that no single model of the domain covers."""

from __future__ import annotations

from typing import Any

from incidentkit.domain import rules
from incidentkit.domain.commands import StatusChange
from incidentkit.domain.queries import ChangesQuery
from incidentkit.domain.values import VersionMatch
from incidentkit.http.operation import EntityTagValue


def expected(
    if_match: EntityTagValue | None, if_none_match: EntityTagValue | None
) -> int | str | VersionMatch | None:
    """Return the version that an incident must have by the preconditions of a request."""
    any_of = None if if_match == "*" else if_match
    if if_none_match is None:
        # One version or tag is compared by the statement that writes.
        return any_of[0] if any_of is not None and len(any_of) == 1 else _match(any_of, ())
    # Whatever the incident is, a star stands for it.
    return VersionMatch(()) if if_none_match == "*" else _match(any_of, if_none_match)


def _match(
    any_of: tuple[int | str, ...] | None, none_of: tuple[int | str, ...]
) -> VersionMatch | None:
    return VersionMatch(any_of, none_of) if none_of or any_of is not None else None


def check_incident(
    incident_id: int, idempotency_key: str | None = None, **preconditions: EntityTagValue | None
) -> None:
    """Check the id of an incident, and the headers of a request that is about it.

    Raises:
        InvalidIncident: With the faults of the id, the preconditions or the key.
    """
    rules.check("incident_id", rules.incident_id, incident_id)
    _check_expected(**preconditions)
    check_idempotency_key(idempotency_key)


def _check_expected(
    if_match: EntityTagValue | None = None, if_none_match: EntityTagValue | None = None
) -> None:
    rules.check("if_match", rules.optional_version, expected(if_match, if_none_match))


def check_idempotency_key(idempotency_key: str | None) -> None:
    """Check an idempotency key.

    Raises:
        InvalidIncident: If it is too long or cannot be stored.
    """
    rules.check("idempotency_key", rules.optional_name, idempotency_key)


def check_status_change(
    incident_id: int,
    status: Any,
    note: str | None,
    idempotency_key: str | None,
    **preconditions: EntityTagValue | None,
) -> None:
    """Check a change of the status, its preconditions and its idempotency key.

    Raises:
        InvalidIncident: With the faults of the change, the preconditions or the key.
    """
    StatusChange(incident_id, status, note)
    _check_expected(**preconditions)
    check_idempotency_key(idempotency_key)


def check_changes(last_event_id: str | None, **arguments: Any) -> None:
    """Check where and how to read changes.

    Raises:
        InvalidIncident: With the faults of the query, or of the header ``Last-Event-ID``.
    """
    ChangesQuery(**arguments)
    ChangesQuery(last_event_id)

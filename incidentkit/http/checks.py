"""Check the parameters of operations that no single model of the domain covers."""

from __future__ import annotations

from typing import Any

from incidentkit.domain import rules
from incidentkit.domain.commands import StatusChange
from incidentkit.domain.queries import ChangesQuery


def check_incident_id(incident_id: int) -> None:
    """Check the id of an incident.

    Raises:
        InvalidIncident: If it is not an id.
    """
    rules.check("incident_id", rules.incident_id, incident_id)


def check_idempotency_key(idempotency_key: str | None) -> None:
    """Check an idempotency key.

    Raises:
        InvalidIncident: If it is too long or cannot be stored.
    """
    rules.check("idempotency_key", rules.optional_name, idempotency_key)


def check_status_change(idempotency_key: str | None, **arguments: Any) -> None:
    """Check a change of the status, and its idempotency key.

    Raises:
        InvalidIncident: With the faults of the change, or of the key.
    """
    StatusChange(**arguments)
    check_idempotency_key(idempotency_key)


def check_changes(last_event_id: str | None, **arguments: Any) -> None:
    """Check where and how to read changes.

    Raises:
        InvalidIncident: With the faults of the query, or of the header ``Last-Event-ID``.
    """
    ChangesQuery(**arguments)
    ChangesQuery(last_event_id)

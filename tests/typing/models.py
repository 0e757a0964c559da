"""The types of the models and errors, and the uses that a type checker must reject."""
# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_never, assert_type

from incidentkit import (
    FieldError,
    Incident,
    IncidentNotFound,
    IncidentOrder,
    IncidentSource,
    IncidentStatus,
    InvalidIncident,
    InvalidSettings,
    ListQuery,
    MissingDependency,
    NewIncident,
    OrderName,
    SchemaOutOfDate,
    SearchPage,
    SourceName,
    StatusName,
    StoreUnavailable,
    __version__,
)

if TYPE_CHECKING:
    from datetime import datetime


def stored(incident: Incident) -> None:
    """A stored incident has plain Python types and is read-only."""
    assert_type(incident.incident_id, int)
    assert_type(incident.incident_message, str)
    assert_type(incident.incident_type, IncidentStatus)
    assert_type(incident.source, IncidentSource)
    incident.created_at.isoformat()
    incident.incident_id = 7  # type: ignore[misc]
    incident.status  # type: ignore[attr-defined]  # noqa: B018


def made_by_hand(time: datetime) -> None:
    """An Incident is constructed with enum members, not with their strings."""
    Incident(7, "Disk is full", IncidentStatus.NEW, IncidentSource.PARTNER, time)
    Incident(7, "Disk is full", "new", "partner", time)  # type: ignore[arg-type]
    Incident(7, "Disk is full", IncidentStatus.NEW, IncidentSource.PARTNER, "2025-01-01")  # type: ignore[arg-type]


def new() -> None:
    """A NewIncident takes members or strings, and holds members."""
    incident = NewIncident("Disk is full", "operator")
    assert_type(incident, NewIncident)
    assert_type(incident.incident_message, str)
    assert_type(incident.incident_type, IncidentStatus)
    assert_type(incident.source, IncidentSource)
    NewIncident("Disk is full", IncidentSource.PARTNER, incident_type=IncidentStatus.NEW)
    assert_type(NewIncident.from_mapping({"source": "partner"}), NewIncident)
    NewIncident("Disk is full")  # type: ignore[call-arg]
    NewIncident(None, "operator")  # type: ignore[arg-type]
    NewIncident("Disk is full", 7)  # type: ignore[arg-type]
    NewIncident("Disk is full", "customer")  # type: ignore[arg-type]
    NewIncident("Disk is full", "partner", "open")  # type: ignore[arg-type]
    incident.source = IncidentSource.PARTNER  # type: ignore[misc]


def plain(incident: Incident, page: SearchPage) -> None:
    """A model becomes a dictionary or a text, with times in one of two forms."""
    assert_type(incident.to_dict(), dict[str, Any])
    assert_type(page.to_json(times="rfc3339"), str)
    incident.to_dict(times="iso")  # type: ignore[arg-type]


def named(status: StatusName, source: SourceName, order: OrderName) -> None:
    """A host can annotate the value of a status, a source or an order."""
    assert_type(ListQuery(status=status, source=source), ListQuery)
    IncidentOrder(order)
    named("new", "partner", "oldest")
    named("open", "partner", "oldest")  # type: ignore[arg-type]
    named("new", "customer", "oldest")  # type: ignore[arg-type]
    named("new", "partner", "random")  # type: ignore[arg-type]


def query() -> None:
    """A ListQuery takes members or strings, and holds members."""
    query = ListQuery(status="new", source=IncidentSource.OPERATOR)
    assert_type(query.page, int)
    assert_type(query.limit, int)
    assert_type(query.status, IncidentStatus | None)
    assert_type(query.source, IncidentSource | None)
    assert_type(query.offset, int)
    assert_type(query.cache_key, str)
    ListQuery("1")  # type: ignore[arg-type]
    ListQuery(status="open")  # type: ignore[arg-type]
    query.offset = 7  # type: ignore[misc]


def every_status(status: IncidentStatus) -> str:
    """A checker sees that every status is handled; a member is also a string."""
    match status:
        case IncidentStatus.NEW:
            return status.upper()
        case IncidentStatus.COMPLETED | IncidentStatus.FAILED:
            return status.value
        case _:
            assert_never(status)


def every_source(source: IncidentSource) -> str:
    """A checker sees that every source is handled."""
    if source is IncidentSource.OPERATOR:
        return "person"
    if source is IncidentSource.MONITORING or source is IncidentSource.PARTNER:
        return "program"
    assert_never(source)


def invalid(error: InvalidIncident) -> None:
    """A validation error holds each faulty field and its reason."""
    assert_type(error.errors, tuple[FieldError, ...])
    assert_type(error.errors[0].field, str)
    assert_type(error.errors[0].reason, str)


def missing(error: IncidentNotFound, dependency: MissingDependency) -> None:
    """An error about something missing names it."""
    assert_type(error.incident_id, int)
    assert_type(dependency.package, str)
    assert_type(dependency.extra, str)


def misconfigured(error: InvalidSettings, schema: SchemaOutOfDate, store: StoreUnavailable) -> None:
    """An error for an operator says what to fix."""
    assert_type(error.name, str)
    assert_type(error.reason, str)
    assert_type(schema.current, str | None)
    assert_type(schema.expected, str)
    assert_type(schema.command, str)
    assert_type(store.reason, str)


def version() -> None:
    """The version is a string."""
    __version__.split(".")

"""Record and follow incidents in the database that your application already runs."""

from incidentkit.client import IncidentClient
from incidentkit.domain.actor import acting_as
from incidentkit.domain.commands import NewIncident
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
    SchemaOutOfDate,
    StoreError,
    StoreUnavailable,
    UnknownCursor,
    VersionConflict,
)
from incidentkit.domain.queries import ListQuery
from incidentkit.domain.values import (
    ChangePage,
    EventKind,
    Incident,
    IncidentEvent,
    IncidentOrder,
    IncidentSource,
    IncidentStatus,
    SearchPage,
)
from incidentkit.joined import JoinedIncidents
from incidentkit.version import __version__

__all__ = [
    "CacheUnavailable",
    "ChangePage",
    "ClientClosed",
    "DuplicateOpenIncident",
    "EventKind",
    "FieldError",
    "IdempotencyKeyReused",
    "IllegalTransition",
    "Incident",
    "IncidentClient",
    "IncidentConflict",
    "IncidentEvent",
    "IncidentKitError",
    "IncidentNotFound",
    "IncidentOrder",
    "IncidentSource",
    "IncidentStatus",
    "InvalidIncident",
    "InvalidSettings",
    "JoinedIncidents",
    "ListQuery",
    "MissingDependency",
    "NewIncident",
    "NotInTransaction",
    "SchemaOutOfDate",
    "SearchPage",
    "StoreError",
    "StoreUnavailable",
    "UnknownCursor",
    "VersionConflict",
    "__version__",
    "acting_as",
]

"""Record and follow incidents in the database that your application already runs.

Importing the package loads nothing else: each name is loaded when it is first used (PEP 562).
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
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
    from incidentkit.incidents import Incidents
    from incidentkit.joined import JoinedIncidents
    from incidentkit.version import __version__

_MODULES = {
    "client": ("IncidentClient",),
    "domain.actor": ("acting_as",),
    "domain.commands": ("NewIncident",),
    "domain.errors": (
        "CacheUnavailable",
        "ClientClosed",
        "DuplicateOpenIncident",
        "FieldError",
        "IdempotencyKeyReused",
        "IllegalTransition",
        "IncidentConflict",
        "IncidentKitError",
        "IncidentNotFound",
        "InvalidIncident",
        "InvalidSettings",
        "MissingDependency",
        "NotInTransaction",
        "SchemaOutOfDate",
        "StoreError",
        "StoreUnavailable",
        "UnknownCursor",
        "VersionConflict",
    ),
    "domain.queries": ("ListQuery",),
    "domain.values": (
        "ChangePage",
        "EventKind",
        "Incident",
        "IncidentEvent",
        "IncidentOrder",
        "IncidentSource",
        "IncidentStatus",
        "SearchPage",
    ),
    "incidents": ("Incidents",),
    "joined": ("JoinedIncidents",),
    "version": ("__version__",),
}
_HOMES = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}

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
    "Incidents",
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


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(__import__(_HOMES[name], fromlist=[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

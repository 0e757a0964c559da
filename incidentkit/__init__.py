"""Record and follow incidents in the database that your application already uses."""

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
        PartlyStored,
        SchemaOutOfDate,
        StoreError,
        StoreUnavailable,
        TokenNotFound,
        UnknownCursor,
        VersionConflict,
        WrongEventLoop,
    )
    from incidentkit.domain.queries import ListQuery
    from incidentkit.domain.tokens import AccessToken, CreatedToken, Scope
    from incidentkit.domain.values import (
        ChangePage,
        EventKind,
        FeedBlocker,
        Incident,
        IncidentEvent,
        IncidentOrder,
        IncidentSource,
        IncidentStatus,
        SearchPage,
        VersionMatch,
    )
    from incidentkit.incidents import Incidents
    from incidentkit.joined import JoinedIncidents
    from incidentkit.sync.client import SyncIncidentClient
    from incidentkit.sync.incidents import SyncIncidents
    from incidentkit.sync.joined import SyncJoinedIncidents
    from incidentkit.version import __version__
else:
    from incidentkit.lazy import face

    __getattr__, __dir__ = face(
        globals(),
        {
            "incidentkit.client": ("IncidentClient",),
            "incidentkit.domain.actor": ("acting_as",),
            "incidentkit.domain.commands": ("NewIncident",),
            "incidentkit.domain.errors": (
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
                "PartlyStored",
                "SchemaOutOfDate",
                "StoreError",
                "StoreUnavailable",
                "TokenNotFound",
                "UnknownCursor",
                "VersionConflict",
                "WrongEventLoop",
            ),
            "incidentkit.domain.queries": ("ListQuery",),
            "incidentkit.domain.tokens": ("AccessToken", "CreatedToken", "Scope"),
            "incidentkit.domain.values": (
                "ChangePage",
                "EventKind",
                "FeedBlocker",
                "Incident",
                "IncidentEvent",
                "IncidentOrder",
                "IncidentSource",
                "IncidentStatus",
                "SearchPage",
                "VersionMatch",
            ),
            "incidentkit.incidents": ("Incidents",),
            "incidentkit.joined": ("JoinedIncidents",),
            "incidentkit.sync.client": ("SyncIncidentClient",),
            "incidentkit.sync.incidents": ("SyncIncidents",),
            "incidentkit.sync.joined": ("SyncJoinedIncidents",),
            "incidentkit.version": ("__version__",),
        },
    )

__all__ = [
    "AccessToken",
    "CacheUnavailable",
    "ChangePage",
    "ClientClosed",
    "CreatedToken",
    "DuplicateOpenIncident",
    "EventKind",
    "FeedBlocker",
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
    "PartlyStored",
    "SchemaOutOfDate",
    "Scope",
    "SearchPage",
    "StoreError",
    "StoreUnavailable",
    "SyncIncidentClient",
    "SyncIncidents",
    "SyncJoinedIncidents",
    "TokenNotFound",
    "UnknownCursor",
    "VersionConflict",
    "VersionMatch",
    "WrongEventLoop",
    "__version__",
    "acting_as",
]

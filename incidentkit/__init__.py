"""Record and follow incidents in the database that your application already runs."""

from incidentkit.client import IncidentClient
from incidentkit.errors import (
    CacheUnavailable,
    ClientClosed,
    FieldError,
    IncidentKitError,
    IncidentNotFound,
    InvalidIncident,
    InvalidSettings,
    MissingDependency,
    SchemaOutOfDate,
    StoreError,
    StoreUnavailable,
)
from incidentkit.models import Incident, IncidentSource, IncidentStatus, ListQuery, NewIncident
from incidentkit.version import __version__

__all__ = [
    "CacheUnavailable",
    "ClientClosed",
    "FieldError",
    "Incident",
    "IncidentClient",
    "IncidentKitError",
    "IncidentNotFound",
    "IncidentSource",
    "IncidentStatus",
    "InvalidIncident",
    "InvalidSettings",
    "ListQuery",
    "MissingDependency",
    "NewIncident",
    "SchemaOutOfDate",
    "StoreError",
    "StoreUnavailable",
    "__version__",
]

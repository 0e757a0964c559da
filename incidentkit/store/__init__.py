"""Where incidents are kept: SQLite or PostgreSQL, chosen by URL."""

from incidentkit.store.base import (
    Idempotency,
    IncidentStore,
    Page,
    RequestRecord,
    StoreOperations,
    StoreOptions,
    store_from_url,
    store_on,
)

__all__ = [
    "Idempotency",
    "IncidentStore",
    "Page",
    "RequestRecord",
    "StoreOperations",
    "StoreOptions",
    "store_from_url",
    "store_on",
]

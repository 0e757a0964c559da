"""Where incidents are kept: SQLite or PostgreSQL, chosen by URL."""

from typing import TYPE_CHECKING, Any

from incidentkit.store.base import (
    Idempotency,
    IncidentStore,
    Page,
    StoreOperations,
    StoreOptions,
    store_from_url,
    store_on,
)

if TYPE_CHECKING:
    from incidentkit.store.request_log import RequestRecord

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


def __getattr__(name: str) -> Any:
    if name == "RequestRecord":
        from incidentkit.store.request_log import RequestRecord  # noqa: PLC0415

        return RequestRecord
    raise AttributeError(name)

"""Where incidents are kept: SQLite or PostgreSQL, chosen by URL."""

from incidentkit.store.base import IncidentStore, Page, RequestRecord, StoreOptions, store_from_url

__all__ = ["IncidentStore", "Page", "RequestRecord", "StoreOptions", "store_from_url"]

"""Caches for pages of the list: in the process, in Redis, or one of the application's own."""

from incidentkit.cache.base import INDEX_KEY, TTL, IncidentCache
from incidentkit.cache.memory import MemoryCache
from incidentkit.cache.opening import cache_from_url

__all__ = ["INDEX_KEY", "TTL", "IncidentCache", "MemoryCache", "cache_from_url"]

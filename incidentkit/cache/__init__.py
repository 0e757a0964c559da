"""Where pages of the list are kept for a while: in the process, in Redis, or in one's own."""

from incidentkit.cache.base import INDEX_KEY, TTL, IncidentCache, cache_from_url
from incidentkit.cache.memory import MemoryCache

__all__ = ["INDEX_KEY", "TTL", "IncidentCache", "MemoryCache", "cache_from_url"]

"""Where pages of the list are kept for a while: in the process, in Redis, or in one's own."""

from incidentkit.cache.base import INDEX_KEY, TTL, IncidentCache
from incidentkit.cache.memory import MemoryCache
from incidentkit.cache.opening import cache_from_url

__all__ = ["INDEX_KEY", "TTL", "IncidentCache", "MemoryCache", "cache_from_url"]

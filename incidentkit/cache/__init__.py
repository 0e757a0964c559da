"""Where pages of the list are cached: in the process, in Redis, or in a cache of your own."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from incidentkit.cache.base import INDEX_KEY, TTL, IncidentCache
    from incidentkit.cache.memory import MemoryCache
    from incidentkit.cache.opening import cache_from_url
else:
    from incidentkit.lazy import face

    __getattr__, __dir__ = face(
        globals(),
        {
            "incidentkit.cache.base": (
                "INDEX_KEY",
                "TTL",
                "IncidentCache",
            ),
            "incidentkit.cache.memory": ("MemoryCache",),
            "incidentkit.cache.opening": ("cache_from_url",),
        },
    )

__all__ = [
    "INDEX_KEY",
    "TTL",
    "IncidentCache",
    "MemoryCache",
    "cache_from_url",
]

"""PostgreSQL: its statements, and an asyncpg pool."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from incidentkit.store.postgresql.opening import postgresql_store
else:
    from incidentkit.lazy import face

    __getattr__, __dir__ = face(
        globals(),
        {
            "incidentkit.store.postgresql.opening": ("postgresql_store",),
        },
    )

__all__ = [
    "postgresql_store",
]

"""SQLite: its statements, and a file or a database in memory."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from incidentkit.store.sqlite.opening import sqlite_store
else:
    from incidentkit.lazy import face

    __getattr__, __dir__ = face(
        globals(),
        {
            "incidentkit.store.sqlite.opening": ("sqlite_store",),
        },
    )

__all__ = [
    "sqlite_store",
]

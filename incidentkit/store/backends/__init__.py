"""Compose the stores of each database from a dialect and an executor."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from incidentkit.store.backends.postgresql import postgresql_store
    from incidentkit.store.backends.sqlite import sqlite_store
    from incidentkit.store.sqlite.existing import check_exists
else:
    from incidentkit.lazy import face

    __getattr__, __dir__ = face(
        globals(),
        {
            "incidentkit.store.backends.postgresql": ("postgresql_store",),
            "incidentkit.store.backends.sqlite": ("sqlite_store",),
            "incidentkit.store.sqlite.existing": ("check_exists",),
        },
    )

__all__ = [
    "check_exists",
    "postgresql_store",
    "sqlite_store",
]

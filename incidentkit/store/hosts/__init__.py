"""Run statements on engines and connections of the host: the application around incidentkit."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from incidentkit.store.hosts.sync_postgresql import postgresql_host
    from incidentkit.store.hosts.sync_sqlite import sqlite_host
    from incidentkit.store.hosts.synchronous import ThreadTurn
else:
    from incidentkit.lazy import face

    __getattr__, __dir__ = face(
        globals(),
        {
            "incidentkit.store.hosts.sync_postgresql": ("postgresql_host",),
            "incidentkit.store.hosts.sync_sqlite": ("sqlite_host",),
            "incidentkit.store.hosts.synchronous": ("ThreadTurn",),
        },
    )

__all__ = ["ThreadTurn", "postgresql_host", "sqlite_host"]

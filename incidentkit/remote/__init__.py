"""Use incidents through a service over HTTP, instead of directly on their database."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from incidentkit.remote.options import RemoteOptions
    from incidentkit.remote.store import RemoteStore
else:
    from incidentkit.lazy import face

    __getattr__, __dir__ = face(
        globals(),
        {
            "incidentkit.remote.options": ("RemoteOptions",),
            "incidentkit.remote.store": ("RemoteStore",),
        },
    )

__all__ = ["RemoteOptions", "RemoteStore"]

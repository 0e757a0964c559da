"""Record incidents without an event loop. Modules that import asyncio are loaded on first use."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from incidentkit.session import HostTransaction
    from incidentkit.sync.immediate import run_immediately
    from incidentkit.sync.portal import Portal, in_caller
else:
    from incidentkit.lazy import face

    __getattr__, __dir__ = face(
        globals(),
        {
            "incidentkit.session": ("HostTransaction",),
            "incidentkit.sync.immediate": ("run_immediately",),
            "incidentkit.sync.portal": ("Portal", "in_caller"),
        },
    )

__all__ = ["HostTransaction", "Portal", "in_caller", "run_immediately"]

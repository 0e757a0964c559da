"""The verbs for programs without an event loop. What loads asyncio is loaded when it is used."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from incidentkit.sync.portal import Portal, in_caller
else:
    from incidentkit.lazy import face

    __getattr__, __dir__ = face(globals(), {"incidentkit.sync.portal": ("Portal", "in_caller")})

__all__ = ["Portal", "in_caller"]

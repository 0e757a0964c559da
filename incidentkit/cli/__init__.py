"""The command line, ``incidentkit``: thin commands around the SDK."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from incidentkit.cli.program import main
else:
    from incidentkit.lazy import face

    __getattr__, __dir__ = face(globals(), {"incidentkit.cli.program": ("main",)})

__all__ = ["main"]

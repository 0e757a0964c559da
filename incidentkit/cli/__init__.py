"""The command line, ``incidentkit``: thin commands around the SDK."""

from incidentkit.cli.program import main

__all__ = ["main"]

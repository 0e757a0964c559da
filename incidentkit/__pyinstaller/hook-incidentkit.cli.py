"""Collect the program, which the package's lazy face loads by name."""

from __future__ import annotations

hiddenimports = ["incidentkit.cli.program"]

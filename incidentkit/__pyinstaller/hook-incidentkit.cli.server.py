"""Collect the protocol, which Uvicorn loads by name."""

from __future__ import annotations

hiddenimports = ["incidentkit.cli.protocol"]

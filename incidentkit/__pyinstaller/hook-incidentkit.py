"""Collect the modules behind the lazy faces, and the driver that SQLAlchemy loads by name."""

from __future__ import annotations

from PyInstaller.utils.hooks import collect_submodules


def _is_library(module: str) -> bool:
    """Return whether a module belongs to the SDK: the service and the program name theirs."""
    return module.split(".")[1:2] not in (["__main__"], ["__pyinstaller"], ["cli"], ["http"])


hiddenimports = ["aiosqlite", *collect_submodules("incidentkit", filter=_is_library)]

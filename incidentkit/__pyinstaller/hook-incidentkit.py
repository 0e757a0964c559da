"""Collect the modules behind the lazy faces, and a driver that SQLAlchemy loads by name."""

from __future__ import annotations

from importlib.util import find_spec

from PyInstaller.utils.hooks import collect_submodules


def _is_library(module: str) -> bool:
    """Return whether a module belongs to the SDK: the service and the program name theirs.

    The kit for tests is not part of a frozen program, and would bring pytest. A program imports the
    integration of its framework by name.
    """
    others = (["__main__"], ["__pyinstaller"], ["cli"], ["http"], ["integrations"], ["testing"])
    return module.split(".")[1:2] not in others


hiddenimports = collect_submodules("incidentkit", filter=_is_library)
# For an application's own engine on SQLite.
if find_spec("aiosqlite"):
    hiddenimports.append("aiosqlite")

"""Tell PyInstaller which modules and files are loaded by name.

PyInstaller finds this folder through the entry point ``pyinstaller40`` of the installed package.
"""

from __future__ import annotations

from pathlib import Path


def get_hook_dirs() -> list[str]:
    """Return the folders with hooks."""
    return [str(Path(__file__).parent)]

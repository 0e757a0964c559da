"""What holds where nothing else is said."""

from __future__ import annotations

from typing import Final

DEFAULT_DATABASE_URL: Final = "sqlite+aiosqlite:///incidentkit.db"
"""Where incidents are kept: a file in the current folder."""

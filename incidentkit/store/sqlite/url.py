"""URLs of SQLite databases."""

from __future__ import annotations

import os
from typing import Final

from sqlalchemy import make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError

from incidentkit.domain.errors import InvalidSettings
from incidentkit.store.database import database_kind

MEMORY: Final = (None, "", ":memory:")
"""The names of a database in memory."""


def sqlite_url(database_url: str) -> URL:
    """Return the URL with aiosqlite as its driver.

    Raises:
        InvalidSettings: If the URL cannot be parsed, or names anything but a file.
    """
    try:
        url = make_url(database_url).set(drivername="sqlite+aiosqlite")
        os.fsencode(url.database or "")
    except (ArgumentError, ValueError):
        raise InvalidSettings("database_url", "is not an SQLite URL") from None
    if "\x00" in (url.database or ""):
        raise InvalidSettings("database_url", "names a file with a NUL character")
    if url.host or url.username or url.port:
        raise InvalidSettings("database_url", "names a file on SQLite: sqlite+aiosqlite:///file")
    if url.query and "uri" not in url.query:
        # SQLAlchemy would ignore them with a warning.
        raise InvalidSettings("database_url", "may have parameters on SQLite only with uri=true")
    return url


def in_memory(database_url: str) -> bool:
    """Return whether a URL names a database in memory, which no other process can see."""
    return database_kind(database_url) == "sqlite" and sqlite_url(database_url).database in MEMORY

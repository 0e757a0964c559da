"""URLs of SQLite databases."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, quote, unquote

from sqlalchemy import make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError

from incidentkit.domain.errors import InvalidSettings
from incidentkit.store.database import database_kind

IN_MEMORY: Final = ":memory:"
"""The name of a database in memory in a URL."""

MEMORY: Final = (None, "", IN_MEMORY)
"""The names of a database in memory in a host's engine. A URL without any may come from an empty
variable."""

PARAMETERS: Final = {
    "mode": ("ro", "rw", "rwc"),
    "cache": ("private", "shared"),
    "immutable": ("0", "1"),
    "nolock": ("0", "1"),
    "psow": ("0", "1"),
    "vfs": None,
    "uri": ("true", "1"),
    "check_same_thread": None,
}
"""The parameters that a URL may have, with their values; None: any value. SQLite reads all but the
last two, which SQLAlchemy's own URLs have."""

_URI: Final = "file:"


def sqlite_url(database_url: str) -> URL:
    """Return the URL with aiosqlite as its driver; a file with parameters is an SQLite URI.

    Raises:
        InvalidSettings: If the URL cannot be parsed, or names anything but a file.
    """
    try:
        url = make_url(database_url).set(drivername="sqlite+aiosqlite", query={})
        os.fsencode(url.database or "")
    except (ArgumentError, ValueError):
        raise InvalidSettings("database_url", "is not an SQLite URL") from None
    if "\x00" in (url.database or ""):
        raise InvalidSettings("database_url", "names a file with a NUL character")
    if url.host or url.username or url.port:
        raise InvalidSettings("database_url", "names a file on SQLite: sqlite+aiosqlite:///file")
    parameters = _parameters(database_url)
    name = url.database or ""
    if not name.removeprefix(_URI):
        raise InvalidSettings(
            "database_url",
            "names no file (is a variable in it empty?): write sqlite+aiosqlite:///file, or "
            "sqlite+aiosqlite:///:memory: for a database in memory",
        )
    parameters.pop("check_same_thread", None)
    uri = parameters.pop("uri", None) is not None
    if name in MEMORY:
        if parameters:
            reason = "has parameters, which a database in memory does not take"
            raise InvalidSettings("database_url", reason)
        return url
    if not parameters and not name.startswith(_URI):
        return url
    if not (uri and name.startswith(_URI)):
        name = _URI + quote(os.fsencode(name))
    elif name.startswith(f"{_URI}:memory:"):
        raise InvalidSettings("database_url", "names a database in memory: write :memory: alone")
    return url.set(database=name, query={**parameters, "uri": "true"})


def _parameters(database_url: str) -> dict[str, str]:
    """Return the parameters of a URL.

    Raises:
        InvalidSettings: If one is unknown, or has another value than it can have.
    """
    query = database_url.partition("?")[2]
    try:
        parameters = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError:
        reason = "has a ? without a parameter: in the name of a file, write it as %3F"
        raise InvalidSettings("database_url", reason) from None
    for name, value in parameters.items():
        if name not in PARAMETERS:
            known = ", ".join(PARAMETERS)
            reason = f"has the parameter {name}, which SQLite does not have; it has {known}"
            raise InvalidSettings("database_url", reason)
        values = PARAMETERS[name]
        if values is not None and value not in values:
            hint = "; write :memory: for a database in memory" if value == "memory" else ""
            reason = f"has the parameter {name}, which must be one of: {', '.join(values)}{hint}"
            raise InvalidSettings("database_url", reason)
    return parameters


def in_memory(database_url: str) -> bool:
    """Return whether a URL names a database in memory, which no other process can see."""
    return database_kind(database_url) == "sqlite" and sqlite_url(database_url).database in MEMORY


def place_of(url: URL) -> str:
    """Return the absolute path of the file, or ``:memory:``, for an error to name it."""
    name = url.database
    if name is None or name in MEMORY:
        return IN_MEMORY
    if "uri" in url.query and name.startswith(_URI):
        name = unquote(name.removeprefix(_URI).partition("?")[0])
        name = f"/{name.lstrip('/')}" if name.startswith("//") else name
    try:
        return str(Path(name).absolute())
    except FileNotFoundError:
        # The working folder was deleted.
        return name

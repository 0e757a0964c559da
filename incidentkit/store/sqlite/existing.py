"""Look at an SQLite file without creating or changing it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from incidentkit.domain.errors import SchemaOutOfDate, StoreError
from incidentkit.store.schema import SCHEMA_REVISION
from incidentkit.store.sql.tables import incident_table
from incidentkit.store.sqlite.url import place_of, sqlite_url


def check_exists(database_url: str, *, with_schema: bool) -> None:
    """Raise if opening a URL would create a file or, on request, the tables in a file.

    A database in memory passes, and so does a file that cannot be looked at: opening it says what
    is wrong.

    Args:
        database_url: The database.
        with_schema: Whether a file without the table of incidents is an error too.

    Raises:
        InvalidSettings: If the URL cannot be parsed.
        StoreError: If there is no such file.
        SchemaOutOfDate: If the file has no such table.
    """
    place = place_of(sqlite_url(database_url))
    # The path is relative only if the working folder was deleted.
    if not Path(place).is_absolute():
        return
    try:
        Path(place).stat()
    except (FileNotFoundError, NotADirectoryError):
        remedy = "correct the path, or create it with `incidentkit db upgrade`"
        raise StoreError(f"there is no such file: {remedy}", place=place) from None
    except OSError:
        return
    if with_schema and not _may_have_schema(place):
        raise SchemaOutOfDate(None, SCHEMA_REVISION, place=place)


def _may_have_schema(path: str) -> bool:
    """Return False only for a database that does not have the table of incidents."""
    uri = f"{Path(path).as_uri()}?mode=ro"
    select = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = ?"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            (count,) = connection.execute(select, (incident_table.name,)).fetchone()
    except sqlite3.Error:
        return True
    return bool(count)

"""Translate errors of SQLite, by the one table of its error codes."""

from __future__ import annotations

import sqlite3
from typing import Final

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from incidentkit.domain.errors import SchemaOutOfDate, StoreError, StoreUnavailable
from incidentkit.store.schema import SCHEMA_REVISION

PRIMARY_CODE: Final = 0xFF
"""The bits of an SQLite error code that hold its kind."""

UNAVAILABLE: Final = {
    sqlite3.SQLITE_BUSY: "another process kept it locked for too long",
    sqlite3.SQLITE_LOCKED: "another process kept it locked for too long",
    sqlite3.SQLITE_CANTOPEN: "the file cannot be opened",
    sqlite3.SQLITE_READONLY: "the file cannot be written",
    sqlite3.SQLITE_IOERR: "the file cannot be read or written",
    sqlite3.SQLITE_FULL: "the disk is full",
}
"""The reason of a :class:`~incidentkit.StoreUnavailable`, by the primary code."""


def translate_error(error: Exception) -> StoreError:
    """Return the error that a caller sees, for an exception of SQLAlchemy or of a time limit.

    Raise it with the exception as its cause: ``raise translate_error(error) from error``.
    """
    if isinstance(error, TimeoutError):
        return StoreUnavailable("it did not answer in time")
    if isinstance(error, PoolTimeoutError):
        return StoreUnavailable("no connection became free in time")
    cause = error.orig if isinstance(error, DBAPIError) else None
    code = getattr(cause, "sqlite_errorcode", 0) & PRIMARY_CODE
    if code == sqlite3.SQLITE_ERROR and "no such" in str(cause):
        return SchemaOutOfDate(None, SCHEMA_REVISION)
    lost = isinstance(error, OSError) or getattr(error, "connection_invalidated", False)
    if code in UNAVAILABLE or lost:
        return StoreUnavailable(UNAVAILABLE.get(code, "the connection was lost"))
    name = getattr(cause, "sqlite_errorname", None)
    return StoreError(name or "unexpected failure of the driver")


def is_stale_schema(error: DBAPIError) -> bool:
    """Return whether another connection has changed the schema of the file.

    SQLite has not run the statement, and reads the schema again for the next one.
    """
    code = getattr(error.orig, "sqlite_errorcode", 0) & PRIMARY_CODE
    return bool(code == sqlite3.SQLITE_SCHEMA)

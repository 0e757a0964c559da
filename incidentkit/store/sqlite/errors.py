"""Translate errors of SQLite, by the one table of its error codes."""

from __future__ import annotations

import errno
import re
import sqlite3
from typing import Final

from attrs import evolve
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from incidentkit.domain.errors import SchemaOutOfDate, StoreError
from incidentkit.store.causes import (
    KEPT_OUT,
    NO_ANSWER,
    OLDER_WRITER,
    OTHER_THREAD,
    POOL_EXHAUSTED,
    Cause,
    find_cause,
    named_constraint,
    unknown_cause,
)

PRIMARY_CODE: Final = 0xFF
"""The bits of an SQLite error code that hold its kind."""

MOVED: Final = Cause(
    "the file was moved, deleted or replaced while it was open; put it back, or close the client "
    "and open it again",
    codes=("SQLITE_READONLY_DBMOVED",),
)
NO_FOLDER: Final = Cause(
    "the working folder was deleted, and the path of the file is relative to it; name the file by "
    "an absolute path"
)
IN_PARENT: Final = Cause(
    "it is in the memory of the parent process; keep the incidents in a file, or open another "
    "client in this process",
    StoreError,
)
ENDING: Final = Cause(
    "Python is ending and starts no more statements; let the main thread wait for the threads that "
    "use the client"
)
LOST: Final = Cause("the connection was lost", retryable=True)

CONSTRAINT: Final = Cause(
    "a constraint of the database refused the values", StoreError, codes=("SQLITE_CONSTRAINT",)
)

_CONSTRAINT: Final = re.compile(r"((?:NOT NULL|UNIQUE|CHECK)) constraint failed: (.+)")
"""The message about a constraint: its kind, and its name, its columns or its expression."""

CAUSES: Final = (
    # The file.
    Cause(
        "the file cannot be opened; check its permissions, that its folder exists, and that it is "
        "not a folder itself",
        codes=("SQLITE_CANTOPEN", "SQLITE_PERM"),
    ),
    NO_FOLDER,
    MOVED,
    Cause(
        "its folder or medium is read-only, but its write-ahead log needs a writable one; copy it, "
        "or add immutable=1 to the URL to read it there",
        codes=("SQLITE_READONLY_DIRECTORY", "SQLITE_READONLY_CANTINIT"),
    ),
    Cause("the file is read-only; check its permissions", codes=("SQLITE_READONLY",)),
    Cause(
        "the file cannot be read or written; check the disk and the system log",
        codes=("SQLITE_IOERR",),
    ),
    Cause("the disk is full; free space on it", codes=("SQLITE_FULL",)),
    Cause(
        "the file is not an SQLite database; correct the path",
        StoreError,
        codes=("SQLITE_NOTADB",),
    ),
    Cause("the file is damaged; restore it from a backup", StoreError, codes=("SQLITE_CORRUPT",)),
    Cause(
        "its file system cannot lock files, as over a network; move it to a local disk",
        codes=("SQLITE_PROTOCOL", "SQLITE_NOLFS"),
    ),
    # Other work.
    Cause(
        "another process kept it locked for too long",
        retryable=True,
        codes=("SQLITE_BUSY", "SQLITE_LOCKED"),
    ),
    Cause("a concurrent transaction came first", retryable=True, codes=("SQLITE_BUSY_SNAPSHOT",)),
    Cause("the statement was interrupted", retryable=True, codes=("SQLITE_INTERRUPT",)),
    Cause("another connection changed the schema", retryable=True, codes=("SQLITE_SCHEMA",)),
    Cause("the process is out of memory", retryable=True, codes=("SQLITE_NOMEM",)),
    IN_PARENT,
    ENDING,
    LOST,
    NO_ANSWER,
    POOL_EXHAUSTED,
    OTHER_THREAD,
    # The statement.
    evolve(OLDER_WRITER, codes=("SQLITE_CONSTRAINT_TRIGGER",)),
    KEPT_OUT,
    CONSTRAINT,
    Cause(
        "a unique index is missing or was changed; run `incidentkit db upgrade`",
        StoreError,
        codes=("SQLITE_ERROR",),
        text="does not match any PRIMARY KEY or UNIQUE",
    ),
    Cause(
        "`PRAGMA trusted_schema = OFF` keeps its triggers from the search index; set it to ON",
        StoreError,
        codes=("SQLITE_ERROR",),
        text="unsafe use of virtual table",
    ),
    Cause(
        "a part of the schema is missing",
        SchemaOutOfDate,
        codes=("SQLITE_ERROR",),
        text="no such (table|column|function|module)",
    ),
)
"""Every known cause. A failure with another code is a :class:`~incidentkit.StoreError` that names
the code."""

_PRIMARY_NAMES: Final[dict[int, str]] = {
    getattr(sqlite3, code): code for cause in CAUSES for code in cause.codes
}

_AMBIGUOUS: Final = frozenset({"SQLITE_CONSTRAINT_TRIGGER", "SQLITE_ERROR"})


def translate_error(error: BaseException) -> StoreError:
    """Return the error that a caller sees, for an exception of SQLite, SQLAlchemy or a time limit.

    Raise it with the exception as its cause: ``raise translate_error(error) from error``.
    """
    if isinstance(error, TimeoutError):
        return NO_ANSWER.as_error()
    if isinstance(error, PoolTimeoutError):
        return POOL_EXHAUSTED.as_error()
    if isinstance(error, OSError) and error.errno == errno.ENOENT:
        # SQLAlchemy makes a path absolute.
        return NO_FOLDER.as_error()
    if isinstance(error, RuntimeError) and "after" in str(error) and "shutdown" in str(error):
        return ENDING.as_error()
    cause = _driver_error(error)
    code = _name(cause)
    known = find_cause(CAUSES, code, str(cause), ambiguous=_AMBIGUOUS)
    if known is None and code is None and getattr(error, "connection_invalidated", False):
        known = LOST
    if known is CONSTRAINT:
        told = _CONSTRAINT.fullmatch(str(cause))
        known = named_constraint(CONSTRAINT, told and f"{told[1]} of {told[2]}")
    if known is not None:
        return known.as_error(code)
    return unknown_cause(cause or error, code, unavailable=isinstance(error, OSError))


def _driver_error(error: BaseException) -> sqlite3.Error | None:
    """Return the exception of SQLite itself; SQLAlchemy does not wrap those of its listeners."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return cause if isinstance(cause, sqlite3.Error) else None


def _name(error: sqlite3.Error | None) -> str | None:
    """Return SQLite's name of an error; None if it comes from the module ``sqlite3`` itself."""
    name: str | None = getattr(error, "sqlite_errorname", None)
    if name != "unknown":
        return name
    # A newer SQLite has codes that Python does not know.
    return _PRIMARY_NAMES.get(getattr(error, "sqlite_errorcode", 0) & PRIMARY_CODE)


def is_stale_schema(error: sqlite3.Error) -> bool:
    """Return whether another connection has changed the schema of the file.

    SQLite has not run the statement, and reads the schema again for the next one.
    """
    code = getattr(error, "sqlite_errorcode", 0) & PRIMARY_CODE
    return bool(code == sqlite3.SQLITE_SCHEMA)


def may_be_unprepared(error: sqlite3.Error) -> bool:
    """Return whether SQLite may have compiled the statement for a schema that has changed since.

    It notices a new schema when a statement runs, but not if the old one has no such table or index
    for a trigger or a conflict.
    """
    return getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_ERROR

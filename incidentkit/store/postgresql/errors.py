"""Translate errors of PostgreSQL, of its drivers and of the network.

The one table of SQLSTATEs: pools, engines, joined connections and migrations all use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import asyncpg
from sqlalchemy.exc import DBAPIError

from incidentkit.domain.errors import SchemaOutOfDate, StoreError, StoreUnavailable
from incidentkit.store.schema import SCHEMA_REVISION

LOST: Final = (
    ConnectionError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
)
"""Exceptions of a dead connection. A statement that only reads may be sent again on another one."""

UNREADABLE_URL: Final = (ValueError, OverflowError)
"""Exceptions of asyncpg, on connecting, for a URL that it cannot parse."""

_REFUSED_OR_LOST: Final = "the connection was refused or lost"


def _out_of_date(_: str) -> StoreError:
    return SchemaOutOfDate(None, SCHEMA_REVISION)


SQLSTATES: Final[dict[str, tuple[Callable[[str], StoreError], str]]] = {
    "08": (StoreUnavailable, _REFUSED_OR_LOST),
    "25006": (StoreUnavailable, "it takes no writes: it is a standby, or set to read only"),
    "28": (StoreUnavailable, "it refused the credentials"),
    "3D": (StoreUnavailable, "there is no such database on the server"),
    "3F000": (_out_of_date, "a schema is missing"),
    "40": (StoreUnavailable, "another transaction was in the way"),
    "42703": (_out_of_date, "a column is missing"),
    "42704": (_out_of_date, "a type is missing"),
    "42883": (_out_of_date, "a function is missing"),
    "42P01": (_out_of_date, "a table is missing"),
    "53": (StoreUnavailable, "the server is out of connections, memory or disk space"),
    "55P03": (StoreUnavailable, "another session holds a lock"),
    "57": (StoreUnavailable, "the server cancelled the statement, or is shutting down"),
}
"""The error and its reason for a SQLSTATE, or for a class of them. Every other SQLSTATE is a
:class:`~incidentkit.StoreError`: trying again would not help."""

OPERATORS_CLASSES: Final = ("0A", "22", "23", "2B", "3F", "42", "55")
"""SQLSTATE classes that only an operator can resolve in a migration: show the server's message."""

_ONE_OPEN: Final = "ux_Incident_dedup_key"


def translate_error(error: BaseException) -> StoreError:
    """Return the error that a caller sees, for an exception of SQLAlchemy, a driver or the network.

    Raise it with the exception as its cause: ``raise translate_error(error) from error``.
    """
    if lost_race(error):
        return StoreUnavailable("another incident with its dedup_key was opened at the same time")
    causes = list(_causes(error))
    if any(isinstance(cause, TimeoutError) for cause in causes):
        return StoreUnavailable("it did not answer in time")
    sqlstate = next(filter(None, map(sqlstate_of, causes)), None)
    known = SQLSTATES.get(sqlstate or "") or SQLSTATES.get((sqlstate or "")[:2])
    if known is not None:
        return known[0](known[1])
    wrapped = isinstance(error, DBAPIError) and (error.connection_invalidated or not sqlstate)
    if wrapped or any(isinstance(cause, (*LOST, OSError)) for cause in causes):
        return StoreUnavailable(_REFUSED_OR_LOST)
    return StoreError(f"SQLSTATE {sqlstate}" if sqlstate else "unexpected failure of the driver")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the exception of the driver first, then those around it."""
    if isinstance(error, DBAPIError):
        yield from _causes(error.orig and (error.orig.__cause__ or error.orig))
    if error is not None:
        yield error


def sqlstate_of(error: BaseException | None) -> str | None:
    """Return the SQLSTATE of an exception of asyncpg or psycopg; None if it has none."""
    sqlstate: str | None = getattr(error, "sqlstate", None)
    return sqlstate


def lost_race(error: BaseException | None) -> bool:
    """Return whether another incident with the same key was opened at the same time."""
    return any(_constraint(cause) == _ONE_OPEN for cause in _causes(error))


def _constraint(error: BaseException) -> object:
    about: Any = getattr(error, "diag", error)
    return getattr(about, "constraint_name", None)


def refused(error: StoreError) -> bool:
    """Return whether the server answered that it did not run the statement."""
    sqlstate = next(filter(None, map(sqlstate_of, _causes(error.__cause__))), None)
    # Not if it was cancelled, or the server is gone.
    return sqlstate is not None and not sqlstate.startswith(("08", "57"))


def server_error(error: BaseException) -> asyncpg.PostgresError | None:
    """Return the error that the server sent through asyncpg; None if there is none."""
    found = (cause for cause in _causes(error) if isinstance(cause, asyncpg.PostgresError))
    return next(found, None)

"""Translate errors of PostgreSQL, of its drivers and of the network.

The one table of causes: pools, engines, joined connections and migrations all use it.
"""

from __future__ import annotations

import errno
import re
import socket
import ssl
from collections.abc import Iterable, Iterator
from typing import Any, Final

import asyncpg
from attrs import evolve
from sqlalchemy.exc import DBAPIError

from incidentkit.domain.errors import SchemaOutOfDate, StoreError, StoreUnavailable
from incidentkit.store.causes import (
    KEPT_OUT,
    NO_ANSWER,
    OLDER_WRITER,
    OTHER_THREAD,
    POOL_EXHAUSTED,
    TRANSACTION_FAILED,
    Cause,
    find_cause,
    named_constraint,
    unknown_cause,
)

LOST: Final = (
    ConnectionError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
)
"""Exceptions of a dead connection. A statement that only reads may be sent again on another one."""

UNSENT: Final = ("cannot switch to state", "not connected", "cannot perform operation: connection")
"""Prefixes of asyncpg's messages for a statement that it refuses before sending any of it."""

UNREADABLE_URL: Final = (ValueError, OverflowError)
"""Exceptions of asyncpg, on connecting, for a URL that it cannot parse."""

UNSTORABLE: Final = "22P05"
"""The SQLSTATE of a character that the encoding of the database does not have."""

AMBIGUOUS: Final = frozenset(
    {"08003", "08P01", "0A000", "22P02", "23514", "28000", "55000", "57014", "XX000"}
)
"""SQLSTATEs of several causes, which the message tells apart. Poolers use 08P01 and XX000 for most
of their own errors, and asyncpg 08003 for one that ends the connection."""

LOST_CONNECTION: Final = Cause(
    "the connection was lost",
    retryable=True,
    codes=("08",),
    text="closed the connection unexpectedly|connection is (closed|lost)|terminating connection"
    "|closed in the middle of operation$",
)
NOT_CONNECTED: Final = Cause(
    "it accepted no connection in time; check the address, the network and the server",
    retryable=True,
    text="connection timeout expired",
)
REFUSED: Final = Cause(
    "the connection was refused; check that the server runs at this address",
    retryable=True,
    text=rf"[Cc]onnection refused|\[Errno {errno.ECONNREFUSED}\]",
)
NO_SOCKET: Final = Cause(
    "no server has its socket there; check the folder, and that the server runs",
    retryable=True,
    text="socket .* failed: No such file",
)
NO_ROUTE: Final = Cause(
    "the network has no route to it; check the address and the network",
    retryable=True,
    text=rf"No route to host|[Nn]etwork is unreachable|\[Errno {errno.ENETUNREACH}\]",
)
UNKNOWN_HOST: Final = Cause(
    "its host name does not exist; correct it",
    text=rf"Name or service not known|nodename nor servname|\[Errno {socket.EAI_NONAME}\]",
)
NO_NAMES: Final = Cause(
    "its host name could not be looked up; check the name service",
    retryable=True,
    text="(could not translate|failed to resolve) host",
)
UNTRUSTED: Final = Cause(
    "its certificate is not trusted; check sslmode and sslrootcert",
    text="certificate verify failed|root certificate file",
)
NO_TLS: Final = Cause(
    "it offers no TLS, which sslmode requires; turn TLS on in the server, or correct sslmode",
    text="rejected SSL upgrade|server does not support SSL",
)
TLS_FAILED: Final = Cause(
    "TLS could not be negotiated; check the versions and certificates of both sides",
    text="SSL error|invalid response to SSL negotiation",
)
WRONG_KIND: Final = Cause(
    "no host meets target_session_attrs; if a failover is running, wait for its end",
    retryable=True,
    text="target attribute requirement|session is (not )?read-only|server is (not )?in hot standby",
)
IN_USE: Final = Cause(
    "something else uses the connection at the same time; await each call before the next",
    retryable=True,
    text="another (operation|command) is (already )?in progress",
)
POOL_CLOSED: Final = Cause(
    "the application's pool is closed, or not open yet",
    StoreError,
    text="pool is (closed|closing|not initialized)",
)
STATEMENT_MODE: Final = Cause(
    "its connection pooler is in statement mode, which allows no transactions; set the pooler to "
    "transaction or session mode",
    StoreError,
    text="not allowed in statement pooling mode",
)
NOT_UTF8: Final = Cause(
    "a stored text is not valid UTF-8; correct it, and move to a database with the encoding UTF8",
    StoreError,
    codes=("22021",),
)

CONSTRAINT: Final = Cause(
    "a constraint of the database refused the values", StoreError, codes=("23",)
)

LACKS_PRIVILEGE: Final = Cause(
    "the account lacks a privilege; grant those that the deployment guide lists",
    StoreError,
    codes=("42501",),
)

CAUSES: Final = (
    # Between the client and the server.
    REFUSED,
    NOT_CONNECTED,
    NO_ROUTE,
    NO_SOCKET,
    UNKNOWN_HOST,
    NO_NAMES,
    NO_TLS,
    UNTRUSTED,
    TLS_FAILED,
    Cause(
        "it accepts only encrypted connections; add sslmode=require to the URL",
        codes=("28000",),
        text="no encryption|SSL off|connection is insecure|(SSL|TLS) (connection )?(is )?required",
    ),
    LOST_CONNECTION,
    WRONG_KIND,
    NO_ANSWER,
    POOL_EXHAUSTED,
    POOL_CLOSED,
    IN_USE,
    OTHER_THREAD,
    # A pooler.
    STATEMENT_MODE,
    Cause(
        "the connection pooler had no free connection to its server in time; enlarge its pool",
        retryable=True,
        codes=("08P01",),
        text="query_wait_timeout",
    ),
    Cause(
        "the connection pooler cannot log in to its server; see its log",
        retryable=True,
        codes=("08P01",),
        text="server login|server_login_retry|client_login_timeout|connect failed",
    ),
    Cause(
        "the connection pooler ended the connection at one of its time limits",
        retryable=True,
        codes=("08P01",),
        text="query_timeout|idle.*timeout",
    ),
    Cause(
        "the connection pooler is shutting down, or its database is paused or disabled",
        retryable=True,
        codes=("08P01",),
        text='database ".*" is (disabled|paused)|pooler is shut',
    ),
    Cause(
        "the connection pooler refuses a parameter of the URL; see its ignore_startup_parameters",
        codes=("08P01",),
        text="unsupported startup parameter",
    ),
    Cause(
        "the connection does not know the prepared statement, as behind a connection pooler; set "
        "prepared_statements to off, or open your own pool or engine without named statements",
        StoreError,
        codes=("26000", "42P05"),
    ),
    Cause(
        "the server or a connection pooler broke off the connection",
        retryable=True,
        codes=("08P01",),
    ),
    # The account and the database.
    Cause(
        "the password is missing or wrong, or the user is unknown; correct them",
        codes=("28P01",),
        text="authentication failed|no password supplied|no such user|user not found",
    ),
    Cause(
        "it does not admit this user from this address; check its roles and pg_hba.conf",
        codes=("28",),
        text='no pg_hba.conf entry|role ".*" (does not exist|is not permitted)',
    ),
    Cause(
        "it has no such database; create it, or correct the name",
        codes=("3D000",),
        text='database ".*" does not exist|no such database',
    ),
    LACKS_PRIVILEGE,
    # The state of the server.
    Cause(
        "it is starting up, shutting down or recovering",
        retryable=True,
        codes=("57P03",),
        text="the database system is ",
    ),
    Cause(
        "its database accepts no connections at present",
        retryable=True,
        codes=("55000",),
        text="not (currently )?accepting connections",
    ),
    Cause(
        "it takes no more connections; lower DB_POOL_SIZE, or raise the limit of the server or "
        "the pooler",
        retryable=True,
        codes=("53300",),
        text="too many (clients|connections)|remaining connection slots"
        "|no more connections allowed|[Mm]ax ?clients? .*reached|[Mm]ax client connections",
    ),
    Cause("its disk is full; free space on the server", codes=("53100",)),
    Cause("it is out of memory", retryable=True, codes=("53200",)),
    Cause(
        "the statement exceeds a limit of the server, such as temp_file_limit",
        codes=("53400", "54"),
    ),
    Cause("it is out of resources", retryable=True, codes=("53",)),
    Cause(
        "it takes no writes: it is a standby, or set to read only; connect to the primary",
        codes=("25006",),
    ),
    Cause(
        "an administrator ended the connection, or the server is shutting down",
        retryable=True,
        codes=("57P01",),
    ),
    Cause(
        "a process of the server crashed; the server is recovering",
        retryable=True,
        codes=("57P02",),
    ),
    Cause("its database was dropped", codes=("57P04",)),
    Cause(
        "the server ended the connection at one of its time limits",
        retryable=True,
        codes=("25P03", "25P04", "57P05"),
    ),
    Cause("an operator intervened", retryable=True, codes=("57",)),
    Cause("it cannot read or write its files; see its log", codes=("58",)),
    Cause("its data are damaged; see its log", StoreError, codes=("XX001", "XX002")),
    # Other sessions.
    Cause(
        "the statement exceeded the server's statement_timeout",
        retryable=True,
        codes=("57014",),
        text="statement timeout",
    ),
    Cause(
        "another session cancelled the statement",
        retryable=True,
        codes=("57014",),
        text="user request",
    ),
    Cause("the server cancelled the statement", retryable=True, codes=("57014",)),
    Cause("another session holds a lock that it needs", retryable=True, codes=("55P03",)),
    Cause(
        "it was in a deadlock with another transaction, and was undone to resolve it",
        retryable=True,
        codes=("40P01",),
    ),
    Cause("a concurrent transaction came first", retryable=True, codes=("40001",)),
    Cause("the transaction was rolled back", retryable=True, codes=("40",)),
    # The statement and its values.
    TRANSACTION_FAILED,
    NOT_UTF8,
    Cause(
        "a text has a character that the encoding of the database does not have",
        StoreError,
        codes=(UNSTORABLE,),
    ),
    Cause(
        "psycopg reads times only in ISO format; set DateStyle to ISO on the connection",
        StoreError,
        text="with DateStyle",
    ),
    evolve(OLDER_WRITER, codes=("23514",)),
    evolve(KEPT_OUT, codes=("22P02",)),
    Cause(
        "a rule of the database rewrites the statement; drop it, or replace it by a trigger",
        StoreError,
        codes=("0A000",),
        text="rewritten by|DO INSTEAD|on relation .* with (INSERT|UPDATE) rules",
    ),
    Cause(
        "a trigger of the database gives two incidents of one call the same dedup_key; let it "
        "keep their keys different",
        StoreError,
        codes=("21000",),
    ),
    Cause(
        "a unique index is missing or was changed; run `incidentkit db upgrade`",
        StoreError,
        codes=("42P10",),
    ),
    CONSTRAINT,
    Cause("a trigger or function of the database raised an error", StoreError, codes=("P0",)),
    Cause(
        "the schema was changed after the statement was prepared",
        retryable=True,
        codes=("0A000",),
        text="cached (statement )?plan",
    ),
    Cause(
        "a part of the schema is missing",
        SchemaOutOfDate,
        # A schema, a column, a type, a function, a table.
        codes=("3F000", "42703", "42704", "42883", "42P01"),
    ),
)
"""Every known cause. A failure with any other SQLSTATE is a :class:`~incidentkit.StoreError` that
names it."""

OPERATORS_CLASSES: Final = ("0A", "22", "23", "2B", "3F", "42", "55")
"""SQLSTATE classes that only an operator can resolve in a migration: show the server's message."""

_BY_ERRNO: Final = {
    errno.ECONNREFUSED: REFUSED,
    errno.ENOENT: NO_SOCKET,
    errno.EHOSTUNREACH: NO_ROUTE,
    errno.ENETUNREACH: NO_ROUTE,
}

_BY_TYPE: Final[tuple[tuple[type[BaseException], Cause], ...]] = (
    (ConnectionRefusedError, REFUSED),
    (ssl.SSLCertVerificationError, UNTRUSTED),
    (ssl.SSLError, TLS_FAILED),
    (UnicodeDecodeError, NOT_UTF8),
    # The network gave up: the time limits of asyncio have no errno.
    (TimeoutError, LOST_CONNECTION),
)

_KINDS: Final = "(?:foreign )?table|(?:materialized )?view|sequence|schema|function|type|database"
_DENIED: Final = re.compile(rf'for ({_KINDS}) "?(.+?)"?$')
"""Matches the end of a message about a missing privilege: the kind and name of the object."""

_OWN_NAME: Final = re.compile(r"\b(?:Incident|incident_|incidentkit_|request_log)\w*")

_ONE_OPEN: Final = "ux_Incident_dedup_key"


def translate_error(error: BaseException, *, connecting: bool = False) -> StoreError:
    """Return the error that a caller sees, for an exception of SQLAlchemy, a driver or the network.

    Raise it with the exception as its cause: ``raise translate_error(error) from error``.

    Args:
        error: The exception.
        connecting: Whether a time limit that passed was that of a new connection.
    """
    if lost_race(error):
        return StoreUnavailable(
            "another incident with its dedup_key was opened at the same time",
            sqlstate=asyncpg.UniqueViolationError.sqlstate,
        )
    causes = list(_causes(error))
    sqlstate = next(filter(None, map(sqlstate_of, causes)), None)
    cause = None if sqlstate else _cause_by_type(causes, connecting=connecting)
    if cause is None:
        cause = find_cause(CAUSES, sqlstate, str(causes[0]), ambiguous=AMBIGUOUS)
    if cause is None and sqlstate is None and any(map(_is_lost, causes)):
        cause = LOST_CONNECTION
    if cause is LACKS_PRIVILEGE:
        return _lacks_privilege(str(causes[0])).as_error(sqlstate)
    if cause is CONSTRAINT:
        cause = named_constraint(CONSTRAINT, _constraint(causes[0]))
    if cause is not None:
        return cause.as_error(sqlstate)
    # Without a SQLSTATE, the driver or the network has failed, and not the statement.
    down = sqlstate is None and any(map(_is_down, causes))
    return unknown_cause(causes[0], sqlstate, unavailable=down)


def _lacks_privilege(message: str) -> Cause:
    """Return the cause with the object that the server names in its message."""
    first, *_ = message.splitlines() or [""]
    denied = _DENIED.search(first)
    # In another language than English, the names are the same.
    own = None if denied else _OWN_NAME.search(first)
    if denied is None and own is None:
        return LACKS_PRIVILEGE
    named = f"the {denied[1]} {denied[2]}" if denied else own and own[0]
    reason = LACKS_PRIVILEGE.reason.replace("privilege", f"privilege on {named}", 1)
    return evolve(LACKS_PRIVILEGE, reason=reason)


def _cause_by_type(causes: Iterable[BaseException], *, connecting: bool) -> Cause | None:
    for error in causes:
        if isinstance(error, TimeoutError) and (connecting or error.errno is None):
            return NOT_CONNECTED if connecting else NO_ANSWER
        for kind, cause in _BY_TYPE:
            if isinstance(error, kind):
                return cause
        if isinstance(error, socket.gaierror):
            return NO_NAMES if error.errno == socket.EAI_AGAIN else UNKNOWN_HOST
        if isinstance(error, OSError) and error.errno in _BY_ERRNO:
            return _BY_ERRNO[error.errno]
    return None


def _is_lost(error: BaseException) -> bool:
    return lost_connection(error) or getattr(error, "connection_invalidated", False)


def _is_down(error: BaseException) -> bool:
    # Of a host's own driver, the exception that PEP 249 has for it.
    operational = any(each.__name__ == "OperationalError" for each in type(error).__mro__)
    return operational or isinstance(error, (OSError, DBAPIError))


def is_unsent(error: BaseException | None) -> bool:
    """Return whether asyncpg refused a statement before any of it was sent.

    It does so once the server has announced the end of the connection, until the connection ends.
    """
    return any(
        isinstance(cause, (asyncpg.InternalClientError, asyncpg.InterfaceError))
        and str(cause).startswith(UNSENT)
        for cause in _causes(error)
    )


def lost_connection(error: BaseException) -> bool:
    """Return whether an exception of asyncpg means that the connection is dead."""
    # For a value that it cannot encode, asyncpg raises an InterfaceError too.
    return isinstance(error, LOST) and not isinstance(error, asyncpg.DataError)


def lost_before(error: BaseException) -> bool:
    """Return whether the network refused a statement on a connection that asyncpg thought alive.

    A connection that the server itself ends raises no network error.
    """
    return isinstance(error.__cause__ or error, ConnectionError)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the exception of the driver first, then those around it."""
    if isinstance(error, DBAPIError):
        yield from _causes(error.orig and (error.orig.__cause__ or error.orig))
    if isinstance(error, asyncpg.DataError) and isinstance(error.__cause__, UnicodeEncodeError):
        yield error.__cause__
    if error is not None:
        yield error


def sqlstate_of(error: BaseException | None) -> str | None:
    """Return the SQLSTATE of an exception of asyncpg or psycopg; None if it has none."""
    # psycopg2 has another name for it.
    sqlstate: str | None = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return sqlstate


def lost_race(error: BaseException | None) -> bool:
    """Return whether another incident with the same key was opened at the same time."""
    return any(_constraint(cause) == _ONE_OPEN for cause in _causes(error))


def unstorable(error: BaseException | None) -> str | None:
    """Return the character that the database's encoding does not have, if that is the cause."""
    for cause in _causes(error):
        if isinstance(cause, UnicodeEncodeError):
            # psycopg encodes for the database, and both drivers for their connection.
            return str(cause.object[cause.start])
        if sqlstate_of(cause) == UNSTORABLE:
            # The message has the bytes of the character, in every language.
            octets = re.findall(r"0x([0-9a-f]{2})", str(cause))
            return bytes.fromhex("".join(octets)).decode(errors="replace") or None
    return None


def _constraint(error: BaseException) -> str | None:
    """Return the name of the constraint that an exception of asyncpg or psycopg tells of."""
    about: Any = getattr(error, "diag", error)
    column = getattr(about, "column_name", None)
    return getattr(about, "constraint_name", None) or (column and f"NOT NULL of {column}")


def refused(error: StoreError) -> bool:
    """Return whether the server answered that it did not run the statement."""
    causes = list(_causes(error.__cause__))
    sqlstate = next(filter(None, map(sqlstate_of, causes)), None)
    if sqlstate is None:
        # The driver could not encode a text, and sent nothing.
        return any(isinstance(cause, UnicodeEncodeError) for cause in causes)
    # Not if it was cancelled, or the server is gone.
    return not sqlstate.startswith(("08", "57"))


def server_error(error: BaseException) -> asyncpg.PostgresError | None:
    """Return the error that the server sent through asyncpg; None if there is none."""
    found = (cause for cause in _causes(error) if isinstance(cause, asyncpg.PostgresError))
    return next(found, None)

"""Recognize a host's SQLAlchemy objects, run statements on them, and translate its errors.

This module never loads ``sqlalchemy.ext.asyncio``, which loads the ORM: a host that uses it has
loaded it already.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import (
    Connection,
    CursorResult,
    Engine,
    Executable,
    SingletonThreadPool,
    StaticPool,
)
from sqlalchemy.exc import (
    DBAPIError,
    InvalidRequestError,
    ResourceClosedError,
    UnboundExecutionError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from incidentkit.domain.errors import InvalidSettings, NotInTransaction, StoreError
from incidentkit.store.causes import POOL_EXHAUSTED, TRANSACTION_FAILED
from incidentkit.store.executor import Rows
from incidentkit.store.sql.naming import TRANSLATE_MAP
from incidentkit.store.sql.rows import unreadable_row

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
    from sqlalchemy.orm import Session
    from typing_extensions import TypeIs

_BUFFERED: Final[Mapping[str, Any]] = {"stream_results": False, "yield_per": None}
"""Options against those of a host that streams: PostgreSQL has no cursor for a write."""

USUAL_MAXIMUM: Final = 15
"""Maximum number of connections of a SQLAlchemy engine with default options."""


def is_engine(value: object) -> TypeIs[AsyncEngine]:
    """Return whether a value is SQLAlchemy's ``AsyncEngine``."""
    return _is_a("AsyncEngine", value)


def is_connection(value: object) -> TypeIs[AsyncConnection]:
    """Return whether a value is SQLAlchemy's ``AsyncConnection``."""
    return _is_a("AsyncConnection", value)


def is_session(value: object) -> TypeIs[AsyncSession]:
    """Return whether a value is SQLAlchemy's ``AsyncSession``."""
    return _is_a("AsyncSession", value)


def _is_a(name: str, value: object) -> bool:
    # An instance exists only if the module of its class is loaded.
    module = sys.modules.get("sqlalchemy.ext.asyncio")
    return module is not None and isinstance(value, getattr(module, name))


def engine_of(host: Connection | Session) -> Engine:
    """Return the engine of a connection or a session.

    Raises:
        TypeError: If the session is on several databases, or on none.
    """
    try:
        return host.engine if isinstance(host, Connection) else host.get_bind().engine
    except UnboundExecutionError:
        raise TypeError("Only a session on one database can be joined, or its connection") from None


def check_joinable(connection: Connection | None) -> None:
    """Raise unless the statements on a connection can be in a transaction.

    Args:
        connection: The connection; None: it was not opened.

    Raises:
        NotInTransaction: If it is closed, or commits each statement by itself.
    """
    if connection is None or connection.closed or _commits_by_itself(connection):
        raise NotInTransaction


async def fetch_rows(
    connection: AsyncConnection, statement: Executable, values: Mapping[str, Any]
) -> Rows:
    """Run a statement on a connection of SQLAlchemy.

    Raises:
        InvalidSettings: If the host moves the tables to another schema.
    """
    return all_rows(await execute(connection, statement, values))


def all_rows(result: CursorResult[Any]) -> Rows:
    """Return all rows of a result."""
    try:
        return result.all() if result.returns_rows else ()
    except (TypeError, ValueError) as error:
        raise unreadable_row() from error


async def execute(
    connection: AsyncConnection,
    statement: Executable,
    values: Mapping[str, Any] | Sequence[Mapping[str, Any]],
) -> CursorResult[Any]:
    """Execute a statement in its own schema or, without one, by the connection's search path.

    Raises:
        InvalidSettings: If the statement has no schema, and the host moves the tables to one.
    """
    options = options_to_execute(connection.sync_connection, statement)
    return await connection.execute(statement, values, execution_options=options)


def options_to_execute(connection: Connection | None, statement: Executable) -> Any:
    """Return the options that keep a statement in its own schema, if it has one, and buffer it.

    Args:
        connection: The connection to execute it on; None: it is not open yet.
        statement: The statement.

    Raises:
        InvalidSettings: If the statement has no schema, and the host moves the tables to one.
    """
    own = statement.get_execution_options()
    options: Mapping[str, Any] = {} if connection is None else connection.get_execution_options()
    streams = options.get("stream_results") or options.get("yield_per")
    buffered = _BUFFERED if streams else {}
    if TRANSLATE_MAP in own:
        # Otherwise the options of the connection would win.
        return {**own, **buffered}
    host = options.get(TRANSLATE_MAP)
    if not host:
        return buffered or None
    if host.get(None) is not None:
        reason = (
            "moves tables without a schema, and so those of incidentkit too: "
            "name their schema with schema=, or use an engine or connection without the map"
        )
        raise InvalidSettings(TRANSLATE_MAP, reason)
    # Without the map: a cached statement works either with the key None in it or without.
    return {TRANSLATE_MAP: {}, **buffered}


def is_ended(error: Exception) -> bool:
    """Return whether SQLAlchemy refused a statement because its transaction has ended."""
    return isinstance(error, ResourceClosedError) or type(error) is InvalidRequestError


def translate_sqlalchemy_error(error: Exception) -> StoreError | None:
    """Return the error for an exception of SQLAlchemy itself; None if it is a driver's."""
    if isinstance(error, PoolTimeoutError):
        return POOL_EXHAUSTED.as_error()
    if isinstance(error, InvalidRequestError):
        return TRANSACTION_FAILED.as_error()
    return None


def is_lost(error: BaseException | None) -> bool:
    """Return whether SQLAlchemy found the connection dead."""
    return isinstance(error, DBAPIError) and error.connection_invalidated


def pool_maximum(engine: AsyncEngine) -> int:
    """Return the number of connections of an engine, or the usual number if it has no bound."""
    pool: Any = engine.pool
    size = getattr(pool, "size", None)
    overflow = getattr(pool, "_max_overflow", -1)
    return USUAL_MAXIMUM if size is None or overflow < 0 else max(1, size() + overflow)


def with_isolation(engine: AsyncEngine, level: str) -> AsyncEngine:
    """Return a host's engine with another isolation level."""
    try:
        return engine.execution_options(isolation_level=level)
    except InvalidRequestError:
        # Before SQLAlchemy 2.0.38, an engine with options takes no isolation level.
        root: Any = engine.sync_engine
        options = {**root.get_execution_options(), "isolation_level": level}
        while hasattr(root, "_proxied"):
            root = root._proxied  # noqa: SLF001
        return type(engine)(root.execution_options(**options))


def refuse_shared_connection(engine: AsyncEngine) -> None:
    """Refuse an engine whose callers all get the same connection.

    A call of the client that returns the connection would end the host's transaction on it.

    Raises:
        InvalidSettings: With the name of the pool.
    """
    if isinstance(engine.pool, (StaticPool, SingletonThreadPool)):
        raise InvalidSettings(
            "database",
            f"must not be an engine with {type(engine.pool).__name__}, whose callers share one "
            "connection and end each other's transactions: use another pool",
        )


def _commits_by_itself(connection: Connection) -> bool:
    """Return whether each statement on the connection is a transaction of its own."""
    default = getattr(connection.dialect, "_on_connect_isolation_level", None)
    level = connection.get_execution_options().get("isolation_level", default)
    return bool(level == "AUTOCOMMIT")


def has_every_character(driver: Any) -> bool:
    """Return whether the database of a connection can hold every character.

    Args:
        driver: The connection of asyncpg or psycopg; for any other one, the result is True.
    """
    if hasattr(driver, "get_settings"):
        encoding = getattr(driver.get_settings(), "server_encoding", None)
    else:
        info = getattr(driver, "info", None)
        encoding = None if info is None else info.parameter_status("server_encoding")
    return encoding in (None, "UTF8", "SQL_ASCII")


async def sqlite_driver(connection: AsyncConnection) -> Any:
    """Return the driver's connection of a connection on SQLite."""
    raw: Any = await connection.get_raw_connection()
    return raw.driver_connection


async def in_sqlite_transaction(connection: AsyncConnection) -> bool:
    """Return whether SQLite itself is in a transaction, which SQLAlchemy may not know."""
    return bool((await sqlite_driver(connection)).in_transaction)

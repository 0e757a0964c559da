"""Refuse a host's SQLAlchemy engine or connection that is unsafe behind a connection pooler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

import asyncpg
from sqlalchemy import NullPool

from incidentkit.store.postgresql.poolers import (
    NAME,
    behind_pooler,
    numbers_statements,
    renames_statements,
    unsafe_names,
)

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

_ASYNCPG: Final = (
    "create the engine with "
    'connect_args={"statement_cache_size": 0, "prepared_statement_name_func": str}'
)
_NUMBERS_ANYWAY: Final = tuple(map(int, asyncpg.__version__.split(".")[:2])) < (0, 31)
"""Whether asyncpg numbers the statements of SQLAlchemy even without a cache of its own."""

PSYCOPG: Final = 'create the engine with connect_args={"prepare_threshold": None}'

_safe: Final[WeakSet[object]] = WeakSet()
"""The pools of engines on whose connections no other process's statement can run."""


async def check_joined(connection: AsyncConnection) -> None:
    """Refuse a connection to join that is unsafe behind a pooler; ask once for each engine.

    Raises:
        InvalidSettings: With the remedy.
    """
    pool = connection.engine.pool
    if pool not in _safe:
        await check_sqlalchemy(connection, "connection")
        _safe.add(pool)


async def check_sqlalchemy(connection: AsyncConnection, setting: str) -> bool:
    """Refuse a connection behind a pooler if other processes may use the same statement names.

    Args:
        connection: A connection of an engine with any driver; its transaction is left as it is.
        setting: The host's argument, for the error: the database, or a connection to join.

    Returns:
        Whether a statement is prepared under a unique name, which only its transaction finds.

    Raises:
        InvalidSettings: With the remedy.
    """
    raw = await connection.get_raw_connection()
    driver: Any = raw.driver_connection
    if isinstance(driver, asyncpg.Connection):
        return await _check_asyncpg(connection, raw.dbapi_connection, driver, setting)
    # Only psycopg prepares at a threshold.
    if getattr(driver, "prepare_threshold", None) is not None and await _psycopg_pooled(driver):
        raise unsafe_names(setting, PSYCOPG)
    return False


async def _check_asyncpg(
    connection: AsyncConnection,
    adapter: Any,
    driver: asyncpg.Connection[asyncpg.Record],
    setting: str,
) -> bool:
    name = getattr(adapter, "_prepared_statement_name_func", _number)()
    numbers = numbers_statements(driver) or (name is None and _NUMBERS_ANYWAY)
    if not (numbers or name) or not await behind_pooler(driver):
        return False
    async with driver.transaction():
        if await renames_statements(driver):
            return False
    keeps = getattr(adapter, "_prepared_statement_cache", None) is not None
    once = not keeps or isinstance(connection.engine.pool, NullPool)
    if numbers or not once or not NAME.search(str(name).replace("-", "")):
        raise unsafe_names(setting, _ASYNCPG)
    return True


def _number() -> str:
    """Stand in for the numbered names of a driver."""
    return "1"


async def _psycopg_pooled(driver: Any) -> bool:
    """Return whether a connection of psycopg is behind a pooler."""
    async with driver.cursor() as cursor:
        # Never prepared, regardless of the threshold.
        await cursor.execute("SELECT pg_backend_pid()", prepare=False)
        (answering,) = await cursor.fetchone()
    return bool(answering != driver.info.backend_pid)

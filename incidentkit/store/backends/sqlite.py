"""Stores and joined operations on SQLite."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from sqlalchemy.engine import URL

import incidentkit.store.hosts as synchronous
from incidentkit.domain.errors import InvalidSettings
from incidentkit.store.hosts.connections import SqlalchemyConnection, SqliteHostExecutor
from incidentkit.store.hosts.sqlalchemy import (
    is_connection,
    is_engine,
    is_session,
    refuse_shared_connection,
)
from incidentkit.store.hosts.sqlite_engine import SqliteEngineExecutor, file_url
from incidentkit.store.options import StoreOptions
from incidentkit.store.ports import Migrations, StoreOperations
from incidentkit.store.records import Records
from incidentkit.store.sqlite.dialect import SqliteDialect
from incidentkit.store.sqlite.errors import translate_error
from incidentkit.store.sqlite.threads import ThreadsExecutor
from incidentkit.store.sqlite.url import MEMORY, place_of, sqlite_url
from incidentkit.store.store import Store

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine


def sqlite_store(
    database: object, options: StoreOptions | None, load_migrations: Callable[[], Migrations]
) -> Store:
    """Return the store, not yet open, on a URL or on SQLAlchemy's ``AsyncEngine``.

    Args:
        database: ``sqlite+aiosqlite:///file``, with a fourth slash for an absolute path;
            ``sqlite+aiosqlite:///:memory:`` for a database that lives as long as the store is open;
            or a host's engine.
        options: Sizes and time limits; None: the defaults.
        load_migrations: Loads the migrations, if the schema is outdated when the store opens.

    Raises:
        InvalidSettings: If the database is something else, or the URL cannot be parsed.
    """
    if isinstance(database, str):
        return _file_store(sqlite_url(database), options or StoreOptions(), load_migrations)
    if is_engine(database) and database.dialect.name == "sqlite":
        return _engine_store(database, load_migrations)
    raise InvalidSettings(
        "database", "must be a URL, an AsyncEngine on PostgreSQL or SQLite, or a pool of asyncpg"
    )


def _file_store(
    url: URL, options: StoreOptions, load_migrations: Callable[[], Migrations]
) -> Store:
    executor = ThreadsExecutor(url, options)

    async def upgrade() -> None:
        # In a thread: Alembic takes long to load.
        migrations = await asyncio.to_thread(load_migrations)
        if url.database in MEMORY:
            await executor.run(migrations.create_in_memory)
        else:
            await migrations.upgrade(url.render_as_string(hide_password=False))

    return Store(SqliteDialect(), executor, join=join, join_sync=join_sync, upgrade=upgrade)


def _engine_store(engine: AsyncEngine, load_migrations: Callable[[], Migrations]) -> Store:
    url = file_url(engine)
    if url.database not in MEMORY:
        refuse_shared_connection(engine)

    async def upgrade() -> None:
        # In a thread: Alembic takes long to load.
        migrations = await asyncio.to_thread(load_migrations)
        if url.database in MEMORY:
            await migrations.upgrade_memory(engine)
        else:
            await migrations.upgrade(url.render_as_string(hide_password=False))

    return Store(
        SqliteDialect(),
        SqliteEngineExecutor(engine),
        join=join,
        join_sync=join_sync,
        upgrade=upgrade,
    )


def join(connection: object) -> StoreOperations:
    """Return the operations in the transaction of a host's connection.

    Args:
        connection: SQLAlchemy's ``AsyncConnection`` or ``AsyncSession``.

    Raises:
        NotInTransaction: If it commits each statement by itself.
        TypeError: If it is something else, or connected to another kind of database.
    """
    if is_connection(connection) or is_session(connection):
        host = SqlalchemyConnection(connection, "sqlite", translate_error, place_of)
        return Records(SqliteDialect(), SqliteHostExecutor(host, asyncio.Lock()))
    # By name: asyncpg is not loaded for SQLite.
    if type(connection).__module__.partition(".")[0] == "asyncpg":
        raise TypeError("The client is on sqlite, not on postgresql")
    raise TypeError(
        "Only SQLAlchemy's AsyncConnection and AsyncSession, and asyncpg's Connection, can be "
        f"joined, not {type(connection).__name__}; without an event loop, use SyncIncidentClient"
    )


def join_sync(connection: object) -> StoreOperations:
    """Return the operations in the transaction of a host's synchronous connection.

    They never suspend.

    Args:
        connection: SQLAlchemy's ``Connection`` or ``Session``, ``sqlite3.Connection``, or Django's
            connection.

    Raises:
        NotInTransaction: If it commits each statement by itself.
        TypeError: If it is something else, or connected to another kind of database.
    """
    host = synchronous.sqlite_host(connection)
    return Records(SqliteDialect(), SqliteHostExecutor(host, synchronous.ThreadTurn()))

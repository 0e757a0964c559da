"""Stores and joined operations on PostgreSQL."""

from __future__ import annotations

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from incidentkit.domain.errors import InvalidSettings
from incidentkit.store.hosts.asyncpg import AsyncpgConnection
from incidentkit.store.hosts.connections import HostExecutor, SqlalchemyConnection
from incidentkit.store.hosts.postgresql_engine import PostgresEngineExecutor
from incidentkit.store.hosts.sqlalchemy import is_connection, is_engine, is_session
from incidentkit.store.options import StoreOptions
from incidentkit.store.ports import StoreOperations
from incidentkit.store.postgresql.dialect import PostgresDialect
from incidentkit.store.postgresql.errors import translate_error
from incidentkit.store.postgresql.pool import PoolExecutor
from incidentkit.store.postgresql.sharing import PostgresSharing
from incidentkit.store.records import Records
from incidentkit.store.store import Store


def postgresql_store(database: object, options: StoreOptions | None = None) -> Store:
    """Return the store, not yet open, on a URL, on SQLAlchemy's ``AsyncEngine`` or a pool.

    The schema is checked when the store opens, never changed: ``incidentkit db upgrade`` does that.

    Raises:
        InvalidSettings: If the database is something else.
    """
    dialect = PostgresDialect()
    if isinstance(database, (str, asyncpg.Pool)):
        pool = PoolExecutor(database, options)
        return Store(dialect, pool, join=join, share=lambda: PostgresSharing(dialect, pool))
    if is_engine(database):
        engine = PostgresEngineExecutor(database)
        return Store(
            dialect,
            engine,
            join=join,
            share=lambda: PostgresSharing(dialect, engine, in_transactions=True),
        )
    raise InvalidSettings(
        "database", "must be a URL, an AsyncEngine on PostgreSQL or SQLite, or a pool of asyncpg"
    )


def join(connection: object) -> StoreOperations:
    """Return the operations in the transaction of a host's connection.

    Args:
        connection: SQLAlchemy's ``AsyncConnection`` or ``AsyncSession``, or asyncpg's connection.

    Raises:
        NotInTransaction: If it commits each statement by itself.
        TypeError: If it is something else, or connected to another kind of database.
    """
    if is_connection(connection) or is_session(connection):
        host = SqlalchemyConnection(connection, "postgresql", translate_error)
        return Records(PostgresDialect(), HostExecutor(host))
    if isinstance(connection, (asyncpg.Connection, PoolConnectionProxy)):
        return Records(PostgresDialect(), HostExecutor(AsyncpgConnection(connection)))
    raise TypeError(
        "Only SQLAlchemy's AsyncConnection and AsyncSession, and asyncpg's Connection, can be "
        f"joined, not {type(connection).__name__}"
    )

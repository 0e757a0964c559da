"""Stores and joined operations on PostgreSQL."""

from __future__ import annotations

import asyncio
from functools import partial

import asyncpg
from asyncpg.pool import PoolConnectionProxy
from attrs import evolve

import incidentkit.store.hosts as synchronous
from incidentkit.domain.errors import InvalidSettings
from incidentkit.store.executor import OwnExecutor
from incidentkit.store.hosts.asyncpg import AsyncpgConnection, HostPool
from incidentkit.store.hosts.connections import HostExecutor, SqlalchemyConnection
from incidentkit.store.hosts.poolers import check_joined
from incidentkit.store.hosts.postgresql_engine import PostgresEngineExecutor
from incidentkit.store.hosts.sqlalchemy import (
    is_connection,
    is_engine,
    is_session,
    pool_maximum,
    refuse_shared_connection,
)
from incidentkit.store.options import StoreOptions
from incidentkit.store.ports import StoreOperations
from incidentkit.store.postgresql.connections import OwnConnections
from incidentkit.store.postgresql.connector import Connector
from incidentkit.store.postgresql.dialect import PostgresDialect
from incidentkit.store.postgresql.errors import translate_error
from incidentkit.store.postgresql.namespace import Namespace, OwnSchemaExecutor, SchemaExecutor
from incidentkit.store.postgresql.pool import PoolExecutor
from incidentkit.store.postgresql.sharing import PostgresSharing
from incidentkit.store.postgresql.url import Server, parse_url, place_of, place_of_pool
from incidentkit.store.records import Records
from incidentkit.store.store import Store
from incidentkit.store.turns import Turns


def postgresql_store(
    database: object, options: StoreOptions | None = None, schema: str | None = None
) -> Store:
    """Return the store, not yet open, on a URL, on SQLAlchemy's ``AsyncEngine`` or a pool.

    The schema is checked when the store opens, never changed: ``incidentkit db upgrade`` does that.

    Args:
        database: The URL, the engine or the pool.
        options: Sizes and time limits; for an engine or a pool, only ``prepared_statements``.
        schema: The schema of the tables; None: the search path of each connection decides.

    Raises:
        InvalidSettings: If the database is something else.
    """
    options = options or StoreOptions()
    trusted = options.prepared_statements is True
    if isinstance(database, str):
        server = parse_url(database)
        if options.prepared_statements is None:
            options = evolve(options, prepared_statements=server.prepared_statements)
        maximum = options.pool_size + options.max_overflow
        connections = partial(_own_connections, server, options)
        own = PoolExecutor(connections, options.pool_timeout, server.place)
        return _store(own, maximum, options, schema)
    if isinstance(database, asyncpg.Pool):
        maximum = database.get_max_size()
        lent = partial(HostPool, database, options.pool_timeout, trusted=trusted)
        pool = PoolExecutor(lent, options.pool_timeout, place_of_pool(database))
        return _store(pool, maximum, options, schema)
    if is_engine(database):
        refuse_shared_connection(database)
        maximum = pool_maximum(database)
        engine = PostgresEngineExecutor(database, maximum, options.pool_timeout, trusted=trusted)
        return _store(engine, maximum, options, schema, in_transactions=True)
    raise InvalidSettings(
        "database", "must be a URL, an AsyncEngine on PostgreSQL or SQLite, or a pool of asyncpg"
    )


def _store(
    executor: OwnExecutor,
    maximum: int,
    options: StoreOptions,
    schema: str | None,
    *,
    in_transactions: bool = False,
) -> Store:
    """Return the store on an executor with this number of connections."""
    dialect = PostgresDialect(schema)
    namespace = None if schema is None else Namespace(schema)
    if namespace is not None:
        executor = OwnSchemaExecutor(executor, namespace)
    trusted = options.prepared_statements is True
    return Store(
        dialect,
        executor,
        join=partial(join, trusted=trusted, namespace=namespace),
        join_sync=partial(join_sync, trusted=trusted, namespace=namespace),
        share=lambda own: PostgresSharing(dialect, own, in_transactions=in_transactions),
        turns=lambda: Turns(max(1, maximum // 2), options.statement_timeout),
    )


def _own_connections(server: Server, options: StoreOptions) -> OwnConnections:
    return OwnConnections(Connector(server, options), options)


def join(
    connection: object, *, trusted: bool = False, namespace: Namespace | None = None
) -> StoreOperations:
    """Return the operations in the transaction of a host's connection.

    Args:
        connection: SQLAlchemy's ``AsyncConnection`` or ``AsyncSession``, or asyncpg's connection.
        trusted: Whether it may name prepared statements behind a pooler as it likes.
        namespace: The schema of the tables; None: the search path of the connection decides.

    Raises:
        NotInTransaction: If it commits each statement by itself.
        TypeError: If it is something else, or connected to another kind of database.
    """
    if is_connection(connection) or is_session(connection):
        check = None if trusted else check_joined
        host = SqlalchemyConnection(connection, "postgresql", translate_error, place_of, check)
        return _joined(HostExecutor(host, asyncio.Lock()), namespace)
    if isinstance(connection, (asyncpg.Connection, PoolConnectionProxy)):
        own = AsyncpgConnection(connection, trusted=trusted)
        return _joined(HostExecutor(own, asyncio.Lock()), namespace)
    raise TypeError(
        "Only SQLAlchemy's AsyncConnection and AsyncSession, and asyncpg's Connection, can be "
        f"joined, not {type(connection).__name__}; without an event loop, use SyncIncidentClient"
    )


def join_sync(
    connection: object, *, trusted: bool = False, namespace: Namespace | None = None
) -> StoreOperations:
    """Return the operations in the transaction of a host's synchronous connection.

    They never suspend. The arguments are those of :func:`join`, except for the connection.

    Args:
        connection: SQLAlchemy's ``Connection`` or ``Session``, psycopg's ``Connection``, or
            Django's connection.
        trusted: As for :func:`join`.
        namespace: As for :func:`join`.

    Raises:
        NotInTransaction: If it commits each statement by itself.
        TypeError: If it is something else, or connected to another kind of database.
    """
    host = synchronous.postgresql_host(connection, trusted=trusted)
    return _joined(HostExecutor(host, synchronous.ThreadTurn()), namespace)


def _joined(executor: HostExecutor, namespace: Namespace | None) -> StoreOperations:
    if namespace is None:
        return Records(PostgresDialect(), executor)
    return Records(PostgresDialect(namespace.schema), SchemaExecutor(executor, namespace))

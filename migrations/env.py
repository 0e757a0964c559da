"""Run the migrations with Alembic, from its command line or from incidentkit."""

from __future__ import annotations

import asyncio
from logging.config import fileConfig
from typing import Any

from alembic import context
from sqlalchemy import Connection

from incidentkit.settings import Settings
from incidentkit.store import migrate
from incidentkit.store.migrate import adopt
from incidentkit.store.schema import VERSION_TABLE
from incidentkit.store.sql.tables import TEXT_INDEX, metadata, schema_on_postgresql

LOCK_KEY = 0x696E636964656E74
"""The key of the advisory lock for migrations on PostgreSQL: "incident" in ASCII."""


def is_ours(name: str | None, type_: str, _: Any) -> bool:
    """Limit autogenerate to incidentkit's tables: the database may be a host's."""
    if type_ == "index":
        return name != TEXT_INDEX
    return type_ != "table" or name in metadata.tables


def run_migrations(connection: Connection) -> None:
    """Run the requested migrations in one transaction, one process at a time."""
    context.configure(
        connection=connection,
        target_metadata=(
            schema_on_postgresql() if connection.dialect.name == "postgresql" else metadata
        ),
        version_table=VERSION_TABLE,
        include_name=is_ours,
        render_as_batch=connection.dialect.name == "sqlite",
        transactional_ddl=True,
        compare_server_default=True,
    )
    with context.begin_transaction():
        if connection.dialect.name == "postgresql":
            wait_for_locks(connection, migrate.MIGRATION_LOCK_TIMEOUT)
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK_KEY})")
            wait_for_locks(connection, migrate.TABLE_LOCK_TIMEOUT)
        revision = adopt(connection)
        if revision is not None:
            context.get_context().stamp(context.script, revision)
        context.run_migrations()


def wait_for_locks(connection: Connection, seconds: float) -> None:
    """Limit the wait for locks, since readers queue behind a migration that waits for a table."""
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = {round(seconds * 1000)}")


if context.is_offline_mode():
    raise SystemExit("--sql is not supported: migrations inspect existing rows")
if (given := context.config.attributes.get("connection")) is not None:
    run_migrations(given)
else:
    if context.config.config_file_name is not None:
        fileConfig(context.config.config_file_name, disable_existing_loggers=False)
    asyncio.run(migrate.run(Settings.from_env().database_url, run_migrations))

"""Run the migrations from Alembic's own command line, in a checkout.

incidentkit itself runs them without this file: see ``incidentkit/store/migrate.py``.
"""

from __future__ import annotations

import asyncio
from logging.config import fileConfig
from typing import Any

from alembic import context
from alembic.operations import Operations
from sqlalchemy import Connection

from incidentkit.settings import Settings
from incidentkit.store.migrate import OPTIONS, prepare, put_in_order, restore, run
from incidentkit.store.sql.tables import TEXT_INDEX, metadata, schema_on_postgresql


def is_ours(name: str | None, type_: str, _: Any) -> bool:
    """Limit autogenerate to incidentkit's tables: the database may be a host's."""
    if type_ == "index":
        return name != TEXT_INDEX
    return type_ != "table" or name in metadata.tables


def run_migrations(connection: Connection) -> None:
    """Run the requested migrations, and restore what the newest revision lacks, as `db upgrade`."""
    context.configure(
        connection=connection,
        target_metadata=(
            schema_on_postgresql() if connection.dialect.name == "postgresql" else metadata
        ),
        include_name=is_ours,
        render_as_batch=connection.dialect.name == "sqlite",
        compare_server_default=True,
        **OPTIONS,
    )
    upgrades = context.get_context().opts.get("destination_rev") is not None
    with context.begin_transaction():
        prepare(connection)
        context.run_migrations()
        with Operations.context(context.get_context()):
            for part in restore(connection) if upgrades else ():
                context.config.print_stdout("Restored %s.", part)
    if upgrades:
        put_in_order(connection)


if context.is_offline_mode():
    raise SystemExit("--sql is not supported: migrations inspect existing rows")
if context.config.config_file_name is not None:
    fileConfig(context.config.config_file_name, disable_existing_loggers=False)
settings = Settings.from_env()
asyncio.run(run(settings.database_url, run_migrations, settings.schema))

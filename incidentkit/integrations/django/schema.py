"""Create, upgrade and check the tables of incidentkit in the databases of a Django project."""

from __future__ import annotations

import asyncio
from typing import Any

from django.db import DEFAULT_DB_ALIAS, connections
from sqlalchemy import StaticPool, create_engine

from incidentkit.integrations.django.clients import naming_command, settings_of
from incidentkit.opening import migrations
from incidentkit.store.sqlite.url import in_memory


def upgrade(using: str = DEFAULT_DB_ALIAS) -> None:
    """Bring the tables in a database up to date, as ``incidentkit db upgrade`` does.

    Args:
        using: The name of the database in ``DATABASES``.

    Raises:
        StoreError: If the database cannot be reached, or refuses the change.
    """
    settings = settings_of(using)
    if in_memory(settings.database_url):
        _upgrade_connection(using)
    else:
        asyncio.run(migrations().upgrade(settings.database_url, schema=settings.schema))


def current(using: str = DEFAULT_DB_ALIAS) -> str | None:
    """Return the revision of the tables; None if there are none."""
    settings = settings_of(using)
    return asyncio.run(migrations().current(settings.database_url, schema=settings.schema))


def check(using: str = DEFAULT_DB_ALIAS) -> None:
    """Raise unless the tables are up to date.

    Raises:
        SchemaOutOfDate: With the command to run.
    """
    settings = settings_of(using)
    with naming_command(using):
        asyncio.run(migrations().check(settings.database_url, schema=settings.schema))


def upgrade_after_migrate(using: str, **_: Any) -> None:
    """Upgrade the tables in the default database after ``manage.py migrate``."""
    if using == DEFAULT_DB_ALIAS:
        upgrade(using)


def _upgrade_connection(using: str) -> None:
    """Upgrade the tables in a database in memory, which only Django's own connection sees."""
    connection = connections[using]
    connection.ensure_connection()
    engine = create_engine("sqlite://", creator=lambda: connection.connection, poolclass=StaticPool)
    with engine.connect() as own:
        migrations().upgrade_connection(own)
        own.commit()

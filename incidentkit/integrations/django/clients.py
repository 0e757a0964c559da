"""The clients of a Django project, one for each database that has incidents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, connections
from django.db.backends.base.base import NO_DB_ALIAS

from incidentkit.domain.errors import InvalidSettings, SchemaOutOfDate
from incidentkit.environment import unknown_variables
from incidentkit.integrations.django.databases import url_of
from incidentkit.settings import Settings
from incidentkit.store.sqlite.url import in_memory
from incidentkit.sync.client import SyncIncidentClient
from incidentkit.sync.joined import SyncJoinedIncidents

SETTING: Final = "INCIDENTKIT"
"""The name of the setting: a dict of the variables in the settings reference, without their prefix,
such as ``{"REDIS_URL": "redis://localhost:6379/0"}``."""

_made: Final[dict[tuple[str, str], tuple[SyncIncidentClient, bool]]] = {}
"""The clients of this process, and whether the database of each is in memory. The key is the name
in ``DATABASES``, and the ``NAME`` of that database."""


def client(using: str = DEFAULT_DB_ALIAS) -> SyncIncidentClient:
    """Return the client on a database, which opens when it is first used in each process.

    It has its own connections, so it does not see uncommitted writes of a Django transaction. Use
    :func:`join` in a transaction.

    Args:
        using: The name of the database in ``DATABASES``. If the setting ``INCIDENTKIT`` has a
            ``DATABASE_URL``, ``default`` is the database at that URL.

    Raises:
        ImproperlyConfigured: If a setting breaks a rule, or the database is in memory.
        SchemaOutOfDate: With the command to run.
        StoreUnavailable: If the database cannot be reached.
    """
    found, memory = _made_for(using)
    if memory:
        raise ImproperlyConfigured(
            f"DATABASES[{using!r}] is in memory, where only Django's own connection sees the "
            f"incidents: use join()"
        )
    with naming_command(using):
        found.connect()
    return found


def join(using: str = DEFAULT_DB_ALIAS) -> SyncJoinedIncidents:
    """Return the verbs in the open transaction of a database.

    Call it inside ``transaction.atomic()``. The writes of the verbs are committed or rolled back
    with the project's own rows.

    Args:
        using: The name of the database in ``DATABASES``.

    Raises:
        NotInTransaction: If no transaction is open.
        TypeError: If the client is on another kind of database.
    """
    found, _ = _made_for(using)
    return found.join(connections[using])


def settings_of(using: str) -> Settings:
    """Return the settings of the client on a database.

    Raises:
        ImproperlyConfigured: With the setting and the rule that it breaks.
    """
    given = getattr(settings, SETTING, {})
    if not isinstance(given, Mapping):
        raise ImproperlyConfigured(f"{SETTING} must be a dict of settings")
    variables = {f"INCIDENTKIT_{name}": _text(value) for name, value in given.items()}
    for name, fault in unknown_variables(variables).items():
        raise ImproperlyConfigured(f"{SETTING}: {name.removeprefix('INCIDENTKIT_')} {fault}")
    if using != DEFAULT_DB_ALIAS or not variables.get("INCIDENTKIT_DATABASE_URL"):
        connection = connections[using]
        url = url_of(using, connection.vendor, connection.settings_dict)
        variables["INCIDENTKIT_DATABASE_URL"] = url
    try:
        return Settings.from_mapping(variables)
    except InvalidSettings as error:
        raise ImproperlyConfigured(f"{SETTING}: {error}") from error


def close_before_drop(connection: Any, **_: Any) -> None:
    """Close the clients when Django connects to create or drop a database.

    PostgreSQL cannot drop a database that is in use, such as the one of a test run. A client opens
    again when it is next used.
    """
    if connection.alias == NO_DB_ALIAS:
        for opened, _memory in list(_made.values()):
            opened.close()


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _made_for(using: str) -> tuple[SyncIncidentClient, bool]:
    """Return the client on a database, open or not, and whether that database is in memory."""
    # A test run changes the name of the database.
    key = using, str(connections[using].settings_dict["NAME"])
    found = _made.get(key)
    if found is None:
        chosen = settings_of(using)
        made = SyncIncidentClient.from_settings(chosen), in_memory(chosen.database_url)
        # Another thread may have been faster.
        found = _made.setdefault(key, made)
    return found


@contextmanager
def naming_command(using: str) -> Iterator[None]:
    """Make an error about the schema name the right command of ``manage.py``."""
    try:
        yield
    except SchemaOutOfDate as error:
        option = "" if using == DEFAULT_DB_ALIAS else f" --database {using}"
        error.command = f"python manage.py incidentkit upgrade{option}"
        error.args = (*error.args[:2], error.command)
        raise

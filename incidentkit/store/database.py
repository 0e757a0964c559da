"""Recognize the kind of database that a URL names, or a service."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

from incidentkit.domain.errors import InvalidSettings

DEFAULT_DATABASE_URL: Final = "sqlite+aiosqlite:///incidentkit.db"
"""The default database: a file in the current folder."""

DatabaseKind: TypeAlias = Literal["postgresql", "sqlite"]

_KINDS: Final[dict[str, DatabaseKind]] = {
    "postgresql": "postgresql",
    "postgres": "postgresql",
    **{
        # The drivers of SQLAlchemy, whose URLs a host may have. incidentkit always uses asyncpg.
        f"postgresql+{driver}": "postgresql"
        for driver in ("asyncpg", "pg8000", "psycopg", "psycopg_async", "psycopg2", "psycopg2cffi")
    },
    "sqlite": "sqlite",
    "sqlite+aiosqlite": "sqlite",
}


def names_service(url: str) -> bool:
    """Return whether a URL names a service, over HTTP, and not a database."""
    return url.partition("://")[0].lower() in ("http", "https")


def database_kind(database_url: str) -> DatabaseKind:
    """Return the kind of database that a URL names.

    Raises:
        InvalidSettings: If the URL names another kind, or is not a URL.
    """
    scheme, separator, _ = database_url.partition("://")
    if names_service(database_url):
        reason = "is that of a service: pass it to IncidentClient.open(), with token="
        raise InvalidSettings("database_url", reason)
    if not separator or scheme not in _KINDS:
        reason = "must start with postgresql:// or sqlite+aiosqlite:///"
        raise InvalidSettings("database_url", reason)
    return _KINDS[scheme]

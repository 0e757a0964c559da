"""Choose the backend of a store, and load only that one.

The package ``backends`` loads its modules lazily: choosing SQLite does not load asyncpg.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING

from attrs import evolve

import incidentkit.remote as service
import incidentkit.store.backends as backend
from incidentkit.domain.errors import InvalidSettings, MissingDependency, StoreError
from incidentkit.store.database import DEFAULT_DATABASE_URL, database_kind
from incidentkit.store.schema import check_schema

if TYPE_CHECKING:
    from incidentkit.cache.base import IncidentCache
    from incidentkit.observing import Observer
    from incidentkit.remote.options import RemoteOptions
    from incidentkit.session import Session
    from incidentkit.settings import Settings
    from incidentkit.store.options import StoreOptions
    from incidentkit.store.ports import IncidentStore, Migrations


@contextmanager
def _complete(lack: str) -> Iterator[None]:
    """Raise StoreError if a module of incidentkit or of a package is missing.

    In a frozen program, a zip file or an incomplete copy, a missing module is only noticed when it
    is first used.

    Args:
        lack: The text of the error: what this installation lacks.
    """
    try:
        yield
    except ImportError as error:
        raise StoreError(
            f"{lack} ({error}): install incidentkit with its dependencies, or include them in the "
            "frozen program"
        ) from error


@_complete("the driver of the database is not in this installation")
def store_from_url(
    database_url: str = DEFAULT_DATABASE_URL,
    options: StoreOptions | None = None,
    *,
    schema: str | None = None,
) -> IncidentStore:
    """Return the store, not yet open, for a ``postgresql://`` or ``sqlite+aiosqlite:///`` URL.

    The schema of SQLite is brought up to date when the store opens. On PostgreSQL it is only
    checked: ``incidentkit db upgrade`` changes it.

    Args:
        database_url: The database.
        options: Sizes and time limits; None: the defaults.
        schema: The PostgreSQL schema that has the tables; None: the first one in the search path
            that has them.

    Raises:
        InvalidSettings: If the URL names another kind of database, or cannot be parsed, or the
            schema cannot have the tables.
        StoreError: If a module that the database needs is not in this installation.
    """
    kind = database_kind(database_url)
    check_schema(schema, kind)
    if kind == "postgresql":
        return backend.postgresql_store(database_url, options, schema)
    return backend.sqlite_store(database_url, options, migrations)


def store_of_service(
    url: str, token: str | None = None, options: RemoteOptions | None = None
) -> IncidentStore:
    """Return the store, not yet open, for the URL of a service.

    Args:
        url: The service.
        token: The access token; None: none is sent.
        options: Time limits and connections; None: the defaults.

    Raises:
        InvalidSettings: If the URL or the token cannot be used.
        MissingDependency: If the package ``httpx2`` is not installed.
    """
    try:
        store = service.RemoteStore
    except ModuleNotFoundError as error:
        if error.name != "httpx2":
            raise
        raise MissingDependency("httpx2", extra="remote") from error
    return store(url, token, options)


@_complete("the driver of the database is not in this installation")
def store_on(
    database: object, options: StoreOptions | None = None, *, schema: str | None = None
) -> IncidentStore:
    """Return the store, not yet open, on a URL, or on an engine or a pool that a host has opened.

    Args:
        database: A URL, SQLAlchemy's ``AsyncEngine``, or a pool of asyncpg.
        options: For a URL. An engine or a pool already has sizes and time limits: for it, only
            ``prepared_statements`` may be set.
        schema: As for :func:`store_from_url`.

    Raises:
        InvalidSettings: If it is something else, is on another kind of database, or has options
            that it cannot take.
        StoreError: If a module that the database needs is not in this installation.
    """
    if isinstance(database, str):
        return store_from_url(database, options, schema=schema)
    if options is not None and evolve(options, prepared_statements=None) != type(options)():
        reason = "are only for a URL: an engine or a pool has its own"
        raise InvalidSettings("options", f"other than prepared_statements {reason}")
    dialect = getattr(database, "dialect", None)
    name = getattr(dialect, "name", "postgresql")
    check_schema(schema, "postgresql" if name == "postgresql" else "sqlite")
    if name == "postgresql":
        return backend.postgresql_store(database, options, schema)
    return backend.sqlite_store(database, None, migrations)


def check_exists(database_url: str, *, with_schema: bool) -> None:
    """Raise if opening a URL would create an SQLite file or, on request, the tables in a file.

    PostgreSQL always passes: opening it creates nothing.

    Raises:
        InvalidSettings: If the URL names another kind of database, or cannot be parsed.
        StoreError: If there is no such file.
        SchemaOutOfDate: If ``with_schema`` is set, and the file has no incidents.
    """
    if database_kind(database_url) == "sqlite":
        backend.check_exists(database_url, with_schema=with_schema)


@_complete("the migrations are not in this installation")
def migrations() -> Migrations:
    """Return the migrations; the first call loads them, and Alembic with them.

    Raises:
        StoreError: If a module that they need is not in this installation.
    """
    from incidentkit.store import migrate  # noqa: PLC0415

    return migrate


def new_session(
    store: IncidentStore,
    cache: IncidentCache | None,
    *,
    cache_required: bool,
    max_staleness: float,
    observer: Observer | None,
) -> Session:
    """Return a new session for a client; the first call loads asyncio."""
    from incidentkit.session import Session  # noqa: PLC0415

    return Session(
        store,
        cache,
        cache_required=cache_required,
        max_staleness=max_staleness,
        observer=observer,
    )


def settings_from_env(env_file: str | PathLike[str] | None) -> Settings:
    """Read the settings; the first call loads the packages that parse the environment."""
    from incidentkit.settings import Settings  # noqa: PLC0415

    return Settings.from_env(env_file)

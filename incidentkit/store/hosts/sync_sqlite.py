"""A host's synchronous connection to SQLite: of SQLAlchemy, the module ``sqlite3`` or Django."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import closing, suppress
from typing import Any, Final

from sqlalchemy import Executable
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite

from incidentkit.domain.errors import IncidentKitError, NotInTransaction
from incidentkit.store.database import DatabaseKind
from incidentkit.store.executor import Rows
from incidentkit.store.hosts.connections import SqliteHostConnection
from incidentkit.store.hosts.sync_django import DjangoConnection
from incidentkit.store.hosts.sync_sqlalchemy import SyncSqlalchemyConnection
from incidentkit.store.hosts.synchronous import (
    django_connection,
    not_joinable,
    sqlalchemy_connection,
)
from incidentkit.store.sql.compiled import Statements
from incidentkit.store.sqlite.errors import translate_error
from incidentkit.store.sqlite.statements import STATEMENTS
from incidentkit.store.sqlite.url import IN_MEMORY, place_of

_new_dialect: Any = SQLiteDialect_pysqlite
STATEMENTS_FOR_DJANGO: Final = Statements(_new_dialect(paramstyle="pyformat"))
"""The statements for Django's cursor, with parameters as ``%(name)s``."""


def sqlite_host(connection: object) -> SqliteHostConnection:
    """Return a host's connection.

    Args:
        connection: SQLAlchemy's ``Connection`` or ``Session``, ``sqlite3.Connection``, or Django's
            connection.

    Raises:
        NotInTransaction: If it commits each statement by itself.
        TypeError: If it is something else, or connected to another kind of database.
    """
    sqlalchemy = sqlalchemy_connection(connection)
    if sqlalchemy is not None:
        return SyncSqlalchemyConnection(sqlalchemy, "sqlite", translate_error, place_of)
    if isinstance(connection, sqlite3.Connection):
        return SqliteConnection(connection)
    django = django_connection(connection)
    if django is not None:
        return DjangoConnection(django, DjangoOnSqlite())
    raise not_joinable(connection, "sqlite")


class SqliteConnection:
    """A connection of the module ``sqlite3``.

    Unless it is in autocommit mode, the module begins a transaction with the first statement that
    writes. If none has begun yet, that is the transaction to join.

    Args:
        connection: The connection.

    Raises:
        NotInTransaction: If it commits each statement by itself, or is closed.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._begun = False
        self._check()

    @property
    def place(self) -> str | None:
        """The database of the connection."""
        return place_on_sqlite(self._connection)

    async def fetch(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement in the transaction."""
        self._check()
        compiled = STATEMENTS(statement)
        rows = fetch_plainly(self._connection, compiled.text, compiled.bind(values))
        return compiled.read(rows)

    async def has_every_character(self) -> bool:
        """Return True: every encoding of SQLite has all characters."""
        return True

    async def in_transaction(self) -> bool:
        """Return whether SQLite is in a transaction."""
        return self._connection.in_transaction

    def translate(self, error: Exception) -> IncidentKitError:
        """Return the error that a caller sees for an exception of sqlite3."""
        return translate_error(error)

    def _check(self) -> None:
        connection = self._connection
        try:
            in_transaction = connection.in_transaction
        except sqlite3.ProgrammingError:
            raise NotInTransaction from None
        if in_transaction:
            self._begun = True
        elif self._begun or _commits_by_itself(connection):
            raise NotInTransaction


class DjangoOnSqlite:
    """The driver behind Django's connection: sqlite3."""

    kind: DatabaseKind = "sqlite"
    statements = STATEMENTS_FOR_DJANGO

    def check(self, driver: Any) -> None:
        """Accept any connection: there is no pooler for SQLite."""

    def prepare(self, cursor: Any) -> None:
        """Do nothing: the statements accept times that Django has already converted."""

    def has_every_character(self, driver: Any) -> bool:  # noqa: ARG002
        """Return True: every encoding of SQLite has all characters."""
        return True

    def place(self, driver: Any) -> str | None:
        """Return the path of the file of a connection."""
        return place_on_sqlite(driver)

    def translate(self, error: Exception) -> IncidentKitError:
        """Return the error that a caller sees for an exception of the driver."""
        return translate_error(error)


def _commits_by_itself(connection: Any) -> bool:
    # From Python 3.12 on, the attribute decides unless it has its default, which is -1.
    autocommit = getattr(connection, "autocommit", -1)
    if autocommit == -1:
        return connection.isolation_level is None
    return bool(autocommit)


def fetch_plainly(connection: sqlite3.Connection, sql: str, values: Any = ()) -> list[Any]:
    """Run a statement on SQLite and return plain tuples and strings, despite host factories."""
    text_factory = connection.text_factory
    try:
        connection.text_factory = str
        with closing(sqlite3.Cursor(connection)) as cursor:
            rows: list[Any] = cursor.execute(sql, values).fetchall()
            return rows
    finally:
        connection.text_factory = text_factory


def place_on_sqlite(connection: sqlite3.Connection) -> str | None:
    """Return the path of the file of a connection; None if it is unknown."""
    with suppress(Exception):
        for _, name, path in fetch_plainly(connection, "PRAGMA database_list"):
            if name == "main":
                return path or IN_MEMORY
    return None

"""A host's synchronous connection to PostgreSQL: of SQLAlchemy, psycopg or Django.

No driver is imported here: a host that uses one has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta, timezone, tzinfo
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from sqlalchemy import Connection, Executable
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

from incidentkit.domain.errors import IncidentKitError, NotInTransaction
from incidentkit.store.database import DatabaseKind
from incidentkit.store.executor import Rows
from incidentkit.store.hosts.connections import HostConnection
from incidentkit.store.hosts.poolers import PSYCOPG
from incidentkit.store.hosts.sqlalchemy import has_every_character
from incidentkit.store.hosts.sync_django import DjangoConnection
from incidentkit.store.hosts.sync_sqlalchemy import SyncSqlalchemyConnection
from incidentkit.store.hosts.synchronous import (
    django_connection,
    is_a,
    not_joinable,
    sqlalchemy_connection,
)
from incidentkit.store.postgresql.errors import translate_error
from incidentkit.store.postgresql.poolers import unsafe_names
from incidentkit.store.postgresql.url import place_of, place_of_server
from incidentkit.store.sql.compiled import Statements

if TYPE_CHECKING:
    import psycopg

_new_dialect: Any = PGDialect_psycopg
STATEMENTS: Final = Statements(_new_dialect())
"""The statements for psycopg, of version 2 or 3, with parameters as ``%(name)s``."""

_safe: Final[WeakSet[object]] = WeakSet()
"""The pools of engines, and connections, on which no other process's statement can run."""


def postgresql_host(connection: object, *, trusted: bool) -> HostConnection:
    """Return a host's connection.

    Args:
        connection: SQLAlchemy's ``Connection`` or ``Session``, psycopg's ``Connection``, or
            Django's connection.
        trusted: Whether to skip the check of its prepared statements behind a pooler.

    Raises:
        NotInTransaction: If it commits each statement by itself.
        TypeError: If it is something else, or connected to another kind of database.
    """
    sqlalchemy = sqlalchemy_connection(connection)
    if sqlalchemy is not None:
        check = None if trusted else _refuse_unsafe_engine
        return SyncSqlalchemyConnection(sqlalchemy, "postgresql", translate_error, place_of, check)
    if is_a("psycopg", "Connection", connection):
        of_psycopg: Any = connection
        return PsycopgConnection(of_psycopg, trusted=trusted)
    django = django_connection(connection)
    if django is not None:
        return DjangoConnection(django, DjangoOnPostgresql(trusted=trusted))
    raise not_joinable(connection, "postgresql")


class PsycopgConnection:
    """A connection of psycopg 3.

    Outside of autocommit, psycopg begins a transaction with the first statement. If none has begun
    yet, that is the transaction to join.

    Args:
        connection: The connection.
        trusted: Whether to skip the check of its prepared statements behind a pooler.

    Raises:
        NotInTransaction: If it commits each statement by itself, or is closed.
    """

    def __init__(self, connection: psycopg.Connection[Any], *, trusted: bool) -> None:
        self._connection = connection
        self._trusted = trusted
        self._begun = False
        self._check()

    @property
    def place(self) -> str | None:
        """The database of the connection."""
        return place_on_postgresql(self._connection)

    async def fetch(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement in the transaction."""
        self._check()
        if not self._trusted:
            refuse_unsafe(self._connection, "connect with prepare_threshold=None")
            self._trusted = True
        compiled = STATEMENTS(statement)
        try:
            with new_cursor(self._connection) as cursor:
                cursor.execute(compiled.text, compiled.bind(values))
                return compiled.read(_rows(cursor))
        finally:
            self._begun = self._begun or not self._idle()

    async def has_every_character(self) -> bool:
        """Return whether the database can hold every character."""
        self._check()
        return has_every_character(self._connection)

    def translate(self, error: Exception) -> IncidentKitError:
        """Return the error that a caller sees for an exception of psycopg."""
        return translate_error(error)

    def _check(self) -> None:
        if self._connection.closed:
            raise NotInTransaction
        if not self._idle():
            self._begun = True
        elif self._begun or self._connection.autocommit:
            raise NotInTransaction

    def _idle(self) -> bool:
        status = self._connection.info.transaction_status
        if status == type(status).ACTIVE and self._connection.autocommit:
            # In pipeline mode the status is unknown. psycopg has no public name for its blocks.
            return not getattr(self._connection, "_num_transactions", 1)
        return status == type(status).IDLE


class DjangoOnPostgresql:
    """The driver behind Django's connection: psycopg, of version 2 or 3.

    Args:
        trusted: Whether to skip the check of prepared statements behind a pooler.
    """

    kind: DatabaseKind = "postgresql"
    statements = STATEMENTS

    def __init__(self, *, trusted: bool) -> None:
        self._trusted = trusted

    def check(self, driver: Any) -> None:
        """Raise if a connection is unsafe behind a pooler."""
        if not self._trusted:
            refuse_unsafe(driver, "set prepare_threshold to None in OPTIONS")
            self._trusted = True

    def prepare(self, cursor: Any) -> None:
        """Make Django's cursor return aware times, even with ``USE_TZ=False``."""
        if hasattr(cursor, "adapters"):
            read_as_psycopg(cursor)
        else:
            cursor.tzinfo_factory = _zone

    def has_every_character(self, driver: Any) -> bool:
        """Return whether the database can hold every character."""
        return has_every_character(driver)

    def place(self, driver: Any) -> str | None:
        """Return the database of a connection."""
        return place_on_postgresql(driver)

    def translate(self, error: Exception) -> IncidentKitError:
        """Return the error that a caller sees for an exception of the driver."""
        return translate_error(error)


def _zone(offset: timedelta | int) -> tzinfo:
    """Return the time zone of an offset, which psycopg2 before 2.9 gives in minutes."""
    return timezone(offset if isinstance(offset, timedelta) else timedelta(minutes=offset))


def _rows(cursor: Any) -> Rows:
    """Return the rows of the last statement; none if it does not return any."""
    # In pipeline mode there is no result before it is fetched.
    if cursor.pgresult is not None and not cursor.pgresult.nfields:
        return ()
    try:
        rows: Rows = cursor.fetchall()
    except sys.modules["psycopg"].ProgrammingError as error:
        if error.sqlstate is not None:
            raise
        return ()
    return rows


def new_cursor(connection: Any) -> Any:
    """Return a psycopg 3 cursor that does not depend on the host's factories and adapters.

    If the host binds values on the client, so does this cursor, since the server may be unable to.
    """
    psycopg: Any = sys.modules["psycopg"]
    client = issubclass(connection.cursor_factory, psycopg.ClientCursor)
    new = psycopg.ClientCursor if client else psycopg.Cursor
    cursor = new(connection, row_factory=psycopg.rows.tuple_row)
    read_as_psycopg(cursor)
    return cursor


def read_as_psycopg(cursor: Any) -> None:
    """Make a psycopg 3 cursor convert values as psycopg does by default.

    The host may convert the same types differently: Django, for one, can return naive times.
    """
    types: Any = sys.modules["psycopg"].types
    for name, loader in (
        ("bool", types.bool.BoolLoader),
        ("int4", types.numeric.IntLoader),
        ("int8", types.numeric.IntLoader),
        ("text", types.string.TextLoader),
        ("timestamptz", types.datetime.TimestamptzLoader),
        ("varchar", types.string.TextLoader),
    ):
        cursor.adapters.register_loader(name, loader)


def _refuse_unsafe_engine(connection: Connection) -> None:
    pool = connection.engine.pool
    if pool not in _safe:
        refuse_unsafe(connection.connection.driver_connection, PSYCOPG)
        _safe.add(pool)


def refuse_unsafe(driver: Any, remedy: str) -> None:
    """Refuse a connection of psycopg 3 that is behind a pooler and names prepared statements.

    Raises:
        InvalidSettings: With the remedy.
    """
    if getattr(driver, "prepare_threshold", None) is None:
        return
    with new_cursor(driver) as cursor:
        # Never prepared, regardless of the threshold.
        cursor.execute("SELECT pg_backend_pid()", prepare=False)
        (answering,) = cursor.fetchone()
    if answering != driver.info.backend_pid:
        raise unsafe_names("connection", remedy)


def place_on_postgresql(driver: Any) -> str | None:
    """Return the database of a connection of psycopg, of version 2 or 3; None if it is lost."""
    with suppress(Exception):
        return place_of_server(driver.info.host, driver.info.port, driver.info.dbname)
    return None

"""A host's synchronous connection or session of SQLAlchemy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Executable
from sqlalchemy.engine import URL

from incidentkit.domain.errors import IncidentKitError, NotInTransaction
from incidentkit.store.database import DatabaseKind
from incidentkit.store.executor import Rows
from incidentkit.store.hosts.sqlalchemy import (
    all_rows,
    check_joinable,
    engine_of,
    has_every_character,
    is_ended,
    options_to_execute,
    translate_sqlalchemy_error,
)

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


class SyncSqlalchemyConnection:
    """A synchronous connection of SQLAlchemy, or the connection of a session.

    SQLAlchemy begins a transaction with the first statement. If none has begun yet, that is the
    transaction to join: a later one might never be committed.

    Args:
        connection: SQLAlchemy's ``Connection`` or ``Session``.
        kind: The database that it must be connected to.
        translate: Returns the error for an exception of the driver.
        place_of: Returns the place of the database that a URL names.
        check: Raises unless the connection can be used; None: any connection can.

    Raises:
        NotInTransaction: If it commits each statement by itself.
        TypeError: If it is connected to another kind of database, or belongs to an asyncio engine.
    """

    def __init__(
        self,
        connection: Connection | Session,
        kind: DatabaseKind,
        translate: Callable[[Exception], IncidentKitError],
        place_of: Callable[[URL], str | None],
        check: Callable[[Connection], None] | None = None,
    ) -> None:
        self._connection = connection
        self._translate = translate
        self._engine = engine_of(connection)
        if self._engine.dialect.name != kind:
            raise TypeError(f"The client is on {kind}, not on {self._engine.dialect.name}")
        if self._engine.dialect.is_async:
            raise TypeError("The connection belongs to an asyncio engine: use IncidentClient.join")
        self._place_of = place_of
        self._check_use = check
        if isinstance(connection, Connection):
            check_joinable(connection)
        self._transaction = connection.get_transaction()

    @property
    def place(self) -> str | None:
        """The database of the connection."""
        return self._place_of(self._engine.url)

    async def fetch(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement in the transaction."""
        connection = self._joined()
        if self._check_use is not None:
            self._check_use(connection)
        try:
            options = options_to_execute(connection, statement)
            return all_rows(connection.execute(statement, values, execution_options=options))
        finally:
            self._transaction = self._transaction or self._connection.get_transaction()

    async def has_every_character(self) -> bool:
        """Return whether the database can hold every character."""
        return has_every_character(self._joined().connection.driver_connection)

    async def in_transaction(self) -> bool:
        """Return whether SQLite itself is in a transaction."""
        driver: Any = self._joined().connection.driver_connection
        return bool(driver.in_transaction)

    def translate(self, error: Exception) -> IncidentKitError:
        """Return the error that a caller sees for an exception of SQLAlchemy."""
        if is_ended(error):
            return NotInTransaction()
        return translate_sqlalchemy_error(error) or self._translate(error)

    def _joined(self) -> Connection:
        """Return the connection of the transaction.

        Raises:
            NotInTransaction: If it has ended. A session would begin another one here.
        """
        host = self._connection
        if self._transaction not in (None, host.get_transaction()):
            raise NotInTransaction
        connection = host if isinstance(host, Connection) else host.connection()
        check_joinable(connection)
        return connection

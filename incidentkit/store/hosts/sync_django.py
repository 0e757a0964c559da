"""A host's Django connection."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Protocol

from sqlalchemy import Executable

from incidentkit.domain.errors import IncidentKitError, NotInTransaction, WrongEventLoop
from incidentkit.store.causes import OTHER_THREAD, TRANSACTION_FAILED, find_cause
from incidentkit.store.database import DatabaseKind
from incidentkit.store.executor import Rows
from incidentkit.store.hosts.synchronous import is_a
from incidentkit.store.sql.compiled import Statements


class Driver(Protocol):
    """The differences between Django's database drivers.

    Attributes:
        kind: The database.
        statements: The statements for Django's cursor.
    """

    kind: DatabaseKind
    statements: Statements

    def check(self, driver: Any) -> None:
        """Raise if a connection of the driver is unsafe behind a pooler."""

    def prepare(self, cursor: Any) -> None:
        """Make a cursor of the driver return values that do not depend on Django's settings."""

    def has_every_character(self, driver: Any) -> bool:
        """Return whether the database of a connection of the driver can hold every character."""
        ...

    def place(self, driver: Any) -> str | None:
        """Return the database of a connection of the driver, for an error to name it."""
        ...

    def translate(self, error: Exception) -> IncidentKitError:
        """Return the error that a caller sees for an exception of the driver."""
        ...


class DjangoConnection:
    """A connection of Django inside ``transaction.atomic()``.

    Statements run through Django's own cursor, so that its log and its wrappers see them.

    Args:
        connection: Django's ``DatabaseWrapper``.
        driver: The driver that it uses.

    Raises:
        NotInTransaction: If it commits each statement by itself.
        TypeError: If it is connected to another kind of database.
    """

    def __init__(self, connection: Any, driver: Driver) -> None:
        if connection.vendor != driver.kind:
            raise TypeError(f"The client is on {driver.kind}, not on {connection.vendor}")
        self._connection = connection
        self._driver = driver
        self._transaction = self._current()

    @property
    def place(self) -> str | None:
        """The database of the connection."""
        return self._driver.place(self._connection.connection)

    async def fetch(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement in the transaction."""
        self._check()
        self._driver.check(self._connection.connection)
        compiled = self._driver.statements(statement)
        failure: BaseException
        try:
            with self._connection.cursor() as cursor:
                self._driver.prepare(cursor.cursor)
                cursor.execute(compiled.text, compiled.bind(values))
                return compiled.read(cursor.fetchall()) if cursor.description else ()
        except sys.modules["django.db.utils"].Error as error:
            # Django wraps the exceptions of a driver.
            failure = error.__cause__ or error
        raise failure

    async def has_every_character(self) -> bool:
        """Return whether the database can hold every character."""
        self._check()
        return self._driver.has_every_character(self._connection.connection)

    async def in_transaction(self) -> bool:
        """Return whether SQLite itself is in a transaction."""
        return bool(self._connection.connection.in_transaction)

    def translate(self, error: Exception) -> IncidentKitError:
        """Return the error that a caller sees for an exception of Django or its driver."""
        if is_a("django.core.exceptions", "SynchronousOnlyOperation", error):
            return WrongEventLoop(
                "Django allows no call from a thread with a running event loop: make it in another "
                "thread, as asgiref's sync_to_async does"
            )
        if is_a("django.db.utils", "Error", error):
            # An error of Django itself, which no driver knows.
            known = find_cause([OTHER_THREAD], None, str(error))
            if known is not None:
                return known.as_error()
        return self._driver.translate(error)

    def _check(self) -> None:
        """Raise unless the transaction is still the one that was joined, and has not failed."""
        if self._current() != self._transaction:
            raise NotInTransaction
        if self._connection.needs_rollback:
            raise TRANSACTION_FAILED.as_error()

    def _current(self) -> object:
        """Return a value that identifies the transaction.

        Raises:
            NotInTransaction: If there is none.
        """
        connection = self._connection
        if connection.connection is None:
            raise NotInTransaction
        if connection.in_atomic_block:
            # The outermost block begins the transaction, unless the host has done so by hand.
            outermost, *_ = connection.atomic_blocks
            return connection.connection, None if connection.commit_on_exit is False else outermost
        if connection.autocommit:
            raise NotInTransaction
        return connection.connection, None

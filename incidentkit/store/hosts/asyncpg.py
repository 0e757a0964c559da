"""A host's connection of asyncpg."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import asyncpg
from sqlalchemy import Executable

from incidentkit.domain.errors import IncidentKitError, NotInTransaction
from incidentkit.store.executor import Rows
from incidentkit.store.postgresql.driver import Connection, fetch_rows
from incidentkit.store.postgresql.errors import translate_error


class AsyncpgConnection:
    """A connection of asyncpg, on its own or of a pool.

    Args:
        connection: It must be in a transaction.

    Raises:
        NotInTransaction: If it is not, or is closed.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._check()

    async def fetch(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement in the transaction."""
        self._check()
        return await fetch_rows(self._connection, statement, values)

    def translate(self, error: Exception) -> IncidentKitError:
        """Return the error that a caller sees for an exception of asyncpg."""
        return translate_error(error)

    def _check(self) -> None:
        connection = self._connection
        try:
            joinable = not connection.is_closed() and connection.is_in_transaction()
        except asyncpg.InterfaceError:
            # It was given back to its pool.
            joinable = False
        if not joinable:
            raise NotInTransaction

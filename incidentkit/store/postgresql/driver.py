"""Statements as asyncpg takes them.

A statement is compiled once, when it first runs; SQLAlchemy takes no part in a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeAlias
from weakref import WeakKeyDictionary

import asyncpg
from asyncpg.pool import PoolConnectionProxy
from attrs import frozen
from sqlalchemy import Dialect, Executable
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg

from incidentkit.domain.errors import InvalidSettings
from incidentkit.store.executor import Rows
from incidentkit.store.sql.naming import TRANSLATE_MAP

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]"

_new_dialect: Any = PGDialect_asyncpg
_DIALECT: Final[Dialect] = _new_dialect()


@frozen
class Compiled:
    """A statement as asyncpg takes it.

    Attributes:
        text: The SQL.
        parameters: The names of its parameters, in order.
    """

    text: str
    parameters: tuple[str, ...]


_compiled: Final[WeakKeyDictionary[Executable, Compiled]] = WeakKeyDictionary()
"""The compiled form of each statement, for as long as its client or module keeps the statement."""


def compile_statement(statement: Executable) -> Compiled:
    """Return the statement as asyncpg takes it, on the tables of the schema that it has."""
    compiled = _compiled.get(statement)
    if compiled is None:
        compiled = _compiled[statement] = _compile(statement)
    return compiled


def _compile(statement: Executable) -> Compiled:
    clause: Any = statement
    translate_map = clause.get_execution_options().get(TRANSLATE_MAP)
    compiled = clause.compile(
        dialect=_DIALECT,
        schema_translate_map=translate_map,
        render_schema_translate=bool(translate_map),
    )
    return Compiled(compiled.string, tuple(compiled.positiontup or ()))


async def fetch_rows(
    connection: Connection, statement: Executable, values: Mapping[str, Any]
) -> Rows:
    """Run a statement on a connection of asyncpg."""
    compiled = compile_statement(statement)
    return await connection.fetch(compiled.text, *[values[name] for name in compiled.parameters])


ISOLATION: Final[Mapping[str, str]] = {"default_transaction_isolation": "read committed"}
"""The setting of the server under which a statement sees all that was committed before it began.

Under a stricter one, a statement that waits for a table sees it as it was before the wait, and a
table that was truncated meanwhile as empty.
"""

STRICTER: Final = (
    "SELECT 1 WHERE current_setting('default_transaction_isolation') "
    "NOT IN ('read committed', 'read uncommitted')"
)
"""Returns a row if statements outside of transactions run under a stricter isolation."""


async def reads_committed(connection: Connection) -> bool:
    """Return whether statements outside of transactions are ``READ COMMITTED``."""
    # Without parameters asyncpg sends only the text, and prepares nothing.
    return await connection.execute(STRICTER) == "SELECT 0"


def unreadable_url() -> InvalidSettings:
    """Return the error for a URL that asyncpg cannot parse."""
    return InvalidSettings("database_url", "is not a URL that PostgreSQL's driver can read")

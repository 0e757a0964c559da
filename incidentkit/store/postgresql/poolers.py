"""Recognize a connection pooler, and refuse a host's connection that is unsafe behind it.

A pooler in transaction mode lends a server connection to one transaction after another, of all
processes. Prepared statements stay on it. Drivers number theirs, so a name may be that of another
process's statement, and running it returns what the other process has asked for.
"""

from __future__ import annotations

import re
import secrets
from typing import Any, Final

import asyncpg

from incidentkit.domain.errors import InvalidSettings
from incidentkit.store.postgresql.driver import Connection
from incidentkit.store.postgresql.errors import STATEMENT_MODE

NAME: Final = re.compile(r"[0-9a-f]{16}", re.IGNORECASE)
"""The part of a statement's name that no other process gives: 64 random bits, as a UUID has."""

_BY_NAME: Final = "SELECT FROM pg_prepared_statements WHERE name = $1"


async def find_pooler(connection: Connection) -> bool:
    """Return whether a new connection goes through a pooler, which must take transactions.

    Raises:
        StoreError: If the pooler is in statement mode.
    """
    if not await behind_pooler(connection):
        return False
    try:
        await connection.execute("BEGIN")
    except asyncpg.PostgresConnectionError as error:
        # The connection has just answered. asyncpg may not tell what the pooler said.
        raise STATEMENT_MODE.as_error(error.sqlstate) from error
    await connection.execute("ROLLBACK")
    return True


async def behind_pooler(connection: Connection) -> bool:
    """Return whether the process that answers differs from the one named on connecting."""
    # Without parameters asyncpg sends only the text, and prepares nothing.
    other = f"SELECT WHERE pg_backend_pid() <> {connection.get_server_pid()}"
    return await connection.execute(other) == "SELECT 1"


def numbers_statements(connection: Connection) -> bool:
    """Return whether asyncpg prepares statements under names that it numbers."""
    return bool(getattr(connection, "_stmt_cache_enabled", True))


async def renames_statements(connection: Connection) -> bool:
    """Return whether the pooler gives prepared statements names of its own, which are safe.

    Args:
        connection: It must be in a transaction, so that one server connection answers.
    """
    name = f"incidentkit_{secrets.token_hex(8)}"
    statement: Any = await connection.prepare(_BY_NAME, name=name)
    return not await statement.fetch(name)


async def check_asyncpg(connection: Connection, setting: str, remedy: str) -> None:
    """Refuse a host's connection of asyncpg that is behind a pooler and numbers its statements.

    Args:
        connection: The connection.
        setting: What the host has passed: the database, or a connection to join.
        remedy: How the host opens it so that no statement has a name.

    Raises:
        InvalidSettings: With the remedy.
    """
    if not numbers_statements(connection) or not await behind_pooler(connection):
        return
    async with connection.transaction():
        safe = await renames_statements(connection)
    if not safe:
        raise unsafe_names(setting, remedy)


def unsafe_names(setting: str, remedy: str) -> InvalidSettings:
    """Return the error for a connection that could run another process's statement."""
    return InvalidSettings(
        setting,
        "is behind a connection pooler and names prepared statements as other processes may do, so "
        f"it could run one of theirs: {remedy}. If the pooler supports prepared statements, or is "
        "in session mode, pass options=StoreOptions(prepared_statements=True)",
    )

"""Restore the functions, triggers and indexes of the newest schema.

Lost indexes are built as in a migration, while other programs read and write. Building one commits
everything restored before it, so the triggers come first. On SQLite, the words of all messages are
indexed in short transactions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import Connection, CursorResult

from incidentkit.store.indexes import Overtaken, build_index, drop_index, start_transaction
from incidentkit.store.postgresql import words as postgresql
from incidentkit.store.sql.definitions import (
    INDEXES,
    SELECT_ON_POSTGRESQL,
    SELECT_ON_SQLITE,
    Difference,
    Schema,
    indexed,
    read_on_postgresql,
    read_on_sqlite,
)
from incidentkit.store.sql.naming import RULE_FUNCTIONS, WORDS_FUNCTION
from incidentkit.store.sql.tables import TEXT_INDEX
from incidentkit.store.sql.triggers import (
    NEW_TOKEN,
    SQLITE_TRIGGERS,
    TIME_TRIGGERS,
    TOKEN_TRIGGERS,
    WHOLE_TIMES,
    token_function,
    token_triggers,
)
from incidentkit.store.sqlite import words as sqlite

TOKENS: Final = "the rows of incident_token"

FILLING: Final = "incident_text_filling"
"""The name of a full-text table on SQLite until it has the words of every message."""

STEP: Final = 1.0
"""Seconds of each transaction that fills it, while other writers wait."""

_COUNT_TOKENS: Final = "SELECT count(*) FROM incident_token WHERE slot BETWEEN 0 AND 15"
_SELECT_TRIGGERS: Final = "SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"
_SCHEMA_OF_TABLE: Final = (
    "SELECT quote_ident(nspname) FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace "
    """WHERE pg_class.oid = CAST('"Incident"' AS regclass)"""
)


def read_schema(connection: Connection) -> Schema:
    """Return the schema of a database that has a revision."""
    if connection.dialect.name == "postgresql":
        return read_on_postgresql(connection.execute(SELECT_ON_POSTGRESQL).all())
    return read_on_sqlite(connection.execute(SELECT_ON_SQLITE).all(), sqlite.triggers())


def mend(connection: Connection) -> tuple[str, ...]:
    """Restore missing or changed parts of a database at the newest revision.

    Runs at the end of a migration. Replaces the tokens if one of them is missing, or if a change of
    an incident may not have replaced one.

    Returns:
        The restored parts, as in ``the trigger incident_token_change``.
    """
    differences = read_schema(connection).differences
    on_postgresql = connection.dialect.name == "postgresql"
    if differences:
        (_mend_postgresql if on_postgresql else _mend_sqlite)(connection, differences)
    restored = [difference.part for difference in differences]
    if _run(connection, _COUNT_TOKENS).scalar() != (16 if on_postgresql else 1):
        replace_tokens(connection)
        restored.append(TOKENS)
    return tuple(restored)


def restore_token(connection: Connection) -> None:
    """Create the triggers that replace the token, with their function, and replace the token."""
    if connection.dialect.name == "postgresql":
        schema = restore_token_function(connection)
        for name, create in token_triggers(schema).items():
            _run(connection, f'DROP TRIGGER IF EXISTS {name} ON "Incident"')
            _run(connection, create)
            # Fire for changes applied by logical replication too.
            _run(connection, f'ALTER TABLE "Incident" ENABLE ALWAYS TRIGGER {name}')
    else:
        _restore_triggers(connection, TOKEN_TRIGGERS)
    replace_tokens(connection)


def restore_token_function(connection: Connection) -> str:
    """Create or replace the function on PostgreSQL, and return the schema of the tables."""
    schema = _schema_of_table(connection)
    _run(connection, token_function(schema))
    return schema


def _schema_of_table(connection: Connection) -> str:
    return str(_run(connection, _SCHEMA_OF_TABLE).scalar_one())


def replace_tokens(connection: Connection) -> None:
    """Replace every token, which invalidates every cached page."""
    if connection.dialect.name != "postgresql":
        _run(connection, "DELETE FROM incident_token")
        _run(connection, NEW_TOKEN)
        return
    _run(connection, "DELETE FROM incident_token WHERE slot NOT BETWEEN 0 AND 15")
    _run(
        connection,
        "INSERT INTO incident_token SELECT slot, gen_random_uuid() "
        "FROM generate_series(0, 15) slot "
        "ON CONFLICT (slot) DO UPDATE SET token = EXCLUDED.token",
    )


def _mend_postgresql(connection: Connection, differences: tuple[Difference, ...]) -> None:
    names = {difference.name for difference in differences}
    if any(difference.kind == "trigger" for difference in differences):
        restore_token(connection)
    if names & {*RULE_FUNCTIONS, TEXT_INDEX}:
        # It may hold the words of another function.
        drop_index(TEXT_INDEX, "Incident")
        if names & {*RULE_FUNCTIONS}:
            _restore_functions(connection)
        build_index(
            TEXT_INDEX, "Incident", f"USING gin ({{schema}}.{WORDS_FUNCTION}(incident_message))"
        )
    _restore_indexes(names)


def _restore_functions(connection: Connection) -> None:
    schema = _schema_of_table(connection)
    encoding = str(_run(connection, "SELECT getdatabaseencoding()").scalar_one())
    for name in reversed(RULE_FUNCTIONS):
        _run(connection, f"DROP FUNCTION IF EXISTS {schema}.{name}(text)")
    for definition in postgresql.functions(schema, encoding):
        _run(connection, definition)


def _mend_sqlite(connection: Connection, differences: tuple[Difference, ...]) -> None:
    names = {difference.name for difference in differences}
    lost = {name: SQLITE_TRIGGERS[name] for name in sorted(names & SQLITE_TRIGGERS.keys())}
    _restore_triggers(connection, lost)
    if lost.keys() & TIME_TRIGGERS.keys():
        _run(connection, WHOLE_TIMES)
    if any(difference.kind == "trigger" for difference in differences):
        replace_tokens(connection)
    if names & sqlite.triggers().keys():
        # Searches use the old table until the new one is complete.
        index_words(connection, sqlite.TEXT, FILLING)
    _restore_indexes(names)


def index_words(connection: Connection, *text_tables: str) -> None:
    """Index the words of all messages on SQLite, in a table that then takes the place of the old.

    Each transaction is short. Several processes share the work, and one that was killed is
    continued.

    Args:
        connection: In a transaction of a migration.
        text_tables: The full-text tables in which triggers index messages meanwhile; with the new
            one.

    Raises:
        Overtaken: If another process has finished the work.
    """
    filling = sqlite.triggers(*text_tables)
    if not _has_triggers(connection, filling):
        # The triggers have filled no such table, or not all of it.
        _run(connection, f"DROP TABLE IF EXISTS {FILLING}")
        _run(connection, sqlite.create_text(FILLING))
        _restore_triggers(connection, filling)
    after: int | None = 0
    while after is not None:
        after = sqlite.index_messages(connection, FILLING, after=after, seconds=STEP)
        if after is not None:
            start_transaction()
            if not _has_triggers(connection, filling):
                raise Overtaken
    for name in filling:
        _run(connection, f"DROP TRIGGER {name}")
    _run(connection, f"DROP TABLE IF EXISTS {sqlite.TEXT}")
    _run(connection, f"ALTER TABLE {FILLING} RENAME TO {sqlite.TEXT}")
    _restore_triggers(connection, sqlite.triggers())


def _has_triggers(connection: Connection, triggers: Mapping[str, str]) -> bool:
    """Return whether SQLite has these triggers with these definitions."""
    found = {tuple(row) for row in _run(connection, _SELECT_TRIGGERS)}
    return found >= set(triggers.items())


def _restore_triggers(connection: Connection, triggers: Mapping[str, str]) -> None:
    """Create triggers on SQLite, replacing those with the same names."""
    for name, create in triggers.items():
        _run(connection, f"DROP TRIGGER IF EXISTS {name}")
        _run(connection, create)


def _restore_indexes(names: set[str]) -> None:
    """Rebuild the declared indexes among these names."""
    for name in sorted(names & INDEXES.keys()):
        index = INDEXES[name]
        table = "" if index.table is None else index.table.name
        drop_index(name, table)
        build_index(name, table, indexed(index), unique=index.unique)


def _run(connection: Connection, statement: str) -> CursorResult[Any]:
    return connection.exec_driver_sql(statement)

"""Restore the functions, triggers and indexes of the newest schema.

Lost indexes are built as in a migration, while other programs read and write. Building one commits
everything restored before it, so the triggers come first. On SQLite, the words of all messages are
indexed in short transactions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import Connection, CursorResult, text

from incidentkit.store.indexes import Overtaken, build_index, drop_index, start_transaction
from incidentkit.store.postgresql import words as postgresql
from incidentkit.store.schema import WRITER, WRITER_CHECK
from incidentkit.store.sql.definitions import (
    INDEXES,
    NUMBERED,
    SELECT_ON_POSTGRESQL,
    SELECT_ON_SQLITE,
    Difference,
    Schema,
    indexed,
    numbered,
    read_on_postgresql,
    read_on_sqlite,
)
from incidentkit.store.sql.naming import RULE_FUNCTIONS, WORDS_FUNCTION
from incidentkit.store.sql.tables import TEXT_INDEX, token_table
from incidentkit.store.sql.triggers import (
    NEW_TOKEN,
    SQLITE_TRIGGERS,
    TIME_TRIGGERS,
    TOKEN_FUNCTION,
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
_SELECT_TOKEN_TRIGGERS: Final = text(
    "SELECT quote_ident(tgname) FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid "
    """WHERE tgrelid = CAST('"Incident"' AS regclass) AND NOT tgisinternal """
    f"AND (tgname = ANY(:names) OR proname = '{TOKEN_FUNCTION}')"
)
"""Returns the triggers that replace the token, whatever their names, or have the names of these."""

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
    token_table.create(connection, checkfirst=True)
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
        triggers = token_triggers(schema)
        found = connection.execute(_SELECT_TOKEN_TRIGGERS, {"names": list(triggers)})
        for name in found.scalars().all():
            _run(connection, f'DROP TRIGGER {name} ON "Incident"')
        for name, create in triggers.items():
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
    if WRITER_CHECK in names:
        _restore_writer_check(connection)
    if names & {*RULE_FUNCTIONS, TEXT_INDEX}:
        # It may hold the words of another function.
        drop_index(TEXT_INDEX, "Incident")
        if names & {*RULE_FUNCTIONS}:
            _restore_functions(connection)
        build_index(
            TEXT_INDEX, "Incident", f"USING gin ({{schema}}.{WORDS_FUNCTION}(incident_message))"
        )
    _restore_indexes(names)


def _restore_writer_check(connection: Connection) -> None:
    """Refuse the events of older statements again; keep those that were written meanwhile."""
    _run(connection, f"ALTER TABLE incident_event DROP CONSTRAINT IF EXISTS {WRITER_CHECK}")
    _run(connection, f"UPDATE incident_event SET writer = {WRITER} WHERE writer <> {WRITER}")
    _run(
        connection,
        f"ALTER TABLE incident_event ADD CONSTRAINT {WRITER_CHECK} CHECK (writer = {WRITER})",
    )


def _restore_functions(connection: Connection) -> None:
    schema = _schema_of_table(connection)
    encoding = str(_run(connection, "SELECT getdatabaseencoding()").scalar_one())
    for name in reversed(RULE_FUNCTIONS):
        _run(connection, f"DROP FUNCTION IF EXISTS {schema}.{name}(text)")
    for definition in postgresql.functions(schema, encoding):
        _run(connection, definition)


def _mend_sqlite(connection: Connection, differences: tuple[Difference, ...]) -> None:
    for difference in differences:
        if difference.kind == "table" and not difference.missing:
            _number_table(connection, difference.name)
    names = {difference.name for difference in differences}
    lost = {name: SQLITE_TRIGGERS[name] for name in sorted(names & SQLITE_TRIGGERS.keys())}
    _restore_triggers(connection, lost)
    if lost.keys() & TIME_TRIGGERS.keys():
        _run(connection, WHOLE_TIMES)
    if names & {*NUMBERED} or any(difference.kind == "trigger" for difference in differences):
        # A table that was created again has forgotten the ids of rows that are gone.
        _pass_known_ids(connection)
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


def _number_table(connection: Connection, name: str) -> None:
    """Create a table of SQLite again with a key that gives no id out twice, and all else it has.

    Alembic's batch mode, with which a host may have created it, loses this, as it loses triggers.
    """
    if _run(connection, "PRAGMA foreign_keys").scalar():
        # Only a host's database in memory has them here: dropping the table would delete rows.
        return
    of_table = "FROM sqlite_master WHERE tbl_name = ? AND sql IS NOT NULL"
    ((create,),) = connection.exec_driver_sql(f"SELECT sql {of_table} AND type = 'table'", (name,))
    parts = connection.exec_driver_sql(
        f"SELECT sql {of_table} AND type IN ('index', 'trigger')", (name,)
    )
    statements = parts.scalars().all()
    columns = connection.exec_driver_sql(
        "SELECT name FROM pragma_table_xinfo(?) WHERE hidden = 0", (name,)
    )
    # Without those that are generated.
    given = ", ".join('"' + column.replace('"', '""') + '"' for column in columns.scalars())
    (legacy,) = _run(connection, "PRAGMA legacy_alter_table").one()
    # Views and foreign keys go on naming the table.
    _run(connection, "PRAGMA legacy_alter_table = ON")
    try:
        _run(connection, numbered(create, NUMBERED[name], f"{name}_numbered"))
        _run(
            connection,
            f'INSERT INTO "{name}_numbered" ({given}) SELECT {given} FROM "{name}"',
        )
        _run(connection, f'DROP TABLE "{name}"')
        _run(connection, f'ALTER TABLE "{name}_numbered" RENAME TO "{name}"')
    finally:
        _run(connection, f"PRAGMA legacy_alter_table = {legacy}")
    for statement in statements:
        _run(connection, statement)


def _pass_known_ids(connection: Connection) -> None:
    """Let ids on SQLite begin after all that the history has."""
    for table, column in NUMBERED.items():
        known = f"(SELECT coalesce(max({column}), 0) FROM incident_event)"
        parameters = (table,)
        connection.exec_driver_sql(
            "INSERT INTO sqlite_sequence (name, seq) SELECT ?1, 0 "
            "WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = ?1)",
            parameters,
        )
        connection.exec_driver_sql(
            f"UPDATE sqlite_sequence SET seq = {known} WHERE name = ?1 AND seq < {known}",
            parameters,
        )


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

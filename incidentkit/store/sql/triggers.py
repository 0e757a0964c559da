"""The functions and triggers of the newest revision, as text.

A migration that changes one of these changes it here, and keeps the text before it for its
downgrade.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from incidentkit.store.schema import WRITER, WRITER_CHECK

TOKEN_FUNCTION: Final = "incident_token_change"

TOKEN_BODY: Final = """
DECLARE
    used bigint;
BEGIN
    -- Not in the definition: the schema of the tables can be renamed.
    PERFORM set_config(
        'search_path', 'pg_catalog, ' || quote_ident(TG_TABLE_SCHEMA) || ', pg_temp', true
    );
    FOREACH used IN ARRAY ARRAY[
        pg_backend_pid() % 16,
        16 + pg_backend_pid() % 240,
        256 + CAST(CAST(pg_current_xact_id() AS text) AS bigint)
    ] LOOP
        BEGIN
            IF used > 255 THEN
                -- Only a lock of the whole table can be in the way of a row of its own.
                PERFORM set_config('lock_timeout', '0', true);
            END IF;
            INSERT INTO incident_token VALUES (used, gen_random_uuid())
            ON CONFLICT (slot) DO UPDATE SET token = EXCLUDED.token;
            EXIT;
        EXCEPTION WHEN serialization_failure OR lock_not_available THEN
            IF used > 255 THEN
                RAISE;
            END IF;
        END;
    END LOOP;
    -- What a serializable transaction reads here would tie it to every other one.
    IF current_setting('transaction_isolation') <> 'serializable'
        AND EXISTS (SELECT FROM incident_token WHERE slot > 15 AND slot <> used)
    THEN
        BEGIN
            DELETE FROM incident_token WHERE slot IN (
                SELECT slot FROM incident_token
                WHERE slot > 15 AND slot <> used
                FOR UPDATE SKIP LOCKED
            );
        EXCEPTION WHEN serialization_failure OR lock_not_available THEN
            -- A later transaction removes them.
        END;
    END IF;
    RETURN NULL;
END """
"""Replaces a token.

A backend has a token among the sixteen, and one of its own for a transaction that finds the first
one held, or replaced since its snapshot. ``pg_catalog`` comes first in the search path and has each
function and operator for exactly these types, so that no other object can take its place."""

TOKEN_SETTINGS: Final = ("search_path=pg_catalog, pg_temp", "lock_timeout=1", "enable_seqscan=off")
"""The settings of the function. A sequential scan would read every version of a row that an old
snapshot keeps."""


def token_function(schema: str) -> str:
    """Return the statement that creates or replaces the function on PostgreSQL.

    Args:
        schema: That of the tables, quoted.
    """
    settings = " ".join(f"SET {setting.replace('=', ' = ')}" for setting in TOKEN_SETTINGS)
    return (
        f"CREATE OR REPLACE FUNCTION {schema}.{TOKEN_FUNCTION}() RETURNS trigger "
        f"LANGUAGE plpgsql SECURITY DEFINER {settings} AS $${TOKEN_BODY}$$"
    )


def token_triggers(schema: str) -> Mapping[str, str]:
    """Return the statements that create the triggers on PostgreSQL, by name.

    The condition of the first is evaluated for each row. It is true for the first row of a
    transaction, and again after a rollback to a savepoint, which also rolls back the setting.

    Args:
        schema: That of the tables, quoted.
    """
    table = f'{schema}."Incident"'
    setting = "'incidentkit.token_change'"
    # As a value, the table keeps its identity when it, or its schema, is renamed or restored.
    number = f"CAST(CAST(CAST({quoted(table)} AS regclass) AS oid) AS text)"
    here = f"CAST(pg_current_xact_id() AS text) || ' ' || {number}"
    return {
        "incident_token_change": (
            f"CREATE CONSTRAINT TRIGGER incident_token_change "
            f"AFTER INSERT OR UPDATE OR DELETE ON {table} "
            "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW "
            f"WHEN (CASE WHEN current_setting({setting}, true) IS NOT DISTINCT FROM {here} "
            f"THEN false ELSE set_config({setting}, {here}, true) IS NOT NULL END) "
            f"EXECUTE FUNCTION {schema}.{TOKEN_FUNCTION}()"
        ),
        "incident_token_truncate": (
            f"CREATE TRIGGER incident_token_truncate AFTER TRUNCATE ON {table} "
            f"FOR EACH STATEMENT EXECUTE FUNCTION {schema}.{TOKEN_FUNCTION}()"
        ),
    }


NEW_TOKEN: Final = (
    "INSERT INTO incident_token (rowid, slot, token) "
    "VALUES (random(), 0, lower(hex(randomblob(16))))"
)
"""Inserts a token on SQLite. Its ``rowid`` is part of it."""

TOKEN_TRIGGERS: Final[Mapping[str, str]] = {
    # Not UPDATE or INSERT OR REPLACE: an INSERT OR IGNORE of an incident would override it.
    f"incident_token_{event.lower()}": (
        f'CREATE TRIGGER incident_token_{event.lower()} AFTER {event} ON "Incident" '
        f"BEGIN DELETE FROM incident_token; {NEW_TOKEN}; END"
    )
    for event in ("INSERT", "UPDATE", "DELETE")
}
"""The triggers that replace the token on SQLite."""

_WHOLE_SECOND: Final = "strftime('%Y-%m-%d %H:%M:%S', {0}created_at)"
# NULL, and so not true, for a value that is not a time.
_OTHER_TIME: Final = f"{{0}}created_at <> {_WHOLE_SECOND}"

WHOLE_TIMES: Final = (
    f'UPDATE "Incident" SET created_at = {_WHOLE_SECOND.format("")} WHERE {_OTHER_TIME.format("")}'
)
"""Stores every time on SQLite in the form that sorts chronologically."""

TIME_TRIGGERS: Final[Mapping[str, str]] = {
    name: (
        f'CREATE TRIGGER {name} AFTER {event} ON "Incident" WHEN {_OTHER_TIME.format("new.")} '
        f'BEGIN UPDATE "Incident" SET created_at = {_WHOLE_SECOND.format("")} '
        "WHERE incident_id = new.incident_id; END"
    )
    for name, event in (
        ("incident_created_at_insert", "INSERT"),
        ("incident_created_at_update", "UPDATE OF created_at"),
    )
}
"""The triggers that do so for each row."""

WRITER_TRIGGERS: Final[Mapping[str, str]] = {
    WRITER_CHECK: (
        f"CREATE TRIGGER {WRITER_CHECK} BEFORE INSERT ON incident_event "
        f"WHEN new.writer <> {WRITER} BEGIN SELECT RAISE(ABORT, "
        f"'{WRITER_CHECK}: the schema takes events of newer statements only'); END"
    )
}
"""The trigger that refuses events of other statements on SQLite."""

SQLITE_TRIGGERS: Final[Mapping[str, str]] = {
    **TOKEN_TRIGGERS,
    **TIME_TRIGGERS,
    **WRITER_TRIGGERS,
}
"""Every trigger on SQLite but those that index words, by name."""


def quoted(text: str) -> str:
    """Return a text as a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"

"""Index the words of messages by one rule on both databases.

Each database had a rule of its own, which depended on its version and locale. Now both have the
rule of ``incidentkit/domain/words.py`` with its table of characters: PostgreSQL in functions,
SQLite in a table that triggers read. The rule therefore also applies to messages that other
programs write.

On PostgreSQL, the function ``incident_words(text)`` stays for searches of processes that were not
restarted yet, but without an index.

Other programs work meanwhile: PostgreSQL builds the index concurrently, and SQLite indexes the
messages in short transactions, in a table that is renamed when it is complete.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from incidentkit.store.indexes import (
    build_index,
    drop_index,
    has_rows,
    schema_of,
    start_transaction,
)
from incidentkit.store.mending import FILLING, index_words
from incidentkit.store.migrations.incident_event import TEXT_TRIGGERS
from incidentkit.store.postgresql import words as postgresql
from incidentkit.store.schema import in_the_way
from incidentkit.store.sqlite import words as sqlite

revision = "a6d40b7f21c8"
down_revision = "a61c08d5e372"
branch_labels = None
depends_on = None

INDEX = "ix_Incident_incident_message"
FUNCTIONS = ("incident_words_1", "incident_text_1", "incident_characters_1")


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        upgrade_sqlite()
    else:
        upgrade_postgresql()


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        downgrade_sqlite()
    else:
        downgrade_postgresql()


def put_back() -> None:
    """Undo the part of an upgrade that was killed: the versions before search, too."""
    if op.get_bind().dialect.name != "sqlite":
        downgrade_postgresql()
        return
    found = sa.inspect(op.get_bind())
    if found.has_table(FILLING) or not found.has_table(sqlite.TEXT):
        downgrade_sqlite()


def upgrade_postgresql() -> None:
    """Create the functions, and the index on them."""
    encoding = str(op.get_bind().scalar(sa.text("SELECT getdatabaseencoding()")))
    for definition in postgresql.functions(schema_of("Incident"), encoding):
        # Not op.execute(), which would take a colon for a parameter.
        op.get_bind().exec_driver_sql(definition)
    replace_index("incident_words_1")
    op.execute('ANALYZE "Incident"')


def downgrade_postgresql() -> None:
    """Create the index of the rule before, and drop the functions."""
    replace_index("incident_words")
    schema = schema_of("Incident")
    for name in FUNCTIONS:
        op.get_bind().exec_driver_sql(f"DROP FUNCTION IF EXISTS {schema}.{name}(text)")


def replace_index(function: str) -> None:
    """Build the index of words by a function, in place of one by another function."""
    # A column of an index has the name of the function.
    found = sa.text("SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(:index)")
    index = f'{schema_of("Incident")}."{INDEX}"'
    if op.get_bind().scalar(found, {"index": index}) not in (None, function):
        drop_index(INDEX, "Incident")
    build_index(INDEX, "Incident", f"USING gin ({{schema}}.{function}(incident_message))")


def upgrade_sqlite() -> None:
    """Create the table of characters, and a new full-text table with its triggers."""
    connection = op.get_bind()
    if has_rows("Incident"):
        # Let other writers write between the last index and the words.
        start_transaction()
    found = sa.inspect(connection)
    if not found.has_table(sqlite.CHARACTERS):
        op.execute(sqlite.CREATE_CHARACTERS)
        rows = list(sqlite.characters())
        marks = ", ".join("?" * len(rows[0]))
        connection.exec_driver_sql(f"INSERT INTO {sqlite.CHARACTERS} VALUES ({marks})", rows)
        drop_sqlite_text()
    elif not found.has_table(FILLING):
        raise in_the_way(sqlite.CHARACTERS)
    # Otherwise an earlier upgrade was killed, and this one continues to fill the table.
    index_words(connection, FILLING)


def downgrade_sqlite() -> None:
    """Create the full-text table of the rule before, without a copy of the messages.

    Its triggers fail on rows whose messages it does not have.
    """
    drop_sqlite_text()
    for name in (FILLING, sqlite.CHARACTERS):
        op.execute(f"DROP TABLE IF EXISTS {name}")
    op.execute(
        "CREATE VIRTUAL TABLE incident_text USING fts5(incident_message, content='Incident', "
        "content_rowid='incident_id', tokenize='unicode61 remove_diacritics 0')"
    )
    add = (
        "INSERT INTO incident_text (rowid, incident_message) "
        "VALUES (new.incident_id, new.incident_message)"
    )
    remove = (
        "INSERT INTO incident_text (incident_text, rowid, incident_message) "
        "VALUES ('delete', old.incident_id, old.incident_message)"
    )
    insert, update, delete = TEXT_TRIGGERS
    op.execute(f'CREATE TRIGGER {insert} AFTER INSERT ON "Incident" BEGIN {add}; END')
    op.execute(
        f'CREATE TRIGGER {update} AFTER UPDATE OF incident_id, incident_message ON "Incident" '
        f"BEGIN {remove}; {add}; END"
    )
    op.execute(f'CREATE TRIGGER {delete} AFTER DELETE ON "Incident" BEGIN {remove}; END')
    op.execute("INSERT INTO incident_text (incident_text) VALUES ('rebuild')")


def drop_sqlite_text() -> None:
    """Drop the full-text table with its triggers; the origin's table has none."""
    for name in TEXT_TRIGGERS:
        op.execute(f"DROP TRIGGER IF EXISTS {name}")
    op.execute("DROP TABLE IF EXISTS incident_text")

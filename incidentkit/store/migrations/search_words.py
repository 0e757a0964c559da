"""Index the words of messages by one rule on both databases.

Each database had a rule of its own, which also depended on its version and its locale. Now both
have that of ``incidentkit/domain/words.py`` with its table of characters: PostgreSQL in a function,
SQLite in a table that triggers read. So messages that other programs write are indexed by the same
rule.

On PostgreSQL, the function ``incident_words(text)`` stays for the searches of processes that were
not restarted yet, but its index goes.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from incidentkit.store.migrations.incident_event import TEXT_TRIGGERS, upgrade_sqlite_text
from incidentkit.store.postgresql import words as postgresql
from incidentkit.store.schema import in_the_way
from incidentkit.store.sqlite import words as sqlite

revision = "a6d40b7f21c8"
down_revision = "3e92f6b08d47"
branch_labels = None
depends_on = None

INDEX = "ix_Incident_incident_message"


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


def upgrade_postgresql() -> None:
    """Create the functions, and the index on them."""
    encoding = str(op.get_bind().scalar(sa.text("SELECT getdatabaseencoding()")))
    for definition in postgresql.functions(table_schema(), encoding):
        # Not op.execute(), which would take a colon for a parameter.
        op.get_bind().exec_driver_sql(definition)
    op.drop_index(INDEX, "Incident")
    create_index("incident_words_1")


def downgrade_postgresql() -> None:
    """Create the index of the rule before, and drop the functions."""
    op.drop_index(INDEX, "Incident")
    create_index("incident_words")
    for name in ("incident_words_1", "incident_text_1", "incident_characters_1"):
        op.execute(f"DROP FUNCTION {table_schema()}.{name}(text)")


def create_index(function: str) -> None:
    """Create the index of words by a function."""
    op.execute(
        f'CREATE INDEX "{INDEX}" ON "Incident" '
        f"USING gin ({table_schema()}.{function}(incident_message))"
    )


def table_schema() -> str:
    """Return the schema of the incidents, quoted where it has to be."""
    select = (
        "SELECT CAST(CAST(relnamespace AS regnamespace) AS text) FROM pg_class "
        """WHERE oid = CAST('"Incident"' AS regclass)"""
    )
    return str(op.get_bind().scalar(sa.text(select)))


def upgrade_sqlite() -> None:
    """Create the table of characters, and a new full-text table with its triggers."""
    if sa.inspect(op.get_bind()).has_table(sqlite.CHARACTERS):
        raise in_the_way(sqlite.CHARACTERS)
    op.execute(sqlite.CREATE_CHARACTERS)
    rows = list(sqlite.characters())
    marks = ", ".join("?" * len(rows[0]))
    op.get_bind().exec_driver_sql(f"INSERT INTO {sqlite.CHARACTERS} VALUES ({marks})", rows)
    drop_sqlite_text()
    op.execute(sqlite.CREATE_TEXT)
    for definition in sqlite.triggers().values():
        op.get_bind().exec_driver_sql(definition)
    sqlite.index_messages(op.get_bind())


def downgrade_sqlite() -> None:
    """Create the full-text table of the rule before."""
    drop_sqlite_text()
    op.drop_table(sqlite.CHARACTERS)
    upgrade_sqlite_text()


def drop_sqlite_text() -> None:
    """Drop the full-text table with its triggers."""
    for name in TEXT_TRIGGERS:
        op.execute(f"DROP TRIGGER {name}")
    op.execute("DROP TABLE incident_text")

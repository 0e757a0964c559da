"""Build the large indexes of the incidents while other programs read and write the table.

The migrations before this one change the table in one transaction, during which other programs
wait. They leave out each index that may take long. Databases that an earlier version of incidentkit
has upgraded have these indexes already.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from incidentkit.store.indexes import build_index, has_rows, start_transaction

revision = "a61c08d5e372"
down_revision = "3e92f6b08d47"
branch_labels = None
depends_on = None

INDEXES = {
    "ix_Incident_created_at": "(created_at, incident_id)",
    "ix_Incident_incident_type": "(incident_type, created_at, incident_id)",
    "ix_Incident_source": "(source, created_at, incident_id)",
    "ix_Incident_incident_type_source": "(incident_type, source, created_at, incident_id)",
    "ix_Incident_ended_at": "(ended_at, incident_id) WHERE ended_at IS NOT NULL",
}
WORDS = "ix_Incident_incident_message"
TEXT_TRIGGERS = ("incident_text_insert", "incident_text_update", "incident_text_delete")


def upgrade() -> None:
    for name, definition in INDEXES.items():
        build_index(name, "Incident", definition)
    if op.get_bind().dialect.name == "sqlite":
        index_words_on_sqlite()
    else:
        build_index(WORDS, "Incident", "USING gin ({schema}.incident_words(incident_message))")
        op.execute('ANALYZE "Incident"')


def index_words_on_sqlite() -> None:
    """Index the words of the messages in a table without a copy of the messages.

    The triggers are created together with the index: they fail on rows that it does not have.
    """
    if sa.inspect(op.get_bind()).has_table("incident_text"):
        return
    if has_rows("Incident"):
        start_transaction()
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


def downgrade() -> None:
    """Keep the indexes: the versions before this revision need them too."""

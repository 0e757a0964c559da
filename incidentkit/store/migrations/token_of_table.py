"""Bind the token to its table: to its place, its definition and its triggers.

On PostgreSQL, the triggers' function takes the schema from their table, so the schema can be
renamed. A transaction that finds the token of its backend held or replaced uses a second one of its
backend, so the number of tokens stays bounded at every isolation level. On SQLite, the token has a
random ``rowid``, which a dump as SQL does not carry to another file.
"""

from __future__ import annotations

from alembic import op

from incidentkit.store.indexes import has_rows, start_transaction
from incidentkit.store.mending import restore_token
from incidentkit.store.migrations import incident_token, token_without_waiting

revision = "a1f80c46d2b7"
down_revision = "a6d40b7f21c8"
branch_labels = None
depends_on = None


def upgrade() -> None:
    bind = op.get_bind()
    if bind.dialect.name == "postgresql" and has_rows("Incident"):
        # If the lock of the table is not granted in time, only this step is repeated.
        start_transaction()
    restore_token(bind)


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        for name in incident_token.SQLITE_TRIGGERS:
            op.execute(f"DROP TRIGGER {name}")
        op.execute("DELETE FROM incident_token")
        incident_token.create_sqlite_triggers()
        return
    for name in incident_token.POSTGRESQL_TRIGGERS:
        op.execute(f'DROP TRIGGER {name} ON "Incident"')
    # The triggers need a function; the next step replaces it.
    incident_token.create_postgresql_triggers()
    token_without_waiting.replace_function(token_without_waiting.WITHOUT_WAITING)

"""Index the words of messages by one rule on both databases.

Each database had a rule of its own, which also depended on its version and its locale. Now both
have that of ``incidentkit/domain/words.py`` with its table of characters: PostgreSQL in a function,
SQLite in a table that triggers read. So messages that other programs write are indexed by the same
rule.

On PostgreSQL, the function ``incident_words(text)`` stays for the searches of processes that were
not restarted yet, but its index goes.
"""

from __future__ import annotations

from alembic import op

from incidentkit.store.migrations import words_on_postgresql, words_on_sqlite

revision = "a6d40b7f21c8"
down_revision = "3e92f6b08d47"
branch_labels = None
depends_on = None


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        words_on_sqlite.upgrade()
    else:
        words_on_postgresql.upgrade()


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        words_on_sqlite.downgrade()
    else:
        words_on_postgresql.downgrade()

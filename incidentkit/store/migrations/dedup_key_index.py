"""Find the incidents with a deduplication key by an index, also those that have ended.

It is built while other programs read and write the table.
"""

from __future__ import annotations

from alembic import op

from incidentkit.store.indexes import build_index

revision = "d4e07b93c1f6"
down_revision = "a1f80c46d2b7"
branch_labels = None
depends_on = None

NAME = "ix_Incident_dedup_key"


def upgrade() -> None:
    columns = "(dedup_key, created_at, incident_id)"
    build_index(NAME, "Incident", f"{columns} WHERE dedup_key IS NOT NULL")


def downgrade() -> None:
    op.execute(f'DROP INDEX IF EXISTS "{NAME}"')

"""Add the details of an incident, as the last column of its table.

The column has no default, so no row is written, and PostgreSQL holds the lock of the table for a
moment. The version before goes on working: its statements name neither the column nor all columns.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

from incidentkit.store.indexes import has_rows, start_transaction
from incidentkit.store.schema import in_the_way

revision = "7e4a9d16c3b8"
down_revision = "d52c90b7e6f3"
branch_labels = None
depends_on = None

TABLE = "Incident"
COLUMN = "details"


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql" and has_rows(TABLE):
        # If the lock of the table is not granted in time, only this step is repeated.
        start_transaction()
    found = sa.inspect(op.get_bind())
    if COLUMN in {column["name"] for column in found.get_columns(TABLE)}:
        raise in_the_way(f"{TABLE}.{COLUMN}", "column")
    op.add_column(TABLE, sa.Column(COLUMN, sa.Text().with_variant(JSONB(), "postgresql")))


def downgrade() -> None:
    """Drop the details of all incidents."""
    op.drop_column(TABLE, COLUMN)

"""Add a table for the REST service's request log."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from incidentkit.store.schema import in_the_way

revision = "b27d4f0c1a96"
down_revision = "5c1f0e9b7a34"
branch_labels = None
depends_on = None


def upgrade() -> None:
    found = sa.inspect(op.get_bind())
    if found.has_table("request_log", schema=found.default_schema_name):
        raise in_the_way("request_log")
    op.create_table(
        "request_log",
        sa.Column(
            "request_log_id",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        sa.Column("logged_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("method", sa.String(), nullable=False),
        sa.Column("route", sa.String(), nullable=False),
        sa.Column("status", sa.SmallInteger(), nullable=False),
        sa.Column("duration_ms", sa.Double(), nullable=False),
        sa.Column("request_id", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("request_log_id", name="pk_request_log"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_request_log_logged_at", "request_log", ["logged_at"])


def downgrade() -> None:
    op.drop_index("ix_request_log_logged_at", "request_log")
    op.drop_table("request_log")

"""Add access tokens, the actor of an idempotency key, and whose request a record is of.

The version before goes on writing: its statements name neither of the new columns, and find the
idempotency keys by the same primary key.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from incidentkit.store.schema import in_the_way

revision = "d52c90b7e6f3"
down_revision = "d4e07b93c1f6"
branch_labels = None
depends_on = None

ACTIVE = sa.text("revoked_at IS NULL")
COLUMNS = (
    ("incident_idempotency_key", "actor"),
    ("request_log", "actor"),
    ("request_log", "client_address"),
)


def upgrade() -> None:
    found = sa.inspect(op.get_bind())
    if found.has_table("incident_access_token", schema=found.default_schema_name):
        raise in_the_way("incident_access_token")
    time = sa.DateTime(timezone=True)
    op.create_table(
        "incident_access_token",
        sa.Column(
            "access_token_id",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("scopes", sa.String(), nullable=False),
        sa.Column("created_at", time, nullable=False),
        sa.Column("expires_at", time),
        sa.Column("revoked_at", time),
        sa.Column("last_used_at", time),
        sa.PrimaryKeyConstraint("access_token_id", name="pk_incident_access_token"),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "ux_incident_access_token_sha256", "incident_access_token", ["sha256"], unique=True
    )
    op.create_index(
        "ux_incident_access_token_name",
        "incident_access_token",
        ["name"],
        unique=True,
        sqlite_where=ACTIVE,
        postgresql_where=ACTIVE,
    )
    for table, column in COLUMNS:
        op.add_column(table, sa.Column(column, sa.String()))


def downgrade() -> None:
    for table, column in reversed(COLUMNS):
        op.drop_column(table, column)
    op.drop_index("ux_incident_access_token_name", "incident_access_token")
    op.drop_index("ux_incident_access_token_sha256", "incident_access_token")
    op.drop_table("incident_access_token")

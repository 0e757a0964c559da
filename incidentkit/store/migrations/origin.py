"""Create the origin's table exactly as the origin's only migration does."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "dadc1db062ae"
down_revision = None
branch_labels = None
depends_on = None

INCIDENT_STATUS = sa.Enum("new", "completed", "failed", name="incidentstatus")
INCIDENT_SOURCE = sa.Enum("operator", "monitoring", "partner", name="incidentsource")


def upgrade() -> None:
    op.create_table(
        "Incident",
        sa.Column("incident_id", sa.Integer(), nullable=False),
        sa.Column("incident_message", sa.String(), nullable=True),
        sa.Column("incident_type", INCIDENT_STATUS, nullable=True),
        sa.Column("source", INCIDENT_SOURCE, nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("incident_id", name="pk_Incident"),
    )


def downgrade() -> None:
    op.drop_table("Incident")
    INCIDENT_STATUS.drop(op.get_bind(), checkfirst=True)
    INCIDENT_SOURCE.drop(op.get_bind(), checkfirst=True)

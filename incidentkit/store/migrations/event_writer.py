"""Refuse events of older statements, as of a process that was not restarted after an upgrade.

Such events could lack data that newer processes rely on. Each event now has the number of the
statements that wrote it, and the schema accepts a single number. Only incidentkit writes events:
the origin, SQL by hand and ``COPY`` still write to ``"Incident"`` as before.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "3e92f6b08d47"
down_revision = "c7d15a82e9b4"
branch_labels = None
depends_on = None

WRITER = 2
CHECK = "ck_incident_event_writer"
REFUSAL = "the schema takes events of newer statements only"


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        # SQLite cannot change a default: the existing events keep 0.
        op.add_column(
            "incident_event",
            sa.Column("writer", sa.SmallInteger(), nullable=False, server_default=sa.text("0")),
        )
        op.execute(
            f"CREATE TRIGGER {CHECK} BEFORE INSERT ON incident_event WHEN new.writer <> {WRITER} "
            f"BEGIN SELECT RAISE(ABORT, '{CHECK}: {REFUSAL}'); END"
        )
        return
    # The first default applies to existing events, without rewriting them.
    op.add_column(
        "incident_event",
        sa.Column("writer", sa.SmallInteger(), nullable=False, server_default=sa.text(str(WRITER))),
    )
    op.alter_column("incident_event", "writer", server_default=sa.text("0"))
    op.create_check_constraint(op.f(CHECK), "incident_event", f"writer = {WRITER}")


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        op.execute(f"DROP TRIGGER {CHECK}")
    else:
        op.drop_constraint(op.f(CHECK), "incident_event", type_="check")
    op.drop_column("incident_event", "writer")

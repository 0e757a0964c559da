"""The origin's table made strict: 64-bit ids, no nulls, checks, an index for each list.

No row is lost. A null that the origin may have left is filled: the status with ``new``, the source
with ``operator``, the message with ``(no message)``, and the time with the latest one known of the
incidents before it, or the epoch.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "5c1f0e9b7a34"
down_revision = "dadc1db062ae"
branch_labels = None
depends_on = None

STATUSES = ("new", "completed", "failed")
SOURCES = ("operator", "monitoring", "partner")
COLUMNS = ("incident_message", "incident_type", "source", "created_at")
INDEXES = {
    "ix_Incident_created_at": ["created_at", "incident_id"],
    "ix_Incident_incident_type": ["incident_type", "created_at", "incident_id"],
    "ix_Incident_source": ["source", "created_at", "incident_id"],
    "ix_Incident_incident_type_source": [
        "incident_type",
        "source",
        "created_at",
        "incident_id",
    ],
}


def on_sqlite() -> bool:
    return op.get_bind().dialect.name == "sqlite"


def upgrade() -> None:
    if not on_sqlite():
        lower_enum_labels("incidentstatus", STATUSES)
        lower_enum_labels("incidentsource", SOURCES)
        read_naive_times_as_utc()
    fill_nulls()
    if on_sqlite():
        upgrade_sqlite()
    else:
        upgrade_postgresql()
    for name, columns in INDEXES.items():
        op.create_index(name, "Incident", columns)


def downgrade() -> None:
    for name in INDEXES:
        op.drop_index(name, "Incident")
    if on_sqlite():
        downgrade_sqlite()
    else:
        downgrade_postgresql()


def lower_enum_labels(type_name: str, labels: tuple[str, ...]) -> None:
    """Rename labels such as NEW: SQLAlchemy stores an enum's names unless told otherwise."""
    found = op.get_bind().scalars(
        sa.text("SELECT enumlabel FROM pg_enum WHERE enumtypid = CAST(:name AS regtype)"),
        {"name": type_name},
    )
    for label in set(found.all()) - set(labels):
        if label.lower() in labels:
            op.execute(f"ALTER TYPE {type_name} RENAME VALUE '{label}' TO '{label.lower()}'")


def read_naive_times_as_utc() -> None:
    columns = sa.inspect(op.get_bind()).get_columns("Incident")
    created_at = next(column["type"] for column in columns if column["name"] == "created_at")
    if not getattr(created_at, "timezone", False):
        op.execute(
            'ALTER TABLE "Incident" ALTER COLUMN created_at TYPE timestamptz '
            "USING created_at AT TIME ZONE 'UTC'"
        )


def fill_nulls() -> None:
    op.execute(
        'UPDATE "Incident" SET created_at = known.latest FROM ('
        "SELECT incident_id AS id, max(created_at) OVER (ORDER BY incident_id) AS latest "
        'FROM "Incident") AS known '
        'WHERE "Incident".incident_id = known.id AND "Incident".created_at IS NULL'
    )
    epoch = "1970-01-01 00:00:00" if on_sqlite() else "1970-01-01 00:00:00+00"
    for column, value in {
        "created_at": epoch,
        "incident_message": "(no message)",
        "incident_type": "new",
        "source": "operator",
    }.items():
        incident = sa.table("Incident", sa.column(column))
        op.execute(
            incident.update()
            .where(incident.c[column].is_(None))
            .values({column: sa.literal_column(f"'{value}'")})
        )


def upgrade_postgresql() -> None:
    op.alter_column("Incident", "incident_id", type_=sa.BigInteger())
    op.execute(
        "DO $$ BEGIN EXECUTE format('ALTER SEQUENCE %s AS bigint', "
        """pg_get_serial_sequence('"Incident"', 'incident_id')); END $$"""
    )
    for column in COLUMNS:
        op.alter_column("Incident", column, nullable=False)
    op.alter_column(
        "Incident",
        "created_at",
        server_default=sa.text("date_trunc('second', clock_timestamp())"),
    )
    op.create_check_constraint(op.f("ck_Incident_incident_id"), "Incident", "incident_id > 0")


def downgrade_postgresql() -> None:
    op.drop_constraint(op.f("ck_Incident_incident_id"), "Incident", type_="check")
    op.alter_column("Incident", "created_at", server_default=None)
    for column in COLUMNS:
        op.alter_column("Incident", column, nullable=True)
    op.execute(
        "DO $$ BEGIN EXECUTE format('ALTER SEQUENCE %s AS integer', "
        """pg_get_serial_sequence('"Incident"', 'incident_id')); END $$"""
    )
    op.alter_column("Incident", "incident_id", type_=sa.Integer())


def upgrade_sqlite() -> None:
    with op.batch_alter_table(
        "Incident", recreate="always", table_kwargs={"sqlite_autoincrement": True}
    ) as batch:
        for column in COLUMNS:
            batch.alter_column(column, nullable=False)
        batch.alter_column("created_at", server_default=sa.text("CURRENT_TIMESTAMP"))
        batch.create_check_constraint(op.f("ck_Incident_incident_id"), sa.text("incident_id > 0"))
        batch.create_check_constraint(
            op.f("ck_Incident_incidentstatus"), sa.column("incident_type").in_(STATUSES)
        )
        batch.create_check_constraint(
            op.f("ck_Incident_incidentsource"), sa.column("source").in_(SOURCES)
        )


def downgrade_sqlite() -> None:
    with op.batch_alter_table("Incident", recreate="always") as batch:
        for name in ("incident_id", "incidentstatus", "incidentsource"):
            batch.drop_constraint(op.f(f"ck_Incident_{name}"), type_="check")
        batch.alter_column("created_at", server_default=None)
        for column in COLUMNS:
            batch.alter_column(column, nullable=True)

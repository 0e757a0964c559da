"""Make the origin's table strict: 64-bit ids, no nulls, and checks.

No row is lost. Nulls left by the origin are filled: the status with ``new``, the source with
``operator``, the message with ``(no message)``, and the time with the latest known time of the
incidents before it, or the epoch. A time that Python cannot represent counts as null, and an id
below 1 is replaced by one past the largest.

The indexes of the lists follow in the migration ``a61c08d5e372``, which blocks no other program.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from incidentkit.domain.errors import StoreError
from incidentkit.store.indexes import check_free

revision = "5c1f0e9b7a34"
down_revision = "dadc1db062ae"
branch_labels = None
depends_on = None

MAX_INTEGER = 2**31 - 1
# The times that Python's datetime can represent in any time zone.
POSSIBLE_TIMES = "created_at >= '0001-01-02 00:00:00+00' AND created_at < '9999-12-31 00:00:00+00'"

STATUSES = ("new", "completed", "failed")
SOURCES = ("operator", "monitoring", "partner")
COLUMNS = ("incident_message", "incident_type", "source", "created_at")
INDEXES = (
    "ix_Incident_created_at",
    "ix_Incident_incident_type",
    "ix_Incident_source",
    "ix_Incident_incident_type_source",
)


def on_sqlite() -> bool:
    return op.get_bind().dialect.name == "sqlite"


def upgrade() -> None:
    if not on_sqlite():
        hold_table()
        check_free("Incident", *INDEXES)
        lower_enum_labels("incidentstatus", STATUSES)
        lower_enum_labels("incidentsource", SOURCES)
        read_naive_times_as_utc()
        op.alter_column("Incident", "created_at", nullable=True)
        op.execute(f'UPDATE "Incident" SET created_at = NULL WHERE NOT ({POSSIBLE_TIMES})')
    fill_nulls()
    if on_sqlite():
        upgrade_sqlite()
    else:
        upgrade_postgresql()


def downgrade() -> None:
    if not on_sqlite():
        hold_table()
    for name in INDEXES:
        op.execute(f'DROP INDEX IF EXISTS "{name}"')
    if on_sqlite():
        downgrade_sqlite()
    else:
        downgrade_postgresql()


def hold_table() -> None:
    """Lock the table before anything is read, and refuse a view that blocks the id's new type."""
    op.execute('LOCK TABLE "Incident" IN ACCESS EXCLUSIVE MODE')
    view = op.get_bind().scalar(
        sa.text(
            "SELECT CAST(CAST(r.ev_class AS regclass) AS text) FROM pg_depend d "
            "JOIN pg_rewrite r ON r.oid = d.objid "
            "JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid "
            "WHERE d.classid = CAST('pg_rewrite' AS regclass) "
            "AND d.refclassid = CAST('pg_class' AS regclass) "
            """AND d.refobjid = CAST('"Incident"' AS regclass) AND a.attname = 'incident_id' """
            "ORDER BY 1 LIMIT 1"
        )
    )
    if view is not None:
        raise StoreError(
            f"the view {view} is in the way: it reads incident_id, whose type must change; "
            "drop the view and create it again after the migration"
        )


def lower_enum_labels(type_name: str, labels: tuple[str, ...]) -> None:
    """Rename labels such as NEW: by default, SQLAlchemy stores an enum's names."""
    found = op.get_bind().scalars(
        sa.text("SELECT enumlabel FROM pg_enum WHERE enumtypid = CAST(:name AS regtype)"),
        {"name": type_name},
    )
    for label in sorted(set(found.all()) - set(labels)):
        if label.lower() in labels:
            op.execute(f"ALTER TYPE {type_name} RENAME VALUE '{label}' TO '{label.lower()}'")
        else:
            raise StoreError(
                f"the type {type_name} has a label that incidentkit does not know: {label}"
            )


def read_naive_times_as_utc() -> None:
    columns = sa.inspect(op.get_bind()).get_columns("Incident")
    created_at = next(column["type"] for column in columns if column["name"] == "created_at")
    if not getattr(created_at, "timezone", False):
        op.execute(
            'ALTER TABLE "Incident" ALTER COLUMN created_at TYPE timestamptz '
            "USING created_at AT TIME ZONE 'UTC'"
        )


def fill_nulls() -> None:
    unknown = sa.text('SELECT EXISTS (SELECT 1 FROM "Incident" WHERE created_at IS NULL)')
    if op.get_bind().scalar(unknown):
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
    sequence = id_sequence()
    op.execute(f"ALTER SEQUENCE {sequence} AS bigint")
    pass_known_ids(sequence)
    op.execute('UPDATE "Incident" SET incident_id = DEFAULT WHERE incident_id < 1')
    # In one statement, which reads the table once.
    op.execute(
        f"""
        ALTER TABLE "Incident"
        {" ".join(f"ALTER {column} SET NOT NULL," for column in COLUMNS)}
        ALTER created_at SET DEFAULT date_trunc('second', clock_timestamp()),
        ADD CONSTRAINT "ck_Incident_incident_id" CHECK (incident_id > 0),
        ADD CONSTRAINT "ck_Incident_created_at" CHECK ({POSSIBLE_TIMES})
        """
    )


def id_sequence() -> str:
    """Return the sequence of the ids; a dump or a copy may have separated it from its column.

    A sequence without an owner becomes the column's own, and a column without one gets a new one.
    """
    bind = op.get_bind()
    in_default = bind.scalar(
        sa.text(
            "SELECT CAST(CAST(s.oid AS regclass) AS text) FROM pg_attribute a "
            "JOIN pg_attrdef e ON e.adrelid = a.attrelid AND e.adnum = a.attnum "
            "JOIN pg_depend d ON d.classid = CAST('pg_attrdef' AS regclass) AND d.objid = e.oid "
            "AND d.refclassid = CAST('pg_class' AS regclass) "
            "JOIN pg_class s ON s.oid = d.refobjid AND s.relkind = 'S' "
            """WHERE a.attrelid = CAST('"Incident"' AS regclass) AND a.attname = 'incident_id'"""
        )
    )
    owned = bind.scalar(sa.text("""SELECT pg_get_serial_sequence('"Incident"', 'incident_id')"""))
    sequence = str(in_default or owned or '"Incident_incident_id_seq"')
    if in_default is None:
        op.execute(f"CREATE SEQUENCE IF NOT EXISTS {sequence}")
    parameters = {"sequence": sequence}
    # Owned by nothing (NULL), by a column with a default ('a'), or by an identity column ('i').
    owner = bind.scalar(
        sa.text(
            "SELECT CAST(deptype AS text) FROM pg_depend "
            "WHERE classid = CAST('pg_class' AS regclass) "
            "AND objid = CAST(:sequence AS regclass) AND deptype IN ('a', 'i')"
        ),
        parameters,
    )
    if owner is None:
        op.execute(f'ALTER SEQUENCE {sequence} OWNED BY "Incident".incident_id')
    if owner != "i" and in_default is None:
        default = sequence.replace("'", "''")
        op.execute(f"""ALTER TABLE "Incident" ALTER incident_id SET DEFAULT nextval('{default}')""")
    return sequence


def next_id(sequence: str) -> int:
    """Return the next value of the sequence, without taking it."""
    found = op.get_bind().scalar(
        sa.text(
            "SELECT s.last_value + CASE WHEN s.is_called THEN p.seqincrement ELSE 0 END "
            f"FROM {sequence} s, pg_sequence p WHERE p.seqrelid = CAST(:sequence AS regclass)"
        ),
        {"sequence": sequence},
    )
    return int(found or 0)


def pass_known_ids(sequence: str) -> None:
    """Move the sequence past 0 and past ids that were inserted explicitly, as from a dump."""
    bind = op.get_bind()
    known = bind.scalar(sa.text('SELECT greatest(max(incident_id), 0) FROM "Incident"')) or 0
    if next_id(sequence) <= known:
        bind.execute(
            sa.text("SELECT setval(CAST(:sequence AS regclass), :id, false)"),
            {"sequence": sequence, "id": known + 1},
        )


def downgrade_postgresql() -> None:
    sequence = id_sequence()
    largest = op.get_bind().scalar(sa.text('SELECT max(incident_id) FROM "Incident"')) or 0
    if max(largest, next_id(sequence) - 1) > MAX_INTEGER:
        raise StoreError(
            f"an id past {MAX_INTEGER} has been assigned, which Incident API's table cannot hold"
        )
    op.drop_constraint(op.f("ck_Incident_created_at"), "Incident", type_="check")
    op.drop_constraint(op.f("ck_Incident_incident_id"), "Incident", type_="check")
    op.alter_column("Incident", "created_at", server_default=None)
    for column in COLUMNS:
        op.alter_column("Incident", column, nullable=True)
    op.execute(f"ALTER SEQUENCE {sequence} AS integer")
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

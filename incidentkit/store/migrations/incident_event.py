"""Add histories, idempotency keys, and the function by which PostgreSQL indexes words.

``incident_event`` starts empty, because earlier events were not recorded. An incident that has
already ended gets the time of the migration as its end, because the real one is unknown. The
columns added to ``"Incident"`` have defaults, so that other writers keep working.

The large indexes and, on SQLite, the table of words follow in the migrations ``a61c08d5e372``,
``a6d40b7f21c8`` and ``d4e07b93c1f6``, which block no other program.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from incidentkit.store.indexes import check_free, has_rows, start_transaction
from incidentkit.store.schema import in_the_way

revision = "9b3f6d20c7e8"
down_revision = "e4a81c3f5d27"
branch_labels = None
depends_on = None

STATUSES = "('new', 'completed', 'failed')"
KINDS = "('created', 'recurred', 'status_changed', 'noted', 'purged')"
OPEN_WITH_KEY = sa.text("incident_type = 'new' AND dedup_key IS NOT NULL")

COLUMNS = ("version", "dedup_key", "occurrences", "last_seen_at", "ended_at", "transaction_id")
TABLES = ("incident_event", "incident_purged_event", "incident_idempotency_key")
INDEXES = ("ix_Incident_ended_at", "ix_Incident_dedup_key", "ix_Incident_incident_message")
MAX_WORD = 255
TIME_TRIGGERS = ("incident_created_at_insert", "incident_created_at_update")
TEXT_TRIGGERS = ("incident_text_insert", "incident_text_update", "incident_text_delete")


def on_sqlite() -> bool:
    return op.get_bind().dialect.name == "sqlite"


def upgrade() -> None:
    if on_sqlite() and has_rows("Incident"):
        # Let other writers write between the copy of the table and its update.
        start_transaction()
    found = sa.inspect(op.get_bind())
    for name in (*TABLES, *(("incident_text",) if on_sqlite() else ())):
        if found.has_table(name, schema=found.default_schema_name):
            raise in_the_way(name)
    if not on_sqlite():
        check_free("Incident", *INDEXES)
    time = sa.DateTime(timezone=True)
    now = sa.text("CURRENT_TIMESTAMP" if on_sqlite() else "date_trunc('second', clock_timestamp())")
    key = sa.Integer() if on_sqlite() else sa.BigInteger()
    op.create_table(
        "incident_event",
        sa.Column("event_id", key, autoincrement=True, nullable=False),
        sa.Column("transaction_id", sa.BigInteger(), nullable=False),
        sa.Column("nonce", sa.BigInteger(), nullable=False),
        sa.Column("incident_id", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("from_status", sa.String()),
        sa.Column("to_status", sa.String()),
        sa.Column("actor", sa.String()),
        sa.Column("note", sa.String()),
        sa.Column("at", time, nullable=False),
        sa.PrimaryKeyConstraint("event_id", name="pk_incident_event"),
        sa.CheckConstraint(f"kind IN {KINDS}", name=op.f("ck_incident_event_kind")),
        sa.CheckConstraint(
            f"from_status IN {STATUSES}", name=op.f("ck_incident_event_from_status")
        ),
        sa.CheckConstraint(f"to_status IN {STATUSES}", name=op.f("ck_incident_event_to_status")),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "ix_incident_event_transaction_id", "incident_event", ["transaction_id", "event_id"]
    )
    op.create_index("ix_incident_event_incident_id", "incident_event", ["incident_id", "event_id"])
    op.create_table(
        "incident_purged_event",
        sa.Column("event_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("transaction_id", sa.BigInteger(), nullable=False),
        sa.Column("nonce", sa.BigInteger(), nullable=False),
        sa.Column("purged_at", time, nullable=False, server_default=now),
        sa.PrimaryKeyConstraint("event_id", name="pk_incident_purged_event"),
    )
    op.create_index("ix_incident_purged_event_purged_at", "incident_purged_event", ["purged_at"])
    op.create_table(
        "incident_idempotency_key",
        sa.Column("idempotency_key", sa.String(), nullable=False),
        sa.Column("fingerprint", sa.String(), nullable=False),
        sa.Column("answer", sa.String()),
        sa.Column("created_at", time, nullable=False, server_default=now),
        sa.PrimaryKeyConstraint("idempotency_key", name="pk_incident_idempotency_key"),
    )
    op.create_index(
        "ix_incident_idempotency_key_created_at", "incident_idempotency_key", ["created_at"]
    )
    for column in (
        sa.Column("version", sa.BigInteger(), nullable=False, server_default=sa.text("1")),
        sa.Column("dedup_key", sa.String()),
        sa.Column("occurrences", sa.BigInteger(), nullable=False, server_default=sa.text("1")),
        sa.Column("last_seen_at", time),
        sa.Column("ended_at", time),
        sa.Column("transaction_id", sa.BigInteger(), nullable=False, server_default=sa.text("0")),
    ):
        op.add_column("Incident", column)
    op.create_index(
        "ux_Incident_dedup_key",
        "Incident",
        ["dedup_key"],
        unique=True,
        postgresql_where=OPEN_WITH_KEY,
        sqlite_where=OPEN_WITH_KEY,
    )
    if on_sqlite():
        op.execute(f"UPDATE \"Incident\" SET ended_at = {now.text} WHERE incident_type <> 'new'")
        upgrade_sqlite_times()
        return
    # Faster than an update: it fires no trigger for each row, and leaves no dead rows.
    op.execute(
        'ALTER TABLE "Incident" ALTER ended_at TYPE timestamptz '
        f"USING CASE WHEN incident_type <> 'new' THEN {now.text} END"
    )
    op.execute("UPDATE incident_token SET token = gen_random_uuid()")
    upgrade_postgresql_text()


def upgrade_sqlite_times() -> None:
    """Add triggers that store every time in the form that sorts chronologically."""
    whole = "UPDATE \"Incident\" SET created_at = strftime('%Y-%m-%d %H:%M:%S', created_at)"
    # NULL, and so not true, for a value that is not a time.
    other = "{0}created_at <> strftime('%Y-%m-%d %H:%M:%S', {0}created_at)"
    op.execute(f"{whole} WHERE {other.format('')}")
    for name, event in zip(TIME_TRIGGERS, ("INSERT", "UPDATE OF created_at"), strict=True):
        op.execute(
            f'CREATE TRIGGER {name} AFTER {event} ON "Incident" WHEN {other.format("new.")} '
            f"BEGIN {whole} WHERE incident_id = new.incident_id; END"
        )


def upgrade_postgresql_text() -> None:
    """Add the function by which messages are indexed, and which queries must use too."""
    # In a database with the locale C, lower() and [:alnum:] know only ASCII.
    collation = (
        "SELECT 1 FROM pg_collation WHERE collname = 'pg_c_utf8' "
        "AND collencoding = pg_char_to_encoding(getdatabaseencoding())"
    )
    collate = "COLLATE pg_c_utf8" if op.get_bind().scalar(sa.text(collation)) else ""
    op.execute(
        f"""
        CREATE FUNCTION incident_words(message text) RETURNS tsvector
        LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
        BEGIN
            -- Not to_tsvector, whose parser takes some words for numbers and cuts them in two.
            RETURN pg_catalog.array_to_tsvector(ARRAY(
                SELECT DISTINCT pg_catalog."left"(word, {MAX_WORD}) FROM
                pg_catalog.regexp_split_to_table(
                    pg_catalog.lower(message {collate}) {collate}, '[^[:alnum:]]+') AS word
                WHERE word OPERATOR(pg_catalog.<>) ''));
        END $$
        """
    )


def downgrade() -> None:
    if on_sqlite():
        for name in (*TEXT_TRIGGERS, *TIME_TRIGGERS):
            op.execute(f"DROP TRIGGER IF EXISTS {name}")
        op.execute("DROP TABLE IF EXISTS incident_text")
    else:
        op.execute('DROP INDEX IF EXISTS "ix_Incident_incident_message"')
        op.execute("DROP FUNCTION incident_words(text)")
    op.execute('DROP INDEX IF EXISTS "ix_Incident_ended_at"')
    op.drop_index("ux_Incident_dedup_key", "Incident")
    for name in reversed(COLUMNS):
        op.drop_column("Incident", name)
    for name in TABLES:
        op.drop_table(name)

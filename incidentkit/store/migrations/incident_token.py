"""Add random tokens, which triggers replace on every change of the incidents by any program.

On PostgreSQL there are sixteen. A transaction replaces its backend's token when it commits, so that
writers rarely wait for each other and never for a transaction that has not reached its commit. If
another transaction has replaced the same token since its snapshot and its isolation level forbids
a second change, it adds a token, which a later transaction removes. SQLite has one writer at a time
and needs only one token.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from incidentkit.store.schema import in_the_way

revision = "e4a81c3f5d27"
down_revision = "b27d4f0c1a96"
branch_labels = None
depends_on = None

SQLITE_TRIGGERS = {
    "incident_token_insert": "INSERT",
    "incident_token_update": "UPDATE",
    "incident_token_delete": "DELETE",
}


POSTGRESQL_TRIGGERS = ("incident_token_change", "incident_token_truncate")


def upgrade() -> None:
    found = sa.inspect(op.get_bind())
    if found.has_table("incident_token", schema=found.default_schema_name):
        raise in_the_way("incident_token")
    op.create_table(
        "incident_token",
        sa.Column("slot", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("token", sa.Uuid(), nullable=False),
        sa.PrimaryKeyConstraint("slot", name="pk_incident_token"),
    )
    if op.get_bind().dialect.name == "sqlite":
        create_sqlite_triggers()
    else:
        upgrade_postgresql()


def create_sqlite_triggers() -> None:
    replacement = "INSERT INTO incident_token VALUES (0, lower(hex(randomblob(16))))"
    op.execute(replacement)
    for name, event in SQLITE_TRIGGERS.items():
        # Not UPDATE or INSERT OR REPLACE: an INSERT OR IGNORE of an incident would override it.
        op.execute(
            f'CREATE TRIGGER {name} AFTER {event} ON "Incident" '
            f"BEGIN DELETE FROM incident_token; {replacement}; END"
        )


def upgrade_postgresql() -> None:
    schema = schema_name()
    op.execute(
        "INSERT INTO incident_token SELECT slot, gen_random_uuid() FROM generate_series(0, 15) slot"
    )
    # The writer may have another search path and no rights to the token table. Not op.execute(),
    # which would take a colon in the name of the schema for a parameter.
    op.get_bind().exec_driver_sql(
        f"""
        CREATE FUNCTION incident_token_change() RETURNS trigger
        LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
        BEGIN
            INSERT INTO {schema}.incident_token
            VALUES (pg_backend_pid() % 16, gen_random_uuid())
            ON CONFLICT (slot) DO UPDATE SET token = EXCLUDED.token;
            -- What a serializable transaction reads here would tie it to every other one.
            IF current_setting('transaction_isolation') <> 'serializable' THEN
                DELETE FROM {schema}.incident_token WHERE slot IN (
                    SELECT slot FROM {schema}.incident_token WHERE slot > 15 FOR UPDATE SKIP LOCKED
                );
            END IF;
            RETURN NULL;
        EXCEPTION WHEN serialization_failure THEN
            INSERT INTO {schema}.incident_token
            VALUES (15 + CAST(CAST(pg_current_xact_id() AS text) AS bigint), gen_random_uuid())
            ON CONFLICT (slot) DO UPDATE SET token = EXCLUDED.token;
            RETURN NULL;
        END $$
        """
    )
    create_postgresql_triggers()


def create_postgresql_triggers() -> None:
    schema = schema_name()
    # The condition is evaluated for each row. It is true for the first one of a transaction, and
    # again after a rollback to a savepoint, which also rolls back the setting.
    setting = "'incidentkit.token_change'"
    here = f"CAST(pg_current_xact_id() AS text) || {literal(schema)}"
    op.get_bind().exec_driver_sql(
        f"""
        CREATE CONSTRAINT TRIGGER incident_token_change
        AFTER INSERT OR UPDATE OR DELETE ON "Incident"
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
        WHEN (CASE WHEN current_setting({setting}, true) IS NOT DISTINCT FROM {here} THEN false
            ELSE set_config({setting}, {here}, true) IS NOT NULL END)
        EXECUTE FUNCTION incident_token_change()
        """
    )
    op.execute(
        'CREATE TRIGGER incident_token_truncate AFTER TRUNCATE ON "Incident" '
        "FOR EACH STATEMENT EXECUTE FUNCTION incident_token_change()"
    )
    # Fire for changes applied by logical replication too.
    for name in POSTGRESQL_TRIGGERS:
        op.execute(f'ALTER TABLE "Incident" ENABLE ALWAYS TRIGGER {name}')


def schema_name() -> str:
    """Return the table's schema, quoted for use in a statement."""
    return str(
        op.get_bind().scalar(
            sa.text(
                "SELECT CAST(CAST(relnamespace AS regnamespace) AS text) FROM pg_class "
                """WHERE oid = CAST('"Incident"' AS regclass)"""
            )
        )
    )


def literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        for name in SQLITE_TRIGGERS:
            op.execute(f"DROP TRIGGER {name}")
    else:
        op.execute('DROP TRIGGER incident_token_truncate ON "Incident"')
        op.execute('DROP TRIGGER incident_token_change ON "Incident"')
        op.execute("DROP FUNCTION incident_token_change()")
    op.drop_table("incident_token")

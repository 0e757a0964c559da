"""Let a transaction add a token instead of waiting for the one of its backend.

A prepared transaction holds the row of its token until it ends, which may be never, and every
sixteenth backend waited for it. Now a transaction waits for a millisecond, and then adds a token,
which a later one removes. SQLite has one writer at a time, so nothing changes there.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "c7d15a82e9b4"
down_revision = "9b3f6d20c7e8"
branch_labels = None
depends_on = None

WITHOUT_WAITING = """
CREATE OR REPLACE FUNCTION {schema}.incident_token_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
-- A sequential scan would read every version that an old snapshot keeps.
SET lock_timeout = 1 SET enable_seqscan = off AS $$
DECLARE
    added bigint := 0;
BEGIN
    BEGIN
        INSERT INTO {schema}.incident_token
        VALUES (pg_backend_pid() % 16, gen_random_uuid())
        ON CONFLICT (slot) DO UPDATE SET token = EXCLUDED.token;
    EXCEPTION WHEN serialization_failure OR lock_not_available THEN
        -- Only a lock of the whole table can be in the way of a row of its own.
        PERFORM set_config('lock_timeout', '0', true);
        added := 15 + CAST(CAST(pg_current_xact_id() AS text) AS bigint);
        INSERT INTO {schema}.incident_token
        VALUES (added, gen_random_uuid())
        ON CONFLICT (slot) DO UPDATE SET token = EXCLUDED.token;
    END;
    -- What a serializable transaction reads here would tie it to every other one.
    IF current_setting('transaction_isolation') <> 'serializable'
        AND EXISTS (SELECT FROM {schema}.incident_token WHERE slot > 15 AND slot <> added)
    THEN
        BEGIN
            DELETE FROM {schema}.incident_token WHERE slot IN (
                SELECT slot FROM {schema}.incident_token
                WHERE slot > 15 AND slot <> added
                FOR UPDATE SKIP LOCKED
            );
        EXCEPTION WHEN serialization_failure OR lock_not_available THEN
            -- A later transaction removes them.
        END;
    END IF;
    RETURN NULL;
END $$
"""

WAITING = """
CREATE OR REPLACE FUNCTION {schema}.incident_token_change() RETURNS trigger
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


def upgrade() -> None:
    replace_function(WITHOUT_WAITING)


def downgrade() -> None:
    replace_function(WAITING)


def replace_function(definition: str) -> None:
    """Replace the function of the triggers, in the schema of the table."""
    if op.get_bind().dialect.name == "sqlite":
        return
    schema = op.get_bind().scalar(
        sa.text(
            "SELECT CAST(CAST(relnamespace AS regnamespace) AS text) FROM pg_class "
            """WHERE oid = CAST('"Incident"' AS regclass)"""
        )
    )
    # Not op.execute(), which would take a colon in the name of the schema for a parameter.
    op.get_bind().exec_driver_sql(definition.format(schema=schema))

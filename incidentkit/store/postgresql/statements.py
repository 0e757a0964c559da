"""The statements that write on PostgreSQL: an incident and its event in one statement.

The place of an event in the order of all events is the number of its transaction, or that of the
previous event of the same incident, whichever is larger: transactions that change one incident do
not always begin to write in the order in which they change it.

A status, a source and details travel as text, and arrays of numbers as arrays of text, so that
asyncpg does not look up their types.
"""

from __future__ import annotations

from itertools import product
from typing import Final

from sqlalchemy import TextClause

from incidentkit.domain.values import DEEP, TEXT_MAX_WORDS
from incidentkit.domain.words import LONG
from incidentkit.store.schema import WRITER
from incidentkit.store.sql.functions import TOKEN_ON_POSTGRESQL
from incidentkit.store.sql.naming import RULE_FUNCTIONS, text
from incidentkit.store.sql.rows import (
    DETAILED_COLUMNS,
    ENUMS,
    EVENT_COLUMNS,
    INCIDENT_COLUMNS,
)
from incidentkit.store.sql.search import WordsMatch


def _incident(table: str) -> str:
    """Return the columns of an incident in the order of the model, to select from a table."""
    return ", ".join(
        f"CAST({table}.{name} AS text) AS {name}" if name in ENUMS else f"{table}.{name}"
        for name in INCIDENT_COLUMNS
    )


def _detailed(table: str) -> str:
    """Return the same columns, and the details as the last one."""
    return f"{_incident(table)}, CAST({table}.details AS text) AS details"


def _event(table: str) -> str:
    """Return the columns of an event in the order of the model, to select from a table."""
    return ", ".join(f"{table}.{name}" for name in EVENT_COLUMNS)


_CHANGED: Final = ", ".join(f"stored.{name}" for name in (*DETAILED_COLUMNS, "transaction_id"))
"""The columns that an insert or update of ``"Incident" AS stored`` returns.

Each is named: a host may have added a column with any name.
"""

_TRANSACTION: Final = "CAST(CAST(pg_current_xact_id() AS text) AS bigint)"
_NOW: Final = "date_trunc('second', clock_timestamp())"
# 53 bits: the integers that JavaScript reads exactly.
_NONCE: Final = "CAST(floor(random() * 9007199254740992) AS bigint)"

_UNASSIGNED: Final = """greatest(
    CAST(CAST(pg_snapshot_xmax(pg_current_snapshot()) AS text) AS bigint),
    CAST(CAST(pg_current_xact_id_if_assigned() AS text) AS bigint) + 1
)"""
"""The first number that the server had not assigned to a transaction when the statement began, or
the number of its own transaction plus one if that is larger."""

_IN_ORDER: Final = f"""coalesce(
    (SELECT max(last.transaction_id) FROM incident_event AS last) < {_UNASSIGNED},
    true
)"""
"""Holds unless events were copied from another server, whose transactions had larger numbers: a new
event would come before them, and readers would miss it."""


def _none_kept_out(due: str) -> str:
    """Return a condition that makes the statement fail unless each due row has one in ``event``.

    A trigger can suppress a row, or undo a change. The cast of a text to a boolean then fails
    (SQLSTATE 22P02), so nothing of the statement is stored.
    """
    return f"""(
        SELECT CASE WHEN kept.out = 0
            THEN true
            ELSE CAST('a trigger kept out rows: ' || kept.out AS boolean)
        END
        FROM (
            SELECT (SELECT count(*) FROM {due}) - (SELECT count(*) FROM event) AS out
        ) AS kept
    )"""


def _numbers(name: str) -> str:
    return f"CAST(CAST(:{name} AS text[]) AS bigint[])"


_OR_COUNT: Final = f"""\
ON CONFLICT (dedup_key) WHERE incident_type = 'new' AND dedup_key IS NOT NULL
        DO UPDATE SET
            version = stored.version + 1,
            occurrences = stored.occurrences + 1,
            last_seen_at = {_NOW},
            transaction_id = greatest(stored.transaction_id, EXCLUDED.transaction_id)"""

# The event of an incident that was inserted or counted, told apart by its occurrences.
_KIND: Final = "CASE WHEN changed.occurrences = 1 THEN 'created' ELSE 'recurred' END"
_FIRST_STATUS: Final = (
    "CASE WHEN changed.occurrences = 1 THEN CAST(changed.incident_type AS text) END"
)
_SEEN_AT: Final = "coalesce(changed.last_seen_at, changed.created_at)"


def _insert_incident(*, or_count: bool) -> TextClause:
    return text(f"""
        WITH changed AS (
            INSERT INTO "Incident" AS stored
                (
                    incident_message, incident_type, source, dedup_key, ended_at, transaction_id,
                    details
                )
            SELECT
                CAST(:incident_message AS text),
                CAST(CAST(:incident_type AS text) AS incidentstatus),
                CAST(CAST(:source AS text) AS incidentsource),
                CAST(:dedup_key AS text),
                CASE WHEN CAST(:incident_type AS text) <> 'new' THEN {_NOW} END,
                {_TRANSACTION},
                CAST(CAST(:details AS text) AS jsonb)
            WHERE {_IN_ORDER}
            {_OR_COUNT if or_count else ""}
            RETURNING {_CHANGED}
        ),
        event AS (
            INSERT INTO incident_event
                (writer, transaction_id, nonce, incident_id, kind, to_status, actor, note, at)
            SELECT
                {WRITER},
                changed.transaction_id,
                {_NONCE},
                changed.incident_id,
                {_KIND},
                {_FIRST_STATUS},
                CAST(:actor AS text),
                CASE WHEN changed.occurrences > 1
                    THEN nullif(CAST(:incident_message AS text), changed.incident_message)
                END,
                {_SEEN_AT}
            FROM changed
            RETURNING incident_event.event_id
        )
        SELECT {_detailed("changed")}
        FROM changed
        WHERE {_none_kept_out("changed")}
    """)


INSERT_INCIDENT: Final = {
    with_key: _insert_incident(or_count=with_key) for with_key in (False, True)
}
"""Inserts an incident, or counts an occurrence of the open one with its key, and returns the
incident; by whether it has a deduplication key. Returns no row if events are out of order, or a
trigger keeps out the incident."""

_ALL_SEE_THE_SAME: Final = """(
        SELECT NOT relrowsecurity
        FROM pg_class
        WHERE oid = CAST('"Incident"' AS regclass)
    )"""
"""Holds unless sessions may see different rows. A statement that several calls share must not do
anything otherwise."""

_ROW_SECURITY: Final = """EXISTS (
        SELECT
        FROM pg_class
        WHERE oid IN (CAST('"Incident"' AS regclass), CAST('incident_event' AS regclass))
            AND relrowsecurity
    )"""
"""Holds if sessions may see different rows, or write different ones. A statement that writes for
several calls must not do anything then."""

SELECT_WITHOUT_ROW_SECURITY: Final = text(f"SELECT WHERE NOT {_ROW_SECURITY}")
"""Returns a row unless sessions may see different incidents or events."""


def _insert_incidents(condition: str) -> TextClause:
    return text(f"""
    WITH given AS (
        SELECT given.*
        FROM unnest(
            CAST(:messages AS text[]),
            CAST(:statuses AS text[]),
            CAST(:sources AS text[]),
            CAST(:actors AS text[]),
            CAST(:details AS text[])
        ) WITH ORDINALITY AS given (message, status, source, actor, details, n)
        WHERE {_IN_ORDER} {condition}
    ),
    changed AS (
        INSERT INTO "Incident" AS stored
            (incident_message, incident_type, source, ended_at, transaction_id, details)
        SELECT
            given.message,
            CAST(given.status AS incidentstatus),
            CAST(given.source AS incidentsource),
            CASE WHEN given.status <> 'new' THEN {_NOW} END,
            {_TRANSACTION},
            CAST(given.details AS jsonb)
        FROM given
        ORDER BY given.n
        RETURNING {_CHANGED}
    ),
    numbered AS (
        SELECT changed.*, row_number() OVER () AS n
        FROM changed
    ),
    event AS (
        INSERT INTO incident_event
            (writer, transaction_id, nonce, incident_id, kind, to_status, actor, at)
        SELECT
            {WRITER},
            numbered.transaction_id,
            {_NONCE},
            numbered.incident_id,
            'created',
            CAST(numbered.incident_type AS text),
            given.actor,
            numbered.created_at
        FROM numbered
        JOIN given ON given.n = numbered.n
        WHERE (SELECT count(*) FROM changed) = (SELECT count(*) FROM given)
        ORDER BY given.n
        RETURNING incident_event.event_id
    )
    SELECT {_detailed("numbered")}
    FROM numbered
    WHERE {_none_kept_out("given")}
    ORDER BY numbered.n
    """)


INSERT_INCIDENTS: Final = _insert_incidents("")
"""Inserts incidents without deduplication keys and returns them in the given order: that in which
the insert returns its rows, independent of their ids. Returns no row if events are out of order.

If a host's trigger suppresses a row, the numbers no longer tell which incident is which. The
statement then fails and inserts none."""

INSERT_FOR_SEVERAL: Final = _insert_incidents(f"AND NOT {_ROW_SECURITY}")
"""The same for several calls; under row security it inserts none and returns no row."""

INSERT_OR_COUNT: Final = text(f"""
    WITH given AS (
        SELECT given.*
        FROM unnest(
            CAST(:messages AS text[]),
            CAST(:sources AS text[]),
            CAST(:dedup_keys AS text[]),
            CAST(:actors AS text[]),
            CAST(:details AS text[])
        ) WITH ORDINALITY AS given (message, source, key, actor, details, n)
        WHERE {_IN_ORDER}
    ),
    changed AS (
        INSERT INTO "Incident" AS stored
            (incident_message, incident_type, source, dedup_key, transaction_id, details)
        SELECT
            given.message,
            'new',
            CAST(given.source AS incidentsource),
            given.key,
            {_TRANSACTION},
            CAST(given.details AS jsonb)
        FROM given
        ORDER BY given.n
        {_OR_COUNT}
        RETURNING {_CHANGED}
    ),
    numbered AS (
        SELECT changed.*, row_number() OVER () AS n
        FROM changed
    ),
    event AS (
        INSERT INTO incident_event
            (writer, transaction_id, nonce, incident_id, kind, to_status, actor, note, at)
        SELECT
            {WRITER},
            changed.transaction_id,
            {_NONCE},
            changed.incident_id,
            {_KIND},
            {_FIRST_STATUS},
            given.actor,
            CASE WHEN changed.occurrences > 1
                THEN nullif(given.message, changed.incident_message)
            END,
            {_SEEN_AT}
        FROM numbered AS changed
        JOIN given ON given.n = changed.n
        WHERE (SELECT count(*) FROM numbered) = (SELECT count(*) FROM given)
        ORDER BY given.n
        RETURNING incident_event.event_id
    )
    SELECT {_detailed("numbered")}
    FROM numbered
    WHERE {_none_kept_out("given")}
    ORDER BY numbered.n
""")
"""Inserts incidents, each with a different deduplication key, or counts an occurrence of the open
ones, and returns them in the given order, which has to be that of the keys: no two statements then
wait for each other. Returns no row if events are out of order; if a trigger keeps out a row, the
statement fails."""

UPDATE_STATUS: Final = text(f"""
    WITH found AS (
        SELECT
            stored.incident_id,
            CAST(stored.incident_type AS text) AS from_status,
            stored.version,
            stored.dedup_key,
            {_NOW} AS at
        FROM "Incident" AS stored
        WHERE stored.incident_id = CAST(:incident_id AS bigint)
        FOR NO KEY UPDATE
    ),
    changed AS (
        UPDATE "Incident" AS stored
        SET
            incident_type = CAST(CAST(:status AS text) AS incidentstatus),
            version = stored.version + 1,
            ended_at = CASE WHEN CAST(:status AS text) <> 'new'
                THEN coalesce(stored.ended_at, found.at)
            END,
            transaction_id = greatest(stored.transaction_id, {_TRANSACTION})
        FROM found
        WHERE stored.incident_id = found.incident_id
            AND found.from_status <> CAST(:status AS text)
            AND found.from_status = ANY(CAST(:from_statuses AS text[]))
            AND found.version = coalesce(CAST(:expected_version AS bigint), found.version)
            AND (
                CAST(:status AS text) <> 'new'
                OR found.dedup_key IS NULL
                OR NOT EXISTS (
                    SELECT
                    FROM "Incident" AS other
                    WHERE other.dedup_key = found.dedup_key AND other.incident_type = 'new'
                )
            )
            AND {_IN_ORDER}
        RETURNING {_CHANGED}, found.from_status, found.at
    ),
    event AS (
        INSERT INTO incident_event
            (
                writer, transaction_id, nonce, incident_id, kind, from_status, to_status, actor,
                note, at
            )
        SELECT
            {WRITER},
            changed.transaction_id,
            {_NONCE},
            changed.incident_id,
            'status_changed',
            changed.from_status,
            CAST(changed.incident_type AS text),
            CAST(:actor AS text),
            CAST(:note AS text),
            changed.at
        FROM changed
        WHERE CAST(changed.incident_type AS text) <> changed.from_status
        RETURNING incident_event.event_id
    )
    SELECT {_detailed("changed")}
    FROM changed
    WHERE {_none_kept_out("changed")}
""")
"""Changes the status of an incident and returns it. Returns no row if anything prevents the change:
the caller then finds out what. If a trigger keeps the status as it was, the statement fails."""

UPDATE_STATUSES: Final = text(f"""
    WITH given AS (
        SELECT given.*
        FROM unnest(
            {_numbers("incident_ids")},
            CAST(:statuses AS text[]),
            CAST(:from_statuses AS text[]),
            {_numbers("expected_versions")},
            CAST(:notes AS text[]),
            CAST(:actors AS text[])
        ) AS given (incident_id, status, from_statuses, expected_version, note, actor)
        WHERE {_IN_ORDER} AND NOT {_ROW_SECURITY}
    ),
    found AS (
        SELECT
            stored.incident_id,
            CAST(stored.incident_type AS text) AS from_status,
            stored.version,
            {_NOW} AS at
        FROM "Incident" AS stored
        WHERE stored.incident_id = ANY({_numbers("incident_ids")})
        ORDER BY stored.incident_id
        FOR NO KEY UPDATE SKIP LOCKED
    ),
    due AS (
        SELECT given.*, found.from_status, found.at
        FROM given
        JOIN found ON found.incident_id = given.incident_id
        WHERE found.from_status <> given.status
            AND found.from_status = ANY(string_to_array(given.from_statuses, ' '))
            AND found.version = coalesce(given.expected_version, found.version)
    ),
    changed AS (
        UPDATE "Incident" AS stored
        SET
            incident_type = CAST(due.status AS incidentstatus),
            version = stored.version + 1,
            ended_at = coalesce(stored.ended_at, due.at),
            transaction_id = greatest(stored.transaction_id, {_TRANSACTION})
        FROM due
        WHERE stored.incident_id = due.incident_id
        RETURNING {_CHANGED}, due.from_status, due.note, due.actor, due.at
    ),
    event AS (
        INSERT INTO incident_event
            (
                writer, transaction_id, nonce, incident_id, kind, from_status, to_status, actor,
                note, at
            )
        SELECT
            {WRITER},
            changed.transaction_id,
            {_NONCE},
            changed.incident_id,
            'status_changed',
            changed.from_status,
            CAST(changed.incident_type AS text),
            changed.actor,
            changed.note,
            changed.at
        FROM changed
        WHERE CAST(changed.incident_type AS text) <> changed.from_status
        RETURNING incident_event.event_id
    )
    SELECT {_detailed("changed")}
    FROM changed
    WHERE {_none_kept_out("changed")}
""")
"""Ends incidents, and returns those whose change nothing prevents. It locks them in the order of
their ids, and leaves out an incident that another transaction has locked."""


def _resolve(given: str) -> TextClause:
    return text(f"""
    WITH given AS (
        SELECT given.*
        FROM {given} AS given (key, n)
    ),
    found AS (
        SELECT stored.incident_id, given.key, given.n, {_NOW} AS at
        FROM given
        JOIN "Incident" AS stored ON stored.dedup_key = given.key
        WHERE stored.incident_type = 'new'
        ORDER BY given.n
        FOR NO KEY UPDATE OF stored
    ),
    changed AS (
        UPDATE "Incident" AS stored
        SET
            incident_type = CAST(CAST(:status AS text) AS incidentstatus),
            version = stored.version + 1,
            ended_at = coalesce(stored.ended_at, found.at),
            transaction_id = greatest(stored.transaction_id, {_TRANSACTION})
        FROM found
        WHERE stored.incident_id = found.incident_id AND {_IN_ORDER}
        RETURNING {_CHANGED}, found.key, found.n, found.at
    ),
    event AS (
        INSERT INTO incident_event
            (
                writer, transaction_id, nonce, incident_id, kind, from_status, to_status, actor,
                note, at
            )
        SELECT
            {WRITER},
            changed.transaction_id,
            {_NONCE},
            changed.incident_id,
            'status_changed',
            'new',
            CAST(changed.incident_type AS text),
            CAST(:actor AS text),
            CAST(:note AS text),
            changed.at
        FROM changed
        WHERE changed.incident_type <> 'new'
        ORDER BY changed.n
        RETURNING incident_event.event_id
    )
    SELECT {_detailed("changed")}, changed.key, due.number
    FROM (SELECT count(*) AS number FROM found) AS due
    LEFT JOIN changed ON true
    WHERE due.number > 0 AND {_none_kept_out("changed")}
""")


RESOLVE: Final = _resolve("(VALUES (CAST(:dedup_key AS text), 1))")
"""Ends the open incident with a deduplication key, if there is one. PostgreSQL keeps a plan for it;
it would plan a statement with an array of one key again for each call."""

RESOLVE_MANY: Final = _resolve("unnest(CAST(:dedup_keys AS text[])) WITH ORDINALITY")
"""Ends the open incidents with some deduplication keys, and returns each with its key and the
number of those that were open. It locks them in the order of the keys, and leaves out an incident
that another transaction ends first. A row of nulls, or fewer rows than that number, stands for
incidents that are still open: events are out of order, or a trigger keeps out the change."""

SELECT_OPEN: Final = text(f"""
    SELECT {_detailed('"Incident"')}
    FROM "Incident"
    WHERE dedup_key = ANY(CAST(:dedup_keys AS text[])) AND incident_type = 'new'
""")
"""Returns the open incidents with some deduplication keys."""

SELECT_OPEN_DUPLICATE: Final = text("""
    SELECT incident_id
    FROM "Incident"
    WHERE incident_type = 'new' AND dedup_key = CAST(:dedup_key AS text)
    LIMIT 1
""")
"""Returns a row if an incident with the deduplication key is open."""

INSERT_NOTE: Final = text(f"""
    WITH found AS (
        SELECT stored.incident_id, stored.version, stored.transaction_id
        FROM "Incident" AS stored
        WHERE stored.incident_id = CAST(:incident_id AS bigint)
        FOR NO KEY UPDATE
    ),
    due AS (
        SELECT
            found.incident_id,
            found.transaction_id AS earlier,
            greatest(found.transaction_id, {_TRANSACTION}) AS transaction_id
        FROM found
        WHERE found.version = coalesce(CAST(:expected_version AS bigint), found.version)
            AND {_IN_ORDER}
    ),
    changed AS (
        UPDATE "Incident" AS stored
        SET transaction_id = due.transaction_id
        FROM due
        WHERE stored.incident_id = due.incident_id
            -- A trigger may leave out an update that changes nothing.
            AND due.transaction_id <> due.earlier
        RETURNING stored.incident_id
    )
    INSERT INTO incident_event (writer, transaction_id, nonce, incident_id, kind, actor, note, at)
    SELECT
        {WRITER},
        due.transaction_id,
        {_NONCE},
        due.incident_id,
        'noted',
        CAST(:actor AS text),
        CAST(:note AS text),
        {_NOW}
    FROM due
    WHERE due.transaction_id = due.earlier OR EXISTS (SELECT FROM changed)
    RETURNING {_event("incident_event")}
""")
"""Inserts a note and returns its event. Returns no row if the incident does not exist or has
another version, events are out of order, or a trigger keeps the note out."""

SELECT_INCIDENTS: Final = text(f"""
    SELECT {_detailed('"Incident"')}
    FROM (SELECT WHERE {_ALL_SEE_THE_SAME}) AS here
    LEFT JOIN "Incident" ON "Incident".incident_id = ANY({_numbers("incident_ids")})
""")
"""Returns several incidents, by their ids, in any order; one row of nulls if there is none. Under
row security it returns no row."""


def _select_pages(*, by_status: bool, by_source: bool) -> str:
    by = [
        *(["incident_type = CAST(wanted.status AS incidentstatus)"] if by_status else []),
        *(["source = CAST(wanted.source AS incidentsource)"] if by_source else []),
    ]
    conditions = " AND ".join(f'"Incident".{condition}' for condition in by)
    return f"""
        SELECT page.*, (SELECT token FROM current) AS token, wanted.n
        FROM wanted
        LEFT JOIN LATERAL (
            SELECT first.*
            FROM (
                SELECT {_incident('"Incident"')}
                FROM "Incident"
                {f"WHERE {conditions}" if conditions else ""}
                ORDER BY "Incident".created_at DESC, "Incident".incident_id DESC
                LIMIT {DEEP}
            ) AS first
            OFFSET wanted.skip
            LIMIT wanted.size
        ) AS page ON true
        WHERE wanted.status IS {"NOT" if by_status else ""} NULL
            AND wanted.source IS {"NOT" if by_source else ""} NULL
    """


_PAGES: Final = " UNION ALL ".join(
    _select_pages(by_status=by_status, by_source=by_source)
    for by_status, by_source in product((False, True), repeat=2)
)

SELECT_PAGES: Final = text(f"""
    WITH current AS MATERIALIZED (
        SELECT {TOKEN_ON_POSTGRESQL} AS token
    ),
    wanted AS MATERIALIZED (
        SELECT wanted.*
        FROM unnest(
            CAST(:statuses AS text[]),
            CAST(:sources AS text[]),
            {_numbers("limits")},
            {_numbers("offsets")}
        ) WITH ORDINALITY AS wanted (status, source, size, skip, n)
        WHERE {_ALL_SEE_THE_SAME}
    )
    {_PAGES}
    ORDER BY n, created_at DESC, incident_id DESC
""")
"""Returns several pages with their token, each row with the number of its page at the end. An empty
page is one row. Each combination of filters has an index, and so a part of the statement. Under row
security it returns no row."""

_EXPIRED: Final = "created_at < clock_timestamp() - interval '24 hours'"

CLAIM_KEY: Final = text(f"""
    INSERT INTO incident_idempotency_key AS old (idempotency_key, fingerprint, actor)
    SELECT CAST(:idempotency_key AS text), CAST(:fingerprint AS text), CAST(:actor AS text)
    WHERE NOT EXISTS (
        SELECT
        FROM incident_idempotency_key AS own
        WHERE own.idempotency_key = CAST(:own_key AS text) AND NOT own.{_EXPIRED}
    )
    ON CONFLICT (idempotency_key) DO UPDATE
    SET
        fingerprint = EXCLUDED.fingerprint,
        answer = NULL,
        created_at = {_NOW},
        actor = EXCLUDED.actor
    WHERE old.{_EXPIRED}
    RETURNING idempotency_key
""")
"""Takes the key for this transaction and returns a row, unless it, or the actor's own one, was used
in the last 24 hours."""

DELETE_EXPIRED_KEYS: Final = text(f"""
    DELETE FROM incident_idempotency_key
    WHERE idempotency_key IN (
        SELECT idempotency_key
        FROM incident_idempotency_key
        WHERE {_EXPIRED}
        ORDER BY created_at
        LIMIT CAST(:limit AS bigint)
        FOR UPDATE SKIP LOCKED
    )
""")
"""Removes some keys that were used longer than 24 hours ago."""

SELECT_PURGEABLE: Final = text("""
    SELECT incident_id
    FROM "Incident"
    WHERE ended_at < CAST(:ended_before AS timestamptz) AND incident_type <> 'new'
    ORDER BY ended_at, incident_id
    LIMIT CAST(:limit AS bigint)
    FOR UPDATE SKIP LOCKED
""")
"""Locks and returns incidents to purge, in the order in which they ended.

An incident that a trigger or another program has reopened may still have an ``ended_at``.
"""

DELETE_EVENTS: Final = text("""
    WITH gone AS (
        DELETE FROM incident_event AS stored
        WHERE stored.event_id IN (
            SELECT event.event_id
            FROM incident_event AS event
            WHERE event.incident_id = ANY(CAST(:incident_ids AS bigint[]))
            ORDER BY event.incident_id, event.event_id
            LIMIT CAST(:events AS bigint)
        )
        RETURNING stored.event_id, stored.transaction_id, stored.nonce
    ),
    kept AS (
        INSERT INTO incident_purged_event AS stored (event_id, transaction_id, nonce)
        SELECT gone.event_id, gone.transaction_id, gone.nonce
        FROM gone
        ON CONFLICT (event_id) DO UPDATE
        SET
            transaction_id = EXCLUDED.transaction_id,
            nonce = EXCLUDED.nonce,
            purged_at = EXCLUDED.purged_at
        RETURNING stored.event_id
    )
    SELECT (SELECT count(*) FROM gone), (SELECT count(*) FROM kept)
""")
"""Removes events of incidents to purge, at most ``events``, and keeps their places. Returns the
number of events, and that of places."""

DELETE_INCIDENTS: Final = text(f"""
    WITH due AS (
        SELECT found.incident_id
        FROM "Incident" AS found
        WHERE found.incident_id = ANY(CAST(:incident_ids AS bigint[]))
            AND NOT EXISTS (
                SELECT
                FROM incident_event AS earlier
                WHERE earlier.incident_id = found.incident_id
            )
    ),
    changed AS (
        DELETE FROM "Incident" AS stored
        USING due
        WHERE stored.incident_id = due.incident_id
        RETURNING
            stored.incident_id,
            CAST(stored.incident_type AS text) AS status,
            greatest(stored.transaction_id, {_TRANSACTION}) AS transaction_id
    ),
    event AS (
        INSERT INTO incident_event
            (writer, transaction_id, nonce, incident_id, kind, from_status, actor, at)
        SELECT
            {WRITER},
            changed.transaction_id,
            {_NONCE},
            changed.incident_id,
            'purged',
            changed.status,
            CAST(:actor AS text),
            {_NOW}
        FROM changed
        RETURNING incident_event.event_id
    )
    SELECT count(*)
    FROM changed
    WHERE {_none_kept_out("due")}
""")
"""Removes the incidents whose events an earlier statement of the transaction has removed, inserts
the events of their purge, and returns their number."""

_SEQUENCE: Final = """
    FROM pg_sequence AS sequence
    JOIN pg_depend AS owned ON owned.objid = sequence.seqrelid
    JOIN pg_attribute AS owner
        ON owner.attrelid = owned.refobjid AND owner.attnum = owned.refobjsubid
    WHERE owned.classid = CAST('pg_class' AS regclass)
        AND owned.refclassid = CAST('pg_class' AS regclass)
        AND owned.refobjid = CAST('incident_event' AS regclass)
        AND owner.attname = 'event_id'
        AND (sequence.seqcache > 1 OR sequence.seqincrement < 0)
"""
"""The sequence of ``event_id``, if its numbers are not in the order in which they are taken."""

SELECT_DISORDER: Final = text(f"""
    SELECT
        NOT {_IN_ORDER},
        (SELECT CAST(CAST(sequence.seqrelid AS regclass) AS text) {_SEQUENCE} LIMIT 1),
        {_ROW_SECURITY}
""")
"""Returns whether an event has the number of a transaction that this server has yet to assign, the
name of the sequence of ``event_id`` if its numbers are out of order, or else null, and whether
sessions may see different events."""

SELECT_DISORDERED_SEQUENCES: Final = text(f"""
    SELECT CAST(CAST(sequence.seqrelid AS regclass) AS text)
    {_SEQUENCE}
""")
"""Returns the name of the sequence of ``event_id`` if its numbers are out of order."""

SELECT_LAST_EVENT_ID: Final = text("""
    SELECT greatest(
        (SELECT max(event.event_id) FROM incident_event AS event),
        (SELECT max(purged.event_id) FROM incident_purged_event AS purged),
        0
    )
""")
"""Returns the largest id of an event."""

SELECT_KNOWN_IDS: Final = {
    table: text(f"""
        SELECT CAST(CAST(sequence.seqrelid AS regclass) AS text), known.id
        FROM ({known}) AS known (id)
        JOIN pg_sequence AS sequence ON sequence.seqrelid
            = CAST(pg_get_serial_sequence('{table}', '{column}') AS regclass)
        WHERE sequence.seqincrement > 0 AND known.id > 0
    """)
    for table, column, known in (
        (
            '"Incident"',
            "incident_id",
            """SELECT greatest(
                (SELECT max(incident.incident_id) FROM "Incident" AS incident),
                (SELECT max(event.incident_id) FROM incident_event AS event)
            )""",
        ),
        ("incident_event", "event_id", SELECT_LAST_EVENT_ID.text),
    )
}
"""Returns the ascending sequence of the ids of a table, and the largest id that is known."""

SELECT_STRANDED: Final = text(f"""
    WITH unassigned AS MATERIALIZED (
        SELECT {_UNASSIGNED} AS number
    ),
    place AS (
        SELECT event.transaction_id, event.event_id
        FROM incident_event AS event
        UNION ALL
        SELECT purged.transaction_id, purged.event_id
        FROM incident_purged_event AS purged
        UNION ALL
        SELECT incident.transaction_id, 0
        FROM "Incident" AS incident
    )
    SELECT unassigned.number, max(place.transaction_id), max(place.event_id)
    FROM unassigned
    JOIN place ON place.transaction_id >= unassigned.number
    GROUP BY unassigned.number
""")
"""Returns a row if an event or an incident has the number of a transaction that this server has yet
to assign: the first such number, the largest that is in use, and the largest id of such an
event."""

SELECT_FEED_BLOCKER: Final = text("""
    WITH horizon AS MATERIALIZED (
        SELECT pg_snapshot_xmin(pg_current_snapshot()) AS xmin
    ),
    holder AS (
        SELECT
            xact_start AS since,
            pid,
            CAST(NULL AS text) AS gid,
            CAST(datname AS text) AS database,
            CAST(usename AS text) AS account,
            nullif(application_name, '') AS application,
            state
        FROM pg_stat_activity, horizon
        WHERE backend_xid = CAST(xmin AS xid)
        UNION ALL
        SELECT
            prepared,
            NULL,
            gid,
            CAST(database AS text),
            CAST(owner AS text),
            NULL,
            NULL
        FROM pg_prepared_xacts, horizon
        WHERE transaction = CAST(xmin AS xid)
    ),
    waiting AS (
        SELECT at
        FROM incident_event
        WHERE transaction_id >= (SELECT CAST(CAST(xmin AS text) AS bigint) FROM horizon)
        ORDER BY transaction_id, event_id
        LIMIT 1
    )
    SELECT
        coalesce(since, at),
        pid,
        gid,
        database,
        account,
        application,
        state,
        at IS NOT NULL
    FROM horizon
    LEFT JOIN holder ON true
    LEFT JOIN waiting ON true
    WHERE coalesce(since, at)
            <= clock_timestamp() - CAST(:seconds AS double precision) * interval '1 second'
        -- Elsewhere, a transaction that is not shown has just ended.
        AND (pid IS NOT NULL OR gid IS NOT NULL OR pg_is_in_recovery())
    LIMIT 1
""")
"""Returns the transaction that no event passes, if it is older than some seconds, in the order of
the fields of :class:`~incidentkit.FeedBlocker`.

Of other accounts' transactions, the start is hidden without the role ``pg_read_all_stats``. On a
standby, the transaction runs on another server. Then the age of the first event that waits counts.
"""

_WRITER: Final = "CAST(CAST({}.xmin AS text) AS bigint)"

_OWN: Final = f"""own AS MATERIALIZED (
    SELECT {_WRITER.format("event")} AS writer, min(event.event_id) AS event_id
    FROM incident_event AS event
    GROUP BY {_WRITER.format("event")}
    HAVING min(event.transaction_id) = max(event.transaction_id)
        AND max(event.transaction_id) % 4294967296 = {_WRITER.format("event")}
)"""
"""The transactions of this server that have written the events with their number (``xmin``). A
transaction that restores events writes events with many numbers."""

SHIFT: Final = {
    "incident_purged_event": text("""
        UPDATE incident_purged_event AS stored
        SET transaction_id = stored.transaction_id - :latest - 1
        WHERE stored.transaction_id >= :unassigned
            OR stored.transaction_id < 0
            OR stored.event_id <= :event_id
    """),
    "incident_event": text(f"""
        WITH {_OWN}
        UPDATE incident_event AS stored
        SET transaction_id = CASE
            WHEN stored.transaction_id >= :unassigned
                AND stored.event_id > (SELECT min(own.event_id) FROM own)
                AND {_WRITER.format("stored")} > (SELECT min(own.writer) FROM own)
            THEN {_TRANSACTION}
            ELSE stored.transaction_id - :latest - 1
        END
        WHERE stored.transaction_id >= :unassigned
            OR stored.transaction_id < 0
            OR (
                stored.event_id <= :event_id
                AND {_WRITER.format("stored")} NOT IN (SELECT own.writer FROM own)
            )
    """),
    "Incident": text(f"""
        UPDATE "Incident" AS stored
        SET transaction_id = {_TRANSACTION}
        WHERE stored.transaction_id >= :unassigned
    """),
}
"""Moves the events of another server, in their order, before every event of this one; by table.

Events that this server has written stay. Those that took the number of a copied incident have not
been delivered yet, and come last. The number of an incident is only a lower bound for its next
event."""

CHARACTERS, TEXT, WORDS = RULE_FUNCTIONS
"""``TEXT`` returns the words of a text, with a blank before and after each. ``CHARACTERS`` does the
same more slowly; the planner does not inline it, and so spends no time on it. ``WORDS`` is the
function of the index."""

_PHRASES: Final = f"""(
    SELECT
        CAST(:begins AS boolean) AND number = cardinality(CAST(:phrases AS text[])) AS begins,
        CASE
            WHEN phrase COLLATE "C" ~ '^[a-z0-9 ]*$' THEN ' ' || phrase || ' '
            -- A text that this database finds no word in is in no message.
            ELSE coalesce(nullif({CHARACTERS}(phrase), ' '), ' " ')
        END AS words
    FROM unnest(CAST(:phrases AS text[])) WITH ORDINALITY AS given (phrase, number)
) AS phrase"""
"""The phrases of a search, with a blank before and after each word. Phrases in ASCII are given as
they are compared. Only the last one may match the beginning of a word."""

_PATTERNS: Final = f"""ARRAY(
    SELECT '%' || CASE WHEN begins THEN rtrim(words) ELSE words END || '%'
    FROM {_PHRASES}
)"""
"""The patterns for the words of a message, one for each phrase."""

_QUERY: Final = f"""CAST((
    WITH word AS (
        SELECT DISTINCT
            "left"(word, {LONG}) AS word,
            -- Of a long word, the index may hold more, or the beginning alone.
            begins AND number = count OR length(word) >= {LONG} AS begins
        FROM {_PHRASES}
        CROSS JOIN LATERAL string_to_array(btrim(words), ' ') AS each
        CROSS JOIN LATERAL cardinality(each) AS count
        CROSS JOIN LATERAL unnest(each) WITH ORDINALITY AS one (word, number)
    ), longest AS (
        SELECT word, begins
        FROM word
        ORDER BY length(word) DESC
        LIMIT {TEXT_MAX_WORDS}
    )
    SELECT string_agg(
        quote_literal(word) || CASE WHEN begins THEN '\\:*' ELSE '' END,
        ' & '
    )
    FROM longest
) AS tsquery)"""
"""The query for messages that have the words of all phrases, somewhere."""

_SINGLE: Final = f"""(
    SELECT bool_and(strpos(btrim(words), ' ') = 0 AND length(words) <= {LONG})
    FROM {_PHRASES}
)"""
"""Whether each phrase is a single word that the index holds in full: then the index decides."""

WORDS_MATCH: Final = WordsMatch(
    by_index=text(f"""
        {WORDS}("Incident".incident_message) @@ {_QUERY}
        AND ({_SINGLE} OR {TEXT}("Incident".incident_message) COLLATE "C" LIKE ALL ({_PATTERNS}))
    """),
    of_first=text(f'{TEXT}(first.incident_message) COLLATE "C" LIKE ALL ({_PATTERNS})'),
    incidents=text("""
        SELECT CAST(reltuples AS bigint)
        FROM pg_class
        WHERE oid = CAST('"Incident"' AS regclass)
    """),
)
"""Holds for a message that has each phrase. The index knows words, but not which ones are next to
each other."""

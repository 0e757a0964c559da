"""The statements that write on PostgreSQL: an incident and its event in one statement.

The place of an event in the order of all events is the number of its transaction, or that of the
previous event of the same incident, whichever is larger: transactions that change one incident do
not always begin to write in the order in which they change it.

A status and a source travel as text, and arrays of numbers as arrays of text, so that asyncpg does
not look up their types.
"""

from __future__ import annotations

from itertools import product
from typing import Final

from sqlalchemy import TextClause, text

from incidentkit.domain.values import DEEP, TEXT_MAX_WORDS
from incidentkit.domain.words import LONG, RULE
from incidentkit.store.schema import WRITER
from incidentkit.store.sql.functions import TOKEN_ON_POSTGRESQL
from incidentkit.store.sql.rows import ENUMS, EVENT_COLUMNS, INCIDENT_COLUMNS
from incidentkit.store.sql.search import WordsMatch

_INCIDENT: Final = ", ".join(
    f"CAST({name} AS text) AS {name}" if name in ENUMS else name for name in INCIDENT_COLUMNS
)
_EVENT: Final = ", ".join(EVENT_COLUMNS)

_TRANSACTION: Final = "CAST(CAST(pg_current_xact_id() AS text) AS bigint)"
_NOW: Final = "date_trunc('second', clock_timestamp())"
# 53 bits: the integers that JavaScript reads exactly.
_NONCE: Final = "CAST(floor(random() * 9007199254740992) AS bigint)"


def _numbers(name: str) -> str:
    return f"CAST(CAST(:{name} AS text[]) AS bigint[])"


_OR_COUNT: Final = f"""\
ON CONFLICT (dedup_key) WHERE incident_type = 'new' AND dedup_key IS NOT NULL
        DO UPDATE SET
            version = old.version + 1,
            occurrences = old.occurrences + 1,
            last_seen_at = {_NOW},
            transaction_id = greatest(old.transaction_id, EXCLUDED.transaction_id)"""

# The event of an incident that was inserted or counted, told apart by its occurrences.
_KIND: Final = "CASE WHEN occurrences = 1 THEN 'created' ELSE 'recurred' END"
_FIRST_STATUS: Final = "CASE WHEN occurrences = 1 THEN CAST(incident_type AS text) END"
_SEEN_AT: Final = "coalesce(last_seen_at, created_at)"


def _insert_incident(*, or_count: bool) -> TextClause:
    return text(f"""
        WITH changed AS (
            INSERT INTO "Incident" AS old
                (incident_message, incident_type, source, dedup_key, ended_at, transaction_id)
            VALUES (
                CAST(:incident_message AS text),
                CAST(CAST(:incident_type AS text) AS incidentstatus),
                CAST(CAST(:source AS text) AS incidentsource),
                CAST(:dedup_key AS text),
                CASE WHEN CAST(:incident_type AS text) <> 'new' THEN {_NOW} END,
                {_TRANSACTION}
            )
            {_OR_COUNT if or_count else ""}
            RETURNING *
        ),
        event AS (
            INSERT INTO incident_event
                (writer, transaction_id, nonce, incident_id, kind, to_status, actor, note, at)
            SELECT
                {WRITER},
                transaction_id,
                {_NONCE},
                incident_id,
                {_KIND},
                {_FIRST_STATUS},
                CAST(:actor AS text),
                CASE WHEN occurrences > 1
                    THEN nullif(CAST(:incident_message AS text), incident_message)
                END,
                {_SEEN_AT}
            FROM changed
        )
        SELECT {_INCIDENT}
        FROM changed
    """)


INSERT_INCIDENT: Final = {
    with_key: _insert_incident(or_count=with_key) for with_key in (False, True)
}
"""Inserts an incident, or counts an occurrence of the open one with its key, and returns the
incident; by whether it has a deduplication key."""

INSERT_INCIDENTS: Final = text(f"""
    WITH given AS (
        SELECT *
        FROM unnest(
            CAST(:messages AS text[]),
            CAST(:statuses AS text[]),
            CAST(:sources AS text[]),
            CAST(:actors AS text[])
        ) WITH ORDINALITY AS given (message, status, source, actor, n)
    ),
    changed AS (
        INSERT INTO "Incident"
            (incident_message, incident_type, source, ended_at, transaction_id)
        SELECT
            message,
            CAST(status AS incidentstatus),
            CAST(source AS incidentsource),
            CASE WHEN status <> 'new' THEN {_NOW} END,
            {_TRANSACTION}
        FROM given
        ORDER BY n
        RETURNING *
    ),
    numbered AS (
        SELECT *, row_number() OVER (ORDER BY incident_id) AS n
        FROM changed
    ),
    event AS (
        INSERT INTO incident_event
            (writer, transaction_id, nonce, incident_id, kind, to_status, actor, at)
        SELECT
            {WRITER},
            transaction_id,
            {_NONCE},
            incident_id,
            'created',
            CAST(incident_type AS text),
            actor,
            created_at
        FROM numbered
        JOIN given USING (n)
        ORDER BY n
    ),
    missing AS (
        SELECT (SELECT count(*) FROM given) - (SELECT count(*) FROM changed) AS incidents
    )
    SELECT {_INCIDENT}
    FROM numbered
    WHERE (
        SELECT CASE WHEN incidents = 0
            THEN true
            ELSE CAST('a trigger kept out incidents: ' || incidents AS boolean)
        END
        FROM missing
    )
    ORDER BY n
""")
"""Inserts incidents without deduplication keys and returns them in the given order, which is that
of their ids, since each row takes the next one.

If a host's trigger keeps out a row, the numbers no longer tell which incident is which. The
statement then fails and inserts none: the text cannot be cast to a boolean (SQLSTATE 22P02)."""

INSERT_OR_COUNT: Final = text(f"""
    WITH given AS (
        SELECT *
        FROM unnest(
            CAST(:messages AS text[]),
            CAST(:sources AS text[]),
            CAST(:dedup_keys AS text[]),
            CAST(:actors AS text[])
        ) AS given (message, source, key, actor)
    ),
    changed AS (
        INSERT INTO "Incident" AS old
            (incident_message, incident_type, source, dedup_key, transaction_id)
        SELECT message, 'new', CAST(source AS incidentsource), key, {_TRANSACTION}
        FROM given
        ORDER BY key COLLATE "C"
        {_OR_COUNT}
        RETURNING *
    ),
    event AS (
        INSERT INTO incident_event
            (writer, transaction_id, nonce, incident_id, kind, to_status, actor, note, at)
        SELECT
            {WRITER},
            transaction_id,
            {_NONCE},
            incident_id,
            {_KIND},
            {_FIRST_STATUS},
            actor,
            CASE WHEN occurrences > 1 THEN nullif(message, incident_message) END,
            {_SEEN_AT}
        FROM changed
        JOIN given ON key = dedup_key
    )
    SELECT {_INCIDENT}
    FROM changed
""")
"""Inserts incidents, each with a different deduplication key, or counts an occurrence of the open
ones, and returns them. Every statement takes the keys in the same order, so that no two of them
wait for each other."""

UPDATE_STATUS: Final = text(f"""
    WITH found AS (
        SELECT
            incident_id AS id,
            CAST(incident_type AS text) AS from_status,
            version AS at_version,
            dedup_key AS key,
            {_NOW} AS now
        FROM "Incident"
        WHERE incident_id = CAST(:incident_id AS bigint)
        FOR NO KEY UPDATE
    ),
    changed AS (
        UPDATE "Incident"
        SET
            incident_type = CAST(CAST(:status AS text) AS incidentstatus),
            version = version + 1,
            ended_at = CASE WHEN CAST(:status AS text) <> 'new' THEN coalesce(ended_at, now) END,
            transaction_id = greatest(transaction_id, {_TRANSACTION})
        FROM found
        WHERE incident_id = id
            AND from_status <> CAST(:status AS text)
            AND from_status = ANY(CAST(:from_statuses AS text[]))
            AND at_version = coalesce(CAST(:expected_version AS bigint), at_version)
            AND (
                CAST(:status AS text) <> 'new'
                OR key IS NULL
                OR NOT EXISTS (
                    SELECT
                    FROM "Incident" AS other
                    WHERE other.dedup_key = key AND other.incident_type = 'new'
                )
            )
        RETURNING *
    ),
    event AS (
        INSERT INTO incident_event
            (
                writer, transaction_id, nonce, incident_id, kind, from_status, to_status, actor,
                note, at
            )
        SELECT
            {WRITER},
            transaction_id,
            {_NONCE},
            incident_id,
            'status_changed',
            from_status,
            CAST(:status AS text),
            CAST(:actor AS text),
            CAST(:note AS text),
            now
        FROM changed
    )
    SELECT {_INCIDENT}
    FROM changed
""")
"""Changes the status of an incident and returns it. Returns no row if anything prevents the change:
the caller then finds out what."""

UPDATE_STATUSES: Final = text(f"""
    WITH given AS (
        SELECT *
        FROM unnest(
            {_numbers("incident_ids")},
            CAST(:statuses AS text[]),
            CAST(:from_statuses AS text[]),
            {_numbers("expected_versions")},
            CAST(:notes AS text[]),
            CAST(:actors AS text[])
        ) AS given (id, status, from_statuses, expected_version, note, actor)
    ),
    found AS (
        SELECT
            incident_id AS id,
            CAST(incident_type AS text) AS from_status,
            version AS at_version,
            {_NOW} AS now
        FROM "Incident"
        WHERE incident_id = ANY({_numbers("incident_ids")})
        ORDER BY incident_id
        FOR NO KEY UPDATE SKIP LOCKED
    ),
    due AS (
        SELECT *
        FROM given
        JOIN found USING (id)
        WHERE from_status <> status
            AND from_status = ANY(string_to_array(from_statuses, ' '))
            AND at_version = coalesce(expected_version, at_version)
    ),
    changed AS (
        UPDATE "Incident"
        SET
            incident_type = CAST(status AS incidentstatus),
            version = version + 1,
            ended_at = coalesce(ended_at, now),
            transaction_id = greatest(transaction_id, {_TRANSACTION})
        FROM due
        WHERE incident_id = id
        RETURNING *
    ),
    event AS (
        INSERT INTO incident_event
            (
                writer, transaction_id, nonce, incident_id, kind, from_status, to_status, actor,
                note, at
            )
        SELECT
            {WRITER},
            transaction_id,
            {_NONCE},
            incident_id,
            'status_changed',
            from_status,
            status,
            actor,
            note,
            now
        FROM changed
    )
    SELECT {_INCIDENT}
    FROM changed
""")
"""Ends incidents, and returns those whose change nothing prevents. It locks them in the order of
their ids, and leaves out an incident that another transaction has locked."""

SELECT_OPEN_DUPLICATE: Final = text("""
    SELECT incident_id
    FROM "Incident"
    WHERE incident_type = 'new' AND dedup_key = CAST(:dedup_key AS text)
    LIMIT 1
""")
"""Returns a row if an incident with the deduplication key is open."""

INSERT_NOTE: Final = text(f"""
    WITH changed AS (
        UPDATE "Incident"
        SET transaction_id = greatest(transaction_id, {_TRANSACTION})
        WHERE incident_id = CAST(:incident_id AS bigint)
        RETURNING incident_id, transaction_id
    )
    INSERT INTO incident_event (writer, transaction_id, nonce, incident_id, kind, actor, note, at)
    SELECT
        {WRITER},
        transaction_id,
        {_NONCE},
        incident_id,
        'noted',
        CAST(:actor AS text),
        CAST(:note AS text),
        {_NOW}
    FROM changed
    RETURNING {_EVENT}
""")
"""Inserts a note and returns its event; no row if the incident does not exist."""

SELECT_INCIDENTS: Final = text(f"""
    SELECT {_INCIDENT}
    FROM "Incident"
    WHERE incident_id = ANY({_numbers("incident_ids")})
""")
"""Returns several incidents, by their ids, in any order."""


def _select_pages(*, by_status: bool, by_source: bool) -> str:
    conditions = " AND ".join(
        [
            *(["incident_type = CAST(wanted.status AS incidentstatus)"] if by_status else []),
            *(["source = CAST(wanted.source AS incidentsource)"] if by_source else []),
        ]
    )
    return f"""
        SELECT page.*, (SELECT token FROM current) AS token, wanted.n
        FROM wanted
        LEFT JOIN LATERAL (
            SELECT *
            FROM (
                SELECT {_INCIDENT}
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
        SELECT *
        FROM unnest(
            CAST(:statuses AS text[]),
            CAST(:sources AS text[]),
            {_numbers("limits")},
            {_numbers("offsets")}
        ) WITH ORDINALITY AS wanted (status, source, size, skip, n)
    )
    {_PAGES}
    ORDER BY n, created_at DESC, incident_id DESC
""")
"""Returns several pages with their token, each row with the number of its page at the end. An empty
page is one row. Each combination of filters has an index, and so a part of the statement."""

_EXPIRED: Final = "created_at < clock_timestamp() - interval '24 hours'"

CLAIM_KEY: Final = text(f"""
    INSERT INTO incident_idempotency_key AS old (idempotency_key, fingerprint)
    VALUES (CAST(:idempotency_key AS text), CAST(:fingerprint AS text))
    ON CONFLICT (idempotency_key) DO UPDATE
    SET fingerprint = EXCLUDED.fingerprint, answer = NULL, created_at = {_NOW}
    WHERE old.{_EXPIRED}
    RETURNING idempotency_key
""")
"""Takes the key for this transaction and returns a row, unless it was used in the last 24 hours."""

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
    WHERE ended_at < CAST(:ended_before AS timestamptz)
    ORDER BY ended_at, incident_id
    LIMIT CAST(:limit AS bigint)
    FOR UPDATE SKIP LOCKED
""")
"""Locks and returns incidents to purge, those that ended first in front."""

DELETE_EVENTS: Final = text("""
    WITH gone AS (
        DELETE FROM incident_event
        WHERE event_id IN (
            SELECT event_id
            FROM incident_event
            WHERE incident_id = ANY(CAST(:incident_ids AS bigint[]))
            ORDER BY incident_id, event_id
            LIMIT CAST(:events AS bigint)
        )
        RETURNING event_id, transaction_id, nonce
    )
    INSERT INTO incident_purged_event (event_id, transaction_id, nonce)
    SELECT event_id, transaction_id, nonce
    FROM gone
    ON CONFLICT (event_id) DO UPDATE
    SET
        transaction_id = EXCLUDED.transaction_id,
        nonce = EXCLUDED.nonce,
        purged_at = EXCLUDED.purged_at
""")
"""Removes events of incidents to purge, at most ``events``, and keeps their places."""

DELETE_INCIDENTS: Final = text(f"""
    WITH changed AS (
        DELETE FROM "Incident" AS old
        WHERE incident_id = ANY(CAST(:incident_ids AS bigint[]))
            AND NOT EXISTS (
                SELECT
                FROM incident_event AS event
                WHERE event.incident_id = old.incident_id
            )
        RETURNING
            incident_id,
            CAST(incident_type AS text) AS status,
            greatest(transaction_id, {_TRANSACTION}) AS transaction_id
    ),
    event AS (
        INSERT INTO incident_event
            (writer, transaction_id, nonce, incident_id, kind, from_status, actor, at)
        SELECT
            {WRITER},
            transaction_id,
            {_NONCE},
            incident_id,
            'purged',
            status,
            CAST(:actor AS text),
            {_NOW}
        FROM changed
    )
    SELECT count(*)
    FROM changed
""")
"""Removes the incidents whose events an earlier statement of the transaction has removed, inserts
the events of their purge, and returns their number."""

SELECT_STRANDED: Final = text("""
    SELECT latest
    FROM (SELECT max(transaction_id) AS latest FROM incident_event) AS events
    WHERE latest >= CAST(CAST(pg_snapshot_xmax(pg_current_snapshot()) AS text) AS bigint)
""")
"""Returns a row if an event has the number of a transaction that this server has yet to assign."""

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

SHIFT: Final = {
    name: text(f'UPDATE "{name}" SET transaction_id = transaction_id - :latest - 1')
    for name in ("incident_event", "incident_purged_event", "Incident")
}
"""Moves the existing events, in their order, before every event to come; by table."""

TEXT: Final = f"incident_text_{RULE}"
"""The function that returns the words of a text, with a blank before and after each."""

CHARACTERS: Final = f"incident_characters_{RULE}"
"""The function that does the same for any text, more slowly. It takes the planner no time, since no
expression stands in its place."""

WORDS: Final = f"incident_words_{RULE}"
"""The function of the index of words."""

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
"""The phrases of a search, with a blank before and after each word. Those in ASCII are given as
they are compared. Only the last one may begin a word."""

_PATTERNS: Final = f"""ARRAY(
    SELECT '%' || CASE WHEN begins THEN rtrim(words) ELSE words END || '%'
    FROM {_PHRASES}
)"""
"""The patterns that the words of a message match: one for each phrase."""

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
"""Whether each phrase is one word, which the index holds to its end: then it tells enough."""

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

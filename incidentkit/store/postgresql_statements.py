"""What PostgreSQL is told to write: an incident and its event in one statement.

The place of an event in the order of all is the number of its transaction, or that of the event
before it of the same incident, if that is larger: transactions that change one incident do not
always begin to write in the order in which they change it.

A status and a source travel as text, so that a driver has no need to look up the enum types.
"""

from __future__ import annotations

from itertools import product
from typing import Final

from sqlalchemy import TextClause, text

from incidentkit.store.search_statements import WordsMatch
from incidentkit.store.statements import DEEP
from incidentkit.store.tables import postgresql_token

_TRANSACTION: Final = "CAST(CAST(pg_current_xact_id() AS text) AS bigint)"
_NOW: Final = "date_trunc('second', clock_timestamp())"
# As many bits as a number of JSON has.
_NONCE: Final = "CAST(floor(random() * 9007199254740992) AS bigint)"


def _numbers(name: str) -> str:
    """Return an array of numbers, which travels as text: asyncpg has to look up no other arrays."""
    return f"CAST(CAST(:{name} AS text[]) AS bigint[])"


_INCIDENT: Final = (
    "incident_id, incident_message, CAST(incident_type AS text) AS incident_type, "
    "CAST(source AS text) AS source, created_at, version, dedup_key, occurrences, "
    "last_seen_at, ended_at"
)
_EVENT: Final = (
    "transaction_id, event_id, nonce, incident_id, kind, from_status, to_status, actor, note, at"
)


def _event(kind: str, from_status: str, to_status: str, note: str, at: str) -> str:
    """Return what inserts the events of the rows in `changed`."""
    return (
        "INSERT INTO incident_event (transaction_id, nonce, incident_id, kind, from_status, "
        "to_status, actor, note, at) "
        f"SELECT transaction_id, {_NONCE}, incident_id, {kind}, {from_status}, {to_status}, "
        f"CAST(:actor AS text), {note}, {at} FROM changed"
    )


_OR_COUNT: Final = (
    "ON CONFLICT (dedup_key) WHERE incident_type = 'new' AND dedup_key IS NOT NULL "
    "DO UPDATE SET version = old.version + 1, occurrences = old.occurrences + 1, "
    f"last_seen_at = {_NOW}, "
    "transaction_id = greatest(old.transaction_id, EXCLUDED.transaction_id) "
)
# Of the event, from the row as it is then.
_KIND: Final = "CASE WHEN occurrences = 1 THEN 'created' ELSE 'recurred' END"
_STARTS: Final = "CASE WHEN occurrences = 1 THEN CAST(incident_type AS text) END"
_OTHER_MESSAGE: Final = "CASE WHEN occurrences > 1 THEN nullif({message}, incident_message) END"
_SEEN: Final = "coalesce(last_seen_at, created_at)"


def _insert_incident(*, or_count: bool) -> TextClause:
    message = _OTHER_MESSAGE.format(message="CAST(:incident_message AS text)")
    event = _event(_KIND, "NULL", _STARTS, message, _SEEN)
    return text(
        'WITH changed AS (INSERT INTO "Incident" AS old '
        "(incident_message, incident_type, source, dedup_key, ended_at, transaction_id) "
        "VALUES (CAST(:incident_message AS text), "
        "CAST(CAST(:incident_type AS text) AS incidentstatus), "
        "CAST(CAST(:source AS text) AS incidentsource), CAST(:dedup_key AS text), "
        f"CASE WHEN CAST(:incident_type AS text) <> 'new' THEN {_NOW} END, {_TRANSACTION}) "
        f"{_OR_COUNT if or_count else ''}RETURNING *), "
        f"event AS ({event}) SELECT {_INCIDENT} FROM changed"
    )


INSERT_INCIDENT: Final = {
    with_key: _insert_incident(or_count=with_key) for with_key in (False, True)
}
"""By whether it has a deduplication key: it then counts an occurrence if that one is open."""

_STATUS: Final = "CAST(:status AS text)"
_NOTE: Final = "CAST(:note AS text)"
_CHANGED: Final = _event("'status_changed'", "from_status", _STATUS, _NOTE, "now")
_NOTED: Final = _event("'noted'", "NULL", "NULL", _NOTE, _NOW)
_PURGED: Final = _event("'purged'", "status", "NULL", "NULL", _NOW)

UPDATE_STATUS: Final = text(
    "WITH found AS (SELECT incident_id AS id, CAST(incident_type AS text) AS from_status, "
    f'version AS at_version, dedup_key AS key, {_NOW} AS now FROM "Incident" '
    "WHERE incident_id = CAST(:incident_id AS bigint) FOR NO KEY UPDATE), "
    'changed AS (UPDATE "Incident" '
    f"SET incident_type = CAST({_STATUS} AS incidentstatus), version = version + 1, "
    f"ended_at = CASE WHEN {_STATUS} <> 'new' THEN coalesce(ended_at, now) END, "
    f"transaction_id = greatest(transaction_id, {_TRANSACTION}) "
    f"FROM found WHERE incident_id = id AND from_status <> {_STATUS} "
    "AND from_status = ANY(CAST(:from_statuses AS text[])) "
    "AND at_version = coalesce(CAST(:expected_version AS bigint), at_version) "
    f"AND ({_STATUS} <> 'new' OR key IS NULL OR NOT EXISTS (SELECT FROM \"Incident\" AS other "
    "WHERE other.dedup_key = key AND other.incident_type = 'new')) RETURNING *), "
    f"event AS ({_CHANGED}) SELECT {_INCIDENT} FROM changed"
)
"""Returns no row if anything is in the way: the caller asks what."""

SELECT_INCIDENTS: Final = text(
    f'SELECT {_INCIDENT} FROM "Incident" WHERE incident_id = ANY({_numbers("incident_ids")})'
)


def _select_pages(*, by_status: bool, by_source: bool) -> str:
    rules = [
        *(["incident_type = CAST(wanted.status AS incidentstatus)"] if by_status else []),
        *(["source = CAST(wanted.source AS incidentsource)"] if by_source else []),
    ]
    return (
        "SELECT page.*, (SELECT token FROM current) AS token, wanted.n "
        f'FROM wanted LEFT JOIN LATERAL (SELECT * FROM (SELECT {_INCIDENT} FROM "Incident" '
        f"{'WHERE ' if rules else ''}{' AND '.join(rules)} "
        f'ORDER BY "Incident".created_at DESC, "Incident".incident_id DESC LIMIT {DEEP}) AS first '
        "OFFSET wanted.skip LIMIT wanted.size) AS page ON true "
        f"WHERE wanted.status IS {'NOT ' if by_status else ''}NULL "
        f"AND wanted.source IS {'NOT ' if by_source else ''}NULL"
    )


_PAGES: Final = " UNION ALL ".join(
    _select_pages(by_status=by_status, by_source=by_source)
    for by_status, by_source in product((False, True), repeat=2)
)

SELECT_PAGES: Final = text(
    f"WITH current AS MATERIALIZED (SELECT {postgresql_token()} AS token), "
    "wanted AS MATERIALIZED (SELECT * FROM unnest(CAST(:statuses AS text[]), "
    f"CAST(:sources AS text[]), {_numbers('limits')}, {_numbers('offsets')}) "
    "WITH ORDINALITY AS wanted (status, source, size, skip, n)) "
    f"{_PAGES} ORDER BY n, created_at DESC, incident_id DESC"
)
"""Several pages, each with its number behind the token. An empty page is one row. Each combination
of filters has an index, and so a part of the statement."""

INSERT_INCIDENTS: Final = text(
    "WITH given AS (SELECT * FROM unnest(CAST(:messages AS text[]), CAST(:statuses AS text[]), "
    "CAST(:sources AS text[]), CAST(:actors AS text[])) "
    "WITH ORDINALITY AS given (message, status, source, actor, n)), "
    'changed AS (INSERT INTO "Incident" '
    "(incident_message, incident_type, source, ended_at, transaction_id) "
    "SELECT message, CAST(status AS incidentstatus), CAST(source AS incidentsource), "
    f"CASE WHEN status <> 'new' THEN {_NOW} END, {_TRANSACTION} FROM given ORDER BY n "
    "RETURNING *), "
    "numbered AS (SELECT *, row_number() OVER (ORDER BY incident_id) AS n FROM changed), "
    "event AS (INSERT INTO incident_event (transaction_id, nonce, incident_id, kind, to_status, "
    f"actor, at) SELECT transaction_id, {_NONCE}, incident_id, 'created', "
    "CAST(incident_type AS text), actor, created_at FROM numbered JOIN given USING (n) ORDER BY n) "
    f"SELECT {_INCIDENT} FROM numbered "
    "WHERE 1 / CASE WHEN (SELECT count(*) FROM changed) = (SELECT count(*) FROM given) "
    "THEN 1 ELSE 0 END = 1 ORDER BY n"
)
"""Inserts incidents without deduplication keys and returns them in the order that they had: it is
that of their ids, since each row gets the next one. If a trigger of the host's keeps one out, none
is inserted: nobody could say which is whose. The division by zero is that refusal."""

INSERT_OR_COUNT: Final = text(
    "WITH given AS (SELECT * FROM unnest(CAST(:messages AS text[]), CAST(:sources AS text[]), "
    "CAST(:dedup_keys AS text[]), CAST(:actors AS text[])) "
    "AS given (message, source, key, actor)), "
    'changed AS (INSERT INTO "Incident" AS old '
    "(incident_message, incident_type, source, dedup_key, transaction_id) "
    f"SELECT message, 'new', CAST(source AS incidentsource), key, {_TRANSACTION} "
    f'FROM given ORDER BY key COLLATE "C" {_OR_COUNT}RETURNING *), '
    "event AS (INSERT INTO incident_event (transaction_id, nonce, incident_id, kind, to_status, "
    f"actor, note, at) SELECT transaction_id, {_NONCE}, incident_id, {_KIND}, {_STARTS}, actor, "
    f"{_OTHER_MESSAGE.format(message='message')}, {_SEEN} FROM changed JOIN given "
    f"ON key = dedup_key) SELECT {_INCIDENT} FROM changed"
)
"""Inserts incidents, each with another deduplication key, or counts an occurrence of those that are
open; all take the keys in the same order, so that two of them never wait for each other."""

UPDATE_STATUSES: Final = text(
    f"WITH given AS (SELECT * FROM unnest({_numbers('incident_ids')}, "
    "CAST(:statuses AS text[]), CAST(:from_statuses AS text[]), "
    f"{_numbers('expected_versions')}, CAST(:notes AS text[]), CAST(:actors AS text[])) "
    "AS given (id, status, from_statuses, expected_version, note, actor)), "
    "found AS (SELECT incident_id AS id, CAST(incident_type AS text) AS from_status, "
    f'version AS at_version, {_NOW} AS now FROM "Incident" '
    f"WHERE incident_id = ANY({_numbers('incident_ids')}) "
    "ORDER BY incident_id FOR NO KEY UPDATE SKIP LOCKED), "
    "due AS (SELECT * FROM given JOIN found USING (id) WHERE from_status <> status "
    "AND from_status = ANY(string_to_array(from_statuses, ' ')) "
    "AND at_version = coalesce(expected_version, at_version)), "
    'changed AS (UPDATE "Incident" SET incident_type = CAST(status AS incidentstatus), '
    "version = version + 1, ended_at = coalesce(ended_at, now), "
    f"transaction_id = greatest(transaction_id, {_TRANSACTION}) "
    "FROM due WHERE incident_id = id RETURNING *), "
    "event AS (INSERT INTO incident_event (transaction_id, nonce, incident_id, kind, from_status, "
    f"to_status, actor, note, at) SELECT transaction_id, {_NONCE}, incident_id, 'status_changed', "
    "from_status, status, actor, note, now FROM changed) "
    f"SELECT {_INCIDENT} FROM changed"
)
"""Ends incidents and returns those of them that nothing is in the way of; others are locked in the
order of their ids, or left out if somebody else has locked them."""

SELECT_OPEN_DUPLICATE: Final = text(
    "SELECT incident_id FROM \"Incident\" WHERE incident_type = 'new' "
    "AND dedup_key = CAST(:dedup_key AS text) LIMIT 1"
)

INSERT_NOTE: Final = text(
    'WITH changed AS (UPDATE "Incident" '
    f"SET transaction_id = greatest(transaction_id, {_TRANSACTION}) "
    "WHERE incident_id = CAST(:incident_id AS bigint) RETURNING incident_id, transaction_id) "
    f"{_NOTED} RETURNING {_EVENT}"
)

_EXPIRED: Final = "created_at < clock_timestamp() - interval '24 hours'"

CLAIM_KEY: Final = text(
    "INSERT INTO incident_idempotency_key AS old (idempotency_key, fingerprint) "
    "VALUES (CAST(:idempotency_key AS text), CAST(:fingerprint AS text)) "
    "ON CONFLICT (idempotency_key) DO UPDATE SET fingerprint = EXCLUDED.fingerprint, "
    f"answer = NULL, created_at = {_NOW} WHERE old.{_EXPIRED} RETURNING idempotency_key"
)
"""Takes the key for this transaction, and returns a row, unless it was used in the last day."""

DELETE_EXPIRED_KEYS: Final = text(
    "DELETE FROM incident_idempotency_key WHERE idempotency_key IN ("
    f"SELECT idempotency_key FROM incident_idempotency_key WHERE {_EXPIRED} "
    "ORDER BY created_at LIMIT CAST(:limit AS bigint) FOR UPDATE SKIP LOCKED)"
)

SELECT_PURGEABLE: Final = text(
    'SELECT incident_id FROM "Incident" WHERE ended_at < CAST(:ended_before AS timestamptz) '
    "ORDER BY ended_at, incident_id LIMIT CAST(:limit AS bigint) FOR UPDATE SKIP LOCKED"
)

_PURGED_IDS: Final = "ANY(CAST(:incident_ids AS bigint[]))"

DELETE_EVENTS: Final = text(
    "WITH gone AS (DELETE FROM incident_event WHERE event_id IN (SELECT event_id "
    f"FROM incident_event WHERE incident_id = {_PURGED_IDS} ORDER BY incident_id, event_id "
    "LIMIT CAST(:events AS bigint)) RETURNING event_id, transaction_id, nonce) "
    "INSERT INTO incident_purged_event (event_id, transaction_id, nonce) "
    "SELECT event_id, transaction_id, nonce FROM gone ON CONFLICT (event_id) DO UPDATE "
    "SET transaction_id = EXCLUDED.transaction_id, nonce = EXCLUDED.nonce, "
    "purged_at = EXCLUDED.purged_at"
)

DELETE_INCIDENTS: Final = text(
    f'WITH changed AS (DELETE FROM "Incident" AS old WHERE incident_id = {_PURGED_IDS} '
    "AND NOT EXISTS (SELECT FROM incident_event AS event WHERE event.incident_id = old.incident_id)"
    " RETURNING incident_id, CAST(incident_type AS text) AS status, "
    f"greatest(transaction_id, {_TRANSACTION}) AS transaction_id), "
    f"event AS ({_PURGED}) SELECT count(*) FROM changed"
)
"""Removes those whose events have all been removed, by an earlier statement of the transaction."""

SELECT_STRANDED: Final = text(
    "SELECT latest FROM (SELECT max(transaction_id) AS latest FROM incident_event) AS events "
    "WHERE latest >= CAST(CAST(pg_snapshot_xmax(pg_current_snapshot()) AS text) AS bigint)"
)
"""Returns a row if events have numbers of transactions that this server has yet to give."""

SHIFT: Final = {
    name: text(f'UPDATE "{name}" SET transaction_id = transaction_id - :latest - 1')
    for name in ("incident_event", "incident_purged_event", "Incident")
}
"""Puts all that is there before all that is to come, in the order that it has."""

_QUERY: Final = (
    "CAST((SELECT string_agg(quote_literal(lexeme) || '\\:*', ' & ') "
    "FROM unnest(incident_words(CAST(:words AS text)))) AS tsquery)"
)

WORDS_MATCH: Final = WordsMatch(
    by_index=text(f'incident_words("Incident".incident_message) @@ {_QUERY}'),
    of_first=text(f"incident_words(first.incident_message) @@ {_QUERY}"),
)
"""True of a message that has each word, or one that begins with it."""

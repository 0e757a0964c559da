"""What SQLite is told to write. It has one writer at a time: a write takes several statements."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import (
    BigInteger,
    String,
    bindparam,
    case,
    delete,
    func,
    insert,
    literal_column,
    select,
    text,
    update,
)
from sqlalchemy.dialects.sqlite import insert as insert_or

from incidentkit.store.search_statements import WordsMatch
from incidentkit.store.statements import EVENT, INCIDENT, text_parameter
from incidentkit.store.tables import (
    UtcDateTime,
    a_day_ago,
    current_second,
    idempotency_table,
    incident_event_table,
    incident_table,
    purged_event_table,
)

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement
    from sqlalchemy.sql.dml import ReturningInsert

_columns: Final = incident_table.c
_open_with_key: Final = text("incident_type = 'new' AND dedup_key IS NOT NULL")

LOCK: Final = text("DELETE FROM incident_idempotency_key WHERE 0")
"""Changes nothing, and makes the transaction the one that writes."""


def _insert_incident(*, or_count: bool) -> ReturningInsert[*tuple[Any, ...]]:
    status = text_parameter("incident_type", _columns.incident_type)
    statement = insert_or(incident_table).values(
        incident_message=bindparam("incident_message", type_=String()),
        incident_type=status,
        source=text_parameter("source", _columns.source),
        dedup_key=bindparam("dedup_key", type_=String()),
        ended_at=case((status != literal_column("'new'"), current_second())),
    )
    if or_count:
        statement = statement.on_conflict_do_update(
            index_elements=[_columns.dedup_key],
            index_where=_open_with_key,
            set_={
                "version": _columns.version + literal_column("1"),
                "occurrences": _columns.occurrences + literal_column("1"),
                "last_seen_at": current_second(),
            },
        )
    return statement.returning(*INCIDENT)


INSERT_INCIDENT: Final = {
    with_key: _insert_incident(or_count=with_key) for with_key in (False, True)
}
"""By whether it has a deduplication key: it then counts an occurrence if that one is open."""

UPDATE_STATUS: Final = (
    update(incident_table)
    .where(_columns.incident_id == bindparam("id", type_=BigInteger()))
    .values(
        incident_type=text_parameter("status", _columns.incident_type),
        version=_columns.version + literal_column("1"),
        ended_at=case(
            (
                text_parameter("status", _columns.incident_type) != literal_column("'new'"),
                func.coalesce(_columns.ended_at, current_second(), type_=UtcDateTime()),
            )
        ),
    )
    .returning(*INCIDENT)
)

SELECT_OPEN_DUPLICATE: Final = (
    select(_columns.incident_id)
    .where(
        _columns.dedup_key == bindparam("dedup_key", type_=String()),
        _columns.incident_type == literal_column("'new'"),
    )
    .limit(literal_column("1"))
)

INSERT_EVENT: Final = (
    insert(incident_event_table)
    .values(
        transaction_id=literal_column("0"),
        # As many bits as a number of JSON has.
        nonce=literal_column("random() & 9007199254740991"),
        incident_id=bindparam("incident_id", type_=BigInteger()),
        kind=bindparam("kind", type_=String()),
        from_status=bindparam("from_status", type_=String()),
        to_status=bindparam("to_status", type_=String()),
        actor=bindparam("actor", type_=String()),
        note=bindparam("note", type_=String()),
        at=current_second(),
    )
    .returning(*EVENT)
)

_expired: Final[ColumnElement[bool]] = idempotency_table.c.created_at < a_day_ago()

CLAIM_KEY: Final = (
    insert_or(idempotency_table)
    .values(
        idempotency_key=bindparam("idempotency_key", type_=String()),
        fingerprint=bindparam("fingerprint", type_=String()),
    )
    .on_conflict_do_update(
        index_elements=[idempotency_table.c.idempotency_key],
        set_={
            "fingerprint": bindparam("fingerprint", type_=String()),
            "answer": None,
            "created_at": current_second(),
        },
        where=_expired,
    )
    .returning(idempotency_table.c.idempotency_key)
)
"""Takes the key for this transaction, and returns a row, unless it was used in the last day."""

DELETE_EXPIRED_KEYS: Final = delete(idempotency_table).where(
    idempotency_table.c.idempotency_key.in_(
        select(idempotency_table.c.idempotency_key)
        .where(_expired)
        .order_by(idempotency_table.c.created_at)
        .limit(bindparam("limit", type_=BigInteger()))
    )
)

SELECT_PURGEABLE: Final = (
    select(_columns.incident_id, _columns.incident_type)
    .where(_columns.ended_at < bindparam("ended_before", type_=UtcDateTime()))
    .order_by(_columns.ended_at, _columns.incident_id)
    .limit(bindparam("limit", type_=BigInteger()))
)

_purged: Final = bindparam("incident_ids", type_=BigInteger(), expanding=True)

_some_events: Final = (
    select(incident_event_table.c.event_id)
    .where(incident_event_table.c.incident_id.in_(_purged))
    .order_by(incident_event_table.c.incident_id, incident_event_table.c.event_id)
    .limit(bindparam("events", type_=BigInteger()))
)

INSERT_PLACES: Final = (
    insert(purged_event_table)
    .prefix_with("OR REPLACE")
    .from_select(
        ["event_id", "transaction_id", "nonce"],
        select(
            incident_event_table.c.event_id,
            incident_event_table.c.transaction_id,
            incident_event_table.c.nonce,
        ).where(incident_event_table.c.event_id.in_(_some_events)),
        include_defaults=False,
    )
)

DELETE_EVENTS: Final = delete(incident_event_table).where(
    incident_event_table.c.event_id.in_(_some_events)
)

SELECT_WITH_EVENTS: Final = (
    select(incident_event_table.c.incident_id)
    .where(incident_event_table.c.incident_id.in_(_purged))
    .distinct()
)

DELETE_INCIDENTS: Final = delete(incident_table).where(_columns.incident_id.in_(_purged))

WORDS_MATCH: Final = WordsMatch(
    by_index=text(
        '"Incident".incident_id IN '
        "(SELECT rowid FROM incident_text WHERE incident_text MATCH :words)"
    ),
    of_first=text(
        "first.incident_id IN (SELECT rowid FROM incident_text WHERE incident_text MATCH :words "
        "AND rowid BETWEEN (SELECT min(incident_id) FROM first) "
        "AND (SELECT max(incident_id) FROM first))"
    ),
)
"""True of a message that has each word, or one that begins with it."""

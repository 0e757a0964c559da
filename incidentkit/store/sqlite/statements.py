"""The statements that write on SQLite.

SQLite has one writer at a time, so a write can safely be several statements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    String,
    Text,
    bindparam,
    case,
    delete,
    exists,
    func,
    insert,
    literal_column,
    null,
    select,
    text,
    type_coerce,
    update,
)
from sqlalchemy.dialects.sqlite import insert as insert_or
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.sql.dml import ReturningInsert

from incidentkit.domain.values import EventKind
from incidentkit.store.schema import WRITER
from incidentkit.store.sql.compiled import Statements
from incidentkit.store.sql.functions import a_day_ago, current_second
from incidentkit.store.sql.rows import UtcDateTime
from incidentkit.store.sql.search import WordsMatch
from incidentkit.store.sql.statements import DETAILED, EVENT, number_parameter, text_parameter
from incidentkit.store.sql.tables import (
    idempotency_table,
    incident_event_table,
    incident_table,
    purged_event_table,
)

_new_dialect: Any = SQLiteDialect_pysqlite
STATEMENTS: Final = Statements(_new_dialect(paramstyle="qmark"))
"""The statements for sqlite3, with parameters as ``?``."""

_columns: Final = incident_table.c
_open_with_key: Final = text("incident_type = 'new' AND dedup_key IS NOT NULL")

LOCK: Final = text("DELETE FROM incident_idempotency_key WHERE 0")
"""Changes nothing, but takes the write lock for the transaction."""

INTERRUPT_INTERVAL: Final = 0.05
"""Seconds between two interrupts of one statement: an interrupt that comes just before the
statement begins is lost."""


def _insert_incident(*, or_count: bool) -> ReturningInsert[*tuple[Any, ...]]:
    status = text_parameter("incident_type", _columns.incident_type)
    values = {
        "incident_message": bindparam("incident_message", type_=String()),
        "incident_type": status,
        "source": text_parameter("source", _columns.source),
        "dedup_key": bindparam("dedup_key", type_=String()),
        "ended_at": case((status != literal_column("'new'"), current_second())),
        "details": bindparam("details", type_=Text()),
    }
    if not or_count:
        # SQLAlchemy 2.0 compiles an insert of its SQLite dialect again for each call.
        return insert(incident_table).values(values).returning(*DETAILED)
    counted = insert_or(incident_table).values(values)
    return counted.on_conflict_do_update(
        index_elements=[_columns.dedup_key],
        index_where=_open_with_key,
        set_={
            "version": _columns.version + literal_column("1"),
            "occurrences": _columns.occurrences + literal_column("1"),
            "last_seen_at": current_second(),
        },
    ).returning(*DETAILED)


INSERT_INCIDENT: Final = {
    with_key: _insert_incident(or_count=with_key) for with_key in (False, True)
}
"""Inserts an incident, or counts an occurrence of the open one with its key, and returns the
incident; by whether it has a deduplication key."""

_rows: Final = func.json_each(bindparam("rows", type_=String())).table_valued("key", "value")
"""The rows of a JSON array of arrays: parameters would be another statement for each number."""


def _element(place: int) -> ColumnElement[Any]:
    """Return the element at this place of each row."""
    return func.json_extract(_rows.c.value, literal_column(f"'$[{place}]'"))


INSERT_INCIDENTS: Final = (
    insert(incident_table)
    .from_select(
        ["incident_message", "incident_type", "source", "details", "ended_at"],
        select(
            *(_element(place) for place in range(4)),
            case((_element(1) != literal_column("'new'"), current_second())),
        ).order_by(_rows.c.key),
        include_defaults=False,
    )
    .returning(*DETAILED)
)
"""Inserts an incident for each row of a message, a status, a source and details, and returns the
incidents in any order."""

UPDATE_STATUS: Final = (
    update(incident_table)
    .where(_columns.incident_id == number_parameter("id"))
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
    .returning(*DETAILED)
)
"""Changes the status of an incident and returns it."""

SELECT_OPEN: Final = select(*DETAILED).where(
    _columns.dedup_key == bindparam("dedup_key", type_=String()),
    _columns.incident_type == literal_column("'new'"),
)
"""Returns the open incident with the deduplication key."""

SELECT_OPEN_DUPLICATE: Final = (
    select(_columns.incident_id)
    .where(
        _columns.dedup_key == bindparam("dedup_key", type_=String()),
        _columns.incident_type == literal_column("'new'"),
    )
    .limit(literal_column("1"))
)
"""Returns a row if an incident with the deduplication key is open."""


_NONCE: Final[ColumnElement[Any]] = literal_column("random() & 9007199254740991")
"""A random number of 53 bits: the integers that JavaScript reads exactly."""


def _insert_event(
    to_status: ColumnElement[Any], returned: Sequence[ColumnElement[Any]]
) -> ReturningInsert[*tuple[Any, ...]]:
    return (
        insert(incident_event_table)
        .inline()
        .values(
            transaction_id=literal_column("0"),
            nonce=_NONCE,
            incident_id=number_parameter("incident_id"),
            kind=bindparam("kind", type_=String()),
            from_status=bindparam("from_status", type_=String()),
            to_status=to_status,
            actor=bindparam("actor", type_=String()),
            note=bindparam("note", type_=String()),
            at=current_second(),
            writer=literal_column(str(WRITER)),
        )
        .returning(*returned)
    )


INSERT_EVENT: Final = _insert_event(null(), EVENT)
"""Inserts an event that sets no status, and returns it."""

INSERT_STATUS_EVENT: Final = _insert_event(
    select(type_coerce(_columns.incident_type, String()))
    .where(_columns.incident_id == number_parameter("incident_id"))
    .scalar_subquery(),
    [incident_event_table.c.to_status],
)
"""Inserts an event with the present status of the incident, and returns this status: a trigger may
have changed it."""

INSERT_CREATED_EVENTS: Final = (
    insert(incident_event_table)
    .from_select(
        ["transaction_id", "nonce", "incident_id", "kind", "to_status", "actor", "at", "writer"],
        select(
            literal_column("0"),
            _NONCE,
            _element(0),
            literal_column(f"'{EventKind.CREATED.value}'"),
            select(type_coerce(_columns.incident_type, String()))
            .where(_columns.incident_id == _element(0))
            .scalar_subquery(),
            _element(1),
            current_second(),
            literal_column(str(WRITER)),
        ).order_by(_rows.c.key),
        include_defaults=False,
    )
    .returning(incident_event_table.c.incident_id, incident_event_table.c.to_status)
)
"""Inserts the first event of an incident for each row of its id and an actor, and returns the ids
with the present statuses of the incidents."""

_expired: Final[ColumnElement[bool]] = idempotency_table.c.created_at < a_day_ago()

_own_key: Final = idempotency_table.alias("own")

CLAIM_KEY: Final = (
    insert_or(idempotency_table)
    .from_select(
        ["idempotency_key", "fingerprint", "actor"],
        select(
            bindparam("idempotency_key", type_=String()),
            bindparam("fingerprint", type_=String()),
            bindparam("actor", type_=String()),
        ).where(
            ~exists().where(
                _own_key.c.idempotency_key == bindparam("own_key", type_=String()),
                _own_key.c.created_at >= a_day_ago(),
            )
        ),
        include_defaults=False,
    )
    .on_conflict_do_update(
        index_elements=[idempotency_table.c.idempotency_key],
        set_={
            "fingerprint": bindparam("fingerprint", type_=String()),
            "answer": None,
            "created_at": current_second(),
            "actor": bindparam("actor", type_=String()),
        },
        where=_expired,
    )
    .returning(idempotency_table.c.idempotency_key)
)
"""Takes the key for this transaction and returns a row, unless it, or the actor's own one, was used
in the last 24 hours."""

DELETE_EXPIRED_KEYS: Final = delete(idempotency_table).where(
    idempotency_table.c.idempotency_key.in_(
        select(idempotency_table.c.idempotency_key)
        .where(_expired)
        .order_by(idempotency_table.c.created_at)
        .limit(number_parameter("limit"))
    )
)
"""Removes some keys that were used longer than 24 hours ago."""

SELECT_PURGEABLE: Final = (
    select(_columns.incident_id, _columns.incident_type)
    .where(
        _columns.ended_at < bindparam("ended_before", type_=UtcDateTime()),
        # A trigger or another program may have opened it again.
        _columns.incident_type != literal_column("'new'"),
    )
    .order_by(_columns.ended_at, _columns.incident_id)
    .limit(number_parameter("limit"))
)
"""Returns incidents to purge, with their status, those that ended first in front."""

_purged: Final = select(
    func.json_each(bindparam("incident_ids", type_=String())).table_valued("value").c.value
)
"""The ids of a JSON array: a list of parameters would be another statement for each length."""

_some_events: Final = (
    select(incident_event_table.c.event_id)
    .where(incident_event_table.c.incident_id.in_(_purged))
    .order_by(incident_event_table.c.incident_id, incident_event_table.c.event_id)
    .limit(number_parameter("events"))
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
    .returning(purged_event_table.c.event_id)
)
"""Keeps the places of the events that the next statement removes, and returns their ids."""

DELETE_EVENTS: Final = (
    delete(incident_event_table)
    .where(incident_event_table.c.event_id.in_(_some_events))
    .returning(incident_event_table.c.event_id)
)
"""Removes events of incidents to purge, at most ``events``, and returns their ids."""

SELECT_WITH_EVENTS: Final = (
    select(incident_event_table.c.incident_id)
    .where(incident_event_table.c.incident_id.in_(_purged))
    .distinct()
)
"""Returns the incidents to purge that still have events."""

DELETE_INCIDENTS: Final = (
    delete(incident_table).where(_columns.incident_id.in_(_purged)).returning(_columns.incident_id)
)
"""Removes incidents, and returns their ids."""

WORDS_MATCH: Final = WordsMatch(
    by_index=text(
        '"Incident".incident_id IN '
        "(SELECT rowid FROM incident_text WHERE incident_text MATCH :phrases)"
    ),
    of_first=text(
        "first.incident_id IN (SELECT rowid FROM incident_text WHERE incident_text MATCH :phrases "
        "AND rowid BETWEEN (SELECT min(incident_id) FROM first) "
        "AND (SELECT max(incident_id) FROM first))"
    ),
    incidents=text('SELECT max(incident_id) FROM "Incident"'),
)
"""Holds for a message that has each phrase. The index alone decides, since the triggers index every
message."""

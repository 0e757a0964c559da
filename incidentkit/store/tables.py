"""The tables that incidentkit keeps in the host's database."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    Double,
    Enum,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    String,
    Table,
    Text,
    Uuid,
    text,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import FunctionElement
from sqlalchemy.types import TypeDecorator

from incidentkit.domain.errors import SchemaOutOfDate
from incidentkit.domain.values import EventKind, IncidentSource, IncidentStatus

if TYPE_CHECKING:
    from enum import StrEnum

REVISIONS: Final = (
    "dadc1db062ae",
    "5c1f0e9b7a34",
    "b27d4f0c1a96",
    "e4a81c3f5d27",
    "9b3f6d20c7e8",
)
"""Every revision in ``migrations``, oldest first; the first is the origin's."""

SCHEMA_REVISION: Final = REVISIONS[-1]
"""The schema that the statements work on."""

VERSION_TABLE: Final = "incidentkit_version"
"""Where our Alembic revision is recorded, apart from a host's own ``alembic_version``."""


class UtcDateTime(TypeDecorator[datetime]):
    """An aware time in UTC; SQLite holds it as the text ``YYYY-MM-DD HH:MM:SS``."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        """Choose whole seconds on SQLite, so that text sorts as time does."""
        if dialect.name == "sqlite":
            whole_seconds: Any = sqlite.DATETIME
            return dialect.type_descriptor(whole_seconds(truncate_microseconds=True))
        return dialect.type_descriptor(DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Take the zone off for SQLite, which has none."""
        if value is None or dialect.name != "sqlite":
            return value
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Put UTC on what SQLite returns."""
        if value is None or dialect.name != "sqlite":
            return value
        return value.replace(tzinfo=UTC)


class current_second(FunctionElement[datetime]):  # noqa: N801
    """The database's clock when a row is written, in whole seconds."""

    type = UtcDateTime()
    inherit_cache = True


@compiles(current_second)
def _current_second(*_: Any, **__: Any) -> str:
    # Not now(), which stands still while a host's transaction runs.
    return "date_trunc('second', clock_timestamp())"


@compiles(current_second, "sqlite")
def _current_second_sqlite(*_: Any, **__: Any) -> str:
    return "CURRENT_TIMESTAMP"


# SQLite's autoincrementing key has to be an INTEGER, which there holds 64 bits.
_Id: Final = BigInteger().with_variant(Integer(), "sqlite")

metadata: Final = MetaData(
    naming_convention={"ck": "ck_%(table_name)s_%(constraint_name)s", "pk": "pk_%(table_name)s"}
)


def _one_of(name: str, enum: type[StrEnum]) -> str:
    return f"{name} IN ({', '.join(repr(member.value) for member in enum)})"


incident_table: Final = Table(
    "Incident",
    metadata,
    Column("incident_id", _Id, autoincrement=True),
    Column("incident_message", String, nullable=False),
    Column(
        "incident_type",
        Enum(
            *(status.value for status in IncidentStatus),
            name="incidentstatus",
            create_constraint=True,
        ),
        nullable=False,
    ),
    Column(
        "source",
        Enum(
            *(source.value for source in IncidentSource),
            name="incidentsource",
            create_constraint=True,
        ),
        nullable=False,
    ),
    Column("created_at", UtcDateTime, nullable=False, server_default=current_second()),
    Column("version", BigInteger, nullable=False, server_default=text("1")),
    Column("dedup_key", String),
    Column("occurrences", BigInteger, nullable=False, server_default=text("1")),
    # Null until it was seen again.
    Column("last_seen_at", UtcDateTime),
    Column("ended_at", UtcDateTime),
    # The place of its last event.
    Column("transaction_id", BigInteger, nullable=False, server_default=text("0")),
    PrimaryKeyConstraint("incident_id", name="pk_Incident"),
    CheckConstraint("incident_id > 0", name="incident_id"),
    CheckConstraint(
        "created_at >= '0001-01-02 00:00:00+00' AND created_at < '9999-12-31 00:00:00+00'",
        name="created_at",
    ).ddl_if(dialect="postgresql"),
    # One for each combination of filters, in the order of the list.
    Index("ix_Incident_created_at", "created_at", "incident_id"),
    Index("ix_Incident_incident_type", "incident_type", "created_at", "incident_id"),
    Index("ix_Incident_source", "source", "created_at", "incident_id"),
    Index(
        "ix_Incident_incident_type_source", "incident_type", "source", "created_at", "incident_id"
    ),
    Index(
        "ux_Incident_dedup_key",
        "dedup_key",
        unique=True,
        postgresql_where=text("incident_type = 'new' AND dedup_key IS NOT NULL"),
        sqlite_where=text("incident_type = 'new' AND dedup_key IS NOT NULL"),
    ),
    Index(
        "ix_Incident_ended_at",
        "ended_at",
        "incident_id",
        postgresql_where=text("ended_at IS NOT NULL"),
        sqlite_where=text("ended_at IS NOT NULL"),
    ),
    sqlite_autoincrement=True,
)

incident_event_table: Final = Table(
    "incident_event",
    metadata,
    Column("event_id", _Id, autoincrement=True),
    Column("transaction_id", BigInteger, nullable=False),
    Column("nonce", BigInteger, nullable=False),
    Column("incident_id", BigInteger, nullable=False),
    Column("kind", String, nullable=False),
    Column("from_status", String),
    Column("to_status", String),
    Column("actor", String),
    Column("note", String),
    Column("at", UtcDateTime, nullable=False),
    PrimaryKeyConstraint("event_id", name="pk_incident_event"),
    CheckConstraint(_one_of("kind", EventKind), name="kind"),
    CheckConstraint(_one_of("from_status", IncidentStatus), name="from_status"),
    CheckConstraint(_one_of("to_status", IncidentStatus), name="to_status"),
    Index("ix_incident_event_transaction_id", "transaction_id", "event_id"),
    Index("ix_incident_event_incident_id", "incident_id", "event_id"),
    sqlite_autoincrement=True,
)
"""What happened to each incident. It has no foreign key: what tells that an incident was purged
outlives it."""

purged_event_table: Final = Table(
    "incident_purged_event",
    metadata,
    Column("event_id", BigInteger, autoincrement=False),
    Column("transaction_id", BigInteger, nullable=False),
    Column("nonce", BigInteger, nullable=False),
    Column("purged_at", UtcDateTime, nullable=False, server_default=current_second()),
    PrimaryKeyConstraint("event_id", name="pk_incident_purged_event"),
    Index("ix_incident_purged_event_purged_at", "purged_at"),
)
"""Where events were that went with their incidents: a cursor may stand there."""

idempotency_table: Final = Table(
    "incident_idempotency_key",
    metadata,
    Column("idempotency_key", String),
    Column("fingerprint", String, nullable=False),
    # Null only inside the transaction that makes it.
    Column("answer", String),
    Column("created_at", UtcDateTime, nullable=False, server_default=current_second()),
    PrimaryKeyConstraint("idempotency_key", name="pk_incident_idempotency_key"),
    Index("ix_incident_idempotency_key_created_at", "created_at"),
)

request_log_table: Final = Table(
    "request_log",
    metadata,
    Column("request_log_id", _Id, autoincrement=True),
    Column("logged_at", UtcDateTime, nullable=False),
    Column("method", String, nullable=False),
    Column("route", String, nullable=False),
    Column("status", SmallInteger, nullable=False),
    Column("duration_ms", Double, nullable=False),
    Column("request_id", String, nullable=False),
    PrimaryKeyConstraint("request_log_id", name="pk_request_log"),
    Index("ix_request_log_logged_at", "logged_at"),
    sqlite_autoincrement=True,
)


token_table: Final = Table(
    "incident_token",
    metadata,
    Column("slot", BigInteger, autoincrement=False),
    Column("token", Uuid, nullable=False),
    PrimaryKeyConstraint("slot", name="pk_incident_token"),
)
"""Random tokens, of which every transaction that changes an incident replaces one, by triggers that
the migration ``e4a81c3f5d27`` makes."""


class current_token(FunctionElement[str]):  # noqa: N801
    """The token of the incidents in the statement's snapshot; null if it cannot be told."""

    type = Text()
    inherit_cache = True


def postgresql_token() -> str:
    """Return the same as text, for statements that are written as text."""
    # Of fewer rows, as after a hand emptied the table, the same token could come back.
    return (
        "(SELECT CASE WHEN count(*) FILTER (WHERE slot < 16) = 16 THEN "
        "encode(sha256(string_agg(uuid_send(token), CAST('' AS bytea) ORDER BY slot)), 'hex') END "
        "FROM incident_token)"
    )


@compiles(current_token)
def _current_token(*_: Any, **__: Any) -> str:
    return postgresql_token()


@compiles(current_token, "sqlite")
def _current_token_sqlite(*_: Any, **__: Any) -> str:
    return "(SELECT token FROM incident_token WHERE slot = 0)"


class a_day_ago(FunctionElement[datetime]):  # noqa: N801
    """The time 24 hours ago by the database's clock."""

    type = UtcDateTime()
    inherit_cache = True


@compiles(a_day_ago)
def _a_day_ago(*_: Any, **__: Any) -> str:
    return "(clock_timestamp() - interval '24 hours')"


@compiles(a_day_ago, "sqlite")
def _a_day_ago_sqlite(*_: Any, **__: Any) -> str:
    return "datetime('now', '-24 hours')"


class feed_horizon(FunctionElement[int]):  # noqa: N801
    """The place in the order of events below which none can be added any more."""

    type = BigInteger()
    inherit_cache = True


@compiles(feed_horizon)
def _feed_horizon(*_: Any, **__: Any) -> str:
    return "CAST(CAST(pg_snapshot_xmin(pg_current_snapshot()) AS text) AS bigint)"


@compiles(feed_horizon, "sqlite")
def _feed_horizon_sqlite(*_: Any, **__: Any) -> str:
    # There is one writer at a time, so that ids are in the order of the commits.
    return "1"


TEXT_TABLES: Final = (
    "incident_text",
    *(f"incident_text_{part}" for part in ("config", "data", "docsize", "idx")),
)
"""The index of the words of the messages on SQLite, which the migration ``9b3f6d20c7e8`` makes."""

TEXT_INDEX: Final = "ix_Incident_incident_message"
"""The one on PostgreSQL; it is on a function that this migration makes."""


def check_revision(current: str | None) -> None:
    """Raise :class:`SchemaOutOfDate` unless the revision is the one that we work on."""
    if current == SCHEMA_REVISION:
        return
    newer = current is not None and current not in REVISIONS
    command = "pip install --upgrade incidentkit" if newer else "incidentkit db upgrade"
    raise SchemaOutOfDate(current, SCHEMA_REVISION, command)


def keep_out_of_autogenerate(name: str | None, type_: str, _: Any) -> bool:
    """Tell Alembic in a host application to leave our tables alone.

    Pass it as ``include_name`` to ``context.configure`` in the host's own ``env.py``.
    """
    ours = (*metadata.tables, *TEXT_TABLES, VERSION_TABLE)
    return not (type_ == "table" and name in ours)

"""The tables that incidentkit keeps in a host's database."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Double,
    Enum,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    String,
    Table,
    Uuid,
    text,
)

from incidentkit.domain.values import EventKind, IncidentSource, IncidentStatus
from incidentkit.store.schema import VERSION_TABLE, WRITER
from incidentkit.store.sql.functions import JsonObject, current_second
from incidentkit.store.sql.rows import UtcDateTime

# SQLite's autoincrementing key has to be an INTEGER, which there holds 64 bits.
_Id: Final = BigInteger().with_variant(Integer(), "sqlite")

metadata: Final = MetaData(
    naming_convention={"ck": "ck_%(table_name)s_%(constraint_name)s", "pk": "pk_%(table_name)s"}
)


def _one_of(name: str, enum: type[StrEnum]) -> str:
    return f"{name} IN ({', '.join(repr(member.value) for member in enum)})"


_PARTIAL_INDEXES: Final = {
    "ux_Incident_dedup_key": text("incident_type = 'new' AND dedup_key IS NOT NULL"),
    "ix_Incident_ended_at": text("ended_at IS NOT NULL"),
    "ix_Incident_dedup_key": text("dedup_key IS NOT NULL"),
    "ux_incident_access_token_name": text("revoked_at IS NULL"),
}
"""The conditions of the partial indexes."""

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
    # Null until the incident is reported again.
    Column("last_seen_at", UtcDateTime),
    Column("ended_at", UtcDateTime),
    # The place of its last event.
    Column("transaction_id", BigInteger, nullable=False, server_default=text("0")),
    # Statements take and return it as text.
    Column("details", JsonObject),
    PrimaryKeyConstraint("incident_id", name="pk_Incident"),
    CheckConstraint("incident_id > 0", name="incident_id"),
    CheckConstraint(
        "created_at >= '0001-01-02 00:00:00+00' AND created_at < '9999-12-31 00:00:00+00'",
        name="created_at",
    ).ddl_if(dialect="postgresql"),
    # One index for each combination of filters, in the order of the list.
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
        sqlite_where=_PARTIAL_INDEXES["ux_Incident_dedup_key"],
    ),
    Index(
        "ix_Incident_ended_at",
        "ended_at",
        "incident_id",
        sqlite_where=_PARTIAL_INDEXES["ix_Incident_ended_at"],
    ),
    Index(
        "ix_Incident_dedup_key",
        "dedup_key",
        "created_at",
        "incident_id",
        sqlite_where=_PARTIAL_INDEXES["ix_Incident_dedup_key"],
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
    # Statements that do not name the column write zero.
    Column("writer", SmallInteger, nullable=False, server_default=text("0")),
    PrimaryKeyConstraint("event_id", name="pk_incident_event"),
    # On SQLite, a trigger of the migration ``3e92f6b08d47`` checks it.
    CheckConstraint(f"writer = {WRITER}", name="writer").ddl_if(dialect="postgresql"),
    CheckConstraint(_one_of("kind", EventKind), name="kind"),
    CheckConstraint(_one_of("from_status", IncidentStatus), name="from_status"),
    CheckConstraint(_one_of("to_status", IncidentStatus), name="to_status"),
    Index("ix_incident_event_transaction_id", "transaction_id", "event_id"),
    Index("ix_incident_event_incident_id", "incident_id", "event_id"),
    sqlite_autoincrement=True,
)
"""The history of the incidents. It has no foreign key: the event of a purge outlives its
incident."""

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
"""The places of events that were purged with their incidents: a cursor may still point there."""

idempotency_table: Final = Table(
    "incident_idempotency_key",
    metadata,
    Column("idempotency_key", String),
    Column("fingerprint", String, nullable=False),
    # Null only inside the transaction that inserts the row.
    Column("answer", String),
    Column("created_at", UtcDateTime, nullable=False, server_default=current_second()),
    # Empty for a write without an actor; null for one of a version that kept keys for all actors.
    Column("actor", String),
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
    Column("actor", String),
    Column("client_address", String),
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
"""Random tokens. Every transaction that changes an incident replaces one of them, by triggers of
the migration ``e4a81c3f5d27``."""

access_token_table: Final = Table(
    "incident_access_token",
    metadata,
    Column("access_token_id", _Id, autoincrement=True),
    Column("name", String, nullable=False),
    Column("sha256", String, nullable=False),
    # The scopes in alphabetical order, with commas.
    Column("scopes", String, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("revoked_at", UtcDateTime),
    Column("last_used_at", UtcDateTime),
    PrimaryKeyConstraint("access_token_id", name="pk_incident_access_token"),
    Index("ux_incident_access_token_sha256", "sha256", unique=True),
    Index(
        "ux_incident_access_token_name",
        "name",
        unique=True,
        sqlite_where=_PARTIAL_INDEXES["ux_incident_access_token_name"],
    ),
    sqlite_autoincrement=True,
)
"""The access tokens of the REST service. A row is never removed: it shows that the service was
closed to anonymous callers."""

version_table: Final = Table(
    VERSION_TABLE,
    # Not declared with the others: Alembic creates it.
    MetaData(),
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name=f"{VERSION_TABLE}_pkc"),
)
"""The table that records the revision, as Alembic creates it."""

TEXT_TABLES: Final = (
    "incident_character",
    "incident_text",
    *(f"incident_text_{part}" for part in ("config", "content", "data", "idx")),
)
"""The tables of the full-text index on SQLite, made by the migration ``a6d40b7f21c8``."""

TEXT_INDEX: Final = "ix_Incident_incident_message"
"""The full-text index on PostgreSQL, made by the same migration."""


def schema_on_postgresql() -> MetaData:
    """Return the declared schema, with the conditions of partial indexes as PostgreSQL takes them.

    They are not declared with the tables: SQLAlchemy would load its dialect of PostgreSQL to check
    them, also for an SQLite file.
    """
    for table in (incident_table, access_token_table):
        for index in table.indexes:
            if index.name in _PARTIAL_INDEXES:
                index.dialect_kwargs["postgresql_where"] = _PARTIAL_INDEXES[str(index.name)]
    return metadata


def keep_out_of_autogenerate(
    name: str | None,
    type_: str,
    parent_names: Mapping[str, str | None],
    *,
    schema: str | None = None,
) -> bool:
    """Keep incidentkit's tables out of the migrations that a host's Alembic generates.

    Pass it as ``include_name`` to ``context.configure`` in the host's ``env.py``. A table with the
    same name in another schema is the host's own.

    Args:
        name: The name of a part of the database.
        type_: The kind of the part, such as ``table``.
        parent_names: The names above it, such as that of its schema: None for the default schema of
            the host's connection.
        schema: The schema of incidentkit's tables; None: that default schema. Set it with
            ``functools.partial``.
    """
    ours = (*metadata.tables, *TEXT_TABLES, VERSION_TABLE)
    return type_ != "table" or name not in ours or parent_names.get("schema_name") != schema

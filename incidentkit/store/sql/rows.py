"""Read rows of the tables as models: the order of columns, and the stored form of values.

The columns of an incident are in the order of the fields of :class:`Incident`, those of an event
in the order of :class:`IncidentEvent`, with the numbers of its cursor in front. Lists of columns,
readers and the JSON of a row are all derived from it. The details of an incident are the last
column of a row that has them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from itertools import chain
from typing import Any, Final, TypeAlias, TypeVar, get_type_hints

from attrs import fields
from sqlalchemy import DateTime, Dialect
from sqlalchemy.dialects import sqlite
from sqlalchemy.types import TypeDecorator

from incidentkit.domain.cursor import encode_cursor
from incidentkit.domain.errors import StoreError
from incidentkit.domain.values import EventKind, Incident, IncidentEvent, IncidentStatus
from incidentkit.pacing import in_parts
from incidentkit.store.executor import Executor, Rows
from incidentkit.store.page import Page
from incidentkit.wire.encoding import dump_json, encode_rows

_T = TypeVar("_T")

Convert: TypeAlias = Callable[[Any], Any]
"""Converts a value for a driver, or from a driver."""

Converter: TypeAlias = tuple[int, Convert]
"""The index of a column, and the function that converts its values."""

INCIDENT_COLUMNS: Final = tuple(field.name for field in fields(Incident) if field.name != "details")
"""The columns of an incident in a list."""

DETAILED_COLUMNS: Final = (*INCIDENT_COLUMNS, "details")
"""The same with the details, which travel as text."""

CURSOR_COLUMNS: Final = ("transaction_id", "event_id", "nonce")
EVENT_COLUMNS: Final = (
    *CURSOR_COLUMNS,
    *(field.name for field in fields(IncidentEvent) if field.name != "cursor"),
)

TOKEN: Final = len(INCIDENT_COLUMNS)
"""The index of the token in a row of a page, after the incident."""

PAGE: Final = TOKEN + 1
"""The index of the page's number in a row of several pages, after the token."""

STORED_AT: Final = len(INCIDENT_COLUMNS)
"""The index, in a row of a search, of ``created_at`` with its fraction of a second."""

COUNT: Final = STORED_AT + 1
"""The index, in a row of a search that counts, of the number of incidents."""

_MEMBERS: Final = {
    name: {member.value: member for member in hint}
    for name, hint in get_type_hints(Incident).items()
    if isinstance(hint, type) and issubclass(hint, StrEnum)
}
ENUMS: Final = frozenset(_MEMBERS)
"""The columns of an incident that are enums of the database. They travel as text, so that asyncpg
does not look up their types."""

_ENUMS: Final[Sequence[tuple[int, Mapping[str, StrEnum]]]] = [
    (INCIDENT_COLUMNS.index(name), members) for name, members in _MEMBERS.items()
]
_INCIDENT_ID: Final = INCIDENT_COLUMNS.index("incident_id")
_CREATED_AT: Final = INCIDENT_COLUMNS.index("created_at")
_LAST_SEEN_AT: Final = INCIDENT_COLUMNS.index("last_seen_at")


_UNREADABLE: Final = "a row holds what no incident can have"
_UNREADABLE_EVENT: Final = "a row holds what no event can have"
_OTHER_STATEMENT: Final = "it answered with the rows of another statement"


class UtcDateTime(TypeDecorator[datetime]):
    """An aware time in UTC; SQLite holds it as the text ``YYYY-MM-DD HH:MM:SS``."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        """Choose whole seconds on SQLite, so that text sorts like time."""
        if dialect.name == "sqlite":
            whole_seconds: Any = sqlite.DATETIME
            return dialect.type_descriptor(whole_seconds(truncate_microseconds=True))
        return dialect.type_descriptor(DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Remove the time zone for SQLite, which has none."""
        if value is None or dialect.name != "sqlite":
            return value
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Add UTC to a time from SQLite."""
        if value is None or dialect.name != "sqlite":
            return value
        return value.replace(tzinfo=UTC)


def read_time(value: Any) -> datetime | None:
    """Return the time that SQLite holds.

    A converter of the host may have read it already.
    """
    if value is None:
        return None
    time = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time


def convert_rows(rows: Sequence[Sequence[Any]], converters: Sequence[Converter]) -> Rows:
    """Return rows with the types that a statement declares.

    Args:
        rows: The rows of a driver.
        converters: The columns whose values have to be converted, and their converters.

    Raises:
        StoreError: If a value cannot be converted.
    """
    converted: list[list[Any]] = [*map(list, rows)]
    try:
        for row in converted:
            for column, convert in converters:
                row[column] = convert(row[column])
    except (TypeError, ValueError) as error:
        raise unreadable_row() from error
    return converted


def unreadable_row() -> StoreError:
    """Return the error for a row whose values cannot be read; use it for nothing else.

    Raise it with the cause: ``raise unreadable_row() from error``.
    """
    return StoreError(_UNREADABLE)


def details_as_text(details: Mapping[str, Any]) -> str:
    """Return details as the statements take them."""
    return dump_json(details).decode()


def read_detailed(row: Sequence[Any]) -> Incident:
    """Return the incident at the start of a row, with the details at its end.

    Raises:
        StoreError: As :func:`read_incident`.
    """
    details = row[-1] if len(row) > len(INCIDENT_COLUMNS) else None
    if details is None:
        return read_incident(row)
    try:
        details = json.loads(details)
    except (TypeError, ValueError, RecursionError) as error:
        raise unreadable_row() from error
    if not isinstance(details, dict):
        raise unreadable_row()
    return read_incident(row, details)


def read_incident(row: Sequence[Any], details: dict[str, Any] | None = None) -> Incident:
    """Return the incident at the start of a row.

    Args:
        row: The row.
        details: Its details; None: there are none, or the row does not have them.

    Raises:
        StoreError: If an incident cannot have these values: the schema has been changed.
    """
    values = list(row[: len(INCIDENT_COLUMNS)])
    if len(values) < len(INCIDENT_COLUMNS):
        raise StoreError(_OTHER_STATEMENT)
    try:
        for column, members in _ENUMS:
            values[column] = members[values[column]]
        # Null until the incident was reported again.
        if values[_LAST_SEEN_AT] is None:
            values[_LAST_SEEN_AT] = values[_CREATED_AT]
        values.append(details)
        return Incident(*values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise unreadable_row() from error


async def read_rows(read: Callable[[Sequence[Any]], _T], rows: Sequence[Any]) -> list[_T]:
    """Return the models of rows; other calls run in between.

    Args:
        read: Returns the model of a row.
        rows: The rows.
    """
    parts = await in_parts(lambda part: [read(row) for row in part], rows)
    return parts[0] if len(parts) == 1 else list(chain.from_iterable(parts))


def read_event(row: Sequence[Any]) -> IncidentEvent:
    """Return the event of a row.

    Raises:
        StoreError: If an event cannot have these values: the schema has been changed.
    """
    if len(row) != len(EVENT_COLUMNS):
        raise StoreError(_OTHER_STATEMENT)
    transaction_id, event_id, nonce, incident_id, kind, from_status, to_status, *others = row
    try:
        return IncidentEvent(
            encode_cursor(transaction_id, event_id, nonce, incident_id),
            incident_id,
            EventKind(kind),
            None if from_status is None else IncidentStatus(from_status),
            None if to_status is None else IncidentStatus(to_status),
            *others,
        )
    except (AttributeError, TypeError, ValueError, struct.error) as error:
        raise StoreError(_UNREADABLE_EVENT) from error


def read_page(rows: Sequence[Any], executor: Executor) -> Page:
    """Return the page of some rows; an empty page is one row, with the token alone.

    Args:
        rows: The rows.
        executor: The executor that read them; it names the database in an error.

    Raises:
        StoreError: When its incidents are used, if an incident cannot have the values of a row.
    """
    if not rows or len(rows[0]) <= TOKEN:
        raise StoreError(_OTHER_STATEMENT)
    token = rows[0][TOKEN]
    found = [row[:TOKEN] for row in rows if row[_INCIDENT_ID] is not None]
    return Page(
        partial(_read_incidents, found, executor),
        token,
        partial(_encode_incidents, found, executor),
    )


def _read_incidents(rows: Sequence[Any], executor: Executor) -> list[Incident]:
    try:
        return [read_incident(row) for row in rows]
    except StoreError as error:
        error.place = executor.place
        raise


def _encode_incidents(rows: Sequence[Any], executor: Executor) -> bytes:
    try:
        return encode_rows(rows)
    except (KeyError, TypeError, ValueError) as error:
        unreadable = unreadable_row()
        unreadable.place = executor.place
        raise unreadable from error

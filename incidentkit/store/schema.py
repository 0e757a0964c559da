"""The revisions of the schema, and which of them the statements work on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from shlex import quote
from typing import Final, Literal

from attrs import frozen

from incidentkit.domain.errors import InvalidSettings, SchemaOutOfDate, StoreError

REVISIONS: Final = (
    "dadc1db062ae",
    "5c1f0e9b7a34",
    "b27d4f0c1a96",
    "e4a81c3f5d27",
    "9b3f6d20c7e8",
    "c7d15a82e9b4",
    "3e92f6b08d47",
    "a61c08d5e372",
    "a6d40b7f21c8",
    "a1f80c46d2b7",
    "d4e07b93c1f6",
    "d52c90b7e6f3",
    "7e4a9d16c3b8",
)
"""Every revision, oldest first, with its migration in ``incidentkit/store/migrations``.

The first is that of the origin, Incident API.
"""

SCHEMA_REVISION: Final = REVISIONS[-1]
"""The revision that the statements work on."""

WRITER: Final = 2
"""The number of the statements that write. The schema accepts only events with this number.

A migration increments it if the new statements cannot work on events of the earlier ones.
Statements without a number are older than ``3e92f6b08d47``.
"""

WRITER_CHECK: Final = "ck_incident_event_writer"
"""The constraint or trigger that refuses an event of other statements."""

VERSION_TABLE: Final = "incidentkit_version"
"""The table that records the revision, separate from a host's own ``alembic_version``."""

MAX_SCHEMA: Final = 63
"""Maximum number of bytes in the name of a schema: PostgreSQL shortens a longer one."""

_RESERVED: Final = re.compile("pg_|information_schema$")


@frozen
class Upgrade:
    """The result of an upgrade.

    Attributes:
        schema: The PostgreSQL schema that has the tables; None on SQLite.
        restored: The parts that were missing or had been changed, as in ``the trigger
            incident_token_change``.
    """

    schema: str | None
    restored: tuple[str, ...]


_TARGET: Final = re.compile(r"(?P<start>\w*)(?P<steps>[+-][0-9]{1,9})?", re.ASCII)


def check_schema(schema: object, kind: Literal["postgresql", "sqlite"]) -> None:
    """Raise unless a schema can hold the tables in a database of this kind; None always can.

    Raises:
        InvalidSettings: With the rule.
    """
    if schema is None:
        return
    if kind == "sqlite":
        raise InvalidSettings("schema", "is only for PostgreSQL: on SQLite, use several files")
    name = schema if isinstance(schema, str) else ""
    # Quotes and backslashes would need an escape wherever a name is part of a text.
    plain = name.isprintable() and not set(name) & set("\"'`\\")
    size = len(name.encode()) if plain else 0
    if not 0 < size <= MAX_SCHEMA or _RESERVED.match(name):
        raise InvalidSettings(
            "schema",
            f"must be the name of a schema: 1 to {MAX_SCHEMA} bytes, without quotes, backslashes "
            "and control characters, and not one of PostgreSQL's own",
        )


def named_place(place: str, schema: str | None) -> str:
    """Return the text that names a database, with the schema if there is one."""
    return place if schema is None else f"{place} (schema {schema})"


def upgrade_command(schema: str | None) -> str:
    """Return the command that brings the tables of a schema up to date; None: the default one."""
    command = "incidentkit db upgrade"
    return command if schema is None else f"{command} --schema {quote(schema)}"


def check_revision(current: str | None, schema: str | None = None) -> None:
    """Raise unless the revision is :data:`SCHEMA_REVISION`.

    Args:
        current: The revision; None: there is none.
        schema: Where the tables are, for the command; None: in the default schema.

    Raises:
        SchemaOutOfDate: With the command to run.
    """
    if current == SCHEMA_REVISION:
        return
    newer = current is not None and current not in REVISIONS
    command = "pip install --upgrade incidentkit" if newer else upgrade_command(schema)
    raise SchemaOutOfDate(current, SCHEMA_REVISION, command)


def check_parts(differences: Iterable[object], schema: str | None = None) -> None:
    """Raise if parts of a schema at :data:`SCHEMA_REVISION` are missing or were changed.

    Raises:
        SchemaOutOfDate: With these parts and the command to run.
    """
    found = [str(difference) for difference in differences]
    if found:
        command = upgrade_command(schema)
        raise SchemaOutOfDate(SCHEMA_REVISION, SCHEMA_REVISION, command, differences=found)


def migrations_below(current: str | None) -> int:
    """Return how many migrations lead to the revision of a database, or 0 if it has none.

    Raises:
        SchemaOutOfDate: If only a newer version of incidentkit knows the revision.
    """
    if current is None:
        return 0
    if current not in REVISIONS:
        check_revision(current)
    return REVISIONS.index(current) + 1


def migrations_to(target: str, at: int) -> int:
    """Return how many migrations lead from an empty database to a target.

    Args:
        target: ``head``, ``base``, a revision or the beginning of one, with or without a number of
            steps after it, as in ``head-1``. Steps alone, as in ``-1``, count from ``at``.
        at: How many migrations lead to the revision of the database.

    Raises:
        InvalidSettings: If there is no such revision.
    """
    if not target:
        raise InvalidSettings("revision", "must not be empty")
    parts = _TARGET.fullmatch(target)
    found = parts and _number(parts["start"], at)
    if parts is None or found is None:
        raise InvalidSettings("revision", f"must be head, base, or one of {', '.join(REVISIONS)}")
    reached = found + int(parts["steps"] or 0)
    if not 0 <= reached <= len(REVISIONS):
        raise InvalidSettings("revision", "cannot be reached: there are fewer steps")
    return reached


def _number(name: str, at: int) -> int | None:
    numbers = {"": at, "base": 0, "head": len(REVISIONS), "heads": len(REVISIONS)}
    if name in numbers:
        return numbers[name]
    known = [n for n, revision in enumerate(REVISIONS, 1) if revision.startswith(name)]
    return known[0] if len(known) == 1 else None


def in_the_way(name: str, kind: str = "table") -> StoreError:
    """Return the error for a foreign object with the name of one of incidentkit's."""
    return StoreError(
        f'a {kind} "{name}" is in the way, which neither incidentkit nor Incident API created: '
        "rename it, or use another database or schema"
    )


def unordered(sequence: str, schema: str | None) -> StoreError:
    """Return the error for a sequence whose numbers are not in the order in which they are taken.

    Args:
        sequence: The sequence of the ids of events.
        schema: Where the tables are, for the command; None: in the default schema.
    """
    return StoreError(
        f"the sequence {sequence} counts down or has a cache, so that events would be out of "
        f"order: run `{upgrade_command(schema)}`"
    )


def copied(schema: str | None) -> StoreError:
    """Return the error for events that come after those that the server has yet to write.

    Args:
        schema: Where the tables are, for the command; None: in the default schema.
    """
    return StoreError(
        "it was copied from another server, whose transactions had larger numbers: "
        f"run `{upgrade_command(schema)}`"
    )

"""The revisions of the schema, and which of them the statements work on."""

from __future__ import annotations

from typing import Final

from incidentkit.domain.errors import SchemaOutOfDate

REVISIONS: Final = (
    "dadc1db062ae",
    "5c1f0e9b7a34",
    "b27d4f0c1a96",
    "e4a81c3f5d27",
    "9b3f6d20c7e8",
    "c7d15a82e9b4",
)
"""Every revision in ``migrations``, oldest first. The first is that of the origin, Incident API."""

SCHEMA_REVISION: Final = REVISIONS[-1]
"""The revision that the statements work on."""

VERSION_TABLE: Final = "incidentkit_version"
"""The table that records the revision, separate from a host's own ``alembic_version``."""


def check_revision(current: str | None) -> None:
    """Raise unless the revision is :data:`SCHEMA_REVISION`.

    Raises:
        SchemaOutOfDate: With the command to run.
    """
    if current == SCHEMA_REVISION:
        return
    newer = current is not None and current not in REVISIONS
    command = "pip install --upgrade incidentkit" if newer else "incidentkit db upgrade"
    raise SchemaOutOfDate(current, SCHEMA_REVISION, command)

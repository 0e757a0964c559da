"""The migrations, as modules of the package, so that an installation runs only its own."""

from __future__ import annotations

from typing import Final, Protocol

from incidentkit.store.migrations import (
    access_tokens,
    concurrent_indexes,
    dedup_key_index,
    details,
    event_writer,
    incident_event,
    incident_token,
    origin,
    request_log,
    search_words,
    strict_columns,
    token_of_table,
    token_without_waiting,
)


class Migration(Protocol):
    """A module that leads to a revision of the schema, and back."""

    @property
    def revision(self) -> str:
        """The revision to which it leads."""
        ...

    def upgrade(self) -> None:
        """Change the schema to this revision."""
        ...

    def downgrade(self) -> None:
        """Change the schema to the revision before."""
        ...


MIGRATIONS: Final[tuple[Migration, ...]] = (
    origin,
    strict_columns,
    request_log,
    incident_token,
    incident_event,
    token_without_waiting,
    event_writer,
    concurrent_indexes,
    search_words,
    token_of_table,
    dedup_key_index,
    access_tokens,
    details,
)
"""Every migration, oldest first. The first is that of the origin, Incident API."""

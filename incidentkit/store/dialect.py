"""The protocol of a dialect: the operations that each database does with SQL of its own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, Protocol, TypeAlias

from sqlalchemy import Executable

from incidentkit.domain.commands import (
    NewIncident,
    NoteAddition,
    Resolution,
    Resolutions,
    StatusChange,
)
from incidentkit.domain.transitions import Transitions
from incidentkit.domain.values import FeedBlocker, Incident, IncidentEvent
from incidentkit.store.database import DatabaseKind
from incidentkit.store.executor import Fetch, Rows
from incidentkit.store.ports import IncidentList, OptionalIncidents
from incidentkit.store.sql.definitions import Schema
from incidentkit.store.sql.search import WordsMatch

PURGED_EVENTS: Final = 5_000
"""Maximum number of events that one purge removes, so that its transaction stays short."""


CreateTogether: TypeAlias = Callable[
    [Fetch, Sequence[tuple[NewIncident, str | None]]], Awaitable[IncidentList]
]
"""Inserts incidents, each with its actor, and returns them in their order."""


class Dialect(Protocol):
    """The operations that PostgreSQL and SQLite do with different statements.

    Attributes:
        claim_key: Takes an idempotency key for the transaction, and returns a row, unless the key,
            or the one that the actor has for it, was used in the last 24 hours.
        delete_expired_keys: Removes at most ``limit`` idempotency keys older than that.
        select_changes: Returns the events after a place, in the order of their commits.
        select_waiting: Returns the places of committed events, including those that others may
            still precede; None: no event ever waits.
        words_match: The conditions for a message that has the phrases of a search.
        indexes_pairs: Whether the database looks up a pair of a time and an id in an index.
        select_schema: Returns the revision and the parts of the schema.
        keeps_plans: Whether the database reuses a generic plan for a statement whose cost does not
            depend on its values.
        system: The kind of database.
        schema: The schema of the tables; None: the default one, or the database has no schemas.
    """

    claim_key: Executable
    delete_expired_keys: Executable
    select_changes: Executable
    select_waiting: Executable | None
    words_match: WordsMatch
    indexes_pairs: bool
    keeps_plans: bool
    system: DatabaseKind
    schema: str | None
    select_schema: Executable

    def read_schema(self, rows: Rows) -> Schema:
        """Return the schema of the rows of :attr:`select_schema`."""
        ...

    async def create(self, fetch: Fetch, incident: NewIncident, actor: str | None) -> Incident:
        """Insert the incident with its event, or count an occurrence of the open one."""
        ...

    @property
    def create_together(self) -> CreateTogether | None:
        """Inserts several incidents without deduplication keys; None: each needs :meth:`create`.

        If it raises, as a trigger of the database can make it, its statements have to be undone,
        and :meth:`create` run for each.
        """
        ...

    async def create_many(
        self, fetch: Fetch, incidents: Sequence[NewIncident], actor: str | None
    ) -> IncidentList:
        """Insert incidents with their events, as :meth:`create` does for each in turn."""
        ...

    async def update_status(
        self, fetch: Fetch, change: StatusChange, transitions: Transitions, actor: str | None
    ) -> Incident:
        """Change the status, insert the event, and return the incident.

        Raises:
            IncidentNotFound: If there is none with this id.
            IncidentConflict: If the incident in its present state does not allow the change.
        """
        ...

    async def resolve(
        self, fetch: Fetch, resolution: Resolution, transitions: Transitions, actor: str | None
    ) -> Incident | None:
        """End the open incident with a deduplication key, insert the event, and return it.

        Returns:
            The incident; None if none is open.

        Raises:
            IllegalTransition: If the transitions do not allow the change.
        """
        ...

    async def resolve_many(
        self, fetch: Fetch, resolutions: Resolutions, transitions: Transitions, actor: str | None
    ) -> OptionalIncidents:
        """End open incidents with their events, as :meth:`resolve` does for one key after another.

        Raises:
            IllegalTransition: If the transitions do not allow the change.
        """
        ...

    async def note(self, fetch: Fetch, addition: NoteAddition, actor: str | None) -> IncidentEvent:
        """Insert a note and return its event.

        Raises:
            IncidentNotFound: If there is no incident with this id.
            VersionConflict: If it does not have the expected version.
        """
        ...

    async def purge(
        self, fetch: Fetch, ended_before: datetime, limit: int, actor: str | None
    ) -> tuple[int, bool]:
        """Remove incidents; return their number, and whether there may be more."""
        ...

    async def check_order(self, fetch: Fetch) -> bool:
        """Raise unless new events come after the existing ones.

        Returns:
            Whether policies decide which events a session sees.

        Raises:
            StoreError: With the command that repairs the order.
        """
        ...

    async def feed_blocker(self, fetch: Fetch, seconds: float) -> FeedBlocker | None:
        """Return the transaction that has held up the feed for at least this long, or None."""
        ...

    def phrases(self, text: str) -> Mapping[str, Any]:
        """Return the values of :attr:`words_match` for the text of a search."""
        ...

    def lost_race(self, error: BaseException | None) -> bool:
        """Return whether another incident with the same key was opened at the same time."""
        ...

    def unstorable(self, error: BaseException | None) -> str | None:
        """Return the character that the database's encoding does not have, if that is the cause."""
        ...

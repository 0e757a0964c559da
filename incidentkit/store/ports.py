"""The protocols of a store: the methods that the verbs and the client call."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from incidentkit.domain.commands import (
    NewIncident,
    NoteAddition,
    Resolution,
    Resolutions,
    StatusChange,
)
from incidentkit.domain.queries import ListQuery, SearchQuery
from incidentkit.domain.rules import EventCursor
from incidentkit.domain.transitions import Transitions
from incidentkit.domain.values import FeedBlocker, Incident, IncidentEvent, SearchPage
from incidentkit.store.schema import Upgrade

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

    # Only an open store needs these.
    from incidentkit.store.idempotency import Idempotency
    from incidentkit.store.page import Page

Place: TypeAlias = tuple[int, int]
"""The place of an event in the order of all events: the number of a transaction, and the event's
id."""

BEGINNING: Final[Place] = (-(2**63), 0)
"""The place before the first event."""

EventList: TypeAlias = list[IncidentEvent]
"""An alias because inside the protocol ``list`` is the verb."""

IncidentList: TypeAlias = list[Incident]

OptionalIncidents: TypeAlias = list[Incident | None]


class StoreOperations(Protocol):
    """The operations on incidents, in transactions of the store or in a host's transaction.

    Arguments are already valid. Every method raises :class:`~incidentkit.StoreUnavailable` if the
    database cannot be reached, and :class:`~incidentkit.StoreError` if it refuses a statement.
    """

    async def create(
        self, incident: NewIncident, *, actor: str | None = None, once: Idempotency | None = None
    ) -> Incident:
        """Store the incident with its event and return it.

        If an incident with its deduplication key is open, count an occurrence of that one instead.
        If the key of ``once`` was used in the last 24 hours, return the first answer.

        Raises:
            IdempotencyKeyReused: If the key was used with other parameters.
        """
        ...

    async def create_many(
        self,
        incidents: Sequence[NewIncident],
        *,
        actor: str | None = None,
        once: Idempotency | None = None,
    ) -> IncidentList:
        """Store incidents, all or none, and return them in the same order.

        The result is that of :meth:`create` called for one after the other.

        Raises:
            IdempotencyKeyReused: If the key of ``once`` was used with other parameters.
        """
        ...

    async def list(self, query: ListQuery) -> Page:
        """Return one page: newest first by ``created_at``, ties broken by id, newest first."""
        ...

    async def search(self, query: SearchQuery) -> SearchPage:
        """Return one page of a search, with the total if the query asks for it."""
        ...

    async def token(self) -> str | None:
        """Return the token of the incidents, which every change of any incident replaces.

        Equal tokens mean equal incidents: a replaced token never comes back, unless the incidents
        of its time do, as with a restored backup. None: changes cannot be detected.
        """
        ...

    async def get(self, incident_id: int) -> Incident | None:
        """Return the incident, or None if there is none with this id."""
        ...

    async def update_status(
        self,
        change: StatusChange,
        *,
        transitions: Transitions = ...,
        actor: str | None = None,
        once: Idempotency | None = None,
    ) -> Incident:
        """Change the status, record the event, and return the incident.

        Setting the present status changes nothing; a note is still recorded.

        Raises:
            IncidentNotFound: If there is none with this id.
            IncidentConflict: If the incident in its present state does not allow the change.
            IdempotencyKeyReused: If the key of ``once`` was used with other parameters.
        """
        ...

    async def resolve(
        self,
        resolution: Resolution,
        *,
        transitions: Transitions = ...,
        actor: str | None = None,
        once: Idempotency | None = None,
    ) -> Incident | None:
        """End the open incident with a deduplication key, record the event, and return it.

        Return None if none is open, also if another transaction ends it first.

        Raises:
            IllegalTransition: If the transitions do not allow the change.
            IdempotencyKeyReused: If the key of ``once`` was used with other parameters.
        """
        ...

    async def resolve_many(
        self,
        resolutions: Resolutions,
        *,
        transitions: Transitions = ...,
        actor: str | None = None,
        once: Idempotency | None = None,
    ) -> OptionalIncidents:
        """End open incidents, all or none, and return one answer for each deduplication key.

        The result is that of :meth:`resolve` called for one key after the other.

        Raises:
            IllegalTransition: If the transitions do not allow the change.
            IdempotencyKeyReused: If the key of ``once`` was used with other parameters.
        """
        ...

    async def note(
        self, addition: NoteAddition, *, actor: str | None = None, once: Idempotency | None = None
    ) -> IncidentEvent:
        """Add a note to the history and return its event.

        Raises:
            IncidentNotFound: If there is none with this id.
            VersionConflict: If it does not have the expected version.
            IdempotencyKeyReused: If the key of ``once`` was used with other parameters.
        """
        ...

    async def history(self, incident_id: int, *, after: int = ..., limit: int = ...) -> EventList:
        """Return events of an incident, oldest first, after the one with this event id."""
        ...

    async def changes(self, after: Place, limit: int) -> EventList:
        """Return events of all incidents after a place, in the order of their commits.

        Events of one incident are in the order of its changes. No event is ever added before one
        that was returned.
        """
        ...

    async def latest_change(self) -> IncidentEvent | None:
        """Return the last of all events that :meth:`changes` has, or None if it has none."""
        ...

    async def waiting_changes(self, after: Place, limit: int) -> Sequence[tuple[int, int, int]]:
        """Return the places and nonces of committed events after a place.

        Unlike :meth:`changes`, it also returns events that another one may still precede.
        """
        ...

    async def check_order(self) -> None:
        """Raise unless new events come after the existing ones.

        Raises:
            StoreError: If the database was copied from another server; names the command that
                repairs the order.
        """

    async def place(self, cursor: EventCursor) -> Place:
        """Return the place of the event that a cursor stands for.

        Raises:
            UnknownCursor: If this database never had this event.
        """
        ...


class IncidentStore(StoreOperations, Protocol):
    """A place to keep incidents: each write is committed when it returns.

    A store may also have an attribute ``row_security``: whether policies decide which rows a
    session sees, so that no call may share the answer of another.

    A store may also have an attribute ``has_token``: false if it never has a token of the
    incidents, so that no page of the list is kept.

    A store may also have a method ``abandon()``, which releases everything without the event loop
    that opened the store. A client calls it in a thread when it is connected or closed after that
    event loop has ended, or in a forked process.
    """

    async def open(self) -> None:
        """Connect, and check the schema.

        Raises:
            SchemaOutOfDate: If it is not the schema that this version works on.
        """

    async def close(self) -> None:
        """Release every connection; calling it again does nothing."""

    async def check(self) -> None:
        """Raise unless the database answers and has the schema that this version works on."""

    async def feed_blocker(self) -> FeedBlocker | None:
        """Return the transaction that has held up the feed for five seconds, or None."""
        ...

    async def purgeable(self, ended_before: datetime) -> int:
        """Return the number of incidents that ended before a time."""
        ...

    async def purge(
        self, ended_before: datetime, limit: int, *, actor: str | None = None
    ) -> tuple[int, bool]:
        """Remove incidents that ended before a time, at most ``limit``, with their events.

        One event for each remains and records the removal. Incidents that another transaction is
        changing are skipped. An incident with very many events takes several calls.

        Returns:
            The number of incidents removed, and whether there may be more.
        """
        ...

    def join(self, connection: object) -> StoreOperations:
        """Return the operations in the transaction of a host's connection.

        Raises:
            NotInTransaction: If the connection commits each statement by itself.
            TypeError: If the connection is of a kind that cannot be joined.
        """
        ...

    def join_sync(self, connection: object) -> StoreOperations:
        """Return the operations in the transaction of a host's synchronous connection.

        They never suspend, and need neither an event loop nor an open store.

        Raises:
            NotInTransaction: If the connection commits each statement by itself.
            TypeError: If the connection is of a kind that cannot be joined.
        """
        ...


class Migrations(Protocol):
    """Functions of ``incidentkit.store.migrate``, which is loaded only if it is needed."""

    async def upgrade(
        self, database_url: str, revision: str = ..., *, schema: str | None = ...
    ) -> Upgrade:
        """Bring the tables up to a revision, and restore parts of the newest one."""
        ...

    async def downgrade(
        self, database_url: str, revision: str = ..., *, schema: str | None = ...
    ) -> None:
        """Bring the tables down to a revision."""

    async def current(self, database_url: str, *, schema: str | None = ...) -> str | None:
        """Return the revision of the tables; None if there are none of incidentkit."""
        ...

    async def check(self, database_url: str, *, schema: str | None = ...) -> None:
        """Raise unless the tables are at the newest revision, and their events in order."""

    async def upgrade_memory(self, engine: AsyncEngine) -> None:
        """Create the schema in the SQLite database in memory of an engine."""

    def upgrade_connection(self, connection: Connection) -> None:
        """Create or upgrade the schema in the SQLite database of a connection."""

    def create_in_memory(self, connection: Connection) -> None:
        """Create the schema in the empty SQLite database in memory of a connection."""

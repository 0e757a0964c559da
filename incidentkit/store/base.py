"""What a store does, and the choice of one from a URL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias

from attrs import field, frozen

from incidentkit.defaults import DEFAULT_DATABASE_URL
from incidentkit.domain.errors import InvalidSettings
from incidentkit.wire import encode_incidents

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime

    from attrs import Attribute
    from sqlalchemy import Executable

    from incidentkit.domain.commands import NewIncident, StatusChange
    from incidentkit.domain.queries import ListQuery, SearchQuery
    from incidentkit.domain.transitions import Transitions
    from incidentkit.domain.values import Incident, IncidentEvent, SearchPage

Place: TypeAlias = tuple[int, int]
"""Where an event stands in the order of all: the number of a transaction, and the event's id."""

BEGINNING: Final[Place] = (-(2**63), 0)
"""The place before the first event."""

Events: TypeAlias = "list[IncidentEvent]"
"""An alias because inside the protocol ``list`` is the verb."""

Incidents: TypeAlias = "list[Incident]"

DatabaseKind: TypeAlias = Literal["postgresql", "sqlite"]

_KINDS: Final[dict[str, DatabaseKind]] = {
    "postgresql": "postgresql",
    "postgres": "postgresql",
    "postgresql+asyncpg": "postgresql",
    "sqlite": "sqlite",
    "sqlite+aiosqlite": "sqlite",
}


class Page:
    """One page of the list.

    Args:
        incidents: Newest first; or what makes them once they are asked for.
        token: What :meth:`StoreOperations.token` says of the same snapshot of the database.
        json: What makes the JSON array of the incidents, if there is a shorter way than by them.
    """

    __slots__ = ("_incidents", "_json", "token")

    def __init__(
        self,
        incidents: list[Incident] | Callable[[], list[Incident]],
        token: str | None,
        json: bytes | Callable[[], bytes] | None = None,
    ) -> None:
        self._incidents = incidents
        self._json = json
        self.token = token

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Page):
            return NotImplemented
        return self.token == other.token and self.incidents == other.incidents

    __hash__ = None  # type: ignore[assignment]

    @property
    def incidents(self) -> list[Incident]:
        """The incidents, newest first."""
        if callable(self._incidents):
            self._incidents = self._incidents()
        return self._incidents

    @property
    def json(self) -> bytes:
        """The same as a JSON array."""
        if self._json is None:
            self._json = encode_incidents(self.incidents)
        elif callable(self._json):
            self._json = self._json()
        return self._json


@frozen
class Idempotency:
    """What makes a write happen once.

    Attributes:
        key: What the caller repeats.
        fingerprint: The same for the same parameters, and for no others.
    """

    key: str
    fingerprint: str


def _at_least(low: int) -> Callable[[object, Attribute[int], object], None]:
    def check(_: object, option: Attribute[int], value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise InvalidSettings(option.name, f"must be an integer from {low}")

    return check


def _positive(_: object, option: Attribute[float], value: object) -> None:
    if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise InvalidSettings(option.name, "must be a positive number of seconds")


@frozen
class StoreOptions:
    """How a store uses its database.

    Attributes:
        pool_size: Connections that may be kept, at least 1; on SQLite those that read.
        max_overflow: Connections that may be opened on top of them under load, at least 0; of no
            effect on SQLite.
        connect_timeout: Seconds to wait for a new connection.
        pool_timeout: Seconds to wait for a free connection.
        statement_timeout: Seconds that a statement may take; on SQLite how long it waits for
            another process that is writing, and with ``pool_timeout`` how long its caller waits
            for a read, or for a write to begin.
        echo: Log every statement, without its values, to the logger ``incidentkit.store``.

    Raises:
        InvalidSettings: With the name of what cannot be used.
    """

    pool_size: int = field(default=5, validator=_at_least(1))
    max_overflow: int = field(default=10, validator=_at_least(0))
    connect_timeout: float = field(default=5.0, validator=_positive)
    pool_timeout: float = field(default=5.0, validator=_positive)
    statement_timeout: float = field(default=10.0, validator=_positive)
    echo: bool = False


class StoreOperations(Protocol):
    """What is done with incidents, in transactions of its own or in a host's.

    Every method raises :class:`~incidentkit.StoreUnavailable` if the database cannot be reached
    and :class:`~incidentkit.StoreError` if it refuses a statement; arguments are valid already.
    """

    async def create(
        self, incident: NewIncident, *, actor: str | None = None, once: Idempotency | None = None
    ) -> Incident:
        """Store the incident with its event and return it.

        If one with its deduplication key is open, that one counts an occurrence instead. If the
        key of ``once`` was used within a day, return what was returned then.

        Raises:
            IdempotencyKeyReused: If it was used for something else.
        """
        ...

    async def create_many(
        self,
        incidents: Sequence[NewIncident],
        *,
        actor: str | None = None,
        once: Idempotency | None = None,
    ) -> Incidents:
        """Store incidents, all or none, and return them in the same order.

        It is as if :meth:`create` did it one after the other.

        Raises:
            IdempotencyKeyReused: If the key of ``once`` was used for something else.
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

        Equal tokens mean equal incidents: a token that was replaced never comes back, unless the
        incidents of its time do, as with a restored backup. None means that this cannot be told.
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
        """Change the status, with its event, and return the incident.

        A status that it has already is no change: only a note is recorded.

        Raises:
            IncidentNotFound: If there is none with this id.
            IncidentConflict: If the incident as it is does not allow it.
            IdempotencyKeyReused: If the key of ``once`` was used for something else.
        """
        ...

    async def note(self, incident_id: int, note: str, *, actor: str | None = None) -> IncidentEvent:
        """Add a note to the history and return its event.

        Raises:
            IncidentNotFound: If there is none with this id.
        """
        ...

    async def history(self, incident_id: int, *, after: int = ..., limit: int = ...) -> Events:
        """Return events of an incident, oldest first, from past the one with this event id."""
        ...

    async def changes(self, after: Place, limit: int) -> Events:
        """Return events of all incidents, from past a place, in the order of their commits.

        Events of one incident are in the order of its changes. No event is ever added before one
        that was returned.
        """
        ...

    async def latest_change(self) -> IncidentEvent | None:
        """Return the last of all events that :meth:`changes` has, or None if it has none."""
        ...

    async def check_order(self) -> None:
        """Raise unless new events come after those that are there.

        Raises:
            StoreError: With the command that mends it: the database was copied from another server.
        """

    async def place(self, cursor: tuple[int, ...]) -> Place:
        """Return the place of the event that a cursor stands for.

        Raises:
            UnknownCursor: If there never was this event here.
        """
        ...


class IncidentStore(StoreOperations, Protocol):
    """Where incidents are kept: each of its writes is committed when it returns."""

    async def open(self) -> None:
        """Connect, and make sure of the schema.

        Raises:
            SchemaOutOfDate: If it is not the one that this version works on.
        """

    async def close(self) -> None:
        """Give back every connection; calling it again does nothing."""

    async def check(self) -> None:
        """Raise unless the database answers and has the schema that this version works on."""

    async def purgeable(self, ended_before: datetime) -> int:
        """Return how many incidents ended before then."""
        ...

    async def purge(
        self, ended_before: datetime, limit: int, *, actor: str | None = None
    ) -> tuple[int, bool]:
        """Remove some incidents that ended before then, at most so many.

        Their events go with them; one that tells of it stays. Those that others are changing are
        left out. An incident with very many events goes in several calls.

        Returns:
            How many were removed, and whether there may be more.
        """
        ...

    def join(self, connection: object) -> StoreOperations:
        """Return what is done with incidents in the transaction of a host's connection.

        Raises:
            NotInTransaction: If the connection commits each statement by itself.
            TypeError: If it is no connection that can be joined.
        """
        ...

    async def append(self, statement: Executable, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows with one statement, in one transaction."""


def database_kind(database_url: str) -> DatabaseKind:
    """Return which database a URL is for.

    Raises:
        InvalidSettings: If it is for neither.
    """
    scheme, separator, _ = database_url.partition("://")
    if not separator or scheme not in _KINDS:
        reason = "must start with postgresql:// or sqlite+aiosqlite:///"
        raise InvalidSettings("database_url", reason)
    return _KINDS[scheme]


def store_from_url(
    database_url: str = DEFAULT_DATABASE_URL, options: StoreOptions | None = None
) -> IncidentStore:
    """Return the store, not yet open, for a ``postgresql://`` or ``sqlite+aiosqlite:///`` URL.

    Raises:
        InvalidSettings: If the URL names neither.
    """
    options = options or StoreOptions()
    if database_kind(database_url) == "postgresql":
        from incidentkit.store.postgresql import PostgresStore  # noqa: PLC0415

        return PostgresStore(database_url, options)
    from incidentkit.store.sqlite import SqliteStore  # noqa: PLC0415

    return SqliteStore(database_url, options)


def store_on(database: object, options: StoreOptions | None = None) -> IncidentStore:
    """Return the store, not yet open, on a URL, or on what a host has opened itself.

    Args:
        database: A URL, SQLAlchemy's ``AsyncEngine``, or a pool of asyncpg.
        options: Only for a URL; what a host has opened has sizes and timeouts already.

    Raises:
        InvalidSettings: If it is none of these, or to another kind of database, or has options.
    """
    if isinstance(database, str):
        return store_from_url(database, options)
    if options is not None:
        raise InvalidSettings("options", "are only for a URL: an engine or a pool has its own")
    import asyncpg  # noqa: PLC0415
    from sqlalchemy.ext.asyncio import AsyncEngine  # noqa: PLC0415

    if isinstance(database, asyncpg.Pool):
        from incidentkit.store.postgresql import PostgresStore  # noqa: PLC0415

        return PostgresStore(database)
    if isinstance(database, AsyncEngine) and database.dialect.name == "postgresql":
        from incidentkit.store.engine import EngineStore  # noqa: PLC0415

        return EngineStore(database)
    if isinstance(database, AsyncEngine) and database.dialect.name == "sqlite":
        from incidentkit.store.sqlite_engine import SqliteEngineStore  # noqa: PLC0415

        return SqliteEngineStore(database)
    raise InvalidSettings(
        "database", "must be a URL, an AsyncEngine on PostgreSQL or SQLite, or a pool of asyncpg"
    )

"""What a store does, and the choice of one from a URL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeAlias

from attrs import field, frozen

from incidentkit.errors import InvalidSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from attrs import Attribute

    from incidentkit.models import Incident, IncidentStatus, ListQuery, NewIncident

DEFAULT_DATABASE_URL: Final = "sqlite+aiosqlite:///incidentkit.db"
"""Where incidents are kept if nothing else is said: a file in the current folder."""

DatabaseKind: TypeAlias = Literal["postgresql", "sqlite"]

_KINDS: Final[dict[str, DatabaseKind]] = {
    "postgresql": "postgresql",
    "postgres": "postgresql",
    "postgresql+asyncpg": "postgresql",
    "sqlite": "sqlite",
    "sqlite+aiosqlite": "sqlite",
}


@frozen
class RequestRecord:
    """One answered HTTP request.

    Attributes:
        logged_at: When it was answered, aware.
        method: The HTTP method; ``(other)`` for one that HTTP does not define.
        route: The path's template, such as ``/incident/get/{incident_id}``; ``(none)`` where no
            route answered.
        status: The HTTP status of the answer.
        duration_ms: From the route's start to its answer, in milliseconds.
        request_id: The id that the answer carries in ``X-Request-ID``.
    """

    logged_at: datetime
    method: str
    route: str
    status: int
    duration_ms: float
    request_id: str


@frozen
class Page:
    """One page of the list.

    Attributes:
        incidents: Newest first.
        token: What :meth:`IncidentStore.token` says of the same snapshot of the database.
    """

    incidents: list[Incident]
    token: str | None


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
        pool_size: Connections that may be kept, at least 1.
        max_overflow: Connections that may be opened on top of them under load, at least 0.
        connect_timeout: Seconds to wait for a new connection.
        pool_timeout: Seconds to wait for a free connection.
        statement_timeout: Seconds that a statement may take; on SQLite how long it waits for
            another process that is writing, and with ``pool_timeout`` how long its caller waits
            for it.
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


class IncidentStore(Protocol):
    """Where incidents are kept.

    Every method raises :class:`~incidentkit.StoreUnavailable` if the database cannot be reached
    and :class:`~incidentkit.StoreError` if it refuses a statement; arguments are valid already.
    """

    async def open(self) -> None:
        """Connect, and make sure of the schema.

        Raises:
            SchemaOutOfDate: If it is not the one that this version works on.
        """

    async def close(self) -> None:
        """Give back every connection; calling it again does nothing."""

    async def check(self) -> None:
        """Raise unless the database answers and has the schema that this version works on."""

    async def create(self, incident: NewIncident) -> Incident:
        """Store the incident and return it, committed."""
        ...

    async def list(self, query: ListQuery) -> Page:
        """Return one page: newest first by ``created_at``, ties broken by id, newest first."""
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

    async def update_status(self, incident_id: int, status: IncidentStatus) -> Incident | None:
        """Change the status and return the incident, committed, or None if there is none."""
        ...

    async def log_requests(self, records: Sequence[RequestRecord]) -> None:
        """Append records to the table ``request_log``."""


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

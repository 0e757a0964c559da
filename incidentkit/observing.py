"""Define the protocol of observers, which count and time the calls of a client."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import wraps
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

CacheRead: TypeAlias = Literal["process", "shared", "missing", "stale", "unavailable", "bypassed"]
"""The result of reading a page of the list from the caches; concurrent calls share a read:

- ``process``: served from the memory of the process.
- ``shared``: served from the shared cache.
- ``missing``: read from the database, since no cache had the page.
- ``unavailable``: read from the database, since the shared cache does not work.
- ``bypassed``: read from the database, since row security lets each session see other rows.
- ``stale``: a cache had the page, but out of date. Another result of the same read follows.
"""

VERBS: Final = (
    "check",
    "create",
    "create_many",
    "get",
    "history",
    "list",
    "list_json",
    "note",
    "purge",
    "purgeable",
    "read_changes",
    "resolve",
    "resolve_many",
    "search",
    "update_status",
)
"""The observed methods of a client; ``changes`` and ``iterate``, which yield, are not observed."""


CALLERS: Final[ContextVar[tuple[object, ...]]] = ContextVar("incidentkit_callers", default=())
"""The calls that share the running statement, as the values that entering :meth:`Observer.call`
returned. Empty without an observer, and for work in the background."""


class Database(NamedTuple):
    """The database that a statement is for.

    Attributes:
        system: ``postgresql`` or ``sqlite``.
        address: The host of the server, or the folder of its socket; None: unknown, several
            hosts, or SQLite.
        port: The port of the server; None if ``address`` is.
        name: The name of the database; None if ``address`` is.
    """

    system: str
    address: str | None = None
    port: int | None = None
    name: str | None = None


class PoolUse(NamedTuple):
    """The use of a client's connection pool.

    Attributes:
        in_use: Connections that run a call, or are being opened.
        waiting: Calls that wait for a connection.
        maximum: Maximum number of connections.
    """

    in_use: int
    waiting: int
    maximum: int


class Observer(Protocol):
    """Counts and times the calls of a client.

    No method receives a message, a key, a note, an actor or another value of an incident. The
    methods are called on the event loop, or in the thread of a caller that has joined a transaction
    without one. They must return at once and never raise.
    """

    def call(self, verb: str, /) -> AbstractContextManager[object]:
        """Return a context manager in which a call runs; it sees the exception if the call fails.

        The value that entering it returns represents the call in :data:`CALLERS`; each call needs
        an object of its own.

        Args:
            verb: One of :data:`VERBS`.
        """
        ...

    def statement(self, operation: str, database: Database, /) -> AbstractContextManager[object]:
        """Return a context manager in which a statement runs; it sees the exception on failure.

        :data:`CALLERS` has the calls that share it.

        Args:
            operation: The first word of the statement in upper case, such as ``INSERT``.
            database: The database that it is for.
        """
        ...

    def pool_timeout(self) -> None:
        """Count a call that got no connection in time."""
        ...

    def cache_read(self, result: CacheRead, /) -> None:
        """Count a result of a read of a page of the list."""
        ...

    def delivered(self, seconds: float, /) -> None:
        """Record the age of a change that is delivered to a reader who waited for it."""
        ...

    def request(self, method: str, route: str, status: int, seconds: float, /) -> None:
        """Record a request that the REST service has answered.

        Args:
            method: The HTTP method; ``(other)`` for one that HTTP does not define, and for a
                request that the server has refused before it read the method.
            route: The path's template; ``(none)`` if no route took the request.
            status: The status of the answer.
            seconds: The time until the answer was ready to be sent.
        """
        ...


@runtime_checkable
class Observable(Protocol):
    """A store whose statements an observer can time."""

    def observe(self, observer: Observer) -> None:
        """Tell the observer about each statement from now on."""
        ...


@runtime_checkable
class Pooled(Protocol):
    """A store that may have its own connection pool."""

    @property
    def pool_use(self) -> PoolUse | None:
        """The use of the pool; None: there is none, as with SQLite."""


@runtime_checkable
class Pool(Pooled, Protocol):
    """An executor that lends connections."""

    def watch_pool(self, on_timeout: Callable[[], object]) -> None:
        """Call a function whenever a call gets no connection in time, once the pool is opened."""


def observe_verbs(client: object, observer: Observer) -> None:
    """Wrap each verb of a client, so that a client without an observer pays nothing."""
    for verb in VERBS:
        method = getattr(client, verb, None)
        if method is not None:
            setattr(client, verb, _observed(method, observer, verb))


def _observed(
    method: Callable[..., Awaitable[Any]], observer: Observer, verb: str
) -> Callable[..., Awaitable[Any]]:
    @wraps(method)
    async def call(*arguments: Any, **options: Any) -> Any:
        with observer.call(verb) as caller:
            token = CALLERS.set((caller,))
            try:
                return await method(*arguments, **options)
            finally:
                CALLERS.reset(token)

    return call


def outcome(error: BaseException | None) -> str:
    """Return ``ok``, the SQLSTATE of an error, or else the name of its class."""
    if error is None:
        return "ok"
    return sqlstate(error) or type(error).__name__


def sqlstate(error: BaseException) -> str | None:
    """Return the SQLSTATE of an error or of its cause; None: it has none."""
    for each in (error, error.__cause__):
        state: object = getattr(each, "sqlstate", None)
        if isinstance(state, str):
            return state
    return None

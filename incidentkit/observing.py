"""The protocol of an observer, which counts and times what a client does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, Final, Literal, Protocol, TypeAlias, runtime_checkable

CacheRead: TypeAlias = Literal["process", "shared", "missing", "stale", "unavailable", "bypassed"]
"""What a read of a page of the list finds in the caches; concurrent lists share a read:

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
    "search",
    "update_status",
)
"""The observed methods of a client; ``changes`` and ``iterate``, which yield, are not observed."""


class Observer(Protocol):
    """Counts and times what a client does.

    No method gets a message, a key, a note, an actor or another value of an incident. The methods
    are called on the event loop: they must return at once and never raise.
    """

    def call(self, verb: str, /) -> AbstractContextManager[object]:
        """Return what a call of a verb runs in; an exception that leaves it is its outcome.

        Args:
            verb: One of :data:`VERBS`.
        """
        ...

    def statement(self, operation: str, system: str, /) -> AbstractContextManager[object]:
        """Return what a statement runs in; an exception that leaves it is its outcome.

        Args:
            operation: The first word of the statement in upper case, such as ``INSERT``.
            system: ``postgresql`` or ``sqlite``.
        """
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
            method: The HTTP method; ``(other)`` for one that HTTP does not define.
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
        with observer.call(verb):
            return await method(*arguments, **options)

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

"""Make calls of a client fail, or take longer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from threading import Lock
from typing import Any, Final, Protocol

from incidentkit.domain.errors import InvalidSettings, StoreError
from incidentkit.incidents import Incidents
from incidentkit.observing import VERBS
from incidentkit.sync.incidents import SyncIncidents
from incidentkit.testing.clients import check_verbs

METHODS: Final = {name: name for name in (*VERBS, "feed_blocker", "iterate")} | {
    "list_json": "list"
}
"""The methods of a client that can fail, with the verb of each. ``changes`` waits instead."""


class Fault(Protocol):
    """Delays the calls of a client, or makes them fail."""

    def __call__(self, verb: str, /) -> float:
        """Return the seconds that a call must wait, or raise its error."""
        ...


class Failures:
    """The failures of calls in a block of :func:`failing`.

    Attributes:
        count: Number of calls that have failed so far.
    """

    def __init__(self, error: BaseException | type[BaseException], times: int | None) -> None:
        self.count = 0
        self._error = error
        self._times = times
        self._turn = Lock()

    def __call__(self, verb: str, /) -> float:
        """Raise the error, unless enough calls have failed."""
        with self._turn:
            if self._times is not None and self.count >= self._times:
                return 0.0
            self.count += 1
        raise _made(self._error, verb)


def _made(error: BaseException | type[BaseException], verb: str) -> BaseException:
    """Return the error that a call of a verb raises.

    Raises:
        InvalidSettings: If it is not an exception, or a class that needs arguments.
    """
    if isinstance(error, BaseException):
        return error
    given: object = error
    if not (isinstance(given, type) and issubclass(given, BaseException)):
        raise InvalidSettings("error", "must be an exception, or a class of exceptions")
    reasons = [f"the test makes this call of {verb} fail"] if issubclass(error, StoreError) else []
    try:
        return error(*reasons)
    except TypeError as cause:
        reason = f"must be an instance, since the class {error.__name__} needs arguments"
        raise InvalidSettings("error", reason) from cause


@contextmanager
def failing(
    client: Incidents | SyncIncidents,
    error: BaseException | type[BaseException],
    *,
    times: int | None = None,
    verbs: Iterable[str] | None = None,
) -> Iterator[Failures]:
    """Make the next calls of a client fail while the block runs, before they read or write.

    .. code-block:: python

        with failing(incidents, StoreUnavailable, times=2, verbs=["create"]):
            report("Disk is full")  # tries three times

    Calls in a joined transaction from the client's ``join`` fail too. The feed of ``changes`` does
    not fail: it waits while the database is unavailable.

    Args:
        client: Any client, from the kit or from the application.
        error: The error or its class, usually an exception of incidentkit. Instead of a class that
            needs arguments, such as :class:`~incidentkit.VersionConflict`, pass an instance.
        times: Number of calls that fail, at least 1; later ones succeed. None: every call fails.
        verbs: The methods that fail, such as ``create``; None: all of them.

    Yields:
        The number of calls that have failed, as ``count``.

    Raises:
        InvalidSettings: If ``error``, ``times`` or ``verbs`` is invalid.
        TypeError: If the client is something else, such as the extension that holds it.
    """
    given: object = times
    if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
        raise InvalidSettings("times", "must be at least 1, or None for every call")
    # A mistake in the test must show here, not where the application handles exceptions.
    _made(error, "any verb")
    failures = Failures(error, times)
    with _befalling(client, failures, _checked(verbs)):
        yield failures


@contextmanager
def slow(
    client: Incidents | SyncIncidents, seconds: float, *, verbs: Iterable[str] | None = None
) -> Iterator[None]:
    """Make calls of a client take longer while the block runs.

    Args:
        client: Any client, from the kit or from the application.
        seconds: Seconds to wait before each call, at least 0.
        verbs: The methods that are slow, such as ``create``; None: all of them.

    Raises:
        InvalidSettings: If ``seconds`` or ``verbs`` is invalid.
        TypeError: If the client is something else, such as the extension that holds it.
    """
    given: object = seconds
    if not (isinstance(given, int | float) and 0 <= given < float("inf")):
        raise InvalidSettings("seconds", "must be a number of seconds, at least 0")
    with _befalling(client, lambda _: seconds, _checked(verbs)):
        yield


def _checked(verbs: Iterable[str] | None) -> frozenset[str]:
    known = frozenset(METHODS.values())
    chosen = known if verbs is None else frozenset([verbs] if isinstance(verbs, str) else verbs)
    unknown = sorted(chosen - known)
    if unknown:
        names = ", ".join(sorted(known))
        raise InvalidSettings("verbs", f"must not have {unknown[0]!r}; the verbs are {names}")
    return chosen


@contextmanager
def _befalling(client: object, fault: Fault, verbs: frozenset[str]) -> Iterator[None]:
    """Put a fault before the methods of these verbs, in this instance only."""
    # The calls of anything else would simply not fail.
    check_verbs(client)
    own = vars(client)
    before = {name: own[name] for name in (*METHODS, "join") if name in own}
    _put(client, fault, verbs)
    join = getattr(client, "join", None)
    if join is not None:
        own["join"] = partial(_join, join, fault, verbs)
    try:
        yield
    finally:
        for name in (*METHODS, "join"):
            own.pop(name, None)
        own.update(before)


def _put(client: object, fault: Fault, verbs: frozenset[str]) -> None:
    asynchronous = isinstance(client, Incidents)
    for name, verb in METHODS.items():
        method = getattr(client, name, None)
        if verb not in verbs or method is None:
            continue
        if not asynchronous:
            wrapped = _calling(method, fault, verb)
        elif verb == "iterate":
            wrapped = _yielding(method, fault, verb)
        else:
            wrapped = _awaiting(method, fault, verb)
        vars(client)[name] = wrapped


def _join(
    join: Callable[[Any], object], fault: Fault, verbs: frozenset[str], connection: Any
) -> object:
    joined = join(connection)
    _put(joined, fault, verbs)
    return joined


def _calling(method: Callable[..., Any], fault: Fault, verb: str) -> Callable[..., Any]:
    @wraps(method)
    def call(*arguments: Any, **options: Any) -> Any:
        seconds = fault(verb)
        if seconds:
            time.sleep(seconds)
        return method(*arguments, **options)

    return call


def _awaiting(
    method: Callable[..., Awaitable[Any]], fault: Fault, verb: str
) -> Callable[..., Awaitable[Any]]:
    @wraps(method)
    async def call(*arguments: Any, **options: Any) -> Any:
        await _befall(fault, verb)
        return await method(*arguments, **options)

    return call


def _yielding(
    method: Callable[..., AsyncIterator[Any]], fault: Fault, verb: str
) -> Callable[..., AsyncIterator[Any]]:
    @wraps(method)
    async def values(*arguments: Any, **options: Any) -> AsyncIterator[Any]:
        await _befall(fault, verb)
        async for value in method(*arguments, **options):
            yield value

    return values


async def _befall(fault: Fault, verb: str) -> None:
    seconds = fault(verb)
    if seconds:
        await asyncio.sleep(seconds)

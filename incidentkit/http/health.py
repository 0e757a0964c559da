"""Liveness and readiness: whether the service runs, and whether it can answer requests."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import datetime
from enum import StrEnum
from typing import Final

from attrs import frozen

from incidentkit.client import IncidentClient
from incidentkit.domain.errors import ClientClosed, SchemaOutOfDate, StoreError
from incidentkit.domain.values import FeedBlocker
from incidentkit.http.request_log import RequestLog
from incidentkit.http.server_hooks import ServerLog
from incidentkit.store.schema import SCHEMA_REVISION

TIMEOUT: Final = 3.0
"""Seconds after which a database that does not answer counts as unavailable."""


class State(StrEnum):
    """The state of a part of the service."""

    OK = "ok"
    UNAVAILABLE = "unavailable"
    OUT_OF_DATE = "out_of_date"
    UNKNOWN = "unknown"
    OFF = "off"
    HELD_UP = "held_up"


@frozen
class Health:
    """The state of one part.

    Attributes:
        state: ``off`` if the part is not in use.
    """

    state: State


@frozen
class SchemaHealth:
    """The state of the database's schema.

    Attributes:
        state: ``unknown`` while the database is unavailable.
        revision: The revision found; None if there is none, or it is unknown.
        expected: The revision that this version of incidentkit needs.
    """

    state: State
    revision: str | None
    expected: str


@frozen
class FeedHealth:
    """Whether changes are delivered at once.

    Attributes:
        state: ``held_up`` while an open transaction holds the change feed up; ``unknown`` if the
            database does not tell.
        since: When this transaction began; None unless the feed is held up.
        pid: The process of PostgreSQL that runs it; None for a prepared transaction.
        prepared: The identifier of a prepared transaction; None for any other.
        waiting: Whether a change waits for it.
    """

    state: State
    since: datetime | None
    pid: int | None
    prepared: str | None
    waiting: bool


@frozen
class RequestLogHealth:
    """The state of the request log in the database.

    Attributes:
        state: ``off`` if requests are not recorded in the database.
        dropped: Records that this process has dropped since it started.
    """

    state: State
    dropped: int


@frozen
class LogHealth:
    """The state of the server's log.

    Attributes:
        state: ``unavailable`` while the log cannot be written; ``off`` if the server has no log of
            its own, as under other servers than ``incidentkit serve``.
        dropped: Records that this process could not write, since it started.
    """

    state: State
    dropped: int


@frozen
class Readiness:
    """Whether the service is ready, and the state of each part.

    Attributes:
        ready: Whether requests can be answered: false if the database is unavailable, its schema
            is out of date, or a required cache is unavailable.
        database: Whether the database answers.
        schema: Whether its schema is current.
        cache: Whether the cache answers.
        feed: Whether changes are delivered at once; it does not affect ``ready``.
        request_log: Whether requests are recorded in the database.
        log: Whether the server's log is written; it does not affect ``ready``.
    """

    ready: bool
    database: Health
    schema: SchemaHealth
    cache: Health
    feed: FeedHealth
    request_log: RequestLogHealth
    log: LogHealth


@frozen
class BareReadiness:
    """Whether the service is ready, for a caller without the scope ``read``.

    Attributes:
        ready: Whether requests can be answered.
    """

    ready: bool


async def readiness(
    client: IncidentClient,
    request_log: RequestLog | None,
    log: ServerLog | None = None,
    *,
    cache_required: bool,
) -> Readiness:
    """Ask the database and the cache, and return the state of each part.

    Args:
        client: The client with the database and the cache.
        request_log: The request log in the database; None: there is none.
        log: The server's log; None: there is none to look at.
        cache_required: Whether the service is not ready while the cache is unavailable.
    """
    database = State.OK
    schema = SchemaHealth(State.OK, SCHEMA_REVISION, SCHEMA_REVISION)
    feed = FeedHealth(State.UNKNOWN, None, None, None, waiting=False)
    try:
        async with asyncio.timeout(TIMEOUT):
            await client.check()
            # Without the privilege to see transactions, the service is still ready.
            with suppress(StoreError):
                feed = _feed(await client.feed_blocker())
    except SchemaOutOfDate as error:
        schema = SchemaHealth(State.OUT_OF_DATE, error.current, error.expected)
    except (StoreError, ClientClosed, TimeoutError):
        database = State.UNAVAILABLE
        schema = SchemaHealth(State.UNKNOWN, None, SCHEMA_REVISION)
    cache = _state(client.cache_available)
    return Readiness(
        ready=database is State.OK
        and schema.state is State.OK
        and not (cache_required and cache is State.UNAVAILABLE),
        database=Health(database),
        schema=schema,
        cache=Health(cache),
        feed=feed,
        request_log=RequestLogHealth(
            _state(None if request_log is None else not request_log.failing),
            0 if request_log is None else request_log.dropped,
        ),
        log=LogHealth(
            _state(None if log is None else not log.failing), 0 if log is None else log.dropped
        ),
    )


def _feed(blocker: FeedBlocker | None) -> FeedHealth:
    if blocker is None:
        return FeedHealth(State.OK, None, None, None, waiting=False)
    return FeedHealth(
        State.HELD_UP, blocker.since, blocker.pid, blocker.prepared, waiting=blocker.waiting
    )


def _state(available: bool | None) -> State:  # noqa: FBT001
    if available is None:
        return State.OFF
    return State.OK if available else State.UNAVAILABLE

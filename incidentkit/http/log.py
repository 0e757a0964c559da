"""A record of each request: in the log, and if so wished in the database as well."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from contextlib import suppress
from datetime import UTC, datetime
from functools import wraps
from http import HTTPMethod
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeAlias

from incidentkit.domain.errors import SchemaOutOfDate, StoreUnavailable
from incidentkit.http.problems import problem_response
from incidentkit.http.request_id import request_id
from incidentkit.store.request_log import RequestRecord

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request
    from starlette.responses import Response

    from incidentkit.store.ports import IncidentStore

    Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]

logger = logging.getLogger("incidentkit.http")

INTERVAL: Final = 1.0
"""Seconds that a record waits for others before they are written."""

BATCH: Final = 500
"""Records that are written at a time."""

CAPACITY: Final = 10_000
"""Records that may wait to be written."""

WRITE_TIMEOUT: Final = 30.0
"""Seconds that a write may take; the stores have shorter limits of their own."""

CLOSE_TIMEOUT: Final = 5.0
"""Seconds in which what still waits has to be written when the app shuts down."""


CANCEL_TIMEOUT: Final = 0.1
"""Seconds that a write which is given up may take to end."""

NO_ROUTE: Final = "(none)"
"""What a record has for the path's template if no route took the request."""

OTHER_METHOD: Final = "(other)"
"""What a record has for a method that HTTP does not know."""

_METHODS: Final = frozenset(HTTPMethod)


def log_route(route: str) -> Callable[[Endpoint], Endpoint]:
    """Decorate the endpoint of a route: one record for each request, whatever becomes of it.

    An error that the endpoint raises becomes a problem here, so that the record has the status of
    the answer. The record goes to the logger ``incidentkit.http`` at level INFO, with the
    attributes ``method``, ``route``, ``status``, ``duration_ms`` and ``request_id``, and to the
    app's :class:`RequestLog` if it has one.

    Args:
        route: The path's template.
    """

    def decorate(endpoint: Endpoint) -> Endpoint:
        @wraps(endpoint)
        async def logged(request: Request) -> Response:
            started = time.perf_counter()
            try:
                response = await endpoint(request)
            except Exception as error:  # noqa: BLE001
                response = problem_response(request, error)
            duration_ms = round((time.perf_counter() - started) * 1000, 3)
            _record(request, route, response.status_code, duration_ms)
            return response

        return logged

    return decorate


def _record(request: Request, route: str, status: int, duration_ms: float) -> None:
    scope = request.scope
    method = scope["method"] if scope["method"] in _METHODS else OTHER_METHOD
    id_ = request_id(scope)
    if logger.isEnabledFor(logging.INFO):
        # A host's log handler that fails must not take back an incident that is stored.
        with suppress(Exception):
            _log(method, route, status, duration_ms, id_)
    request_log: RequestLog | None = scope["app"].state.request_log
    if request_log is not None:
        request_log.add(RequestRecord(datetime.now(UTC), method, route, status, duration_ms, id_))


def _log(method: str, route: str, status: int, duration_ms: float, id_: str) -> None:
    # As logger.info() does, without its search for the line that calls it.
    record = logging.getLogRecordFactory()(
        logger.name,
        logging.INFO,
        __file__,
        0,
        "%s %s %d %.1f ms",
        (method, route, status, duration_ms),
        None,
        "log_route",
    )
    record.method, record.route, record.status = method, route, status
    record.duration_ms, record.request_id = duration_ms, id_
    logger.handle(record)


class RequestLog:
    """Records on their way to the database, which they reach in order, in batches, or not at all.

    A task that writes them starts with the first record and ends when none is left. While the
    database is away records wait, and once too many wait new ones are dropped. A batch whose
    write failed without a word is written again, so that a record may be stored twice.

    Args:
        store: Where records are written.
        capacity: Records that may wait.
        interval: Seconds that a record waits for others, and between two attempts.
        write_timeout: Seconds that a write may take.
        close_timeout: Seconds in which :meth:`close` has to be done.

    Attributes:
        dropped: Records that were not stored, since the start.
        failing: Whether the last attempt failed, or records were dropped since.
    """

    def __init__(
        self,
        store: IncidentStore,
        *,
        capacity: int = CAPACITY,
        interval: float = INTERVAL,
        write_timeout: float = WRITE_TIMEOUT,
        close_timeout: float = CLOSE_TIMEOUT,
    ) -> None:
        self._store = store
        self._capacity = capacity
        self._interval = interval
        self._write_timeout = write_timeout
        self._close_timeout = close_timeout
        self._waiting: deque[RequestRecord] = deque()
        self._task: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self.dropped = 0
        self.failing = False

    def add(self, record: RequestRecord) -> None:
        """Take a record, without waiting and without ever failing; needs a running event loop."""
        if len(self._waiting) >= self._capacity:
            self._drop(1, "too many records wait")
            return
        self._waiting.append(record)
        if self._task is None or self._task.done():
            self._closing = asyncio.Event()
            work = self._run(self._waiting, self._closing)
            self._task = asyncio.get_running_loop().create_task(work)

    async def close(self) -> None:
        """Write what waits, and drop what cannot be written now.

        A write that does not end when it is cancelled is left behind. A record that is added
        later starts the log anew.
        """
        self._closing.set()
        task, waiting = self._task, self._waiting
        try:
            if task is not None and not task.done():
                await asyncio.wait({task}, timeout=self._close_timeout)
                if not task.done():
                    task.cancel()
                    await asyncio.wait({task}, timeout=CANCEL_TIMEOUT)
        finally:
            # Nothing that is left behind may touch what is added later.
            self._task, self._waiting = None, deque()
            if waiting:
                self._drop(len(waiting), "the app shuts down")
                waiting.clear()
            if task is not None:
                task.cancel()

    async def _run(self, waiting: deque[RequestRecord], closing: asyncio.Event) -> None:
        while waiting:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._interval):
                    await closing.wait()
            while waiting and await self._write(waiting):
                pass
            if closing.is_set():
                return

    async def _write(self, waiting: deque[RequestRecord]) -> bool:
        """Write a batch, and tell whether to go on with the next one at once."""
        batch = list(islice(waiting, BATCH))
        try:
            async with asyncio.timeout(self._write_timeout):
                await self._store.log_requests(batch)
        except (StoreUnavailable, SchemaOutOfDate, TimeoutError) as error:
            self._complain(str(error) or "it did not answer in time")
            return False
        except Exception as error:  # noqa: BLE001
            # It would fail again, and hold up those behind it.
            dropped = _forget(waiting, len(batch))
            self._drop(dropped, f"records were refused: {type(error).__name__}")
            return True
        _forget(waiting, len(batch))
        if self.failing:
            self.failing = False
            logger.warning("The request log is written again, dropped so far: %d", self.dropped)
        return True

    def _drop(self, count: int, reason: str) -> None:
        self.dropped += count
        self._complain(reason)

    def _complain(self, reason: str) -> None:
        """Log once for each outage."""
        if not self.failing:
            self.failing = True
            logger.warning("The request log cannot be written (%s)", reason)


def _forget(waiting: deque[RequestRecord], count: int) -> int:
    """Remove so many records, unless closing the log has done so, and return their number."""
    count = min(count, len(waiting))
    for _ in range(count):
        waiting.popleft()
    return count

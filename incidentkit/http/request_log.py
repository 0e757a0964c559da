"""The request log in the database: writes records in batches, never in a request's way."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, Final, Protocol, runtime_checkable

from attrs import asdict
from sqlalchemy import Executable

from incidentkit.domain.errors import SchemaOutOfDate, StoreUnavailable
from incidentkit.store.request_log import INSERT_REQUEST, RequestRecord

logger = logging.getLogger("incidentkit.http")

INTERVAL: Final = 1.0
"""Seconds that a record waits for others before they are written together."""

BATCH: Final = 500
"""Maximum number of records in one write."""

CAPACITY: Final = 10_000
"""Maximum number of records waiting to be written."""

WRITE_TIMEOUT: Final = 30.0
"""Maximum seconds for a write; the stores have shorter limits of their own."""

CLOSE_TIMEOUT: Final = 5.0
"""Maximum seconds to write the waiting records when the app shuts down."""

CANCEL_TIMEOUT: Final = 0.1
"""Seconds that a cancelled write has to end before it is left behind."""


@runtime_checkable
class Appender(Protocol):
    """A store that can append rows to a table."""

    async def append(self, statement: Executable, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows with one statement, in one transaction."""
        ...


class RequestLog:
    """Writes records to the database in order and in batches, or drops them.

    The task that writes starts with the first record and ends when none is left. Records wait while
    the database is unavailable; once too many wait, new ones are dropped. A batch whose write was
    interrupted is written again, so a record may be stored twice.

    Args:
        store: Appends the records.
        capacity: Maximum number of waiting records.
        interval: Seconds that a record waits for others, and between two attempts.
        write_timeout: Maximum seconds for a write.
        close_timeout: Maximum seconds for :meth:`close`.

    Attributes:
        dropped: Records that were not stored, since the start.
        failing: Whether the last attempt failed, or records were dropped since.
    """

    def __init__(
        self,
        store: Appender,
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
        """Take a record; never wait and never fail. Needs a running event loop."""
        if len(self._waiting) >= self._capacity:
            self._drop(1, "too many records are waiting")
            return
        self._waiting.append(record)
        if self._task is None or self._task.done():
            self._closing = asyncio.Event()
            work = self._run(self._waiting, self._closing)
            self._task = asyncio.get_running_loop().create_task(work)

    async def close(self) -> None:
        """Write the waiting records, and drop those that cannot be written now.

        A write that does not end when it is cancelled is left behind. Records can be added again
        afterwards.
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
            # A write that is left behind must not touch records that are added later.
            self._task, self._waiting = None, deque()
            if waiting:
                self._drop(len(waiting), "the app is shutting down")
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
        """Write a batch, and return whether to write the next one right away."""
        batch = list(islice(waiting, BATCH))
        try:
            async with asyncio.timeout(self._write_timeout):
                await self._store.append(INSERT_REQUEST, [asdict(record) for record in batch])
        except (StoreUnavailable, SchemaOutOfDate, TimeoutError) as error:
            self._complain(str(error) or "the database did not answer in time")
            return False
        except Exception as error:  # noqa: BLE001
            # Written again, the batch would fail again, and hold up the records behind it.
            dropped = _forget(waiting, len(batch))
            self._drop(dropped, f"records were refused: {type(error).__name__}")
            return True
        _forget(waiting, len(batch))
        if self.failing:
            self.failing = False
            logger.warning(
                "The request log is being written again; records dropped so far: %d", self.dropped
            )
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
    """Remove that many records, or as many as closing the log has left, and return how many."""
    count = min(count, len(waiting))
    for _ in range(count):
        waiting.popleft()
    return count

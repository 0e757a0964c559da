"""Work that is carried through, whatever becomes of who asked for it."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine

_T = TypeVar("_T")

logger = logging.getLogger("incidentkit")


async def carry(running: set[asyncio.Task[Any]], work: Coroutine[Any, Any, _T]) -> _T:
    """Run the work in one piece that no cancellation parts.

    Args:
        running: Where the task is to be found while it runs.
        work: What is to be done.
    """
    task = asyncio.ensure_future(work)
    running.add(task)
    task.add_done_callback(running.discard)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_log_failure)
        raise


def _log_failure(write: asyncio.Task[Any]) -> None:
    """Tell of a write that failed when its caller was no longer there."""
    error = None if write.cancelled() else write.exception()
    if error is not None:
        logger.warning("A write whose caller was cancelled failed: %s", error)

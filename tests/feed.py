"""Following the feed for as long as a test needs."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from incidentkit import IncidentClient, IncidentEvent


async def take(
    incidents: IncidentClient, count: int, after: str | None = None
) -> list[IncidentEvent]:
    """Return the first so many changes of a feed, waiting for them as a follower does.

    Another transaction on the same PostgreSQL server may hold them up.
    """
    taken: list[IncidentEvent] = []
    changes: Any = incidents.changes(after)
    async with asyncio.timeout(60), aclosing(changes):
        async for change in changes:
            taken.append(change)
            if len(taken) == count:
                break
    return taken

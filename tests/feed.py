"""Reading the change feed in tests."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from incidentkit import IncidentClient, IncidentEvent


async def take(
    incidents: IncidentClient, count: int, after: str | None = None
) -> list[IncidentEvent]:
    """Follow the feed until it has delivered `count` changes, and return them.

    Transactions of other tests on the PostgreSQL server may delay them.
    """
    taken: list[IncidentEvent] = []
    changes: Any = incidents.changes(after)
    async with asyncio.timeout(60), aclosing(changes):
        async for change in changes:
            taken.append(change)
            if len(taken) == count:
                break
    return taken

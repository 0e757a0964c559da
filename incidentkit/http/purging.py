"""Purge old incidents over HTTP, in requests of limited duration."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Final

from attrs import field, frozen

from incidentkit.client import IncidentClient
from incidentkit.domain import rules
from incidentkit.domain.rules import collect, raise_faults

MAX_SECONDS: Final = 20.0
"""Seconds after which a request begins no further batch: a proxy may give up after a minute."""


@frozen(field_transformer=collect, kw_only=True)
class PurgeQuery:
    """What to purge.

    Args:
        ended_before: Aware; incidents that ended before this time.
        dry_run: Whether they are only counted.

    Raises:
        InvalidIncident: With every faulty argument.
    """

    ended_before: datetime = field(converter=rules.time_bound)
    dry_run: bool = field(default=False, converter=rules.flag)

    def __attrs_post_init__(self) -> None:
        raise_faults(self)


@frozen
class Purge:
    """The result of one purge request.

    Attributes:
        purged: Number of removed incidents.
        left: Number of incidents that are still to be removed.
    """

    purged: int
    left: int


async def purge_for(
    client: IncidentClient, ended_before: datetime, seconds: float = MAX_SECONDS
) -> Purge:
    """Purge as :meth:`~incidentkit.IncidentClient.purge` does, for a limited time."""
    ends_at = time.monotonic() + seconds
    left = 0

    def progress(purged: int, total: int) -> bool:
        nonlocal left
        left = total - purged
        return time.monotonic() < ends_at

    purged = await client.purge(ended_before, progress=progress)
    return Purge(purged, left)

"""Stop the clock of a private database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

from incidentkit.client import IncidentClient
from incidentkit.domain import rules
from incidentkit.domain.values import EARLIEST_TIME, LATEST_TIME
from incidentkit.sync.client import SyncIncidentClient
from incidentkit.testing.clients import asynchronous
from incidentkit.testing.database import PrivateStore


class FrozenClock:
    """The clock of a private database in a :func:`frozen_clock` block.

    Attributes:
        now: The current time of the database, in UTC.
    """

    def __init__(self, now: datetime) -> None:
        self.now = now

    def move_to(self, time: datetime | str) -> None:
        """Set the clock.

        Args:
            time: As for :func:`frozen_clock`.

        Raises:
            InvalidIncident: As for :func:`frozen_clock`.
        """
        self.now = _settable(time)

    def tick(self, time: timedelta = timedelta(seconds=1)) -> None:
        """Advance the clock; the database counts whole seconds.

        Raises:
            InvalidIncident: If the clock cannot be set to the later time.
        """
        now = self.now + time
        _settable(now)
        self.now = now


@contextmanager
def frozen_clock(
    client: IncidentClient | SyncIncidentClient, time: datetime | str
) -> Iterator[FrozenClock]:
    """Stop the clock of a client's private database while the block runs.

    The database then uses the frozen time for ``created_at``, ``last_seen_at``, ``ended_at``, the
    times in the history, and the age of idempotency keys. The clocks of Python and of other
    databases keep running.

    .. code-block:: python

        with frozen_clock(incidents, "2026-01-01T00:00:00Z") as clock:
            incident = incidents.create("Disk is full", source="monitoring")
            clock.tick(timedelta(hours=2))
            incidents.update_status(incident.incident_id, "completed")

    Args:
        client: A client from a fixture or a function of the kit, or one in a :func:`recording`
            block.
        time: The time to start at: an aware time, or text such as ``2026-01-01T00:00:00Z``.

    Yields:
        The clock, with methods to move it.

    Raises:
        TypeError: If the client is on another database, whose clock cannot be stopped.
        InvalidIncident: If it is not an aware time after 0001-01-02 and before 9999-12-31.
    """
    store = asynchronous(client).store
    if not isinstance(store, PrivateStore):
        raise TypeError(
            "Only the clock of the test kit's own database can be stopped: use the kit's fixtures, "
            "or put this client on such a database with incidentkit.testing.recording()"
        )
    clock = FrozenClock(_settable(time))
    with store.database.frozen(lambda: clock.now):
        yield clock


def _settable(time: datetime | str) -> datetime:
    if isinstance(time, str):
        time = rules.check("time", rules.time_text, time)
    return rules.check("time", _findable, time)


def _findable(value: datetime) -> datetime:
    """Return an aware time at which a search finds the incidents; others become its bounds."""
    time = rules.time_bound(value)
    if not EARLIEST_TIME < time < LATEST_TIME:
        raise ValueError("must be after 0001-01-02 and before 9999-12-31")
    return time

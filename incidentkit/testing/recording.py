"""Make an existing client record in a private database for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from incidentkit.client import IncidentClient
from incidentkit.sync.client import SyncIncidentClient
from incidentkit.testing.clients import (
    anywhere,
    asynchronous,
    parts_on,
    private_incidents,
    swap,
)
from incidentkit.testing.database import PrivateDatabase


@contextmanager
def recording(client: IncidentClient | SyncIncidentClient) -> Iterator[SyncIncidentClient]:
    """Make a client use a private database in memory while the block runs.

    Its own database and its Redis are not used meanwhile. The client need not be open, and its
    calls work whether or not the application opens or closes it in the block. Afterwards it is as
    it was before.

    A joined connection has no effect in the block: recorded incidents stay in the private database,
    even if the application rolls its transaction back.

    .. code-block:: python

        def test_late_orders():
            with recording(shop.incidents) as recorded:
                shop.check_orders()
                assert_incident_opened(recorded, message="Order 17 is late")

    Args:
        client: The client, such as a global one in a module of the application.

    Yields:
        A synchronous client on the same database, for a test that runs no event loop itself.

    Raises:
        TypeError: If it is something else, such as the verbs in a joined transaction.
    """
    with (
        PrivateDatabase() as database,
        private_incidents(database) as recorded,
        _working_on(database, client),
    ):
        yield recorded


@contextmanager
def _working_on(
    database: PrivateDatabase, client: IncidentClient | SyncIncidentClient
) -> Iterator[None]:
    behind = asynchronous(client)
    synchronous = client if isinstance(client, SyncIncidentClient) else None
    was_open = synchronous is not None and synchronous.connected
    present = swap(behind, parts_on(database, behind.observer))
    try:
        if synchronous is not None:
            # The check opens the private session on the event loop of the client.
            anywhere(synchronous.check if was_open else synchronous.connect)
        yield
    finally:
        if synchronous is not None and not was_open:
            anywhere(synchronous.close)
        swap(behind, present)
        if synchronous is not None and was_open and not synchronous.connected:
            anywhere(synchronous.connect)

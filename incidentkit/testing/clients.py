"""Open clients on a private database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Final

from incidentkit.affinity import Affinity, running_loop
from incidentkit.client import IncidentClient, Parts
from incidentkit.incidents import Incidents
from incidentkit.observing import Observer
from incidentkit.session import Session
from incidentkit.sync.client import SyncIncidentClient
from incidentkit.sync.immediate import run_immediately
from incidentkit.sync.incidents import SyncIncidents
from incidentkit.testing.database import PrivateDatabase, PrivateStore

_NO_CLIENT: Final = "This takes an IncidentClient or a SyncIncidentClient, not "


class PrivateSession(Session):
    """A session that opens itself at the first call, and again after its event loop has ended.

    Args:
        store: Its coroutines never suspend.
        observer: Observes delivered changes; None: nothing is observed.
    """

    def __init__(self, store: PrivateStore, observer: Observer | None) -> None:
        super().__init__(store, None, cache_required=False, max_staleness=0.0, observer=observer)

    def _check(self) -> Affinity:
        if not self.connected:
            run_immediately(self.open())
        return super()._check()


def swap(client: IncidentClient, parts: Parts) -> Parts:
    """Make a client use other parts from now on, and return its current ones."""
    return client._swap(parts)  # noqa: SLF001


def asynchronous(client: IncidentClient | SyncIncidentClient) -> IncidentClient:
    """Return the asynchronous client: this one, or the one behind a synchronous client.

    Raises:
        TypeError: If it is something else.
    """
    if isinstance(client, IncidentClient):
        return client
    if isinstance(client, SyncIncidentClient):
        return client._incidents  # noqa: SLF001
    raise TypeError(_NO_CLIENT + type(client).__name__)


def check_verbs(incidents: object) -> None:
    """Raise unless it is a client, or the verbs in a joined transaction.

    Raises:
        TypeError: If it is something else, such as the extension that holds a client.
    """
    if not isinstance(incidents, Incidents | SyncIncidents):
        raise TypeError(_NO_CLIENT + type(incidents).__name__)


def parts_on(database: PrivateDatabase, observer: Observer | None) -> Parts:
    """Return parts on a private database."""
    store = PrivateStore(database)
    session = PrivateSession(store, observer)
    return Parts(store, None, session, session)


def async_client(database: PrivateDatabase) -> IncidentClient:
    """Return a client, which opens itself, on a private database."""
    client = IncidentClient(PrivateStore(database))
    swap(client, parts_on(database, None))
    return client


def anywhere(function: Callable[[], object]) -> None:
    """Call a function of a synchronous client, in another thread if this one runs an event loop."""
    if running_loop() is None:
        function()
        return
    with ThreadPoolExecutor(1) as threads:
        threads.submit(function).result()


@contextmanager
def private_incidents(database: PrivateDatabase | None = None) -> Iterator[SyncIncidentClient]:
    """Open a synchronous client on a private database in memory.

    .. code-block:: python

        class OrdersTest(unittest.TestCase):
            def setUp(self):
                self.incidents = self.enterContext(private_incidents())

    Args:
        database: The database, to share it with other clients; None: a new one.
    """
    with ExitStack() as closing:
        client = SyncIncidentClient(
            async_client(database or closing.enter_context(PrivateDatabase()))
        )
        anywhere(client.connect)
        closing.callback(anywhere, client.close)
        yield client


@contextmanager
def private_async_incidents(database: PrivateDatabase | None = None) -> Iterator[IncidentClient]:
    """Yield an asynchronous client on a private database in memory.

    It opens itself at the first call, on the running event loop. You may enter it with
    ``async with``, but need not.

    Args:
        database: The database, to share it with other clients; None: a new one.
    """
    with ExitStack() as closing:
        yield async_client(database or closing.enter_context(PrivateDatabase()))

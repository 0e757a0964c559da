"""The synchronous client, for programs without an event loop."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from datetime import datetime
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias, TypeVar

import incidentkit.sync as lazily
from incidentkit.client import IncidentClient
from incidentkit.domain.queries import ChangesQuery, ListQuery
from incidentkit.domain.values import CHANGES_LIMIT, ChangePage, FeedBlocker, IncidentEvent
from incidentkit.store.database import DEFAULT_DATABASE_URL
from incidentkit.sync.incidents import SyncIncidents
from incidentkit.sync.joined import SyncJoinedIncidents
from incidentkit.sync.lifetime import Lifetime
from incidentkit.sync.tokens import SyncAccessTokens

if TYPE_CHECKING:
    import os
    import sqlite3

    import psycopg
    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.utils.connection import ConnectionProxy
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session, scoped_session

    from incidentkit.domain.transitions import Graph
    from incidentkit.observing import Observer
    from incidentkit.remote.options import RemoteOptions
    from incidentkit.settings import Settings
    from incidentkit.store.options import StoreOptions
    from incidentkit.store.ports import IncidentStore

    Joinable: TypeAlias = (
        Connection
        | Session
        | scoped_session[Any]
        | psycopg.Connection[Any]
        | sqlite3.Connection
        | BaseDatabaseWrapper
        | ConnectionProxy[Any]
    )

_T = TypeVar("_T")


class SyncIncidentClient(SyncIncidents):
    """Records and follows incidents without an event loop, from any thread.

    Open it with ``with``. It has the verbs of :class:`~incidentkit.IncidentClient`, with the same
    arguments, results and errors. Its connections live on an event loop in a background thread,
    where calls from all threads share statements, caches and connections.

    Args:
        client: The asynchronous client to run; it must not be open.

    A write runs to completion even if an interrupt, such as Ctrl-C, ends the call. In a process
    that was forked while the client was open, the first call opens new connections. A client that
    is still open at the end of the program is closed. In a thread with a running event loop, and in
    a process where gevent or eventlet has replaced the threads, every method raises
    :class:`~incidentkit.WrongEventLoop` and does nothing.
    """

    def __init__(self, client: IncidentClient) -> None:
        self._client = client
        self._lifetime = Lifetime(client)

    @classmethod
    def open(  # noqa: PLR0913
        cls,
        database: str = DEFAULT_DATABASE_URL,
        redis_url: str | None = None,
        *,
        redis_required: bool = False,
        max_staleness: float = 0.0,
        transitions: Graph | None = None,
        options: StoreOptions | None = None,
        schema: str | None = None,
        observer: Observer | None = None,
        token: str | None = None,
        remote: RemoteOptions | None = None,
    ) -> Self:
        """Return a client for these servers, as :meth:`IncidentClient.open` does."""
        return cls(
            IncidentClient.open(
                database,
                redis_url,
                redis_required=redis_required,
                max_staleness=max_staleness,
                transitions=transitions,
                options=options,
                schema=schema,
                observer=observer,
                token=token,
                remote=remote,
            )
        )

    @classmethod
    def from_env(
        cls,
        env_file: str | os.PathLike[str] | None = ".env",
        *,
        observer: Observer | None = None,
    ) -> Self:
        """Return a client for the servers that the environment names."""
        return cls(IncidentClient.from_env(env_file, observer=observer))

    @classmethod
    def from_settings(cls, settings: Settings, *, observer: Observer | None = None) -> Self:
        """Return a client for the servers that the settings name."""
        return cls(IncidentClient.from_settings(settings, observer=observer))

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def store(self) -> IncidentStore:
        """The store of the asynchronous client; its coroutines run only on its event loop."""
        return self._client.store

    @property
    def observer(self) -> Observer | None:
        """The observer; its methods run in the thread of the event loop."""
        return self._client.observer

    @property
    def connected(self) -> bool:
        """Whether the client is open, in this process."""
        return self._lifetime.is_open()

    @property
    def cache_available(self) -> bool | None:
        """Whether the shared cache is in use; None without one, or if the client is not open."""
        return self._client.cache_available

    @property
    def tokens(self) -> SyncAccessTokens:
        """The access tokens of the REST service; its methods need an open client."""
        return SyncAccessTokens(self._client, self._lifetime)

    def connect(self) -> None:
        """Open the store and ping the cache; if the client is already open, do nothing.

        Raises:
            SchemaOutOfDate: With the command to run. An outdated SQLite file is upgraded instead.
            CacheUnavailable: If the cache does not answer, and is required.
            WrongEventLoop: If an event loop is running in this thread, or gevent or eventlet has
                replaced the threads of this process.
            StoreError: If the client's database is in the memory of the parent process.
        """
        self._lifetime.connect()

    def close(self) -> None:
        """Wait for running writes, then release every connection; once closed, do nothing.

        A running read finishes or raises :class:`~incidentkit.ClientClosed`. In a forked process,
        only the connections of that process are released.
        """
        self._lifetime.close()

    def list_json(self, query: ListQuery) -> bytes:
        """Return one page as a JSON array, as :meth:`IncidentClient.list_json` does."""
        return self._run(self._client.list_json(query))

    def join(self, connection: Joinable) -> SyncJoinedIncidents:
        """Return the verbs in the transaction of the application's own connection.

        Their writes are committed or rolled back with the rest of that transaction, and invisible
        to others until then. Their reads see that transaction, and never use a cache. All of them
        run on that connection, in the thread that calls them. The client need not be open:

        .. code-block:: python

            with engine.begin() as connection:
                connection.execute(insert(orders).values(order_id=17))
                incidents.join(connection).create("Order 17 is late", source="partner")

        Args:
            connection: A connection to the client's database: SQLAlchemy's ``Connection`` or
                ``Session``, the ``Connection`` of psycopg, ``sqlite3.Connection``, or
                ``django.db.connection`` inside ``transaction.atomic()``.

        Raises:
            NotInTransaction: If the connection commits each statement by itself, or is closed.
            TypeError: If the connection is of another kind, or to another kind of database.
        """
        transaction = lazily.HostTransaction(self._client.store.join_sync(connection))
        return SyncJoinedIncidents(self._client._joined_to(transaction))  # noqa: SLF001

    def changes(self, after: str | None = None) -> Iterator[IncidentEvent]:
        """Follow every change of every incident, as :meth:`IncidentClient.changes` does.

        The generator waits for the next change, also while the database cannot be reached. An
        interrupt ends the wait at once. So does :meth:`close` in another thread: the generator then
        raises :class:`~incidentkit.ClientClosed`.
        """
        ChangesQuery(after)
        while True:
            page = self._run(self._client._next_changes(after))  # noqa: SLF001
            yield from page.changes
            after = page.next

    def read_changes(
        self, after: str | None = None, *, limit: int = CHANGES_LIMIT, wait: float = 0.0
    ) -> ChangePage:
        """Return some changes, as :meth:`IncidentClient.read_changes` does."""
        return self._run(self._client.read_changes(after, limit=limit, wait=wait))

    def purgeable(self, ended_before: datetime) -> int:
        """Return the number of incidents that :meth:`purge` would remove now."""
        return self._run(self._client.purgeable(ended_before))

    def purge(
        self, ended_before: datetime, *, progress: Callable[[int, int], object] | None = None
    ) -> int:
        """Remove incidents that have ended, as :meth:`IncidentClient.purge` does.

        ``progress`` is called in this thread, and may call the client.
        """
        hop = None if progress is None else partial(lazily.in_caller, progress)
        return self._run(self._client.purge(ended_before, progress=hop))

    def check(self) -> None:
        """Raise unless the database answers and has the schema that this version works on."""
        self._run(self._client.check())

    def feed_blocker(self) -> FeedBlocker | None:
        """Return the transaction that holds up :meth:`changes`, or None if there is none."""
        return self._run(self._client.feed_blocker())

    @property
    def _incidents(self) -> IncidentClient:
        return self._client

    def _run(self, call: Coroutine[Any, Any, _T]) -> _T:
        return self._lifetime.run(call)

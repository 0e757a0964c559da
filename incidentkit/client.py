"""The facade: everything that an application does with incidents."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self, TypeVar

import incidentkit.store as storage
from incidentkit.cache.opening import cache_from_url
from incidentkit.domain import rules
from incidentkit.domain.actor import ACTOR
from incidentkit.domain.errors import ClientClosed, InvalidSettings, StoreUnavailable
from incidentkit.domain.queries import ChangesQuery, ListQuery
from incidentkit.domain.transitions import Graph, Transitions
from incidentkit.domain.values import (
    CHANGES_LIMIT,
    DEFAULT_LIMIT,
    LATEST,
    MAX_STALENESS,
    MAX_WAIT,
    ChangePage,
    FeedBlocker,
    IncidentEvent,
    IncidentSource,
    IncidentStatus,
    SourceName,
    StatusName,
)
from incidentkit.incidents import IncidentList, Incidents, Transactions
from incidentkit.joined import JoinedIncidents
from incidentkit.observing import Observable, Observer, observe_verbs
from incidentkit.opening import (
    new_session,
    settings_from_env,
    store_of_service,
    store_on,
)
from incidentkit.store.database import DEFAULT_DATABASE_URL, names_service

if TYPE_CHECKING:
    import os

    # Drivers, and modules that load asyncio: many programs never need them.
    from asyncpg import Connection, Pool, Record
    from asyncpg.pool import PoolConnectionProxy
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

    from incidentkit.cache.base import IncidentCache
    from incidentkit.remote.options import RemoteOptions
    from incidentkit.session import Session
    from incidentkit.settings import Settings
    from incidentkit.store.access_tokens import AccessTokens
    from incidentkit.store.idempotency import Idempotency, Parameters
    from incidentkit.store.options import StoreOptions
    from incidentkit.store.ports import IncidentStore, StoreOperations

CHANGES_BATCH: Final = 500
"""Number of changes that a feed reads at a time."""

MIN_PAUSE: Final = 0.25
MAX_PAUSE: Final = 5.0
"""Backoff of a feed while the database is unreachable, in seconds: the first and the longest."""

PURGE_BATCH: Final = 500
"""Maximum number of incidents that are purged in one transaction."""

_T = TypeVar("_T")


class _NotConnected:
    """Stands for the session of a client that was never connected."""

    commits = True

    @property
    def store(self) -> StoreOperations:
        raise ClientClosed

    async def write(self, write: Coroutine[Any, Any, _T]) -> _T:
        write.close()
        raise ClientClosed

    def once(self, _: str, __: str, ___: Parameters) -> Idempotency:
        raise ClientClosed


class Parts(NamedTuple):
    """The parts of a client: its store, its shared cache, and its session."""

    store: IncidentStore
    cache: IncidentCache | None
    session: Session | None
    transactions: Transactions


def check_max_staleness(max_staleness: object) -> float:
    """Return the seconds by which a list may be behind.

    Raises:
        InvalidSettings: If it is not a number from 0 to 3600, the time that a page is kept.
    """
    number = max_staleness if isinstance(max_staleness, (int, float)) else -1
    if isinstance(max_staleness, bool) or not 0 <= number <= MAX_STALENESS:
        raise InvalidSettings(
            "max_staleness", f"must be a number of seconds from 0 to {MAX_STALENESS}"
        )
    return number


def _refuse(reason: str, **given: bool) -> None:
    """Raise InvalidSettings for the first argument that is given."""
    for name, is_given in given.items():
        if is_given:
            raise InvalidSettings(name, reason)


class IncidentClient(Incidents):
    """Records and follows incidents. Open it with ``async with``; use it from one event loop.

    Args:
        store: Where incidents are kept.
        cache: Where pages of the list are kept for all processes; None: each process keeps only
            its own.
        cache_required: Whether :meth:`connect` fails if the cache does not answer.
        max_staleness: Seconds by which a list may be behind a change that another client has
            committed. With 0, the default, a list is never behind; the price is one small read of
            the database for each list, which concurrent lists share.
        transitions: For each status the statuses that may follow it; a status that is not listed
            is final. None: every change is allowed.
        observer: Counts and times calls, statements and reads of the cache; None: nothing is
            observed.

    Attributes:
        observer: The observer; None: nothing is observed.

    Raises:
        InvalidSettings: If ``max_staleness`` is not a number from 0 to 3600, or ``transitions``
            names an unknown status.

    Every method raises :class:`~incidentkit.StoreUnavailable` if the database cannot be reached
    or does not answer in time; a failing cache is never an error. On another event loop, in another
    thread or after a fork, every method raises :class:`~incidentkit.WrongEventLoop` and does
    nothing. A write runs to completion even if its caller is cancelled.
    """

    def __init__(  # noqa: PLR0913
        self,
        store: IncidentStore,
        *,
        cache: IncidentCache | None = None,
        cache_required: bool = False,
        max_staleness: float = 0.0,
        transitions: Graph | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._max_staleness = check_max_staleness(max_staleness)
        self._transitions = Transitions(transitions)
        self.store = store
        self._cache = cache
        self._cache_required = cache_required
        self._session: Session | None = None
        self._transactions: Transactions = _NotConnected()
        self.observer = observer
        if observer is not None:
            observe_verbs(self, observer)
            if isinstance(store, Observable):
                store.observe(observer)

    @classmethod
    def open(  # noqa: PLR0913
        cls,
        database: str | AsyncEngine | Pool[Record] = DEFAULT_DATABASE_URL,
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
        """Return a client for these servers; it connects when it is entered.

        For the URL of a service, only ``observer``, ``token`` and ``remote`` may be given: the
        service has its own database, cache and transitions.

        Args:
            database: ``postgresql://user:password@host:port/database``,
                ``sqlite+aiosqlite:///file``, or ``sqlite+aiosqlite:///:memory:``; or an engine
                (SQLAlchemy's ``AsyncEngine``) or a pool (asyncpg) that the application has opened,
                which the client uses and never closes; or ``https://host/prefix``, a service.
            redis_url: ``redis://host:port/db``, ``redis+cluster://host:port,host:port`` or
                ``redis+sentinel://host:port,host:port/service``, where pages of the list are cached
                for all processes. None: each process caches its own.
            redis_required: Whether connecting fails if Redis does not answer.
            max_staleness: Seconds, 0 to 3600, by which a list may be behind a change that another
                client has committed; 0 means never.
            transitions: For each status the statuses that may follow it; a status that is not
                listed is final. None: every change is allowed.
            options: Sizes and time limits for a database that is given as a URL; None: the
                defaults.
            schema: The PostgreSQL schema that has the tables; the search path of a connection has
                no effect then. Keys in Redis begin with it. None: the first schema in the search
                path that has the tables.
            observer: As for :class:`IncidentClient`.
            token: The access token for a service; None: none is sent.
            remote: Time limits and connections for a service; None: the defaults.

        Raises:
            InvalidSettings: If a URL, ``max_staleness``, ``transitions`` or ``schema`` is invalid,
                or an argument does not fit the kind of URL.
            MissingDependency: If a Redis or a service is given and its package is not installed.
        """
        if isinstance(database, str) and names_service(database):
            _refuse(
                "belongs to the service, not to its client",
                redis_url=redis_url is not None,
                redis_required=redis_required,
                max_staleness=max_staleness != 0,
                transitions=transitions is not None,
                options=options is not None,
                schema=schema is not None,
            )
            return cls(store_of_service(database, token, remote), observer=observer)
        reason = "is for the URL of a service, such as https://incidents.example.com"
        _refuse(reason, token=token is not None, remote=remote is not None)
        prefix = "" if schema is None else f"{schema}:"
        return cls(
            store_on(database, options, schema=schema),
            cache=None if redis_url is None else cache_from_url(redis_url, prefix=prefix),
            cache_required=redis_required,
            max_staleness=max_staleness,
            transitions=transitions,
            observer=observer,
        )

    @classmethod
    def from_env(
        cls,
        env_file: str | os.PathLike[str] | None = ".env",
        *,
        observer: Observer | None = None,
    ) -> Self:
        """Return a client for the servers that the environment names.

        Args:
            env_file: A file of variables; those of the process take precedence. None: no file.
            observer: As for :class:`IncidentClient`.

        Raises:
            InvalidSettings: With the variable and the rule that it breaks.
            MissingDependency: If a Redis is named and its package is not installed.
        """
        return cls.from_settings(settings_from_env(env_file), observer=observer)

    @classmethod
    def from_settings(cls, settings: Settings, *, observer: Observer | None = None) -> Self:
        """Return a client for the servers that the settings name.

        Args:
            settings: The servers, and how they are used.
            observer: As for :class:`IncidentClient`.

        Raises:
            InvalidSettings: If a URL is invalid.
            MissingDependency: If a Redis is named and its package is not installed.
        """
        return cls.open(
            settings.database_url,
            settings.redis_url,
            redis_required=settings.redis_required,
            max_staleness=settings.max_staleness,
            transitions=settings.transitions,
            options=settings.store,
            schema=settings.schema,
            observer=observer,
        )

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def connected(self) -> bool:
        """Whether the client is open, on an event loop of this process that has not ended."""
        return self._session is not None and self._session.connected

    @property
    def cache_available(self) -> bool | None:
        """Whether the shared cache is in use; None without one, or if the client is not open."""
        return None if self._session is None else self._session.cache_available

    @property
    def tokens(self) -> AccessTokens:
        """The access tokens of the REST service; its methods need an open client."""
        return storage.AccessTokens(self._transactions)

    async def connect(self) -> None:
        """Open the store and ping the cache; if the client is already open, do nothing.

        Raises:
            SchemaOutOfDate: With the command to run. An outdated SQLite file is upgraded instead.
            CacheUnavailable: If the cache does not answer, and is required.
            WrongEventLoop: If the client is open on another event loop that has not ended, or no
                event loop of asyncio is running.
        """
        if self._session is None:
            session = new_session(
                self.store,
                self._cache,
                cache_required=self._cache_required,
                max_staleness=self._max_staleness,
                observer=self.observer,
            )
            # Another thread may have been faster while modules were loaded.
            if self._session is None:
                self._session = self._transactions = session
        await self._session.open()

    async def close(self) -> None:
        """Wait for running writes, then release every connection; once closed, do nothing.

        A running read finishes or raises :class:`~incidentkit.ClientClosed`. If the event loop that
        opened the client has ended, or in a forked process, only release the connections.

        Raises:
            WrongEventLoop: If the client is open on another event loop that has not ended.
        """
        if self._session is None:
            await self.store.close()
        else:
            await self._session.close()

    async def list(
        self,
        page: int = 1,
        limit: int = DEFAULT_LIMIT,
        status: IncidentStatus | StatusName | None = None,
        source: IncidentSource | SourceName | None = None,
    ) -> IncidentList:
        """Return one page of incidents: newest first, those of one second by id, newest first.

        The page shows every change that was committed before the call, by any process, even
        if the cache fails; with ``max_staleness``, every change committed that many seconds before.

        Args:
            page: 1 is the newest page.
            limit: Incidents per page, 1 to 1000.
            status: Only incidents with this status; None: any status.
            source: Only incidents from this source; None: any source.

        Returns:
            At most ``limit`` incidents; an empty list past the last page.

        Raises:
            InvalidIncident: With every faulty argument.
        """
        query = ListQuery(page, limit, status, source)
        return await self._opened().pages.list(query)

    async def list_json(self, query: ListQuery) -> bytes:
        """Return one page as a JSON array, exactly as ``GET /incident/get`` answers it.

        A cached page is returned without being decoded.
        """
        return (await self._opened().pages.page(query)).json

    def join(
        self,
        connection: AsyncConnection | AsyncSession | Connection[Any] | PoolConnectionProxy[Any],
    ) -> JoinedIncidents:
        """Return the verbs in the transaction of the application's own connection.

        Their writes are committed or rolled back with the rest of that transaction, and invisible
        to others until then. Their reads see that transaction, and never use a cache.

        Args:
            connection: SQLAlchemy's ``AsyncConnection`` or ``AsyncSession``, or a connection of
                asyncpg that is in a transaction; to the client's database.

        Raises:
            ClientClosed: If the client is not open.
            NotInTransaction: If the connection commits each statement by itself, or is closed.
            TypeError: If the connection is of another kind, or to another kind of database.
        """
        return self._joined_to(self._opened().join(connection))

    def _joined_to(self, transaction: Transactions) -> JoinedIncidents:
        """Return the verbs in a transaction of the application, observed like the client's own."""
        joined = JoinedIncidents(transaction, self._transitions)
        if self.observer is not None:
            observe_verbs(joined, self.observer)
        return joined

    async def changes(self, after: str | None = None) -> AsyncIterator[IncidentEvent]:
        """Follow every change of every incident, each exactly once, without end.

        Changes come in the order in which their transactions began to write: the order of their
        commits, unless transactions overlap. Changes of one incident always come in their own
        order. The order is final: no change is ever added before one that was yielded. While the
        database cannot be reached, the feed waits for it.

        Args:
            after: The cursor of a change, from any process and time, to continue after it. None:
                from the first change; ``latest``: only changes from now on.

        Raises:
            InvalidIncident: If it is not a cursor.
            UnknownCursor: If it is a cursor of another database.
            ClientClosed: If the client is closed meanwhile.
        """
        ChangesQuery(after)
        while True:
            page = await self._next_changes(after)
            for event in page.changes:
                yield event
            after = page.next

    async def _next_changes(self, after: str | None) -> ChangePage:
        """Return the next changes; wait for one, and while the database is unavailable.

        The page may be empty, with a cursor to continue from.
        """
        # The latest change must be known before an outage, which may hide changes.
        wait = 0 if after == LATEST else MAX_WAIT
        pause = 0.0
        while True:
            feed = self._opened().feed
            try:
                return await feed.read(after, CHANGES_BATCH, wait)
            except StoreUnavailable:
                pause = min(2 * pause + MIN_PAUSE, MAX_PAUSE)
                await feed.pause(pause)

    async def read_changes(
        self, after: str | None = None, *, limit: int = CHANGES_LIMIT, wait: float = 0.0
    ) -> ChangePage:
        """Return some changes, and the cursor to continue from.

        Args:
            after: As for :meth:`changes`.
            limit: Maximum number of changes, 1 to 1000.
            wait: Seconds to wait for a change if there is none yet, 0 to 30.

        Raises:
            InvalidIncident: With every faulty argument.
            UnknownCursor: If it is a cursor of another database.
            ClientClosed: If the client is closed meanwhile.
        """
        query = ChangesQuery(after, limit, wait)
        return await self._opened().feed.read(query.after, query.limit, query.wait)

    async def purgeable(self, ended_before: datetime) -> int:
        """Return the number of incidents that :meth:`purge` would remove now.

        Args:
            ended_before: As for :meth:`purge`.

        Raises:
            InvalidIncident: If it is not an aware time.
        """
        ended_before = rules.check("ended_before", rules.time_bound, ended_before)
        return await self._opened().store.purgeable(ended_before)

    async def purge(
        self, ended_before: datetime, *, progress: Callable[[int, int], object] | None = None
    ) -> int:
        """Remove incidents that have ended, with their histories, and return their number.

        One event for each remains and records the removal. Incidents are removed in batches, each
        in a transaction of its own, while other calls go on. An incident that another transaction
        is changing is skipped. If the caller is cancelled, removed incidents stay removed.

        Args:
            ended_before: Aware; incidents that ended before this time are removed. An incident
                whose end was not recorded (``ended_at`` is None) stays.
            progress: Called after each batch with the number of removed incidents, and the number
                of all incidents to remove; an awaitable result is awaited. If the result is False,
                the purge ends early. None: report no progress.

        Raises:
            InvalidIncident: If it is not an aware time.
        """
        ended_before = rules.check("ended_before", rules.time_bound, ended_before)
        session = self._opened()
        total = await session.store.purgeable(ended_before) if progress is not None else 0
        purged = 0
        while True:
            count, more = await session.write(
                session.store.purge(ended_before, PURGE_BATCH, actor=ACTOR.get())
            )
            purged += count
            if progress is not None:
                answer = progress(purged, max(purged, total))
                if isinstance(answer, Awaitable):
                    answer = await answer
                more = more and answer is not False
            if not more:
                return purged

    async def check(self) -> None:
        """Raise unless the database answers and has the schema that this version works on.

        Also ping the shared cache, which updates :attr:`cache_available`.

        Raises:
            SchemaOutOfDate: With the command to run.
        """
        session = self._opened()
        await session.store.check()
        await session.pages.probe()

    async def feed_blocker(self) -> FeedBlocker | None:
        """Return the transaction that holds up :meth:`changes`, or None if there is none.

        On PostgreSQL, a change is delivered once every transaction of the server that began to
        write before it has ended. While such a transaction stays open, the feed looks quiet:

        .. code-block:: python

            blocker = await incidents.feed_blocker()
            if blocker is not None and blocker.waiting:
                print(f"The feed has been held up since {blocker.since} by {blocker.holder}")

        Returns:
            The oldest open transaction once it has been open for five seconds; otherwise None, and
            always None on SQLite.
        """
        return await self._opened().store.feed_blocker()

    def _opened(self) -> Session:
        if self._session is None:
            raise ClientClosed
        return self._session

    def _swap(self, parts: Parts) -> Parts:
        """Use other parts from now on, and return the current ones; for the test kit."""
        present = Parts(self.store, self._cache, self._session, self._transactions)
        self.store, self._cache, self._session, self._transactions = parts
        return present

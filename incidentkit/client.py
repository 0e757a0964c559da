"""The facade: everything that an application does with incidents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias, TypeVar

from incidentkit.domain import rules
from incidentkit.domain.actor import ACTOR
from incidentkit.domain.errors import CacheUnavailable, ClientClosed, StoreUnavailable
from incidentkit.domain.queries import ChangesQuery, ListQuery
from incidentkit.domain.transitions import Transitions
from incidentkit.domain.values import DEFAULT_LIMIT, LATEST, MAX_WAIT, Incident
from incidentkit.joined import JoinedIncidents
from incidentkit.operations import IncidentOperations
from incidentkit.store.database import DEFAULT_DATABASE_URL

if TYPE_CHECKING:
    import asyncio
    import os
    from collections.abc import AsyncIterator, Callable, Coroutine
    from datetime import datetime
    from types import TracebackType

    from asyncpg import Pool, Record
    from sqlalchemy.ext.asyncio import AsyncEngine

    from incidentkit.cache import IncidentCache
    from incidentkit.cache.pages import PageCache
    from incidentkit.domain.transitions import Graph
    from incidentkit.domain.values import ChangePage, IncidentEvent, IncidentSource, IncidentStatus
    from incidentkit.feed import ChangeFeed
    from incidentkit.settings import Settings
    from incidentkit.store.base import IncidentStore, StoreOptions

CHANGES_BATCH: Final = 500
"""Changes that a feed reads at a time."""

CHANGES_LIMIT: Final = 100
"""Changes that are returned unless told otherwise."""

MIN_PAUSE: Final = 0.25
MAX_PAUSE: Final = 5.0
"""Seconds that a feed waits before it asks a database again that is away: at first, and at most."""

PURGE_BATCH: Final = 500
"""Incidents that are purged in one transaction, at most."""

Incidents: TypeAlias = list[Incident]
"""A page; an alias because inside the client ``list`` is the verb."""

_T = TypeVar("_T")


class IncidentClient(IncidentOperations):
    """Records and follows incidents. Open it with ``async with``, use it from one event loop.

    Args:
        store: Where incidents are kept.
        cache: Where pages of the list are kept for all processes; None means that each process
            keeps only its own.
        cache_required: Whether :meth:`connect` fails if the cache does not answer.
        max_staleness: Seconds by which a list may be behind a change that another client has
            committed. 0, the default, means that it never is, at the price of one small read of
            the database for each list, which concurrent ones share.
        transitions: For each status those that may follow it; a status that is missing is a last
            one. None allows every change.

    Raises:
        InvalidSettings: If ``max_staleness`` is not a number from 0 to 3600, or ``transitions``
            name something that is no status.

    Every method raises :class:`~incidentkit.StoreUnavailable` if the database cannot be reached
    or does not answer in time; a cache that fails is never an error. A write whose caller is
    cancelled is carried through.
    """

    def __init__(
        self,
        store: IncidentStore,
        *,
        cache: IncidentCache | None = None,
        cache_required: bool = False,
        max_staleness: float = 0.0,
        transitions: Graph | None = None,
    ) -> None:
        from incidentkit.cache.pages import check_max_staleness  # noqa: PLC0415

        check_max_staleness(max_staleness)
        self._transitions = Transitions(transitions)
        self.store = store
        self._cache = cache
        self._cache_required = cache_required
        self._max_staleness = max_staleness
        self._pages: PageCache | None = None
        self._feed: ChangeFeed | None = None
        self._connected = False
        self._connecting = _new_lock()
        self._writes: set[asyncio.Task[Any]] = set()

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
    ) -> Self:
        """Return a client for these servers; it connects when it is entered.

        Args:
            database: ``postgresql://user:password@host:port/database``,
                ``sqlite+aiosqlite:///file``, or ``sqlite+aiosqlite:///:memory:``; or SQLAlchemy's
                ``AsyncEngine`` or asyncpg's pool that the application has opened, which the client
                uses and never closes.
            redis_url: ``redis://host:port/db``, ``redis+cluster://host:port,host:port`` or
                ``redis+sentinel://host:port,host:port/service``, where lists are cached for all
                processes. None means that each process caches its own.
            redis_required: Whether connecting fails if Redis does not answer.
            max_staleness: Seconds, 0 to 3600, by which a list may be behind a change that another
                client has committed; 0 means never.
            transitions: For each status those that may follow it; a status that is missing is a
                last one. None allows every change.
            options: Sizes and timeouts of a database that is given as a URL; None means the
                defaults.

        Raises:
            InvalidSettings: If a URL, ``max_staleness`` or ``transitions`` cannot be used.
            MissingDependency: If Redis is wanted and its package is not installed.
        """
        from incidentkit.cache import cache_from_url  # noqa: PLC0415
        from incidentkit.store.base import store_on  # noqa: PLC0415

        return cls(
            store_on(database, options),
            cache=None if redis_url is None else cache_from_url(redis_url),
            cache_required=redis_required,
            max_staleness=max_staleness,
            transitions=transitions,
        )

    @classmethod
    def from_env(cls, env_file: str | os.PathLike[str] | None = ".env") -> Self:
        """Return a client for the servers that the environment names.

        Args:
            env_file: A file read under the process's environment, which wins; None means none.

        Raises:
            InvalidSettings: With the variable and the rule that it breaks.
            MissingDependency: If Redis is named and its package is not installed.
        """
        from incidentkit.settings import Settings  # noqa: PLC0415

        return cls.from_settings(Settings.from_env(env_file))

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Return a client for the servers that the settings name.

        Raises:
            InvalidSettings: If a URL cannot be used.
            MissingDependency: If Redis is named and its package is not installed.
        """
        return cls.open(
            settings.database_url,
            settings.redis_url,
            redis_required=settings.redis_required,
            max_staleness=settings.max_staleness,
            transitions=settings.transitions,
            options=settings.store,
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
        """Whether the client is open."""
        return self._connected

    @property
    def cache_available(self) -> bool | None:
        """Whether the shared cache is in use; None if there is none, or the client is not open."""
        return None if self._pages is None else self._pages.available

    async def connect(self) -> None:
        """Open the store and ask the cache whether it answers; on an open client, do nothing.

        Raises:
            SchemaOutOfDate: With the command that mends it. SQLite mends itself.
            CacheUnavailable: If the cache does not answer, and is required.
        """
        from incidentkit.cache.pages import PageCache  # noqa: PLC0415
        from incidentkit.feed import ChangeFeed  # noqa: PLC0415

        async with self._connecting:
            if self._connected:
                return
            self._pages = PageCache(self.store, self._cache, max_staleness=self._max_staleness)
            self._feed = ChangeFeed(self.store)
            try:
                await self.store.open()
                await self._ping_cache(self._pages)
            except BaseException:
                await self._close()
                raise
            self._connected = True

    async def _ping_cache(self, pages: PageCache) -> None:
        try:
            await pages.ping()
        except CacheUnavailable:
            if self._cache_required:
                raise

    async def close(self) -> None:
        """Wait for running writes, then give back every connection; once closed, do nothing.

        A read that is under way ends as it can, or with :class:`~incidentkit.ClientClosed`.
        """
        async with self._connecting:
            await self._close()
        # The next opening may be on another event loop.
        self._connecting = _new_lock()

    async def _close(self) -> None:
        self._connected = False
        if self._feed is not None:
            self._feed.close()
        if self._writes:
            from asyncio import wait  # noqa: PLC0415

            await wait(self._writes)
        await self.store.close()
        if self._feed is not None:
            await self._feed.finish()
        # Last, since a list that the store still answered is handed to the cache.
        if self._pages is not None:
            await self._pages.close()
        # Not before, so that a close that was cancelled can be repeated.
        self._feed = self._pages = None

    async def list(
        self,
        page: int = 1,
        limit: int = DEFAULT_LIMIT,
        status: IncidentStatus | str | None = None,
        source: IncidentSource | str | None = None,
    ) -> Incidents:
        """Return one page of incidents: newest first, those of one second by id, newest first.

        It is the page as the database has it at some instant during this call, so it shows every
        change that was committed before, by whomever, whatever the caches do; with
        ``max_staleness``, every change that was committed that many seconds before.

        Args:
            page: 1 is the newest page.
            limit: Incidents a page, 1 to 1000.
            status: Only incidents with this status; None means any.
            source: Only incidents from this source; None means any.

        Returns:
            At most ``limit`` incidents; an empty list past the last page.

        Raises:
            InvalidIncident: With every faulty argument.
        """
        query = ListQuery(page, limit, status, source)
        return await self._open_pages().list(query)

    async def list_json(self, query: ListQuery) -> bytes:
        """Return what :meth:`list` does as a JSON array, as ``GET /incident/get`` answers it.

        A page that is cached is returned as the bytes that it is.
        """
        return (await self._open_pages().page(query)).json

    def join(self, connection: object) -> JoinedIncidents:
        """Return the verbs inside the transaction of the application's own connection.

        What they write is committed or rolled back with all else in that transaction; until then
        nobody else sees it. What they read is read there, never from a cache.

        Args:
            connection: SQLAlchemy's ``AsyncConnection`` or ``AsyncSession``, or a connection of
                asyncpg that is in a transaction; to the client's database.

        Raises:
            ClientClosed: If the client is not open.
            NotInTransaction: If the connection commits each statement by itself, or is closed.
            TypeError: If it is no connection that can be joined, or to another kind of database.
        """
        self._open_pages()
        return JoinedIncidents(self.store.join(connection), self._transitions)

    async def changes(self, after: str | None = None) -> AsyncIterator[IncidentEvent]:
        """Follow every change of every incident, for ever, each once.

        They come in the order in which their transactions began to write, which is that of their
        commits unless transactions overlap; those of one incident always in the order of its
        changes. What comes is final: nothing is ever added before it. While the database is away
        the feed waits for it.

        Args:
            after: The cursor of the change to go on behind, from whatever process or time; None
                means from the first one on, and ``latest`` only what comes from now on.

        Raises:
            InvalidIncident: If it is not a cursor.
            UnknownCursor: If it is not one of this database.
            ClientClosed: If the client is closed meanwhile.
        """
        ChangesQuery(after)
        pause = 0.0
        while True:
            # What is the latest must be known before an outage, which may hide changes.
            wait = 0 if after == LATEST else MAX_WAIT
            try:
                page = await self.read_changes(after, limit=CHANGES_BATCH, wait=wait)
            except StoreUnavailable:
                pause = min(2 * pause + MIN_PAUSE, MAX_PAUSE)
                if self._feed is not None:
                    await self._feed.pause(pause)
                self._open_pages()
                continue
            pause = 0.0
            for event in page.changes:
                yield event
            after = page.next

    async def read_changes(
        self, after: str | None = None, *, limit: int = CHANGES_LIMIT, wait: float = 0.0
    ) -> ChangePage:
        """Return some changes, and the cursor to go on with.

        Args:
            after: As for :meth:`changes`.
            limit: Changes, 1 to 1000.
            wait: Seconds, 0 to 30, to wait for a change if there is none yet.

        Raises:
            InvalidIncident: With every faulty argument.
            UnknownCursor: If the cursor is not one of this database.
            ClientClosed: If the client is closed meanwhile.
        """
        ChangesQuery(after, limit, wait)
        if not self._connected or self._feed is None:
            raise ClientClosed
        return await self._feed.read(after, limit, wait)

    async def purge(
        self, ended_before: datetime, *, progress: Callable[[int, int], object] | None = None
    ) -> int:
        """Remove incidents that have ended, with their histories, and return how many.

        Of each an event remains that tells of it. It is done in batches, each a transaction of its
        own, beside whatever else goes on; one that somebody is changing is left out. What is
        removed already stays removed if the caller is cancelled.

        Args:
            ended_before: Aware; those that ended before are removed. One whose end was not recorded
                (``ended_at`` is None) stays.
            progress: Called after each batch with the number of incidents that were removed, and
                with that of all that there were to remove. None means that nobody wants to know.

        Raises:
            InvalidIncident: If it is not an aware time.
        """
        ended_before = rules.check("ended_before", rules.time_bound, ended_before)
        store = self._store()
        total = await store.purgeable(ended_before) if progress is not None else 0
        purged = 0
        while True:
            count, more = await self._write(
                store.purge(ended_before, PURGE_BATCH, actor=ACTOR.get())
            )
            purged += count
            if progress is not None:
                progress(purged, max(purged, total))
            if not more:
                return purged

    async def check(self) -> None:
        """Return if the database answers and has the schema that this version works on.

        The shared cache is asked, too, so that :attr:`cache_available` tells how it is.

        Raises:
            SchemaOutOfDate: With the command that mends it.
        """
        pages = self._open_pages()
        await self.store.check()
        await pages.probe()

    def _store(self) -> IncidentStore:
        self._open_pages()
        return self.store

    def _open_pages(self) -> PageCache:
        if not self._connected or self._pages is None:
            raise ClientClosed
        return self._pages

    async def _write(self, write: Coroutine[Any, Any, _T]) -> _T:
        """Run a write and forget the cached pages, in one piece that no cancellation parts."""
        from incidentkit.carrying import carry  # noqa: PLC0415

        return await carry(self._writes, _write_and_forget(self._open_pages(), self._feed, write))


def _new_lock() -> asyncio.Lock:
    # Like all that a client needs it is loaded with the first one, not with the package.
    from asyncio import Lock  # noqa: PLC0415

    return Lock()


async def _write_and_forget(
    pages: PageCache, feed: ChangeFeed | None, write: Coroutine[Any, Any, _T]
) -> _T:
    try:
        return await write
    finally:
        # Also after an error: it may hide a commit.
        if feed is not None:
            feed.wake()
        pages.forget()

"""The facade: everything that an application does with incidents."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Self, TypeAlias, TypeVar, overload

from incidentkit.cache.pages import PageCache, check_max_staleness
from incidentkit.errors import CacheUnavailable, ClientClosed, IncidentNotFound
from incidentkit.models import (
    DEFAULT_LIMIT,
    Incident,
    IncidentStatus,
    ListQuery,
    NewIncident,
    check_incident_id,
    check_status_change,
)
from incidentkit.store.base import DEFAULT_DATABASE_URL

if TYPE_CHECKING:
    import os
    from collections.abc import Coroutine
    from types import TracebackType

    from incidentkit.cache import IncidentCache
    from incidentkit.models import IncidentSource
    from incidentkit.settings import Settings
    from incidentkit.store.base import IncidentStore, StoreOptions

logger = logging.getLogger("incidentkit")

Incidents: TypeAlias = list[Incident]
"""A page; an alias because inside the client ``list`` is the verb."""

_T = TypeVar("_T")


class IncidentClient:
    """Records and follows incidents. Open it with ``async with``, use it from one event loop.

    Args:
        store: Where incidents are kept.
        cache: Where pages of the list are kept for all processes; None means that each process
            keeps only its own.
        cache_required: Whether :meth:`connect` fails if the cache does not answer.
        max_staleness: Seconds by which a list may be behind a change that another client has
            committed. 0, the default, means that it never is, at the price of one small read of
            the database for each list, which concurrent ones share.

    Raises:
        InvalidSettings: If ``max_staleness`` is not a number from 0 to 3600.

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
    ) -> None:
        check_max_staleness(max_staleness)
        self.store = store
        self._cache = cache
        self._cache_required = cache_required
        self._max_staleness = max_staleness
        self._pages: PageCache | None = None
        self._connected = False
        self._connecting = asyncio.Lock()
        self._writes: set[asyncio.Task[Any]] = set()

    @classmethod
    def open(
        cls,
        database_url: str = DEFAULT_DATABASE_URL,
        redis_url: str | None = None,
        *,
        redis_required: bool = False,
        max_staleness: float = 0.0,
        options: StoreOptions | None = None,
    ) -> Self:
        """Return a client for these servers; it connects when it is entered.

        Args:
            database_url: ``postgresql://user:password@host:port/database``,
                ``sqlite+aiosqlite:///file``, or ``sqlite+aiosqlite:///:memory:``.
            redis_url: ``redis://host:port/db``, ``redis+cluster://host:port,host:port`` or
                ``redis+sentinel://host:port,host:port/service``, where lists are cached for all
                processes. None means that each process caches its own.
            redis_required: Whether connecting fails if Redis does not answer.
            max_staleness: Seconds, 0 to 3600, by which a list may be behind a change that another
                client has committed; 0 means never.
            options: Sizes and timeouts of the database; None means the defaults.

        Raises:
            InvalidSettings: If a URL or ``max_staleness`` cannot be used.
            MissingDependency: If Redis is wanted and its package is not installed.
        """
        from incidentkit.cache import cache_from_url  # noqa: PLC0415
        from incidentkit.store.base import store_from_url  # noqa: PLC0415

        return cls(
            store_from_url(database_url, options),
            cache=None if redis_url is None else cache_from_url(redis_url),
            cache_required=redis_required,
            max_staleness=max_staleness,
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
        async with self._connecting:
            if self._connected:
                return
            self._pages = PageCache(self.store, self._cache, max_staleness=self._max_staleness)
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
        self._connecting = asyncio.Lock()

    async def _close(self) -> None:
        self._connected = False
        if self._writes:
            await asyncio.wait(self._writes)
        await self.store.close()
        # Last, since a list that the store still answered is handed to the cache.
        pages, self._pages = self._pages, None
        if pages is not None:
            await pages.close()

    @overload
    async def create(self, incident_message: NewIncident, /) -> Incident: ...

    @overload
    async def create(
        self,
        incident_message: str,
        *,
        source: IncidentSource | str,
        incident_type: IncidentStatus | str = IncidentStatus.NEW,
    ) -> Incident: ...

    async def create(
        self,
        incident_message: NewIncident | str,
        *,
        source: IncidentSource | str | None = None,
        incident_type: IncidentStatus | str = IncidentStatus.NEW,
    ) -> Incident:
        """Store an incident and return it, committed.

        Args:
            incident_message: What happened, by the rules of :class:`~incidentkit.NewIncident`;
                or a ready :class:`~incidentkit.NewIncident`, alone.
            source: Who reports it.
            incident_type: The status that it starts with.

        Raises:
            InvalidIncident: With every faulty field; nothing is stored.
            TypeError: If a NewIncident comes with fields beside it.
        """
        if isinstance(incident_message, NewIncident):
            if source is not None or incident_type is not IncidentStatus.NEW:
                raise TypeError("A NewIncident is created as it is, without further fields")
            incident = incident_message
        else:
            incident = NewIncident(incident_message, source, incident_type)  # type: ignore[arg-type]
        pages = self._open_pages()
        return await self._write(pages, self.store.create(incident))

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

    async def get(self, incident_id: int) -> Incident:
        """Return the incident, as the database has it.

        Args:
            incident_id: 1 to 2^63-1.

        Raises:
            IncidentNotFound: If there is none with this id.
            InvalidIncident: If it is not an id.
        """
        incident_id = check_incident_id(incident_id)
        self._open_pages()
        incident = await self.store.get(incident_id)
        if incident is None:
            raise IncidentNotFound(incident_id)
        return incident

    async def update_status(self, incident_id: int, status: IncidentStatus | str) -> Incident:
        """Change the status and return the incident, committed.

        Args:
            incident_id: 1 to 2^63-1.
            status: The status that it gets; it may be the one that it has.

        Raises:
            IncidentNotFound: If there is none with this id.
            InvalidIncident: With every faulty argument.
        """
        incident_id, status = check_status_change(incident_id, status)
        pages = self._open_pages()
        incident = await self._write(pages, self.store.update_status(incident_id, status))
        if incident is None:
            raise IncidentNotFound(incident_id)
        return incident

    async def check(self) -> None:
        """Return if the database answers and has the schema that this version works on.

        The shared cache is asked, too, so that :attr:`cache_available` tells how it is.

        Raises:
            SchemaOutOfDate: With the command that mends it.
        """
        pages = self._open_pages()
        await self.store.check()
        await pages.probe()

    def _open_pages(self) -> PageCache:
        if not self._connected or self._pages is None:
            raise ClientClosed
        return self._pages

    async def _write(self, pages: PageCache, write: Coroutine[Any, Any, _T]) -> _T:
        """Run a write and forget the cached pages, in one piece that no cancellation parts."""
        task = asyncio.ensure_future(_write_and_forget(pages, write))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_log_failure)
            raise


async def _write_and_forget(pages: PageCache, write: Coroutine[Any, Any, _T]) -> _T:
    try:
        return await write
    finally:
        # Also after an error: it may hide a commit.
        await pages.forget()


def _log_failure(write: asyncio.Task[Any]) -> None:
    """Tell of a write that failed when its caller was no longer there."""
    error = None if write.cancelled() else write.exception()
    if error is not None:
        logger.warning("A write whose caller was cancelled failed: %s", error)

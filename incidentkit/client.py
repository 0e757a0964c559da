"""The facade: everything that an application does with incidents."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Self, TypeAlias, TypeVar, overload

from incidentkit.cache.memory import MemoryCache
from incidentkit.cache.pages import PageCache
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
from incidentkit.wire import decode_incidents, encode_incidents

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
        cache: Where pages of the list are kept for a while; None means that each list is read
            from the database.
        cache_required: Whether :meth:`connect` fails if the cache does not answer.

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
    ) -> None:
        self.store = store
        self._cache = cache
        self._cache_required = cache_required
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
        options: StoreOptions | None = None,
    ) -> Self:
        """Return a client for these servers; it connects when it is entered.

        Args:
            database_url: ``postgresql://user:password@host:port/database``,
                ``sqlite+aiosqlite:///file``, or ``sqlite+aiosqlite:///:memory:``.
            redis_url: ``redis://host:port/db``, where lists are cached for all processes. None
                means that lists are cached in the process on SQLite, where a change by another
                process is noticed, and not at all on PostgreSQL, where it would not be.
            redis_required: Whether connecting fails if Redis does not answer.
            options: Sizes and timeouts of the database; None means the defaults.

        Raises:
            InvalidSettings: If a URL cannot be used.
            MissingDependency: If Redis is wanted and its package is not installed.
        """
        from incidentkit.cache import cache_from_url  # noqa: PLC0415
        from incidentkit.store.base import database_kind, store_from_url  # noqa: PLC0415

        store = store_from_url(database_url, options)
        cache: IncidentCache | None = None
        if redis_url is not None:
            cache = cache_from_url(redis_url)
        elif database_kind(database_url) == "sqlite":
            cache = MemoryCache()
        return cls(store, cache=cache, cache_required=redis_required)

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
        """Whether the cache is in use; None if there is none, or the client is not open."""
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
            self._pages = None if self._cache is None else PageCache(self._cache)
            try:
                await self.store.open()
                await self._ping_cache()
            except BaseException:
                await self.close()
                raise
            self._connected = True

    async def _ping_cache(self) -> None:
        if self._pages is None:
            return
        try:
            await self._pages.ping()
        except CacheUnavailable:
            if self._cache_required:
                raise

    async def close(self) -> None:
        """Wait for running writes, then give back every connection; once closed, do nothing."""
        self._connected = False
        if self._writes:
            await asyncio.wait(self._writes)
        pages, self._pages = self._pages, None
        if pages is not None:
            await pages.close()
        await self.store.close()
        # The next opening may be on another event loop.
        self._connecting = asyncio.Lock()

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
        self._check_connected()
        return await self._write(self.store.create(incident))

    async def list(
        self,
        page: int = 1,
        limit: int = DEFAULT_LIMIT,
        status: IncidentStatus | str | None = None,
        source: IncidentSource | str | None = None,
    ) -> Incidents:
        """Return one page of incidents: newest first, those of one second by id, newest first.

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
        self._check_connected()
        if self._pages is None:
            return await self.store.list(query)
        await self._pages.notice(await self.store.data_version())
        cached = await self._pages.get(query.cache_key)
        if cached is not None:
            try:
                return decode_incidents(cached)
            except ValueError:
                logger.warning("The cache holds something else under %s", query.cache_key)
        generation = self._pages.generation
        incidents = await self.store.list(query)
        await self._pages.set(query.cache_key, encode_incidents(incidents), generation)
        return incidents

    async def get(self, incident_id: int) -> Incident:
        """Return the incident, as the database has it.

        Args:
            incident_id: 1 to 2^63-1.

        Raises:
            IncidentNotFound: If there is none with this id.
            InvalidIncident: If it is not an id.
        """
        incident_id = check_incident_id(incident_id)
        self._check_connected()
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
        self._check_connected()
        incident = await self._write(self.store.update_status(incident_id, status))
        if incident is None:
            raise IncidentNotFound(incident_id)
        return incident

    async def check(self) -> None:
        """Return if the database answers and has the schema that this version works on.

        Raises:
            SchemaOutOfDate: With the command that mends it.
        """
        self._check_connected()
        await self.store.check()

    def _check_connected(self) -> None:
        if not self._connected:
            raise ClientClosed

    async def _write(self, write: Coroutine[Any, Any, _T]) -> _T:
        """Run a write and forget the cached pages, in one piece that no cancellation parts."""
        task = asyncio.ensure_future(self._write_and_clear(write))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_log_failure)
            raise

    async def _write_and_clear(self, write: Coroutine[Any, Any, _T]) -> _T:
        try:
            return await write
        finally:
            # Also after an error: it may hide a commit.
            if self._pages is not None:
                await self._pages.clear()


def _log_failure(write: asyncio.Task[Any]) -> None:
    """Tell of a write that failed when its caller was no longer there."""
    error = None if write.cancelled() else write.exception()
    if error is not None:
        logger.warning("A write whose caller was cancelled failed: %s", error)

"""Embodiments of the verbs: the clients and joined transactions that the suite runs on.

To add one, write a class with the method `open` and an entry in `EMBODIMENTS`. Declare what it
cannot do in `tests/conformance/gaps.py`.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import asyncpg
from attrs import frozen

from incidentkit import IncidentClient, SyncIncidentClient
from incidentkit.testing.clients import parts_on, swap
from tests.conformance.awaited import Awaited
from tests.conftest import TENANTS
from tests.hosts import (
    AsyncpgHost,
    host_engine,
    naming_nothing,
    open_host,
    run_sql,
    sqlalchemy_url,
)
from tests.remotes import over_asgi
from tests.sync_hosts import open_sync_host

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager
    from datetime import datetime

    from incidentkit.testing import PrivateDatabase
    from tests.hosts import Host
    from tests.remotes import Host as ServiceHost
    from tests.servers import PgBouncer
    from tests.sync_hosts import InThread

Verbs: TypeAlias = IncidentClient
"""IncidentClient has every verb; other embodiments must have the same signatures."""

ASYNCPG = "postgresql+asyncpg"
PSYCOPG = "postgresql+psycopg"
"""The schemes of SQLAlchemy's URLs for each driver."""


class Embodiment(ABC):
    """A way to call the verbs on a database with the current schema and no rows.

    Args:
        url: The database.

    Attributes:
        url: The database, through the pooler if there is one.
    """

    def __init__(self, url: str) -> None:
        self.url = self._server_url = url
        self._pooled = False

    def put_behind(self, pooler: PgBouncer) -> None:
        """Reach the database through a pooler from now on."""
        self.url = pooler.through(self._server_url)
        self._pooled = True

    def _host_options(self, url: str) -> dict[str, Any]:
        """Return the options of the host's driver."""
        return naming_nothing(url) if self._pooled else {}

    @property
    def on_sqlite(self) -> bool:
        """Whether `sql` expects SQL for SQLite rather than for PostgreSQL."""
        return self.url.startswith("sqlite")

    def moment(self, time: datetime) -> str:
        """Return a time as an SQL literal."""
        return f"'{time.astimezone(UTC):%Y-%m-%d %H:%M:%S}{'' if self.on_sqlite else '+00'}'"

    @abstractmethod
    def open(self, **options: Any) -> AbstractAsyncContextManager[Verbs]:
        """Return a context manager for the verbs; each call opens a new client.

        Args:
            **options: Options of `IncidentClient.open`, such as `transitions`.
        """

    async def sql(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement as another program would, and return its rows."""
        return await run_sql(self._server_url, statement)


class ByUrl(Embodiment):
    """A client opened by URL."""

    def open(self, **options: Any) -> AbstractAsyncContextManager[Verbs]:
        """Return a client that opens its own connections."""
        return IncidentClient.open(self.url, **options)


class Synchronous(Embodiment):
    """A synchronous client opened by URL, called from several threads."""

    def open(self, **options: Any) -> AbstractAsyncContextManager[Verbs]:
        """Return a synchronous client."""
        return awaited(SyncIncidentClient.open(self.url, **options))


@asynccontextmanager
async def awaited(client: SyncIncidentClient) -> AsyncIterator[Verbs]:
    """Open a synchronous client, and yield its verbs as coroutines."""
    with ThreadPoolExecutor(16) as threads:
        await asyncio.to_thread(client.connect)
        try:
            yield cast("Verbs", Awaited(client, threads))
        finally:
            await asyncio.to_thread(client.close)


class OverAsgi(Embodiment):
    """A client of a service that runs in the same event loop."""

    def open(self, **options: Any) -> AbstractAsyncContextManager[Verbs]:
        """Return a client of a service whose own client has the options."""
        return over_asgi(self.url, **options)


class OverSocket(Embodiment):
    """A client of a service behind a socket.

    Args:
        url: The database of the service.
        host: Runs the service.
    """

    def __init__(self, url: str, host: ServiceHost) -> None:
        super().__init__(url)
        self._host = host

    def open(self, **options: Any) -> AbstractAsyncContextManager[Verbs]:
        """Return a client of a service whose own client has the options."""
        return self._host.open(self.url, **options)


class SynchronousOverSocket(Embodiment):
    """A synchronous client of a service behind a socket.

    Args:
        url: The database of the service.
        host: Runs the service.
    """

    def __init__(self, url: str, host: ServiceHost) -> None:
        super().__init__(url)
        self._host = host

    @asynccontextmanager
    async def open(self, **options: Any) -> AsyncIterator[Verbs]:
        """Open a synchronous client of a service whose own client has the options."""
        with self._host.serving(self.url, **options) as url:
            async with awaited(SyncIncidentClient.open(url)) as verbs:
                yield verbs


class InSchema(ByUrl):
    """A client on the tables of one tenant, beside those of others."""

    def open(self, **options: Any) -> AbstractAsyncContextManager[Verbs]:
        """Return a client that opens its own connections."""
        return super().open(**options, schema=TENANTS[0])

    async def sql(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement as another program of the tenant would, and return its rows."""
        settings = {"search_path": f'"{TENANTS[0]}"'}
        return await run_sql(self._server_url, statement, server_settings=settings)


class WithRedis(Embodiment):
    """A client opened by URL, with its pages cached in Redis.

    Args:
        url: The database.
        redis_url: An empty Redis.
    """

    def __init__(self, url: str, redis_url: str) -> None:
        super().__init__(url)
        self._redis_url = redis_url

    def open(self, **options: Any) -> AbstractAsyncContextManager[Verbs]:
        """Return a client with a shared cache."""
        return IncidentClient.open(self.url, self._redis_url, **options)


class Private(Embodiment):
    """A client on the test kit's database."""

    def __init__(self, url: str, database: PrivateDatabase) -> None:
        super().__init__(url)
        self._database = database

    @asynccontextmanager
    async def open(self, **options: Any) -> AsyncIterator[Verbs]:
        """Yield a client that opens itself."""
        client = IncidentClient.open(self.url, **options)
        swap(client, parts_on(self._database, client.observer))
        yield client

    async def sql(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement on the connection that all clients share."""
        with self._database.transaction() as connection:
            result = connection.exec_driver_sql(statement)
            return [tuple(row) for row in result] if result.returns_rows else []


class OnPool(Embodiment):
    """A client on the host's pool."""

    @asynccontextmanager
    async def open(self, **options: Any) -> AsyncIterator[Verbs]:
        """Open a client on an asyncpg pool."""
        async with (
            asyncpg.create_pool(self.url, min_size=1, **self._host_options(self.url)) as pool,
            IncidentClient.open(pool, **options) as client,
        ):
            yield client


class OnEngine(Embodiment):
    """A client on the host's engine."""

    @property
    def host_url(self) -> str:
        """The URL of the host's engine."""
        return self.url

    @asynccontextmanager
    async def open(self, **options: Any) -> AsyncIterator[Verbs]:
        """Open a client on an SQLAlchemy engine."""
        url = sqlalchemy_url(self.host_url)
        async with (
            host_engine(url, connect_args=self._host_options(url)) as engine,
            IncidentClient.open(engine, **options) as client,
        ):
            yield client


class OnPsycopgEngine(OnEngine):
    """A client on the host's engine with psycopg as its driver."""

    @property
    def host_url(self) -> str:
        """The URL of the host's engine."""
        return self.url.replace("postgresql", PSYCOPG, 1)


class Joined(Embodiment):
    """The verbs joined to a transaction of the host, which stays open during the test.

    Args:
        url: The database.
        way: The kind of connection, one of `tests.hosts.WAYS`.
        scheme: The scheme of the host's URL for SQLAlchemy on PostgreSQL.
    """

    def __init__(self, url: str, way: str, scheme: str = ASYNCPG) -> None:
        super().__init__(url)
        self._way = way
        self._scheme = scheme
        self._hosts: list[Host] = []

    @asynccontextmanager
    async def open(self, **options: Any) -> AsyncIterator[Verbs]:
        """Join a new transaction and roll it back at the end."""
        url = self.url
        if not self._way.startswith("asyncpg"):
            url = url.replace("postgresql", self._scheme, 1)
        async with (
            IncidentClient.open(self.url, **options) as client,
            open_host(self._way, url, **self._host_options(url)) as host,
        ):
            if isinstance(host, AsyncpgHost):
                await host.begin()
            # SQLAlchemy begins the transaction with this statement. Only another transaction of
            # the same test can hold a lock, and it lasts as long as the test: do not wait for it.
            await host.execute(
                "PRAGMA busy_timeout = 20" if self.on_sqlite else "SET LOCAL lock_timeout = 20"
            )
            self._hosts.append(host)
            try:
                yield cast("Verbs", client.join(host.connection))
            finally:
                await host.rollback()

    async def sql(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement in the first transaction of the test."""
        return await self._hosts[0].execute(statement)


class JoinedInSchema(Joined):
    """The same on the tables of one tenant, beside those of others."""

    @asynccontextmanager
    async def open(self, **options: Any) -> AsyncIterator[Verbs]:
        """Join a new transaction and roll it back at the end."""
        async with super().open(**options, schema=TENANTS[0]) as verbs:
            yield verbs

    async def sql(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement of the tenant in the first transaction of the test."""
        await self._hosts[0].execute(f'SET LOCAL search_path = "{TENANTS[0]}"')
        rows = await super().sql(statement)
        await self._hosts[0].execute("SET LOCAL search_path = DEFAULT")
        return rows


class JoinedSync(Embodiment):
    """The verbs joined to a transaction of a host without an event loop, open during the test.

    Args:
        url: The database.
        way: The kind of connection, one of `tests.sync_hosts.SYNC_WAYS`.
    """

    def __init__(self, url: str, way: str) -> None:
        super().__init__(url)
        self._way = way
        self._hosts: list[InThread] = []

    @asynccontextmanager
    async def open(self, **options: Any) -> AsyncIterator[Verbs]:
        """Join a new transaction and roll it back at the end."""
        connect = {"prepare_threshold": None} if self._pooled else {}
        async with open_sync_host(self._way, self.url, connect, **options) as host:
            await host.begin()
            # As for a host with an event loop.
            await host.execute(
                "PRAGMA busy_timeout = 20" if self.on_sqlite else "SET LOCAL lock_timeout = 20"
            )
            self._hosts.append(host)
            try:
                yield cast("Verbs", await host.join())
            finally:
                await host.rollback()

    async def sql(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement in the first transaction of the test."""
        return await self._hosts[0].execute(statement)


@frozen
class Setup:
    """How to create an embodiment.

    Attributes:
        embodiment: Creates it from the values of the fixtures.
        fixtures: The names of the fixtures; the first is the URL of the database.
    """

    embodiment: Callable[..., Embodiment]
    fixtures: tuple[str, ...]


def _on_sqlite(embodiment: Callable[..., Embodiment], *fixtures: str) -> Setup:
    return Setup(embodiment, ("migrated_sqlite_url", *fixtures))


def _on_postgres(embodiment: Callable[..., Embodiment], *fixtures: str) -> Setup:
    return Setup(embodiment, ("migrated_postgres_url", *fixtures))


EMBODIMENTS = {
    "sqlite-file": _on_sqlite(ByUrl),
    "sqlite-memory": Setup(ByUrl, ("memory_url",)),
    "sqlite-private": Setup(Private, ("memory_url", "private_database")),
    "sqlite-redis": _on_sqlite(WithRedis, "redis_url"),
    "sqlite-engine": _on_sqlite(OnEngine),
    "sync-sqlite": _on_sqlite(Synchronous),
    "postgresql-url": _on_postgres(ByUrl),
    "postgresql-redis": _on_postgres(WithRedis, "redis_url"),
    "postgresql-pool": _on_postgres(OnPool),
    "postgresql-engine": _on_postgres(OnEngine),
    "psycopg-engine": _on_postgres(OnPsycopgEngine),
    "sync-postgresql": _on_postgres(Synchronous),
    "remote-asgi": _on_sqlite(OverAsgi),
    "remote-socket": _on_postgres(OverSocket, "service_host"),
    "remote-sync": _on_sqlite(SynchronousOverSocket, "service_host"),
    "joined-sqlite-connection": _on_sqlite(partial(Joined, way="sqlite-connection")),
    "joined-sqlite-session": _on_sqlite(partial(Joined, way="sqlite-session")),
    "joined-postgresql-connection": _on_postgres(partial(Joined, way="postgresql-connection")),
    "joined-postgresql-session": _on_postgres(partial(Joined, way="postgresql-session")),
    "joined-psycopg-connection": _on_postgres(
        partial(Joined, way="postgresql-connection", scheme=PSYCOPG)
    ),
    "joined-asyncpg-connection": _on_postgres(partial(Joined, way="asyncpg-connection")),
    "joined-asyncpg-pool": _on_postgres(partial(Joined, way="asyncpg-pool")),
    "joined-sync-sqlalchemy-postgresql": _on_postgres(
        partial(JoinedSync, way="sync-sqlalchemy-postgresql")
    ),
    "joined-sync-session-sqlite": _on_sqlite(partial(JoinedSync, way="sync-session-sqlite")),
    "joined-sync-psycopg": _on_postgres(partial(JoinedSync, way="sync-psycopg")),
    "joined-sync-sqlite3": _on_sqlite(partial(JoinedSync, way="sync-sqlite3")),
    "joined-sync-django-postgresql": _on_postgres(
        partial(JoinedSync, way="sync-django-postgresql")
    ),
    "joined-sync-django-sqlite": _on_sqlite(partial(JoinedSync, way="sync-django-sqlite")),
    "schema-url": Setup(InSchema, ("tenants_url",)),
    "joined-schema-connection": Setup(
        partial(JoinedInSchema, way="postgresql-connection"), ("tenants_url",)
    ),
}
"""Every embodiment, by name."""

ON_POSTGRES = tuple(
    name
    for name, setup in EMBODIMENTS.items()
    if setup.fixtures[0] in ("migrated_postgres_url", "tenants_url")
)
"""The embodiments that a pooler can be in front of."""

"""The ways to get at the verbs; the suite runs on each of them.

An embodiment is a class with one method, `open`. To add one, write that method and an entry in
`EMBODIMENTS`; what it cannot do goes into `tests/conformance/gaps.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import asynccontextmanager
from datetime import UTC
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import asyncpg
from attrs import frozen

from incidentkit import IncidentClient
from tests.hosts import AsyncpgHost, host_engine, open_host, run_sql

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager
    from datetime import datetime

    from tests.hosts import Host

Verbs: TypeAlias = IncidentClient
"""The client has every verb; other embodiments are held to its signatures."""

PSYCOPG = "postgresql+psycopg"
"""The scheme of a URL for SQLAlchemy with psycopg."""


class Embodiment(ABC):
    """One way to get at the verbs, on a database with the newest schema and no rows.

    Args:
        url: The database.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    @property
    def on_sqlite(self) -> bool:
        """Whether statements have to be in the SQL of SQLite; otherwise in that of PostgreSQL."""
        return self.url.startswith("sqlite")

    def moment(self, time: datetime) -> str:
        """Return a time as a literal of the database's SQL."""
        return f"'{time.astimezone(UTC):%Y-%m-%d %H:%M:%S}{'' if self.on_sqlite else '+00'}'"

    @abstractmethod
    def open(self, **options: Any) -> AbstractAsyncContextManager[Verbs]:
        """Return a context that lends the verbs; a second one is a second client.

        Args:
            **options: Those of `IncidentClient.open`, such as `transitions`.
        """

    async def sql(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement as another program does, and return its rows."""
        return await run_sql(self.url, statement)


class ByUrl(Embodiment):
    """A client that is given a URL."""

    def open(self, **options: Any) -> AbstractAsyncContextManager[Verbs]:
        """Return a client with connections of its own."""
        return IncidentClient.open(self.url, **options)


class WithRedis(Embodiment):
    """A client that is given a URL, and a Redis for its pages.

    Args:
        url: The database.
        redis_url: The Redis, which is empty.
    """

    def __init__(self, url: str, redis_url: str) -> None:
        super().__init__(url)
        self._redis_url = redis_url

    def open(self, **options: Any) -> AbstractAsyncContextManager[Verbs]:
        """Return a client that shares its cache with others."""
        return IncidentClient.open(self.url, self._redis_url, **options)


class OnPool(Embodiment):
    """A client that is given the host's pool."""

    @asynccontextmanager
    async def open(self, **options: Any) -> AsyncIterator[Verbs]:
        """Lend a client on a pool of asyncpg."""
        async with (
            asyncpg.create_pool(self.url, min_size=1) as pool,
            IncidentClient.open(pool, **options) as client,
        ):
            yield client


class OnEngine(Embodiment):
    """A client that is given the host's engine."""

    @property
    def host_url(self) -> str:
        """The URL that the host gives to SQLAlchemy."""
        return self.url

    @asynccontextmanager
    async def open(self, **options: Any) -> AsyncIterator[Verbs]:
        """Lend a client on an engine of SQLAlchemy."""
        async with (
            host_engine(self.host_url) as engine,
            IncidentClient.open(engine, **options) as client,
        ):
            yield client


class OnPsycopgEngine(OnEngine):
    """A client that is given the host's engine, whose driver is psycopg."""

    @property
    def host_url(self) -> str:
        """The URL that the host gives to SQLAlchemy."""
        return self.url.replace("postgresql", PSYCOPG, 1)


class Joined(Embodiment):
    """The verbs in a transaction of the host, which is open while the test runs.

    Args:
        url: The database.
        way: How the host has its transaction, by the name that `tests.hosts` gives it.
        scheme: The scheme of the URL that the host connects to.
    """

    def __init__(self, url: str, way: str, scheme: str = "postgresql") -> None:
        super().__init__(url)
        self._way = way
        self._host_url = url.replace("postgresql", scheme, 1)
        self._hosts: list[Host] = []

    @asynccontextmanager
    async def open(self, **options: Any) -> AsyncIterator[Verbs]:
        """Lend the verbs in a transaction of their own, which is rolled back in the end."""
        async with (
            IncidentClient.open(self.url, **options) as client,
            open_host(self._way, self._host_url) as host,
        ):
            if isinstance(host, AsyncpgHost):
                await host.begin()
            # SQLAlchemy begins with the first statement. The only lock that anybody holds is that
            # of the other transaction, which does not end meanwhile.
            await host.execute(
                "PRAGMA busy_timeout = 20" if self.on_sqlite else "SET LOCAL lock_timeout = 20"
            )
            self._hosts.append(host)
            try:
                yield cast("Verbs", client.join(host.connection))
            finally:
                await host.rollback()

    async def sql(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement in the transaction that was opened first."""
        return await self._hosts[0].execute(statement)


@frozen
class Setup:
    """How an embodiment is made.

    Attributes:
        embodiment: Makes it from the values of the fixtures.
        fixtures: The names of the fixtures that it needs, first that of the URL of its database.
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
    "sqlite-redis": _on_sqlite(WithRedis, "redis_url"),
    "sqlite-engine": _on_sqlite(OnEngine),
    "postgresql-url": _on_postgres(ByUrl),
    "postgresql-redis": _on_postgres(WithRedis, "redis_url"),
    "postgresql-pool": _on_postgres(OnPool),
    "postgresql-engine": _on_postgres(OnEngine),
    "psycopg-engine": _on_postgres(OnPsycopgEngine),
    "joined-sqlite-connection": _on_sqlite(partial(Joined, way="sqlite-connection")),
    "joined-sqlite-session": _on_sqlite(partial(Joined, way="sqlite-session")),
    "joined-postgresql-connection": _on_postgres(partial(Joined, way="postgresql-connection")),
    "joined-postgresql-session": _on_postgres(partial(Joined, way="postgresql-session")),
    "joined-psycopg-connection": _on_postgres(
        partial(Joined, way="postgresql-connection", scheme=PSYCOPG)
    ),
    "joined-asyncpg-connection": _on_postgres(partial(Joined, way="asyncpg-connection")),
    "joined-asyncpg-pool": _on_postgres(partial(Joined, way="asyncpg-pool")),
}
"""Each embodiment by its name."""

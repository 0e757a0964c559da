"""Applications without an event loop, with their own transactions on each kind of connection."""

from __future__ import annotations

import asyncio
import sqlite3
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

import django
import psycopg
from django.conf import settings
from django.db import connections, transaction
from django.utils.connection import ConnectionProxy
from psycopg.rows import dict_row
from sqlalchemy import NullPool, create_engine, make_url, text
from sqlalchemy.orm import Session

from incidentkit import SyncIncidentClient
from tests.conformance.awaited import Awaited
from tests.hosts import Host

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

SYNC_WAYS = (
    "sync-sqlalchemy-postgresql",
    "sync-session-sqlite",
    "sync-psycopg",
    "sync-sqlite3",
    "sync-django-postgresql",
    "sync-django-sqlite",
)

_T = TypeVar("_T")

if not settings.configured:
    settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3"}})
    django.setup()

_aliases = (f"host{number}" for number in count(1))


class SyncHost(ABC):
    """An application's connection, used by one thread.

    Attributes:
        connection: The object to join.
    """

    connection: Any

    def begin(self) -> None:  # noqa: B027
        """Begin a transaction, unless the first statement does."""

    @abstractmethod
    def commit(self) -> None:
        """Commit the transaction."""

    @abstractmethod
    def rollback(self) -> None:
        """Roll the transaction back."""

    @abstractmethod
    def close(self) -> None:
        """Close the connection."""

    @abstractmethod
    def save(self) -> None:
        """Create a savepoint inside the current ones."""

    @abstractmethod
    def keep(self) -> None:
        """Release the innermost savepoint."""

    @abstractmethod
    def take_back(self) -> None:
        """Roll back to the innermost savepoint."""

    @abstractmethod
    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement of the application and return its rows."""


class SqlalchemySyncHost(SyncHost):
    """A host on a connection or session of SQLAlchemy."""

    def __init__(self, url: str, *, session: bool = False, **options: Any) -> None:
        self._engine = create_engine(url, poolclass=NullPool, connect_args=options)
        self.connection = Session(self._engine) if session else self._engine.connect()
        self._savepoints: list[Any] = []

    def commit(self) -> None:
        """Commit the transaction."""
        self._savepoints.clear()
        self.connection.commit()

    def rollback(self) -> None:
        """Roll the transaction back."""
        self._savepoints.clear()
        self.connection.rollback()

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()
        self._engine.dispose()

    def save(self) -> None:
        """Create a savepoint."""
        self._savepoints.append(self.connection.begin_nested())

    def keep(self) -> None:
        """Release the innermost savepoint."""
        self._savepoints.pop().commit()

    def take_back(self) -> None:
        """Roll back to the innermost savepoint."""
        self._savepoints.pop().rollback()

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement."""
        result = self.connection.execute(text(statement))
        return [tuple(row) for row in result] if result.returns_rows else []


class DriverHost(SyncHost):
    """A host on a connection of a driver, with savepoints as SQL."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self._savepoints: list[str] = []

    def commit(self) -> None:
        """Commit the transaction."""
        self._savepoints.clear()
        self.connection.commit()

    def rollback(self) -> None:
        """Roll the transaction back."""
        self._savepoints.clear()
        self.connection.rollback()

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()

    def save(self) -> None:
        """Create a savepoint."""
        self._savepoints.append(f"s{len(self._savepoints)}")
        self.connection.execute(f"SAVEPOINT {self._savepoints[-1]}")

    def keep(self) -> None:
        """Release the innermost savepoint."""
        self.connection.execute(f"RELEASE SAVEPOINT {self._savepoints.pop()}")

    def take_back(self) -> None:
        """Roll back to the innermost savepoint."""
        self.connection.execute(f"ROLLBACK TO SAVEPOINT {self._savepoints[-1]}")
        self.keep()


class PsycopgHost(DriverHost):
    """A host on psycopg, with rows as dicts."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(psycopg.connect(url, **options))
        self.connection.row_factory = dict_row

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement."""
        cursor = self.connection.execute(statement)
        return [tuple(row.values()) for row in cursor] if cursor.description else []


class SqliteHost(DriverHost):
    """A host on the module ``sqlite3`` that begins its transactions itself, with rows by name."""

    def __init__(self, path: str) -> None:
        super().__init__(sqlite3.connect(path, isolation_level=None))
        self.connection.row_factory = sqlite3.Row

    def begin(self) -> None:
        """Begin a transaction."""
        self.connection.execute("BEGIN")

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement."""
        return [tuple(row) for row in self.connection.execute(statement)]


class DjangoHost(SyncHost):
    """A host on Django, with a block of `transaction.atomic()` for each transaction."""

    def __init__(self, **database: Any) -> None:
        self._alias = next(_aliases)
        default = connections.settings["default"]
        connections.settings[self._alias] = {**default, **database}
        self.connection = ConnectionProxy(connections, self._alias)
        self._blocks: list[Any] = []

    def begin(self) -> None:
        """Begin a transaction."""
        self.save()

    def commit(self) -> None:
        """Commit the transaction."""
        while self._blocks:
            self.keep()

    def rollback(self) -> None:
        """Roll the transaction back."""
        while self._blocks:
            self.take_back()

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()
        del connections[self._alias], connections.settings[self._alias]

    def save(self) -> None:
        """Enter a block, which creates a savepoint if it is not the outermost."""
        self._blocks.append(transaction.atomic(using=self._alias))
        self._blocks[-1].__enter__()

    def keep(self) -> None:
        """Leave the innermost block."""
        self._blocks.pop().__exit__(None, None, None)

    def take_back(self) -> None:
        """Leave the innermost block with an exception."""
        error = ConnectionError("the bank does not answer")
        self._blocks.pop().__exit__(type(error), error, None)

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement."""
        with self.connection.cursor() as cursor:
            cursor.execute(statement)
            return list(cursor.fetchall()) if cursor.description else []


def sync_host(way: str, url: str, **options: Any) -> SyncHost:
    """Connect a host in the calling thread; the options are those of the driver."""
    path = url.removeprefix("sqlite+aiosqlite:///")
    if way == "sync-sqlalchemy-postgresql":
        return SqlalchemySyncHost(url.replace("postgresql", "postgresql+psycopg", 1), **options)
    if way == "sync-session-sqlite":
        return SqlalchemySyncHost(f"sqlite:///{path}", session=True)
    if way == "sync-psycopg":
        return PsycopgHost(url, **options)
    if way == "sync-sqlite3":
        return SqliteHost(path)
    if way == "sync-django-sqlite":
        return DjangoHost(ENGINE="django.db.backends.sqlite3", NAME=path)
    return DjangoHost(**django_database(url), OPTIONS=options)


def django_database(url: str) -> dict[str, Any]:
    """Return the settings of Django for a URL of PostgreSQL."""
    parsed = make_url(url)
    return {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": parsed.host or parsed.query.get("host", ""),
        "PORT": str(parsed.port or parsed.query.get("port", "")),
        "NAME": parsed.database,
        "USER": parsed.username or "",
        "PASSWORD": parsed.password or "",
    }


class InThread(Host):
    """A host without an event loop, whose calls run in a thread of its own."""

    def __init__(
        self, url: str, host: SyncHost, client: SyncIncidentClient, thread: ThreadPoolExecutor
    ) -> None:
        self.url = url
        self.connection = host.connection
        self._host = host
        self._client = client
        self._thread = thread

    async def join(self, client: object = None) -> Any:  # noqa: ARG002
        """Return the verbs in the transaction, of a synchronous client of the host's own."""
        joined = await self.call(self._client.join, self.connection)
        return Awaited(joined, self._thread)

    async def call(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Call a function in the thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, function, *arguments)

    async def begin(self) -> None:
        """Begin a transaction."""
        await self.call(self._host.begin)

    async def commit(self) -> None:
        """Commit the transaction."""
        await self.call(self._host.commit)

    async def rollback(self) -> None:
        """Roll the transaction back."""
        await self.call(self._host.rollback)

    async def save(self) -> None:
        """Create a savepoint."""
        await self.call(self._host.save)

    async def keep(self) -> None:
        """Release the innermost savepoint."""
        await self.call(self._host.keep)

    async def take_back(self) -> None:
        """Roll back to the innermost savepoint."""
        await self.call(self._host.take_back)

    async def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement."""
        return await self.call(self._host.execute, statement)


@asynccontextmanager
async def open_sync_host(
    way: str, url: str, connect: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[InThread]:
    """Open a host in a thread of its own, with a client.

    Args:
        way: The kind of connection, one of `SYNC_WAYS`.
        url: The database.
        connect: Options of the driver.
        **options: Options of `SyncIncidentClient.open`.
    """
    client = SyncIncidentClient.open(url, **options)
    with ThreadPoolExecutor(1) as thread:
        loop = asyncio.get_running_loop()

        async def call(function: Callable[..., _T], *arguments: Any) -> _T:
            return await loop.run_in_executor(thread, function, *arguments)

        async with AsyncExitStack() as stack:
            await call(client.connect)
            stack.push_async_callback(call, client.close)
            host = await call(lambda: sync_host(way, url, **(connect or {})))
            stack.push_async_callback(call, host.close)
            yield InThread(url, host, client, thread)

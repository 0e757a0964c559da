"""Applications with their own transactions, on each kind of connection that can be joined."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import asyncpg
from sqlalchemy import NullPool, event, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine

from incidentkit.store.migrate import upgrade

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from incidentkit import IncidentClient

WAYS = (
    "sqlite-connection",
    "sqlite-session",
    "postgresql-connection",
    "postgresql-session",
    "asyncpg-connection",
    "asyncpg-pool",
)


class Host(ABC):
    """An application's connection, with a table `orders` and one transaction at a time.

    Attributes:
        url: The database.
        connection: The object to join, once `begin` has returned.
    """

    url: str
    connection: Any

    async def join(self, client: IncidentClient) -> Any:
        """Return the verbs in the transaction."""
        return client.join(self.connection)

    @abstractmethod
    async def begin(self) -> None:
        """Begin a transaction."""

    @abstractmethod
    async def commit(self) -> None:
        """Commit the transaction."""

    @abstractmethod
    async def rollback(self) -> None:
        """Roll the transaction back."""

    @abstractmethod
    async def save(self) -> None:
        """Create a savepoint inside the current ones."""

    @abstractmethod
    async def keep(self) -> None:
        """Release the innermost savepoint."""

    @abstractmethod
    async def take_back(self) -> None:
        """Roll back to the innermost savepoint."""

    @abstractmethod
    async def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement of the application and return its rows."""

    async def order(self, order_id: int) -> None:
        """Store an order."""
        await self.execute(f"INSERT INTO orders (order_id) VALUES ({order_id})")

    async def orders(self) -> list[int]:
        """Return the orders that the transaction sees."""
        rows = await self.execute("SELECT order_id FROM orders ORDER BY order_id")
        return [order_id for (order_id,) in rows]


class SqlalchemyHost(Host):
    """A host on an SQLAlchemy connection or session."""

    def __init__(self, url: str, connection: AsyncConnection | AsyncSession) -> None:
        self.url = url
        self.connection: AsyncConnection | AsyncSession = connection
        self._savepoints: list[Any] = []

    async def begin(self) -> None:
        """Begin a transaction with a write: on SQLite, a savepoint alone would not begin one."""
        await self.execute("DELETE FROM orders WHERE order_id = 0")

    async def commit(self) -> None:
        """Commit the transaction."""
        self._savepoints.clear()
        await self.connection.commit()

    async def rollback(self) -> None:
        """Roll the transaction back."""
        self._savepoints.clear()
        await self.connection.rollback()

    async def save(self) -> None:
        """Create a savepoint."""
        self._savepoints.append(await self.connection.begin_nested())

    async def keep(self) -> None:
        """Release the innermost savepoint."""
        await self._savepoints.pop().commit()

    async def take_back(self) -> None:
        """Roll back to the innermost savepoint."""
        await self._savepoints.pop().rollback()

    async def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement."""
        result: Any = await self.connection.execute(text(statement))
        return [tuple(row) for row in result] if result.returns_rows else []


class AsyncpgHost(Host):
    """A host on an asyncpg connection, its own or a pool's."""

    def __init__(self, url: str, connection: Any) -> None:
        self.url = url
        self.connection = connection
        self._transactions: list[Any] = []

    async def begin(self) -> None:
        """Begin a transaction."""
        await self.save()

    async def commit(self) -> None:
        """Commit the transaction."""
        while self._transactions:
            await self.keep()

    async def rollback(self) -> None:
        """Roll the transaction back."""
        while self._transactions:
            await self.take_back()

    async def save(self) -> None:
        """Create a savepoint, or begin the transaction if there is none."""
        self._transactions.append(self.connection.transaction())
        await self._transactions[-1].start()

    async def keep(self) -> None:
        """Release the innermost savepoint."""
        await self._transactions.pop().commit()

    async def take_back(self) -> None:
        """Roll back to the innermost savepoint."""
        await self._transactions.pop().rollback()

    async def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement."""
        return [tuple(row) for row in await self.connection.fetch(statement)]


def sqlalchemy_url(url: str) -> str:
    """Return the URL with the driver name that SQLAlchemy needs."""
    return url.replace("postgresql://", "postgresql+asyncpg://")


@asynccontextmanager
async def host_engine(url: str, **options: Any) -> AsyncIterator[AsyncEngine]:
    """Open an engine and dispose of it at the end."""
    engine = create_async_engine(sqlalchemy_url(url), **options)
    try:
        yield engine
    finally:
        await engine.dispose()


def begin_by_itself(engine: AsyncEngine) -> None:
    """Make an SQLite engine emit BEGIN itself, as SQLAlchemy's documentation shows."""

    @event.listens_for(engine.sync_engine, "connect")
    def connect(connection: Any, _: object) -> None:
        connection.isolation_level = None

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")


def naming_nothing(url: str) -> dict[str, Any]:
    """Return what a driver takes to prepare no statement under a name, as behind a pooler."""
    scheme = url.partition("://")[0]
    if scheme == "postgresql+psycopg":
        return {"prepare_threshold": None}
    own = {"prepared_statement_name_func": str} if scheme == "postgresql+asyncpg" else {}
    return {"statement_cache_size": 0, **own}


@asynccontextmanager
async def open_host(way: str, url: str, **options: Any) -> AsyncIterator[Host]:
    """Open an application's connection to a database that has a table `orders`.

    The options are those of the driver.
    """
    async with AsyncExitStack() as stack:
        if way == "asyncpg-connection":
            connection = await asyncpg.connect(url, **options)
            stack.push_async_callback(connection.close)
            yield AsyncpgHost(url, connection)
        elif way == "asyncpg-pool":
            pool = await stack.enter_async_context(asyncpg.create_pool(url, min_size=1, **options))
            yield AsyncpgHost(url, await stack.enter_async_context(pool.acquire()))
        else:
            engine = await stack.enter_async_context(
                host_engine(url, poolclass=NullPool, connect_args=options)
            )
            open_one: Any = AsyncSession if way.endswith("session") else AsyncEngine.connect
            yield SqlalchemyHost(url, await stack.enter_async_context(open_one(engine)))


async def prepared(url: str) -> str:
    """Give a database the schema and the table `orders`, and return its URL."""
    if url.startswith("sqlite"):
        await upgrade(url)
    await run_sql(url, "CREATE TABLE orders (order_id INTEGER PRIMARY KEY)")
    return url


async def run_sql(
    url: str, statement: str, *, commit: bool = True, **options: Any
) -> list[tuple[Any, ...]]:
    """Run a statement on a new connection, commit or roll back, and return its rows.

    The options are those of the driver.
    """
    async with (
        host_engine(url, poolclass=NullPool, connect_args=options) as engine,
        engine.connect() as connection,
    ):
        result = await connection.execute(text(statement))
        rows = [tuple(row) for row in result] if result.returns_rows else []
        if commit:
            await connection.commit()
        return rows

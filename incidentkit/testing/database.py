"""Keep incidents in a private SQLite database in memory, for any thread and event loop."""

from __future__ import annotations

import atexit
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from sqlalchemy import Connection, Executable
from sqlalchemy.exc import DBAPIError

from incidentkit.domain.errors import ClientClosed, IncidentKitError, StoreError
from incidentkit.store.executor import Rows, Work
from incidentkit.store.migrate import upgrade_connection
from incidentkit.store.options import StoreOptions
from incidentkit.store.ports import StoreOperations
from incidentkit.store.records import Records
from incidentkit.store.sqlite.dialect import SqliteDialect
from incidentkit.store.sqlite.errors import translate_error
from incidentkit.store.sqlite.file import open_engine
from incidentkit.store.sqlite.url import sqlite_url
from incidentkit.sync.immediate import run_immediately

_T = TypeVar("_T")

URL: Final = "sqlite+aiosqlite:///:memory:"

FORKED: Final = (
    "the incidents of the test are in the memory of the parent process; in both processes, open a "
    "client on the fixture incidentkit_url"
)


class PrivateDatabase:
    """An SQLite database in memory with the current schema and no incidents.

    Clients in any thread and on any event loop can share it. It exists until it is closed, no
    matter how often clients are opened and closed. Statements run one at a time, in the calling
    thread.
    """

    def __init__(self) -> None:
        self._engine = open_engine(sqlite_url(URL), StoreOptions())
        self._turn = RLock()
        self._process = os.getpid()
        self._closed = False
        self._now: Callable[[], datetime] = partial(datetime.now, UTC)
        with self._engine.connect() as connection:
            # Some builds of SQLite otherwise forbid Python's functions, such as a frozen clock's,
            # in triggers.
            connection.exec_driver_sql("PRAGMA trusted_schema = ON")
            _template().backup(_driver(connection))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Discard the database; later calls raise :class:`~incidentkit.ClientClosed`."""
        with self._turn:
            self._closed = True
            self._engine.dispose()

    def store(self) -> PrivateStore:
        """Return a store on this database."""
        return PrivateStore(self)

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """Lend the connection to one thread at a time.

        Raises:
            ClientClosed: If the database is closed.
            StoreError: In a forked process, or if a statement fails.
        """
        if os.getpid() != self._process:
            raise StoreError(FORKED)
        with self._turn:
            if self._closed:
                raise ClientClosed
            try:
                with self._engine.connect() as connection:
                    yield connection
            except IncidentKitError:
                raise
            except Exception as error:
                raise translate_error(error) from error

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Lend the connection for a transaction, which is rolled back after an exception."""
        with self.connection() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.exec_driver_sql("COMMIT")
            except BaseException:
                # After some errors, SQLite has already rolled back.
                with suppress(DBAPIError):
                    connection.exec_driver_sql("ROLLBACK")
                raise

    @contextmanager
    def frozen(self, now: Callable[[], datetime]) -> Iterator[None]:
        """Make SQL statements take the time, in UTC, from a function."""
        with self.connection() as connection:
            driver = _driver(connection)
            # These replace SQLite's own functions. After the block, they return the current time.
            driver.create_function("current_timestamp", 0, self._timestamp)
            driver.create_function("datetime", 2, self._datetime)
        before, self._now = self._now, now
        try:
            yield
        finally:
            self._now = before

    def _timestamp(self) -> str:
        # Not strftime(): on some platforms its %Y has no leading zeros.
        return self._now().replace(tzinfo=None).isoformat(sep=" ", timespec="seconds")

    def _datetime(self, time: object, modifier: object) -> str | None:
        given = (self._timestamp() if time == "now" else time, modifier)
        text: str | None = _template().execute("SELECT datetime(?, ?)", given).fetchone()[0]
        return text


class PrivateStore(Records):
    """The store of a client on a private database.

    A joined connection has no effect: each write is committed to the private database at once.

    Args:
        database: The database.

    Attributes:
        database: The database.
    """

    def __init__(self, database: PrivateDatabase) -> None:
        executor = PrivateExecutor(database)
        super().__init__(SqliteDialect(), executor)
        self.database = database
        self.fetch = executor.read
        self.transact = executor.transact
        self.append = executor.append

    async def open(self) -> None:
        """Do nothing: the database is open."""

    async def close(self) -> None:
        """Do nothing: the database outlives its clients."""

    async def check(self) -> None:
        """Raise unless the database is open."""
        await self.token()

    def join(self, connection: object) -> StoreOperations:  # noqa: ARG002
        """Return the operations on the private database, for any connection."""
        return Records(SqliteDialect(), PrivateExecutor(self.database))

    def join_sync(self, connection: object) -> StoreOperations:
        """Return the operations on the private database, for any connection."""
        return self.join(connection)


class PrivateExecutor:
    """Runs statements on a private database. Its coroutines never suspend.

    Args:
        database: The database.
    """

    in_host_transaction = False
    place = ":memory:"

    def __init__(self, database: PrivateDatabase) -> None:
        self._database = database

    async def read(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement that only reads."""
        with self._database.connection() as connection:
            return _fetch(connection, statement, values)

    async def scan(self, work: Work[_T]) -> _T:
        """Run statements that only read."""
        return await work(self.read)

    async def write(self, work: Work[_T]) -> _T:
        """Run statements that write, in one transaction."""

        async def write(connection: Connection) -> _T:
            async def fetch(statement: Executable, values: Mapping[str, Any]) -> Rows:
                return _fetch(connection, statement, values)

            return await work(fetch)

        with self._database.transaction() as connection:
            return run_immediately(write(connection))

    async def transact(self, work: Work[_T]) -> _T:
        """Run statements that write, all or none, as :meth:`write` does."""
        return await self.write(work)

    async def append(self, statement: Executable, rows: Sequence[Mapping[str, Any]]) -> None:
        """Run a statement that inserts, once for each row, in one transaction."""
        # SQLAlchemy accepts several sets of values for a statement that returns no rows.
        values: Any = rows
        await self.write(lambda fetch: fetch(statement, values))


def private_url(file: Path) -> str:
    """Create an SQLite file with the current schema and no incidents, and return its URL.

    Args:
        file: Its absolute path, where no file exists yet.
    """
    with closing(sqlite3.connect(file)) as connection:
        _template().backup(connection)
    return f"sqlite+aiosqlite:///{file}"


def _fetch(connection: Connection, statement: Executable, values: Mapping[str, Any]) -> Rows:
    result = connection.execute(statement, values)
    return result.all() if result.returns_rows else ()


def _driver(connection: Connection) -> sqlite3.Connection:
    driver: Any = connection.connection.driver_connection
    found: sqlite3.Connection = driver
    return found


@cache
def _template() -> sqlite3.Connection:
    """Return an empty database with the current schema; only the first call migrates one."""
    engine = open_engine(sqlite_url(URL), StoreOptions())
    with engine.connect() as connection:
        upgrade_connection(connection)
        driver = _driver(connection)
    atexit.register(engine.dispose)
    return driver

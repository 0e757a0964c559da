"""A process that writes and reads incidents, and logs each call before and after it.

It runs until its standard input ends. Its arguments are those of :class:`Settings`, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import sys
import time
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from random import Random
from typing import TYPE_CHECKING, Any, Protocol
from unittest import mock

import asyncpg
from attrs import define, evolve, field, frozen

from incidentkit import (
    IncidentClient,
    IncidentSource,
    IncidentStatus,
    StoreError,
    StoreUnavailable,
    acting_as,
)
from incidentkit.cache.base import TTL
from incidentkit.store.page import Page
from incidentkit.store.postgresql.driver import compile_statement
from incidentkit.store.postgresql.statements import _IN_ORDER
from tests.faults.history import Query, Row, Write, note_end, note_read, note_write

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from sqlalchemy import Executable

    from incidentkit import Incident, ListQuery
    from incidentkit.cache.pages import PageCache
    from incidentkit.store.postgresql.driver import Compiled

STATUSES = [status.value for status in IncidentStatus]
SOURCES = [source.value for source in IncidentSource]

QUERIES = [
    Query(1, 3),
    Query(1, 10),
    Query(2, 3),
    Query(2, 10),
    Query(3, 10),
    Query(1, 10, status="new"),
    Query(2, 5, status="completed"),
    Query(1, 10, source="partner"),
    Query(1, 5, status="failed", source="operator"),
    Query(1, 100),
]
"""Few, so that most are cached unless something was written."""

WRITES = 0.12
"""The fraction of a writing task's calls that write."""

RETRIES = 5
"""Maximum retries of a create, with its idempotency key."""

HELD = 0.01
"""Maximum seconds that a plain SQL transaction stays open after its statement."""

BETWEEN = 0.05
"""Maximum seconds between plain SQL transactions."""


@frozen
class Settings:
    """The settings of a worker.

    Attributes:
        name: The prefix of its incidents' messages.
        log: The file in which it logs its calls.
        database_url: The database of the incidents.
        redis_url: The Redis that caches lists; None: cache in the process only.
        sql: Whether it writes by plain SQL, without incidentkit.
        mutant: The name of a deliberate bug in ``MUTANTS`` or ``GUARD_MUTANTS``, or None.
        lists: Whether it only lists each page once.
    """

    name: str
    log: str
    database_url: str
    redis_url: str | None = None
    sql: bool = False
    mutant: str | None = None
    lists: bool = False


@define
class Notes:
    """The log of one process; each line goes straight to the operating system."""

    file: int
    calls: int = 0
    filled: int = 0

    def begin(self, make: Callable[[int, int], bytes]) -> int:
        """Log the start of a call, and return its number."""
        self.calls += 1
        os.write(self.file, make(self.calls, time.monotonic_ns()))
        return self.calls

    def end(self, call: int, rows: list[Row]) -> None:
        """Log that a call has succeeded."""
        end = time.monotonic_ns()
        os.write(self.file, note_end(call, end, "done", rows, filled=self.filled))

    def fail(self, call: int, error: Exception) -> None:
        """Log that the outcome of a call is unknown."""
        end = time.monotonic_ns()
        os.write(self.file, note_end(call, end, "unknown", error=type(error).__name__))

    def undo(self, call: int) -> None:
        """Log that a write was rolled back."""
        os.write(self.file, note_end(call, time.monotonic_ns(), "undone"))


@define
class Owned:
    """An incident whose status only this process changes."""

    incident_id: int
    message: str
    source: str
    statuses: list[str]


class RolledBack(Exception):
    """The write was rolled back on purpose."""


class Target(Protocol):
    """Writes incidents for a task; a failure may hide a commit."""

    async def create(self, message: str, status: Any, source: Any) -> Row:
        """Store an incident."""
        ...

    async def change(self, incident_id: int, status: str) -> Row:
        """Change a status."""
        ...


@define
class Writer:
    """Creates incidents, and moves each through all statuses."""

    name: str
    notes: Notes
    target: Target
    random: Random
    owned: list[Owned] = field(factory=list)
    made: int = 0

    async def write(self) -> None:
        """Create an incident or change one."""
        if self.owned and self.random.random() < 2 / 3:
            await self._change(self.random.randrange(len(self.owned)))
        else:
            await self._create()

    async def _create(self) -> None:
        self.made += 1
        message = f"{self.name} {self.made:06}"
        source = self.random.choice(SOURCES)
        first, *later = self.random.sample(STATUSES, len(STATUSES))
        create = self.target.create(message, first, source)
        row = await self._noted(message, first, source, create)
        if row is not None:
            self.owned.append(Owned(row.incident_id, message, source, later))

    async def _change(self, number: int) -> None:
        incident = self.owned[number]
        status = incident.statuses[0]
        change = self.target.change(incident.incident_id, status)
        try:
            row = await self._noted(incident.message, status, incident.source, change)
        except RolledBack:
            return
        if row is not None:
            del incident.statuses[0]
        if row is None or not incident.statuses:
            del self.owned[number]

    async def _noted(
        self, message: str, status: str, source: str, write: Awaitable[Row]
    ) -> Row | None:
        call = self.notes.begin(
            lambda call, start: note_write(call, Write(message, status, source, start))
        )
        try:
            row = await write
        except RolledBack:
            self.notes.undo(call)
            raise
        except (StoreUnavailable, *LOST) as error:
            self.notes.fail(call, error)
            return None
        self.notes.end(call, [row])
        return row


LOST = (
    OSError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.OperatorInterventionError,
    asyncpg.PostgresConnectionError,
    sqlite3.OperationalError,
)
"""Errors of plain SQL when a connection ends or a file stays locked."""


def row_of(incident: Incident) -> Row:
    """Return an incident as a row of the log."""
    return Row(
        incident.incident_id,
        incident.incident_message,
        incident.incident_type.value,
        incident.source.value,
        f"{incident.created_at:%Y-%m-%d %H:%M:%S}",
    )


@define
class ClientTarget:
    """Writes incidents through incidentkit."""

    client: IncidentClient

    async def create(self, message: str, status: Any, source: Any) -> Row:
        """Store an incident, and retry while its outcome is unknown."""
        with refusals():
            for _ in range(RETRIES):
                with suppress(StoreUnavailable):
                    return await self._create(message, status, source)
                await asyncio.sleep(BETWEEN)
            return await self._create(message, status, source)

    async def _create(self, message: str, status: Any, source: Any) -> Row:
        with acting_as(message.partition(" ")[0]):
            incident = await self.client.create(
                message, source=source, incident_type=status, idempotency_key=message
            )
        return row_of(incident)

    async def change(self, incident_id: int, status: Any) -> Row:
        """Change a status."""
        with refusals():
            return row_of(await self.client.update_status(incident_id, status))


@contextmanager
def refusals() -> Iterator[None]:
    """Take a refusal to write into a database that was restored elsewhere as a rollback."""
    try:
        yield
    except StoreError as error:
        if "copied from another server" not in str(error):
            raise
        raise RolledBack from error


COLUMNS = "incident_id, incident_message, incident_type, source, created_at"
INSERT = (
    'INSERT INTO "Incident" (incident_message, incident_type, source) '
    f"VALUES ($1, $2, $3) RETURNING {COLUMNS}"
)
UPDATE = f'UPDATE "Incident" SET incident_type = $2 WHERE incident_id = $1 RETURNING {COLUMNS}'


@define
class SqlTarget:
    """Writes incidents by plain SQL, in transactions that stay open for a moment."""

    transact: Callable[[str, tuple[object, ...], Moment], Awaitable[Row]]
    random: Random

    async def create(self, message: str, status: Any, source: Any) -> Row:
        """Store an incident."""
        return await self._transact(INSERT, message, status, source)

    async def change(self, incident_id: int, status: str) -> Row:
        """Change a status."""
        return await self._transact(UPDATE, incident_id, status)

    async def _transact(self, statement: str, *arguments: object) -> Row:
        moment = Moment(self.random.uniform(0, HELD), undo=self.random.random() < 1 / 8)
        return await self.transact(statement, arguments, moment)


@frozen
class Moment:
    """The end of a transaction: after how many seconds, and whether by a rollback."""

    seconds: float
    undo: bool


@define
class PostgresSql:
    """Runs transactions on PostgreSQL, and reconnects after a lost connection."""

    url: str
    connection: asyncpg.Connection[asyncpg.Record] | None = None

    async def __call__(self, statement: str, arguments: tuple[object, ...], moment: Moment) -> Row:
        """Run a statement in a transaction."""
        connection = self.connection
        if connection is None or connection.is_closed():
            connection = self.connection = await asyncpg.connect(self.url)
        try:
            await connection.execute("BEGIN")
            values = await connection.fetchrow(statement, *arguments)
            await asyncio.sleep(moment.seconds)
            await connection.execute("ROLLBACK" if moment.undo else "COMMIT")
        except LOST:
            connection.terminate()
            raise
        if moment.undo:
            raise RolledBack
        assert values is not None
        incident_id, message, status, source, created_at = values
        return Row(incident_id, message, status, source, f"{created_at:%Y-%m-%d %H:%M:%S}")

    async def close(self) -> None:
        """Close the connection."""
        if self.connection is not None:
            self.connection.terminate()


def sqlite_file(database_url: str) -> str:
    """Return the file of a database."""
    return database_url.removeprefix("sqlite+aiosqlite:///")


@define
class SqliteSql:
    """Runs transactions on an SQLite file, each on its own connection."""

    url: str

    async def __call__(self, statement: str, arguments: tuple[object, ...], moment: Moment) -> Row:
        """Run a statement in a transaction."""
        return await asyncio.to_thread(self._run, statement, arguments, moment)

    def _run(self, statement: str, arguments: tuple[object, ...], moment: Moment) -> Row:
        numbered = {str(number): value for number, value in enumerate(arguments, 1)}
        connection = sqlite3.connect(sqlite_file(self.url), timeout=30, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            values = connection.execute(statement, numbered).fetchone()
            time.sleep(moment.seconds)
            if moment.undo:
                connection.execute("ROLLBACK")
                raise RolledBack
            connection.execute("COMMIT")
            return Row(*values)
        finally:
            connection.close()

    async def close(self) -> None:
        """Do nothing: no connection is kept open."""


async def read(client: IncidentClient, notes: Notes, query: Query) -> None:
    """Read a list."""
    call = notes.begin(lambda call, start: note_read(call, query, start))
    try:
        incidents = await client.list(query.page, query.limit, query.status, query.source)
    except StoreUnavailable as error:
        notes.fail(call, error)
    else:
        notes.end(call, [row_of(incident) for incident in incidents])


async def trust_everything(self: PageCache, query: ListQuery) -> Page:
    """Return the page that the process has cached, of any age."""
    await asyncio.sleep(0)
    return self._memory.get(query.cache_key) or await self._reads(query)


async def fill_late(self: PageCache, query: ListQuery) -> Page:
    """Cache a page with a token that is read later, in another snapshot."""
    read = await self._store.list(query)
    token = await self._store.token()
    page = Page(read.incidents, token)
    self._memory.set(query.cache_key, page, TTL)
    return page


def compile_without_order(statement: Executable) -> Compiled:
    """Return a statement that does not look whether events are in order."""
    compiled = compile_statement(statement)
    return evolve(compiled, text=compiled.text.replace(_IN_ORDER, "true"))


UNORDERED = "unordered"

MUTANTS = {
    "any token": ("incidentkit.cache.pages.PageCache.page", trust_everything),
    "late token": ("incidentkit.cache.pages.PageCache._fill", fill_late),
    UNORDERED: (
        "incidentkit.store.postgresql.connection.compile_statement",
        compile_without_order,
    ),
}

STALE_MUTANTS = [name for name in MUTANTS if name != UNORDERED]
"""The mutants that trust outdated pages."""


ROWS_ON_POSTGRESQL = """(
    SELECT CASE WHEN count(*) FILTER (WHERE slot < 16) = 16 THEN
        encode(sha256(string_agg(uuid_send(token), CAST('' AS bytea) ORDER BY slot)), 'hex')
    END
    FROM incident_token
)"""
ROWS_ON_SQLITE = "(SELECT token FROM incident_token WHERE slot = 0)"

GUARD_MUTANTS = {
    "rows alone": [
        ("incidentkit.store.sql.functions.TOKEN_ON_POSTGRESQL", ROWS_ON_POSTGRESQL),
        ("incidentkit.store.sql.functions.TOKEN_ON_SQLITE", ROWS_ON_SQLITE),
    ],
}
"""Bugs in the statement of the token: it sees the rows of the tokens, not their place or guard."""


@asynccontextmanager
async def opened(settings: Settings, notes: Notes) -> AsyncIterator[IncidentClient]:
    """Open a client that counts the pages read from the database."""
    client = IncidentClient.open(settings.database_url, settings.redis_url)
    list_page = client.store.list

    async def counted(query: ListQuery) -> Page:
        notes.filled += 1
        return await list_page(query)

    async with AsyncExitStack() as stack:
        stack.enter_context(mock.patch.object(client.store, "list", counted))
        if settings.mutant in MUTANTS:
            stack.enter_context(mock.patch(*MUTANTS[settings.mutant]))
        for target, text in GUARD_MUTANTS.get(settings.mutant or "", ()):
            stack.enter_context(mock.patch(target, text))
        yield await stack.enter_async_context(client)


async def use_client(settings: Settings, notes: Notes, stopping: asyncio.Event) -> None:
    """Run tasks that only read, and tasks that also write, on one client."""

    async def only_read(random: Random) -> None:
        while not stopping.is_set():
            await read(client, notes, random.choice(QUERIES))

    async def read_and_write(name: str, random: Random) -> None:
        writer = Writer(name, notes, ClientTarget(client), random)
        while not stopping.is_set():
            if random.random() < WRITES:
                with suppress(RolledBack):
                    await writer.write()
            await read(client, notes, random.choice(QUERIES))

    async with opened(settings, notes) as client, asyncio.TaskGroup() as tasks:
        for number in range(2):
            tasks.create_task(only_read(Random(f"{settings.name} r{number}")))
            name = f"{settings.name}{'ab'[number]}"
            tasks.create_task(read_and_write(name, Random(name)))


async def list_once(settings: Settings, notes: Notes) -> None:
    """Read each list once, and leave the pages in Redis."""
    async with opened(settings, notes) as client:
        for query in QUERIES:
            await read(client, notes, query)
            await asyncio.sleep(BETWEEN)


async def use_sql(settings: Settings, notes: Notes, stopping: asyncio.Event) -> None:
    """Write by plain SQL, with a pause after each transaction."""
    postgresql = settings.database_url.startswith("postgresql")
    transact = (PostgresSql if postgresql else SqliteSql)(settings.database_url)
    random = Random(settings.name)
    writer = Writer(settings.name, notes, SqlTarget(transact, random), random)
    while not stopping.is_set():
        with suppress(RolledBack):
            await writer.write()
        await asyncio.sleep(random.uniform(0, BETWEEN))
    await transact.close()


async def work(settings: Settings) -> None:
    """Run the configured load until standard input ends."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    class Input(asyncio.Protocol):
        def connection_lost(self, exc: Exception | None) -> None:
            del exc
            stopping.set()

    transport, _ = await loop.connect_read_pipe(Input, sys.stdin)
    file = os.open(settings.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    notes = Notes(file)
    try:
        if settings.lists:
            await list_once(settings, notes)
        else:
            await (use_sql if settings.sql else use_client)(settings, notes, stopping)
    finally:
        transport.close()
        os.close(file)


def main() -> None:
    """Run the worker."""
    arguments: dict[str, Any] = json.loads(sys.argv[1])
    asyncio.run(work(Settings(**arguments)))


if __name__ == "__main__":
    main()

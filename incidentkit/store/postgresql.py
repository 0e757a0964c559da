"""Incidents in PostgreSQL, on an asyncpg pool.

The statements are compiled once from the Core expressions; SQLAlchemy takes no part in a call.
"""

from __future__ import annotations

import asyncio
import logging
import re
from contextlib import suppress
from functools import cache, partial
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

import asyncpg
from attrs import frozen
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
from sqlalchemy.exc import DBAPIError

from incidentkit.batching import Batcher
from incidentkit.domain.errors import (
    ClientClosed,
    DuplicateOpenIncident,
    IncidentKitError,
    InvalidSettings,
    SchemaOutOfDate,
    StoreError,
    StoreUnavailable,
)
from incidentkit.domain.transitions import ANY_TRANSITION
from incidentkit.domain.values import OPEN
from incidentkit.store import postgresql_statements as writes
from incidentkit.store import statements
from incidentkit.store.base import StoreOptions
from incidentkit.store.bookmarks import Bookmarks
from incidentkit.store.leases import Leases
from incidentkit.store.operations import EVENTS, Operations, found
from incidentkit.store.statements import read_event, read_incident, read_page
from incidentkit.store.tables import SCHEMA_REVISION, check_revision

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
    from datetime import datetime
    from types import TracebackType

    from asyncpg.pool import PoolConnectionProxy
    from sqlalchemy import Dialect, Executable

    from incidentkit.domain.commands import NewIncident, StatusChange
    from incidentkit.domain.queries import ListQuery
    from incidentkit.domain.transitions import Transitions
    from incidentkit.domain.values import Incident, IncidentEvent
    from incidentkit.store.base import Idempotency, Page, StoreOperations
    from incidentkit.store.operations import Fetch, Incidents, Rows

_T = TypeVar("_T")

BATCH: Final = 100
"""Calls that share a statement, at most."""

SMALL: Final = 100
PAGES: Final = 32
"""Incidents of a page that others share a statement with, and such pages of a statement, at most:
the rows of one are taken in without a pause."""

ROWS: Final = 2000
"""Incidents that one statement stores, at most."""

ATTEMPTS: Final = 10
"""How often a change is tried that others are faster than."""

logger = logging.getLogger("incidentkit.store")

_new_dialect: Any = PGDialect_asyncpg
_DIALECT: Final[Dialect] = _new_dialect()

_LOST: Final = (
    ConnectionError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
)
"""The connection died, the statement may be sent again on another if it only reads."""

_AWAY: Final = (
    *_LOST,
    OSError,
    TimeoutError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.TransactionRollbackError,
    asyncpg.LockNotAvailableError,
)
"""What may pass without anybody changing the statement or the schema."""

_ONE_OPEN: Final = "ux_Incident_dedup_key"

UNREADABLE_URL: Final = (ValueError, OverflowError)
"""What asyncpg raises on connecting if a URL cannot be read, or its port is none."""

_OTHER_SCHEMA: Final = (
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedColumnError,
    asyncpg.UndefinedObjectError,
    asyncpg.InvalidSchemaNameError,
)


@frozen
class _Compiled:
    """A statement as asyncpg takes it: the text, and the order of its parameters."""

    text: str
    parameters: tuple[str, ...]


def compile_statement(statement: Executable) -> _Compiled:
    """Return the statement as text for asyncpg."""
    clause: Any = statement
    compiled = clause.compile(dialect=_DIALECT)
    return _Compiled(compiled.string, tuple(compiled.positiontup or ()))


_compile: Final = cache(compile_statement)
"""Each statement is compiled when it is first run."""


async def fetch_rows(
    connection: asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record],
    statement: Executable,
    values: Mapping[str, Any],
) -> Rows:
    """Run a statement on a connection of asyncpg."""
    compiled = _compile(statement)
    return await connection.fetch(compiled.text, *[values[name] for name in compiled.parameters])


def asyncpg_dsn(database_url: str) -> str:
    """Return the URL as asyncpg takes it: without SQLAlchemy's driver name and its ``ssl=``."""
    server, mark, query = database_url.partition("://")[2].partition("?")
    parameters = [re.sub(r"^ssl=", "sslmode=", parameter) for parameter in query.split("&")]
    return f"postgresql://{server}{mark}{'&'.join(parameters)}"


def unreadable_url() -> InvalidSettings:
    """Return what a caller sees for a URL that asyncpg refuses."""
    return InvalidSettings("database_url", "is not a URL that PostgreSQL's driver can read")


def translate_error(error: Exception) -> StoreError:  # noqa: PLR0911
    """Return what a caller sees for an exception of asyncpg or of the network."""
    if isinstance(error, _OTHER_SCHEMA):
        return SchemaOutOfDate(None, SCHEMA_REVISION)
    if isinstance(error, asyncpg.InvalidAuthorizationSpecificationError):
        return StoreUnavailable("it refused the credentials")
    if isinstance(error, asyncpg.InvalidCatalogNameError):
        return StoreUnavailable("there is no such database on the server")
    if isinstance(error, TimeoutError):
        return StoreUnavailable("it did not answer in time")
    if isinstance(error, asyncpg.TransactionRollbackError):
        return StoreUnavailable("another transaction was in the way")
    if isinstance(error, _AWAY):
        return StoreUnavailable("the connection was refused or lost")
    if overtaken(error):
        return StoreUnavailable("another incident with its dedup_key was opened at the same time")
    sqlstate = getattr(error, "sqlstate", None)
    return StoreError(f"SQLSTATE {sqlstate}" if sqlstate else "unexpected failure of the driver")


def overtaken(error: BaseException | None) -> bool:
    """Return whether it says that another incident with the same key was opened meanwhile."""
    if isinstance(error, DBAPIError):
        error = driver_error(error)
    about = getattr(error, "diag", error)
    return getattr(about, "constraint_name", None) == _ONE_OPEN


def driver_error(error: DBAPIError) -> BaseException | None:
    """Return what the driver raised, which SQLAlchemy has wrapped once, or twice for asyncpg."""
    return error.orig and (error.orig.__cause__ or error.orig)


def refused(error: StoreError) -> bool:
    """Return whether the server said that it did not do what it was told."""
    cause = error.__cause__
    if isinstance(cause, DBAPIError):
        cause = driver_error(cause)
    sqlstate = getattr(cause, "sqlstate", None)
    # Not if it was told to stop, or is no longer there.
    return sqlstate is not None and not sqlstate.startswith(("08", "57"))


async def _keep_state(_: Any) -> None:
    """Skip asyncpg's reset query, a round trip for each call: our statements leave no state."""


class PostgresOperations(Operations):
    """What is done with incidents in PostgreSQL: each write in one statement."""

    _claim_key = writes.CLAIM_KEY
    _delete_expired_keys = writes.DELETE_EXPIRED_KEYS
    _words_match = writes.WORDS_MATCH
    _plans_once = True

    async def update_status(
        self,
        change: StatusChange,
        *,
        transitions: Transitions = ANY_TRANSITION,
        actor: str | None = None,
        once: Idempotency | None = None,
    ) -> Incident:
        """Change the status, with an event, and return the incident."""
        update = partial(
            super().update_status, change, transitions=transitions, actor=actor, once=once
        )
        try:
            return await update()
        except StoreUnavailable as error:
            if not overtaken(error.__cause__):
                raise
        # Nothing was changed, and the other one can be seen now.
        return await update()

    async def _create(self, fetch: Fetch, incident: NewIncident, actor: str | None) -> Incident:
        rows = await fetch(
            writes.INSERT_INCIDENT[incident.dedup_key is not None],
            {
                "incident_message": incident.incident_message,
                "incident_type": incident.incident_type.value,
                "source": incident.source.value,
                "dedup_key": incident.dedup_key,
                "actor": actor,
            },
        )
        return read_incident(rows[0])

    async def _create_many(
        self, fetch: Fetch, incidents: Sequence[NewIncident], actor: str | None
    ) -> Incidents:
        stored: dict[int, Incident] = {}
        keyless = [n for n, incident in enumerate(incidents) if incident.dedup_key is None]
        for numbers in _chunks(keyless, ROWS):
            values = values_of([(incidents[n], actor) for n in numbers])
            rows = await fetch(writes.INSERT_INCIDENTS, values)
            stored.update(zip(numbers, map(read_incident, rows), strict=True))
        while len(stored) < len(incidents):
            # Each key once; what comes again is counted by a later statement.
            first: dict[str, int] = {}
            for n, incident in enumerate(incidents):
                if incident.dedup_key is not None and n not in stored:
                    first.setdefault(incident.dedup_key, n)
            for keys in _chunks(sorted(first), ROWS):
                values = {
                    "messages": [incidents[first[key]].incident_message for key in keys],
                    "sources": [incidents[first[key]].source.value for key in keys],
                    "dedup_keys": keys,
                    "actors": [actor] * len(keys),
                }
                for row in await fetch(writes.INSERT_OR_COUNT, values):
                    counted = read_incident(row)
                    stored[first[counted.dedup_key or ""]] = counted
        return [stored[n] for n in range(len(incidents))]

    async def _update_status(
        self, fetch: Fetch, change: StatusChange, transitions: Transitions, actor: str | None
    ) -> Incident:
        values = {
            "incident_id": change.incident_id,
            "status": change.status.value,
            "from_statuses": [status.value for status in transitions.sources(change.status)],
            "expected_version": change.expected_version,
            "note": change.note,
            "actor": actor,
        }
        key = {"incident_id": change.incident_id}
        for _ in range(ATTEMPTS):
            rows = await fetch(writes.UPDATE_STATUS, values)
            if rows:
                return read_incident(rows[0])
            incident = read_incident(
                found(change.incident_id, await fetch(statements.SELECT_INCIDENT, key))
            )
            if not transitions.check(incident, change):
                if change.note is not None:
                    await self._note(fetch, change.incident_id, change.note, actor)
                return incident
            # Either another one with its key is open, or it has just been changed once more.
            if change.status is OPEN and await fetch(
                writes.SELECT_OPEN_DUPLICATE, {"dedup_key": incident.dedup_key}
            ):
                raise DuplicateOpenIncident(incident)
        raise StoreUnavailable("others change the incident all the time")

    async def _note(
        self, fetch: Fetch, incident_id: int, note: str, actor: str | None
    ) -> IncidentEvent:
        values = {"incident_id": incident_id, "note": note, "actor": actor}
        return read_event(found(incident_id, await fetch(writes.INSERT_NOTE, values)))

    def _words(self, text: str) -> str:
        """Return the text: the database finds its words, by the rule for messages."""
        return text

    async def check_order(self) -> None:
        """Raise if events have numbers of transactions that this server has yet to give."""
        if await self._read(writes.SELECT_STRANDED, {}):
            raise StoreError(
                "it was copied from another server, whose transactions had larger numbers: "
                "run `incidentkit db upgrade`"
            )

    async def _purge(
        self, fetch: Fetch, ended_before: datetime, limit: int, actor: str | None
    ) -> tuple[int, bool]:
        found = {"ended_before": ended_before, "limit": limit}
        ids = [row[0] for row in await fetch(writes.SELECT_PURGEABLE, found)]
        if not ids:
            return 0, False
        # Statements of their own, which see what was committed before the rows were locked.
        await fetch(writes.DELETE_EVENTS, {"incident_ids": ids, "events": EVENTS})
        ((count,),) = await fetch(writes.DELETE_INCIDENTS, {"incident_ids": ids, "actor": actor})
        return int(count), len(ids) == limit or count < len(ids)


class SharedOperations(PostgresOperations):
    """The same in transactions of a store's own: calls that wait at the same time share statements.

    What would wait for another transaction does not share: it would keep its neighbours waiting.
    That are incidents with a deduplication key, changes to ``new``, of which another one may be in
    the way, and of an incident that somebody has locked.
    """

    _shares_in_transactions: ClassVar[bool] = False
    """Whether a write of several calls, one statement, is in a transaction nevertheless."""

    def __init__(self) -> None:
        self._start_sharing()

    def _start_sharing(self) -> None:
        """Begin anew, as on another event loop, or another database under the same address."""
        self._bookmarks = Bookmarks()
        self._gets = Batcher(self._get_all, size=BATCH)
        self._lists = Batcher(self._list_all, size=PAGES)
        self._creates = Batcher(self._create_all, size=BATCH)
        self._updates = Batcher(self._update_all, size=BATCH)

    async def get(self, incident_id: int) -> Incident | None:
        """Read one incident, with others that are asked for."""
        return await self._gets(incident_id)

    async def list(self, query: ListQuery) -> Page:
        """Read one page and its token, with others unless it is large or lies deep."""
        if query.limit > SMALL or query.offset + query.limit > statements.DEEP:
            return await super().list(query)
        return await self._lists(query)

    async def create(
        self, incident: NewIncident, *, actor: str | None = None, once: Idempotency | None = None
    ) -> Incident:
        """Store the incident with its event, or count an occurrence of the one that is open."""
        if once is None and incident.dedup_key is None:
            stored = await self._creates((incident, actor))
            if stored is not None:
                return stored
        return await super().create(incident, actor=actor, once=once)

    async def update_status(
        self,
        change: StatusChange,
        *,
        transitions: Transitions = ANY_TRANSITION,
        actor: str | None = None,
        once: Idempotency | None = None,
    ) -> Incident:
        """Change the status, with an event, and return the incident."""
        if once is None and change.status is not OPEN:
            incident = await self._updates((change, transitions, actor))
            if incident is not None:
                return incident
        return await super().update_status(change, transitions=transitions, actor=actor, once=once)

    async def _get_all(self, ids: Sequence[int]) -> Sequence[Incident | StoreError | None]:
        if len(ids) == 1:
            return [await super().get(ids[0])]
        values = {"incident_ids": list(map(str, ids))}
        rows = await self._read(writes.SELECT_INCIDENTS, values)
        found = {row[0]: row for row in rows}
        return [_read_or_refuse(found.get(incident_id)) for incident_id in ids]

    async def _list_all(self, queries: Sequence[ListQuery]) -> Sequence[Page]:
        if len(queries) == 1:
            return [await super().list(queries[0])]
        values = {
            "statuses": [query.status and query.status.value for query in queries],
            "sources": [query.source and query.source.value for query in queries],
            "limits": [str(query.limit) for query in queries],
            "offsets": [str(query.offset) for query in queries],
        }
        rows = await self._read(writes.SELECT_PAGES, values)
        return [read_page(list(page)) for _, page in groupby(rows, itemgetter(-1))]

    async def _create_all(
        self, given: Sequence[tuple[NewIncident, str | None]]
    ) -> Sequence[Incident | None]:
        """Store incidents; None for each that has to be tried alone."""
        if len(given) == 1:
            ((incident, actor),) = given
            return [await super().create(incident, actor=actor)]
        rows = await self._write_all(writes.INSERT_INCIDENTS, values_of(given))
        return [None] * len(given) if rows is None else [read_incident(row) for row in rows]

    async def _update_all(
        self, given: Sequence[tuple[StatusChange, Transitions, str | None]]
    ) -> Sequence[Incident | None]:
        """Change statuses; None for each change that has to be tried alone."""
        # Of several changes of one incident, one: they come one after the other.
        some = {each[0].incident_id: each for each in reversed(given)}
        changes = [change for change, _, _ in some.values()]
        values = {
            "incident_ids": list(map(str, some)),
            "statuses": [change.status.value for change in changes],
            "from_statuses": [
                " ".join(transitions.sources(change.status))
                for change, transitions, _ in some.values()
            ],
            "expected_versions": [
                None if change.expected_version is None else str(change.expected_version)
                for change in changes
            ],
            "notes": [change.note for change in changes],
            "actors": [actor for _, _, actor in some.values()],
        }
        rows = await self._write_all(writes.UPDATE_STATUSES, values)
        done = {row[0]: read_incident(row) for row in rows or ()}
        return [
            done.get(each[0].incident_id) if some[each[0].incident_id] is each else None
            for each in given
        ]

    async def _write_all(self, statement: Executable, values: Mapping[str, Any]) -> Rows | None:
        """Run a statement that writes for several calls; None if the database refused to."""

        async def work(fetch: Fetch) -> Rows:
            return await fetch(statement, values)

        try:
            return await self._write(work, atomic=self._shares_in_transactions)
        except StoreError as error:
            # It may be the fault of one of them.
            if not refused(error):
                raise
            return None


def values_of(given: Sequence[tuple[NewIncident, str | None]]) -> dict[str, Any]:
    """Return the values that insert incidents without keys, each with its actor."""
    return {
        "messages": [incident.incident_message for incident, _ in given],
        "statuses": [incident.incident_type.value for incident, _ in given],
        "sources": [incident.source.value for incident, _ in given],
        "actors": [actor for _, actor in given],
    }


def _chunks(values: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    return (values[start : start + size] for start in range(0, len(values), size))


def _read_or_refuse(row: Any) -> Incident | StoreError | None:
    try:
        return None if row is None else read_incident(row)
    except StoreError as error:
        return error


class PostgresStore(SharedOperations):
    """Incidents in PostgreSQL.

    Args:
        database: ``postgresql://user:password@host:port/database``; further parameters as asyncpg
            takes them, such as ``?sslmode=require``. Or a pool that is open, and stays the host's.
        options: Sizes and timeouts; of a pool that is open, how long its connections are waited
            for.

    The schema is checked when the store opens, never changed: ``incidentkit db upgrade`` does
    that.
    """

    def __init__(
        self, database: str | asyncpg.Pool[asyncpg.Record], options: StoreOptions | None = None
    ) -> None:
        super().__init__()
        self._database = asyncpg_dsn(database) if isinstance(database, str) else database
        self._options = options or StoreOptions()
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._leases: Leases | None = None

    async def open(self) -> None:
        """Connect and check the schema."""
        options = self._options
        self._start_sharing()
        self._pool = (
            await asyncpg.create_pool(
                self._database,
                min_size=0,
                max_size=options.pool_size + options.max_overflow,
                timeout=options.connect_timeout,
                command_timeout=options.statement_timeout,
                reset=_keep_state,
                init=_log_statements if options.echo else None,
            )
            if isinstance(self._database, str)
            else self._database
        )
        own = self._pool is not self._database
        self._leases = Leases(self._pool, options.pool_timeout, keep=own)
        try:
            await self.check()
            await self.check_order()
        except BaseException as error:
            await self.close()
            # The pool reads the URL when it first connects.
            if isinstance(error, StoreError) and isinstance(error.__cause__, UNREADABLE_URL):
                # Without its cause, which shows parts of the URL.
                raise unreadable_url() from None
            raise

    async def close(self) -> None:
        """Close the pool; calls still running get a moment to end."""
        pool, self._pool = self._pool, None
        leases, self._leases = self._leases, None
        if pool is None or leases is None:
            return
        finishing = asyncio.ensure_future(leases.finish())
        if pool is not self._database:
            try:
                async with asyncio.timeout(self._options.pool_timeout):
                    await pool.close()
            except (TimeoutError, *_LOST):
                pool.terminate()
        await finishing

    async def check(self) -> None:
        """Raise unless the database answers and has our schema."""
        rows = await self._read(statements.SELECT_REVISION, {})
        check_revision(rows[0][0] if rows else None)

    def join(self, connection: object) -> StoreOperations:
        """Return what is done in the transaction of a host's connection."""
        from incidentkit.store.joined import join  # noqa: PLC0415

        return join(connection, "postgresql")

    async def append(self, statement: Executable, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows with one statement, in one transaction."""
        compiled = _compile(statement)
        values = [[row[name] for name in compiled.parameters] for row in rows]
        async with self._connection() as connection:
            await connection.executemany(compiled.text, values)

    async def _read(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement that only reads, once more if its connection turns out to be dead."""
        try:
            async with self._connection() as connection:
                return await fetch_rows(connection, statement, values)
        except StoreUnavailable as error:
            if not isinstance(error.__cause__, _LOST):
                raise
        async with self._connection() as connection:
            return await fetch_rows(connection, statement, values)

    async def _write(self, work: Callable[[Fetch], Awaitable[_T]], *, atomic: bool = False) -> _T:
        """Run work once: a write must not be sent again, a lost answer may hide a commit."""
        async with self._connection() as connection:
            fetch = partial(fetch_rows, connection)
            if not atomic:
                return await work(fetch)
            async with connection.transaction(isolation="read_committed"):
                return await work(fetch)

    def _connection(self) -> _Lent:
        if self._leases is None:
            raise ClientClosed
        return _Lent(self._leases)


class _Lent:
    """A connection for a while, in which what asyncpg raises is translated."""

    __slots__ = ("_connection", "_leases")

    _connection: PoolConnectionProxy[asyncpg.Record]

    def __init__(self, leases: Leases) -> None:
        self._leases = leases

    async def __aenter__(self) -> PoolConnectionProxy[asyncpg.Record]:
        try:
            self._connection = await self._leases.take()
        except asyncpg.UndefinedObjectError as error:
            raise StoreError("it does not know a parameter of the URL") from error
        except Exception as error:
            raise translate_error(error) from error
        return self._connection

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        connection = self._connection
        if error is None:
            try:
                await self._leases.put(connection)
            except (*_AWAY, asyncpg.PostgresError) as lost:
                # What was to be done has been done, and its caller has to hear that.
                logger.warning("A connection was lost when given back: %s", type(lost).__name__)
            return
        if isinstance(error, _LOST):
            # It may have read the server's farewell and not yet the end of the connection.
            with suppress(asyncpg.InterfaceError):  # Or it is closed, and given back.
                connection.terminate()
        # Giving back waits for the server to cancel the statement, for which the caller,
        # cancelled or out of time, should not wait.
        self._leases.discard(connection)
        if isinstance(error, Exception) and not isinstance(error, IncidentKitError):
            raise translate_error(error) from error


async def _log_statements(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    connection.add_query_logger(_log_statement)


def _log_statement(query: Any) -> None:
    logger.info("%s (%.1f ms)", query.query, query.elapsed * 1000)

"""A store: the operations on incidents, on connections that it opens and closes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from sqlalchemy import Executable

from incidentkit.affinity import Affinity
from incidentkit.domain.errors import SchemaOutOfDate
from incidentkit.observing import Observer, Pooled, PoolUse
from incidentkit.store.bookmarks import Bookmarks
from incidentkit.store.dialect import Dialect
from incidentkit.store.executor import OwnExecutor, Rows, Work
from incidentkit.store.observed import ObservedExecutor
from incidentkit.store.ports import StoreOperations
from incidentkit.store.records import Records, Sharing, names_database
from incidentkit.store.schema import check_parts, check_revision, upgrade_command
from incidentkit.store.sql.definitions import Schema
from incidentkit.store.turns import Turns

_T = TypeVar("_T")

logger = logging.getLogger("incidentkit.store")


class Store(Records):
    """Incidents in a database: each write is committed when it returns.

    Args:
        dialect: The statements of the database.
        executor: Runs them, on connections that it opens and closes.
        join: Returns the operations on a host's connection.
        join_sync: Returns those on a host's synchronous connection.
        share: Makes the sharing of statements on an executor, for each opening; None: every call
            runs alone.
        turns: Makes the turns of calls that wait for locks, for each opening; None: no turns.
        upgrade: Brings the schema up to date; None: an outdated schema is an error.

    Attributes:
        row_security: Whether policies decide which rows a session sees, as of the last check.
    """

    def __init__(  # noqa: PLR0913
        self,
        dialect: Dialect,
        executor: OwnExecutor,
        *,
        join: Callable[[object], StoreOperations],
        join_sync: Callable[[object], StoreOperations],
        share: Callable[[OwnExecutor], Sharing] | None = None,
        turns: Callable[[], Turns] | None = None,
        upgrade: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(dialect, executor)
        self._connections = executor
        self._join = join
        self._join_sync = join_sync
        self._share = share
        self._new_turns = turns
        self._upgrade = upgrade
        self.row_security = False
        # Where the store is open; None: it is closed.
        self._affinity: Affinity | None = None

    def observe(self, observer: Observer) -> None:
        """Tell an observer about each statement, except in a host's transaction."""
        observed = ObservedExecutor(self._connections, observer, self._dialect.system)
        observed.watch_pool(observer.pool_timeout)
        self._executor = self._connections = observed

    @property
    def pool_use(self) -> PoolUse | None:
        """How the store's own connections are used; None: it has none, or a file's."""
        return self._connections.pool_use if isinstance(self._connections, Pooled) else None

    @names_database
    async def open(self) -> None:
        """Connect, and check the schema or bring it up to date."""
        await self._leave_ended_loop()
        self._affinity = Affinity()
        # New for each opening: the next one may be on another event loop, or find another database
        # at the same address.
        self._sharing = None if self._share is None else self._share(self._connections)
        self._turns = None if self._new_turns is None else self._new_turns()
        self._bookmarks = Bookmarks()
        try:
            await self._connections.open(self._affinity)
            await self._check_or_upgrade()
            await self.check_order()
        except BaseException:
            # A failure to close must not replace the error.
            with suppress(Exception):
                await self.close()
            raise

    async def _check_or_upgrade(self) -> None:
        try:
            schema = await self._check_schema()
            if self._upgrade is not None:
                check_parts(schema.differences, self._dialect.schema)
        except SchemaOutOfDate:
            if self._upgrade is None:
                raise
            await self._upgrade()
            schema = await self._check_schema()
        for difference in schema.differences:
            command = upgrade_command(self._dialect.schema)
            logger.warning("In the schema, %s: run `%s`", difference, command)

    async def _check_schema(self) -> Schema:
        """Return the schema; raise unless a client can work on it.

        Only triggers are vital: a lost index costs time, and a changed function affects searches.
        """
        rows = await self._connections.read(self._dialect.select_schema, {})
        schema = self._dialect.read_schema(rows)
        check_revision(schema.revision, self._dialect.schema)
        vital = [
            each
            for each in schema.differences
            if each.kind == "trigger" or (each.kind == "table" and each.missing)
        ]
        check_parts(vital, self._dialect.schema)
        self.row_security = False
        self._notice(row_security=schema.row_security)
        return schema

    @names_database
    async def check_order(self) -> None:
        """Raise unless new events come after the existing ones; look for row security, too."""
        self._notice(row_security=await self._dialect.check_order(self._executor.read))

    def _notice(self, *, row_security: bool) -> None:
        if row_security:
            # Each session of a host's pool may see other rows.
            self.row_security = True
            self._sharing = None

    async def close(self) -> None:
        """Wait for running calls, and release every connection; once closed, do nothing."""
        await self._leave_ended_loop()
        await self._connections.close()
        self._affinity = None

    def abandon(self) -> None:
        """Release every connection without the event loop, which has ended."""
        self._connections.abandon()
        self._affinity = None

    async def _leave_ended_loop(self) -> None:
        affinity = self._affinity
        if affinity is not None and not affinity.here:
            affinity.check_free()
            # A statement that is still running in a thread has to end first.
            await asyncio.to_thread(self.abandon)

    @names_database
    async def check(self) -> None:
        """Raise unless the database answers and has the schema that this version works on."""
        await self._check_schema()
        await self.check_order()

    def join(self, connection: object) -> StoreOperations:
        """Return the operations in the transaction of a host's connection."""
        return self._join(connection)

    def join_sync(self, connection: object) -> StoreOperations:
        """Return the operations in the transaction of a host's synchronous connection."""
        return self._join_sync(connection)

    @names_database
    async def append(self, statement: Executable, rows: Sequence[Mapping[str, Any]]) -> None:
        """Run a statement that inserts, once for each row, in one transaction."""
        await self._connections.append(statement, rows)

    @names_database
    async def fetch(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement that only reads, and reads few rows."""
        return await self._connections.read(statement, values)

    @names_database
    async def transact(self, work: Work[_T]) -> _T:
        """Run statements that write, all or none."""
        return await self._connections.transact(work)

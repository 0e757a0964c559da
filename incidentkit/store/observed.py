"""Report each statement to an observer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from sqlalchemy import Executable

from incidentkit.affinity import Affinity
from incidentkit.observing import Database, Observer, Pool, Pooled, PoolUse
from incidentkit.store.database import DatabaseKind
from incidentkit.store.executor import Fetch, OwnExecutor, Rows, SharedWork, Work

_T = TypeVar("_T")


class ObservedExecutor:
    """Runs statements on another executor, and reports each to an observer.

    Args:
        executor: Runs the statements.
        observer: Measures them.
        system: ``postgresql`` or ``sqlite``.
    """

    def __init__(self, executor: OwnExecutor, observer: Observer, system: DatabaseKind) -> None:
        self._executor = executor
        self._observer = observer
        self._database = database_at(system, executor.place)
        self.in_host_transaction = executor.in_host_transaction

    @property
    def place(self) -> str | None:
        """The database, for an error to name it."""
        return self._executor.place

    @property
    def pool_use(self) -> PoolUse | None:
        """How the executor's own connections are used; None: it has none."""
        return self._executor.pool_use if isinstance(self._executor, Pooled) else None

    def watch_pool(self, on_timeout: Callable[[], object]) -> None:
        """Call a function whenever a call gets no connection in time, once the pool is opened."""
        if isinstance(self._executor, Pool):
            self._executor.watch_pool(on_timeout)

    async def open(self, affinity: Affinity) -> None:
        """Get ready to connect."""
        await self._executor.open(affinity)

    async def close(self) -> None:
        """Wait for running statements, and release every connection."""
        await self._executor.close()

    def abandon(self) -> None:
        """Release every connection without the event loop, which has ended."""
        self._executor.abandon()

    async def read(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement that only reads, and reads few rows."""
        with self._observer.statement(operation_of(statement), self._database):
            return await self._executor.read(statement, values)

    async def scan(self, work: Work[_T]) -> _T:
        """Run statements that only read, but may read or return very many rows."""
        return await self._executor.scan(lambda fetch: work(self._fetch(fetch)))

    async def write(self, work: Work[_T]) -> _T:
        """Run statements that write; each may be committed by itself."""
        if isinstance(work, SharedWork):
            return await self._executor.write(work.through(self._fetch))
        return await self._executor.write(lambda fetch: work(self._fetch(fetch)))

    async def transact(self, work: Work[_T]) -> _T:
        """Run statements that write, all or none."""
        return await self._executor.transact(lambda fetch: work(self._fetch(fetch)))

    async def append(self, statement: Executable, rows: Sequence[Mapping[str, Any]]) -> None:
        """Run a statement that inserts, once for each row, in one transaction."""
        with self._observer.statement(operation_of(statement), self._database):
            await self._executor.append(statement, rows)

    def _fetch(self, fetch: Fetch) -> Fetch:
        async def observed(statement: Executable, values: Mapping[str, Any]) -> Rows:
            with self._observer.statement(operation_of(statement), self._database):
                return await fetch(statement, values)

        return observed


def operation_of(statement: Executable) -> str:
    """Return the first word of a statement, which never is a value."""
    text: object = getattr(statement, "text", None)
    word = text.split(None, 1)[0] if isinstance(text, str) and text.strip() else None
    name: object = word or getattr(statement, "__visit_name__", "")
    return name.upper() if isinstance(name, str) and name.isalpha() else "OTHER"


def database_at(system: DatabaseKind, place: str | None) -> Database:
    """Return the database at a place; several hosts and a file have only the system."""
    found = None if place is None or system != "postgresql" else _PLACE.fullmatch(place)
    if found is None:
        return Database(system)
    return Database(system, found[1].strip("[]"), int(found[2]), found[3])


_PLACE: Final = re.compile(r"([^,]+):(\d{1,5})/(.*)", re.DOTALL)

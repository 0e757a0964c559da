"""Run the statements of a store on the tables of one schema, regardless of the search path.

The names in a statement get the schema when it is compiled. It therefore does not matter if a pool,
a pooler or a host changes the search path of a connection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import Executable

from incidentkit.affinity import Affinity
from incidentkit.observing import Pool, Pooled, PoolUse
from incidentkit.store.executor import Executor, Fetch, OwnExecutor, Rows, Work
from incidentkit.store.schema import named_place
from incidentkit.store.sql.naming import TRANSLATE_MAP

_T = TypeVar("_T")


class Namespace:
    """The statements on the tables of one schema, which live as long as its client.

    Args:
        schema: The name of the schema.
    """

    def __init__(self, schema: str) -> None:
        self.schema = schema
        self._options: dict[str, Any] = {TRANSLATE_MAP: {None: schema}}
        self._statements: dict[Executable, Executable] = {}

    def __call__(self, statement: Executable) -> Executable:
        """Return a statement on the tables of the schema: the same one for the same statement."""
        found = self._statements.get(statement)
        if found is None:
            found = self._statements[statement] = statement.execution_options(**self._options)
        return found


class SchemaExecutor:
    """Runs statements on the tables of a schema.

    Args:
        executor: Runs them on connections with any search path.
        namespace: The schema.
    """

    def __init__(self, executor: Executor, namespace: Namespace) -> None:
        self._executor = executor
        self._namespace = namespace
        self.in_host_transaction = executor.in_host_transaction

    @property
    def place(self) -> str | None:
        """The database and the schema."""
        place = self._executor.place
        return place and named_place(place, self._namespace.schema)

    async def read(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement that only reads, and reads few rows."""
        return await self._executor.read(self._namespace(statement), values)

    async def scan(self, work: Work[_T]) -> _T:
        """Run statements that only read, but may read or return very many rows."""
        return await self._executor.scan(lambda fetch: work(self._fetch(fetch)))

    async def write(self, work: Work[_T]) -> _T:
        """Run statements that write; each may be committed by itself."""
        return await self._executor.write(lambda fetch: work(self._fetch(fetch)))

    async def transact(self, work: Work[_T]) -> _T:
        """Run statements that write, all or none."""
        return await self._executor.transact(lambda fetch: work(self._fetch(fetch)))

    def _fetch(self, fetch: Fetch) -> Fetch:
        return lambda statement, values: fetch(self._namespace(statement), values)


class OwnSchemaExecutor(SchemaExecutor):
    """Runs statements on the tables of a schema, on connections of a store or of a host's pool."""

    def __init__(self, executor: OwnExecutor, namespace: Namespace) -> None:
        super().__init__(executor, namespace)
        self._connections = executor

    @property
    def pool_use(self) -> PoolUse | None:
        """How the executor's own connections are used; None: it has none."""
        return self._connections.pool_use if isinstance(self._connections, Pooled) else None

    def watch_pool(self, on_timeout: Callable[[], object]) -> None:
        """Call a function whenever a call has waited in vain, from the next opening on."""
        if isinstance(self._connections, Pool):
            self._connections.watch_pool(on_timeout)

    async def open(self, affinity: Affinity) -> None:
        """Get ready to connect."""
        await self._connections.open(affinity)

    async def close(self) -> None:
        """Wait for running statements, and release every connection."""
        await self._connections.close()

    def abandon(self) -> None:
        """Release every connection without the event loop, which has ended."""
        self._connections.abandon()

    async def append(self, statement: Executable, rows: Sequence[Mapping[str, Any]]) -> None:
        """Run a statement that inserts, once for each row, in one transaction."""
        await self._connections.append(self._namespace(statement), rows)

"""The protocols of an executor, which runs statements on a pool, a file or a host's connection."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from attrs import frozen
from sqlalchemy import Executable

from incidentkit.affinity import Affinity

_T = TypeVar("_T")

Rows: TypeAlias = Sequence[Any]

Fetch: TypeAlias = Callable[[Executable, Mapping[str, Any]], Awaitable[Rows]]
"""Runs one statement with its values, and returns its rows."""

Work: TypeAlias = Callable[[Fetch], Awaitable[_T]]
"""Runs several statements, each with the function that it is given."""


@frozen
class SharedWork(Generic[_T]):
    """Work on one item, which an executor may also do for the items of several calls at once.

    Attributes:
        item: What to write.
        alone: Writes the item.
        together: Writes several items, and returns an answer for each. If it fails, its statements
            are undone, and each item is written alone. It is the same in every such work that one
            executor gets.
    """

    item: Any
    alone: Work[_T]
    together: Callable[[Fetch, Sequence[Any]], Awaitable[Sequence[_T]]]

    def __call__(self, fetch: Fetch) -> Awaitable[_T]:
        """Write the item alone."""
        return self.alone(fetch)

    def through(self, change: Callable[[Fetch], Fetch]) -> SharedWork[_T]:
        """Return the same work, with a function that changes how its statements run."""

        def alone(fetch: Fetch) -> Awaitable[_T]:
            return self.alone(change(fetch))

        def together(fetch: Fetch, items: Sequence[Any]) -> Awaitable[Sequence[_T]]:
            return self.together(change(fetch), items)

        return SharedWork(self.item, alone, together)


class Executor(Protocol):
    """Runs statements on one kind of connection.

    Every method raises :class:`~incidentkit.ClientClosed` before :meth:`open` and after
    :meth:`close`, :class:`~incidentkit.WrongEventLoop` on another event loop than that of the
    opening, and otherwise only errors of incidentkit: a driver's exception is their cause.

    Attributes:
        in_host_transaction: Whether statements run in a transaction that the host began. A
            statement that the database may refuse has to be undone there, since an error ends the
            transaction of PostgreSQL.
        place: Host, port and name of the database, or the path of its file; never a user or a
            password. None: it is not known.
    """

    in_host_transaction: bool

    @property
    def place(self) -> str | None:
        """The database, for an error to name it."""
        ...

    async def read(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement that only reads, and reads few rows."""
        ...

    async def scan(self, work: Work[_T]) -> _T:
        """Run statements that only read, but may read or return very many rows.

        Scans have a bounded share of the threads or connections, so that other calls never wait
        for them; work that goes on after its statements keeps its place. A statement is stopped at
        its time limit, and when its caller is cancelled. On a host's connection it is stopped too,
        but runs there as every other statement does.
        """
        ...

    async def write(self, work: Work[_T]) -> _T:
        """Run statements that write; each may be committed by itself.

        On SQLite they are all or none, as in :meth:`transact`. In a host's transaction on
        PostgreSQL, a failed one ends the transaction.
        """
        ...

    async def transact(self, work: Work[_T]) -> _T:
        """Run statements that write, all or none; a host's transaction survives a failure."""
        ...


class OwnExecutor(Executor, Protocol):
    """Runs statements on connections that a store opens, or takes from a host's pool."""

    async def open(self, affinity: Affinity) -> None:
        """Get ready to connect; on SQLite, raise if the file cannot be opened.

        Args:
            affinity: Where the executor is opened.
        """

    async def close(self) -> None:
        """Wait for running statements, and release every connection."""

    def abandon(self) -> None:
        """Release every connection without the event loop, which has ended; may block."""

    async def append(self, statement: Executable, rows: Sequence[Mapping[str, Any]]) -> None:
        """Run a statement that inserts, once for each row, in one transaction."""

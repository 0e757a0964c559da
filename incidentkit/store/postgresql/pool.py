"""Runs statements on connections of asyncpg: those of the store, or of a host's pool."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

from attrs import frozen
from sqlalchemy import Executable

from incidentkit.affinity import Affinity, keep, running_loop
from incidentkit.domain.errors import ClientClosed, IncidentKitError, StoreError
from incidentkit.observing import PoolUse
from incidentkit.store.executor import Rows, Work
from incidentkit.store.postgresql.connection import NOT_RUN, PostgresConnection
from incidentkit.store.postgresql.driver import compile_statement
from incidentkit.store.postgresql.errors import (
    is_unsent,
    lost_before,
    lost_connection,
    translate_error,
)
from incidentkit.store.share import Share, scanning_share, writing_share

_T = TypeVar("_T")

Call: TypeAlias = Callable[[PostgresConnection], Awaitable[_T]]
"""Runs statements on a connection."""


class Connections(Protocol):
    """Lends connections.

    Attributes:
        maximum: Number of connections that it can lend at a time.
        on_timeout: Called when a call has waited in vain for one; None: nothing is.
    """

    maximum: int
    on_timeout: Callable[[], object] | None

    @property
    def use(self) -> PoolUse | None:
        """How the connections are used; None: they belong to a host."""

    async def take(self) -> PostgresConnection:
        """Lend a connection. Exceptions of asyncpg are not translated."""
        ...

    async def put(self, connection: PostgresConnection) -> None:
        """Take a connection back after a call that succeeded; never raise."""

    def recover(
        self, connection: PostgresConnection, error: BaseException
    ) -> asyncio.Task[None] | None:
        """Take a connection back after a call that failed, without waiting for the server.

        Returns:
            What ends when the connection is free again; None: it is.
        """
        ...

    async def close(self) -> None:
        """Wait for running calls as far as the time limit allows, and lend no more."""

    def sever(self) -> None:
        """Disconnect this process from what was opened, without the event loop."""


class PoolExecutor:
    """Runs statements on connections of asyncpg.

    Args:
        connections: Makes what lends the connections, for each opening.
        timeout: Seconds that a write waits until there is a connection for it.
        place: Host, port and name of the database; None: it is not known.
    """

    in_host_transaction = False

    def __init__(
        self, connections: Callable[[], Connections], timeout: float, place: str | None
    ) -> None:
        self.place = place
        self._new_connections = connections
        self._timeout = timeout
        self._open: _Open | None = None
        self._on_timeout: Callable[[], object] | None = None

    @property
    def pool_use(self) -> PoolUse | None:
        """How the connections are used; None: they belong to a host, or it is not open."""
        opened = self._open
        use = None if opened is None else opened.connections.use
        if opened is None or use is None:
            return None
        waiting = use.waiting + opened.writing.waiting + opened.scanning.waiting
        return use._replace(waiting=waiting)

    def watch_pool(self, on_timeout: Callable[[], object]) -> None:
        """Call a function whenever a call has waited in vain, from the next opening on."""
        self._on_timeout = on_timeout

    async def open(self, affinity: Affinity) -> None:
        """Accept statements; the first one connects."""
        connections = self._new_connections()
        # Otherwise finalizers would end the connections of the parent process.
        affinity.on_fork = connections.sever
        writing = writing_share(connections.maximum, self._timeout)
        scanning = scanning_share(connections.maximum, self._timeout)
        for waiting in (connections, writing, scanning):
            waiting.on_timeout = self._on_timeout
        self._open = _Open(affinity, connections, writing, scanning)

    async def close(self) -> None:
        """Close what the store opened; running calls have ``pool_timeout`` seconds to finish."""
        opened, self._open = self._open, None
        if opened is not None:
            await opened.connections.close()

    def abandon(self) -> None:
        """Disconnect from the server without the event loop."""
        opened, self._open = self._open, None
        if opened is None:
            return
        opened.connections.sever()
        if opened.affinity.forked:
            keep(opened.connections)

    async def read(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement that only reads; if its connection is dead, again on another."""
        return await self._run(lambda connection: connection.fetch(statement, values), resend=True)

    async def scan(self, work: Work[_T]) -> _T:
        """Run statements that only read; if their connection is dead, again on another."""
        share = self._opened().scanning
        return await self._run_in(share, lambda connection: work(connection.fetch), resend=True)

    async def write(self, work: Work[_T]) -> _T:
        """Run statements that write, and send each once: a lost answer may hide a commit."""
        return await self._write(lambda connection: work(connection.fetch))

    async def transact(self, work: Work[_T]) -> _T:
        """Run statements that write in one transaction."""
        try:
            return await self._write(lambda connection: connection.transact(work))
        except StoreError as error:
            if not isinstance(error.__cause__, NOT_RUN):
                raise
        return await self._write(lambda connection: connection.transact(work))

    async def append(self, statement: Executable, rows: Sequence[Mapping[str, Any]]) -> None:
        """Run a statement that inserts, once for each row, in one transaction."""
        compiled = compile_statement(statement)
        values = [[row[name] for name in compiled.parameters] for row in rows]
        await self._write(lambda connection: connection.driver.executemany(compiled.text, values))

    async def _write(self, call: Call[_T]) -> _T:
        return await self._run_in(self._opened().writing, call)

    async def _run_in(self, share: Share, call: Call[_T], *, resend: bool = False) -> _T:
        """Run a call on one of the connections for its kind."""
        await share.take()
        settling: list[asyncio.Task[None]] = []
        try:
            return await self._run(call, resend=resend, settling=settling)
        finally:
            # Until then the server may still be running the statement of a caller that is gone.
            share.give_after(settling)

    async def _run(
        self,
        call: Call[_T],
        *,
        resend: bool = False,
        settling: list[asyncio.Task[None]] | None = None,
    ) -> _T:
        """Run a call on a connection, and translate exceptions.

        Args:
            call: Runs statements.
            resend: Whether to run it again if its connection is dead, even after it was sent; only
                once if the server has ended the connection.
            settling: Gets a task that ends when the connection of a failed call is free again.
        """
        connections = self._opened().connections
        left = connections.maximum
        while True:
            try:
                connection = await connections.take()
            except IncidentKitError:
                raise
            except Exception as error:
                raise translate_error(error, connecting=True) from error
            connection.answered = False
            try:
                done = await call(connection)
            except BaseException as error:
                task = connections.recover(connection, error)
                if task is not None and settling is not None:
                    settling.append(task)
                if not isinstance(error, Exception) or isinstance(error, IncidentKitError):
                    raise
                unsent = is_unsent(error) and not connection.answered
                lost = connection.used and lost_connection(error)
                if not (lost and left and (unsent or resend)):
                    raise translate_error(error) from error
                left -= 1
                # The statement may be the cause, or an administrator who wants to stop it.
                resend = resend and (unsent or lost_before(error))
            else:
                await connections.put(connection)
                return done

    def _opened(self) -> _Open:
        opened = self._open
        if opened is None:
            raise ClientClosed
        if opened.affinity.loop is not running_loop():
            raise opened.affinity.error()
        return opened


@frozen
class _Open:
    """The state of an open executor.

    Attributes:
        affinity: Where it was opened.
        connections: Lends connections.
        writing: The share of writes.
        scanning: The share of scans.
    """

    affinity: Affinity
    connections: Connections
    writing: Share
    scanning: Share

"""One connection of asyncpg, and the names of its prepared statements."""

from __future__ import annotations

import asyncio
import select
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from secrets import token_hex
from typing import Any, Final, TypeAlias, TypeVar

import asyncpg
from attrs import define
from sqlalchemy import Executable

from incidentkit.affinity import sever
from incidentkit.domain.errors import StoreError
from incidentkit.store.executor import Fetch, Rows, Work
from incidentkit.store.postgresql.driver import Connection, compile_statement, fetch_rows
from incidentkit.store.postgresql.errors import LOST, lost_connection

_T = TypeVar("_T")

Log: TypeAlias = Callable[[str, float], object]
"""Takes the text of a statement, and the seconds that it took."""

PREPARED: Final = 100
"""Maximum number of statements that stay prepared on a connection."""

UNKNOWN_NAME: Final = (
    asyncpg.InvalidSQLStatementNameError,
    asyncpg.DuplicatePreparedStatementError,
)
"""Errors of a statement that is prepared on another connection of a pooler's."""

NOT_RUN: Final = (*UNKNOWN_NAME, asyncpg.InvalidCachedStatementError)
"""Errors of a prepared statement that the server did not run: its name is unknown, or its columns
have changed with the schema. It can be sent again."""

TURNS: Final = 3
"""Turns of the event loop in which an idle connection reads what has arrived."""


@define
class Preparing:
    """Whether statements stay prepared; shared by the connections to one server.

    Attributes:
        allowed: None until the first connection finds out whether there is a pooler.
    """

    allowed: bool | None = None


class PostgresConnection:
    """A connection that runs one call at a time. Exceptions of asyncpg are not translated.

    asyncpg numbers the names of its statements. Behind a pooler, two processes share connections
    and count alike, so that a name can run the statement of the other process. The names here are
    random: the server runs the right statement or none.

    Args:
        driver: The open connection; with ``preparing``, one without asyncpg's cache of statements.
        preparing: Whether statements stay prepared under random names; None: asyncpg decides.
        log: Called after each statement; None: no log.

    Attributes:
        used: Whether the connection has served a call before, and may have ended since.
        answered: Whether the server has answered a statement of the present call.
        idle_since: When it was given back, on the clock of the event loop.
        reads_committed: Whether a statement outside a transaction is ``READ COMMITTED``. If not,
            :meth:`fetch` runs each one in a transaction that is.
    """

    __slots__ = (
        "_log",
        "_prepared",
        "_preparing",
        "answered",
        "driver",
        "idle_since",
        "reads_committed",
        "used",
    )

    def __init__(
        self, driver: Connection, *, preparing: Preparing | None = None, log: Log | None = None
    ) -> None:
        self.driver = driver
        self.used = False
        self.answered = False
        self.idle_since = 0.0
        self.reads_committed = True
        self._preparing = preparing
        self._log = log
        # The most recently used last.
        self._prepared: dict[Executable, Any] = {}

    async def fetch(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement outside a transaction."""
        if self.reads_committed:
            return await self._fetch(statement, values)

        async def work(fetch: Fetch) -> Rows:
            return await fetch(statement, values)

        try:
            return await self.transact(work)
        except NOT_RUN:
            return await self.transact(work)

    async def _fetch(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        start = 0.0 if self._log is None else time.perf_counter()
        if self._preparing is None or not self._preparing.allowed:
            rows = await fetch_rows(self.driver, statement, values)
        else:
            rows = await self._fetch_prepared(statement, values, self._preparing)
        self.answered = True
        if self._log is not None:
            self._log(compile_statement(statement).text, time.perf_counter() - start)
        return rows

    async def transact(self, work: Work[_T]) -> _T:
        """Run statements in one transaction.

        After an error whose statement may still be running, the transaction is left to
        :meth:`settle`.
        """
        try:
            await self._execute("BEGIN ISOLATION LEVEL READ COMMITTED")
            done = await work(self._fetch)
            tag = await self._execute("COMMIT")
        except (TimeoutError, *LOST):
            raise
        except Exception:
            await self._execute("ROLLBACK")
            raise
        if tag != "COMMIT":
            raise StoreError("the transaction had failed before its end")
        return done

    def is_settled(self, error: BaseException) -> bool:
        """Return whether the server has nothing left to do for a call that raised this error."""
        if not isinstance(error, Exception) or isinstance(error, TimeoutError):
            return False
        return not (lost_connection(error) or self.driver.is_in_transaction())

    async def settle(self) -> None:
        """Wait until the server has cancelled a statement, and end its transaction."""
        # Only the answer tells whether there is still a transaction.
        await self.driver.execute("SELECT")
        if self.driver.is_in_transaction():
            await self.driver.execute("ROLLBACK")

    def is_closed(self) -> bool:
        """Return whether the connection has ended, or left its pool."""
        return _is_closed(self.driver)

    async def is_alive(self) -> bool:
        """Return whether the connection, which is idle, can be used as far as this end knows."""
        return await is_alive(self.driver)

    def terminate(self) -> None:
        """Close the connection at once."""
        with suppress(asyncpg.InterfaceError):  # It has left its pool.
            self.driver.terminate()

    def sever(self) -> None:
        """Disconnect this process from the server, without the event loop."""
        sever(_transport(self.driver))

    async def _execute(self, command: str) -> str:
        start = time.perf_counter()
        tag = await self.driver.execute(command)
        self.answered = True
        if self._log is not None:
            self._log(command, time.perf_counter() - start)
        return tag

    async def _fetch_prepared(
        self, statement: Executable, values: Mapping[str, Any], preparing: Preparing
    ) -> Rows:
        compiled = compile_statement(statement)
        try:
            prepared = self._prepared.pop(statement, None)
            if prepared is None:
                if len(self._prepared) >= PREPARED:
                    # asyncpg closes it on the server with the next statement that is prepared.
                    del self._prepared[next(iter(self._prepared))]
                name = f"incidentkit_{token_hex(8)}"
                prepared = await self.driver.prepare(compiled.text, name=name)
            self._prepared[statement] = prepared
            rows: Rows = await prepared.fetch(*[values[name] for name in compiled.parameters])
        except NOT_RUN as error:
            self._prepared.clear()
            if isinstance(error, UNKNOWN_NAME):
                preparing.allowed = False
            if self.driver.is_in_transaction():
                # The error has ended the transaction: all of it has to run again.
                raise
            return await fetch_rows(self.driver, statement, values)
        return rows


async def is_alive(driver: Any) -> bool:
    """Return whether an idle connection can be used, as far as it is known at this end.

    The server sends nothing on an idle connection but its end, and rare notices. They may have
    arrived without having been read.

    Args:
        driver: The connection of asyncpg or psycopg; any other one counts as usable.
    """
    for _ in range(TURNS):
        if _is_closed(driver):
            return False
        if not _has_unread(driver):
            return True
        if hasattr(driver, "pgconn"):
            # psycopg reads only on request, and takes the error that ends a connection for the
            # answer to its next statement. If it is only a notice, a new connection does no harm.
            return False
        # asyncpg reads in a turn of the loop.
        await asyncio.sleep(0)
    return False


def _transport(driver: Any) -> Any:
    # asyncpg has no public name for it.
    return getattr(driver, "_transport", None)


def _is_closed(driver: Any) -> bool:
    if hasattr(driver, "pgconn"):
        return bool(driver.closed)
    try:
        return bool(driver.is_closed())
    except asyncpg.InterfaceError:
        # It has left its pool.
        return True
    except AttributeError:
        return False


def _has_unread(driver: Any) -> bool:
    """Return whether the server has sent what was not read yet."""
    if hasattr(driver, "pgconn"):
        socket = driver.pgconn.socket
    else:
        transport = _transport(driver)
        socket = transport and transport.get_extra_info("socket")
    if socket is None:
        return False
    if not hasattr(select, "poll"):
        return bool(select.select((socket,), (), (), 0)[0])
    poll = select.poll()
    poll.register(socket, select.POLLIN)
    return bool(poll.poll(0))

"""Runs statements on an SQLite file, in threads of the store.

A call is handed to a thread once, however many statements it runs. Concurrent writes share a
transaction. While every connection is in use, quick reads are handed to a thread together. A call
that has begun runs to completion even if its caller is cancelled. A write that has begun is awaited
beyond its time limit, so that an error never hides a stored write.

Scans have threads and connections of their own, so that no other call waits for one. They are
interrupted at their time limit, and when their caller is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from threading import Condition, Event, Lock, Thread
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Engine, Executable
from sqlalchemy.engine import URL

from incidentkit.affinity import Affinity, keep, running_loop
from incidentkit.batching import Batcher
from incidentkit.domain.errors import ClientClosed, IncidentKitError
from incidentkit.store.causes import NO_ANSWER
from incidentkit.store.executor import Fetch, Rows, SharedWork, Work
from incidentkit.store.options import StoreOptions
from incidentkit.store.share import scans
from incidentkit.store.sql.compiled import Compiled
from incidentkit.store.sql.rows import convert_rows
from incidentkit.store.sql.statements import SELECT_INCIDENT, SELECT_PAGE, SELECT_TOKEN
from incidentkit.store.sqlite.errors import (
    IN_PARENT,
    MOVED,
    is_stale_schema,
    may_be_unprepared,
    translate_error,
)
from incidentkit.store.sqlite.file import open_engine, probe, scanners
from incidentkit.store.sqlite.forks import open_files
from incidentkit.store.sqlite.statements import INTERRUPT_INTERVAL, STATEMENTS
from incidentkit.store.sqlite.url import MEMORY, place_of

logger = logging.getLogger("incidentkit.store")

_T = TypeVar("_T")

WRITES: Final = 100
"""Maximum number of writes that share a transaction."""

READS: Final = 10
"""Maximum number of quick reads that run one after the other in a thread."""

STEP: Final = 50
"""Number of rows that a thread reads at a time, except in a quick read."""

PAUSE: Final = 0.0001
"""Seconds between two steps: long enough for a waiting thread to run."""

FORK_PATIENCE: Final = 10.0
"""Maximum seconds for which a fork waits for running statements."""

_QUICK: Final = frozenset(
    (
        SELECT_INCIDENT,
        SELECT_TOKEN,
        *(statement for key, statement in SELECT_PAGE.items() if key[-1] == "any"),
    )
)
"""Reads so short that other reads can wait for them."""


class ThreadsExecutor:
    """Runs statements in threads, on connections of one engine.

    Args:
        url: The file, or a database in memory, which lives as long as the executor is open.
        options: Sizes and time limits.
    """

    in_host_transaction = False

    def __init__(self, url: URL, options: StoreOptions) -> None:
        self.place = place_of(url)
        self._url = url
        self._options = options
        self._patience = options.pool_timeout + options.statement_timeout
        self._threads: _Threads | None = None
        self._affinity: Affinity | None = None
        self._closing = False
        # Whether its database is in the memory of a parent process.
        self._left = False

    async def open(self, affinity: Affinity) -> None:
        """Open the file, and create it if it does not exist.

        Raises:
            StoreError: If it was open on a database in memory when this process was forked.
        """
        if self._left:
            raise IN_PARENT.as_error()
        memory = self._url.database in MEMORY
        # A relative path is resolved in the current working folder.
        self.place = place_of(self._url)
        try:
            if not memory:
                await probe(self._url)
            engine = open_engine(self._url, self._options)
        except Exception as error:
            raise translate_error(error) from error
        self._closing = False
        self._affinity = affinity
        file = None if memory else DatabaseFile(self.place)
        self._threads = _Threads(engine, self._options, file)

    async def close(self) -> None:
        """Wait for running calls, then close every connection."""
        self._closing = True
        if self._threads is not None:
            await self._threads.close()
            # Only now: if this call is cancelled, the next one closes the parts still open.
            self._threads = None

    def abandon(self) -> None:
        """Wait for running statements, then close every connection.

        In a forked process, leave the connections alone: SQLite forbids using or closing them
        there.
        """
        threads, self._threads = self._threads, None
        if threads is None or self._affinity is None:
            return
        if self._affinity.forked:
            keep(threads)
            self._left = self._url.database in MEMORY
        else:
            threads.shut_down()

    async def run(self, work: Callable[[Connection], _T]) -> _T:
        """Run work on a connection, in the thread that writes."""
        try:
            return await self._opened().run(work)
        except IncidentKitError:
            raise
        except Exception as error:
            raise translate_error(error) from error

    async def read(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement that only reads."""
        threads = self._opened()
        try:
            async with asyncio.timeout(self._patience):
                read = threads.reads if statement in _QUICK else threads.slow_reads
                return await read((statement, values))
        except IncidentKitError:
            raise
        except Exception as error:
            raise translate_error(error) from error

    async def scan(self, work: Work[_T]) -> _T:
        """Run statements that only read, but may read or return very many rows."""
        share = self._opened().share
        await share.take()
        running: list[asyncio.Future[Rows]] = []
        try:
            return await work(partial(self._scan, running))
        finally:
            # A thread notices an interrupt after its caller has gone.
            share.give_after(running)

    async def _scan(
        self,
        running: list[asyncio.Future[Rows]],
        statement: Executable,
        values: Mapping[str, Any],
    ) -> Rows:
        """Run a statement; ``running`` gets a future that ends when its thread is free again."""
        try:
            threads = self._opened()
            scan = _Scan(statement, values)
            running.append(threads.start_scan(scan))
            return await threads.end_scan(scan, running[-1])
        except IncidentKitError:
            raise
        except Exception as error:
            raise translate_error(error) from error

    async def write(self, work: Work[_T]) -> _T:
        """Run statements that write in one transaction, with no other writer from its start."""
        write = _Write(work)
        answer = self._opened().writes(write)
        timer = answer.get_loop().call_later(self._patience, write.give_up, answer)
        try:
            written: _T = await answer
        except IncidentKitError:
            raise
        except Exception as error:
            raise translate_error(error) from error
        finally:
            timer.cancel()
            # Has no effect on a write that has begun, or has ended.
            write.claim()
        return written

    async def transact(self, work: Work[_T]) -> _T:
        """Run statements that write, all or none, as :meth:`write` does."""
        return await self.write(work)

    async def append(self, statement: Executable, rows: Sequence[Mapping[str, Any]]) -> None:
        """Run a statement that inserts, once for each row, in one transaction."""

        async def work(fetch: Fetch) -> None:
            for row in rows:
                await fetch(statement, row)

        await self.write(work)

    def _opened(self) -> _Threads:
        if self._threads is None or self._affinity is None or self._closing:
            raise ClientClosed
        if self._affinity.loop is not running_loop():
            raise self._affinity.error()
        return self._threads


class DatabaseFile:
    """A file that is open, and must stay at its path.

    SQLite reports success for writes to a file that was moved, deleted or replaced, although no
    other program will see them.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._identity = self._look()

    def check(self) -> None:
        """Raise unless the file is still at its path.

        Raises:
            StoreUnavailable: If it was moved, deleted or replaced.
        """
        if self._look() != self._identity:
            raise MOVED.as_error()

    def _look(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self._path)  # noqa: PTH116
        except OSError:
            return None
        return found.st_dev, found.st_ino


class OwnConnection:
    """A connection of the store, which commits each statement unless a transaction is begun.

    Args:
        driver: The connection of ``sqlite3``.
        compiled: The statements that the store has run before; it adds further ones.
        echo: Whether to log every statement, without its values.
    """

    def __init__(
        self, driver: sqlite3.Connection, compiled: dict[Executable, Compiled], *, echo: bool
    ) -> None:
        self.driver = driver
        self._compiled = compiled
        self._echo = echo

    def run(self, sql: str, values: Iterable[Any] = ()) -> sqlite3.Cursor:
        """Run SQL whose values need no conversion."""
        if self._echo:
            logger.info("%s", sql)
        return self.driver.execute(sql, tuple(values))

    def fetch(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement, and return its rows.

        Raises:
            sqlite3.Error: If SQLite refuses it.
            StoreError: If a row cannot be read.
        """
        compiled = self._prepare(statement)
        rows = self._start(compiled, values).fetchall()
        return convert_rows(rows, compiled.converters) if compiled.converters else rows

    def fetch_in_steps(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement as :meth:`fetch` does, but let other threads run every few rows.

        A thread that reads rows keeps the event loop from running for the interpreter's switch
        interval, five milliseconds, each time.
        """
        compiled = self._prepare(statement)
        cursor = self._start(compiled, values)
        rows: list[Any] = []
        while len(some := cursor.fetchmany(STEP)) == STEP:
            rows += convert_rows(some, compiled.converters)
            time.sleep(PAUSE)
        rows += convert_rows(some, compiled.converters)
        return rows

    def _prepare(self, statement: Executable) -> Compiled:
        compiled = self._compiled.get(statement)
        if compiled is None:
            compiled = self._compiled[statement] = STATEMENTS(statement)
        return compiled

    def _start(self, compiled: Compiled, values: Mapping[str, Any]) -> sqlite3.Cursor:
        bound = compiled.bind(values)
        try:
            return self.run(compiled.text, bound)
        except sqlite3.Error as error:
            if may_be_unprepared(error):
                # Nothing was written: try once more with the current schema.
                self.driver.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall()
            elif not is_stale_schema(error):
                raise
            return self.run(compiled.text, bound)


class _Write:
    """A write that is either begun by the writing thread, or given up by its caller.

    Attributes:
        work: What it does alone.
        shared: The same, if it may run together with other writes; None: it may not.
    """

    def __init__(self, work: Work[Any]) -> None:
        self.shared = work if isinstance(work, SharedWork) else None
        self.work = work if self.shared is None else self.shared.alone
        self._begun = False
        self._claimed = Lock()

    def claim(self) -> bool:
        """Claim the write, for the thread or the caller; return False if it was already claimed."""
        return self._claimed.acquire(blocking=False)

    def give_up(self, answer: asyncio.Future[Any]) -> None:
        """Answer that there was no answer in time, unless the write has begun."""
        if self.claim() and not answer.done():
            answer.set_exception(NO_ANSWER.as_error())

    def begin(self) -> bool:
        """Return whether to run it; once begun, it may run again."""
        self._begun = self._begun or self.claim()
        return self._begun


class _Scan:
    """A statement that its caller can interrupt while a thread runs it."""

    def __init__(self, statement: Executable, values: Mapping[str, Any]) -> None:
        self._statement = statement
        self._values = values
        self._driver: sqlite3.Connection | None = None
        self._stopped = False
        # Held while the connection is taken, given back or interrupted: an interrupt must not hit
        # the next statement on it.
        self._turn = Lock()
        self._ended = Event()
        self._interrupting: Thread | None = None

    def run(self, connection: OwnConnection) -> Rows:
        """Run the statement, unless it was stopped before."""
        with self._turn:
            if self._stopped:
                return ()
            self._driver = connection.driver
        try:
            return connection.fetch_in_steps(self._statement, self._values)
        finally:
            with self._turn:
                self._driver = None
            self._ended.set()
            if self._interrupting is not None:
                self._interrupting.join()

    def stop(self) -> None:
        """Interrupt the statement until its thread has noticed, or keep it from starting."""
        with self._turn:
            if self._stopped:
                return
            self._stopped = True
            if self._driver is None:
                return
            self._driver.interrupt()
            # Not on the event loop, which may end before the thread has noticed.
            self._interrupting = Thread(target=self._interrupt, daemon=True)
            self._interrupting.start()

    def _interrupt(self) -> None:
        while not self._ended.wait(INTERRUPT_INTERVAL):
            with self._turn:
                if self._driver is not None:
                    self._driver.interrupt()


class _Threads:
    """The threads of an executor, and their connections.

    Args:
        engine: The connections.
        options: Their number, and time limits.
        file: The file; None: a database in memory, whose one connection serves all.
    """

    def __init__(self, engine: Engine, options: StoreOptions, file: DatabaseFile | None) -> None:
        self._engine = engine
        self._file = file
        self._echo = options.echo
        self._compiled: dict[Executable, Compiled] = {}
        one = file is None
        # Held while the counts of connection uses and of forks change.
        self._turn = Condition()
        self._uses = self._forks = 0
        if not one:
            # A database in memory ends with its connection, and no child can open it.
            open_files.add(self)
        self._writer = ThreadPoolExecutor(1, "incidentkit-sqlite")
        self._readers = (
            self._writer if one else ThreadPoolExecutor(options.pool_size, "incidentkit-sqlite")
        )
        scanning = 1 if one else scanners(options)
        self._scanners = self._writer if one else ThreadPoolExecutor(scanning, "incidentkit-sqlite")
        self.share = scans(scanning, options.pool_timeout)
        self._scan_limit = options.statement_timeout
        self._scans: dict[asyncio.Future[Rows], _Scan] = {}
        # One thread for each batch that may run: a further batch would only wait for a thread.
        running = 1 if one else options.pool_size
        self.writes: Batcher[_Write, Any] = Batcher(self._write_all, patient=True, size=WRITES)
        self.reads: Batcher[tuple[Executable, Mapping[str, Any]], Rows] = Batcher(
            partial(self._read_all, OwnConnection.fetch), running=running, patient=True, size=READS
        )
        self.slow_reads: Batcher[tuple[Executable, Mapping[str, Any]], Rows] = Batcher(
            partial(self._read_all, OwnConnection.fetch_in_steps),
            running=running,
            patient=True,
            size=1,
        )

    async def close(self) -> None:
        """Wait for running work, then close every connection."""
        await self.reads.finish()
        await self.slow_reads.finish()
        await self.writes.finish()
        if self._scans:
            await asyncio.wait(self._scans)
        # Shutting down waits too, but blocks the event loop. When Python exits, executors accept no
        # more work, and their threads have ended.
        with suppress(RuntimeError):
            await asyncio.get_running_loop().run_in_executor(self._writer, lambda: None)
        self.shut_down()

    def shut_down(self) -> None:
        """Wait for the threads to end, then close every connection."""
        for scan in self._scans.values():
            scan.stop()
        self._writer.shutdown()
        self._readers.shutdown()
        self._scanners.shutdown()
        self._engine.dispose()

    def run(self, work: Callable[[Connection], _T]) -> asyncio.Future[_T]:
        """Run work on a connection of SQLAlchemy, in the writing thread."""

        def run() -> _T:
            with self._use(), self._engine.connect() as connection:
                return work(connection)

        return asyncio.get_running_loop().run_in_executor(self._writer, run)

    def start_scan(self, scan: _Scan) -> asyncio.Future[Rows]:
        """Run a statement in a thread for scans."""
        running = asyncio.get_running_loop().run_in_executor(self._scanners, self._lend, scan.run)
        self._scans[running] = scan
        running.add_done_callback(self._forget_scan)
        return running

    async def end_scan(self, scan: _Scan, running: asyncio.Future[Rows]) -> Rows:
        """Wait for a statement; stop it if its time is up or its caller is gone.

        Raises:
            TimeoutError: If the time is up.
        """
        try:
            await asyncio.wait((running,), timeout=self._scan_limit)
            if running.done():
                return running.result()
        finally:
            # Has no effect on a scan that has ended.
            scan.stop()
        raise TimeoutError

    def _forget_scan(self, running: asyncio.Future[Rows]) -> None:
        self._scans.pop(running)
        if not running.cancelled():
            # Retrieve the failure of a scan that was stopped.
            running.exception()

    def _write_all(self, given: Sequence[_Write]) -> asyncio.Future[list[Any]]:
        write = partial(_transact, given=given, check_file=self._check_file)
        return asyncio.get_running_loop().run_in_executor(self._writer, self._lend, write)

    def _read_all(
        self,
        fetch: Callable[[OwnConnection, Executable, Mapping[str, Any]], Rows],
        given: Sequence[tuple[Executable, Mapping[str, Any]]],
    ) -> asyncio.Future[list[Rows | Exception]]:
        def read(connection: OwnConnection) -> list[Rows | Exception]:
            return [_outcome(partial(fetch, connection, *each)) for each in given]

        return asyncio.get_running_loop().run_in_executor(self._readers, self._lend, read)

    def _check_file(self) -> None:
        if self._file is not None:
            self._file.check()

    def _lend(self, work: Callable[[OwnConnection], _T]) -> _T:
        with self._use(), closing(self._engine.raw_connection()) as lent:
            driver: Any = lent.driver_connection
            return work(OwnConnection(driver, self._compiled, echo=self._echo))

    @contextmanager
    def _use(self) -> Iterator[None]:
        """Hold off forks while a connection is used, and check the file."""
        with self._turn:
            while self._forks:
                self._turn.wait()
            self._uses += 1
        try:
            # A new connection would create a file that is missing.
            self._check_file()
            yield
        finally:
            with self._turn:
                self._uses -= 1
                if not self._uses:
                    self._turn.notify_all()

    def pause(self) -> None:
        """Wait for running statements, close every connection, and start no more statements."""
        with self._turn:
            self._forks += 1
            idle = self._turn.wait_for(lambda: not self._uses, FORK_PATIENCE)
        if idle:
            self._engine.dispose()

    def resume(self) -> None:
        """Let statements run again."""
        with self._turn:
            self._forks -= 1
            self._turn.notify_all()


def _transact(
    connection: OwnConnection,
    given: Sequence[_Write],
    check_file: Callable[[], None],
    *,
    apart: bool = False,
) -> list[Any]:
    """Run in one transaction the writes that were not given up, and undo each that fails.

    They run without savepoints first, and those that can run together do so. If one of several
    fails, all run again, each in a savepoint.

    Args:
        connection: The connection.
        given: The writes.
        check_file: Raises unless the file is still at its path.
        apart: Whether to run each write in a savepoint.
    """

    async def fetch(statement: Executable, values: Mapping[str, Any]) -> Rows:
        return connection.fetch(statement, values)

    run = _run_in_savepoint if apart else _run
    # The connection commits after each statement unless a transaction is begun by hand.
    connection.run("BEGIN IMMEDIATE")
    outcomes: list[Any] = []
    try:
        # Again, since the transaction may have waited for another one.
        check_file()
        shared = {} if apart else _outcome(partial(_run_together, connection, given, fetch))
        for write in given:
            if isinstance(shared, Exception):
                outcome: Any = shared
            elif write in shared:
                outcome = shared[write]
            elif not write.begin():
                outcome = None
            else:
                outcome = _outcome(partial(run, connection, write.work, fetch))
            failed = not apart and isinstance(outcome, Exception)
            if failed or not connection.driver.in_transaction:
                break
            outcomes.append(outcome)
        else:
            connection.run("COMMIT")
            return outcomes
    except BaseException:
        with suppress(sqlite3.Error):
            connection.run("ROLLBACK")
        raise
    if connection.driver.in_transaction:
        connection.run("ROLLBACK")
    if not apart:
        return (
            [outcome] if len(given) == 1 else _transact(connection, given, check_file, apart=True)
        )
    # SQLite rolled back the whole transaction, as it does when the disk is full: the other writes
    # run without this one.
    place = len(outcomes)
    others = [*given[:place], *given[place + 1 :]]
    answers = _transact(connection, others, check_file) if others else []
    return [*answers[:place], outcome, *answers[place:]]


def _run_together(
    connection: OwnConnection, given: Sequence[_Write], fetch: Fetch
) -> dict[_Write, Any]:
    """Run the writes that can run together, unless there is only one, and return their answers."""
    works = {write: write.shared for write in given if write.shared is not None and write.begin()}
    if len(works) <= 1:
        return {}
    items = [work.item for work in works.values()]
    together = next(iter(works.values())).together
    answers = _run(connection, lambda fetch: together(fetch, items), fetch)
    return dict(zip(works, answers, strict=True))


def _run_in_savepoint(connection: OwnConnection, work: Work[_T], fetch: Fetch) -> _T:
    """Run one write of a transaction, and undo it if it fails."""
    connection.run("SAVEPOINT incidentkit")
    try:
        done = _run(connection, work, fetch)
    except BaseException:
        with suppress(sqlite3.Error):
            connection.run("ROLLBACK TO incidentkit")
            connection.run("RELEASE incidentkit")
        raise
    connection.run("RELEASE incidentkit")
    return done


def _run(_: OwnConnection, work: Work[_T], fetch: Fetch) -> _T:
    """Run one write without an event loop: statements, all it awaits, never suspend here."""
    steps = work(fetch).__await__()
    try:
        next(steps)
    except StopIteration as end:
        done: _T = end.value
        return done
    raise RuntimeError("The work awaits something other than a statement")


def _outcome(call: Callable[[], _T]) -> _T | Exception:
    try:
        return call()
    except Exception as error:  # noqa: BLE001
        return error

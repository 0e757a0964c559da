"""Rounds of faults: processes under load, faults of processes and servers, and a verdict.

A round has its own database, so that its history stays short enough to be checked as a whole.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import asyncpg
from attrs import Factory, asdict, define, field, frozen

from incidentkit import EventKind, IncidentClient, IncidentEvent, StoreError, UnknownCursor
from incidentkit.domain.cursor import decode_cursor
from incidentkit.domain.values import MAX_WAIT
from incidentkit.store.migrate import upgrade
from tests.faults.history import History, Row, Verdict, check, read_log
from tests.faults.worker import COLUMNS, Settings, sqlite_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from random import Random

    from tests.servers import RedisCluster, RedisSentinel, RedisServer

ROOT = Path(__file__).parents[2]

DEADLINE = 120.0
"""Seconds to wait for a condition before giving up."""

Fault: TypeAlias = "Callable[[], None]"


@define
class Worker:
    """A running process of the load."""

    settings: Settings
    process: subprocess.Popen[bytes]
    offset: int = 0
    answers: int = 0

    def count(self) -> int:
        """Return how many calls of the process have succeeded so far."""
        with Path(self.settings.log).open("rb") as file:
            file.seek(self.offset)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        self.offset += len(new)
        self.answers += new.count(b'"outcome": "done"')
        return self.answers


@frozen
class Figures:
    """Counts of what happened in some rounds."""

    rounds: int = 0
    reads: int = 0
    cached: int = 0
    redis_hits: int = 0
    writes: int = 0
    unknown: int = 0
    undone: int = 0
    faults: Counter[str] = Factory(Counter)
    errors: Counter[str] = Factory(Counter)
    stale: int = 0
    lost: int = 0

    def __add__(self, other: Figures) -> Figures:
        mine, others = asdict(self, recurse=False), asdict(other, recurse=False)
        return Figures(**{name: value + others[name] for name, value in mine.items()})

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {dict(value) if isinstance(value, Counter) else value}"
            for name, value in asdict(self, recurse=False).items()
        )


@define
class Round:
    """A load on one database, and the faults injected into it.

    Args:
        folder: The folder of the logs.
        database_url: An empty database with the schema.
        redis: The round's own server, or None.
        random: Chooses the worker that a fault hits.
        expected: The number of calls that must succeed during a fault, and again after it.
        mutant: The deliberate bug in the processes, or None.
        group: The servers used instead of a single Redis, or None.
        copy_url: A database with the schema and no incidents, or None.
    """

    folder: Path
    database_url: str
    redis: RedisServer | None
    random: Random
    expected: int
    mutant: str | None = None
    group: RedisCluster | RedisSentinel | None = None
    copy_url: str | None = None
    workers: list[Worker] = field(factory=list, init=False)
    faults: Counter[str] = field(factory=Counter, init=False)
    started: list[Settings] = field(factory=list, init=False)
    redis_hits: int = field(default=0, init=False)
    dump: dict[bytes, tuple[bytes, int]] = field(factory=dict, init=False)
    restored: list[tuple[int, int]] = field(factory=list, init=False)
    follower: Follower | None = field(default=None, init=False)

    @contextmanager
    def running(self, clients: int) -> Iterator[None]:
        """Run that many clients and a plain SQL writer, and shut them down cleanly.

        If the block fails, they are killed.
        """
        with ExitStack() as stack:
            stack.callback(self._kill_all)
            for _ in range(clients):
                self._start()
            self._start(sql=True)
            if self.database_url.startswith("postgresql"):
                self.follower = stack.enter_context(Follower(self.database_url))
            self.await_answers()
            yield
            for worker in self.workers:
                assert worker.process.stdin is not None
                worker.process.stdin.close()
            for worker in self.workers:
                assert worker.process.wait(DEADLINE) == 0, self._failed(worker)
            self._count_hits()

    def _start(self, *, sql: bool = False) -> None:
        name = f"w{len(self.started):02}"
        settings = Settings(
            name,
            str(self.folder / f"{name}.log"),
            self.database_url,
            self._redis_url,
            sql,
            self.mutant,
        )
        Path(settings.log).touch()
        with (self.folder / f"{name}.err").open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.worker", json.dumps(asdict(settings))],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stderr=stderr,
                # If this process dies, the system wakes the orphaned group, even if it is stopped.
                process_group=0,
            )
        self.started.append(settings)
        self.workers.append(Worker(settings, process))

    def _kill_all(self) -> None:
        for worker in self.workers:
            worker.process.kill()
            worker.process.communicate()

    def _failed(self, worker: Worker) -> str:
        return (self.folder / f"{worker.settings.name}.err").read_text(errors="replace")

    @property
    def _clients(self) -> list[Worker]:
        return [worker for worker in self.workers if not worker.settings.sql]

    def await_answers(self, *, without: Worker | None = None) -> None:
        """Wait until the expected number of calls has succeeded, with a share in each process.

        For the plain SQL writer, a single success at any time is enough.
        """
        workers = [worker for worker in self._clients if worker is not without]
        others = [each for each in self.workers if each.settings.sql and each is not without]
        before = {worker.settings.name: worker.count() for worker in workers}
        deadline = time.monotonic() + DEADLINE
        while True:
            more = [worker.count() - before[worker.settings.name] for worker in workers]
            if (
                sum(more) >= self.expected
                and min(more) >= self.expected // (4 * len(workers))
                and all(worker.count() for worker in others)
            ):
                return
            for worker in self.workers:
                assert worker.process.poll() is None, self._failed(worker)
            assert time.monotonic() < deadline, (more, self.faults)
            time.sleep(0.005)

    def inject(self, fault: Fault) -> None:
        """Inject a fault into servers or processes, and wait until the load has made progress."""
        self.faults[fault.__name__] += 1
        fault()
        self.await_answers()

    def kill_worker(self) -> None:
        """Kill a process, and replace it once the remaining ones have made progress."""
        worker = self.random.choice(self._clients)
        worker.process.kill()
        worker.process.communicate()
        self.workers.remove(worker)
        self.await_answers()
        self._start()

    def lose_triggers(self) -> None:
        """Drop or disable triggers while the load continues, and let an upgrade restore them."""
        if self.database_url.startswith("postgresql"):
            asyncio.run(execute(self.database_url, 'ALTER TABLE "Incident" DISABLE TRIGGER ALL'))
        else:
            asyncio.run(select(self.database_url, "DROP TRIGGER incident_token_insert"))
            asyncio.run(select(self.database_url, "DROP TRIGGER incident_token_update"))
        try:
            self.await_answers()
        finally:
            assert asyncio.run(upgrade(self.database_url)).restored

    def forge_copy(self) -> None:
        """Fill Redis with the pages of a copy that has no incidents, and start a process.

        Nothing is written meanwhile, so that the copy has the present tokens.
        """
        assert self.copy_url is not None
        worker = self.random.choice(self._clients)
        worker.process.kill()
        worker.process.communicate()
        self.workers.remove(worker)
        asyncio.run(self._forge_copy(self.copy_url))

    async def _forge_copy(self, copy_url: str) -> None:
        connection = await asyncpg.connect(self.database_url)
        try:
            await connection.execute('BEGIN; LOCK TABLE "Incident" IN SHARE MODE')
            tokens = await connection.fetch("SELECT slot, token FROM incident_token")
            await copy_tokens(copy_url, tokens)
            await asyncio.to_thread(self._list_copy, copy_url)
            await asyncio.to_thread(self._start)
            await asyncio.to_thread(self.await_answers)
        finally:
            await connection.close()

    def _list_copy(self, copy_url: str) -> None:
        self.flush_redis()
        settings = Settings(
            "copy",
            str(self.folder / "copy.log"),
            copy_url,
            self._redis_url,
            mutant=self.mutant,
            lists=True,
        )
        subprocess.run(
            [sys.executable, "-m", "tests.faults.worker", json.dumps(asdict(settings))],
            cwd=ROOT,
            check=True,
            input=b"",
        )

    def kill_sql(self) -> None:
        """Kill the plain SQL writer, and start another."""
        (worker,) = (worker for worker in self.workers if worker.settings.sql)
        worker.process.kill()
        worker.process.communicate()
        self.workers.remove(worker)
        self._start(sql=True)

    def pause_worker(self) -> None:
        """Pause a process while the load continues and Redis returns to an old state; resume it."""
        worker = self.random.choice(self.workers)
        worker.process.send_signal(signal.SIGSTOP)
        try:
            self.await_answers(without=worker)
            if self.redis is not None:
                self.restore_redis()
                self.await_answers(without=worker)
        finally:
            worker.process.send_signal(signal.SIGCONT)

    def restore_elsewhere(self) -> None:
        """Make the database one that another server wrote, let writers notice, and put it in order.

        That server has run for longer: its transactions had larger numbers.
        """
        asyncio.run(execute(self.database_url, RESTORE_ELSEWHERE))
        begin = time.monotonic_ns()
        time.sleep(RESTORED)
        self.restored.append((begin, time.monotonic_ns()))
        asyncio.run(upgrade(self.database_url))

    def check(self) -> tuple[Verdict, Figures]:
        """Check the logs against the database, and return the verdict with the figures."""
        history = History()
        for settings in self.started:
            with Path(settings.log).open("rb") as lines:
                read_log(lines, history)
        stored = asyncio.run(stored_rows(self.database_url))
        verdict = check(history, stored)
        verdict.lost += asyncio.run(broken_histories(self.database_url, history))
        verdict.lost += [
            f"{write.message} was acknowledged before the order was restored"
            for write in history.writes
            for begin, end in self.restored
            if begin < write.start and write.end < end and write.message[:3] in self._by_clients
        ]
        if self.follower is not None:
            verdict.lost += asyncio.run(self.follower.faults())
        outcomes = Counter(write.outcome for write in history.writes)
        figures = Figures(
            rounds=1,
            reads=len(history.reads),
            cached=len(history.reads) - history.filled,
            redis_hits=self.redis_hits,
            writes=outcomes["done"],
            unknown=outcomes["unknown"],
            undone=outcomes["undone"],
            faults=self.faults,
            errors=history.errors,
            stale=len(verdict.stale),
            lost=len(verdict.lost),
        )
        return verdict, figures

    @property
    def _by_clients(self) -> set[str]:
        return {settings.name for settings in self.started if not settings.sql}

    @property
    def _redis_url(self) -> str | None:
        server = self.redis or self.group
        return None if server is None else server.url

    @property
    def _redis(self) -> RedisServer:
        assert self.redis is not None
        return self.redis

    def _count_hits(self) -> None:
        """Add Redis's hits so far: its count is lost when it ends."""
        if self.redis is not None:
            with self.redis.client() as client:
                self.redis_hits += client.info("stats")["keyspace_hits"]
                client.config_resetstat()

    def keep_redis(self) -> None:
        """Save the contents of Redis for :meth:`restore_redis`."""
        with self._redis.client() as client:
            self.dump = {
                key: (value, max(client.pttl(key), 0))
                for key in client.scan_iter()
                if (value := client.dump(key)) is not None
            }

    def restore_redis(self) -> None:
        """Restore the saved contents of Redis, and save the current ones for the next time."""
        old = self.dump
        self.keep_redis()
        with self._redis.client() as client:
            client.flushall()
            for key, (value, ttl) in old.items():
                client.restore(key, ttl, value, replace=True)

    def kill_redis(self) -> None:
        """Kill Redis, and start it again once the load has made progress without it."""
        self._count_hits()
        self._redis.kill()
        try:
            self.await_answers()
        finally:
            self._redis.start()

    def pause_redis(self) -> None:
        """Pause Redis while the load continues, and resume it."""
        self._redis.pause()
        try:
            self.await_answers()
        finally:
            self._redis.resume()

    def flush_redis(self) -> None:
        """Empty Redis."""
        with self._redis.client() as client:
            client.flushall()

    def drop_redis_connections(self) -> None:
        """End every connection to Redis."""
        with self._redis.client() as client:
            client.client_kill_filter(_type="normal", skipme=True)

    @property
    def _node(self) -> RedisServer:
        """A random one of the servers that hold pages."""
        assert self.group is not None
        return self.random.choice(self.group.holders)

    def kill_node(self) -> None:
        """Kill one of several servers, and start it again once the load has made progress."""
        node = self._node
        node.kill()
        try:
            self.await_answers()
        finally:
            node.start()

    def pause_node(self) -> None:
        """Pause one of several servers while the load continues, and resume it."""
        node = self._node
        node.pause()
        try:
            self.await_answers()
        finally:
            node.resume()

    def end_postgres_connections(self) -> None:
        """End every connection to the database, several times."""
        for _ in range(4):
            asyncio.run(execute(self.database_url, TERMINATE))
            self.await_answers()


class Follower:
    """Follows the feed of a database by its cursor while faults are injected.

    Args:
        database_url: The database.
    """

    def __init__(self, database_url: str) -> None:
        self._url = database_url
        self._seen: list[tuple[int, ...]] = []
        self._after: str | None = None
        self._stopping = Event()
        self._failed: list[str] = []
        self._thread = Thread(target=lambda: asyncio.run(self._follow()))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    async def _follow(self) -> None:
        async with IncidentClient.open(self._url) as incidents:
            while not self._stopping.is_set():
                try:
                    await self._read(incidents, 0.2)
                except StoreError:
                    # Events are out of order, or the server is away.
                    await asyncio.sleep(0.02)
                except UnknownCursor as error:
                    self._failed.append(str(error))
                    return

    async def _read(self, incidents: IncidentClient, wait: float) -> None:
        page = await incidents.read_changes(self._after, limit=1000, wait=wait)
        self._seen += [decode_cursor(change.cursor, 4)[1:3] for change in page.changes]
        self._after = page.next

    async def faults(self) -> list[str]:
        """Read the rest; return the events that were missed or came twice."""
        statement = "SELECT event_id, nonce FROM incident_event"
        stored = {(event_id, nonce) for event_id, nonce in await select(self._url, statement)}
        async with IncidentClient.open(self._url) as incidents:
            # Transactions of others on the server may hold up the feed.
            for _ in range(round(DEADLINE)):
                if self._failed or stored <= set(self._seen):
                    break
                await self._read(incidents, 1)
        missed = [f"the event {event[0]} was not delivered" for event in stored - set(self._seen)]
        twice = Counter(self._seen) - Counter(set(self._seen))
        return [*self._failed, *missed, *(f"the event {event[0]} came twice" for event in twice)]


RESTORED = 0.3
"""Seconds before a restored database is put in order."""

FURTHER = 10**7
"""By how much further the other server's transactions were."""

RESTORE_ELSEWHERE = f"""
    BEGIN;
    LOCK TABLE "Incident", incident_event, incident_purged_event;
    UPDATE incident_event SET transaction_id = transaction_id + {FURTHER};
    UPDATE incident_purged_event SET transaction_id = transaction_id + {FURTHER};
    UPDATE "Incident" SET transaction_id = transaction_id + {FURTHER};
    COMMIT
"""

TERMINATE = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
)


async def copy_tokens(database_url: str, tokens: Sequence[asyncpg.Record]) -> None:
    """Replace the tokens of a database by those of another one."""
    connection = await asyncpg.connect(database_url)
    try:
        await connection.execute("TRUNCATE incident_token")
        await connection.copy_records_to_table("incident_token", records=map(tuple, tokens))
    finally:
        await connection.close()


async def execute(database_url: str, statement: str) -> None:
    """Run a statement on PostgreSQL, again while it is the victim of a deadlock."""
    connection = await asyncpg.connect(database_url)
    try:
        while True:
            try:
                await connection.execute(statement)
            except asyncpg.DeadlockDetectedError:
                await connection.execute("ROLLBACK")
            else:
                return
    finally:
        await connection.close()


async def stored_rows(database_url: str) -> list[Row]:
    """Return the incidents of a database, read without incidentkit."""
    return [
        Row(incident_id, message, status, source, str(created_at)[:19])
        for incident_id, message, status, source, created_at in await select(
            database_url, f'SELECT {COLUMNS} FROM "Incident"'
        )
    ]


async def select(database_url: str, statement: str) -> list[tuple[Any, ...]]:
    """Return the rows of a statement, run without incidentkit."""
    if not database_url.startswith("postgresql"):
        connection = sqlite3.connect(sqlite_file(database_url), timeout=DEADLINE)
        try:
            return connection.execute(statement).fetchall()
        finally:
            connection.close()
    postgres = await asyncpg.connect(database_url)
    try:
        return [tuple(record) for record in await postgres.fetch(statement)]
    finally:
        await postgres.close()


async def broken_histories(database_url: str, history: History) -> list[str]:
    """Return the faults in the events of the clients' incidents, and in the feed.

    An incident is created once, each of its changes starts from the status that the one before it
    set, its version counts its events, and they include every acknowledged write. The feed has each
    event once.
    """
    async with IncidentClient.open(database_url) as incidents:
        changes: list[IncidentEvent] = []
        after = None
        # All writers have ended, but other transactions on the server may hold up the feed.
        ((count,),) = await select(database_url, "SELECT count(*) FROM incident_event")
        while len(changes) < count:
            page = await incidents.read_changes(after, limit=1000, wait=MAX_WAIT)
            changes += page.changes
            after = page.next
        stored = [incident async for incident in incidents.iterate(order="oldest", batch=1000)]
    faults = []
    if len({change.cursor for change in changes}) != len(changes):
        faults.append("a change came twice")
    by_incident: dict[int, list[IncidentEvent]] = {}
    for change in changes:
        by_incident.setdefault(change.incident_id, []).append(change)
    acknowledged = Counter(write.message for write in history.writes if write.outcome == "done")
    messages = Counter(incident.incident_message for incident in stored)
    for incident in stored:
        message, events = incident.incident_message, by_incident.get(incident.incident_id, [])
        if messages[message] > 1:
            faults.append(f"{message} is stored {messages[message]} times")
        if not events:
            # Created by plain SQL.
            continue
        statuses = [event.to_status for event in events]
        befores = [event.from_status for event in events]
        if (
            events[0].kind is not EventKind.CREATED
            or events[0].actor != message.partition(" ")[0]
            or befores != [None, *statuses[:-1]]
            or statuses[-1] is not incident.incident_type
            or incident.version != len(events)
            or len(events) < acknowledged[message]
        ):
            faults.append(f"{message} is {incident}, by {events}")
    return faults

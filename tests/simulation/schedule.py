"""Simulated processes under load, the faults injected into them, and an exact verdict."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from hashlib import sha256
from itertools import count
from random import Random
from typing import TYPE_CHECKING, Any, Final, cast
from unittest.mock import patch

from attrs import Factory, asdict, define, evolve, field, frozen

from incidentkit import (
    IncidentClient,
    IncidentNotFound,
    IncidentSource,
    IncidentStatus,
    ListQuery,
    NewIncident,
    StoreUnavailable,
)
from incidentkit.cache.base import TTL
from incidentkit.cache.pages import PageCache, seal
from incidentkit.cache.redis import RedisCache
from tests.simulation.loop import PROCESS, SimulatedLoop
from tests.simulation.world import COMMITS, Database, RedisClient, RedisServer, SimulatedStore

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from incidentkit import Incident

PROCESSES: Final = 3
CLIENTS: Final = 2
"""Clients in each process."""

CALLERS: Final = 3
"""Tasks that use a client at the same time."""

DURATION: Final = 4.0
"""Simulated seconds of load."""

PATIENCE: Final = 60.0
"""Simulated seconds within which every call must end once the faults are over."""

INCIDENTS: Final = 12
"""The approximate number of incidents."""

STALENESS: Final = (0.0, 0.3)
"""The simulated values of ``max_staleness``, in seconds."""

QUERIES: Final = (
    ListQuery(1, 4),
    ListQuery(2, 4),
    ListQuery(1, 4, status="new"),
    ListQuery(1, 3, source="partner"),
)


@frozen
class Figures:
    """Counts of what happened in some simulations.

    Attributes:
        seeds: Simulations.
        reads: Lists that returned.
        pages: Pages that were read from the database.
        redis_hits: GETs that found a value.
        writes: Writes that were acknowledged.
        versions: Versions of the database.
        cancelled: Calls whose caller was cancelled.
        refused: Calls that raised an error.
        faults: The injected faults, by kind.
        stale: Lists that the database held at no instant of the allowed time.
        failed: Calls that never ended, or whose error no fault of the database explains.
    """

    seeds: int = 0
    reads: int = 0
    pages: int = 0
    redis_hits: int = 0
    writes: int = 0
    versions: int = 0
    cancelled: int = 0
    refused: int = 0
    faults: Counter[str] = Factory(Counter)
    stale: int = 0
    failed: int = 0

    @property
    def hits(self) -> int:
        """Lists for which no page was read from the database."""
        return self.reads - self.pages

    def __add__(self, other: Figures) -> Figures:
        mine, others = asdict(self, recurse=False), asdict(other, recurse=False)
        return Figures(**{name: value + others[name] for name, value in mine.items()})

    def __str__(self) -> str:
        figures = asdict(self, recurse=False) | {"hits": self.hits, "faults": dict(self.faults)}
        return ", ".join(f"{name} {value}" for name, value in figures.items())


@frozen
class Verdict:
    """The result of a simulation.

    Attributes:
        figures: The counts.
        stale: Each stale list.
        failed: Each call that should have succeeded.
        trace: A hash of the results, their order and their times.
    """

    figures: Figures
    stale: list[str]
    failed: list[str]
    trace: str


@define
class User:
    """A client, and the oldest version that it may still see."""

    name: str
    client: IncidentClient
    floor: int = 0


@define
class Simulation:
    """A load with faults, determined by a seed.

    Args:
        seed: Determines everything.
        max_staleness: The setting of the clients, in seconds.
    """

    seed: int
    max_staleness: float
    random: Random = field(init=False)
    favorite: ListQuery = field(init=False)
    loop: SimulatedLoop = field(init=False)
    database: Database = field(init=False)
    redis: RedisServer = field(init=False)
    callers: dict[str, list[asyncio.Task[None]]] = field(factory=dict, init=False)
    users: dict[str, list[User]] = field(factory=dict, init=False)
    paused: set[str] = field(factory=set, init=False)
    doomed: int = field(default=0, init=False)
    over: bool = field(default=False, init=False)
    counts: Counter[str] = field(factory=Counter, init=False)
    faults: Counter[str] = field(factory=Counter, init=False)
    stale: list[str] = field(factory=list, init=False)
    failed: list[str] = field(factory=list, init=False)
    trace: Any = field(factory=sha256, init=False)
    _expected: dict[tuple[int, str], list[Incident]] = field(factory=dict, init=False)
    _numbers: count[int] = field(factory=count, init=False)
    _snapshots: list[Any] = field(factory=list, init=False)

    def __attrs_post_init__(self) -> None:
        self.random = Random(f"{self.seed} world")
        self.favorite = self.random.choice(QUERIES)
        self.loop = SimulatedLoop(Random(f"{self.seed} order"))
        self.database = Database(self.random)
        self.database.on_commit = self._on_commit
        self.redis = RedisServer(self.random)

    def run(self) -> Verdict:
        """Run the simulation to its end."""
        with (
            patch("incidentkit.session.PageCache", partial(PageCache, clock=self.loop.time)),
            _without_logging(),
        ):
            self.loop.run(self._main())
        figures = Figures(
            seeds=1,
            pages=self.database.pages,
            redis_hits=self.redis.hits,
            versions=len(self.database.history),
            faults=self.faults,
            stale=len(self.stale),
            failed=len(self.failed),
            **{name: self.counts[name] for name in ("reads", "writes", "cancelled", "refused")},
        )
        return Verdict(figures, self.stale, self.failed, self.trace.hexdigest())

    async def _main(self) -> None:
        for _ in range(INCIDENTS):
            self.database.insert(self._incident(), by_client=False)
        for _ in range(PROCESSES):
            self._start_process()
        load = [
            self.loop.create_task(self._write_by_sql()),
            self.loop.create_task(self._break_things()),
        ]
        await asyncio.sleep(DURATION)
        self.over = True
        await asyncio.wait(load)
        await self._await_callers()
        for process, tasks in self.callers.items():
            for task in tasks:
                if not task.done():
                    self.failed.append(f"A call in {process} never ended")
                elif task.exception() is not None:
                    self.failed.append(f"A caller in {process} failed: {task.exception()!r}")
        for user in [user for users in self.users.values() for user in users]:
            for query in QUERIES:
                await self._list(user, query)

    async def _await_callers(self) -> None:
        """Wait for all calls, including those of processes that are still starting."""
        ended: set[asyncio.Task[None]] = set()
        while callers := {task for tasks in self.callers.values() for task in tasks} - ended:
            done, _ = await asyncio.wait(callers, timeout=PATIENCE)
            if not done:
                break
            ended |= done

    def _start_process(self) -> None:
        process = f"process {next(self._numbers)}"
        self.callers[process], self.users[process] = [], []
        context = copy_context()
        context.run(PROCESS.set, process)
        start = self._run_process(process)
        self.callers[process].append(self.loop.create_task(start, context=context))

    async def _run_process(self, process: str) -> None:
        for number in range(CLIENTS):
            timeout = self.random.choice((0.25, 0.25, None))
            redis = cast("Any", RedisClient(self.redis, process, timeout))
            client = IncidentClient(
                cast("Any", SimulatedStore(self.database)),
                cache=RedisCache(redis),
                max_staleness=self.max_staleness,
            )
            await client.connect()
            user = User(f"client {number} of {process}", client)
            self.users[process].append(user)
            for _ in range(CALLERS):
                self.callers[process].append(self.loop.create_task(self._call(user)))

    def _kill(self, process: str) -> None:
        """Kill a process, and start another in its place."""
        if self.callers.pop(process, None) is None:
            return
        del self.users[process]
        self.loop.hold(process)
        self.faults["crash"] += 1
        self.loop.call_later(self.random.uniform(0.0, 0.2), self._start_process)

    def _on_commit(self, process: str) -> None:
        if self.doomed and process in self.callers:
            self.doomed -= 1
            # Its response is on the way, or it is about to clear the pages.
            delay = self.random.choice((0.0, self.random.uniform(0.0, 0.015)))
            self.loop.call_later(delay, self._kill, process)

    async def _call(self, user: User) -> None:
        while not self.over:
            # Some calls come close together.
            await asyncio.sleep(self.random.expovariate(1 / self.random.choice((0.005, 0.15))))
            if self.random.random() < 0.06:
                write = self._write(user, self._change(user))
                # Reads run concurrently with the write.
                others = self.random.choice((0, 0, 1, 2))
                reads = [self._list(user, self.favorite) for _ in range(others)]
                await asyncio.gather(write, *reads)
                if self.random.random() < 0.5:
                    await self._list(user, self.favorite)
            else:
                await self._list(user, self.random.choice((self.favorite, *QUERIES)))

    def _change(self, user: User) -> Coroutine[Any, Any, Incident]:
        if self.random.random() < 0.5:
            return user.client.create(self._incident())
        incident = self.random.choice(self.database.current.incidents[:6])
        status = self.random.choice(list(IncidentStatus))
        return user.client.update_status(incident.incident_id, status)

    def _limit(self) -> asyncio.Timeout:
        """Return a timeout that cancels some of the callers."""
        cancelled = self.random.random() < 0.05
        return asyncio.timeout(self.random.uniform(0.0, 0.03) if cancelled else None)

    async def _write(self, user: User, write: Coroutine[Any, Any, Incident]) -> None:
        commits: list[int] = []
        COMMITS.set(commits)
        failures, limit = self.database.failures, self._limit()
        try:
            async with limit:
                await write
        except IncidentNotFound:
            pass
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001
            self._judge(user, limit, failures, error)
        else:
            self.counts["writes"] += 1
            user.floor = max([user.floor, *commits])

    async def _list(self, user: User, query: ListQuery) -> None:
        first, floor, start = self.database.number, user.floor, self.loop.time()
        failures, limit = self.database.failures, self._limit()
        try:
            async with limit:
                answer = await user.client.list(query.page, query.limit, query.status, query.source)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001
            self._judge(user, limit, failures, error)
        else:
            self.counts["reads"] += 1
            now = self.loop.time()
            self.trace.update(f"{now} {user.name} {query.cache_key} {answer}".encode())
            first = max(floor, self._number_at(start - self.max_staleness, before=first))
            self._check(user, query, answer, first, start)

    def _number_at(self, time: float, *, before: int) -> int:
        """Return the number of the latest version at a time, at most ``before``."""
        while before and self.database.history[before].since > time:
            before -= 1
        return before

    def _judge(
        self, user: User, limit: asyncio.Timeout, failures: int, error: BaseException
    ) -> None:
        """Record a call that raised an error, and fail it if no fault explains the error."""
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise error
        if isinstance(error, TimeoutError) and limit.expired():
            self.counts["cancelled"] += 1
            return
        self.counts["refused"] += 1
        if self.database.failures == failures or not isinstance(error, StoreUnavailable):
            self.failed.append(f"{user.name} at {self.loop.time():.6f}: {error!r}")

    def _check(
        self, user: User, query: ListQuery, answer: list[Incident], first: int, start: float
    ) -> None:
        last = self.database.number
        for number in range(last, first - 1, -1):
            if answer == self._page(number, query):
                return
        was = next((n for n in range(last, -1, -1) if answer == self._page(n, query)), None)
        self.stale.append(
            f"{user.name} read {query.cache_key} from {start:.6f} to {self.loop.time():.6f}, "
            f"versions {first} to {last}, and got that of version {was}"
        )

    def _page(self, number: int, query: ListQuery) -> list[Incident]:
        key = number, query.cache_key
        if key not in self._expected:
            self._expected[key] = self.database.history[number].page(query)
        return self._expected[key]

    def _incident(self) -> NewIncident:
        number = next(self._numbers)
        source = self.random.choice(list(IncidentSource))
        return NewIncident(f"Incident {number}", source, self.random.choice(list(IncidentStatus)))

    async def _write_by_sql(self) -> None:
        """Change incidents outside incidentkit."""
        while not self.over:
            await asyncio.sleep(self.random.expovariate(1 / 0.12))
            incidents = self.database.current.incidents
            incident = self.random.choice(incidents)
            if len(incidents) > INCIDENTS:
                self.database.delete(incident, by_client=False)
            elif self.random.random() < 0.3:
                self.database.insert(self._incident(), by_client=False)
            else:
                message = f"Changed, {next(self._numbers)}"
                self.database.update(evolve(incident, incident_message=message), by_client=False)

    async def _break_things(self) -> None:
        """Inject a few kinds of faults repeatedly, and repair everything at the end."""
        chosen = self.random.sample(sorted(KINDS), self.random.randint(3, 7))
        while not self.over:
            await asyncio.sleep(self.random.expovariate(1 / 0.15))
            kind = self.random.choice(chosen)
            self.faults[kind] += 1
            KINDS[kind](self)
        self.doomed = 0
        self.redis.cut.clear()
        self.redis.late = self.redis.out_of_step = self.database.failing = self.database.slow = 0
        self._resume_all()

    def _resume_all(self) -> None:
        for process in sorted(self.paused):
            self._resume(process)

    def _doom(self) -> None:
        self.doomed = 1

    def _a_process(self) -> str | None:
        return self.random.choice(sorted(self.callers)) if self.callers else None

    def _cut(self) -> None:
        if (process := self._a_process()) is not None:
            self.redis.cut[process] = self.random.choice(("error", "hang"))
            self.loop.call_later(self.random.uniform(0.05, 1.0), self.redis.cut.pop, process, None)

    def _for_a_while(self, server: Database | RedisServer, name: str, value: float) -> None:
        setattr(server, name, value)
        self.loop.call_later(self.random.uniform(0.05, 0.6), setattr, server, name, 0.0)

    def _swap(self) -> None:
        if len(pages := self.redis.pages()) >= 2:
            one, other = self.random.sample(pages, 2)
            values = self.redis.values
            values[one], values[other] = values[other], values[one]

    def _restore(self) -> None:
        if self._snapshots and self.random.random() < 0.6:
            self.redis.values = self.random.choice(self._snapshots)()
        else:
            snapshot = RedisServer(self.random)
            snapshot.values = self.redis.copy()
            self._snapshots.append(snapshot.copy)

    def _evict(self) -> None:
        keys = list(self.redis.values)
        for key in self.random.sample(keys, self.random.randint(0, len(keys))):
            del self.redis.values[key]

    def _fail_over(self) -> None:
        last = self.database.number
        self.database.go_back(max(INCIDENTS, last - self.random.randint(1, 6)))
        if not self.database.current.guarded:
            self.loop.call_later(self.random.uniform(0.01, 0.2), self.database.mend)

    def _empty_token(self) -> None:
        """Empty the token, once or several times."""
        for _ in range(self.random.randint(1, 4)):
            self.loop.call_later(self.random.uniform(0.0, 0.4), self.database.empty_token)

    def _lose_triggers(self) -> None:
        self.database.lose_triggers()
        self.loop.call_later(self.random.uniform(0.01, 0.2), self.database.mend)

    def _forge_copy(self) -> None:
        """Put into Redis a page of a copy of the database that has its token and no incident.

        The copy may also have no token, and be of a version that stores such pages.
        """
        token = self.database.token_of(self.database.current, "elsewhere")
        if token is None or self.random.random() < 0.3:
            token = ""
        key = self.random.choice(QUERIES).cache_key
        self.redis.values[key] = seal(key, token, b"[]"), self.loop.time() + TTL

    def _forge(self) -> None:
        """Replace the pages in Redis a few times by ones without incidents.

        The forger knows all that Redis holds, and how a page is sealed. It keeps the proof of a
        page, or takes another text that it finds beside the page for the token.
        """
        for _ in range(self.random.randint(1, 20)):
            self.loop.call_later(self.random.uniform(0.0, 0.4), self._forge_pages)

    def _forge_pages(self) -> None:
        for key in self.redis.pages():
            value, until = self.redis.values[key]
            found = json.loads(value) if isinstance(value, bytes) else {}
            texts = [text for text in found.values() if isinstance(text, str)]
            forged = json.dumps({**found, "incidents": []}, separators=(",", ":")).encode()
            guesses = [seal(key, text, b"[]") for text in texts]
            self.redis.values[key] = self.random.choice([forged, *guesses]), until

    def _pause(self) -> None:
        process = self._a_process()
        if process is not None and process not in self.paused:
            self.paused.add(process)
            self.loop.hold(process)
            self.loop.call_later(self.random.uniform(0.01, 0.8), self._resume, process)

    def _resume(self, process: str) -> None:
        if process in self.paused:
            self.paused.remove(process)
            # A process that was killed meanwhile stays dead.
            if process in self.callers:
                self.loop.release(process)


KINDS: Final[dict[str, Callable[[Simulation], None]]] = {
    "crash_after_commit": Simulation._doom,
    "cut": Simulation._cut,
    "late_redis": lambda here: here._for_a_while(here.redis, "late", 0.4),
    "out_of_step": lambda here: here._for_a_while(here.redis, "out_of_step", 0.5),
    "swapped_keys": Simulation._swap,
    "redis_snapshot": Simulation._restore,
    "eviction": Simulation._evict,
    "flushall": lambda here: here.redis.flush(),
    "failover": Simulation._fail_over,
    "emptied_token": Simulation._empty_token,
    "lost_trigger": Simulation._lose_triggers,
    "forged_copy": Simulation._forge_copy,
    "forger": Simulation._forge,
    "pause": Simulation._pause,
    "outage": lambda here: here._for_a_while(here.database, "failing", 0.5),
    "slow_database": lambda here: here._for_a_while(here.database, "slow", 0.3),
}
"""All kinds of faults; each simulation uses some of them."""


def simulate(seed: int, max_staleness: float = 0.0) -> Verdict:
    """Return the verdict on the simulation with this seed."""
    return Simulation(seed, max_staleness).run()


def replay(seed: int, max_staleness: float) -> str:
    """Return the command that runs a simulation again."""
    only = f"--first {seed} --seeds 1 --max-staleness {max_staleness:g}"
    return f"python -m tests.simulation {only}"


@contextmanager
def _without_logging() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable()
    try:
        yield
    finally:
        logging.disable(before)

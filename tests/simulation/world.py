"""A simulated database and a simulated Redis, with their contents and faults."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from attrs import define, evolve, field, frozen
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from incidentkit import Incident, IncidentNotFound, StoreUnavailable
from incidentkit.store.page import Page
from tests.simulation.loop import PROCESS, SERVERS

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from incidentkit import ListQuery, NewIncident
    from incidentkit.domain.commands import StatusChange

_T = TypeVar("_T")

Operation: TypeAlias = Literal["insert", "update", "delete"]
Command: TypeAlias = "tuple[str | bytes | int, ...]"

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)

_WRONG_TYPE = "WRONGTYPE Operation against a key holding the wrong kind of value"

COMMITS: ContextVar[list[int] | None] = ContextVar("COMMITS", default=None)
"""The list to which a write appends the number of the version that it committed."""


@frozen
class Version:
    """The contents of the database from one commit to the next.

    Attributes:
        incidents: Newest first.
        token: The row of the token; None while emptied by hand.
        since: The simulated time of the commit.
        next_id: The id of the next incident.
        guarded: Whether the triggers are there, which replace the row.
    """

    incidents: tuple[Incident, ...]
    token: str | None
    since: float
    next_id: int
    guarded: bool = True

    def page(self, query: ListQuery) -> list[Incident]:
        """Return the expected page of a list."""
        found = [
            one
            for one in self.incidents
            if query.status in (None, one.incident_type) and query.source in (None, one.source)
        ]
        return found[query.offset : query.offset + query.limit]


@define
class Database:
    """The database, with all its versions.

    Attributes:
        history: Its versions, in the order of their commits; the last is current.
        pages: The number of pages read.
        tokens: The number of tokens read alone.
        failures: The number of requests that failed.
        failing: The fraction of requests that fail, 0 to 1.
        slow: The fraction of requests that are slow, 0 to 1.
        on_commit: Called with the process of each write by a client.
    """

    random: Random
    history: list[Version] = field(init=False)
    pages: int = field(default=0, init=False)
    tokens: int = field(default=0, init=False)
    failures: int = field(default=0, init=False)
    failing: float = field(default=0.0, init=False)
    slow: float = field(default=0.0, init=False)
    on_commit: Callable[[str], None] = field(default=lambda _: None, init=False)

    def __attrs_post_init__(self) -> None:
        self.history = [Version((), self.new_token(), 0.0, 1)]

    @property
    def current(self) -> Version:
        """The current version."""
        return self.history[-1]

    @property
    def number(self) -> int:
        """The number of the current version."""
        return len(self.history) - 1

    def new_token(self) -> str:
        """Return a token that was never used before."""
        return f"{self.random.getrandbits(64):016x}"

    def trigger(self, operation: Operation, *, by_client: bool) -> str | None:  # noqa: ARG002
        """Return the row of the token after a change."""
        return self.new_token() if self.current.guarded else self.current.token

    def token_of(self, version: Version, place: str = "here") -> str | None:
        """Return the token that a statement sees: that of the row in its place.

        Args:
            version: The contents that the statement sees.
            place: The database; a copy with the same row is another one.
        """
        if version.token is None or not version.guarded:
            return None
        return f"{version.token} {place}"

    def insert(self, incident: NewIncident, *, by_client: bool = True) -> Incident:
        """Commit a new incident and return it."""
        now, new_id = asyncio.get_running_loop().time(), self.current.next_id
        created_at = EPOCH + timedelta(seconds=now)
        stored = Incident(
            new_id, incident.incident_message, incident.incident_type, incident.source, created_at
        )
        incidents = (stored, *self.current.incidents)
        token = self.trigger("insert", by_client=by_client)
        self._commit(evolve(self.current, incidents=incidents, token=token, next_id=new_id + 1))
        return stored

    def update(self, changed: Incident, *, by_client: bool = True) -> None:
        """Commit a change of an existing incident."""
        incidents = tuple(
            changed if one.incident_id == changed.incident_id else one
            for one in self.current.incidents
        )
        token = self.trigger("update", by_client=by_client)
        self._commit(evolve(self.current, incidents=incidents, token=token))

    def delete(self, incident: Incident, *, by_client: bool = False) -> None:
        """Commit the removal of an incident."""
        incidents = tuple(one for one in self.current.incidents if one != incident)
        token = self.trigger("delete", by_client=by_client)
        self._commit(evolve(self.current, incidents=incidents, token=token))

    def lose_triggers(self) -> None:
        """Drop the triggers, which nothing but the guard notices."""
        self._commit(evolve(self.current, guarded=False))

    def mend(self) -> None:
        """Restore the triggers, and replace the token."""
        self._commit(evolve(self.current, guarded=True, token=self.new_token()))

    def empty_token(self) -> None:
        """Remove the token by hand."""
        self._commit(evolve(self.current, token=None))

    def go_back(self, number: int) -> None:
        """Commit an earlier version again, including its token."""
        self._commit(self.history[number])

    def _commit(self, version: Version) -> None:
        self.history.append(evolve(version, since=asyncio.get_running_loop().time()))

    def delay(self) -> float:
        """Return the seconds of a one-way trip to or from the database."""
        if self.random.random() < self.slow:
            return self.random.uniform(0.02, 1.5)
        if self.random.random() < 0.08:
            return self.random.uniform(0.006, 0.08)
        return self.random.uniform(0.0005, 0.006)

    async def request(self, effect: Callable[[], _T]) -> _T:
        """Apply an effect, even if the caller is gone, and return its result."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[_T] = loop.create_future()

        def land() -> None:
            if self.random.random() < self.failing:
                self.failures += 1
                # A failed write may still have been committed.
                if self.random.random() < 0.5:
                    effect()
                error = StoreUnavailable("it is away")
                loop.call_later(self.delay(), _fail, answer, error, context=SERVERS)
                return
            loop.call_later(self.delay(), _settle, answer, effect(), context=SERVERS)

        loop.call_later(self.delay(), land, context=SERVERS)
        return await answer


@define
class SimulatedStore:
    """The part of an :class:`~incidentkit.store.IncidentStore` that lists and changes need."""

    database: Database

    async def open(self) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Do nothing."""

    async def check(self) -> None:
        """Send an empty request to the database."""
        await self.database.request(lambda: None)

    async def create(self, incident: NewIncident, **_: object) -> Incident:
        """Commit the incident and return it."""
        return await self._write(lambda: self.database.insert(incident))

    async def list(self, query: ListQuery) -> Page:
        """Return the page with its token."""

        def effect() -> Page:
            self.database.pages += 1
            version = self.database.current
            return Page(version.page(query), self.database.token_of(version))

        return await self.database.request(effect)

    async def token(self) -> str | None:
        """Return the token."""

        def effect() -> str | None:
            self.database.tokens += 1
            return self.database.token_of(self.database.current)

        return await self.database.request(effect)

    async def get(self, incident_id: int) -> Incident | None:
        """Return the incident, or None."""
        return await self.database.request(lambda: self._find(incident_id))

    async def update_status(self, change: StatusChange, **_: object) -> Incident:
        """Change the status and return the incident."""

        def effect() -> Incident | None:
            incident = self._find(change.incident_id)
            if incident is None:
                return None
            changed = evolve(incident, incident_type=change.status)
            self.database.update(changed)
            return changed

        changed = await self._write(effect)
        if changed is None:
            raise IncidentNotFound(change.incident_id)
        return changed

    def _find(self, incident_id: int) -> Incident | None:
        found = (one for one in self.database.current.incidents if one.incident_id == incident_id)
        return next(found, None)

    async def _write(self, effect: Callable[[], _T]) -> _T:
        process, commits = PROCESS.get(), COMMITS.get()

        def write() -> _T:
            before = self.database.number
            answer = effect()
            if self.database.number > before:
                if commits is not None:
                    commits.append(self.database.number)
                if process is not None:
                    self.database.on_commit(process)
            return answer

        return await self.database.request(write)


@define
class RedisServer:
    """A Redis, and the network between it and the processes.

    Attributes:
        values: Its values and their expiry times; a value is a string, or the names in a set.
        cut: The processes that cannot reach it, and whether they get an error or hang.
        late: The fraction of requests that take effect long after they were sent, 0 to 1.
        out_of_step: The fraction of MGETs that get the response to the one before, 0 to 1.
        hits: The number of GETs that found a value.
    """

    random: Random
    values: dict[str, tuple[bytes | dict[bytes, None], float]] = field(factory=dict, init=False)
    cut: dict[str, Literal["error", "hang"]] = field(factory=dict, init=False)
    late: float = field(default=0.0, init=False)
    out_of_step: float = field(default=0.0, init=False)
    hits: int = field(default=0, init=False)

    def execute(self, command: Command) -> Any:
        """Execute a command and return its response."""
        now = asyncio.get_running_loop().time()
        self.values = {key: held for key, held in self.values.items() if held[1] > now}
        match command:
            case ["PING"]:
                return True
            case ["MGET", *keys]:
                return [self._get(str(key)) for key in keys]
            case ["SET", str(key), bytes(value), "EX", int(seconds)]:
                self.values[key] = value, now + seconds
                return True
            case ["UNLINK", str() | bytes() as key]:
                name = key if isinstance(key, str) else key.decode()
                return int(self.values.pop(name, None) is not None)
            case ["EXPIRE", str(key), int(seconds)] if key in self.values:
                self.values[key] = self.values[key][0], now + seconds
                return 1
            case _:
                return self._execute_on_set(command)

    def _get(self, key: str) -> bytes | None:
        value, _ = self.values.get(key, (None, 0.0))
        if isinstance(value, dict):
            return None
        self.hits += value is not None
        return value

    def _execute_on_set(self, command: Command) -> Any:
        match command:
            case ["SADD", str(key), *given]:
                names = self._names(key)
                self.values.setdefault(key, (names, float("inf")))
                before = len(names)
                names.update(dict.fromkeys(str(name).encode() for name in given))
                return len(names) - before
            case ["SCARD", str(key)]:
                return len(self._names(key))
            case ["SPOP", str(key), int(number)]:
                names = self._names(key)
                chosen = self.random.sample(list(names), min(number, len(names)))
                for one in chosen:
                    del names[one]
                if not names:
                    self.values.pop(key, None)
                return chosen
            case ["EXPIRE", *_]:
                return 0
            case _:
                raise ResponseError(f"ERR unknown command {command[0]!r}")

    def _names(self, key: str) -> dict[bytes, None]:
        names, _ = self.values.get(key, ({}, 0.0))
        if isinstance(names, bytes):
            raise ResponseError(_WRONG_TYPE)
        return names

    def flush(self) -> None:
        """Remove all values."""
        self.values.clear()

    def copy(self) -> dict[str, tuple[bytes | dict[bytes, None], float]]:
        """Return a snapshot of its values."""
        return {
            key: (value if isinstance(value, bytes) else value.copy(), until)
            for key, (value, until) in self.values.items()
        }

    def pages(self) -> list[str]:
        """Return the keys of its strings."""
        return [key for key, (value, _) in self.values.items() if isinstance(value, bytes)]

    def send(self, client: RedisClient, commands: list[Command], answer: _Answer) -> None:
        """Execute the commands one after another, and send their responses."""
        loop = asyncio.get_running_loop()
        delay = self.random.uniform(0.0002, 0.004)
        cut = self.cut.get(client.process)
        if cut == "error":
            error = RedisConnectionError("Connection reset by peer")
            loop.call_later(delay, _fail, answer, error, context=SERVERS)
            return
        if cut == "hang":
            # A request that was sent before the cut still arrives.
            if self.random.random() < 0.5:
                delay = self.random.uniform(0.0, 4.0)
                lost: _Answer = loop.create_future()
                loop.call_later(delay, self._land, client, commands, [], lost, context=SERVERS)
            return
        if self.random.random() < self.late:
            delay = self.random.uniform(0.05, 3.0)
        loop.call_later(delay, self._land, client, commands, [], answer, context=SERVERS)

    def _land(
        self, client: RedisClient, commands: list[Command], answers: list[Any], answer: _Answer
    ) -> None:
        loop = asyncio.get_running_loop()
        try:
            answers.append(self.execute(commands[len(answers)]))
        except ResponseError as error:
            answers.append(error)
        if len(answers) < len(commands):
            # Commands of other clients come between those of a pipeline.
            delay = self.random.choice((0.0, self.random.uniform(0.0, 0.003)))
            loop.call_later(delay, self._land, client, commands, answers, answer, context=SERVERS)
            return
        if commands[0][0] == "MGET":
            if self.random.random() < self.out_of_step:
                answers, client.previous = client.previous, answers
            else:
                client.previous = answers
        delay = self.random.uniform(0.0002, 0.004)
        errors = [one for one in answers if isinstance(one, ResponseError)]
        if errors:
            loop.call_later(delay, _fail, answer, errors[0], context=SERVERS)
        else:
            loop.call_later(delay, _settle, answer, answers, context=SERVERS)


_Answer: TypeAlias = "asyncio.Future[list[Any]]"


@define
class RedisClient:
    """The part of a redis-py client that a :class:`~incidentkit.cache.redis.RedisCache` uses.

    Args:
        server: The Redis.
        process: The process that uses it.
        timeout: Seconds to wait for a response; None: no limit.
    """

    server: RedisServer
    process: str
    timeout: float | None
    previous: list[Any] = field(factory=lambda: [None], init=False)

    def pipeline(self, *, transaction: bool) -> Pipeline:
        """Return an empty batch of commands."""
        assert not transaction
        return Pipeline(self)


@define
class Pipeline:
    """Commands that are sent together."""

    client: RedisClient
    commands: list[Command] = field(factory=list, init=False)

    def execute_command(self, *command: str | bytes | int) -> None:
        """Add a command."""
        self.commands.append(command)

    async def execute(self, raise_on_error: bool = True) -> list[Any]:  # noqa: FBT002
        """Send the commands and return their responses, or raise the first error."""
        assert raise_on_error
        loop = asyncio.get_running_loop()
        answer: _Answer = loop.create_future()
        if not self.commands:
            return []
        self.client.server.send(self.client, self.commands, answer)
        if self.client.timeout is None:
            return await answer
        error = RedisTimeoutError("Timeout reading from socket")
        timer = loop.call_later(self.client.timeout, _fail, answer, error)
        try:
            return await answer
        finally:
            timer.cancel()


def _settle(answer: asyncio.Future[_T], value: _T) -> None:
    if not answer.done():
        answer.set_result(value)


def _fail(answer: asyncio.Future[Any], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)

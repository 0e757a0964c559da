"""The client behaves like a plain model under any sequence of calls, on both databases."""
# ruff: noqa: D102  (the name of a rule says what it does; a protocol documents its methods)

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
from abc import ABC, abstractmethod
from contextlib import closing, nullcontext
from contextvars import copy_context
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg
import pytest
from attrs import evolve
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis import Redis

from incidentkit import (
    DuplicateOpenIncident,
    EventKind,
    IdempotencyKeyReused,
    Incident,
    IncidentClient,
    IncidentNotFound,
    IncidentSource,
    IncidentStatus,
    InvalidIncident,
    NewIncident,
    VersionConflict,
    acting_as,
)
from incidentkit.cache import INDEX_KEY
from incidentkit.cache.pages import PageCache
from incidentkit.domain.values import MAX_ID
from incidentkit.store.store import Store
from tests.strategies import padding, sources, statuses, stripped_messages

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

pytestmark = pytest.mark.unmeasured

settings.register_profile(
    "state_machine",
    deadline=None,
    max_examples=20,
    stateful_step_count=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    # Explaining a failure runs it many times over.
    phases=set(Phase) - {Phase.explain},
)
settings.register_profile(
    "thorough",
    settings.get_profile("state_machine"),
    max_examples=500,
    stateful_step_count=60,
)

PROFILE = os.environ.get("INCIDENTKIT_TEST_PROFILE", "state_machine")
"""Set it to ``thorough`` for a run of many minutes."""

LONG_AGO = datetime(2025, 1, 1, tzinfo=UTC)

_T = TypeVar("_T")


class Database(ABC):
    """A database to which the test also writes without incidentkit."""

    url: str

    @abstractmethod
    async def empty(self) -> None:
        """Remove every row, and restart the ids at 1."""

    @abstractmethod
    async def execute(self, statement: str) -> None:
        """Run a statement and commit."""


class SqliteFile(Database):
    """A file that replaces itself with a migrated, empty one."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._path = Path(url.removeprefix("sqlite+aiosqlite:///"))
        self._template = self._path.with_suffix(".template")

    async def empty(self) -> None:
        if not self._template.exists():
            async with IncidentClient.open(f"sqlite+aiosqlite:///{self._template}"):
                pass
        for leftover in self._path.parent.glob(f"{self._path.name}*"):
            leftover.unlink()
        shutil.copyfile(self._template, self._path)

    async def execute(self, statement: str) -> None:
        with closing(sqlite3.connect(self._path)) as connection, connection:
            connection.execute(statement)


class PostgresDatabase(Database):
    """A database of a PostgreSQL server."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def empty(self) -> None:
        await self.execute(
            'TRUNCATE "Incident", incident_event, incident_purged_event, incident_idempotency_key '
            "RESTART IDENTITY"
        )

    async def execute(self, statement: str) -> None:
        connection = await asyncpg.connect(self.url)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()


class World:
    """A database, an optional Redis, and counts of lists and of pages read from the database."""

    clients = 2

    def __init__(self, database: Database, redis_url: str | None) -> None:
        self.database = database
        self.redis_url = redis_url
        self.redis = None if redis_url is None else Redis.from_url(redis_url)
        self.lists = 0
        self.pages_read = 0

    def close(self) -> None:
        """Close the connection to Redis."""
        if self.redis:
            self.redis.close()


class IncidentMachine(RuleBasedStateMachine):
    """Each rule is a step that an application, its users or other programs may take next."""

    known = Bundle("known")
    which = st.integers(0, 1)
    messages = stripped_messages(max_size=30)
    several = st.lists(st.builds(NewIncident, messages, sources), min_size=2, max_size=3)

    world: World
    """Set by the test, in its own subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.model: dict[int, Incident] = {}
        self.answers: dict[str, Incident] = {}
        self.happened: dict[int, list[tuple[Any, ...]]] = {}
        self.last_id = 0
        self.clients: list[IncidentClient] = []

    def run(self, call: Coroutine[Any, Any, _T]) -> _T:
        return self.runner.run(call, context=copy_context())

    def client(self, which: int) -> IncidentClient:
        return self.clients[which % len(self.clients)]

    def newest(
        self,
        page: int = 1,
        limit: int = 10,
        status: IncidentStatus | None = None,
        source: IncidentSource | None = None,
    ) -> list[Incident]:
        """Return the expected page of a list."""
        matching = [
            incident
            for incident in self.model.values()
            if status in (None, incident.incident_type) and source in (None, incident.source)
        ]
        matching.sort(key=lambda one: (one.created_at, one.incident_id), reverse=True)
        return matching[(page - 1) * limit : page * limit]

    def remember(self, incident: Incident) -> int:
        """Add a created incident to the model, and return its id."""
        assert incident.incident_id > self.last_id
        assert abs(datetime.now(UTC) - incident.created_at) < timedelta(hours=1)
        check_types(incident)
        self.last_id = incident.incident_id
        self.model[incident.incident_id] = incident
        self.record(incident, EventKind.CREATED, to_status=incident.incident_type)
        return incident.incident_id

    def record(
        self,
        incident: Incident,
        kind: EventKind,
        *,
        from_status: IncidentStatus | None = None,
        to_status: IncidentStatus | None = None,
        actor: str | None = None,
        note: str | None = None,
    ) -> None:
        """Add an event to the model."""
        events = self.happened.setdefault(incident.incident_id, [])
        events.append((kind, from_status, to_status, actor, note))

    def connect(self, which: int) -> None:
        """Open a new client at this index."""
        client = IncidentClient.open(self.world.database.url, self.world.redis_url)
        self.clients[which:which] = [client]
        self.run(client.connect())

    def disconnect(self, which: int) -> None:
        """Close and remove the client at this index."""
        self.run(self.clients.pop(which).close())

    def flush(self, *keys: str) -> None:
        """Remove these keys from Redis, or all, as an operator would."""
        if self.world.redis is None:
            return
        if keys:
            self.world.redis.delete(*keys)
        else:
            self.world.redis.flushdb()

    def write_elsewhere(self, statement: str) -> None:
        """Change the database without incidentkit."""
        self.run(self.world.database.execute(statement))

    @initialize()
    def begin(self) -> None:
        self.run(self.world.database.empty())
        self.flush()
        for which in range(self.world.clients):
            self.connect(which)

    def teardown(self) -> None:
        while self.clients:
            self.disconnect(0)
        self.runner.close()

    # Users

    @rule(
        target=known,
        which=which,
        before=padding,
        message=messages,
        after=padding,
        source=sources,
        status=st.none() | statuses,
        form=st.sampled_from(["members", "values", "ready"]),
    )
    def create(
        self,
        *,
        which: int,
        before: str,
        message: str,
        after: str,
        source: IncidentSource,
        status: IncidentStatus | None,
        form: str,
    ) -> int:
        client, text = self.client(which), before + message + after
        status_given: dict[str, Any] = {} if status is None else {"incident_type": status}
        if form == "ready":
            call = client.create(NewIncident(text, source, **status_given))
        elif form == "members":
            call = client.create(text, source=source, **status_given)
        else:
            given = {"source": source, **status_given}
            values: dict[str, Any] = {name: str(value.value) for name, value in given.items()}
            call = client.create(text, **values)
        incident = self.run(call)
        assert incident.incident_message == message
        assert incident.incident_type is (status or IncidentStatus.NEW)
        assert incident.source is source
        return self.remember(incident)

    @rule(
        which=which,
        fault=st.sampled_from(
            [
                (["incident_message"], ("test ", "operator", "new")),
                (["incident_message"], ("Disk\x00is full", "operator", "new")),
                (["source"], ("Disk is full", None, "new")),
                (["incident_type"], ("Disk is full", "partner", "done")),
                (["incident_message", "source", "incident_type"], (" ", "new", "partner")),
            ]
        ),
    )
    def create_invalid(self, which: int, fault: tuple[list[str], tuple[Any, Any, Any]]) -> None:
        fields, (message, source, status) = fault
        with pytest.raises(InvalidIncident) as caught:
            self.run(self.client(which).create(message, source=source, incident_type=status))
        assert [error.field for error in caught.value.errors] == fields

    @rule(target=known, which=which, new=several)
    def create_several_at_once(self, which: int, new: list[NewIncident]) -> MultipleResults[int]:
        client = self.client(which)

        async def create_and_list() -> list[Incident]:
            calls = [call for one in new for call in (client.create(one), client.list())]
            return [one for one in await asyncio.gather(*calls) if isinstance(one, Incident)]

        created = self.run(create_and_list())
        for incident, one in zip(created, new, strict=True):
            assert incident.incident_message == one.incident_message
            assert incident.source is one.source
        by_id = sorted(created, key=lambda incident: incident.incident_id)
        return multiple(*map(self.remember, by_id))

    @rule(
        which=which,
        page=st.sampled_from([1, 1, 1, 2, 3, 2**50]),
        limit=st.sampled_from([1, 2, 3, 10, 1000]),
        status=st.none() | statuses,
        source=st.none() | sources,
        by_value=st.booleans(),
    )
    def list_page(
        self,
        *,
        which: int,
        page: int,
        limit: int,
        status: IncidentStatus | None,
        source: IncidentSource | None,
        by_value: bool,
    ) -> None:
        filters: dict[str, Any] = {"status": status, "source": source}
        if by_value:
            filters = {name: value and str(value) for name, value in filters.items()}
        found = self.run(self.client(which).list(page, limit, **filters))
        assert found == self.newest(page, limit, status, source)
        for incident in found:
            check_types(incident)

    @rule(
        which=which,
        fault=st.sampled_from(
            [
                (["page"], (0, 10, None, None)),
                (["limit"], (1, 1001, "new", None)),
                (["page"], (MAX_ID, 2, None, None)),
                (["status", "source"], (1, 10, "operator", "new")),
            ]
        ),
    )
    def list_invalid_page(self, which: int, fault: tuple[list[str], tuple[Any, ...]]) -> None:
        fields, arguments = fault
        with pytest.raises(InvalidIncident) as caught:
            self.run(self.client(which).list(*arguments))
        assert [error.field for error in caught.value.errors] == fields

    @rule(which=which, incident_id=known)
    def get(self, which: int, incident_id: int) -> None:
        if incident_id not in self.model:
            return
        incident = self.run(self.client(which).get(incident_id))
        assert incident == self.model[incident_id]
        check_types(incident)

    @rule(
        which=which,
        incident_id=known,
        status=statuses,
        by_value=st.booleans(),
        note=st.none() | messages,
        actor=st.none() | st.just("alice"),
        behind=st.none() | st.integers(0, 1),
    )
    def update_status(
        self,
        *,
        which: int,
        incident_id: int,
        status: IncidentStatus,
        by_value: bool,
        note: str | None,
        actor: str | None,
        behind: int | None,
    ) -> None:
        if incident_id not in self.model:
            return
        before = self.model[incident_id]
        version = None if behind is None else before.version - behind
        given: Any = str(status.value) if by_value else status
        with nullcontext() if actor is None else acting_as(actor):
            call = self.client(which).update_status(
                incident_id, given, note=note, expected_version=version or None
            )
        others = {
            one.dedup_key
            for one in self.model.values()
            if one.incident_id != incident_id and one.incident_type is IncidentStatus.NEW
        }
        with nullcontext() if actor is None else acting_as(actor):
            if version is not None and 0 < version < before.version:
                with pytest.raises(VersionConflict) as moved_on:
                    self.run(call)
                assert moved_on.value.incident == before
                return
            if (
                status is IncidentStatus.NEW is not before.incident_type
                and before.dedup_key is not None
                and before.dedup_key in others
            ):
                with pytest.raises(DuplicateOpenIncident) as duplicate:
                    self.run(call)
                assert duplicate.value.incident == before
                return
            incident = self.run(call)
        check_types(incident)
        if status is before.incident_type:
            assert incident == before
            if note is not None:
                self.record(before, EventKind.NOTED, actor=actor, note=note)
            return
        assert (incident.ended_at is None) == (status is IncidentStatus.NEW)
        self.model[incident_id] = evolve(
            before,
            incident_type=status,
            version=before.version + 1,
            ended_at=before.ended_at or incident.ended_at,
        )
        if status is IncidentStatus.NEW:
            self.model[incident_id] = evolve(self.model[incident_id], ended_at=None)
        assert incident == self.model[incident_id]
        self.record(
            before,
            EventKind.STATUS_CHANGED,
            from_status=before.incident_type,
            to_status=status,
            actor=actor,
            note=note,
        )

    @rule(target=known, which=which, key=st.sampled_from("ab"), message=messages, source=sources)
    def create_or_count(
        self, which: int, key: str, message: str, source: IncidentSource
    ) -> MultipleResults[int]:
        incident = self.run(self.client(which).create(message, source=source, dedup_key=key))
        check_types(incident)
        open_one = [
            one
            for one in self.model.values()
            if one.dedup_key == key and one.incident_type is IncidentStatus.NEW
        ]
        if not open_one:
            assert incident.occurrences == 1
            assert incident.incident_message == message
            return multiple(self.remember(incident))
        (before,) = open_one
        self.model[before.incident_id] = evolve(
            before,
            version=before.version + 1,
            occurrences=before.occurrences + 1,
            last_seen_at=incident.last_seen_at,
        )
        assert incident == self.model[before.incident_id]
        differs = message != before.incident_message
        self.record(before, EventKind.RECURRED, note=message if differs else None)
        return multiple()

    @rule(which=which, keys=st.lists(st.sampled_from("ab"), max_size=3), status=st.booleans())
    def resolve(self, which: int, keys: list[str], *, status: bool) -> None:
        ending = IncidentStatus.COMPLETED if status else IncidentStatus.FAILED
        client, note = self.client(which), "Recovered" if status else None
        if len(keys) == 1:
            answers = [self.run(client.resolve(keys[0], status=ending, note=note))]
        else:
            answers = self.run(client.resolve_many(keys, status=ending, note=note))
        for key, incident in zip(keys, answers, strict=True):
            before = next(
                (
                    one
                    for one in self.model.values()
                    if one.dedup_key == key and one.incident_type is IncidentStatus.NEW
                ),
                None,
            )
            if before is None:
                assert incident is None
                continue
            assert incident is not None
            assert incident.ended_at is not None
            check_types(incident)
            self.model[before.incident_id] = evolve(
                before,
                incident_type=ending,
                version=before.version + 1,
                ended_at=before.ended_at or incident.ended_at,
            )
            assert incident == self.model[before.incident_id]
            self.record(
                before,
                EventKind.STATUS_CHANGED,
                from_status=IncidentStatus.NEW,
                to_status=ending,
                note=note,
            )

    @rule(which=which, incident_id=known, note=messages)
    def note(self, which: int, incident_id: int, note: str) -> None:
        if incident_id not in self.model:
            return
        event = self.run(self.client(which).note(incident_id, f" {note}\n"))
        assert event.incident_id == incident_id
        self.record(self.model[incident_id], EventKind.NOTED, note=note)

    @rule(
        which=which,
        key=st.sampled_from("xy"),
        message=st.sampled_from(["Disk is full", "Line is down"]),
        source=sources,
    )
    def create_once(self, which: int, key: str, message: str, source: IncidentSource) -> None:
        call = self.client(which).create(message, source=source, idempotency_key=key)
        first = self.answers.get(key)
        if first is None:
            self.answers[key] = incident = self.run(call)
            self.remember(incident)
        elif (first.incident_message, first.source) == (message, source):
            assert self.run(call) == first
        else:
            with pytest.raises(IdempotencyKeyReused):
                self.run(call)

    @rule(which=which, incident_id=known)
    def read_history(self, which: int, incident_id: int) -> None:
        if incident_id not in self.model:
            return
        events = self.run(self.client(which).history(incident_id))
        assert self.happened[incident_id] == [
            (event.kind, event.from_status, event.to_status, event.actor, event.note)
            for event in events
        ]

    @rule(which=which)
    def purge(self, which: int) -> None:
        count = self.run(self.client(which).purge(datetime.now(UTC) + timedelta(hours=1)))
        ended = [
            incident
            for incident in self.model.values()
            if incident.incident_type is not IncidentStatus.NEW
        ]
        assert count == len(ended)
        for incident in ended:
            del self.model[incident.incident_id]
            del self.happened[incident.incident_id]
            (event,) = self.run(self.client(which).history(incident.incident_id))
            assert event.kind is EventKind.PURGED
            assert event.from_status is incident.incident_type

    @rule(which=which, above=st.integers(1, 3) | st.integers(MAX_ID - 2, MAX_ID), status=statuses)
    def miss(self, which: int, above: int, status: IncidentStatus) -> None:
        unknown = min(self.last_id + above, MAX_ID)
        for call in (
            self.client(which).get(unknown),
            self.client(which).update_status(unknown, status),
        ):
            with pytest.raises(IncidentNotFound) as caught:
                self.run(call)
            assert caught.value.incident_id == unknown

    @rule(
        which=which,
        wrong=st.sampled_from([0, -1, MAX_ID + 1, 10**4000, True, "1", 1.0, None]),
        status=st.sampled_from(["new", "done"]),
    )
    def use_no_id(self, which: int, wrong: Any, status: Any) -> None:
        with pytest.raises(InvalidIncident) as caught:
            self.run(self.client(which).get(wrong))
        assert [error.field for error in caught.value.errors] == ["incident_id"]
        with pytest.raises(InvalidIncident) as caught:
            self.run(self.client(which).update_status(wrong, status))
        fields = ["incident_id"] if status == "new" else ["incident_id", "status"]
        assert [error.field for error in caught.value.errors] == fields

    # Other programs

    @precondition(lambda self: self.world.redis)
    @rule()
    def flush_the_cache(self) -> None:
        self.flush()

    @precondition(lambda self: self.world.redis)
    @rule(key=st.sampled_from([INDEX_KEY, "incidents:1:10:any:any"]))
    def evict_a_key(self, key: str) -> None:
        self.flush(key)

    @rule(incident_id=known, seconds=st.integers(0, 2))
    def move_in_time(self, incident_id: int, seconds: int) -> None:
        if incident_id not in self.model:
            return
        moment = LONG_AGO + timedelta(seconds=seconds)
        before = self.model[incident_id]
        self.model[incident_id] = evolve(
            before,
            created_at=moment,
            last_seen_at=moment if before.occurrences == 1 else before.last_seen_at,
        )
        zone = "" if isinstance(self.world.database, SqliteFile) else "+00"
        self.write_elsewhere(
            f"UPDATE \"Incident\" SET created_at = '{moment:%Y-%m-%d %H:%M:%S}{zone}' "
            f"WHERE incident_id = {incident_id}"
        )

    @rule(incident_id=consumes(known))
    def delete(self, incident_id: int) -> None:
        if incident_id not in self.model:
            return
        del self.model[incident_id]
        self.write_elsewhere(f'DELETE FROM "Incident" WHERE incident_id = {incident_id}')

    # The application

    @rule(which=which)
    def close_and_open_again(self, which: int) -> None:
        client = self.client(which)
        self.run(client.close())
        self.run(client.connect())

    @rule(which=which)
    def replace_the_client(self, which: int) -> None:
        which %= len(self.clients)
        self.disconnect(which)
        self.connect(which)

    @rule(which=which, incident_id=known, seconds=st.integers(0, 2))
    def change_while_closed(self, which: int, incident_id: int, seconds: int) -> None:
        if incident_id not in self.model:
            return
        client = self.client(which)
        self.run(client.close())
        self.move_in_time(incident_id, seconds)
        self.run(client.connect())

    # Invariants

    @invariant()
    def every_client_sees_the_newest(self) -> None:
        for client in self.clients:
            found = self.run(client.list())
            assert found == self.newest()
            for incident in found:
                check_types(incident)


def check_types(incident: Incident) -> None:
    """Check that values have their annotated types, which equality does not show."""
    assert type(incident) is Incident
    assert type(incident.incident_id) is int
    assert type(incident.incident_message) is str
    assert type(incident.incident_type) is IncidentStatus
    assert type(incident.source) is IncidentSource
    assert incident.created_at.tzinfo is UTC
    assert incident.created_at.microsecond == 0


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Database:
    """Each kind of database."""
    if request.param == "sqlite":
        return SqliteFile(request.getfixturevalue("migrated_sqlite_url"))
    return PostgresDatabase(request.getfixturevalue("migrated_postgres_url"))


@pytest.fixture(params=["memory", "redis"])
def world(
    request: pytest.FixtureRequest, database: Database, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    """Each database, without Redis and with one."""
    redis = request.param == "redis"
    with closing(World(database, request.getfixturevalue("redis_url") if redis else None)) as world:
        monkeypatch.setattr(Store, "list", counted(Store.list, world, "pages_read"))
        monkeypatch.setattr(PageCache, "list", counted(PageCache.list, world, "lists"))
        yield world


def counted(call: Callable[..., Any], world: World, name: str) -> Callable[..., Any]:
    """Return a function that counts its calls in the world."""

    def count(*arguments: Any) -> Any:
        setattr(world, name, getattr(world, name) + 1)
        return call(*arguments)

    return count


def test_client_behaves_as_a_plain_list_of_incidents(world: World) -> None:
    """After any sequence of steps, every result equals that of a plain sorted list."""

    class Machine(IncidentMachine):
        pass

    Machine.world = world
    run_state_machine_as_test(Machine, settings=settings.get_profile(PROFILE))
    assert 0 < world.pages_read < world.lists

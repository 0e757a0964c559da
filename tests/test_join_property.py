"""Random transactions of a host, with calls inside and beside them, compared with a model."""
# ruff: noqa: D102  (the name of a rule says what it does)

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from attrs import evolve, field, frozen
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis import Redis

from incidentkit import (
    DuplicateOpenIncident,
    IdempotencyKeyReused,
    Incident,
    IncidentClient,
    IncidentStatus,
    VersionConflict,
)
from incidentkit.store.ports import BEGINNING
from tests.hosts import WAYS, Host, open_host, prepared, run_sql
from tests.strategies import statuses
from tests.sync_hosts import SYNC_WAYS, open_sync_host

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from incidentkit.incidents import Incidents
    from incidentkit.joined import JoinedIncidents

pytestmark = pytest.mark.unmeasured

THOROUGH = os.environ.get("INCIDENTKIT_TEST_PROFILE") == "thorough"

SETTINGS = settings(
    deadline=None,
    max_examples=300 if THOROUGH else 12,
    stateful_step_count=60 if THOROUGH else 25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    # Explaining a failure would run it many more times.
    phases=set(Phase) - {Phase.explain},
)

TABLES = ("Incident", "incident_event", "incident_idempotency_key", "orders")

_T = TypeVar("_T")


@frozen
class State:
    """The content of the database as one observer sees it."""

    incidents: dict[int, Incident] = field(factory=dict)
    events: dict[int, list[str]] = field(factory=dict)
    answers: dict[str, tuple[str, Incident]] = field(factory=dict)
    orders: set[int] = field(factory=set)

    def copy(self) -> State:
        return State(
            dict(self.incidents),
            {incident_id: list(events) for incident_id, events in self.events.items()},
            dict(self.answers),
            set(self.orders),
        )

    def newest(self, status: IncidentStatus | None = None) -> list[Incident]:
        """Return the expected list."""
        return sorted(
            (each for each in self.incidents.values() if status in (None, each.incident_type)),
            key=lambda each: (each.created_at, each.incident_id),
            reverse=True,
        )

    def open_with(self, dedup_key: str | None) -> Incident | None:
        """Return the open incident on which a create with this key counts an occurrence."""
        if dedup_key is None:
            return None
        found = (each for each in self.newest(IncidentStatus.NEW) if each.dedup_key == dedup_key)
        return next(found, None)

    def put(self, incident: Incident, event: str) -> None:
        self.incidents[incident.incident_id] = incident
        self.events.setdefault(incident.incident_id, []).append(event)


class JoinMachine(RuleBasedStateMachine):
    """Each rule is a step of an application, inside its transaction or beside it."""

    way: str
    url: str
    redis_url: str
    """Set by the test, on its own subclass."""

    inside = st.booleans()
    pick = st.integers(0, 5)
    dedup_keys = st.none() | st.sampled_from(["a", "b"])
    idempotency_keys = st.none() | st.sampled_from(["x", "y", "z"])

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.stack = AsyncExitStack()
        self.committed = State()
        # One layer for the transaction, and one for each of its savepoints.
        self.layers: list[State] = []
        self.touched: set[object] = set()

    def run(self, call: Coroutine[Any, Any, _T]) -> _T:
        return self.runner.run(call)

    @initialize()
    def begin(self) -> None:
        self.run(self._begin())

    async def _begin(self) -> None:
        for table in TABLES:
            await run_sql(self.url, f'DELETE FROM "{table}"')
        with Redis.from_url(self.redis_url) as redis:
            redis.flushdb()
        enter = self.stack.enter_async_context
        hosts = open_sync_host if self.way in SYNC_WAYS else open_host
        self.host: Host = await enter(hosts(self.way, self.url))
        self.client = await enter(IncidentClient.open(self.url, self.redis_url))
        self.other = await enter(IncidentClient.open(self.url, self.redis_url))

    def teardown(self) -> None:
        if self.layers:
            self.run(self.host.rollback())
        self.run(self.stack.aclose())
        self.runner.close()

    # Where a call is made

    def somewhere(self, inside: bool) -> tuple[Incidents, list[State]]:
        """Return the incidents to call, joined or not, and the states that a change affects."""
        if inside and not self.layers:
            self.begin_a_transaction()
        if inside:
            return self.joined, self.layers[-1:]
        return self.client, [self.committed, *self.layers]

    def may_write(self, inside: bool, *things: object) -> bool:
        """Return whether a call there can run without waiting for a lock."""
        if inside:
            self.touched |= set(things)
            return True
        if not self.layers:
            return True
        return "sqlite" not in self.way and not self.touched & set(things)

    # Steps

    @rule(inside=inside, dedup_key=dedup_keys, key=idempotency_keys, number=st.integers(1, 2))
    def create(self, *, inside: bool, dedup_key: str | None, key: str | None, number: int) -> None:
        verbs, states = self.somewhere(inside)
        message = f"Order {number} is late"
        said = f"create {message} {dedup_key}"
        before = states[0]
        found = before.open_with(dedup_key)
        things = [each for each in (dedup_key, key, found and found.incident_id) if each]
        if not self.may_write(inside, *things):
            return
        call = verbs.create(message, source="partner", dedup_key=dedup_key, idempotency_key=key)
        if key in before.answers:
            self.expect_answer(call, before.answers[key], said)
            return
        incident = self.run(call)
        if found is None:
            assert incident.incident_id not in before.incidents
            assert (incident.version, incident.occurrences) == (1, 1)
            assert (incident.incident_message, incident.dedup_key) == (message, dedup_key)
        else:
            assert incident == evolve(
                found,
                version=found.version + 1,
                occurrences=found.occurrences + 1,
                last_seen_at=incident.last_seen_at,
            )
        if inside:
            self.touched.add(incident.incident_id)
        for state in states:
            state.put(incident, "created" if found is None else "recurred")
            if key is not None:
                state.answers[key] = said, incident

    @rule(inside=inside, pick=pick, status=statuses, key=idempotency_keys, stale=st.booleans())
    def update_status(
        self, *, inside: bool, pick: int, status: IncidentStatus, key: str | None, stale: bool
    ) -> None:
        verbs, states = self.somewhere(inside)
        before = states[0]
        incidents = before.newest()
        if not incidents:
            return
        incident = incidents[pick % len(incidents)]
        version = incident.version + stale
        things = [each for each in (incident.incident_id, incident.dedup_key, key) if each]
        if not self.may_write(inside, *things):
            return
        said = f"update {incident.incident_id} {status} {version}"
        call = verbs.update_status(
            incident.incident_id, status, expected_version=version, idempotency_key=key
        )
        if key in before.answers:
            self.expect_answer(call, before.answers[key], said)
            return
        if stale:
            with pytest.raises(VersionConflict):
                self.run(call)
            return
        changes = status is not incident.incident_type
        if changes and status is IncidentStatus.NEW and before.open_with(incident.dedup_key):
            with pytest.raises(DuplicateOpenIncident):
                self.run(call)
            return
        changed = self.run(call)
        if changes:
            assert changed == evolve(
                incident,
                incident_type=status,
                version=incident.version + 1,
                ended_at=changed.ended_at,
            )
            assert (changed.ended_at is None) is (status is IncidentStatus.NEW)
        else:
            assert changed == incident
        for state in states:
            if changes:
                state.put(changed, "status_changed")
            if key is not None:
                state.answers[key] = said, changed

    @rule(inside=inside, dedup_key=st.sampled_from(["a", "b"]), many=st.booleans())
    def resolve(self, *, inside: bool, dedup_key: str, many: bool) -> None:
        verbs, states = self.somewhere(inside)
        found = states[0].open_with(dedup_key)
        if not self.may_write(inside, dedup_key, *([found.incident_id] if found else [])):
            return
        if many:
            ended, again = self.run(verbs.resolve_many([dedup_key, dedup_key]))
            assert again is None
        else:
            ended = self.run(verbs.resolve(dedup_key))
        if found is None:
            assert ended is None
            return
        assert ended is not None
        assert ended.ended_at is not None
        assert ended == evolve(
            found,
            incident_type=IncidentStatus.COMPLETED,
            version=found.version + 1,
            ended_at=ended.ended_at,
        )
        for state in states:
            state.put(ended, "status_changed")

    @rule(inside=inside, pick=pick)
    def note(self, *, inside: bool, pick: int) -> None:
        verbs, states = self.somewhere(inside)
        incidents = states[0].newest()
        if not incidents:
            return
        incident = incidents[pick % len(incidents)]
        if not self.may_write(inside, incident.incident_id):
            return
        event = self.run(verbs.note(incident.incident_id, "The carrier was called"))
        assert (event.incident_id, str(event.kind)) == (incident.incident_id, "noted")
        for state in states:
            state.put(incident, "noted")

    @precondition(lambda self: self.layers)
    @rule(order=st.integers(1, 1000))
    def order(self, order: int) -> None:
        if order not in self.layers[-1].orders:
            self.run(self.host.order(order))
            self.layers[-1].orders.add(order)

    def expect_answer(
        self, call: Coroutine[Any, Any, Incident], answer: tuple[str, Incident], said: str
    ) -> None:
        """Check that a used key returns its answer to the same call and refuses any other."""
        if answer[0] == said:
            assert self.run(call) == answer[1]
        else:
            with pytest.raises(IdempotencyKeyReused):
                self.run(call)

    # The transaction and its savepoints

    def begin_a_transaction(self) -> None:
        self.joined = self.run(self.begin_and_join())
        self.layers = [self.committed.copy()]
        self.touched = set()

    async def begin_and_join(self) -> JoinedIncidents:
        await self.host.begin()
        joined: JoinedIncidents = await self.host.join(self.client)
        return joined

    @precondition(lambda self: self.layers)
    @rule(commits=st.booleans())
    def end(self, *, commits: bool) -> None:
        if commits:
            self.run(self.host.commit())
            self.committed = self.layers[-1]
        else:
            self.run(self.host.rollback())
        self.ended()

    @precondition(lambda self: self.layers)
    @rule(how=st.sampled_from(["save", "save", "keep", "take back"]))
    def savepoint(self, how: str) -> None:
        if how == "save":
            self.run(self.host.save())
            self.layers.append(self.layers[-1].copy())
        elif len(self.layers) > 1 and how == "keep":
            self.run(self.host.keep())
            self.layers[-2:] = self.layers[-1:]
        elif len(self.layers) > 1:
            self.run(self.host.take_back())
            self.layers.pop()

    def ended(self) -> None:
        """Check everything that a transaction has left behind."""
        self.layers = []
        self.run(self._everybody_sees(self.committed))

    async def _everybody_sees(self, state: State) -> None:
        for client in (self.client, self.other):
            await self._sees(client, state)
            count = sum(map(len, state.events.values()))
            async with asyncio.timeout(60):
                # Other tests' transactions may delay the feed.
                while len(changes := await client.store.changes(BEGINNING, 10_000)) < count:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            for incident_id, events in state.events.items():
                assert [
                    str(each.kind) for each in changes if each.incident_id == incident_id
                ] == events
            assert len(changes) == count
        rows = await run_sql(self.url, "SELECT order_id FROM orders")
        assert {order for (order,) in rows} == state.orders
        rows = await run_sql(self.url, "SELECT idempotency_key FROM incident_idempotency_key")
        assert {key for (key,) in rows} == set(state.answers)

    async def _sees(self, verbs: Incidents, state: State) -> None:
        assert await verbs.list(limit=1000) == state.newest()
        assert await verbs.list(status="new") == state.newest(IncidentStatus.NEW)[:10]
        for incident_id, incident in state.incidents.items():
            assert await verbs.get(incident_id) == incident
            history = await verbs.history(incident_id)
            assert [str(event.kind) for event in history] == state.events[incident_id]

    # Invariants

    @invariant()
    def lists_are_what_each_may_see(self) -> None:
        for client in (self.client, self.other):
            assert self.run(client.list()) == self.committed.newest()[:10]
        if self.layers:
            assert self.run(self.joined.list()) == self.layers[-1].newest()[:10]

    @precondition(lambda self: self.layers)
    @rule()
    def look_inside(self) -> None:
        self.run(self._sees(self.joined, self.layers[-1]))


@pytest.fixture(params=WAYS + SYNC_WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """Each kind of connection on which a host may have a transaction."""
    return str(request.param)


@pytest.fixture
def url(way: str, request: pytest.FixtureRequest) -> str:
    """The URL of the host's database."""
    name = "migrated_sqlite_url" if "sqlite" in way else "migrated_postgres_url"
    return str(request.getfixturevalue(name))


def test_transactions_are_kept_or_leave_nothing(way: str, url: str, redis_url: str) -> None:
    """After every commit and rollback, each client sees what the model predicts."""
    asyncio.run(prepared(url))

    class Machine(JoinMachine):
        pass

    Machine.way, Machine.url, Machine.redis_url = way, url, redis_url
    run_state_machine_as_test(Machine, settings=SETTINGS)

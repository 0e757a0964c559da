"""The service while its servers are killed, hung and restarted under load."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

from incidentkit import IncidentClient
from incidentkit.http import create_app
from incidentkit.store import StoreOptions
from incidentkit.store.migrate import upgrade
from tests.http.conftest import INCIDENT
from tests.servers import PostgresServer, RedisServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.http.conftest import Serve

QUICK = StoreOptions(connect_timeout=1, pool_timeout=1, statement_timeout=1)
CLIENTS = 4
DEADLINE = 60.0


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server for this module, migrated."""
    with PostgresServer(durable=True) as server:
        asyncio.run(upgrade(server.url))
        yield server


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    """A Redis server for this module."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def api(serve: Serve, postgres: PostgresServer, redis: RedisServer) -> httpx2.Client:
    """A client for the service on these two servers."""
    return serve(create_app(IncidentClient.open(postgres.url, redis.url, options=QUICK)))


class Load:
    """Clients that create, change and list until they are stopped, and check every answer."""

    def __init__(self, base_url: httpx2.URL) -> None:
        self.base_url = base_url
        self.answers: Counter[tuple[str, int]] = Counter()
        self.acknowledged: dict[int, str] = {}
        self.wrong: list[str] = []
        self._stop = threading.Event()
        self._changed = threading.Condition()

    def reached(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds; it is evaluated after each answer."""
        with self._changed:
            assert self._changed.wait_for(condition, DEADLINE), self.answers

    def more(self, verb: str, status: int, count: int = 20) -> None:
        """Wait for that many more answers of a kind."""
        target = self.answers[verb, status] + count
        self.reached(lambda: self.answers[verb, status] >= target)

    def stop(self) -> None:
        """Stop the clients."""
        self._stop.set()

    def _answered(self, verb: str, response: httpx2.Response) -> Any:
        with self._changed:
            self.answers[verb, response.status_code] += 1
            self._changed.notify_all()
        return response.json()

    def run(self) -> None:
        """Run one client, which remembers the last acknowledged state of its own incidents."""
        with httpx2.Client(base_url=self.base_url, timeout=DEADLINE) as client:
            while not self._stop.is_set():
                response = client.post("/incident/create", json=INCIDENT)
                incident = self._answered("create", response)
                if response.status_code != httpx2.codes.CREATED:
                    continue
                self.acknowledged[incident["incident_id"]] = "new"
                self._check_list(client, incident)
                query = {"incident_id": incident["incident_id"], "status": "completed"}
                response = client.patch("/incident/update-status", params=query)
                incident = self._answered("update", response)
                if response.status_code == httpx2.codes.OK:
                    self.acknowledged[incident["incident_id"]] = "completed"
                    self._check_list(client, incident)
                else:
                    # It may or may not have been stored.
                    self.acknowledged.pop(query["incident_id"])

    def _check_list(self, client: httpx2.Client, incident: dict[str, Any]) -> None:
        response = client.get("/incident/get", params={"limit": 100})
        listed = self._answered("list", response)
        if response.status_code == httpx2.codes.OK and incident not in listed:
            self.wrong.append(f"{incident} is not in the list that was read after it")


@contextmanager
def load_on(api: httpx2.Client) -> Iterator[Load]:
    """Run a load on the service for the duration of the block."""
    load = Load(api.base_url)
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(load.run) for _ in range(CLIENTS)]
        try:
            yield load
        finally:
            load.stop()
        for client in clients:
            client.result()


def stored(api: httpx2.Client, incident_id: int) -> str:
    """Return the status that the service has for an incident."""
    response = api.get(f"/incident/get/{incident_id}")
    return str(response.json()["incident_type"])


def test_no_fault_of_redis_changes_an_answer(api: httpx2.Client, redis: RedisServer) -> None:
    """While Redis is killed, hung and restarted, every answer is a success and every list fresh."""
    with load_on(api) as load:
        for fault in (redis.kill, redis.start, redis.pause, redis.resume, redis.restart):
            load.more("list", 200)
            fault()
        load.more("list", 200)
    assert load.wrong == []
    assert {status for _, status in load.answers} == {200, 201}
    for incident_id, status in load.acknowledged.items():
        assert stored(api, incident_id) == status


def test_a_killed_postgresql_is_a_503_and_comes_back(
    api: httpx2.Client, postgres: PostgresServer
) -> None:
    """While PostgreSQL is dead or hung the answer is 503; afterwards no write is lost."""
    with load_on(api) as load:
        load.more("create", 201)
        for harm, mend in ((postgres.kill, postgres.start), (postgres.pause, postgres.resume)):
            harm()
            load.more("create", 503, CLIENTS)
            response = api.get("/incident/get/1")
            assert response.status_code == httpx2.codes.SERVICE_UNAVAILABLE
            assert int(response.headers["Retry-After"]) > 0
            assert response.headers["Content-Type"] == "application/problem+json"
            assert api.get("/health/ready").status_code == httpx2.codes.SERVICE_UNAVAILABLE
            assert api.get("/health/live").status_code == httpx2.codes.OK
            mend()
            load.more("list", 200)
    assert load.wrong == []
    assert {status for _, status in load.answers} == {200, 201, 503}
    assert api.get("/health/ready").status_code == httpx2.codes.OK
    for incident_id, status in load.acknowledged.items():
        assert stored(api, incident_id) == status

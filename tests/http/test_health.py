"""Liveness and readiness, as a monitor sees them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import psycopg
import pytest

from incidentkit import (
    CacheUnavailable,
    ClientClosed,
    FeedBlocker,
    IncidentClient,
    SchemaOutOfDate,
    StoreError,
    StoreUnavailable,
)
from incidentkit.cache import MemoryCache
from incidentkit.http import create_app, health, lifespan
from incidentkit.http.health import State, readiness
from incidentkit.store import records, store_from_url
from incidentkit.store.schema import SCHEMA_REVISION
from tests.http.conftest import INCIDENT, MEMORY, Serve

if TYPE_CHECKING:
    import httpx2

OK: Final[dict[str, Any]] = {
    "ready": True,
    "database": {"state": "ok"},
    "schema": {"state": "ok", "revision": SCHEMA_REVISION, "expected": SCHEMA_REVISION},
    "cache": {"state": "ok"},
    "feed": {"state": "ok", "since": None, "pid": None, "prepared": None, "waiting": False},
    "request_log": {"state": "off", "dropped": 0},
    "log": {"state": "off", "dropped": 0},
}


def failing_client(error: Exception | None) -> IncidentClient:
    """Return a client whose check raises the error; None: it hangs."""
    client = IncidentClient.open(MEMORY)

    async def fail() -> None:
        if error is None:
            await asyncio.Event().wait()
        else:
            raise error

    client.store.check = fail  # type: ignore[method-assign]
    return client


def test_live(api: httpx2.Client) -> None:
    """A service that answers is live."""
    answer = api.get("/health/live")
    assert answer.status_code == 200
    assert answer.json() == {"state": "ok"}


def test_ready(serve: Serve, urls: tuple[str, str | None]) -> None:
    """With everything in order, each part is ok."""
    api = serve(create_app(IncidentClient.open(*urls), request_log="database"))
    answer = api.get("/health/ready")
    assert answer.status_code == 200
    cache = {"state": "ok" if urls[1] else "off"}
    request_log = {"state": "ok", "dropped": 0}
    assert answer.json() == OK | {"cache": cache, "request_log": request_log}


def test_ready_without_a_cache(serve: Serve) -> None:
    """A service without a cache and a request log is ready, and reports both as off."""
    api = serve(create_app(IncidentClient(store_from_url(MEMORY))))
    assert api.get("/health/ready").json() == OK | {"cache": {"state": "off"}}


@pytest.mark.parametrize(
    ("error", "database", "schema"),
    [
        (StoreUnavailable("secret"), "unavailable", ("unknown", None)),
        (StoreError("secret"), "unavailable", ("unknown", None)),
        (None, "unavailable", ("unknown", None)),
        (
            SchemaOutOfDate("dadc1db062ae", SCHEMA_REVISION),
            "ok",
            ("out_of_date", "dadc1db062ae"),
        ),
        (SchemaOutOfDate(None, SCHEMA_REVISION), "ok", ("out_of_date", None)),
    ],
)
def test_not_ready(
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception | None,
    database: str,
    schema: tuple[str, str | None],
) -> None:
    """A database that fails, hangs or has another schema is a 503 problem with the states."""
    monkeypatch.setattr(health, "TIMEOUT", 0.01 if error is None else 10)
    api = serve(create_app(failing_client(error)))
    answer = api.get("/health/ready")
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) > 0
    problem = answer.json()
    assert problem["detail"] == "The service is not ready"
    assert problem["ready"] is False
    assert problem["database"] == {"state": database}
    state, revision = schema
    assert problem["schema"] == {
        "state": state,
        "revision": revision,
        "expected": SCHEMA_REVISION,
    }
    assert "secret" not in answer.text
    assert api.get("/health/live").status_code == 200


def test_a_feed_that_is_held_up_is_ready(
    serve: Serve, two_phase_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The feed is `held_up` since when and by which process, and the service stays ready."""
    monkeypatch.setattr(records, "HELD_UP_AFTER", 0.0)
    api = serve(create_app(IncidentClient.open(two_phase_url)))
    assert api.get("/health/ready").json() == OK | {"cache": {"state": "off"}}
    with psycopg.connect(two_phase_url, autocommit=True) as host:
        for statement in ("BEGIN", "SELECT pg_current_xact_id()"):
            host.execute(statement)
        since = host.execute("SELECT to_char(now() AT TIME ZONE 'utc', 'YYYY-MM-DD HH24:MI:SS')")
        held = {
            "state": "held_up",
            "since": (since.fetchone() or ("",))[0],
            "pid": host.info.backend_pid,
            "prepared": None,
            "waiting": False,
        }
        answer = api.get("/health/ready")
        assert answer.status_code == 200
        assert answer.json()["feed"] == held
        api.post("/incident/create", json=INCIDENT)
        assert api.get("/health/ready").json()["feed"] == held | {"waiting": True}
        host.execute("PREPARE TRANSACTION 'order 17'")
        feed = api.get("/health/ready").json()["feed"]
        assert (feed["pid"], feed["prepared"]) == (None, "order 17")
        host.execute("ROLLBACK PREPARED 'order 17'")
    assert api.get("/health/ready").json()["feed"] == OK["feed"]


def test_a_feed_that_cannot_be_asked_is_ready(serve: Serve) -> None:
    """If the database does not tell, the feed is `unknown`, and the service stays ready."""
    client = IncidentClient.open(MEMORY)

    async def fail() -> FeedBlocker | None:
        raise StoreError("secret")

    client.store.feed_blocker = fail  # type: ignore[method-assign]
    answer = serve(create_app(client)).get("/health/ready")
    assert answer.status_code == 200
    assert answer.json()["feed"] == {**OK["feed"], "state": "unknown"}
    assert "secret" not in answer.text


async def test_a_closed_client_is_not_ready() -> None:
    """The database of a closed client counts as unavailable."""
    with pytest.raises(ClientClosed):
        await IncidentClient.open(MEMORY).check()
    found = await readiness(IncidentClient.open(MEMORY), None, cache_required=False)
    assert found.ready is False
    assert found.database.state is State.UNAVAILABLE


class FlakyCache(MemoryCache):
    """A cache that fails on demand."""

    fails = False

    async def ping(self) -> None:
        """Answer, or fail."""
        if self.fails:
            raise ConnectionError


@pytest.mark.parametrize(("required", "status"), [(False, 200), (True, 503)])
def test_a_cache_that_is_away(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, required: bool, status: int
) -> None:
    """A failing cache is noticed at once; the service is not ready if the cache is required."""
    monkeypatch.setattr("incidentkit.cache.breaker.RETRY_AFTER", 0.0)
    cache = FlakyCache()
    client = IncidentClient(store_from_url(MEMORY), cache=cache)
    api = serve(create_app(client, cache_required=required))
    assert api.get("/health/ready").json() == OK
    cache.fails = True
    answer = api.get("/health/ready")
    assert answer.status_code == status
    members: dict[str, Any] = answer.json()
    assert members["cache"] == {"state": "unavailable"}
    assert members["ready"] is (not required)
    assert api.post("/incident/create", json=INCIDENT).status_code == 201
    cache.fails = False
    assert api.get("/health/ready").json() == OK


async def test_a_cache_that_is_required_is_there_from_the_start() -> None:
    """A service whose required cache is away does not start."""

    class DeadCache(MemoryCache):
        async def ping(self) -> None:
            raise ConnectionError

    client = IncidentClient(store_from_url(MEMORY), cache=DeadCache(), cache_required=True)
    with pytest.raises(CacheUnavailable):
        async with lifespan(create_app(client, cache_required=True)):
            pytest.fail("The service started")

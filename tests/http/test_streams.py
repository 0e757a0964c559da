"""Streams of changes survive outages, and end when they must."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import asyncpg
import httpx2
import pytest
from click.testing import CliRunner

from incidentkit import IncidentClient, InvalidSettings, StoreError
from incidentkit.cli import main
from incidentkit.feed import EMPTY
from incidentkit.http import create_app, streams
from incidentkit.http.bounds import Bounds
from incidentkit.store import StoreOptions
from incidentkit.store.migrate import upgrade
from tests.http.conftest import INCIDENT, MEMORY, Records, Serve, service_on, serving
from tests.http.event_source import EventSource
from tests.programs import service
from tests.servers import PostgresServer, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import ASGIApp, Receive, Scope, Send

    from incidentkit.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
STREAM = {"Accept": "text/event-stream"}
QUICK = StoreOptions(connect_timeout=1, pool_timeout=1, statement_timeout=1)
AWAY = "the database is unavailable"


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server for this module, migrated."""
    with PostgresServer(durable=True) as server:
        asyncio.run(upgrade(server.url))
        yield server


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the intervals of comments and of attempts to reach the database."""
    monkeypatch.setattr(streams, "HEARTBEAT", 0.05)
    monkeypatch.setattr(streams, "START_TIMEOUT", 0.1)
    monkeypatch.setattr(streams, "ANSWER_TIMEOUT", 0.5)
    monkeypatch.setattr(streams, "MAX_PAUSE", 0.05)


def created(source: EventSource) -> int:
    """Return the id of the next incident that a stream tells about."""
    return int(source.until("created")["incident_id"])


@pytest.mark.parametrize("outage", ["stop", "pause"])
def test_a_stream_waits_for_the_database(postgres: PostgresServer, outage: str) -> None:
    """Old and new streams say that the database is unavailable, and resume where they were."""
    app = create_app(IncidentClient.open(postgres.url, options=QUICK))
    with serving(app) as url, httpx2.Client(base_url=url, timeout=60) as api:
        stream = f"{url}/incident/changes?after=latest"
        with EventSource(stream) as old:
            old.until("comment", "nothing new")
            before = api.post("/incident/create", json=INCIDENT).json()["incident_id"]
            assert created(old) == before
            getattr(postgres, outage)()
            try:
                for _ in range(2):
                    old.until("comment", AWAY)
                with EventSource(stream) as new:
                    assert new.next() == ("comment", AWAY)
                    postgres.resume()
                    postgres.start()
                    new.until("comment", "nothing new")
                    after = api.post("/incident/create", json=INCIDENT).json()["incident_id"]
                    assert [created(old), created(new)] == [after, after]
                    assert [old.connections, new.connections] == [1, 1]
            finally:
                postgres.resume()
                postgres.start()


def test_a_reader_outlives_the_service(tmp_path: Path) -> None:
    """A reader that began on an empty database gets what happened while the service was away."""
    database = f"sqlite+aiosqlite:///{tmp_path}/incidents.db"
    environment = {
        **os.environ,
        "INCIDENTKIT_DATABASE_URL": database,
        "PYTHONPATH": str(ROOT),
    }
    port = free_port()
    program = ("-m", "incidentkit", "serve", "--port", str(port))

    async def create() -> None:
        async with IncidentClient.open(database) as incidents:
            await incidents.create("Disk is full", source="monitoring")

    with EventSource(f"http://127.0.0.1:{port}/incident/changes?after=latest") as source:
        for number in range(1, 3):
            with service(tmp_path / "log", program=program, env=environment) as running:
                if number == 1:
                    source.until("comment", "nothing new")
                assert running.end(signal.SIGTERM) == 0
            asyncio.run(create())
        with service(tmp_path / "log", program=program, env=environment):
            assert [created(source), created(source)] == [1, 2]


def test_a_cursor_that_becomes_unknown_ends_the_stream(serve: Serve, url: str) -> None:
    """If another database takes the place of this one, an event says so before the end."""
    client = IncidentClient.open(url)
    app = service_on(client)
    api = serve(app, checked=False)
    api.post("/incident/create", json=INCIDENT)
    with EventSource(f"{api.base_url}/incident/changes") as source:
        assert created(source) == 1
        _restore_another(url)
        api.post("/incident/create", json=INCIDENT)
        problem = source.until("problem")
        assert problem.pop("request_id")
        assert problem == {
            "type": "/docs/problems#unknown-cursor",
            "title": "Unknown cursor",
            "status": 410,
            "detail": "The cursor is unknown in this database: start again without a cursor",
            "code": "unknown_cursor",
            "errors": [],
        }
        assert source.until("end") == 410
    assert source.connections == 1


def _restore_another(url: str) -> None:
    """Give every event the number of one in another database."""
    statement = "UPDATE incident_event SET nonce = nonce / 2 + 1"

    async def change() -> None:
        connection = await asyncpg.connect(url)
        await connection.execute(statement)
        await connection.close()

    if url.startswith("sqlite"):
        import sqlite3

        with sqlite3.connect(url.removeprefix("sqlite+aiosqlite:///")) as connection:
            connection.execute(statement)
    else:
        asyncio.run(change())


def test_a_database_that_refuses_ends_the_stream(
    serve: Serve, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A permanent error is logged, and the stream reports it without its text."""
    client = IncidentClient.open(MEMORY)
    api = serve(create_app(client), checked=False)

    async def refuse(*_: object, **__: object) -> None:
        raise StoreError("row security hides it")

    with EventSource(f"{api.base_url}/incident/changes") as source:
        source.until("comment", "nothing new")
        monkeypatch.setattr(client, "read_changes", refuse)
        problem = source.until("problem")
        assert (problem["code"], problem["status"]) == ("store_error", 500)
        assert "row security" not in str(problem)
    while (record := records.next()).getMessage() != "A stream failed":
        pass
    assert record.exc_info is not None


def as_principal(app: ASGIApp) -> ASGIApp:
    """Return an app whose requests come from the principal that a header names."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        name = dict(scope.get("headers", ())).get(b"x-name")
        if name is not None:
            scope["incidentkit.principal"] = SimpleNamespace(name=name.decode())
        await app(scope, receive, send)

    return wrapped


def test_a_principal_takes_some_places_only(serve: Serve) -> None:
    """A sender at its limit waits; others, and anonymous readers, do not."""
    app = service_on(IncidentClient.open(MEMORY), bounds=Bounds(readers=1))
    api = serve(as_principal(app), checked=False)
    alice, bob = {"X-Name": "alice"}, {"X-Name": "bob"}
    with api.stream("GET", "/incident/changes", headers=STREAM | alice) as first:
        kept = first.iter_lines()
        next(kept)
        refused = api.get("/incident/changes?wait=1", headers=alice)
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) > 0
        detail = "Too many readers of changes, your maximum is 1: end one first"
        assert refused.json()["detail"] == detail
        again = api.get("/incident/changes", headers=STREAM | alice)
        assert again.status_code == 200
        assert ": every place for a reader is taken" in again.text
        assert api.get("/incident/changes?wait=1", headers=bob).status_code == 200
        for headers in ({}, {"X-Name": ""}):
            with api.stream("GET", "/incident/changes", headers=STREAM | headers) as anonymous:
                begun = anonymous.iter_lines()
                next(begun)
                answer = api.get("/incident/changes?wait=1", headers=headers)
                assert answer.status_code == 200
    _until_free(app.readers)
    assert api.get("/incident/changes?wait=1", headers=alice).status_code == 200


def _until_free(readers: streams.Readers) -> None:
    async def wait() -> None:
        async with asyncio.timeout(60):
            while readers.count:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    asyncio.run(wait())


def test_a_stream_has_a_lifetime(serve: Serve) -> None:
    """A stream ends after its lifetime, and its reader misses nothing and gets nothing twice."""
    app = service_on(IncidentClient.open(MEMORY))
    app.readers.lifetime = 0.1
    api = serve(app, checked=False)
    with EventSource(f"{api.base_url}/incident/changes?after=latest", pace=0.001) as source:
        source.until("comment", "nothing new")
        for number in range(1, 50):
            api.post("/incident/create", json=INCIDENT)
            assert created(source) == number
            if source.connections > 3:
                break
            source.until("comment", "nothing new")
        assert source.connections > 1


@pytest.mark.parametrize("seconds", [9, 86_401, float("nan")])
def test_a_lifetime_has_bounds(seconds: float) -> None:
    """A lifetime that would end streams all the time, or never, is refused."""
    with pytest.raises(InvalidSettings, match="stream_lifetime must be from 10 to 86400 seconds"):
        create_app(IncidentClient.open(MEMORY), stream_lifetime=seconds)


def test_an_option_of_serve_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve` has the lifetime of the environment, or the one of its option."""
    command = importlib.import_module("incidentkit.cli.serve")
    given: list[int] = []

    def run_server(settings: Settings, *_: object, **__: object) -> bool:
        given.append(settings.stream_lifetime)
        return True

    monkeypatch.setattr(command, "run_server", run_server)
    monkeypatch.setenv("INCIDENTKIT_STREAM_LIFETIME", "20")
    for options in ([], ["--stream-lifetime", "30"]):
        assert CliRunner().invoke(main, ["serve", *options]).exit_code == 0
    assert given == [20, 30]


async def test_a_service_that_is_not_open_asks_to_come_back() -> None:
    """A stream of a service that is still starting ends at once, with status 200."""
    transport = httpx2.ASGITransport(create_app(IncidentClient.open(MEMORY)))
    async with httpx2.AsyncClient(transport=transport, base_url="http://x") as api:
        answer = await api.get("/incident/changes", headers=STREAM)
    assert answer.status_code == 200
    assert answer.text.startswith("retry: ")
    assert answer.text.endswith("\n\n: the service is not open\n\n")


def test_a_resumed_stream_skips_what_it_began_after(serve: Serve, two_phase_url: str) -> None:
    """A change that was there when a stream began does not come after a reconnection either."""
    api = serve(create_app(IncidentClient.open(two_phase_url)), checked=False)

    async def overlap() -> str:
        connection = await asyncpg.connect(two_phase_url)
        transaction = connection.transaction()
        await transaction.start()
        await connection.fetchval("SELECT pg_current_xact_id()")
        await asyncio.to_thread(api.post, "/incident/create", json=INCIDENT)
        async with httpx2.AsyncClient(base_url=api.base_url, timeout=60) as reader:
            query = "/incident/changes?after=latest"
            async with reader.stream("GET", query, headers=STREAM) as stream:
                lines = stream.aiter_lines()
                while not (await anext(lines)).startswith("id:"):
                    pass
                async with IncidentClient.open(two_phase_url) as client:
                    await client.join(connection).create("Line is down", source="partner")
                await transaction.commit()
                await connection.close()
                while not (await anext(lines)).startswith("data:"):
                    pass
                # Not only the next heartbeat has the id.
                end, last, end_of_last = [await anext(lines) for _ in range(3)]
                assert end == end_of_last == ""
                return last.removeprefix("id: ")

    last = asyncio.run(overlap())
    (skipped,) = api.get("/incident/history/1").json()
    assert last == skipped["cursor"]
    assert last != EMPTY

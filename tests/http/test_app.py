"""The app alone, mounted in a host, and configured by the environment."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import httpx2
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Mount

from incidentkit import IncidentClient, InvalidSettings, WrongEventLoop
from incidentkit.http import create_app, lifespan
from incidentkit.http.service import Service
from incidentkit.store.store import Store
from tests.http.conftest import INCIDENT, MEMORY, Serve, service_on
from tests.programs import DEADLINE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

    from incidentkit.store import IncidentStore

ROOT = Path(__file__).resolve().parents[2]


async def test_the_lifespan_closes_what_it_opened() -> None:
    """A closed client is opened and closed again; an open client stays open."""
    client = IncidentClient.open(MEMORY)
    app = create_app(client)
    connected = []
    async with lifespan(app):
        connected.append(client.connected)
    connected.append(client.connected)
    async with client:
        async with lifespan(app):
            connected.append(client.connected)
        connected.append(client.connected)
    assert connected == [True, False, True, True]


async def test_the_lifespan_closes_the_client_after_an_error() -> None:
    """A host that fails leaves no client open."""
    client = IncidentClient.open(MEMORY)
    with pytest.raises(ZeroDivisionError):
        async with lifespan(create_app(client)):
            raise ZeroDivisionError
    assert not client.connected


def test_a_client_of_another_event_loop_is_refused_when_the_app_starts() -> None:
    """The lifespan refuses a client that is open on another event loop, and leaves it open."""
    client = IncidentClient.open(MEMORY)

    async def start() -> None:
        with pytest.raises(WrongEventLoop):
            async with lifespan(create_app(client)):
                pytest.fail("The app started")

    with asyncio.Runner() as owner, asyncio.Runner() as other:
        owner.run(client.connect())
        other.run(start())
        owner.run(client.check())
        owner.run(client.close())


def test_requests_on_another_event_loop_name_the_remedy_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without its lifespan, an app on another event loop answers 500, logs why, and harms nothing.

    Its request log drops the records, and does not touch the client either.
    """
    client = IncidentClient.open(MEMORY)
    app = service_on(client, request_log="database")

    async def request() -> None:
        transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://service") as api:
            answers = [
                await api.post("/incident/create", json=INCIDENT),
                await api.get("/incident/get"),
                await api.get("/incident/changes?wait=5"),
            ]
        assert {answer.status_code for answer in answers} == {500}
        assert app.request_log is not None
        await app.request_log.close()

    with asyncio.Runner() as owner, asyncio.Runner() as other:
        owner.run(client.connect())
        other.run(asyncio.wait_for(request(), DEADLINE))
        assert "The client was opened on another event loop" in caplog.text
        assert "records were refused: WrongEventLoop" in caplog.text
        assert owner.run(client.list()) == []
        owner.run(client.close())


def test_another_request_log() -> None:
    """Any other place for the request log is refused."""
    with pytest.raises(InvalidSettings) as raised:
        create_app(IncidentClient.open(MEMORY), request_log="file")  # type: ignore[arg-type]
    assert raised.value.name == "request_log"


class NoRequestLog:
    """A store that cannot append to the request log."""


def test_a_request_log_without_a_table() -> None:
    """A client whose store cannot append rows is refused right away."""
    client = IncidentClient(cast("IncidentStore", NoRequestLog()))
    create_app(client)
    with pytest.raises(InvalidSettings) as raised:
        create_app(client, request_log="database")
    assert raised.value.name == "request_log"


async def test_the_lifespan_of_another_app() -> None:
    """An app that was not made by `create_app()` is refused."""
    with pytest.raises(TypeError):
        async with lifespan(Starlette()):
            pytest.fail("The app started")


def check_mounted(api: httpx2.Client, prefix: str) -> None:
    """Fail unless the whole service works under the prefix."""
    created = api.post(f"{prefix}/incident/create", json=INCIDENT)
    assert created.status_code == 201
    assert created.headers["Location"] == f"{prefix}/incident/get/1"
    assert api.get(created.headers["Location"]).json() == created.json()
    assert api.get(f"{prefix}/incident/get?page=0").status_code == 422
    assert api.get(f"{prefix}/health/ready").status_code == 200
    assert api.get(f"{prefix}/openapi.json").json()["servers"] == [{"url": prefix}]
    for path in ("/docs", "/docs/start.js", "/docs/swagger-ui.css"):
        assert api.get(prefix + path).status_code == 200
    for status, answer in (
        (404, api.get(f"{prefix}/nowhere")),
        (404, api.get(f"{prefix}/incident/get/")),
        (405, api.put(f"{prefix}/incident/get")),
    ):
        assert answer.status_code == status
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert answer.json()["request_id"] == answer.headers["X-Request-ID"]


def test_mounted_in_fastapi(serve: Serve) -> None:
    """A FastAPI host that runs the lifespan serves the app under its prefix, and its own routes."""
    client = IncidentClient.open(MEMORY)
    incidents = create_app(client, request_log="database")
    host = FastAPI(lifespan=lambda _: lifespan(incidents))
    host.mount("/ops/incidents", incidents)

    @host.get("/own")
    def own() -> dict[str, bool]:
        return {"connected": client.connected}

    api = serve(host, checked=False)
    check_mounted(api, "/ops/incidents")
    assert api.get("/own").json() == {"connected": True}
    assert api.get("/nowhere").json() == {"detail": "Not Found"}
    assert api.post("/own").json() == {"detail": "Method Not Allowed"}


def test_mounted_with_a_client_of_the_host(serve: Serve) -> None:
    """A host that connects the client itself needs nothing else, at any depth."""
    client = IncidentClient.open(MEMORY)

    @asynccontextmanager
    async def connected(_: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    inner = Starlette(routes=[Mount("/b c", create_app(client))])
    api = serve(Starlette(routes=[Mount("/a", inner)], lifespan=connected), checked=False)
    check_mounted(api, "/a/b%20c")


def test_behind_a_proxy(serve: Serve) -> None:
    """Links of the service have the prefix that a proxy has removed."""
    api = serve(create_app(IncidentClient.open(MEMORY)), root_path="/proxy/")
    created = api.post("/incident/create", json=INCIDENT)
    assert created.headers["Location"] == "/proxy/incident/get/1"
    assert api.get("/openapi.json").json()["servers"] == [{"url": "/proxy"}]


async def test_other_scopes_pass() -> None:
    """A WebSocket that a host passes on is closed."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    app = create_app(IncidentClient.open(MEMORY))
    scope = {"type": "websocket", "path": "/incident/get", "headers": [], "query_string": b""}
    await app(scope, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


async def test_an_error_outside_the_routes() -> None:
    """An error in a host's middleware inside the app is answered with a problem, too."""

    async def broken(*_: object) -> None:
        raise ZeroDivisionError

    def middleware(_: ASGIApp) -> ASGIApp:
        return broken

    app = create_app(IncidentClient.open(MEMORY))
    app.add_middleware(middleware)
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as api:
        answer = await api.get("/incident/get", headers={"X-Request-ID": "mine"})
    assert answer.status_code == 500
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.headers["X-Request-ID"] == answer.json()["request_id"] == "mine"


async def answers_of(
    app: ASGIApp, *paths: str, headers: dict[str, str] | None = None
) -> list[httpx2.Response]:
    """Return the answers of an app to GET, even if it raises."""
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as api:
        return [await api.get(path, headers=headers) for path in paths]


async def test_operations_are_found_inside_the_middleware_of_a_host() -> None:
    """Middleware sees each request and its route; operations do not need the router's routes."""
    seen: list[tuple[str, str]] = []

    def middleware(inner: ASGIApp) -> ASGIApp:
        async def outer(scope: Scope, receive: Receive, send: Send) -> None:
            await inner(scope, receive, send)
            if scope["type"] == "http":
                seen.append((scope["path"], scope["route"].path))

        return outer

    async with IncidentClient.open(MEMORY) as client:
        app = create_app(client)
        app.add_middleware(middleware)
        app.router.routes.clear()
        answers = await answers_of(app, "/incident/get", "/incident/history/7", "/health/live")
    assert [answer.status_code for answer in answers] == [200, 404, 200]
    assert answers[1].json()["detail"] == "Incident not found"
    assert seen == [
        ("/incident/get", "/incident/get"),
        ("/incident/history/7", "/incident/history/{incident_id}"),
        ("/health/live", "/health/live"),
    ]


async def test_the_path_of_a_mount_keeps_its_parameters() -> None:
    """Middleware in the app sees the parameters of the host's path, and those of the operation."""
    seen: list[dict[str, str]] = []

    def middleware(inner: ASGIApp) -> ASGIApp:
        async def outer(scope: Scope, receive: Receive, send: Send) -> None:
            await inner(scope, receive, send)
            seen.append(scope["path_params"])

        return outer

    app = create_app(IncidentClient.open(MEMORY))
    app.add_middleware(middleware)
    host = Starlette(routes=[Mount("/{tenant}", app)])
    await answers_of(host, "/acme/incident/get/7")
    assert seen == [{"tenant": "acme", "incident_id": "7"}]


async def test_an_answer_that_has_begun_is_not_followed_by_a_problem() -> None:
    """If a host's middleware fails after the answer has begun, no second answer is sent."""

    def middleware(inner: ASGIApp) -> ASGIApp:
        async def outer(scope: Scope, receive: Receive, send: Send) -> None:
            await inner(scope, receive, send)
            raise ZeroDivisionError

        return outer

    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message["type"])

    app = create_app(IncidentClient.open(MEMORY))
    app.add_middleware(middleware)
    scope = {"type": "http", "method": "GET", "path": "/health/live", "headers": []}
    with pytest.raises(ZeroDivisionError):
        await app({**scope, "query_string": b""}, receive, send)
    assert sent == ["http.response.start", "http.response.body"]


async def test_every_answer_has_the_id_of_its_request() -> None:
    """Every answer has the request's id, and an answer with its own id keeps it."""

    async def fail(_: Request) -> Response:
        raise ZeroDivisionError

    def own(request: Request) -> Response:
        return Response(headers=dict(request.query_params))

    def copying(inner: ASGIApp) -> ASGIApp:
        async def outer(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] == "/forbidden":
                await Response(status_code=403)(scope, receive, send)
            else:
                await inner({**scope}, receive, send)

        return outer

    app = create_app(IncidentClient.open(MEMORY))
    app.add_middleware(copying)
    app.add_route("/own", own)
    app.add_route("/fail", fail)
    paths = ("/incident/get", "/nowhere", "/forbidden", "/own", "/fail")
    answers = await answers_of(app, *paths)
    assert [answer.status_code for answer in answers] == [503, 404, 403, 200, 500]
    ids = [answer.headers.get_list("X-Request-ID") for answer in answers]
    assert all(len(each) == 1 for each in ids)
    assert len({each[0] for each in ids}) == len(paths)
    for answer, (id_,) in zip(answers, ids, strict=True):
        if "json" in answer.headers.get("Content-Type", ""):
            assert answer.json()["request_id"] == id_
    for answer in await answers_of(app, *paths, headers={"X-Request-ID": "mine"}):
        assert answer.headers.get_list("X-Request-ID") == ["mine"]
    (answer,) = await answers_of(app, "/own?x-request-id=theirs")
    assert answer.headers.get_list("X-Request-ID") == ["theirs"]


def test_starlette_is_missing() -> None:
    """Without Starlette the import error names the extra that installs it."""
    program = (
        "import sys; sys.modules['starlette'] = None\n"
        "from incidentkit import MissingDependency\n"
        "try:\n    import incidentkit.http\n"
        "except MissingDependency as error:\n    print(error.package, error.extra)"
    )
    assert run(program) == "starlette server\n"


def test_another_module_is_missing() -> None:
    """A module that Starlette itself is missing is not reported as Starlette."""
    program = (
        "import sys; sys.modules['anyio'] = None\n"
        "try:\n    import incidentkit.http\n"
        "except ModuleNotFoundError as error:\n    print(type(error).__name__, error.name[:5])"
    )
    assert run(program) == "ModuleNotFoundError anyio\n"


def run(program: str) -> str:
    """Run a program in a new interpreter and return what it prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        check=True,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
    ).stdout


def test_the_bundled_app(tmp_path: Path) -> None:
    """Uvicorn runs the app as the environment configures it, and logs each request to stderr."""
    (tmp_path / ".env").write_text("INCIDENTKIT_REQUEST_LOG=database\n")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "INCIDENTKIT_DATABASE_URL": "sqlite+aiosqlite:///mine.db",
    }
    command = [sys.executable, "-m", "uvicorn", "--port", "0", "incidentkit.http.asgi:app"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        url = next(
            found[1] for line in lines if (found := re.search(r"running on (http://\S+)", line))
        )
        headers = {"X-Request-ID": "mine"}
        created = httpx2.post(f"{url}/incident/create", json=INCIDENT, headers=headers)
        assert created.status_code == 201
        ready = httpx2.get(f"{url}/health/ready").json()
        assert ready["request_log"] == {"state": "ok", "dropped": 0}
        process.send_signal(signal.SIGINT)
        rest = "".join(lines)
    assert re.search(r"INFO: POST /incident/create 201 \d+\.\d ms mine\n", rest)
    assert (tmp_path / "mine.db").exists()


def test_the_bundled_app_leaves_logging_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing the bundled app leaves a logging configuration unchanged."""
    import logging

    monkeypatch.setenv("INCIDENTKIT_DATABASE_URL", MEMORY)
    logger = logging.getLogger("incidentkit")
    handlers, level = list(logger.handlers), logger.level
    from incidentkit.http.asgi import app

    assert isinstance(app, Service)
    assert isinstance(app.client.store, Store)
    assert (logger.handlers, logger.level) == (handlers, level)


@pytest.mark.parametrize("key", [500, Exception])
async def test_a_host_answers_its_own_errors(key: int | type[Exception]) -> None:
    """A handler that a host adds for errors answers those of its routes and its middleware."""
    app = service_on(IncidentClient.open(MEMORY), docs=False)

    async def handler(_: Request, error: Exception) -> Response:
        return Response(str(error), 500)

    async def route(_: Request) -> Response:
        raise RuntimeError("the host's")

    app.add_exception_handler(key, handler)
    app.add_route("/own", route)
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as api:
        answer = await api.get("/own")
    assert (answer.status_code, answer.text) == (500, "the host's")
    assert answer.headers["X-Request-ID"]


@pytest.mark.parametrize("stripped", [True, False])
@pytest.mark.parametrize("mount", ["", "/incidents", "/deep/down"])
async def test_a_proxy_may_strip_its_prefix(mount: str, *, stripped: bool) -> None:
    """Under a root path, a route is found with and without it in the path, mounted or alone."""
    client = IncidentClient.open(MEMORY)
    app: ASGIApp = create_app(client)
    if mount:
        app = Starlette(routes=[Mount(mount, app)])
    transport = httpx2.ASGITransport(app, root_path="/proxy")
    base = f"http://service{'' if stripped else '/proxy'}{mount}"
    async with client, httpx2.AsyncClient(transport=transport, base_url=base) as api:
        created = await api.post("/incident/create", json=INCIDENT)
        assert created.status_code == 201
        assert created.headers["Location"] == f"/proxy{mount}/incident/get/1"
        assert (await api.get("/incident/get/1")).json() == created.json()
        assert (await api.get("/nowhere")).json()["code"] == "unknown_path"
        assert (await api.get("/incident")).json()["code"] == "unknown_path"
        wrong = await api.delete("/incident/get/1")
        assert wrong.json()["code"] == "method_not_allowed"
        assert wrong.headers["Allow"] == "GET, HEAD"
        root = await api.get("/")
        assert root.headers["Location"] == "docs"


async def test_a_root_path_is_whole_segments() -> None:
    """A path that only begins like the root path is not below it."""
    client = IncidentClient.open(MEMORY)
    transport = httpx2.ASGITransport(create_app(client), root_path="/in")
    async with client, httpx2.AsyncClient(transport=transport, base_url="http://service") as api:
        assert (await api.get("/incident/get")).status_code == 200
        assert (await api.get("/in/incident/get")).status_code == 200
        assert (await api.get("/inincident/get")).status_code == 404
        assert (await api.get("/in")).headers["Location"] == "/in/docs"

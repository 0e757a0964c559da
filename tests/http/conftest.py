"""Runs the service under a real server, and checks every answer against the OpenAPI document."""

from __future__ import annotations

import logging
import queue
import socket
import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import httpx2
import pytest
import uvicorn
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from incidentkit import IncidentClient
from incidentkit.http import create_app
from incidentkit.http.openapi import document
from incidentkit.http.routes import OPERATIONS
from incidentkit.http.service import Service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from starlette.types import ASGIApp

MEMORY = "sqlite+aiosqlite:///:memory:"
INCIDENT: dict[str, Any] = {"incident_message": "Disk is full on db-1", "source": "monitoring"}
DOCUMENT = document(OPERATIONS)


def service_on(client: IncidentClient, **options: Any) -> Service:
    """Return the app around a client, typed so that tests reach its parts."""
    app = create_app(client, **options)
    assert isinstance(app, Service)
    return app


@contextmanager
def serving(app: ASGIApp, **config: Any) -> Iterator[str]:
    """Run the app under uvicorn in a thread and yield its URL; stop it gracefully."""
    server = uvicorn.Server(
        uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", **config)
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started and thread.is_alive():
                thread.join(0.005)
            if not thread.is_alive():
                pytest.fail("uvicorn did not start")
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def check_answer(response: httpx2.Response) -> None:
    """Fail if the OpenAPI document does not describe such an answer."""
    response.read()
    assert response.headers["X-Request-ID"]
    operation = _operation(response.request)
    if operation is None or response.status_code == httpx2.codes.METHOD_NOT_ALLOWED:
        return
    described = operation["responses"].get(str(response.status_code))
    assert described, f"{response.request.url} answers {response.status_code}"
    described = _resolve(described)
    for name in described["headers"]:
        assert name in response.headers or not DOCUMENT["components"]["headers"][name]["required"]
    if response.status_code in {httpx2.codes.NO_CONTENT, httpx2.codes.NOT_MODIFIED}:
        assert response.content == b""
        return
    media_type = response.headers["Content-Type"]
    content = described["content"][media_type]
    if response.request.method != "HEAD":
        validate(response.json(), content["schema"])


def validate(value: Any, schema: dict[str, Any]) -> None:
    """Fail if the value does not match a schema of the OpenAPI document."""
    Draft202012Validator({**schema, "components": DOCUMENT["components"]}).validate(value)


def _operation(request: httpx2.Request) -> dict[str, Any] | None:
    path = request.url.path
    for prefix in ("/incident/get/", "/incident/history/", "/incident/note/"):
        if path.startswith(prefix):
            path = f"{prefix}{{incident_id}}"
    method = request.method.lower().replace("head", "get")
    found: dict[str, Any] | None = DOCUMENT["paths"].get(path, {}).get(method)
    return found


def _resolve(described: dict[str, Any]) -> dict[str, Any]:
    value: Any = described
    if "$ref" in value:
        value = DOCUMENT
        for part in described["$ref"].removeprefix("#/").split("/"):
            value = value[part]
    assert isinstance(value, dict)
    return value


class Serve(Protocol):
    """Runs an app until the test ends, and returns a client for it."""

    def __call__(self, app: ASGIApp, *, checked: bool = True, **config: Any) -> httpx2.Client:
        """Return a client for the app; by default it checks each answer."""
        ...


@contextmanager
def _serve() -> Iterator[Serve]:
    with ExitStack() as stack:

        def serve(app: ASGIApp, *, checked: bool = True, **config: Any) -> httpx2.Client:
            url = stack.enter_context(serving(app, **config))
            hooks: dict[str, list[Callable[..., Any]]] = {
                "response": [check_answer] if checked else []
            }
            return stack.enter_context(httpx2.Client(base_url=url, event_hooks=hooks))

        yield serve


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Runs an app under uvicorn until the test ends."""
    with _serve() as serve:
        yield serve


@pytest.fixture(scope="module")
def api() -> Iterator[httpx2.Client]:
    """The service on an empty database, for tests that leave nothing in it."""
    with _serve() as serve:
        yield serve(create_app(IncidentClient.open(MEMORY)))


@pytest.fixture(params=["sqlite", "postgresql-redis"])
def urls(request: pytest.FixtureRequest) -> tuple[str, str | None]:
    """The URLs of an empty database, and of a Redis if there is one."""
    if request.param == "sqlite":
        return str(request.getfixturevalue("migrated_sqlite_url")), None
    return (
        str(request.getfixturevalue("migrated_postgres_url")),
        str(request.getfixturevalue("redis_url")),
    )


class Records(logging.Handler):
    """Collects log records from all threads."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: queue.Queue[logging.LogRecord] = queue.Queue()
        self.seen: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the record."""
        self.seen.append(record)
        self.queue.put(record)

    def next(self) -> logging.LogRecord:
        """Wait for the next record and return it."""
        return self.queue.get(timeout=10)


@pytest.fixture
def records() -> Iterator[Records]:
    """Everything that is logged during the test, at level INFO and above."""
    handler = Records()
    loggers = [logging.getLogger(name) for name in ("incidentkit", "uvicorn.error")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    yield handler
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)

"""Every request leaves a record, and the log never delays or fails a request."""

from __future__ import annotations

import asyncio
import logging
import re
import sqlite3
from contextlib import closing, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from incidentkit import IncidentClient, SchemaOutOfDate, StoreError, StoreUnavailable
from incidentkit.http import create_app, lifespan
from incidentkit.http.bounds import Places
from incidentkit.http.dispatch import Endpoint
from incidentkit.http.operation import Operation
from incidentkit.http.request_log import BATCH, CAPACITY, RequestLog
from incidentkit.store import RequestRecord
from incidentkit.store.backends.sqlite import join, join_sync
from incidentkit.store.migrate import upgrade_connection
from incidentkit.store.options import StoreOptions
from incidentkit.store.sqlite.dialect import SqliteDialect
from incidentkit.store.sqlite.threads import ThreadsExecutor
from incidentkit.store.sqlite.url import sqlite_url
from incidentkit.store.store import Store
from tests.http.conftest import INCIDENT, MEMORY, Records, Serve, service_on, serving

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import httpx2
    from sqlalchemy import Executable
    from starlette.responses import Response

REQUESTS = [
    ("POST", "/incident/create", "/incident/create", 201),
    ("POST", "/incident/create?x=1", "/incident/create", 422),
    ("GET", "/incident/get?status=new", "/incident/get", 200),
    ("HEAD", "/incident/get", "/incident/get", 200),
    ("GET", "/incident/get/1", "/incident/get/{incident_id}", 200),
    ("GET", "/incident/get/2", "/incident/get/{incident_id}", 404),
    ("PATCH", "/incident/update-status", "/incident/update-status", 422),
    ("GET", "/health/live", "/health/live", 200),
    ("GET", "/docs/start.js", "/docs/{asset}", 200),
    ("GET", "/openapi.json", "/openapi.json", 200),
    ("GET", "/nowhere/secret", "(none)", 404),
    ("GET", "/docs/nowhere", "/docs/{asset}", 404),
    ("PUT", "/incident/get", "(none)", 405),
]
"""Requests, with the route and the status of their records."""


def send(api: httpx2.Client) -> list[tuple[str, str, int, str]]:
    """Send the requests one after the other, and return what their records must hold."""
    expected = []
    for number, (method, path, route, status) in enumerate(REQUESTS):
        answer = api.request(
            method,
            path,
            json=INCIDENT if method == "POST" else None,
            headers={"X-Request-ID": f"request-{number}"},
        )
        assert answer.status_code == status
        expected.append((method, route, status, f"request-{number}"))
    return expected


def test_each_request_leaves_one_record(serve: Serve, records: Records) -> None:
    """A record has method, route, status, duration and id, in its text and as attributes."""
    expected = send(serve(create_app(IncidentClient.open(MEMORY))))
    logged = [record for record in records.seen if record.name == "incidentkit.http"]
    assert {record.levelno for record in logged} == {logging.INFO}
    values: list[Any] = [vars(record) for record in logged]
    assert [(v["method"], v["route"], v["status"], v["request_id"]) for v in values] == expected
    for value, (method, route, status, _) in zip(values, expected, strict=True):
        assert value["duration_ms"] > 0
        text = rf"{method} {re.escape(route)} {status} {value['duration_ms']:.1f} ms"
        assert re.fullmatch(text, value["message"])


async def test_the_same_records_in_the_database(urls: tuple[str, str | None]) -> None:
    """With request_log="database" every record is in the table once the service has stopped."""
    started = datetime.now(UTC).replace(microsecond=0)
    app = create_app(IncidentClient.open(*urls), request_log="database")
    expected = await asyncio.to_thread(_serve_and_send, app)
    rows = await _rows(urls[0])
    assert [row[1:5] for row in rows] == expected
    for logged_at, *_, duration in rows:
        assert started <= logged_at <= datetime.now(UTC)
        assert duration > 0


def _serve_and_send(app: Any) -> list[tuple[str, str, int, str]]:
    import httpx2

    with serving(app) as url, httpx2.Client(base_url=url) as api:
        return send(api)


async def _rows(url: str) -> list[tuple[Any, ...]]:
    query = (
        "SELECT logged_at, method, route, status, request_id, duration_ms FROM request_log "
        "ORDER BY request_log_id"
    )
    if url.startswith("postgresql"):
        connection = await asyncpg.connect(url)
        rows = [tuple(row) for row in await connection.fetch(query)]
        await connection.close()
        return rows
    with closing(sqlite3.connect(url.removeprefix("sqlite+aiosqlite:///"))) as database:
        return [
            (datetime.fromisoformat(row[0]).replace(tzinfo=UTC), *row[1:])
            for row in database.execute(query)
        ]


class LogStore(Store):
    """A store whose appends fail or hang as the test says.

    Args:
        outcomes: What the first calls do: raise the error, or hang for None; later ones succeed.
    """

    def __init__(self, *outcomes: Exception | None) -> None:
        executor = ThreadsExecutor(sqlite_url(MEMORY), StoreOptions())
        super().__init__(
            SqliteDialect(),
            executor,
            join=join,
            join_sync=join_sync,
            upgrade=lambda: executor.run(upgrade_connection),
        )
        self.outcomes = list(outcomes)
        self.batches: list[list[Mapping[str, Any]]] = []
        self.calls = 0

    async def append(
        self,
        statement: Executable,  # noqa: ARG002
        rows: Sequence[Mapping[str, Any]],
    ) -> None:
        """Keep the rows, unless an outcome is left."""
        self.calls += 1
        outcome = self.outcomes.pop(0) if self.outcomes else ...
        if outcome is None:
            await asyncio.Event().wait()
        if isinstance(outcome, Exception):
            raise outcome
        self.batches.append(list(rows))

    @property
    def stored(self) -> list[int]:
        """The numbers of the records that were stored, in order."""
        return [row["status"] for batch in self.batches for row in batch]


def record(number: int) -> RequestRecord:
    """Return a record with this number as its status."""
    return RequestRecord(datetime.now(UTC), "GET", "/", number, 1.0, "id")


async def until_idle(log: RequestLog) -> None:
    """Wait until the log has written its records and its task has ended."""
    assert log._task is not None
    async with asyncio.timeout(10):
        await log._task


async def test_records_are_written_in_order_and_in_batches() -> None:
    """Many records take few writes; none is lost, and their order is kept."""
    store = LogStore()
    log = RequestLog(store, interval=0)
    for number in range(BATCH * 2 + 1):
        log.add(record(number))
    await until_idle(log)
    assert [len(batch) for batch in store.batches] == [BATCH, BATCH, 1]
    assert store.stored == list(range(BATCH * 2 + 1))
    assert log.dropped == 0


async def test_a_quiet_log_has_no_task() -> None:
    """No task runs while there is nothing to write; a later record starts one."""
    store = LogStore()
    log = RequestLog(store, interval=0)
    for number in range(3):
        log.add(record(number))
        await until_idle(log)
    assert len(store.batches) == 3
    assert len(asyncio.all_tasks()) == 1


async def test_records_wait_for_others() -> None:
    """A record is written when its interval is over, or the log is closed."""
    store = LogStore()
    log = RequestLog(store, interval=3600)
    for number in range(3):
        log.add(record(number))
        await asyncio.sleep(0)
    assert store.batches == []
    await log.close()
    assert [len(batch) for batch in store.batches] == [3]


@pytest.mark.parametrize(
    "error", [StoreUnavailable("it is away"), SchemaOutOfDate(None, "9b3f6d20c7e8"), TimeoutError()]
)
async def test_records_outlast_an_outage(error: Exception, records: Records) -> None:
    """Records wait while the database is away; the log reports the outage and its end."""
    store = LogStore(error, error, error)
    log = RequestLog(store, interval=0)
    log.add(record(1))
    log.add(record(2))
    await until_idle(log)
    assert store.stored == [1, 2]
    assert store.calls == 4
    assert log.dropped == 0
    assert log.failing is False
    first, second = (logged.getMessage() for logged in records.seen)
    assert first.startswith("The request log cannot be written (")
    assert second == "The request log is being written again; records dropped so far: 0"


async def test_records_that_are_refused_are_dropped(
    records: Records,
) -> None:
    """A batch that the database refuses does not hold up the next one."""
    store = LogStore(StoreError("no"), RuntimeError("secret"))
    log = RequestLog(store, interval=0)
    for number in range(BATCH * 3):
        log.add(record(number))
    await until_idle(log)
    assert store.stored == list(range(BATCH * 2, BATCH * 3))
    assert log.dropped == BATCH * 2
    assert [logged.getMessage() for logged in records.seen] == [
        "The request log cannot be written (records were refused: StoreError)",
        f"The request log is being written again; records dropped so far: {BATCH * 2}",
    ]


async def test_a_full_log_drops_what_is_new(records: Records) -> None:
    """Records above the capacity are dropped and counted, and logged once."""
    store = LogStore()
    log = RequestLog(store, interval=0)
    for number in range(CAPACITY + 5):
        log.add(record(number))
    assert log.dropped == 5
    await until_idle(log)
    assert store.stored == list(range(CAPACITY))
    assert log.failing is False
    assert [logged.getMessage() for logged in records.seen] == [
        "The request log cannot be written (too many records are waiting)",
        "The request log is being written again; records dropped so far: 5",
    ]


async def test_a_write_that_hangs_is_given_up() -> None:
    """A write that hangs is cancelled and retried."""
    store = LogStore(None)
    log = RequestLog(store, interval=0, write_timeout=0.01)
    log.add(record(1))
    await until_idle(log)
    assert store.stored == [1]


@pytest.mark.parametrize("outcome", [None, StoreUnavailable("it is away")])
async def test_closing_drops_what_cannot_be_written(outcome: Exception | None) -> None:
    """Closing makes one more attempt in a limited time, then drops the remaining records."""
    store = LogStore(outcome, outcome)
    log = RequestLog(store, interval=3600, close_timeout=0.01)
    log.add(record(1))
    log.add(record(2))
    await log.close()
    assert store.calls == 1
    assert log.dropped == 2
    assert len(asyncio.all_tasks()) == 1


async def test_closing_does_not_wait_for_a_store_that_ignores_cancellation() -> None:
    """A write that ignores its cancellation is left behind, and changes nothing when it ends."""
    released = asyncio.Event()

    class Stubborn(LogStore):
        async def append(self, statement: Executable, rows: Sequence[Mapping[str, Any]]) -> None:
            while not released.is_set():
                with suppress(asyncio.CancelledError):
                    await released.wait()
            await super().append(statement, rows)

    store = Stubborn()
    log = RequestLog(store, interval=0, close_timeout=0.01)
    log.add(record(1))
    await asyncio.sleep(0.01)
    async with asyncio.timeout(5):
        await log.close()
    assert log.dropped == 1
    (left_behind,) = asyncio.all_tasks() - {asyncio.current_task()}
    log.add(record(2))
    released.set()
    await asyncio.wait({left_behind})
    await until_idle(log)
    assert store.stored == [1, 2]
    assert log.dropped == 1


@pytest.mark.parametrize("method", ["BREW", "GET\r\nX", "x" * 1000])
async def test_an_unknown_method(method: str, records: Records) -> None:
    """A method that HTTP does not define is not in the record."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError

    app = create_app(IncidentClient.open(MEMORY))
    scope = {"type": "http", "method": method, "path": "/incident/get", "headers": []}
    await app({**scope, "query_string": b"", "root_path": ""}, receive, send)
    assert sent[0]["status"] == 405
    (logged,) = records.seen
    assert logged.getMessage().startswith("(other) (none) 405 ")


async def test_a_closed_log_takes_new_records() -> None:
    """A record that is added after closing is written like any other."""
    store = LogStore()
    log = RequestLog(store, interval=0)
    await log.close()
    log.add(record(1))
    await until_idle(log)
    await log.close()
    assert store.stored == [1]
    assert log.dropped == 0


def test_a_hanging_log_delays_no_request(serve: Serve) -> None:
    """While the request log hangs every request is answered, and dropped records are counted."""
    store = LogStore(None)
    app = service_on(IncidentClient(store))
    app.request_log = RequestLog(store, capacity=3, interval=0, close_timeout=0.01)
    api = serve(app)
    for _ in range(10):
        assert api.get("/incident/get").status_code == 200
    ready = api.get("/health/ready")
    assert ready.status_code == 200
    assert ready.json()["request_log"] == {"state": "unavailable", "dropped": 7}


def test_a_failing_log_fails_no_request(serve: Serve) -> None:
    """While the database refuses records every request is answered."""
    store = LogStore(*[StoreError("no")] * 3)
    app = service_on(IncidentClient(store))
    app.request_log = RequestLog(store, interval=0)
    api = serve(app)
    assert api.post("/incident/create", json=INCIDENT).status_code == 201
    assert len(api.get("/incident/get").json()) == 1


async def test_mounted_the_log_needs_no_start() -> None:
    """An app writes records without its lifespan; at its end, the lifespan writes the rest."""
    store = LogStore()
    async with IncidentClient(store) as client:
        app = service_on(client, request_log="database")
        assert app.request_log is not None
        app.request_log.add(record(1))
        async with lifespan(app):
            app.request_log.add(record(2))
        assert store.stored == [1, 2]


@pytest.mark.usefixtures("records")
def test_a_log_handler_that_fails(api: httpx2.Client) -> None:
    """A host's log handler that raises does not fail a request."""
    failed = []

    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            failed.append(record)
            raise OSError

    handler = Broken()
    logger = logging.getLogger("incidentkit.http")
    logger.addHandler(handler)
    try:
        assert api.get("/incident/get").status_code == 200
    finally:
        logger.removeHandler(handler)
    assert len(failed) == 1


async def test_an_operation_that_raises_is_answered_and_logged(records: Records) -> None:
    """An operation that raises is answered with a problem, and the record has its status."""
    sent: list[Any] = []

    async def answer(*_: object) -> Response:
        raise StoreUnavailable("it is away")

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError

    operation = Operation("GET", "/mine", "mine", "Raise", answer, scope=None)
    endpoint = Endpoint(operation, None, Places(20, "requests"))
    app = create_app(IncidentClient.open(MEMORY))
    scope = {"type": "http", "method": "GET", "headers": [], "query_string": b"", "app": app}
    await endpoint(scope, receive, send)
    assert sent[0]["status"] == 503
    assert records.seen[-1].getMessage().startswith("GET /mine 503 ")

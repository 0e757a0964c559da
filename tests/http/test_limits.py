"""The limits of a connection and of their number, against real clients that break them."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx2
import pytest

from incidentkit import IncidentClient
from incidentkit.cli import limits
from incidentkit.cli.limits import Places, backlog, connection_limit
from incidentkit.cli.protocol import Protocol
from incidentkit.http import create_app, operation, streams
from tests.http.conftest import INCIDENT, MEMORY, Records, serving
from tests.programs import DEADLINE, service

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import Receive, Scope, Send

CREATE = b"POST /incident/create HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
CHUNKED = CREATE + b"Transfer-Encoding: chunked\r\n\r\n"
GET = b"GET /incident/get HTTP/1.1\r\nHost: a\r\n"
LIVE = b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n"


class Impatient(Protocol):
    """The protocol with short time limits."""

    receive_timeout = 0.2
    send_timeout = 0.2


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A service on an empty database."""
    with serving(create_app(IncidentClient.open(MEMORY)), http=Protocol) as url:
        yield url


@pytest.fixture(scope="module")
def impatient() -> Iterator[str]:
    """A service with short time limits."""
    app = create_app(IncidentClient.open(MEMORY))
    with serving(app, http=Impatient, timeout_keep_alive=1) as url:
        yield url


def connect(url: str) -> socket.socket:
    """Return a new connection."""
    parts = urlsplit(url)
    return socket.create_connection((str(parts.hostname), parts.port or 80), DEADLINE)


def read(connection: socket.socket) -> bytes:
    """Return everything until the service closes the connection."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def exchange(url: str, sent: bytes) -> bytes:
    """Send bytes, and return the answer until the service closes the connection."""
    with connect(url) as connection:
        connection.sendall(sent)
        return read(connection)


def statuses(answers: bytes) -> list[int]:
    """Return the status of each answer on a connection."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", answers)]


def problem(answer: bytes) -> dict[str, Any]:
    """Return the problem, which must be the only answer and belong to its head."""
    head, _, body = answer.partition(b"\r\n\r\n")
    found: dict[str, Any] = json.loads(body)
    status, *headers = head.decode().lower().split("\r\n")
    assert status.startswith(f"http/1.1 {found['status']} ")
    assert "content-type: application/problem+json" in headers
    assert "connection: close" in headers
    assert f"x-request-id: {found['request_id']}" in headers
    assert {"cache-control: no-store", "x-content-type-options: nosniff"} <= {*headers}
    return found


@pytest.mark.parametrize(
    ("status", "sent"),
    [
        (431, GET + b"X: " + b"a" * 2**17),
        (431, GET + b"X: " + b"a" * 2**16 + b"\r\n\r\n"),
        (431, GET + b"a: b\r\n" * 2**17),
        (431, GET + b"a: b\r\n" * 100 + b"\r\n"),
        (414, b"GET /" + b"a" * 2**17),
        (414, b"GET /" + b"a" * 2**14 + b" HTTP/1.1\r\nHost: a\r\n\r\n"),
        (431, CHUNKED + b"2;" + b"a" * 2**17),
        (431, CHUNKED + b"2\r\n{}\r\n0\r\nX: " + b"a" * 2**17),
        (431, CHUNKED + b"1;a=b\r\n{\r\n" * 2**17),
        (400, b"nonsense\r\n\r\n"),
        (400, b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n"),
        (400, CHUNKED + b"nonsense\r\n"),
    ],
)
def test_a_request_that_is_too_large_or_broken_is_a_problem(
    url: str, status: int, sent: bytes
) -> None:
    """It is refused before its end, with a problem, and the connection is closed."""
    answer = exchange(url, sent)
    assert problem(answer)["status"] == status
    head = answer.partition(b"\r\n\r\n")[0].lower()
    assert b"\r\ncache-control: no-store" in head
    assert b"\r\nx-content-type-options: nosniff" in head
    assert httpx2.get(f"{url}/health/live").status_code == 200


@pytest.mark.parametrize("sent", [GET + b"X: ", GET, CHUNKED + b"2\r\n{}\r\n0\r\nX: "])
def test_a_head_without_an_end_is_refused_as_it_arrives(url: str, sent: bytes) -> None:
    """The service does not wait for the end of headers that are already too large."""
    with connect(url) as connection:
        connection.sendall(sent)
        for _ in range(2**16 // 2**10 + 9):
            connection.sendall(b"a: " + b"b" * (2**10 - 5) + b"\r\n")
        assert problem(read(connection))["status"] == 431


def test_a_large_request_within_the_limits_is_answered(url: str) -> None:
    """A head of nearly 64 KiB, and a body in chunks of one byte, are taken."""
    headers = b"".join(b"x-%d: %b\r\n" % (n, b"a" * 640) for n in range(97))
    body = json.dumps(INCIDENT | {"incident_message": "a" * 1000}).encode()
    chunks = b"".join(b"001\r\n%c\r\n" % byte for byte in body)
    answer = exchange(
        url,
        GET
        + headers
        + b"\r\n"
        + CHUNKED.replace(b"Host", b"Connection: close\r\nHost")
        + chunks
        + b"0\r\nX-Request-ID: of-a-trailer\r\n\r\n",
    )
    assert statuses(answer) == [200, 201]
    assert b"of-a-trailer" not in answer


def test_large_requests_follow_each_other_on_a_connection(url: str) -> None:
    """The size of a body does not count against the request after it."""
    with httpx2.Client(base_url=url) as api:
        for _ in range(2):
            answer = api.post("/incident/create-many", json=[INCIDENT] * 1000)
            assert len(answer.request.content) > limits.MAX_HEAD
            assert answer.status_code == 201


def test_an_answer_outlives_a_body_that_goes_on(url: str) -> None:
    """A client that is refused while it sends can read the answer, and must then end."""
    with connect(url) as connection:
        connection.sendall(CREATE + b"Content-Length: 100000000\r\n\r\n" + b"a" * 2**17)
        connection.sendall(b"a" * 2**17)
        answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 413 ")
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            connection.sendall(bytes(10**8 - 2**18))


def test_requests_in_a_row_are_answered_in_their_order(url: str) -> None:
    """Requests that are sent without waiting are all answered, also after one for an upgrade."""
    upgrade = b"GET /health/live HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n"
    last = b"GET /nothing HTTP/1.1\r\nConnection: close\r\n\r\n"
    answer = exchange(url, LIVE * 3000 + upgrade + LIVE + last)
    assert statuses(answer) == [*[200] * 3002, 404]


def test_the_answer_before_a_broken_request_is_complete(url: str) -> None:
    """A broken request ends the connection after the answers to those before it."""
    answer = exchange(url, LIVE + LIVE + b"nonsense\r\n\r\n")
    assert set(statuses(answer)) == {200}
    assert answer.endswith(b'{"state":"ok"}')


@pytest.mark.parametrize("sent", [GET[:9], GET, CREATE + b"Content-Length: 9\r\n\r\n{"])
def test_a_request_that_does_not_arrive_is_refused(impatient: str, sent: bytes) -> None:
    """A head or a body that stays incomplete is answered with 408."""
    assert problem(exchange(impatient, sent))["status"] == 408


def test_a_trickling_request_is_refused(impatient: str) -> None:
    """The limit is for the whole request: sending a byte now and then does not extend it."""
    with connect(impatient) as connection:
        connection.sendall(GET)
        connection.settimeout(0.01)
        answer = b""
        while not answer:
            try:
                connection.sendall(b"a")
                answer = connection.recv(65536)
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("sent", [b"", b"\r\n"])
def test_a_silent_connection_is_closed(impatient: str, sent: bytes) -> None:
    """A connection without a request is closed without an answer."""
    assert exchange(impatient, sent) == b""


def test_an_idle_connection_is_closed(impatient: str) -> None:
    """A connection is closed some seconds after its last request, without another answer."""
    assert statuses(exchange(impatient, LIVE)) == [200]


class Slow:
    """An app that answers after its request has been in its hands for longer than the limit."""

    def __init__(self) -> None:
        self.gone = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with a body that no buffer holds, and note the end of the connection."""
        if scope["type"] != "http":
            for kind in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{kind}.complete"})
            return
        await asyncio.sleep(3 * Impatient.receive_timeout)
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/large":
            for _ in range(500):
                await send({"type": "http.response.body", "body": bytes(2**16), "more_body": True})
        await send({"type": "http.response.body", "body": b"done"})
        self.gone = (await receive())["type"] == "http.disconnect"


def test_time_of_the_service_does_not_count() -> None:
    """Neither a slow answer nor a body that the app does not read yet is a late request."""
    with serving(Slow(), http=Impatient) as url:
        assert httpx2.post(url, content=bytes(2**20)).text == "done"


def test_a_reader_that_reads_nothing_is_dropped() -> None:
    """A client that does not take its answer loses its connection."""
    app = Slow()
    with serving(app, http=Impatient) as url, connect(url) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
        connection.settimeout(DEADLINE)
        while not app.gone:
            # Waits for an answer to begin, and for its end: it never takes any of it.
            connection.recv(1, socket.MSG_PEEK)
    assert app.gone


async def test_a_large_answer_is_handed_over_in_parts() -> None:
    """The server holds a small part of an answer that its client does not read, not a copy."""
    async with IncidentClient.open(MEMORY) as incidents:
        app = create_app(incidents)
        for _ in range(40):
            await incidents.create("\N{FIRE}" * 1000, source="monitoring")
        parts: list[bytes] = []
        begun, reads = asyncio.Event(), asyncio.Event()

        async def receive() -> Any:
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                parts.append(message["body"])
                begun.set()
                await reads.wait()

        path = "/incident/get"
        scope = {"type": "http", "method": "GET", "path": path, "headers": [], "app": app}
        answer = asyncio.ensure_future(app({**scope, "query_string": b"limit=40"}, receive, send))
        await begun.wait()
        assert len(parts) == 1
        reads.set()
        await answer
        assert [len(part) for part in parts[:2]] == [2**16, 2**16]
        assert len(json.loads(b"".join(parts))) == 40


def test_waiting_connections_make_room_for_new_ones(records: Records) -> None:
    """Above the limit, the connection that has waited longest is closed, with one warning."""
    app = create_app(IncidentClient.open(MEMORY))
    with serving(app, http=Protocol, limit_concurrency=4) as url, ExitStack() as stack:
        silent = [stack.enter_context(closing(connect(url))) for _ in range(20)]
        for _ in range(3):
            assert httpx2.get(f"{url}/health/ready").status_code == 200
        assert [read(connection) for connection in silent[:16]] == [b""] * 16
    warnings = [record.getMessage() for record in records.seen if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert warnings[0].startswith("All 4 connections are in use")


def test_busy_connections_are_kept() -> None:
    """While every connection has a request, further ones get health checks and a `retry:`."""
    app = create_app(IncidentClient.open(MEMORY))
    changes = {"Accept": "text/event-stream"}
    with serving(app, http=Protocol, limit_concurrency=2) as url, ExitStack() as stack:
        for _ in range(2):
            stream = httpx2.stream("GET", f"{url}/incident/changes", headers=changes)
            assert stack.enter_context(stream).status_code == 200
        refused = httpx2.get(f"{url}/incident/get")
        assert refused.status_code == 503
        assert refused.headers["Retry-After"]
        assert refused.headers["X-Request-ID"] == refused.json()["request_id"]
        come_back = httpx2.get(f"{url}/incident/changes", headers=changes)
        assert come_back.status_code == 200
        assert come_back.text.startswith("retry: 1")
        ready = httpx2.get(f"{url}/health/ready")
        assert (ready.status_code, ready.headers["Connection"]) == (200, "close")


class Visitor:
    """A connection that takes a place."""

    def __init__(self) -> None:
        self.evicted = False

    def evict(self) -> None:
        """Note it."""
        self.evicted = True


def test_places_are_given_back() -> None:
    """A busy connection keeps its place; a spare place is one of a few; each comes back."""
    places = Places(1)
    visitors = [Visitor() for _ in range(limits.SPARE + 2)]
    taken = []
    for visitor in visitors:
        taken.append(places.take(visitor))
        places.work(visitor)
    assert taken == [True, *[False] * limits.SPARE, None]
    assert not any(visitor.evicted for visitor in visitors)
    places.wait(visitors[1])
    places.wait(visitors[0])
    late = Visitor()
    assert places.take(late) is False
    places.work(late)
    assert [visitor.evicted for visitor in visitors[:2]] == [False, True]
    for visitor in visitors:
        places.release(visitor)
        places.release(visitor)
        places.wait(visitor)
    assert places.take(visitors[0]) is False


def test_a_service_with_few_files_answers_health_checks(sqlite_url: str, tmp_path: Path) -> None:
    """With more silent clients than files, `serve` answers, and warns once."""
    shell = 'ulimit -n 256 && exec "$0" -m incidentkit serve --port 0 --database-url "$1"'
    log = tmp_path / "log"
    with (
        service(
            log, sys.executable, sqlite_url, program=("-c", shell), executable="/bin/sh"
        ) as running,
        ExitStack() as stack,
    ):
        for _ in range(400):
            stack.enter_context(closing(connect(running.url)))
        for path in ("/health/ready", "/incident/get"):
            assert httpx2.get(f"{running.url}{path}", timeout=DEADLINE).status_code == 200
        assert running.end(signal.SIGTERM) == 0
    lines = log.read_text().splitlines()
    assert sum("connections are in use" in line for line in lines) == 1
    assert not [line for line in lines if "ERROR" in line]


@pytest.mark.parametrize(("files", "database"), [(1024, 15), (300, 20), (20, 5), (10**6, 15)])
def test_connections_leave_files_to_others(files: int, database: int) -> None:
    """The limit leaves room for the database, for health checks and for a burst of clients."""
    limit = connection_limit(files, database)
    assert 1 <= limit <= limits.MAX_CONNECTIONS
    assert limit == 1 or limit + limits.SPARE + database + backlog(files) < files


def test_the_page_of_limits_has_those_of_the_code() -> None:
    """Each number in the table of the page is the constant."""
    page = Path(__file__).parents[2] / "docs" / "how-to" / "limits.md"
    rows = [
        [cell.strip() for cell in line.split("|")[1:4]]
        for line in page.read_text("utf-8").splitlines()
        if line.startswith("|")
    ]
    values = {name: value for name, value, _ in rows}
    kib = 1024
    assert {
        name: values[name] for name in values if name.startswith(("path", "headers", "num"))
    } == {
        "path and query of a request": f"{limits.MAX_TARGET // kib} KiB",
        "headers of a request, together": f"{limits.MAX_HEAD // kib} KiB",
        "number of headers": str(limits.MAX_HEADERS),
    }
    assert values["[body](../reference/rest.md)"] == f"{operation.MAX_BODY // kib} KiB"
    received = f"{limits.RECEIVE_TIMEOUT:g} seconds"
    assert values["time to receive a request, with its body"] == received
    assert values["time without a request on a new connection"] == received
    taken = f"time to take {limits.MIN_TAKEN // kib} KiB of an answer, or the rest of it"
    assert values[taken] == f"{limits.SEND_TIMEOUT:g} seconds"
    assert values["connections of a process"].startswith(f"{limits.MAX_CONNECTIONS}, ")
    assert values["readers of the change feed, of a process"] == str(streams.MAX_READERS)
    text = " ".join(page.read_text("utf-8").split())
    assert f"{limits.FRAMING} bytes more for each byte of the body" in text
    assert f"up to {limits.LINGER // kib} KiB" in text
    assert f"{limits.SPARE} further ones" in text
    assert f"it takes {connection_limit(1024, 15)} connections" in text

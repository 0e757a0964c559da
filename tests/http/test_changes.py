"""The change feed over HTTP, by server-sent events and by polling."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import socket
import threading
import time
from contextlib import AsyncExitStack, ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import psycopg
import pytest

from incidentkit import FeedBlocker, IncidentClient, StoreError
from incidentkit.cli.protocol import Protocol
from incidentkit.domain.cursor import encode_cursor
from incidentkit.feed import EMPTY
from incidentkit.http import create_app, streams
from incidentkit.store import records
from tests.http.conftest import INCIDENT, MEMORY, Records, Serve, service_on, serving
from tests.programs import service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]
STREAM = {"Accept": "text/event-stream"}
HUGE = 20_000_000
"""More bytes than the buffers on the way to a reader hold."""

GRACE = 20
"""Seconds for a graceful shutdown, after which uvicorn gives up and logs an error."""


def update(api: httpx2.Client, status: str) -> None:
    """Change the status of the first incident."""
    params: dict[str, str | int] = {"incident_id": 1, "status": status}
    assert api.patch("/incident/update-status", params=params).status_code == 200


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition in the thread of the server."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def messages(stream: httpx2.Response) -> Iterator[dict[str, str]]:
    """Yield each block of a stream: the fields of an event, or a comment."""
    block: dict[str, str] = {}
    for line in stream.iter_lines():
        if not line:
            yield block
            block = {}
            continue
        name, _, value = line.partition(":")
        block[name] = value.strip()


def events(stream: httpx2.Response) -> Iterator[dict[str, Any]]:
    """Yield the changes of a stream, and check the fields of each event."""
    for block in messages(stream):
        if "data" in block:
            change = json.loads(block["data"])
            assert block["id"] == change["cursor"]
            assert block["event"] == change["kind"]
            yield change


QUIET = {"id": EMPTY, "": "nothing new"}
"""The heartbeat of a stream before the first change."""


NO_PLACE = {"": "every place for a reader is taken"}
"""What a stream says that has no place."""


def assert_begins(blocks: Iterator[dict[str, str]], seconds: tuple[int, int] = (1, 3)) -> None:
    """Read the first block: how long a browser waits before it reconnects."""
    low, high = seconds
    retry = next(blocks)
    assert [*retry] == ["retry"]
    assert low * 1000 <= int(retry["retry"]) <= high * 1000


def test_a_stream_has_old_and_new_changes(serve: Serve, urls: tuple[str, str | None]) -> None:
    """Changes come in order: old ones at once, new ones as they happen."""
    api = serve(create_app(IncidentClient.open(*urls)), checked=False)
    api.post("/incident/create", json=INCIDENT)
    with api.stream("GET", "/incident/changes", headers=STREAM) as stream:
        assert stream.headers["Content-Type"].startswith("text/event-stream")
        assert stream.headers["Cache-Control"] == "no-store"
        assert stream.headers["X-Request-ID"]
        changes = events(stream)
        assert next(changes)["kind"] == "created"
        update(api, "failed")
        change = next(changes)
        assert (change["from_status"], change["to_status"]) == ("new", "failed")
    history = api.get("/incident/history/1").json()
    assert change == history[1]


def test_a_stream_resumes(serve: Serve, urls: tuple[str, str | None]) -> None:
    """Last-Event-ID resumes after that event, and takes precedence over the query."""
    api = serve(create_app(IncidentClient.open(*urls)), checked=False)
    api.post("/incident/create", json=INCIDENT)
    update(api, "failed")
    update(api, "new")
    first, second, third = api.get("/incident/history/1").json()
    for headers, after in (
        ({"Last-Event-ID": first["cursor"]}, third["cursor"]),
        ({}, first["cursor"]),
    ):
        params = {"after": after}
        with api.stream(
            "GET", "/incident/changes", params=params, headers=STREAM | headers
        ) as stream:
            changes = events(stream)
            assert [next(changes), next(changes)] == [second, third]


def test_a_quiet_stream_sends_heartbeats(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream starts with the delay to reconnect, and sends comments while nothing changes."""
    monkeypatch.setattr(streams, "HEARTBEAT", 0.01)
    api = serve(create_app(IncidentClient.open(MEMORY)), checked=False)
    with api.stream("GET", "/incident/changes?after=latest", headers=STREAM) as stream:
        blocks = messages(stream)
        assert_begins(blocks)
        for _ in range(3):
            assert next(blocks) == QUIET


def test_a_stream_that_is_held_up_says_so(
    serve: Serve, two_phase_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its comments say since when and by what; one that no change waits for is quiet."""
    monkeypatch.setattr(streams, "HEARTBEAT", 0.01)
    monkeypatch.setattr(records, "HELD_UP_AFTER", 0.0)
    api = serve(create_app(IncidentClient.open(two_phase_url)), checked=False)
    gid = "one\n\ndata: two"
    with (
        psycopg.connect(two_phase_url, autocommit=True) as host,
        api.stream("GET", "/incident/changes", headers=STREAM) as stream,
    ):
        blocks = messages(stream)
        assert_begins(blocks)
        for statement in ("BEGIN", "SELECT pg_current_xact_id()"):
            host.execute(statement)
        assert [next(blocks), next(blocks)] == [QUIET] * 2
        api.post("/incident/create", json=INCIDENT)
        pid = host.info.backend_pid
        holder = rf"held up since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d by process {pid}"
        while (block := next(blocks)) == QUIET:
            pass
        assert re.fullmatch(holder, block.pop(""))
        assert block == {"id": EMPTY}
        host.execute(f"PREPARE TRANSACTION '{gid}'")
        while re.fullmatch(holder, (comment := next(blocks)[""])):
            pass
        assert comment.endswith(f"by the prepared transaction {gid!r}")
        host.execute(f"ROLLBACK PREPARED '{gid}'")
        while "data" not in (block := next(blocks)):
            assert [*block] == ["id", ""]
        assert next(blocks)[""] == "nothing new"


def test_a_stream_goes_on_if_the_feed_cannot_be_asked(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that does not tell what holds the feed up does not end the stream."""
    monkeypatch.setattr(streams, "HEARTBEAT", 0.01)
    client = IncidentClient.open(MEMORY)

    async def fail() -> FeedBlocker | None:
        raise StoreError("it refused")

    client.store.feed_blocker = fail  # type: ignore[method-assign]
    api = serve(create_app(client), checked=False)
    with api.stream("GET", "/incident/changes", headers=STREAM) as stream:
        blocks = messages(stream)
        assert_begins(blocks)
        assert [next(blocks), next(blocks)] == [QUIET] * 2


def test_streams_share_the_search_for_a_blocker(serve: Serve) -> None:
    """For heartbeats within seconds, the streams of an app ask the database for a blocker once."""
    client = IncidentClient.open(MEMORY)
    asked = 0

    async def ask() -> FeedBlocker | None:
        nonlocal asked
        asked += 1
        return None

    client.store.feed_blocker = ask  # type: ignore[method-assign]
    api = serve(create_app(client), checked=False)
    with ExitStack() as stack:
        for _ in range(5):
            stream = stack.enter_context(api.stream("GET", "/incident/changes", headers=STREAM))
            blocks = messages(stream)
            assert_begins(blocks)
            assert next(blocks) == QUIET
    assert asked == 1


def test_a_head_of_a_stream_ends(api: httpx2.Client) -> None:
    """HEAD answers at once, even if the request accepts a stream."""
    answer = api.head("/incident/changes", headers=STREAM)
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize("headers", [{}, STREAM])
def test_a_foreign_cursor_is_gone(serve: Serve, headers: dict[str, str]) -> None:
    """A cursor of another database is refused with 410, before a stream begins."""
    api = serve(create_app(IncidentClient.open(MEMORY)))
    after = encode_cursor(1, 2, 3, 4)
    answer = api.get("/incident/changes", params={"after": after}, headers=headers)
    assert answer.status_code == 410
    assert answer.json()["detail"] == (
        "The cursor is unknown in this database: start again without a cursor"
    )
    again = api.get("/incident/changes", headers={**headers, "Last-Event-ID": after})
    assert again.status_code == 410


@pytest.mark.parametrize(
    ("query", "headers", "fields"),
    [
        ("after=x&limit=0&wait=31", {}, ["after", "limit", "wait"]),
        ("wait=1.5", {}, ["wait"]),
        ("", {"Last-Event-ID": "x"}, ["after"]),
        ("since=1", {}, ["since"]),
    ],
)
def test_faulty_parameters_are_refused(
    api: httpx2.Client, query: str, headers: dict[str, str], fields: list[str]
) -> None:
    """Faulty parameters are named, for streams and polls alike."""
    for accept in ({}, STREAM):
        answer = api.get(f"/incident/changes?{query}", headers=headers | accept)
        assert answer.status_code == 422
        assert [error["field"] for error in answer.json()["errors"]] == fields


def test_polling_goes_from_page_to_page(serve: Serve, urls: tuple[str, str | None]) -> None:
    """`next` leads to the next page, and stays the same while nothing is new; a poll may wait."""
    api = serve(create_app(IncidentClient.open(*urls)))
    empty = api.get("/incident/changes").json()
    assert empty == {"changes": [], "next": EMPTY}
    api.post("/incident/create", json=INCIDENT)
    update(api, "failed")
    seen: list[Any] = []
    after: dict[str, Any] = {}
    while len(seen) < 2:
        page = api.get("/incident/changes", params={**after, "limit": 1, "wait": 10}).json()
        seen += page["changes"]
        after = {"after": page["next"]}
    assert seen == api.get("/incident/history/1").json()
    assert api.get("/incident/changes", params=after).json() == {
        "changes": [],
        "next": after["after"],
    }
    timer = threading.Timer(0.2, update, (api, "new"))
    timer.start()
    page = api.get("/incident/changes", params={**after, "wait": 10}).json()
    timer.join()
    assert [change["to_status"] for change in page["changes"]] == ["new"]


def test_the_number_of_readers_is_limited(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit, a poll gets 429, and a stream ends at once; who leaves frees a place."""
    monkeypatch.setattr(streams, "MAX_READERS", 2)
    api = serve(create_app(IncidentClient.open(MEMORY)), checked=False)
    with (
        api.stream("GET", "/incident/changes", headers=STREAM) as first,
        api.stream("GET", "/incident/changes", headers=STREAM) as second,
    ):
        # Keep the generators: a discarded one closes its stream.
        reading = [messages(first), messages(second)]
        for blocks in reading:
            next(blocks)
        answer = api.get("/incident/changes?wait=1")
        assert answer.status_code == 429
        assert int(answer.headers["Retry-After"]) > 0
        with api.stream("GET", "/incident/changes", headers=STREAM) as third:
            assert third.status_code == 200
            assert third.headers["Content-Type"].startswith("text/event-stream")
            blocks = messages(third)
            assert_begins(blocks, (10, 20))
            assert [*blocks] == [NO_PLACE]
        assert api.get("/incident/changes").status_code == 200
    for _ in range(200):
        with api.stream("GET", "/incident/changes", headers=STREAM) as stream:
            blocks = messages(stream)
            next(blocks)
            if next(blocks) != NO_PLACE:
                break
    else:
        pytest.fail("no place became free")


def frozen_reader(url: httpx2.URL) -> socket.socket:
    """Return a connection that asks for a stream, and reads only its first byte."""
    lazy = socket.create_connection((url.host, url.port or 80), timeout=60)
    lazy.sendall(b"GET /incident/changes HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n")
    assert lazy.recv(1)
    return lazy


def is_cut(lazy: socket.socket) -> bool:
    """Read to the end, and return whether the connection was dropped before all was sent."""
    received = 0
    try:
        while data := lazy.recv(1 << 20):
            received += len(data)
    except ConnectionResetError:
        return True
    return received < HUGE


def wait_for(records: Records, message: str) -> None:
    """Wait until the message is logged."""
    while records.next().getMessage() != message:
        pass


def test_the_limit_of_readers_holds_for_simultaneous_requests(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many simultaneous requests, each one above the limit gets a stream that ends."""
    monkeypatch.setattr(streams, "MAX_READERS", 3)
    api = serve(create_app(IncidentClient.open(MEMORY)), checked=False)

    async def begin(stream: httpx2.Response) -> bool:
        lines = stream.aiter_lines()
        return "taken" in [await anext(lines) for _ in range(3)][2]

    async def refused() -> list[bool]:
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(httpx2.AsyncClient(base_url=api.base_url))
            answers = await asyncio.gather(
                *(
                    stack.enter_async_context(
                        client.stream("GET", "/incident/changes", headers=STREAM)
                    )
                    for _ in range(12)
                )
            )
            return await asyncio.gather(*map(begin, answers))

    assert sorted(asyncio.run(refused())) == [False] * 3 + [True] * 9


@pytest.mark.parametrize("hooks", [True, False])
def test_a_reader_that_takes_nothing_is_dropped(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, records: Records, hooks: bool
) -> None:
    """A reader that takes nothing loses its place, and its connection if the server can drop it.

    No other reader is affected.
    """
    monkeypatch.setattr(streams, "SEND_TIMEOUT", 0.05)
    monkeypatch.setattr(streams, "HEARTBEAT", 0.01)
    monkeypatch.setattr(streams, "MAX_READERS", 1)
    monkeypatch.setattr(streams, "encode_event", lambda _: b"x" * HUGE)
    protocol = {"http": Protocol} if hooks else {}
    api = serve(create_app(IncidentClient.open(MEMORY)), checked=False, **protocol)
    api.post("/incident/create", json=INCIDENT)
    with frozen_reader(api.base_url) as lazy:
        wait_for(records, "A reader of changes was too slow")
        for _ in range(1000):
            if api.get("/incident/changes?wait=1").status_code == 200:
                break
        else:
            pytest.fail("the place never became free")
        if hooks:
            assert is_cut(lazy)
    assert api.get("/incident/get/1").status_code == 200
    errors = [record.getMessage() for record in records.seen if record.levelno >= logging.ERROR]
    # Without the hook, uvicorn closes the connection once the reader has taken what was sent.
    assert errors == ([] if hooks else ["ASGI callable returned without completing response."])


def test_a_reader_that_takes_nothing_does_not_hold_a_server_that_stops(
    monkeypatch: pytest.MonkeyPatch, records: Records
) -> None:
    """A server that stops drops a reader that does not take the end of its stream."""
    monkeypatch.setattr(streams, "SEND_TIMEOUT", 3600.0)
    monkeypatch.setattr(streams, "END_TIMEOUT", 0.05)
    monkeypatch.setattr(streams, "encode_event", lambda _: b"x" * HUGE)
    app = create_app(IncidentClient.open(MEMORY))
    with serving(app, http=Protocol, timeout_graceful_shutdown=GRACE) as url:
        httpx2.post(f"{url}/incident/create", json=INCIDENT)
        lazy = frozen_reader(httpx2.URL(url))
    with lazy:
        assert is_cut(lazy)
    assert "A reader of changes was too slow" in [each.getMessage() for each in records.seen]
    assert [record for record in records.seen if record.levelno >= logging.ERROR] == []


def test_a_poll_whose_reader_disconnects_frees_its_place(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A waiting poll ends with its connection, and frees its place."""
    monkeypatch.setattr(streams, "MAX_READERS", 1)
    app = service_on(IncidentClient.open(MEMORY))
    api = serve(app, checked=False)
    with socket.create_connection((api.base_url.host, api.base_url.port or 80)) as poll:
        poll.sendall(b"GET /incident/changes?wait=30 HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: app.readers.count == 1)
        assert api.get("/incident/changes?wait=30").status_code == 429
    until(lambda: app.readers.count == 0)


def test_a_stream_from_the_latest_change_starts_with_its_id(serve: Serve) -> None:
    """A reader that is disconnected before the first change can resume at the same position."""
    api = serve(create_app(IncidentClient.open(MEMORY)), checked=False)
    api.post("/incident/create", json=INCIDENT)
    (created,) = api.get("/incident/history/1").json()
    with api.stream("GET", "/incident/changes?after=latest", headers=STREAM) as stream:
        blocks = messages(stream)
        assert_begins(blocks)
        assert next(blocks) == {"id": created["cursor"], "": "nothing new"}


SERVICES = {
    "incidentkit": ("-m", "incidentkit", "serve", "--port", "0"),
    "uvicorn": ("-m", "uvicorn", "incidentkit.http.asgi:app", "--port", "0"),
}


@pytest.mark.parametrize("program", SERVICES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_no_reader_holds_a_service_that_stops(
    tmp_path: Path, program: str, number: signal.Signals
) -> None:
    """A signal completes streams, answers polls, and then ends the service."""
    log = tmp_path / "service.log"
    environment = {
        **os.environ,
        "INCIDENTKIT_DATABASE_URL": f"sqlite+aiosqlite:///{tmp_path}/incidents.db",
        "PYTHONPATH": str(ROOT),
    }
    polled: list[Any] = []
    with (
        service(log, program=SERVICES[program], env=environment) as running,
        httpx2.Client(base_url=running.url, timeout=60) as api,
        api.stream("GET", "/incident/changes", headers=STREAM) as stream,
    ):
        blocks = messages(stream)
        next(blocks)
        poll = threading.Thread(target=poll_until_it_stops, args=(running.url, polled))
        poll.start()
        until(lambda: bool(polled))
        # By then, the poll is most likely waiting.
        time.sleep(0.1)
        started = time.monotonic()
        code = running.end(number)
        assert time.monotonic() - started < GRACE
        # httpx2 raises unless the stream is completed.
        assert all("data" not in block for block in blocks)
        poll.join()
    # The service may have stopped before the poll reached it.
    assert polled[1:] in ([], [{"changes": [], "next": EMPTY}])
    if program == "incidentkit":
        assert code == 0
    text = log.read_text()
    assert "Finished server process" in text
    assert "graceful" not in text
    assert "Traceback" not in text


def poll_until_it_stops(url: str, polled: list[Any]) -> None:
    """Poll repeatedly and append the answers, after a first item that marks the start."""
    with httpx2.Client(base_url=url, timeout=60) as api:
        polled.append("begins")
        with suppress(httpx2.TransportError):
            while True:
                polled.append(api.get("/incident/changes?wait=30").json())

"""The change feed over HTTP: as server-sent events, and by polling."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import threading
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from incidentkit import IncidentClient
from incidentkit.domain.cursor import encode_cursor
from incidentkit.http import create_app, streams
from tests.http.conftest import INCIDENT, MEMORY, Records, Serve
from tests.programs import service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

STREAM = {"Accept": "text/event-stream"}
HUGE = 20_000_000
"""Bytes that are more than the buffers on the way to a reader hold."""


def update(api: httpx.Client, status: str) -> None:
    """Change the status of the first incident."""
    params: dict[str, str | int] = {"incident_id": 1, "status": status}
    assert api.patch("/incident/update-status", params=params).status_code == 200


def until(condition: Callable[[], bool]) -> None:
    """Wait for what happens in the thread of the server."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def messages(stream: httpx.Response) -> Iterator[dict[str, str]]:
    """Yield each block of a stream: the fields of an event, or a comment."""
    block: dict[str, str] = {}
    for line in stream.iter_lines():
        if not line:
            yield block
            block = {}
            continue
        name, _, value = line.partition(":")
        block[name] = value.strip()


def events(stream: httpx.Response) -> Iterator[dict[str, Any]]:
    """Yield the changes of a stream, whose fields have to fit."""
    for block in messages(stream):
        if "data" in block:
            change = json.loads(block["data"])
            assert block["id"] == change["cursor"]
            assert block["event"] == change["kind"]
            yield change


def test_a_stream_has_what_was_and_what_comes(serve: Serve, urls: tuple[str, str | None]) -> None:
    """Events come in order, those of before at once and new ones as they happen."""
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
    """Last-Event-ID goes on behind that event, before what the query says."""
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


def test_a_quiet_stream_says_that_it_is_there(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without changes a comment comes now and then, and at the start, with when to come back."""
    monkeypatch.setattr(streams, "HEARTBEAT", 0.01)
    api = serve(create_app(IncidentClient.open(MEMORY)), checked=False)
    with api.stream("GET", "/incident/changes?after=latest", headers=STREAM) as stream:
        blocks = messages(stream)
        assert next(blocks) == {"retry": "2000"}
        for _ in range(3):
            assert next(blocks) == {"": "nothing new"}


def test_a_head_of_a_stream_ends(api: httpx.Client) -> None:
    """HEAD answers at once, whatever is accepted."""
    answer = api.head("/incident/changes", headers=STREAM)
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize("headers", [{}, STREAM])
def test_a_foreign_cursor_is_gone(serve: Serve, headers: dict[str, str]) -> None:
    """A cursor of another database is refused with 410 before a stream begins."""
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
    api: httpx.Client, query: str, headers: dict[str, str], fields: list[str]
) -> None:
    """What is not understood is named, for streams and polls alike."""
    for accept in ({}, STREAM):
        answer = api.get(f"/incident/changes?{query}", headers=headers | accept)
        assert answer.status_code == 422
        assert [error["field"] for error in answer.json()["errors"]] == fields


def test_polling_goes_from_page_to_page(serve: Serve, urls: tuple[str, str | None]) -> None:
    """`next` leads on; where nothing is new it stays, and a poll may wait."""
    api = serve(create_app(IncidentClient.open(*urls)))
    empty = api.get("/incident/changes").json()
    assert empty == {"changes": [], "next": None}
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


def test_there_are_only_so_many_readers(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """One reader too many is told to try again; a place that was left is free."""
    monkeypatch.setattr(streams, "MAX_READERS", 2)
    api = serve(create_app(IncidentClient.open(MEMORY)), checked=False)
    with (
        api.stream("GET", "/incident/changes", headers=STREAM) as first,
        api.stream("GET", "/incident/changes", headers=STREAM) as second,
    ):
        # A generator that is thrown away closes its stream.
        reading = [messages(first), messages(second)]
        for blocks in reading:
            next(blocks)
        for query, headers in (("", STREAM), ("?wait=1", {})):
            answer = api.get(f"/incident/changes{query}", headers=headers)
            assert answer.status_code == 503
            assert int(answer.headers["Retry-After"]) > 0
        assert api.get("/incident/changes").status_code == 200
    for _ in range(200):
        with api.stream("GET", "/incident/changes", headers=STREAM) as stream:
            if stream.status_code == 200:
                break
    else:
        pytest.fail("no place became free")


def frozen_reader(api: httpx.Client) -> socket.socket:
    """Return a connection that asked for a stream, and takes no more than its beginning."""
    lazy = socket.create_connection((api.base_url.host, api.base_url.port or 80), timeout=60)
    lazy.sendall(b"GET /incident/changes HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n")
    assert lazy.recv(1)
    return lazy


def is_cut(lazy: socket.socket) -> bool:
    """Read what there is, and return whether the connection was dropped before all was sent."""
    received = 0
    try:
        while data := lazy.recv(1 << 20):
            received += len(data)
    except ConnectionResetError:
        return True
    return received < HUGE


def wait_for(records: Records, message: str) -> None:
    """Wait until it is logged."""
    while records.next().getMessage() != message:
        pass


def test_of_many_at_once_only_so_many_are_readers(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many come at the same moment, each beyond the bound is told so with 503."""
    monkeypatch.setattr(streams, "MAX_READERS", 3)
    api = serve(create_app(IncidentClient.open(MEMORY)), checked=False)

    async def statuses() -> list[int]:
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(httpx.AsyncClient(base_url=api.base_url))
            answers = await asyncio.gather(
                *(
                    stack.enter_async_context(
                        client.stream("GET", "/incident/changes", headers=STREAM)
                    )
                    for _ in range(12)
                )
            )
            return [answer.status_code for answer in answers]

    assert sorted(asyncio.run(statuses())) == [200] * 3 + [503] * 9


def test_a_reader_that_takes_nothing_is_given_up(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, records: Records
) -> None:
    """Whoever does not read what is sent loses the place and the connection, and nobody else."""
    monkeypatch.setattr(streams, "SEND_TIMEOUT", 0.05)
    monkeypatch.setattr(streams, "HEARTBEAT", 0.01)
    monkeypatch.setattr(streams, "MAX_READERS", 1)
    monkeypatch.setattr(streams, "encode_event", lambda _: b"x" * HUGE)
    api = serve(create_app(IncidentClient.open(MEMORY)), checked=False)
    api.post("/incident/create", json=INCIDENT)
    with frozen_reader(api) as lazy:
        wait_for(records, "A reader of changes was too slow")
        for _ in range(1000):
            if api.get("/incident/changes?wait=1").status_code == 200:
                break
        else:
            pytest.fail("the place never became free")
        assert is_cut(lazy)
    assert api.get("/incident/get/1").status_code == 200
    assert [record for record in records.seen if record.levelno >= logging.ERROR] == []


def test_a_reader_that_takes_nothing_does_not_hold_a_server_that_stops(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, records: Records
) -> None:
    """When the server is told to stop, a reader that does not take the end of its stream is cut."""
    monkeypatch.setattr(streams, "SEND_TIMEOUT", 3600.0)
    monkeypatch.setattr(streams, "END_TIMEOUT", 0.05)
    monkeypatch.setattr(streams, "encode_event", lambda _: b"x" * HUGE)
    api = serve(create_app(IncidentClient.open(MEMORY)), checked=False)
    api.post("/incident/create", json=INCIDENT)
    with frozen_reader(api) as lazy:
        monkeypatch.setattr(streams, "_server_stops", lambda: True)
        wait_for(records, "A reader of changes was too slow")
        assert is_cut(lazy)


def test_a_poll_whose_reader_is_gone_leaves_its_place(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A poll that waits ends with its connection."""
    monkeypatch.setattr(streams, "MAX_READERS", 1)
    app = create_app(IncidentClient.open(MEMORY))
    api = serve(app, checked=False)
    readers = app.state.readers
    with socket.create_connection((api.base_url.host, api.base_url.port or 80)) as poll:
        poll.sendall(b"GET /incident/changes?wait=30 HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: len(readers._tasks) == 1)
        assert api.get("/incident/changes?wait=30").status_code == 503
    until(lambda: not readers._tasks)


def test_a_stream_from_the_latest_says_which_that_was(serve: Serve) -> None:
    """Who is cut off before the first change can resume behind what was the latest."""
    api = serve(create_app(IncidentClient.open(MEMORY)), checked=False)
    api.post("/incident/create", json=INCIDENT)
    (created,) = api.get("/incident/history/1").json()
    with api.stream("GET", "/incident/changes?after=latest", headers=STREAM) as stream:
        blocks = messages(stream)
        assert next(blocks) == {"retry": "2000"}
        assert next(blocks) == {"id": created["cursor"], "": "nothing new"}


def test_a_service_that_stops_lets_no_stream_hold_it(tmp_path: Path) -> None:
    """With readers that wait for ever, the service still ends at once, and with 0."""
    with service(tmp_path / "service.log") as running, httpx.Client(base_url=running.url) as api:
        with api.stream("GET", "/incident/changes", headers=STREAM) as stream:
            blocks = messages(stream)
            next(blocks)
            assert running.end(signal.SIGTERM) == 0
            for _ in blocks:
                pass
        assert "graceful" not in running.log.read_text()

"""Headers and bodies as clients, proxies and servers really send them."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

from incidentkit import IncidentClient
from incidentkit.http import create_app
from incidentkit.http.requests import accepts
from tests.http.conftest import INCIDENT, MEMORY, Serve, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

BODY = json.dumps(INCIDENT).encode()


@pytest.fixture(params=["h11", "httptools"])
def address(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """The address of the service under each parser of uvicorn."""
    with serving(create_app(IncidentClient.open(MEMORY)), http=request.param) as url:
        parsed = httpx2.URL(url)
        yield parsed.host, parsed.port or 80


def send(address: tuple[str, int], head: bytes, body: bytes = b"") -> tuple[int, bytes, Any]:
    """Send the bytes of a request; return the status, the head and the JSON of the answer."""
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(head.replace(b"\n", b"\r\n") + b"Connection: close\r\n\r\n" + body)
        received = b""
        while data := connection.recv(65536):
            received += data
    start, _, content = received.partition(b"\r\n\r\n")
    return int(start.split()[1]), start, json.loads(content) if content else None


def create(address: tuple[str, int], key: bytes) -> tuple[bytes, Any]:
    """Create an incident with an idempotency key; return the head and the JSON of the answer."""
    head = (
        b"POST /incident/create HTTP/1.1\nHost: x\nContent-Type: application/json\n"
        b"Content-Length: %d\nIdempotency-Key:%b\n" % (len(BODY), key)
    )
    status, start, value = send(address, head, BODY)
    assert status in (201, 422)
    return start.lower(), value


CHUNKED = b"Host: x\nTransfer-Encoding: chunked\n"
EMPTY = b"0\r\n\r\n"


def test_an_empty_body_is_no_body(address: tuple[str, int]) -> None:
    """A body is judged by its bytes: an empty one passes, however it is framed."""
    assert send(address, b"GET /incident/get HTTP/1.1\n" + CHUNKED, EMPTY)[0] == 200
    patch = b"PATCH /incident/update-status?incident_id=1&status=new HTTP/1.1\n" + CHUNKED
    assert send(address, patch, EMPTY)[0] == 404
    status, _, problem = send(
        address, b"GET /incident/get HTTP/1.1\n" + CHUNKED, b"1\r\nx\r\n" + EMPTY
    )
    assert (status, problem["code"]) == (400, "unexpected_body")


def test_a_key_is_the_same_whatever_surrounds_it(address: tuple[str, int]) -> None:
    """Blanks and tabs around a key are no part of it, under each parser."""
    first, incident = create(address, b"k")
    assert b"idempotent-replayed" not in first
    for key in (b" k", b" k ", b"\tk\t", b" \t k \t "):
        head, again = create(address, key)
        assert again == incident
        assert b"\r\nidempotent-replayed: true\r\n" in head + b"\r\n"
    assert create(address, b" K")[1]["incident_id"] == 2


def test_an_object_without_fields_is_no_body(api: httpx2.Client) -> None:
    """Clients that always send JSON are served: `{}`, or nothing declared as JSON."""
    declared = {"Content-Type": "application/json"}
    for body in (b"{}", b" { }\r\n", b"", b"\n"):
        for method, path, status in (
            ("GET", "/incident/get", 200),
            ("GET", "/health/live", 200),
            ("PATCH", "/incident/update-status?incident_id=1&status=new", 404),
        ):
            answer = api.request(method, path, content=body, headers=declared)
            assert answer.status_code == status, (body, path)
    for body in (b"{}{}", b"}{", b"[]", b'""', b"{}" + b" " * 100):
        assert api.request("GET", "/incident/get", content=body).status_code == 400


async def test_a_body_without_framing_is_seen() -> None:
    """HTTP/2 does not announce a body: it is refused all the same."""
    app = create_app(IncidentClient.open(MEMORY))
    for body, status in ((b"x", 400), (b"", 200)):
        answers: list[Any] = []

        async def receive(body: bytes = body) -> Any:
            return {"type": "http.request", "body": body}

        async def keep(message: Any, answers: list[Any] = answers) -> None:
            answers.append(message)

        scope = {
            "type": "http",
            "http_version": "2",
            "method": "GET",
            "path": "/health/live",
            "query_string": b"",
            "headers": [],
        }
        await app(scope, receive, keep)
        assert answers[0]["status"] == status


async def test_a_key_is_that_of_the_sdk() -> None:
    """A key in UTF-8 is the SDK's key, counted in characters; other bytes are refused."""
    client = IncidentClient.open(MEMORY)
    transport = httpx2.ASGITransport(create_app(client))
    async with client, httpx2.AsyncClient(transport=transport, base_url="http://service") as api:
        key = "ключ 🔑" * 42
        first = await client.create(**INCIDENT, idempotency_key=key)
        headers = {b"Idempotency-Key": b"  " + key.encode() + b"\t"}
        answer = await api.post("/incident/create", json=INCIDENT, headers=headers)
        assert answer.json()["incident_id"] == first.incident_id
        assert answer.headers["Idempotent-Replayed"] == "true"
        for wrong, reason in (
            (b"\xe4", "must be UTF-8"),
            (b"", "must have 1 to 255 characters"),
            (("ключ" * 64).encode(), "must have 1 to 255 characters"),
        ):
            answer = await api.post(
                "/incident/create", json=INCIDENT, headers={b"Idempotency-Key": wrong}
            )
            assert answer.status_code == 422
            assert answer.json()["errors"] == [{"field": "idempotency_key", "reason": reason}]


@pytest.mark.parametrize(
    ("accept", "streams"),
    [
        ("text/event-stream", True),
        ("Text/Event-Stream ; charset=utf-8", True),
        ("application/json, text/event-stream", True),
        ("text/event-stream;q=0.9, */*;q=0.8", True),
        ("*/*;q=0.1, text/event-stream", True),
        ("application/json, text/event-stream;q=0.5", False),
        ("text/event-stream;q=0.5, application/*", False),
        ("text/event-stream; q=0", False),
        ("text/event-stream;q=0.000, */*;q=0", False),
        ("text/event-stream;q=high", False),
        ("text/event-stream+json", False),
        ("application/json;profile=text/event-stream", False),
        ("text/*", False),
        ("*/*", False),
        ("", False),
        (",;,q=1", False),
    ],
)
def test_media_ranges_are_weighed(accept: str, *, streams: bool) -> None:
    """A stream is for a client that names it, and prefers JSON no more."""
    for lines in ([accept], accept.split(",")):
        headers = [(b"accept", line.encode()) for line in lines]
        assert accepts(headers, "text/event-stream", before="application/json") is streams


def test_a_client_that_prefers_json_gets_json(api: httpx2.Client) -> None:
    """The feed answers with a page if the stream is only the second choice."""
    headers = {"Accept": "text/event-stream;q=0.1, application/json"}
    answer = api.get("/incident/changes", headers=headers)
    assert answer.json()["changes"] == []


def test_an_empty_last_event_id_is_none(api: httpx2.Client) -> None:
    """A browser that has seen no id sends an empty one: it begins at `after`."""
    answer = api.get("/incident/changes", headers={"Last-Event-ID": ""})
    assert answer.json()["changes"] == []


MOMENT = "2026-03-01 09:30:00"


@pytest.mark.parametrize(
    "text",
    [
        MOMENT,
        "2026-03-01T09:30:00",
        "2026-03-01T09:30:00Z",
        "2026-03-01t09:30:00z",
        "2026-03-01 09:30:00Z",
        "2026-03-01T09:30:00.000000000Z",
        "2026-03-01T09:29:59.1Z",
        "2026-03-01T09:29:59.0000000001Z",
        "2026-03-01T09:29:60Z",
        "2026-03-01T11:30:00+02:00",
        "2026-02-28T23:45:00-09:45",
        "2026-03-01T09:30:00-00:00",
    ],
)
async def test_a_time_of_rfc_3339(text: str) -> None:
    """Every form of RFC 3339 means its moment; a fraction counts up to the next second."""
    client = IncidentClient.open(MEMORY)
    seen: list[Any] = []

    async def search(query: Any) -> Any:
        seen.append(query.created_after)
        raise ZeroDivisionError

    transport = httpx2.ASGITransport(create_app(client), raise_app_exceptions=False)
    async with client, httpx2.AsyncClient(transport=transport, base_url="http://service") as api:
        client.store.search = search  # type: ignore[method-assign]
        await api.get("/incident/search", params={"created_after": text})
    assert [f"{moment:%Y-%m-%d %H:%M:%S}" for moment in seen] == [MOMENT]


@pytest.mark.parametrize(
    "text",
    [
        "2026-W09-7T09:30:00Z",
        "2026-060T09:30:00Z",
        "20260301T093000Z",
        "2026-03-01",
        "2026-03-01T09:30Z",
        "2026-03-01T09Z",
        "2026-03-01x09:30:00",
        "2026-03-01T24:00:00Z",
        "2026-02-30T09:30:00Z",
        "2026-03-01T09:30:61Z",
        "2026-03-01T09:30:00,5Z",
        "2026-03-01T09:30:00.Z",
        "2026-03-01T09:30:00+0200",
        "2026-03-01T09:30:00+24:00",
        "2026-03-01T09:30:00+02:00:30",
        "0000-01-01T00:00:00Z",
        "9999-12-31T23:59:60Z",
        "٢026-03-01T09:30:00Z",
        " 2026-03-01T09:30:00Z",
        "1772357400",
    ],
)
def test_a_time_in_another_format_is_refused(api: httpx2.Client, text: str) -> None:
    """Nothing but the documented formats is a time."""
    answer = api.get("/incident/search", params={"created_after": text})
    assert answer.status_code == 422
    assert answer.json()["errors"] == [
        {
            "field": "created_after",
            "reason": "must be YYYY-MM-DD HH:MM:SS in UTC, or a time of RFC 3339",
        }
    ]


@pytest.mark.parametrize("time", ["2026-03-01T09:30:00+02:00", "2026-03-01 09:30:00.5+02:00"])
def test_a_plus_that_was_decoded_is_named(api: httpx2.Client, time: str) -> None:
    """A `+` in a query means a blank: the reason says how to write it."""
    answer = api.get(f"/incident/search?created_before={time}")
    assert answer.status_code == 422
    (error,) = answer.json()["errors"]
    assert error["reason"] == "has a blank where its offset needs a +: write %2B in a URL"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/incident/get"),
        ("GET", "/incident/search"),
        ("GET", "/incident/get/1"),
        ("GET", "/nowhere"),
        ("GET", "/"),
        ("GET", "/docs"),
        ("GET", "/docs/start.js"),
        ("GET", "/openapi.json"),
        ("GET", "/health/ready"),
        ("GET", "/incident/changes"),
        ("DELETE", "/incident/get"),
        ("POST", "/incident/create"),
    ],
)
def test_every_answer_tells_caches_and_browsers_what_to_do(
    api: httpx2.Client, method: str, path: str
) -> None:
    """Each answer says whether it may be kept, and that its type is the declared one."""
    answer = api.request(method, path)
    kept = "no-cache" if path == "/docs/start.js" else "no-store"
    assert answer.headers.get_list("Cache-Control") == [kept]
    assert answer.headers.get_list("X-Content-Type-Options") == ["nosniff"]


def test_the_root_leads_to_the_documentation(serve: Serve) -> None:
    """A browser at the root is sent to Swagger UI, where there is one."""
    api = serve(create_app(IncidentClient.open(MEMORY)))
    assert api.get("/", follow_redirects=True).url.path == "/docs"
    assert api.head("/").status_code == 307
    plain = serve(create_app(IncidentClient.open(MEMORY), docs=False))
    assert plain.get("/").status_code == 404

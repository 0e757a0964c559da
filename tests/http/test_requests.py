"""Requests are read strictly, and no request makes the server fail."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from datetime import UTC, datetime
from itertools import repeat
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from attrs import evolve
from hypothesis import example, given, settings
from hypothesis import strategies as st

from incidentkit import (
    Incident,
    IncidentClient,
    IncidentNotFound,
    IncidentSource,
    IncidentStatus,
)
from incidentkit.domain.values import MAX_ID, MAX_LIMIT
from incidentkit.http import create_app
from incidentkit.http.operation import MAX_BODY
from incidentkit.store.backends.sqlite import join, join_sync
from incidentkit.store.options import StoreOptions
from incidentkit.store.page import Page
from incidentkit.store.sqlite.dialect import SqliteDialect
from incidentkit.store.sqlite.threads import ThreadsExecutor
from incidentkit.store.sqlite.url import sqlite_url
from incidentkit.store.store import Store
from tests.http.conftest import INCIDENT, MEMORY, Records, Serve, validate
from tests.strategies import padding, stripped_messages

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from starlette.applications import Starlette

    from incidentkit import ListQuery, NewIncident
    from incidentkit.domain.commands import StatusChange

JSON = {"Content-Type": "application/json"}
VALID = '"incident_message": "long enough", "source": "operator"'
BODY = json.dumps(INCIDENT).encode()


def post(api: httpx2.Client, content: bytes | Iterable[bytes], **headers: str) -> httpx2.Response:
    """Send a body as JSON."""
    head = JSON | {name.replace("_", "-"): value for name, value in headers.items()}
    return api.post("/incident/create", content=content, headers=head)


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"\xff", "The body is not UTF-8"),
        (b'{"source": "\xed\xa0\x80"}', "The body is not UTF-8"),
        ("{}".encode("utf-16"), "The body is not UTF-8"),
        (b"\xef\xbb\xbf{}", "The body is not JSON: it starts with a byte order mark"),
        (b'{"source": NaN}', "The body is not JSON: JSON has no NaN and no Infinity"),
        (b"-Infinity", "The body is not JSON: JSON has no NaN and no Infinity"),
        (b"[" * 60_000, "The body is nested too deeply"),
        (b'{"a":' * 13_000, "The body is nested too deeply"),
    ],
)
def test_a_body_that_is_not_json(api: httpx2.Client, body: bytes, detail: str) -> None:
    """A body that cannot be JSON is a 400 with the reason."""
    answer = post(api, body)
    assert answer.status_code == 400
    assert answer.json()["detail"] == detail


@pytest.mark.parametrize(
    "body",
    [
        "",
        " ",
        "{",
        '{"source": "operator",}',
        "{} {}",
        '{"source": "a\nb"}',
        "{'source': 1}",
        '{"source": 1_000}',
        '{"source": 01}',
        '{"source": ٣}',
        '"\\ud80"',
    ],
)
def test_malformed_json(api: httpx2.Client, body: str) -> None:
    """A body with a syntax error is a 400 with the position."""
    answer = post(api, body.encode())
    assert answer.status_code == 400
    detail = r"The body is not well-formed JSON \(line \d+, column \d+\)"
    assert re.fullmatch(detail, answer.json()["detail"])


def test_the_place_of_an_error(api: httpx2.Client) -> None:
    """Line and column are counted from 1, in characters."""
    answer = post(api, '{"source":\n "ё" 1}'.encode())
    assert answer.json()["detail"] == "The body is not well-formed JSON (line 2, column 6)"


@pytest.mark.parametrize(
    ("body", "faults"),
    [
        ("[]", {"body": "must be a JSON object"}),
        ("null", {"body": "must be a JSON object"}),
        ('"text"', {"body": "must be a JSON object"}),
        ("9" * 5000, {"body": "must be a JSON object"}),
        ("{}", {"incident_message": "is required", "source": "is required"}),
        (
            '{"incident_message": ' + "9" * 5000 + ', "source": 1e999}',
            {
                "incident_message": "must be a string",
                "source": "must be one of: operator, monitoring, partner",
            },
        ),
        (
            '{"incident_message": "long enough", "source": "operator", "source": "partner"}',
            {"source": "must be given only once"},
        ),
        (
            f'{{{VALID}, "details": {{"a": [{{"b": 1, "c": 2, "b": 3}}]}}}}',
            {"details": "must have each name in an object only once"},
        ),
        (
            f'{{{VALID}, "details": {{"a": [12345678901234567890123]}}}}',
            {
                "details.a[0]": "must be an integer from -9223372036854775808 to "
                "9223372036854775807, or one that a double holds exactly"
            },
        ),
        (
            '{"source": "x", "source": "y", "x": 1, "x": 2, "incident_type": null}',
            {
                "source": "must be given only once",
                "incident_message": "is required",
                "incident_type": "must be one of: new, completed, failed",
                "x": "is not a known field",
            },
        ),
        (
            '{"incident_message": "lone \\ud800", "source": "partner", "\\udfff": 1}',
            {
                "incident_message": "must not contain a lone surrogate",
                "?": "is not a known field",
            },
        ),
        (
            '{"incident_message": "with \\u0000", "source": ["partner"]}',
            {
                "incident_message": "must not contain a NUL character",
                "source": "must be one of: operator, monitoring, partner",
            },
        ),
        (
            '{"incident_message": " \\uff34\\uff25\\uff33\\uff34 ", "source": "Partner"}',
            {
                "incident_message": "must not be one of: none, null, test",
                "source": "must be one of: operator, monitoring, partner",
            },
        ),
    ],
)
def test_json_that_is_not_an_incident(
    api: httpx2.Client, body: str, faults: dict[str, str]
) -> None:
    """JSON that breaks rules is a 422 that names every faulty field once."""
    answer = post(api, body.encode())
    assert answer.status_code == 422
    assert {error["field"]: error["reason"] for error in answer.json()["errors"]} == faults
    assert len(answer.json()["errors"]) == len(faults)
    assert answer.json()["detail"].startswith(next(iter(faults)))


def test_names_of_unknown_fields_are_cut(api: httpx2.Client) -> None:
    """With many unknown fields in a body, the faults of the known fields are all reported."""
    body = {f"{number}{'x' * 100}": number for number in range(300)} | {"source": "nobody"}
    answer = post(api, json.dumps(body).encode())
    assert answer.status_code == 422
    errors = answer.json()["errors"]
    assert [error["field"] for error in errors[:2]] == ["incident_message", "source"]
    assert errors[-1] == {"field": "body", "reason": "has 290 further unknown fields"}
    assert len(answer.content) < 4096


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/json+ld",
        "application/problem+json",
        "application/jsonx",
        "application/json, application/json",
        "application/json; charset=latin-1",
        "application/json; charset = utf-16",
        'application/json; q=1; CHARSET="ascii"',
        "\xff",
    ],
)
def test_a_content_type_other_than_json(api: httpx2.Client, content_type: str) -> None:
    """A body that is not declared as JSON in UTF-8 is a 415."""
    answer = api.post(
        "/incident/create", content=BODY, headers={b"Content-Type": content_type.encode("latin-1")}
    )
    assert answer.status_code == 415
    assert "application/json" in answer.json()["detail"] or "utf-8" in answer.json()["detail"]


def test_no_content_type_and_two(api: httpx2.Client) -> None:
    """A body without a Content-Type, or with two of them, is a 415."""
    twice = [("Content-Type", "application/json")] * 2
    for headers in ([], twice):
        answer = api.post("/incident/create", content=BODY, headers=headers)
        assert answer.status_code == 415


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip", "", "x"])
def test_a_compressed_body(api: httpx2.Client, encoding: str) -> None:
    """A Content-Encoding other than identity is a 415 that names the accepted one."""
    answer = post(api, BODY, Content_Encoding=encoding)
    assert answer.status_code == 415
    assert answer.headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "application/json; charset=utf-8"},
        {"Content-Type": 'Application/JSON;charset="UTF-8"; version=1'},
        {"Content-Type": "application/json", "Content-Encoding": "Identity"},
    ],
)
def test_harmless_parameters_of_the_content_type(
    api: httpx2.Client, headers: dict[str, str]
) -> None:
    """UTF-8 may be declared, and meaningless parameters are ignored."""
    answer = api.post("/incident/create", content=b"{}", headers=headers)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["reason"] == "is required"


BODYLESS = [
    ("GET", "/incident/get"),
    ("HEAD", "/incident/get"),
    ("GET", "/incident/get/1"),
    ("GET", "/health/live"),
    ("GET", "/openapi.json"),
    ("GET", "/docs/start.js"),
]


@pytest.mark.parametrize(("method", "path"), BODYLESS)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_where_there_is_none(
    api: httpx2.Client, method: str, path: str, *, chunked: bool
) -> None:
    """A body that an operation does not take is refused."""
    answer = api.request(method, path, content=iter([BODY]) if chunked else BODY)
    assert answer.status_code == 400
    if method != "HEAD":
        assert answer.json()["detail"] == "This operation takes no body"


@pytest.mark.parametrize(("method", "path"), BODYLESS)
@pytest.mark.parametrize("length", ["0", "00"])
def test_an_empty_body_where_there_is_none(
    api: httpx2.Client, method: str, path: str, length: str
) -> None:
    """A body with a length of 0 counts as no body."""
    answer = api.request(method, path, headers={"Content-Length": length})
    assert answer.status_code in {200, 404}


def test_a_body_of_the_limit_is_read(api: httpx2.Client) -> None:
    """A body of the maximum size is read; one more byte is a 413."""
    padded = b"{}" + b" " * (MAX_BODY - 2)
    assert post(api, padded).status_code == 422
    answer = post(api, padded + b" ")
    assert answer.status_code == 413
    assert answer.json()["detail"] == "The body must be at most 65536 bytes"


def test_a_client_that_goes_away(serve: Serve, records: Records) -> None:
    """A connection that ends within a body leaves a record, and no error in the log."""
    api = serve(create_app(IncidentClient.open(MEMORY)))
    address = (api.base_url.host, api.base_url.port)
    with socket.create_connection(address) as connection:
        connection.sendall(
            b"POST /incident/create HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
    while not (record := records.next()).getMessage().startswith("POST"):
        pass
    assert re.fullmatch(r"POST /incident/create 400 \d+\.\d ms", record.getMessage())
    assert api.get("/incident/get").json() == []
    assert {record.levelname for record in records.seen} == {"INFO"}


@pytest.mark.parametrize("query", ["%ff", "status=%ED%A0%80", "page=1&%c3=1", "a=%F0%9F"])
def test_a_query_that_is_not_utf_8(api: httpx2.Client, query: str) -> None:
    """Percent-encoded bytes that are not UTF-8 are a 400, in any parameter."""
    answer = api.get(f"/incident/get?{query}")
    assert answer.status_code == 400
    assert answer.json()["detail"] == "The query is not percent-encoded UTF-8"


class AlwaysStore(Store):
    """A store without a database: every id up to 100 has an incident."""

    def __init__(self) -> None:
        super().__init__(
            SqliteDialect(),
            ThreadsExecutor(sqlite_url(MEMORY), StoreOptions()),
            join=join,
            join_sync=join_sync,
        )

    async def open(self) -> None:
        """Do nothing."""

    async def create(self, incident: NewIncident, **_: object) -> Incident:
        """Return the incident as the first."""
        now = datetime.now(UTC)
        return Incident(1, incident.incident_message, incident.incident_type, incident.source, now)

    async def list(self, query: ListQuery) -> Page:
        """Return one incident."""
        status, source = query.status or IncidentStatus.NEW, query.source or IncidentSource.PARTNER
        return Page([Incident(1, "An incident", status, source, datetime.now(UTC))], None)

    async def token(self) -> str | None:
        """Return None: there is no token."""
        return None

    async def get(self, incident_id: int) -> Incident | None:
        """Return an incident, or None for a large id."""
        if incident_id > 100:
            return None
        now, new = datetime.now(UTC), IncidentStatus.NEW
        return Incident(incident_id, "An incident", new, IncidentSource.OPERATOR, now)

    async def update_status(self, change: StatusChange, **_: object) -> Incident:
        """Return an incident, or raise for a large id."""
        incident = await self.get(change.incident_id)
        if incident is None:
            raise IncidentNotFound(change.incident_id)
        return evolve(incident, incident_type=change.status)


@pytest.fixture(scope="module")
def app() -> Iterator[Starlette]:
    """The service without a database, connected on an event loop for all calls."""
    client = IncidentClient(AlwaysStore())
    app = create_app(client)
    with asyncio.Runner() as runner:
        runner.run(client.connect())
        app.state.runner = runner
        yield app


def call(
    app: Starlette,
    method: str,
    path: str,
    query: bytes = b"",
    *,
    chunks: Iterable[bytes] = (),
    headers: Iterable[tuple[bytes, bytes]] = (),
) -> tuple[int, Any]:
    """Call the app without a server, and return the status and the JSON of its answer."""
    pieces = iter(chunks)
    sent: list[Any] = []

    async def receive() -> Any:
        chunk = next(pieces, None)
        return {"type": "http.request", "body": chunk or b"", "more_body": chunk is not None}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": query,
        "headers": [(b"content-type", b"application/json"), *headers],
    }
    app.state.runner.run(app(scope, receive, send))
    start, body = sent
    value = json.loads(body["body"])
    if start["status"] >= 400:
        assert (b"content-type", b"application/problem+json") in list(start["headers"])
        validate(value, {"$ref": "#/components/schemas/Problem"})
        assert (start["status"] == 422) == bool(value["errors"])
    return start["status"], value


@pytest.mark.parametrize("length", [b"2", b"100000", b"x"])
def test_a_body_without_end(app: Starlette, length: bytes) -> None:
    """The size of a body is counted as it arrives, whatever its declared length."""
    endless = repeat(b" " * 1000)
    headers = [(b"content-length", length)]
    status, problem = call(app, "POST", "/incident/create", chunks=endless, headers=headers)
    assert status == 413
    assert problem["detail"] == "The body must be at most 65536 bytes"


@given(chunks=st.lists(st.binary(max_size=100), max_size=4))
def test_any_bytes_as_a_body(app: Starlette, chunks: list[bytes]) -> None:
    """Random bytes as a body are a client's fault."""
    status, _ = call(app, "POST", "/incident/create", chunks=chunks)
    assert status in (400, 422)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda values: (
        st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=8), values, max_size=3)
    ),
    max_leaves=8,
)
surrogates = st.text(st.characters(categories=["Cs", "Cc", "L"]), max_size=8)


@settings(max_examples=50)
@given(
    value=json_values
    | st.fixed_dictionaries(
        {},
        optional={
            "incident_message": json_values | surrogates,
            "incident_type": json_values | st.sampled_from(["new", "failed"]),
            "source": json_values | st.sampled_from(["operator", "partner"]),
            "x": json_values,
        },
    )
    | st.dictionaries(surrogates, json_values)
)
def test_any_json_as_a_body(app: Starlette, value: Any) -> None:
    """Any JSON as a body is an incident or a client's fault."""
    body = json.dumps(value).encode()
    status, _ = call(app, "POST", "/incident/create", chunks=[body])
    assert status in (201, 400, 422)


@given(
    message=stripped_messages(),
    left=padding,
    right=padding,
    source=st.sampled_from(IncidentSource),
    escaped=st.booleans(),
)
def test_any_incident_is_taken(
    app: Starlette, *, message: str, left: str, right: str, source: str, escaped: bool
) -> None:
    """A valid incident is created, with its message stripped and otherwise unchanged."""
    value = {"incident_message": left + message + right, "source": source}
    body = json.dumps(value, ensure_ascii=escaped).encode()
    status, incident = call(app, "POST", "/incident/create", chunks=[body[:20], body[20:]])
    assert status == 201
    assert incident["incident_message"] == message


names = st.sampled_from(["page", "limit", "status", "source", "incident_id", "x", ""])
values = st.sampled_from(["1", "0", "", "new", "failed", "partner", "%00", "%ff"]) | st.text(
    max_size=6
)
queries = st.binary(max_size=40) | st.lists(st.tuples(names, values), max_size=5).map(
    lambda pairs: "&".join("=".join(pair) for pair in pairs).encode()
)


@given(
    operation=st.sampled_from(
        [
            ("GET", "/incident/get"),
            ("GET", "/incident/get/1"),
            ("PATCH", "/incident/update-status"),
            ("GET", "/health/live"),
            ("GET", "/openapi.json"),
        ]
    ),
    query=queries,
)
def test_any_query(app: Starlette, operation: tuple[str, str], query: bytes) -> None:
    """Any query is valid or a client's fault."""
    status, _ = call(app, *operation, query)
    assert status in (200, 400, 404, 422)


@given(text=st.text(min_size=1).filter(lambda text: "/" not in text) | st.integers().map(str))
@example("1")
@example("٣")
@example("1\n")
@example("\ud800")
def test_any_id(app: Starlette, text: str) -> None:
    """An id is ASCII digits that make an integer from 1 to 2^63-1, and nothing else."""
    status, _ = call(app, "GET", f"/incident/get/{text}")
    valid = re.fullmatch("[0-9]{1,19}", text) and 1 <= int(text) <= MAX_ID
    assert status == ((200 if int(text) <= 100 else 404) if valid else 422)


@given(text=st.text("0123456789+-_. ٣e", max_size=5))
def test_any_limit(app: Starlette, text: str) -> None:
    """A limit is ASCII digits that make an integer from 1 to 1000, and nothing else."""
    query = httpx2.QueryParams({"limit": text})
    status, _ = call(app, "GET", "/incident/get", str(query).encode())
    valid = re.fullmatch("[0-9]+", text) and 1 <= int(text) <= MAX_LIMIT
    assert status == (200 if valid else 422)

"""Every error is a problem that helps the client and reveals nothing of the inside."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import pytest

from incidentkit import (
    ClientClosed,
    DuplicateOpenIncident,
    FieldError,
    IllegalTransition,
    Incident,
    IncidentClient,
    IncidentConflict,
    IncidentKitError,
    IncidentSource,
    IncidentStatus,
    InvalidIncident,
    InvalidSettings,
    MissingDependency,
    NotInTransaction,
    PartlyStored,
    SchemaOutOfDate,
    StoreError,
    StoreUnavailable,
    UnknownCursor,
    VersionConflict,
    http,
)
from incidentkit.http import create_app
from incidentkit.http.problems import TITLES
from incidentkit.wire.kinds import Kind
from tests.http.conftest import INCIDENT, MEMORY, Records, Serve, validate

DISK = Incident(
    7,
    "Disk is full",
    IncidentStatus.COMPLETED,
    IncidentSource.MONITORING,
    datetime(2026, 3, 1, 9, 30, tzinfo=UTC),
)

SECRET = "postgresql://user:password@db/SELECT"  # the text of an error that must stay inside


def failing_client(error: Exception) -> IncidentClient:
    """Return a client that opens, and then raises the error on every call."""
    client = IncidentClient.open(MEMORY)

    async def fail(*_: object, **__: object) -> None:
        raise error

    for name in ("check", "create", "list", "get", "update_status"):
        setattr(client.store, name, fail)
    return client


def every_operation(api: httpx2.Client) -> list[httpx2.Response]:
    """Return the answers of the four routes."""
    return [
        api.post("/incident/create", json=INCIDENT),
        api.get("/incident/get"),
        api.get("/incident/get/1"),
        api.patch("/incident/update-status?incident_id=1&status=new"),
    ]


@pytest.mark.parametrize(
    "error",
    [
        StoreUnavailable(SECRET),
        StoreUnavailable("it is away", place=SECRET, sqlstate="57P03"),
        StoreUnavailable("its disk is full", place=SECRET, sqlstate=SECRET, retryable=False),
        SchemaOutOfDate("dadc1db062ae", "9b3f6d20c7e8", SECRET),
        SchemaOutOfDate(None, "9b3f6d20c7e8", place=SECRET),
    ],
)
def test_a_database_that_is_away(serve: Serve, records: Records, error: Exception) -> None:
    """While the database is unusable, each route answers 503 with Retry-After."""
    api = serve(create_app(failing_client(error)))
    for answer in every_operation(api):
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) > 0
        assert "database" in answer.json()["detail"]
        assert answer.json()["request_id"] == answer.headers["X-Request-ID"]
        assert SECRET not in answer.text
    warnings = [record for record in records.seen if record.levelname == "WARNING"]
    assert [record.getMessage() for record in warnings] == [str(error)] * 4


async def test_a_client_that_is_not_open(records: Records) -> None:
    """On a closed client each route answers 503, and nothing is logged as an error."""
    app = create_app(IncidentClient.open(MEMORY))
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://service") as api:
        answers = [
            await api.post("/incident/create", json=INCIDENT),
            await api.get("/incident/get"),
            await api.get("/incident/get/1"),
            await api.patch("/incident/update-status?incident_id=1&status=new"),
        ]
    for answer in answers:
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) > 0
        assert answer.json()["detail"].startswith("The service is not open")
    levels = {record.levelname for record in records.seen}
    assert levels == {"WARNING", "INFO"}
    assert str(ClientClosed()) in {record.getMessage() for record in records.seen}


@pytest.mark.parametrize(
    "error",
    [
        StoreError(SECRET),
        StoreError("it failed", place=SECRET, sqlstate=SECRET),
        RuntimeError(SECRET),
        RecursionError(SECRET),
    ],
)
def test_an_error_of_the_server(serve: Serve, records: Records, error: Exception) -> None:
    """An unexpected error is a 500 without its text, which is logged once."""
    api = serve(create_app(failing_client(error)))
    answers = every_operation(api)
    logged = [record for record in records.seen if record.levelname == "ERROR"]
    for answer, record in zip(answers, logged, strict=True):
        assert answer.status_code == 500
        assert answer.json()["detail"] == "The server failed to answer the request"
        assert answer.json()["errors"] == []
        assert SECRET not in answer.text
        assert record.exc_info
        assert record.exc_info[1] is error
        assert vars(record)["request_id"] == answer.headers["X-Request-ID"]


def test_every_error_has_one_code() -> None:
    """Each class of error has a code of its own, and each code an error or a refusal."""
    classes = [IncidentKitError]
    for class_ in classes:
        classes += class_.__subclasses__()
    ours = {class_ for class_ in classes if class_.__module__.startswith("incidentkit.")}
    assert {kind.error for kind in Kind if kind.error is not None} == ours
    folder = Path(http.__file__).parent
    sources = [path.read_text() for path in (*folder.glob("*.py"), *folder.glob("../cli/*.py"))]
    used = {name for source in sources for name in re.findall(r"\(\s*Kind\.([A-Z_]+)", source)}
    refusals = {kind.name for kind in Kind if kind.error is None}
    assert used & refusals == refusals
    codes = [kind.code for kind in Kind]
    assert all(re.fullmatch("[a-z]+(_[a-z]+)*", code) for code in codes)
    assert {kind.status for kind in Kind} == {*TITLES}


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind.error is not None])
def test_a_problem_has_the_kind_of_its_error(serve: Serve, kind: Kind) -> None:
    """Whatever error a call raises, its answer has the code, the type and the status of it."""
    arguments: dict[Any, tuple[Any, ...]] = {
        InvalidIncident: ([FieldError("source", "is wrong")],),
        IllegalTransition: (DISK, IncidentStatus.NEW),
        SchemaOutOfDate: (None, "9b3f6d20c7e8"),
        PartlyStored: ([DISK], 2, "why"),
        InvalidSettings: ("name", "is wrong"),
        MissingDependency: ("redis", "redis"),
        UnknownCursor: (),
        NotInTransaction: (),
        ClientClosed: (),
        IncidentConflict: (DISK,),
        VersionConflict: (DISK,),
        DuplicateOpenIncident: (DISK,),
    }
    assert kind.error is not None
    error = kind.error(*arguments.get(kind.error, ("7",)))
    answer = serve(create_app(failing_client(error)), checked=False).get("/incident/get")
    assert answer.status_code == kind.status
    problem = answer.json()
    assert problem["code"] == kind.code
    assert problem["type"] == f"/docs/problems#{kind.anchor}"
    assert problem["title"] == kind.title
    validate(problem, {"$ref": "#/components/schemas/Problem"})


@pytest.mark.parametrize("root_path", ["", "/on/a path"])
def test_a_type_leads_to_the_page_of_its_kind(serve: Serve, root_path: str) -> None:
    """The type of a problem can be opened, and the page describes the kind at its anchor."""
    api = serve(create_app(IncidentClient.open(MEMORY)), checked=False, root_path=root_path)
    type_ = api.get("/incident/get/1").json()["type"]
    assert type_.startswith(quote(root_path))
    # As a proxy that strips the path does.
    page = api.get(type_.removeprefix(quote(root_path)))
    assert page.headers["content-type"].startswith("text/html")
    _, anchor = type_.split("#")
    assert f'<dt id="{anchor}"><code>incident_not_found</code>, status 404</dt>' in page.text
    for kind in Kind:
        assert f'id="{kind.anchor}"' in page.text


@pytest.mark.parametrize(
    ("method", "path", "body", "code"),
    [
        ("GET", "/nowhere", None, "unknown_path"),
        ("GET", "/incident/get/1", None, "incident_not_found"),
        ("DELETE", "/incident/get", None, "method_not_allowed"),
        ("GET", "/incident/get?%ff", None, "malformed_query"),
        ("GET", "/incident/get?x", None, "invalid_incident"),
        ("GET", "/incident/get", b"x", "unexpected_body"),
        ("POST", "/incident/create", b"{", "malformed_body"),
    ],
)
def test_problems_of_one_status_are_told_apart(
    api: httpx2.Client, method: str, path: str, body: bytes | None, code: str
) -> None:
    """A client can tell a missing incident from a wrong URL, and the like, by the code."""
    headers = {"Content-Type": "application/json"}
    answer = api.request(method, path, content=body, headers=headers)
    assert answer.json()["code"] == code


@pytest.mark.parametrize("given", ["a", "A.b_c-9", "x" * 64])
def test_a_request_id_is_kept(api: httpx2.Client, given: str) -> None:
    """A client's id comes back in the answer, and in a problem."""
    for path in ("/incident/get", "/incident/get/1", "/nowhere", "/docs"):
        answer = api.get(path, headers={"X-Request-ID": given})
        assert answer.headers.get_list("X-Request-ID") == [given]
        if answer.is_error:
            assert answer.json()["request_id"] == given


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "ä", "a\tb", "<b>", "a,b", "a\x85"])
def test_a_strange_request_id_is_replaced(api: httpx2.Client, given: str) -> None:
    """An id that could do harm in a log is replaced by a new one."""
    ids = set()
    for _ in range(2):
        answer = api.get("/incident/get/1", headers={b"X-Request-ID": given.encode("latin-1")})
        assert answer.json()["request_id"] == answer.headers["X-Request-ID"]
        ids.add(answer.headers["X-Request-ID"])
    assert len(ids) == 2
    assert all(len(id_) == 32 and int(id_, 16) for id_ in ids)


def test_no_problem_repeats_a_value(api: httpx2.Client) -> None:
    """A problem never repeats a value of the request."""
    value = "hunter2"
    body = dict.fromkeys(["source", "incident_type", "x"], value)
    answers = [
        api.post("/incident/create", json=body | {"incident_message": f"{value}\x00"}),
        api.post("/incident/create", content=value, headers={"Content-Type": "application/json"}),
        api.post("/incident/create", content=value, headers={"Content-Type": value}),
        api.get(
            f"/incident/get?page={value}&limit={value}&status={value}&source={value}&x={value}"
        ),
        api.get(f"/incident/get/{value}"),
        api.patch(f"/incident/update-status?incident_id={value}&status={value}"),
        api.get(f"/{value}"),
    ]
    for answer in answers:
        assert answer.is_client_error
        assert value not in answer.text

"""The four routes of the contract, as a client uses them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

from incidentkit import IncidentClient, IncidentStatus
from incidentkit.domain.values import MAX_ID
from incidentkit.http import create_app
from tests.http.conftest import INCIDENT, MEMORY, Serve

if TYPE_CHECKING:
    import httpx2


def test_an_incident_from_its_creation_to_its_end(
    serve: Serve, urls: tuple[str, str | None]
) -> None:
    """A created incident is found by its Location, listed, changed, and listed as changed."""
    api = serve(create_app(IncidentClient.open(*urls)))
    details = {"volume": "/var", "used": 0.98}
    created = api.post("/incident/create", json=INCIDENT | {"details": details})
    assert created.status_code == 201
    incident = created.json()
    assert incident == INCIDENT | {
        "incident_id": incident["incident_id"],
        "incident_type": "new",
        "created_at": incident["created_at"],
        "version": 1,
        "dedup_key": None,
        "occurrences": 1,
        "last_seen_at": incident["created_at"],
        "ended_at": None,
        "details": details,
    }
    assert created.headers["Location"] == f"/incident/get/{incident['incident_id']}"
    assert api.get(created.headers["Location"]).json() == incident
    # A list has no member "details".
    listed = {name: value for name, value in incident.items() if name != "details"}
    assert api.get("/incident/get").json() == [listed]
    assert api.get("/incident/get").json() == [listed]
    changed = api.patch(
        "/incident/update-status",
        params={"incident_id": incident["incident_id"], "status": "completed"},
    )
    assert changed.status_code == 200
    assert changed.json() == incident | {
        "incident_type": "completed",
        "version": 2,
        "ended_at": changed.json()["ended_at"],
    }
    assert changed.json()["ended_at"] >= incident["created_at"]
    listed = changed.json()
    assert listed.pop("details") == details
    assert api.get("/incident/get").json() == [listed]


def test_pages_are_newest_first_and_filtered(serve: Serve, urls: tuple[str, str | None]) -> None:
    """Pages follow each other, newest first, and hold only incidents that match the filters."""
    api = serve(create_app(IncidentClient.open(*urls)))
    sources = ["operator", "monitoring", "partner", "partner"]
    ids = [
        api.post(
            "/incident/create",
            json={"incident_message": "Line is down", "source": source, "incident_type": type_},
        ).json()["incident_id"]
        for source in sources
        for type_ in IncidentStatus
    ]

    def listed(**params: Any) -> list[int]:
        answer = api.get("/incident/get", params=params)
        assert answer.status_code == 200
        return [incident["incident_id"] for incident in answer.json()]

    newest = ids[::-1]
    assert listed() == newest[:10]
    assert listed(page=2) == newest[10:]
    assert listed(page=3, limit=5) == newest[10:15]
    assert listed(page=MAX_ID // 1000, limit=1000) == []
    assert listed(status="", source="") == newest[:10]
    assert listed(status="failed") == newest[::3]
    assert listed(status="", source="partner") == newest[:6]
    assert listed(status="new", source="partner") == [newest[2], newest[5]]


def test_the_body_may_choose_the_status(serve: Serve) -> None:
    """An incident starts with the status that the body names."""
    api = serve(create_app(IncidentClient.open(MEMORY)))
    answer = api.post("/incident/create", json=INCIDENT | {"incident_type": "failed"})
    assert answer.status_code == 201
    assert answer.json()["incident_type"] == "failed"


def test_a_message_keeps_its_characters(serve: Serve) -> None:
    """White space around a message is removed; the rest comes back unchanged, in UTF-8."""
    api = serve(create_app(IncidentClient.open(MEMORY)))
    message = "Диск \u0007 переполнен 🔥 on \u202edb"
    answer = api.post("/incident/create", json=INCIDENT | {"incident_message": f" {message}\n"})
    assert answer.json()["incident_message"] == message
    assert message.encode().replace(b"\x07", b"\\u0007") in answer.content


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/incident/get/1"),
        ("GET", f"/incident/get/{MAX_ID}"),
        ("PATCH", "/incident/update-status?incident_id=1&status=new"),
    ],
)
def test_a_missing_incident(api: httpx2.Client, method: str, path: str) -> None:
    """A missing incident is a 404 with exactly the contract's text."""
    answer = api.request(method, path)
    assert answer.status_code == 404
    assert answer.json()["detail"] == "Incident not found"
    assert answer.json()["errors"] == []


@pytest.mark.parametrize(
    "text",
    ["0", "-1", str(2**63), "9" * 5000, "1_000", "٣", "+5", " 5", "5 ", "1.0", "0x1", "a", "1\n"],
)
def test_an_invalid_id(api: httpx2.Client, text: str) -> None:
    """An id out of range, or with anything but ASCII digits, is a 422 that names the field."""
    by_path = api.get(f"/incident/get/{quote(text, safe='')}")
    by_query = api.patch(
        "/incident/update-status", params={"incident_id": text, "status": "failed"}
    )
    for answer in (by_path, by_query):
        assert answer.status_code == 422
        assert answer.json()["errors"] == [
            {"field": "incident_id", "reason": f"must be an integer from 1 to {MAX_ID}"}
        ]


@pytest.mark.parametrize(
    ("query", "faults"),
    [
        ("page=", {"page": "must be an integer from 1 to 9223372036854775807"}),
        ("limit=", {"limit": "must be an integer from 1 to 1000"}),
        ("limit=1001", {"limit": "must be an integer from 1 to 1000"}),
        ("page=0", {"page": "must be an integer from 1 to 9223372036854775807"}),
        ("status=NEW", {"status": "must be one of: new, completed, failed"}),
        ("status=%00", {"status": "must be one of: new, completed, failed"}),
        ("source=any", {"source": "must be one of: operator, monitoring, partner"}),
        ("page=1&page=1", {"page": "must be given only once"}),
        ("status=&status=", {"status": "must be given only once"}),
        ("Page=1", {"Page": "is not a known parameter"}),
        ("=", {"": "is not a known parameter"}),
        (f"page={MAX_ID}&limit=2", {"page": f"times limit must be at most {MAX_ID}"}),
        (
            "page=٣&limit=+5&status=x&source=y&offset=1&status_=new",
            {
                "page": "must be an integer from 1 to 9223372036854775807",
                "limit": "must be an integer from 1 to 1000",
                "status": "must be one of: new, completed, failed",
                "source": "must be one of: operator, monitoring, partner",
                "offset": "is not a known parameter",
                "status_": "is not a known parameter",
            },
        ),
    ],
)
def test_a_faulty_query_names_every_fault(
    api: httpx2.Client, query: str, faults: dict[str, str]
) -> None:
    """Each faulty, repeated or unknown parameter of a list is named with its reason."""
    answer = api.get(f"/incident/get?{query}")
    assert answer.status_code == 422
    assert {error["field"]: error["reason"] for error in answer.json()["errors"]} == faults
    assert len(answer.json()["errors"]) == len(faults)


def test_a_status_change_names_every_fault(api: httpx2.Client) -> None:
    """Missing and faulty parameters are reported together."""
    answer = api.patch("/incident/update-status?status=&x=1")
    assert answer.status_code == 422
    assert answer.json()["errors"] == [
        {"field": "incident_id", "reason": "is required"},
        {"field": "status", "reason": "must be one of: new, completed, failed"},
        {"field": "x", "reason": "is not a known parameter"},
    ]


@pytest.mark.parametrize(
    "path", ["/incident/create", "/health/live", "/health/ready", "/openapi.json", "/docs"]
)
def test_no_route_ignores_a_parameter(api: httpx2.Client, path: str) -> None:
    """An unknown parameter is refused, never ignored."""
    method = "POST" if path == "/incident/create" else "GET"
    body = INCIDENT if method == "POST" else None
    answer = api.request(method, f"{path}?x=1", json=body)
    assert answer.status_code == 422
    assert answer.json()["errors"] == [{"field": "x", "reason": "is not a known parameter"}]
    assert api.get("/incident/get").json() == []


def test_faults_of_query_and_body_are_reported_together(api: httpx2.Client) -> None:
    """A create with a faulty query and a faulty body is answered with the faults of both."""
    answer = api.post(
        "/incident/create?dry_run=1", json={"incident_message": "TEST", "severity": 1}
    )
    assert answer.status_code == 422
    assert {error["field"] for error in answer.json()["errors"]} == {
        "dry_run",
        "incident_message",
        "severity",
        "source",
    }


def test_names_of_unknown_parameters_are_cut(api: httpx2.Client) -> None:
    """With many long unknown names, an answer repeats only the beginning of a few."""
    answer = api.get("/incident/get?limit=0&" + "&".join(f"{n}{'x' * 200}=1" for n in range(200)))
    assert answer.status_code == 422
    first, *unknown, last = answer.json()["errors"]
    assert first["field"] == "limit"
    assert [error["field"] for error in unknown] == [f"{n}{'x' * 63}" for n in range(10)]
    assert last == {"field": "query", "reason": "has 190 further unknown parameters"}


@pytest.mark.parametrize("path", ["/incident/get", "/health/live", "/docs", "/openapi.json"])
def test_head_is_get_without_the_body(api: httpx2.Client, path: str) -> None:
    """HEAD is answered with the headers of GET."""
    get, head = api.get(path), api.head(path)
    assert head.status_code == get.status_code == 200
    assert head.content == b""
    for name in ("Content-Length", "Content-Type"):
        assert head.headers[name] == get.headers[name]


@pytest.mark.parametrize(
    "path", ["/incident", "/incident/get/", "/incident/create/", "/docs/", "/incident/get/1/2"]
)
def test_an_unknown_path(api: httpx2.Client, path: str) -> None:
    """An unknown path, even by one slash, is a 404 problem and not a redirect."""
    answer = api.get(path)
    assert answer.status_code == 404
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["detail"] == "There is nothing at this path"
    assert answer.json()["request_id"] == answer.headers["X-Request-ID"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/incident/get", "GET, HEAD"),
        ("GET", "/incident/create", "POST"),
        ("OPTIONS", "/incident/update-status", "PATCH"),
        ("DELETE", "/incident/get/1", "GET, HEAD"),
    ],
)
def test_a_wrong_method(api: httpx2.Client, method: str, path: str, allowed: str) -> None:
    """A method that a path does not accept is a 405 problem with those that it accepts."""
    answer = api.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["Allow"] == allowed
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["title"] == "Method not allowed"
    assert answer.json()["detail"] == f"This path accepts only {allowed}"

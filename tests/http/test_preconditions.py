"""Entity tags by RFC 9110, as clients and the servers in between send them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from incidentkit import IncidentClient
from incidentkit.http import create_app
from tests.http.conftest import INCIDENT, Serve

if TYPE_CHECKING:
    import httpx2

UNKNOWN = '"0-aaaaaaaaaaaa"'


@pytest.fixture
def service(serve: Serve, urls: tuple[str, str | None]) -> httpx2.Client:
    """The service on each database, with one incident."""
    api = serve(create_app(IncidentClient.open(*urls)))
    api.post("/incident/create", json=INCIDENT)
    return api


def update(api: httpx2.Client, status: str, **headers: str) -> httpx2.Response:
    """Change the status of the first incident."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    path = f"/incident/update-status?incident_id=1&status={status}"
    return api.patch(path, headers=names)


def note(api: httpx2.Client, **headers: str) -> httpx2.Response:
    """Add a note to the first incident."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return api.post("/incident/note/1", json={"note": "It is hot"}, headers=names)


def test_a_tag_that_an_intermediary_has_changed_still_fits(service: httpx2.Client) -> None:
    """A tag matches as nginx weakens it and as Apache marks it, in a list and with blanks."""
    tag = service.get("/incident/get/1").headers["ETag"]
    opaque = tag.strip('"')
    for given in (
        tag,
        f"W/{tag}",
        f'"{opaque}-gzip"',
        f'W/"{opaque}--br"',
        f"{UNKNOWN}, {tag}",
        f'"a,b" ,W/{tag},',
        '"1"',
        'W/"1"',
        "*",
    ):
        assert note(service, If_Match=given).status_code == 201, given
        answer = service.get("/incident/get/1", headers={"If-None-Match": given})
        assert (answer.status_code, answer.content) == (304, b""), given
        assert answer.headers["ETag"] == tag
    lines = [("If-Match", UNKNOWN), ("If-Match", f"W/{tag}")]
    assert service.get("/incident/get/1", headers=lines).status_code == 200


@pytest.mark.parametrize(
    "tags",
    ['"a"', '""', '"0"', '"2"', '"-1"', '"1W/"', '"1-"', '"1-5F1C9A0E77D2"', f'W/"x",{UNKNOWN}'],
)
def test_a_tag_of_another_state_refuses_a_write(service: httpx2.Client, tags: str) -> None:
    """A tag that the incident does not have is a 412 with the incident, and nothing changes."""
    present = service.get("/incident/get/1")
    for refused in (
        update(service, "failed", If_Match=tags),
        note(service, If_Match=tags),
        service.get("/incident/get/1", headers={"If-Match": tags}),
    ):
        assert refused.status_code == 412
        assert refused.json()["code"] == "version_conflict"
        assert refused.json()["incident"] == present.json()
        assert refused.headers["ETag"] == present.headers["ETag"]
    unchanged = service.get("/incident/get/1", headers={"If-None-Match": tags})
    assert unchanged.json() == present.json()
    assert len(service.get("/incident/history/1").json()) == 1


def test_a_write_may_require_another_state(service: httpx2.Client) -> None:
    """If-None-Match refuses a write while the incident has one of the tags."""
    first = service.get("/incident/get/1").headers["ETag"]
    for tags in (first, f"{UNKNOWN}, W/{first}", '"1"', "*"):
        assert update(service, "failed", If_None_Match=tags).status_code == 412
        assert note(service, If_None_Match=tags).status_code == 412
    changed = update(service, "failed", If_None_Match=UNKNOWN)
    assert changed.status_code == 200
    second = changed.headers["ETag"]
    assert update(service, "new", If_Match=second, If_None_Match=second).status_code == 412
    assert update(service, "new", If_Match=second, If_None_Match=first).status_code == 200
    missing = service.patch(
        "/incident/update-status?incident_id=2&status=new", headers={"If-None-Match": "*"}
    )
    assert missing.status_code == 404


def test_a_retry_gets_its_answer_although_the_tags_have_moved_on(service: httpx2.Client) -> None:
    """With a key, the preconditions of the first attempt are not judged again."""
    tag = service.get("/incident/get/1").headers["ETag"]
    headers = {"Idempotency_Key": "k", "If_Match": f"{tag}, {UNKNOWN}", "If_None_Match": '"2"'}
    first = update(service, "failed", **headers)
    assert first.status_code == 200
    assert "Idempotent-Replayed" not in first.headers
    again = update(service, "failed", **headers)
    assert (again.status_code, again.content) == (200, first.content)
    assert again.headers["Idempotent-Replayed"] == "true"


def test_the_answer_of_a_browser_is_revalidated(service: httpx2.Client) -> None:
    """An incident may be kept by the browser of its reader, and is asked for again each time."""
    answer = service.get("/incident/get/1")
    assert answer.headers["Cache-Control"] == "private, no-cache"
    known = {"If-None-Match": answer.headers["ETag"]}
    assert service.get("/incident/get/1", headers=known).status_code == 304
    assert service.head("/incident/get/1", headers=known).status_code == 304
    update(service, "failed")
    assert service.get("/incident/get/1", headers=known).json()["version"] == 2


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("POST", "/incident/create", ["If-Match"]),
        ("POST", "/incident/create", ["If-None-Match"]),
        ("PATCH", "/incident/update-status?incident_id=1&status=new", ["If-Unmodified-Since"]),
        ("POST", "/incident/note/1", ["If-Unmodified-Since"]),
        ("GET", "/incident/get", ["If-Match"]),
        ("GET", "/incident/search?limit=0", ["limit", "If-Match"]),
        ("GET", "/health/live", ["If-Match"]),
    ],
)
def test_a_guard_that_an_operation_cannot_honor_is_refused(
    service: httpx2.Client, method: str, path: str, headers: list[str]
) -> None:
    """A header that makes a write safe is never ignored: the answer names it."""
    body = {"note": "It is hot"} if "note" in path else INCIDENT if method == "POST" else None
    answer = service.request(method, path, json=body, headers={headers[-1]: "*"})
    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["errors"]] == headers
    assert answer.json()["errors"][-1]["reason"] == "cannot be honored by this operation"
    assert len(service.get("/incident/history/1").json()) == 1


def test_a_guard_is_harmless_where_nothing_is_written(service: httpx2.Client) -> None:
    """A read takes the key that a client adds to each of its requests."""
    headers = {"Idempotency-Key": "k", "If-None-Match": "*", "If-Unmodified-Since": "x"}
    assert service.get("/incident/get", headers=headers).status_code == 200

"""Search over HTTP: filters, pages, and refused queries."""

from __future__ import annotations

import asyncio
import socket
import threading
from itertools import product
from typing import Any

import httpx2
import pytest

from incidentkit import IncidentClient
from incidentkit.domain.cursor import encode_cursor
from incidentkit.http import create_app
from incidentkit.store.records import Records as StoreRecords
from tests.http.conftest import MEMORY, Records, Serve


def fill(api: httpx2.Client) -> None:
    """Create six incidents."""
    kinds = product(("operator", "partner"), ("new", "failed", "new"))
    for number, (source, status) in enumerate(kinds):
        body = {
            "incident_message": f"{'Disk' if number % 2 else 'Line'} {number} is full",
            "source": source,
            "incident_type": status,
        }
        assert api.post("/incident/create", json=body).status_code == 201


def ids(answer: httpx2.Response) -> list[int]:
    """Return the ids of the incidents on a page."""
    assert answer.status_code == 200, answer.text
    return [incident["incident_id"] for incident in answer.json()["incidents"]]


def test_filters_and_words(serve: Serve, urls: tuple[str, str | None]) -> None:
    """Filters work alone and together; of several values for one, any matches."""
    api = serve(create_app(IncidentClient.open(*urls)))
    fill(api)
    search = "/incident/search"
    assert ids(api.get(search)) == [6, 5, 4, 3, 2, 1]
    assert ids(api.get(f"{search}?order=oldest&limit=2")) == [1, 2]
    assert ids(api.get(f"{search}?status=failed")) == [5, 2]
    assert ids(api.get(f"{search}?status=failed&status=new&source=partner")) == [6, 5, 4]
    assert ids(api.get(search, params={"text": "disk FU"})) == [6, 4, 2]
    assert len(ids(api.get(search, params={"created_after": "2020-01-01 00:00:00"}))) == 6
    assert ids(api.get(search, params={"created_before": "2020-01-01T00:00:00+03:00"})) == []
    counted = api.get(search, params={"total": "true", "limit": 1, "status": "new"})
    assert counted.json()["total"] == 4
    assert api.get(search).json()["total"] is None


def test_details_of_a_search_and_of_many(serve: Serve, urls: tuple[str, str | None]) -> None:
    """`details=true` adds the member `details` to incidents that have some."""
    api = serve(create_app(IncidentClient.open(*urls)))
    given = [{"n": 1, "host": "db-1"}, None]
    bodies = [
        {"incident_message": "Disk is full", "source": "partner", "details": details}
        for details in given
    ]
    many = api.post("/incident/create-many", json=bodies)
    assert [incident.get("details") for incident in many.json()] == given
    search = "/incident/search?order=oldest&limit=1"
    page = api.get(f"{search}&details=true")
    assert page.json()["incidents"] == many.json()[:1]
    following = api.get(page.headers["Link"].split(">")[0][1:])
    assert following.json()["incidents"] == many.json()[1:]
    assert "details" not in api.get(search).text
    assert api.get(f"{search}&details=1").status_code == 422


def test_link_leads_through_all_pages(serve: Serve, urls: tuple[str, str | None]) -> None:
    """`Link` and `next` lead to the next page of the same search; the last page has neither."""
    api = serve(create_app(IncidentClient.open(*urls)))
    fill(api)
    params: dict[str, Any] = {"limit": 2, "text": "is", "source": ["operator", "partner"]}
    answer = api.get("/incident/search", params=params)
    found = ids(answer)
    while "Link" in answer.headers:
        target, relation = answer.headers["Link"].split("; ")
        assert relation == 'rel="next"'
        following = api.get(target.strip("<>"))
        assert following.url.params["after"] == answer.json()["next"]
        answer = following
        found += ids(answer)
    assert answer.json()["next"] is None
    assert found == [6, 5, 4, 3, 2, 1]


def test_link_has_the_prefix(serve: Serve) -> None:
    """Behind a proxy under a prefix, the link has the prefix."""
    api = serve(create_app(IncidentClient.open(MEMORY)), checked=False, root_path="/prefix")
    fill(api)
    link = api.get("/incident/search?limit=1").headers["Link"]
    assert link.startswith("</prefix/incident/search?limit=1&after=")
    api.post("/incident/note/1", json={"note": "x"})
    link = api.get("/incident/history/1?limit=1").headers["Link"]
    assert link.startswith("</prefix/incident/history/1?limit=1&after=")


@pytest.mark.parametrize(
    ("query", "fields"),
    [
        ("status=open", ["status"]),
        ("status=", ["status"]),
        ("status=new&status=open&source=me", ["status", "source"]),
        ("created_after=yesterday", ["created_after"]),
        ("created_before=", ["created_before"]),
        ("text=", ["text"]),
        ("text=%2D", ["text"]),
        ("order=best", ["order"]),
        ("limit=0", ["limit"]),
        ("after=AAAA", ["after"]),
        (f"after={encode_cursor(1, 1, 1)}", ["after"]),
        ("total=yes", ["total"]),
        ("order=newest&order=oldest", ["order"]),
        ("page=2", ["page"]),
        ("color=red&limit=x", ["limit", "color"]),
    ],
)
def test_a_faulty_query_is_refused(api: httpx2.Client, query: str, fields: list[Any]) -> None:
    """A filter is never accepted and ignored."""
    answer = api.get(f"/incident/search?{query}")
    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["errors"]] == fields


class Hanging:
    """A call of the store that never ends.

    Attributes:
        begun: Set when it begins.
        cancelled: Set when it is cancelled.
    """

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.cancelled = threading.Event()

    async def __call__(self, *_: object, **__: object) -> None:
        """Wait without end."""
        self.begun.set()
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


EXPENSIVE = ("/incident/search?text=disk", "/incident/get?page=101", "/incident/history/1")


@pytest.fixture(params=EXPENSIVE)
def hanging(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Hanging]:
    """The path of an expensive read, and the call of the store that it waits for."""
    call = Hanging()
    # Not functions, so that the class does not bind them to the store.
    monkeypatch.setattr(StoreRecords, "search", call)
    monkeypatch.setattr(StoreRecords, "list", call)
    monkeypatch.setattr(StoreRecords, "history", call)
    return request.param, call


def test_an_expensive_read_ends_with_its_connection(
    serve: Serve, hanging: tuple[str, Hanging], records: Records
) -> None:
    """A search, a deep page or a history is cancelled as soon as its client disconnects."""
    path, call = hanging
    api = serve(create_app(IncidentClient.open(MEMORY)), checked=False)
    with socket.create_connection((api.base_url.host, api.base_url.port or 0)) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert call.begun.wait(60)
        assert not call.cancelled.is_set()
    assert call.cancelled.wait(60)
    assert api.get("/health/live").status_code == httpx2.codes.OK
    assert not [record for record in records.seen if record.exc_info]

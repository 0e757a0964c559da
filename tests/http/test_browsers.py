"""Requests that a foreign web page makes a browser send."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx2
import pytest

from incidentkit import IncidentClient
from incidentkit.http.browsers import LOOPBACK, BrowserGuard
from tests.http.conftest import INCIDENT, MEMORY, Records, service_on

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

LIST, CREATE = "/incident/get", "/incident/create"


@pytest.fixture(scope="module")
def app() -> Any:
    """A service under two names, of which one may have pages of its own."""
    app = service_on(IncidentClient.open(MEMORY))
    hosts = {*LOOPBACK, "incidents.example.com", "board.example.com:8443"}
    app.add_middleware(BrowserGuard, hosts=hosts, origins=("board.example.com:8443",))
    return app


@pytest.fixture
async def client(app: Any) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the service, whose own database is never reached."""
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
        yield client


@pytest.mark.parametrize(
    ("host", "answered"),
    [
        ("localhost", True),
        ("LOCALHOST:8000", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("[::1]", True),
        ("incidents.example.com", True),
        ("incidents.example.com:443", True),
        ("board.example.com:8443", True),
        ("board.example.com", False),
        ("evil.example", False),
        ("localhost:8000 \t", True),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example:8000", False),
        ("[::2]", False),
        ("", False),
    ],
)
async def test_only_the_hosts_of_the_service_are_answered(
    client: httpx2.AsyncClient, host: str, answered: bool
) -> None:
    """A page whose name leads to the service's address gets 421 from it."""
    response = await client.get("/openapi.json", headers={"Host": host})
    assert response.status_code == (200 if answered else 421)
    if not answered:
        assert response.json()["code"] == "misdirected_request"
        assert response.headers["X-Request-ID"] == response.json()["request_id"]
    # A probe names the address of a container.
    assert (await client.get("/health/live", headers={"Host": host})).status_code == 200


OWN, BOARD = "http://localhost:8000", "https://board.example.com:8443"


@pytest.mark.parametrize(
    ("method", "headers", "answered"),
    [
        ("POST", {}, True),
        ("POST", {"Origin": OWN}, True),
        ("POST", {"Origin": OWN, "Sec-Fetch-Site": "same-origin"}, True),
        ("POST", {"Origin": BOARD}, True),
        (
            "POST",
            {"Origin": "https://board.example.com:8443", "Sec-Fetch-Site": "cross-site"},
            True,
        ),
        ("POST", {"Origin": "http://localhost:3000"}, False),
        ("POST", {"Origin": "http://localhost"}, False),
        ("POST", {"Origin": "https://evil.example"}, False),
        ("POST", {"Origin": "null"}, False),
        ("POST", {"Origin": "http://["}, False),
        ("POST", {"Origin": "http://[::1"}, False),
        ("GET", {"Origin": "http://["}, True),
        ("POST", {"Origin": f"{OWN}\t"}, True),
        ("GET", {"Sec-Fetch-Site": "cross-site "}, False),
        ("POST", {"Sec-Fetch-Site": "cross-site"}, False),
        ("POST", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, False),
        ("PATCH", {"Origin": "https://evil.example"}, False),
        ("GET", {"Origin": "http://localhost:3000", "Sec-Fetch-Site": "same-site"}, True),
        ("GET", {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"}, True),
        ("GET", {"Sec-Fetch-Site": "cross-site"}, False),
        ("GET", {"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}, False),
        ("GET", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, False),
        (
            "GET",
            {
                "Sec-Fetch-Site": "cross-site",
                "Sec-Fetch-Mode": "navigate",
                "Sec-Fetch-Dest": "document",
            },
            True,
        ),
        (
            "GET",
            {
                "Sec-Fetch-Site": "cross-site",
                "Sec-Fetch-Mode": "navigate",
                "Sec-Fetch-Dest": "iframe",
            },
            False,
        ),
    ],
)
async def test_a_foreign_page_changes_nothing_and_reads_nothing(
    client: httpx2.AsyncClient, method: str, headers: dict[str, str], answered: bool
) -> None:
    """A write of another origin and any request of another site get 403; following a link works."""
    path = CREATE if method == "POST" else LIST if method == "GET" else "/incident/update-status"
    body: dict[str, Any] = {"json": INCIDENT} if method == "POST" else {}
    response = await client.request(method, path, headers=headers, **body)
    # The client of the app is not open, so a request that is let through gets 503.
    assert response.status_code == (503 if answered else 403)


@pytest.mark.parametrize("hosts", [("evil.example", "localhost"), ("localhost", "evil.example")])
async def test_several_hosts_are_none_of_the_service(
    client: httpx2.AsyncClient, hosts: tuple[str, str]
) -> None:
    """A request with two hosts gets 421, whichever of them comes first."""
    response = await client.get(LIST, headers=[("Host", host) for host in hosts])
    assert response.status_code == 421


async def test_a_refusal_is_logged(client: httpx2.AsyncClient, records: Records) -> None:
    """A refused request is logged like any other."""
    await client.get(LIST, headers={"Host": "evil.example"})
    assert records.seen[-1].getMessage().startswith("GET (none) 421 ")


async def test_without_hosts_any_is_answered() -> None:
    """A service on a public address accepts any host."""
    app = service_on(IncidentClient.open(MEMORY))
    app.add_middleware(BrowserGuard)
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://any.example") as client:
        assert (await client.get("/openapi.json")).status_code == 200
        headers = {"Origin": "https://evil.example"}
        refused = await client.post(CREATE, json=INCIDENT, headers=headers)
        assert (refused.status_code, refused.json()["code"]) == (403, "foreign_origin")

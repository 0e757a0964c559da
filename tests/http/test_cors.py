"""Pages of other origins use the service if a setting allows them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from click.testing import CliRunner

from incidentkit import IncidentClient, InvalidSettings
from incidentkit.cli import main
from incidentkit.http import create_app
from tests.http.conftest import INCIDENT, MEMORY, Serve
from tests.programs import service
from tests.test_imports import modules_after

if TYPE_CHECKING:
    from pathlib import Path

BOARD = "https://board.example.com"


@pytest.fixture
def api(serve: Serve) -> httpx2.Client:
    """The service, with one origin allowed."""
    return serve(create_app(IncidentClient.open(MEMORY), cors=[f"{BOARD.upper()}:443"]))


def preflight(api: httpx2.Client, origin: str, method: str, headers: str) -> httpx2.Response:
    """Ask as a browser does before a request of another origin."""
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": headers,
    }
    return api.options("/incident/update-status", headers=asked)


def test_a_page_of_the_origin_may_read_and_write(api: httpx2.Client) -> None:
    """A page may send the headers that guard a write, and read those of the answer."""
    headers = "content-type,idempotency-key,if-match,if-none-match,authorization,last-event-id"
    asked = preflight(api, BOARD, "PATCH", headers)
    assert asked.status_code == 200
    assert asked.headers["Access-Control-Allow-Origin"] == BOARD
    for answer in (
        api.post("/incident/create", json=INCIDENT, headers={"Origin": BOARD}),
        api.get("/incident/get/7", headers={"Origin": BOARD}),
    ):
        assert answer.headers["Access-Control-Allow-Origin"] == BOARD
        exposed = answer.headers["Access-Control-Expose-Headers"].split(", ")
        assert {"ETag", "Link", "Location", "Idempotent-Replayed", "Retry-After"} <= {*exposed}
        assert "Access-Control-Allow-Credentials" not in answer.headers


@pytest.mark.parametrize(
    ("origin", "method", "headers"),
    [
        ("https://elsewhere.example.com", "PATCH", "content-type"),
        ("http://board.example.com", "PATCH", "content-type"),
        ("null", "PATCH", "content-type"),
        (BOARD, "DELETE", "content-type"),
        (BOARD, "PATCH", "x-other"),
    ],
)
def test_another_origin_is_not_admitted(
    api: httpx2.Client, origin: str, method: str, headers: str
) -> None:
    """A preflight of another origin, method or header is refused."""
    refused = preflight(api, origin, method, headers)
    assert refused.status_code == 400
    if origin != BOARD:
        assert "Access-Control-Allow-Origin" not in refused.headers


def test_without_the_setting_no_page_is_admitted(serve: Serve) -> None:
    """By default no answer has a CORS header, and the part is not loaded."""
    api = serve(create_app(IncidentClient.open(MEMORY)))
    answer = api.get("/incident/get", headers={"Origin": BOARD})
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert preflight(api, BOARD, "PATCH", "content-type").status_code == 405
    code = "from incidentkit import IncidentClient\nfrom incidentkit.http import create_app\n"
    loaded = modules_after(f"{code}create_app(IncidentClient.open())")
    assert "incidentkit.http.parts" in loaded
    assert "incidentkit.http.cors" not in loaded


@pytest.mark.parametrize(
    "origin", ["board.example.com", f"{BOARD}/", f"{BOARD}/x", "null", "", f"{BOARD}:0", None]
)
def test_what_is_no_origin_is_refused(origin: Any) -> None:
    """An origin that a browser would never send is refused when the app is made."""
    with pytest.raises(InvalidSettings, match=r"^cors must be"):
        create_app(IncidentClient.open(MEMORY), cors=[origin])


def test_serve_admits_origins_and_does_not_name_its_server(tmp_path: Path) -> None:
    """A page of the option's origin reads and writes; no answer has a Server header."""
    variables = {
        "INCIDENTKIT_DATABASE_URL": MEMORY,
        "INCIDENTKIT_CORS_ORIGINS": "https://other.example",
    }
    env = {**os.environ, **variables}
    with service(tmp_path / "log", "--cors-origin", BOARD, env=env) as running:
        for path in ("/incident/get", "/nowhere", "/"):
            answer = httpx2.get(f"{running.url}{path}", headers={"Origin": BOARD})
            assert answer.headers["Access-Control-Allow-Origin"] == BOARD
            assert "Server" not in answer.headers
        for origin, status in ((BOARD, 201), ("https://other.example", 403)):
            headers = {"Origin": origin, "Sec-Fetch-Site": "cross-site"}
            url = f"{running.url}/incident/create"
            assert httpx2.post(url, json=INCIDENT, headers=headers).status_code == status
    refused = CliRunner().invoke(main, ["serve", "--cors-origin", "board"])
    assert refused.exit_code == 2
    assert "--cors-origin must be origins such as" in refused.output

"""Swagger UI is served entirely by the service, under a policy that forbids everything else."""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING
from urllib.parse import urljoin

import pytest

from incidentkit import IncidentClient, MissingDependency
from incidentkit.http import create_app
from incidentkit.http.docs import START_SCRIPT, _file, assets_folder
from tests.http.conftest import MEMORY, Serve

if TYPE_CHECKING:
    import httpx2

MEDIA_TYPES = {
    "docs/favicon-32x32.png": "image/png",
    "docs/start.js": "text/javascript; charset=utf-8",
    "docs/swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "docs/swagger-ui.css": "text/css; charset=utf-8",
}


def test_the_page_is_whole(api: httpx2.Client) -> None:
    """Each link of the page leads to a file of the service with the right type."""
    page = api.get("/docs")
    assert page.status_code == 200
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    links = re.findall(r'(?:src|href)="([^"]*)"', page.text)
    assert sorted(links) == sorted(MEDIA_TYPES)
    for link in links:
        file = api.get(urljoin("/docs", link))
        assert file.status_code == 200
        assert file.headers["Content-Type"] == MEDIA_TYPES[link]
        assert len(file.content) == int(file.headers["Content-Length"]) > 100


def test_the_page_shows_the_document(api: httpx2.Client) -> None:
    """The script starts Swagger UI on the service's own document, without an external validator."""
    script = api.get("/docs/start.js").text
    assert 'url: "openapi.json"' in script
    assert "validatorUrl: null" in script
    assert "http" not in script


@pytest.mark.parametrize("path", ["/docs", *(f"/{link}" for link in MEDIA_TYPES)])
def test_the_policy(api: httpx2.Client, path: str) -> None:
    """The policy forbids external resources, inline scripts, and frames around the page."""
    headers = api.get(path).headers
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "<script>" not in api.get("/docs").text
    assert "<style" not in api.get("/docs").text


@pytest.mark.parametrize("given", ["bytes=abc", "bytes=99999999-", "bytes=0-3", "lines=1"])
def test_a_range_is_not_taken(api: httpx2.Client, given: str) -> None:
    """A range request is answered with the whole file."""
    answer = api.get("/docs/swagger-ui.css", headers={"Range": given})
    assert answer.status_code == 200
    assert answer.content == api.get("/docs/swagger-ui.css").content


@pytest.mark.parametrize("path", MEDIA_TYPES)
def test_a_file_that_the_browser_has(api: httpx2.Client, path: str) -> None:
    """A browser revalidates each time, and gets 304 for a file that it has."""
    whole = api.get(path)
    tag = whole.headers["ETag"]
    assert whole.headers["Cache-Control"] == "no-cache"
    for given in (tag, f"W/{tag}", f'"other", {tag}'):
        answer = api.get(path, headers={"If-None-Match": given})
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["ETag"] == tag
    assert api.get(path, headers={"If-None-Match": '"other"'}).content == whole.content


@pytest.mark.parametrize(
    "name", ["index.html", "swagger-ui-bundle.js.map", "..%2f..%2f__init__.py", "%2e%2e", "%00"]
)
def test_no_other_file(api: httpx2.Client, name: str) -> None:
    """Only the files that the page needs are served."""
    answer = api.get(f"/docs/{name}")
    assert answer.status_code == 404
    assert answer.json()["detail"] == "There is nothing at this path"


def test_without_docs(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """With docs=False the package of Swagger UI is not needed; the OpenAPI document is served."""
    assets_folder.cache_clear()
    monkeypatch.setitem(sys.modules, "swagger_ui_bundle", None)
    api = serve(create_app(IncidentClient.open(MEMORY), docs=False))
    assert api.get("/docs").status_code == 404
    assert api.get("/docs/start.js").status_code == 404
    assert api.get("/openapi.json").status_code == 200


def test_the_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package of Swagger UI the error names the extra that installs it."""
    assets_folder.cache_clear()
    monkeypatch.setitem(sys.modules, "swagger_ui_bundle", None)
    with pytest.raises(MissingDependency) as raised:
        create_app(IncidentClient.open(MEMORY))
    assert raised.value.package == "swagger-ui-bundle-v2"
    assert raised.value.extra == "server"


def test_the_package_lacks_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a frozen program left the files of Swagger UI out, creating the app says so."""
    assets_folder.cache_clear()
    monkeypatch.setitem(sys.modules, "swagger_ui_bundle", SimpleNamespace(swagger_ui_path=tmp_path))
    with pytest.raises(MissingDependency, match="swagger-ui-bundle-v2"):
        create_app(IncidentClient.open(MEMORY))


def test_the_package_is_in_a_zip_file(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of Swagger UI are served from a zip file too."""
    assets_folder.cache_clear()
    with zipfile.ZipFile(tmp_path / "swagger.zip", "w") as archive:
        for name in (Path(link).name for link in MEDIA_TYPES):
            if name != START_SCRIPT:
                archive.writestr(f"ui/{name}", name)
    folder = zipfile.Path(tmp_path / "swagger.zip", "ui/")
    _file.cache_clear()
    monkeypatch.setitem(sys.modules, "swagger_ui_bundle", SimpleNamespace(swagger_ui_path=folder))
    try:
        api = serve(create_app(IncidentClient.open(MEMORY)))
        assert api.get("/docs/swagger-ui.css").text == "swagger-ui.css"
    finally:
        assets_folder.cache_clear()
        _file.cache_clear()


def test_the_package_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that fails to import for another reason is not reported as missing."""

    def broken(_: str) -> None:
        raise ModuleNotFoundError(name="elsewhere")

    assets_folder.cache_clear()
    monkeypatch.setattr("incidentkit.http.docs.import_module", broken)
    with pytest.raises(ModuleNotFoundError) as raised:
        create_app(IncidentClient.open(MEMORY))
    assert raised.value.name == "elsewhere"

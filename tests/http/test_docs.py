"""Swagger UI is served entirely by the service, under a policy that forbids everything else."""

from __future__ import annotations

import gzip
import hashlib
import re
import zipfile
from typing import TYPE_CHECKING
from urllib.parse import urljoin

import pytest

from incidentkit import IncidentClient, InvalidSettings
from incidentkit.http import create_app
from incidentkit.http.docs import FOLDER, MEDIA_TYPES, START_SCRIPT, _file
from tests.http.conftest import MEMORY, Serve

if TYPE_CHECKING:
    from pathlib import Path

    import httpx2

LINKS = {
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
    assert sorted(links) == sorted(LINKS)
    for link in links:
        file = api.get(urljoin("/docs", link))
        assert file.status_code == 200
        assert file.headers["Content-Type"] == LINKS[link]
        assert len(file.content) > 100


def test_the_page_shows_the_document(api: httpx2.Client) -> None:
    """The script starts Swagger UI on the service's own document, without an external validator."""
    script = api.get("/docs/start.js").text
    assert 'url: "openapi.json"' in script
    assert "validatorUrl: null" in script
    assert "http" not in script


@pytest.mark.parametrize("path", ["/docs", *(f"/{link}" for link in LINKS)])
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


@pytest.mark.parametrize("path", LINKS)
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


ENCODINGS = {
    "gzip": True,
    "GZIP": True,
    "br, gzip;q=0.5": True,
    "gzip ; q=1.0 , br": True,
    "*": True,
    "deflate, *;q=0.1": True,
    "": False,
    "identity": False,
    "br": False,
    "gzip;q=0": False,
    "gzip;q=0.000, *": False,
    "xgzip": False,
    "gzip;q=x": False,
}


@pytest.mark.parametrize("accepted", ENCODINGS)
@pytest.mark.parametrize("name", ["swagger-ui-bundle.js", "swagger-ui.css"])
def test_a_file_is_sent_compressed(api: httpx2.Client, name: str, accepted: str) -> None:
    """A file is sent compressed to clients that take gzip, and as it is to all others."""
    plain = api.get(f"/docs/{name}", headers={"Accept-Encoding": "identity"})
    answer = api.get(f"/docs/{name}", headers={"Accept-Encoding": accepted})
    compressed = ENCODINGS[accepted]
    assert answer.headers.get("Content-Encoding") == ("gzip" if compressed else None)
    # httpx2 has decompressed it.
    assert answer.content == plain.content
    assert (int(answer.headers["Content-Length"]) < len(plain.content) / 2) is compressed
    assert answer.headers["Vary"] == plain.headers["Vary"] == "Accept-Encoding"
    assert (answer.headers["ETag"] != plain.headers["ETag"]) is compressed
    assert answer.headers["Content-Type"] == plain.headers["Content-Type"]


def test_the_files_are_those_of_the_manifest() -> None:
    """Each file has the hash that the package of Swagger UI has, and there is no other file."""
    first, *lines = (FOLDER / "manifest.txt").read_text("utf-8").splitlines()
    assert re.fullmatch(r"# swagger-ui-dist \d+\.\d+\.\d+", first)
    expected = {name: digest for digest, name in (line.split("  ") for line in lines)}
    found = {}
    for file in FOLDER.iterdir():
        if file.name != "manifest.txt":
            content = file.read_bytes()
            name = file.name.removesuffix(".gz")
            content = gzip.decompress(content) if name != file.name else content
            found[name] = hashlib.sha256(content).hexdigest()
    assert found == expected
    assert {*MEDIA_TYPES} - {START_SCRIPT} < expected.keys()
    assert {"LICENSE", "NOTICE", "swagger-ui-bundle.js.LICENSE.txt"} < expected.keys()


def test_the_sanitizer_is_not_an_old_one() -> None:
    """The bundle has a DOMPurify without the vulnerabilities that are known of versions before."""
    bundle = gzip.decompress((FOLDER / "swagger-ui-bundle.js.gz").read_bytes()).decode()
    versions = [
        tuple(map(int, match[1].split(".")))
        for match in re.finditer(r'\.version="(\d+\.\d+\.\d+)",[^;]{0,40}\.removed=\[\]', bundle)
    ]
    assert versions
    assert min(versions) >= (3, 4, 17)


def test_the_files_are_in_a_zip_file(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are served from a zip file too."""
    with zipfile.ZipFile(tmp_path / "package.zip", "w") as archive:
        for name in MEDIA_TYPES:
            archive.writestr(f"ui/{name}", name)
    monkeypatch.setattr(
        "incidentkit.http.docs.FOLDER", zipfile.Path(tmp_path / "package.zip", "ui/")
    )
    _file.cache_clear()
    try:
        api = serve(create_app(IncidentClient.open(MEMORY)))
        assert api.get("/docs/swagger-ui.css").text == "swagger-ui.css"
    finally:
        _file.cache_clear()


def test_without_docs(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With docs=False the files are not needed; the OpenAPI document is served."""
    monkeypatch.setattr("incidentkit.http.docs.FOLDER", tmp_path)
    api = serve(create_app(IncidentClient.open(MEMORY), docs=False))
    assert api.get("/docs").status_code == 404
    assert api.get("/docs/start.js").status_code == 404
    assert api.get("/openapi.json").status_code == 200


def test_a_file_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a frozen program left the files out, creating the app says which one is missing."""
    monkeypatch.setattr("incidentkit.http.docs.FOLDER", tmp_path)
    with pytest.raises(InvalidSettings, match=r"^docs needs the file swagger-ui\.css"):
        create_app(IncidentClient.open(MEMORY))

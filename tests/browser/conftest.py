"""A browser, and the service with a proxy in front of it."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

from incidentkit.store.migrate import upgrade
from tests.servers import HOST, PostgresServer, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "how-to" / "follow-changes.md"
DEADLINE = 60.0
"""Seconds after which something that has to come counts as missing."""


def until(condition: Callable[[], Any]) -> Any:
    """Wait for a condition, and return its value."""
    deadline = time.monotonic() + DEADLINE
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


def program(name: str) -> str:
    """Return the path of a program of the system."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    assert found is not None, f"{name} is not installed: see CONTRIBUTING.md"
    return found


def answers(url: str) -> bool:
    """Return whether a server answers, with any status."""
    try:
        httpx2.get(url)
    except httpx2.TransportError:
        return False
    return True


@contextmanager
def running(command: Sequence[str], log: Path, url: str, **options: Any) -> Iterator[Any]:
    """Run a server until the block ends; it has started once the URL answers."""
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, **options)
        try:
            until(lambda: answers(url) or process.poll() is not None)
            assert process.poll() is None, log.read_text()
            yield process
        finally:
            process.terminate()
            process.wait(DEADLINE)


class Service:
    """The service, on one port for good, and its database."""

    def __init__(self, folder: Path, postgres: PostgresServer) -> None:
        self.postgres = postgres
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        self._log = folder / "service.log"
        self._running: Any = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        environment = {
            **os.environ,
            "INCIDENTKIT_DATABASE_URL": self.postgres.url,
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-m", "incidentkit", "serve", "--port", str(self.port)]
        self._running = running(command, self._log, f"{self.url}/health/live", env=environment)
        self._running.__enter__()

    def stop(self) -> None:
        """Stop it if it runs, and wait for its end."""
        if self._running is not None:
            self._running.__exit__(None, None, None)
            self._running = None

    @property
    def ready(self) -> bool:
        """Whether it reaches its database."""
        return httpx2.get(f"{self.url}/health/ready").status_code == 200


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """A running service on an empty PostgreSQL server of its own."""
    with PostgresServer(durable=True) as postgres:
        asyncio.run(upgrade(postgres.url))
        started = Service(tmp_path, postgres)
        started.start()
        try:
            yield started
        finally:
            started.stop()


NGINX = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
worker_processes 1;
events {{ worker_connections 256; }}
http {{
    access_log off;
    gzip on;
    gzip_types *;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    proxy_buffering {buffering};
    server {{
        listen {host}:{port};
        {guide}
        location / {{ proxy_pass {service}; }}
    }}
}}
"""


def guide() -> str:
    """Return the configuration of nginx that the guide shows."""
    shown = re.search(r"```nginx\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert shown is not None
    return shown[1]


@pytest.fixture(params=["direct", "nginx", "nginx without buffering"])
def origin(request: pytest.FixtureRequest, service: Service, tmp_path: Path) -> Iterator[str]:
    """The URL at which a browser reaches the service: its own, or nginx in front of it."""
    if request.param == "direct":
        yield service.url
        return
    port = free_port()
    settings = tmp_path / "nginx.conf"
    location = guide()
    assert "http://127.0.0.1:8000" in location
    settings.write_text(
        NGINX.format(
            folder=tmp_path,
            host=HOST,
            port=port,
            service=service.url,
            buffering="off" if "without" in request.param else "on",
            guide=location.replace("http://127.0.0.1:8000", service.url),
        )
    )
    url = f"http://{HOST}:{port}"
    command = [program("nginx"), "-p", str(tmp_path), "-c", str(settings)]
    with running(command, tmp_path / "nginx.log", f"{url}/health/live"):
        yield url


class Browser:
    """A tab of Chromium, driven by the WebDriver protocol."""

    def __init__(self, driver: str, folder: Path) -> None:
        self._api = httpx2.Client(base_url=driver, timeout=DEADLINE)
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options = {
            "binary": program("chromium"),
            "args": [*arguments, f"--user-data-dir={folder}"],
        }
        wanted = {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}
        session = self._call("POST", "/session", capabilities=wanted)
        self._session = f"/session/{session['sessionId']}"

    def go(self, url: str) -> None:
        """Open a page."""
        self._call("POST", f"{self._session}/url", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a script in the page, and return what it returns."""
        path = f"{self._session}/execute/sync"
        return self._call("POST", path, script=script, args=arguments)

    def close(self) -> None:
        """Close the browser."""
        self._call("DELETE", self._session)
        self._api.close()

    def _call(self, method: str, path: str, **body: Any) -> Any:
        answer = self._api.request(method, path, json=body if method == "POST" else None)
        assert answer.status_code == 200, answer.text
        return answer.json()["value"]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """A browser of this test."""
    port = free_port()
    driver = f"http://{HOST}:{port}"
    command = [program("chromedriver"), f"--port={port}"]
    with running(command, tmp_path / "driver.log", f"{driver}/status"):
        started = Browser(driver, tmp_path / "profile")
        try:
            yield started
        finally:
            started.close()

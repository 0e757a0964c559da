"""The service does what its OpenAPI document says, with requests that Schemathesis generates."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2
import pytest

from incidentkit import IncidentClient, Scope
from tests.http.conftest import INCIDENT
from tests.programs import service

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

CONFIG = Path(__file__).with_name("schemathesis.toml")
HOOKS = Path(__file__).with_name("hooks.py")

EXAMPLES = 40
"""Requests of the fuzzer for each operation."""

PAUSE = 0.5
"""Seconds between two incidents that are reported meanwhile."""


@contextmanager
def reporting(url: str, headers: Mapping[str, str]) -> Iterator[None]:
    """Report incidents until the block ends, so that a poll for changes need not wait."""
    ended = threading.Event()

    def report() -> None:
        with httpx2.Client(base_url=url, headers=headers) as api:
            while not ended.wait(PAUSE):
                api.post("/incident/create", json=INCIDENT)

    thread = threading.Thread(target=report)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def check_document(url: str, folder: Path, access: str, token: str) -> None:
    """Run all phases and checks of Schemathesis, and fail if it finds something.

    Args:
        url: The service.
        folder: Where Schemathesis keeps what it needs.
        access: Whether the service has tokens, and the requests one of them.
        token: The access token to send with each request; empty: none.
    """
    program = shutil.which("schemathesis")
    assert program is not None, "Schemathesis is not installed: see CONTRIBUTING.md"
    report = folder / "report.json"
    command = [program, "--config-file", str(CONFIG), "run", f"{url}/openapi.json"]
    command += ["--max-examples", str(EXAMPLES), "--report-json-path", str(report)]
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    command += [f"--header={name}:{value}" for name, value in headers.items()]
    if access == "open":
        # The document tells what the operations need as soon as there is a token.
        command.append("--exclude-checks=ignored_auth")
    if seed := os.environ.get("INCIDENTKIT_TEST_SEED"):
        command += ["--seed", seed]
    env = os.environ | {"SCHEMATHESIS_HOOKS": str(HOOKS)}
    if token:
        env["INCIDENTKIT_TEST_TOKEN"] = token
    with reporting(url, headers):
        done = subprocess.run(command, cwd=folder, env=env, check=False)
    assert done.returncode == 0, "Schemathesis found something: see its output"
    paths = httpx2.get(f"{url}/openapi.json").json()["paths"]
    assert json.loads(report.read_text())["operations"]["tested"] == sum(map(len, paths.values()))


async def create_token(url: str) -> str:
    """Return an access token with every scope."""
    async with IncidentClient.open(url) as incidents:
        return (await incidents.tokens.create("contract", [*Scope])).secret


@pytest.mark.parametrize("access", ["open", "token", "no token"])
def test_schemathesis_finds_nothing(url: str, tmp_path: Path, access: str) -> None:
    """Every answer is described, valid requests are taken, and others are refused.

    So it is before there are tokens, with a token, and where the token is missing.
    """
    token = "" if access == "open" else asyncio.run(create_token(url))
    env = os.environ | {"INCIDENTKIT_DATABASE_URL": url}
    with service(tmp_path / "log", "--trusted-proxy", "127.0.0.1", env=env) as running:
        check_document(running.url, tmp_path, access, token if access == "token" else "")

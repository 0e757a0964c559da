"""The service does what its OpenAPI document says, with requests that Schemathesis generates."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2

from tests.http.conftest import INCIDENT
from tests.programs import service

if TYPE_CHECKING:
    from collections.abc import Iterator

CONFIG = Path(__file__).with_name("schemathesis.toml")
HOOKS = Path(__file__).with_name("hooks.py")

EXAMPLES = 40
"""Requests of the fuzzer for each operation."""

PAUSE = 0.5
"""Seconds between two incidents that are reported meanwhile."""


@contextmanager
def reporting(url: str) -> Iterator[None]:
    """Report incidents until the block ends, so that a poll for changes need not wait."""
    ended = threading.Event()

    def report() -> None:
        with httpx2.Client(base_url=url) as api:
            while not ended.wait(PAUSE):
                api.post("/incident/create", json=INCIDENT)

    thread = threading.Thread(target=report)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def check_document(url: str, folder: Path, *options: str) -> None:
    """Run all phases and checks of Schemathesis, and fail if it finds something.

    Args:
        url: The service.
        folder: Where Schemathesis keeps what it needs.
        options: Further options of Schemathesis.
    """
    program = shutil.which("schemathesis")
    assert program is not None, "Schemathesis is not installed: see CONTRIBUTING.md"
    report = folder / "report.json"
    command = [program, "--config-file", str(CONFIG), "run", f"{url}/openapi.json"]
    command += ["--max-examples", str(EXAMPLES), "--report-json-path", str(report), *options]
    if seed := os.environ.get("INCIDENTKIT_TEST_SEED"):
        command += ["--seed", seed]
    env = os.environ | {"SCHEMATHESIS_HOOKS": str(HOOKS)}
    with reporting(url):
        done = subprocess.run(command, cwd=folder, env=env, check=False)
    assert done.returncode == 0, "Schemathesis found something: see its output"
    paths = httpx2.get(f"{url}/openapi.json").json()["paths"]
    assert json.loads(report.read_text())["operations"]["tested"] == sum(map(len, paths.values()))


def test_schemathesis_finds_nothing(url: str, tmp_path: Path) -> None:
    """Every answer is described, valid requests are taken, and others are refused."""
    env = os.environ | {"INCIDENTKIT_DATABASE_URL": url}
    with service(tmp_path / "log", env=env) as running:
        check_document(running.url, tmp_path)

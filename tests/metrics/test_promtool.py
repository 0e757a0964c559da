"""Prometheus accepts the metrics of the service."""

from __future__ import annotations

import asyncio
import subprocess
from typing import TYPE_CHECKING

from tests.test_observing import exercise

if TYPE_CHECKING:
    from pathlib import Path


def test_promtool_finds_no_fault(url: str, tmp_path: Path) -> None:
    """`promtool check metrics` has nothing to say about what `/metrics` answers."""
    answer = tmp_path / "metrics"
    answer.write_text(asyncio.run(exercise(url)), "utf-8")
    with answer.open("rb") as file:
        check = subprocess.run(
            ["promtool", "check", "metrics"],
            stdin=file,
            capture_output=True,
            text=True,
            check=False,
        )
    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")

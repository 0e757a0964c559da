"""Run the project's programs as a user would."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

import httpx2
import psutil
import pytest
from attrs import frozen

if TYPE_CHECKING:
    import signal
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

DEADLINE = 60
"""Seconds after which a program that has not answered or ended counts as hanging."""


def start(
    *arguments: str,
    program: Sequence[str] = ("-m", "incidentkit"),
    executable: str | Path = sys.executable,
    stdout: int | IO[bytes] = subprocess.PIPE,
    stderr: int | IO[bytes] = subprocess.PIPE,
    stdin: int | IO[bytes] | None = None,
    env: Mapping[str, str] | None = None,
    new_group: bool = False,
) -> subprocess.Popen[bytes]:
    """Start a command in its own process and, on request, in its own group of processes."""
    return subprocess.Popen(
        [executable, *program, *arguments],
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env=env,
        process_group=0 if new_group else None,
    )


def outcome(program: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    """Wait for a program to end and return its exit code, stdout and stderr."""
    with program:
        try:
            out, err = program.communicate(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            program.kill()
            raise
    return (
        program.returncode,
        (out or b"").decode("utf-8", "backslashreplace"),
        (err or b"").decode(),
    )


def open_connections() -> set[object]:
    """Return the open network connections of this process."""
    found = psutil.Process().net_connections("inet")
    return {each.laddr for each in found if each.status == psutil.CONN_ESTABLISHED}


@frozen
class Service:
    """A running web service, `incidentkit serve` or another."""

    program: subprocess.Popen[bytes]
    url: str
    log: Path

    def end(self, number: signal.Signals) -> int:
        """Send the signal and return the exit code."""
        self.program.send_signal(number)
        return self.program.wait(DEADLINE)


@contextmanager
def service(
    log: Path,
    *arguments: str,
    program: Sequence[str] = ("-m", "incidentkit", "serve", "--port", "0"),
    executable: str | Path = sys.executable,
    env: Mapping[str, str] | None = None,
    alive: str = "/health/live",
) -> Iterator[Service]:
    """Run a service that logs its address to stderr, and end it if it is still running.

    The service counts as started once the path `alive` answers.
    """
    with (
        log.open("wb") as stderr,
        start(
            *arguments,
            program=program,
            executable=executable,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=env,
        ) as running,
    ):
        try:
            yield Service(running, _wait_until_alive(running, log, alive), log)
        finally:
            _end(running)


def _wait_until_alive(program: subprocess.Popen[bytes], log: Path, path: str) -> str:
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline and program.poll() is None:
        found = re.search(r" (?:on|at:) (http://[\w.]+:\d+)", log.read_text())
        if found:
            try:
                httpx2.get(f"{found[1]}{path}").raise_for_status()
            except httpx2.HTTPError:
                pass
            else:
                return found[1]
        time.sleep(0.05)
    pytest.fail(f"the service does not answer:\n{log.read_text()}")


def _end(program: subprocess.Popen[bytes]) -> None:
    program.terminate()
    try:
        program.wait(DEADLINE)
    except subprocess.TimeoutExpired:
        program.kill()
        raise

"""The service listens on a Unix socket, or on a socket that another program has opened."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import httpx2
import pytest

from tests.programs import DEADLINE, outcome, start

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WORKERS = pytest.mark.parametrize("workers", ["1", "2"])


@pytest.fixture(autouse=True)
def _database(migrated_sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name the database of the service."""
    monkeypatch.setenv("INCIDENTKIT_DATABASE_URL", migrated_sqlite_url)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The path of a Unix socket that does not exist."""
    return tmp_path / "http.sock"


@contextmanager
def serving(path: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the service on a Unix socket, until the end of the block or until it has ended."""
    program = start("serve", "--uds", str(path), *arguments, stderr=subprocess.DEVNULL)
    with program:
        try:
            deadline = time.monotonic() + DEADLINE
            while not _listens(path):
                assert program.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield program
        finally:
            program.kill()


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as visitor:
        return visitor.connect_ex(str(path)) == 0


def ask(path: Path) -> int:
    """Return the status of an answer on a Unix socket."""
    transport = httpx2.HTTPTransport(uds=str(path))
    with httpx2.Client(transport=transport, timeout=DEADLINE) as api:
        return api.get("http://localhost/health/ready").status_code


@WORKERS
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_unix_socket_is_there_while_the_service_runs(
    path: Path, workers: str, number: signal.Signals
) -> None:
    """The service answers on the socket, and removes it when it ends."""
    with serving(path, "--workers", workers) as program:
        assert ask(path) == 200
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        program.send_signal(number)
        assert program.wait(DEADLINE) == 0
    assert not path.exists()


def test_a_unix_socket_has_the_mode_of_the_option(path: Path) -> None:
    """The mode does not depend on the umask of the process."""
    before = os.umask(0o077)
    try:
        with serving(path, "--uds-mode", "666"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o666
    finally:
        os.umask(before)


def test_a_socket_that_a_killed_service_left_is_replaced(path: Path) -> None:
    """After a kill, the service starts again on the same path."""
    with serving(path) as program:
        assert ask(path) == 200
        program.kill()
        program.wait(DEADLINE)
    assert path.exists()
    with serving(path):
        assert ask(path) == 200


def test_the_socket_of_another_service_is_left_alone(path: Path) -> None:
    """A path on which a program listens is refused, and so is a file."""
    with serving(path):
        exit_code, _, err = outcome(start("serve", "--uds", str(path)))
        assert exit_code == 1
        assert err.endswith(f"Error: Cannot listen on {path}: another program listens on it\n")
        assert ask(path) == 200
    path.unlink()
    path.write_text("kept")
    exit_code, _, err = outcome(start("serve", "--uds", str(path)))
    assert (exit_code, path.read_text()) == (1, "kept")
    assert f"Cannot listen on {path}: the file exists and is not a socket: choose" in err


def test_a_service_leaves_the_socket_of_its_successor(path: Path) -> None:
    """A socket that has taken the place of the service's own one is not removed."""
    with serving(path) as program, closing(socket.socket(socket.AF_UNIX)) as successor:
        assert ask(path) == 200
        path.unlink()
        successor.bind(str(path))
        program.send_signal(signal.SIGTERM)
        assert program.wait(DEADLINE) == 0
    assert path.exists()


@WORKERS
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_an_inherited_socket_is_served(
    path: Path, workers: str, family: socket.AddressFamily
) -> None:
    """With --fd, the service answers also the connections that came before it started."""
    with socket.socket(family) as listener:
        listener.bind(("127.0.0.1", 0) if family == socket.AF_INET else str(path))
        listener.listen()
        listener.set_inheritable(True)
        command = ("serve", "--fd", str(listener.fileno()), "--workers", workers)
        with (
            socket.socket(family) as early,
            subprocess.Popen(
                [sys.executable, "-m", "incidentkit", *command],
                pass_fds=[listener.fileno()],
                stderr=subprocess.DEVNULL,
            ) as program,
        ):
            try:
                early.settimeout(DEADLINE)
                early.connect(listener.getsockname())
                early.sendall(b"GET /health/ready HTTP/1.1\r\nHost: a\r\n\r\n")
                assert early.recv(65536).startswith(b"HTTP/1.1 200 ")
                program.send_signal(signal.SIGTERM)
                assert program.wait(DEADLINE) == 0
            finally:
                program.kill()
    assert path.exists() == (family == socket.AF_UNIX)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--fd", "77"), "--fd 77 is not open"),
        (("--fd", "3", "--port", "80"), "--fd names a socket that listens already: omit --port"),
        (("--uds", "a", "--host", "::1"), "--uds takes the place of --host and --port: omit them"),
        (("--uds-mode", "600"), "--uds-mode needs --uds"),
        (("--uds", ""), "--uds needs a path"),
        (("--uds", "a", "--uds-mode", "999"), "must be three octal digits, such as 660"),
    ],
)
def test_one_place_to_listen_is_named(arguments: tuple[str, ...], reason: str) -> None:
    """Options that contradict each other, or name nothing, are refused with the reason."""
    exit_code, _, err = outcome(start("serve", *arguments))
    assert exit_code == 2
    assert reason in err


def test_a_file_that_does_not_listen_is_refused(tmp_path: Path) -> None:
    """--fd refuses a file, and a socket that is connected or only bound."""
    with (tmp_path / "file").open("wb") as file, socket.socket() as unbound:
        for number, reason in (
            (file.fileno(), "is not a socket"),
            (unbound.fileno(), "is a socket that does not listen"),
        ):
            done = subprocess.run(
                [sys.executable, "-m", "incidentkit", "serve", "--fd", str(number)],
                pass_fds=[number],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 2
            assert f"--fd {number} {reason}" in done.stderr

"""How commands end on signals, with real processes and real signals."""

from __future__ import annotations

import os
import pty
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import httpx2
import psutil
import pytest

from tests.programs import DEADLINE, outcome, service, start

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

pytestmark = pytest.mark.unmeasured

AT_CALLS = """
import os, signal, sys, time
from incidentkit.__main__ import run
from incidentkit.cli.interrupts import interrupts

number, *moments = map(int, sys.argv[1].split(","))
sys.argv = ["incidentkit", *sys.argv[2:]]
calls = 0

def count(frame, event, argument):
    global calls
    if event == "call":
        calls += 1
        if calls in moments:
            os.kill(os.getpid(), number)
            while is_handled and not interrupts.received:
                time.sleep(0.001)

is_handled = number == signal.SIGINT and signal.getsignal(number) is signal.default_int_handler
interrupts.install()
sys.setprofile(count)
try:
    run()
finally:
    sys.setprofile(None)
    if not moments:
        print(calls, file=sys.stderr)
"""
"""Runs a command that gets a signal in the middle of its n-th calls of a Python function.

So a signal arrives at a chosen moment, whatever the speed of the machine. Without a moment, the
program prints the number of its calls.
"""

PARTS = 8
"""Number of moments, from the first import to the last line, at which a command gets signals."""

BODY = b'{"incident_message": "Disk is full on db-1", "source": "monitoring"}'

GAPS = (1, 100, 10_000)
"""Calls from the first interrupt to the second."""


@pytest.fixture(autouse=True)
def _database(migrated_sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name a database with the newest schema, which every command uses without an option."""
    monkeypatch.setenv("INCIDENTKIT_DATABASE_URL", migrated_sqlite_url)


def ended(command: Sequence[str], number: int, *moments: int) -> tuple[int, str, str]:
    """Run a command that gets a signal at these moments, and return how it ended."""
    places = ",".join(map(str, (number, *moments)))
    return outcome(start(places, *command, program=("-c", AT_CALLS)))


def moments(command: Sequence[str]) -> list[int]:
    """Return numbers of calls that divide a run of a command evenly."""
    exit_code, _, err = ended(command, signal.SIGINT)
    assert exit_code == 0, err
    calls = int(err.splitlines()[-1])
    return [1 + calls * part // PARTS for part in range(PARTS)]


LIST = ("list", "--json")
CREATE = ("create", "Disk is full on db-1", "--source", "monitoring")


@pytest.mark.parametrize(
    ("command", "place"),
    [
        (LIST, "migrated_sqlite_url"),
        (CREATE, "migrated_postgres_url"),
        (("db", "upgrade"), "sqlite_url"),
        (("db", "check"), "migrated_postgres_url"),
    ],
)
def test_an_interrupt_at_any_moment_exits_with_130(
    command: tuple[str, ...], place: str, request: pytest.FixtureRequest
) -> None:
    """One interrupt, or two in a row, end a command with 130 and without an error or traceback."""
    command = (*command, "--database-url", request.getfixturevalue(place))
    for part, moment in enumerate(moments(command)):
        second = [] if part % 2 else [moment + GAPS[part // 2 % len(GAPS)]]
        exit_code, _, err = ended(command, signal.SIGINT, moment, *second)
        assert (exit_code, err) == (130, ""), (moment, *second)


def test_sigterm_ends_a_command_by_the_signal() -> None:
    """SIGTERM ends a command at any moment as it ends other programs: a shell reports 143."""
    for moment in moments(LIST)[::3]:
        exit_code, _, err = ended(LIST, signal.SIGTERM, moment)
        assert (exit_code, err) == (-signal.SIGTERM, "")


def test_an_interrupt_that_the_shell_ignores_stays_ignored() -> None:
    """A script's background job, which starts with SIGINT ignored, is not interrupted."""
    shell = ["/bin/sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", AT_CALLS]
    for moment in moments(LIST)[::3]:
        done = subprocess.run(
            [*shell, f"{signal.SIGINT:d},{moment}", *LIST], check=False, capture_output=True
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"[]\n", b"")


@pytest.mark.parametrize("gap", [0, 0.001, 0.01, 0.1])
def test_two_interrupts_end_watch(gap: float) -> None:
    """A second Ctrl+C, however soon after the first one, does not make `watch` hang."""
    assert outcome(start(*CREATE))[0] == 0
    program = start("watch", "--from-start")
    assert program.stdout is not None
    assert b"created" in program.stdout.readline()
    program.send_signal(signal.SIGINT)
    try:
        # Until the second one, or until the program has ended.
        program.wait(gap)
    except subprocess.TimeoutExpired:
        program.send_signal(signal.SIGINT)
    assert outcome(program) == (130, "", "")


HANGING = """
import asyncio, sys
from incidentkit import IncidentClient
from incidentkit.__main__ import run
from incidentkit.cli import running

async def hang(word):
    while True:
        print(word, flush=True)
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            word = "cancelled"

async def purge(client, ended_before, progress):
    client._opened()
    progress(1, 2)

IncidentClient.close = lambda _: hang("closing")
IncidentClient.purge = purge
running.PATIENCE = float(sys.argv.pop(1))
sys.argv[0] = "incidentkit"
run()
"""
"""Runs a command whose client cannot be closed."""


def wait_for(program: subprocess.Popen[bytes], word: bytes) -> None:
    """Wait until a program prints a line with a word."""
    assert program.stdout is not None
    while word not in (line := program.stdout.readline()):
        assert line, "the program has ended"


def test_the_second_interrupt_waits_for_nothing() -> None:
    """A second Ctrl+C ends a command that is still closing its connections."""
    program = start("3600", "list", program=("-c", HANGING))
    for word in (b"closing", b"cancelled"):
        wait_for(program, word)
        program.send_signal(signal.SIGINT)
    assert outcome(program) == (130, "", "")


def test_the_first_interrupt_waits_for_a_limited_time() -> None:
    """A command that cannot close its connections ends after one Ctrl+C too."""
    program = start("0.01", "list", program=("-c", HANGING))
    wait_for(program, b"closing")
    program.send_signal(signal.SIGINT)
    assert outcome(program)[::2] == (130, "")


def test_a_purge_that_ends_at_once_shows_the_cursor_again() -> None:
    """The progress bar of `purge` hides the cursor, which is back after two interrupts."""
    reader, writer = pty.openpty()
    program = start("3600", "purge", "--older-than", "1d", program=("-c", HANGING), stderr=writer)
    os.close(writer)
    for word in (b"closing", b"cancelled"):
        wait_for(program, word)
        program.send_signal(signal.SIGINT)
    shown = b""
    try:
        while chunk := os.read(reader, 65536):
            shown += chunk
    except OSError:  # on Linux: the other end is closed
        pass
    os.close(reader)
    assert outcome(program)[0] == 130
    assert b"\x1b[?25l" in shown
    assert shown.endswith(b"\x1b[?25h\r\n")


def test_an_interrupt_answers_a_question() -> None:
    """Ctrl+C at a confirmation exits with 130, on a new line, and nothing is dropped."""
    keyboard, terminal = pty.openpty()
    program = start("db", "downgrade", "base", stdin=terminal)
    assert program.stderr is not None
    asked = program.stderr.read(1)
    while not asked.endswith(b"Continue? [y/N]:"):
        byte = program.stderr.read(1)
        assert byte, asked
        asked += byte
    program.send_signal(signal.SIGINT)
    exit_code, out, err = outcome(program)
    # Older versions of Click write the last blank of the question to stdout.
    assert (exit_code, out.strip(), err.strip(" ")) == (130, "", "\n")
    os.close(terminal)
    os.close(keyboard)
    exit_code, out, _ = outcome(start("db", "current"))
    assert (exit_code, "(head)" in out) == (0, True)


# The service


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)]
)
def test_a_signal_ends_a_service_that_does_not_run_yet(
    workers: str, number: signal.Signals, expected: int
) -> None:
    """While `serve` waits for the database, a signal ends it at once."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(DEADLINE)
        url = f"postgresql://user@127.0.0.1:{silent.getsockname()[1]}/incidents"
        program = start("serve", "--port", "0", "--workers", workers, "--database-url", url)
        connection, _ = silent.accept()
        with connection:
            program.send_signal(number)
            assert outcome(program) == (expected, "", "")


LOGGING = """
import asyncio, logging
from incidentkit.cli import server
from incidentkit.__main__ import run

async def wait(*_, **__):
    print("waiting", flush=True)
    try:
        await asyncio.sleep(3600)
    finally:
        logging.getLogger("asyncio").error("Future exception was never retrieved")

server.check_servers = wait
run()
"""
"""Runs `serve` so that asyncio logs an error when the first look at the database is cancelled."""


def test_an_interrupted_start_logs_nothing() -> None:
    """What asyncio logs about a connection that was being opened does not reach the terminal."""
    program = start("serve", "--port", "0", program=("-c", LOGGING))
    wait_for(program, b"waiting")
    program.send_signal(signal.SIGINT)
    assert outcome(program) == (130, "", "")


UNCHECKED = """
from incidentkit.cli import server
from incidentkit.__main__ import run

async def nothing(*_, **__):
    pass

server.check_servers = nothing
run()
"""
"""Runs `serve` without its first look at the database."""


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)]
)
def test_a_signal_ends_a_service_that_starts(number: signal.Signals, expected: int) -> None:
    """While the app of `serve` starts, a signal ends it at once, without a traceback."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(DEADLINE)
        url = f"postgresql://user@127.0.0.1:{silent.getsockname()[1]}/incidents"
        arguments = ("serve", "--port", "0", "--database-url", url)
        program = start(*arguments, program=("-c", UNCHECKED))
        connection, _ = silent.accept()
        with connection:
            program.send_signal(number)
            exit_code, _, err = outcome(program)
    assert exit_code == expected
    assert "Waiting for application startup" in err
    assert "Traceback" not in err


def test_an_interrupt_at_any_moment_of_a_start_ends_the_service() -> None:
    """From the first import until it listens, an interrupt ends `serve` without a traceback."""
    serve = ("serve", "--port", "0")
    program = start(f"{signal.SIGTERM:d}", *serve, program=("-c", AT_CALLS))
    assert program.stderr is not None
    while b"Uvicorn running" not in (line := program.stderr.readline()):
        assert line, "the program has ended"
    program.send_signal(signal.SIGTERM)
    exit_code, _, err = outcome(program)
    assert exit_code == 0
    calls = int(err.splitlines()[-1])
    for part in range(PARTS + 1):
        exit_code, _, err = ended(serve, signal.SIGINT, 1 + calls * part // PARTS)
        assert exit_code == (130 if part < PARTS / 2 else exit_code)
        assert exit_code == 0 or "Uvicorn running" not in err
        assert "Traceback" not in err


@contextmanager
def _unfinished_request(url: str) -> Iterator[socket.socket]:
    """Send a request without its body, and yield the connection once the app waits for the body."""
    host, port = url.removeprefix("http://").split(":")
    head = (
        "POST /incident/create HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(BODY)}",
        "Expect: 100-continue",
    )
    with socket.create_connection((host, int(port)), DEADLINE) as connection:
        connection.sendall("\r\n".join((*head, "", "")).encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 100 ")
        yield connection


def _wait_for_log(log: Path, text: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_second_interrupt_does_not_wait_for_requests(workers: str, tmp_path: Path) -> None:
    """The first Ctrl+C lets a request finish; the second one ends `serve` at once, with 0."""
    with service(tmp_path / "log", "--workers", workers) as running:
        workers_ = psutil.Process(running.program.pid).children(recursive=True)
        with _unfinished_request(running.url):
            running.program.send_signal(signal.SIGINT)
            _wait_for_log(running.log, "Waiting for connections to close")
            assert running.end(signal.SIGINT) == 0
        assert psutil.wait_procs(workers_, DEADLINE)[1] == []
        log = running.log.read_text()
    assert "timeout graceful shutdown exceeded" not in log
    assert "Traceback" not in log


def test_an_interrupt_of_a_terminal_does_not_reach_the_workers(tmp_path: Path) -> None:
    """Ctrl+C, which a terminal sends to the workers too, ends a start without a traceback."""
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        program = start("serve", "--port", "0", "--workers", "2", stderr=stderr, new_group=True)
        _wait_for_log(log, "Started parent process")
        children = psutil.Process(program.pid).children(recursive=True)
        os.killpg(program.pid, signal.SIGINT)
        assert outcome(program)[0] == 0
    assert psutil.wait_procs(children, DEADLINE)[1] == []
    assert "Traceback" not in log.read_text()


SLOW_WORKERS = """
import sys, time

if any("spawn_main" in argument for argument in sys.orig_argv):
    time.sleep(8)
"""
"""Makes a worker start for longer than uvicorn waits for the answer of a running one."""


def test_a_worker_that_starts_slowly_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine, `serve --workers` waits until its workers have started."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_WORKERS)
    folders = (str(tmp_path), os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, folders)))
    with service(tmp_path / "log", "--workers", "2") as running:
        _wait_for_log(running.log, "Application startup complete")
        assert running.end(signal.SIGTERM) == 0
        assert "died" not in running.log.read_text()


def _is_free(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    try:
        with socket.create_server((host, int(port))):
            return True
    except OSError:
        return False


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    """Killing `serve --workers` ends requests and streams in order, and then the workers."""
    with service(tmp_path / "log", "--workers", "2") as running:
        children = psutil.Process(running.program.pid).children(recursive=True)
        assert len(children) >= 2
        changes = {"Accept": "text/event-stream"}
        with (
            httpx2.stream("GET", f"{running.url}/incident/changes", headers=changes) as stream,
            _unfinished_request(running.url) as connection,
        ):
            running.program.kill()
            # The worker has closed its listening socket, and still answers.
            connection.sendall(BODY)
            assert connection.recv(65536).startswith(b"HTTP/1.1 201 ")
            # Raises if the stream ends in the middle of a chunk.
            stream.read()
        assert psutil.wait_procs(children, DEADLINE)[1] == []
        assert _is_free(running.url)
        log = running.log.read_text()
    assert "Traceback" not in log


def test_workers_that_start_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    """Killing `serve --workers` while the workers start leaves no process either."""
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        program = start("serve", "--port", "0", "--workers", "2", stderr=stderr)
        _wait_for_log(log, "Started parent process")
        children = psutil.Process(program.pid).children(recursive=True)
        program.kill()
        outcome(program)
    assert psutil.wait_procs(children, DEADLINE)[1] == []

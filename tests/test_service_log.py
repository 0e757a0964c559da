"""A log that cannot be written never stops or blocks the service."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import sys
import time
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from incidentkit.cli import log
from incidentkit.cli.log import JsonFormatter, LineHandler, LineWriter
from tests.programs import DEADLINE, start
from tests.servers import free_port

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator


@pytest.fixture
def port() -> int:
    """A free port."""
    return free_port()


WORKERS = pytest.mark.parametrize("workers", ["1", "2"])


@contextmanager
def serving(
    port: int, workers: str, sqlite_url: str, stderr: int, *shell: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run the service with this stderr, or from a shell; end it if it is still running."""
    arguments = ("serve", "--port", str(port), "--workers", workers, "--database-url", sqlite_url)
    command = ("-m", "incidentkit", *arguments)
    program = (
        start(
            "-c",
            'exec "$0" "$@" ' + shell[0],
            sys.executable,
            *command,
            program=(),
            executable="/bin/sh",
            stderr=stderr,
        )
        if shell
        else start(*arguments, stderr=stderr)
    )
    with program:
        try:
            _until(lambda: _answers(port))
            yield program
        finally:
            program.terminate()
            program.wait(DEADLINE)


def _until(condition: Any) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _get(port: int, path: str) -> Any:
    """Return the JSON of an answer on a new connection, which any worker may take."""
    connection = HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    with closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.status == 200
        return json.load(answer)


def _answers(port: int) -> bool:
    with suppress(OSError):
        return bool(_get(port, "/health/live"))
    return False


def _is_dropping(port: int) -> bool:
    log = _get(port, "/health/ready")["log"]
    return bool(log["state"] == "unavailable" and log["dropped"] > 0)


def _works(program: subprocess.Popen[bytes], port: int) -> bool:
    """Return whether all processes of the service go on, through many more answers."""
    processes = psutil.Process(program.pid).children(recursive=True)
    for _ in range(100):
        _get(port, "/incident/get")
    return program.poll() is None and all(process.is_running() for process in processes)


@WORKERS
def test_a_log_whose_reader_died(workers: str, sqlite_url: str, port: int) -> None:
    """With a pipe that nothing reads from any more, every process goes on and counts the lines."""
    reader, writer = os.pipe()
    with serving(port, workers, sqlite_url, writer) as program:
        os.close(writer)
        os.close(reader)
        _until(lambda: _is_dropping(port))
        assert _works(program, port)
        program.send_signal(signal.SIGTERM)
        assert program.wait(DEADLINE) == 0


def test_a_log_whose_reader_stops_reading(sqlite_url: str, port: int) -> None:
    """A pipe that is full holds up neither answers nor the end; once it is read, lines follow."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    with serving(port, "2", sqlite_url, writer) as program:
        assert _works(program, port)
        started = time.monotonic()
        program.send_signal(signal.SIGTERM)
        assert program.wait(DEADLINE) == 0
        assert time.monotonic() - started < DEADLINE / 2
    os.close(writer)
    with open(reader, "rb") as pipe:  # noqa: PTH123
        assert b"/incident/get 200" in pipe.read()


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-", "0<&- 1>&- 2>&-"])
def test_a_log_that_cannot_be_written(redirection: str, sqlite_url: str, port: int) -> None:
    """On a full disk, or with stderr closed, every process goes on and counts the lines."""
    with serving(port, "2", sqlite_url, -1, redirection) as program:
        _until(lambda: _is_dropping(port))
        assert _works(program, port)
        program.send_signal(signal.SIGTERM)
        assert program.wait(DEADLINE) == 0


def test_a_log_is_written_again() -> None:
    """Once the file can be written again, the log says how many records are missing."""
    reader, writer = os.pipe()
    lines = LineWriter(writer)
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        kept = os.dup(writer)
        os.dup2(full.fileno(), writer)
    lines.add("lost\n")
    assert lines.flush(DEADLINE)
    assert (lines.dropped, lines.failing) == (1, True)
    os.dup2(kept, writer)
    os.close(kept)
    lines.add("written\n")
    assert lines.flush(DEADLINE)
    assert (lines.dropped, lines.failing) == (1, False)
    os.close(writer)
    with open(reader, "rb") as pipe:  # noqa: PTH123
        assert pipe.read() == b"written\n"


def test_a_record_that_cannot_be_formatted_is_a_line_of_json_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A program that reads the log gets an object instead of each wrong record of a library."""
    lines: list[str] = []
    monkeypatch.setattr(log.LOG, "add", lines.append)
    handler = LineHandler()
    handler.setFormatter(JsonFormatter())
    handler.handle(logging.LogRecord("driver", logging.INFO, "", 0, "%d", ("secret",), None))
    (line,) = map(json.loads, lines)
    assert (line["level"], line["logger"]) == ("error", "incidentkit")
    assert line["message"] == "A record of driver cannot be formatted: TypeError"

"""The synchronous client in forked processes, under gevent, and at the end of the interpreter."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

import httpx2
import psycopg
import pytest

from incidentkit import SyncIncidentClient
from tests.programs import DEADLINE, outcome, start

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.unmeasured

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")

WARNINGS: Final = ("ResourceWarning", "never awaited", "was destroyed", "Traceback", "Fatal")
"""What no program may print."""


QUIET: Final = ("-W", "always::ResourceWarning", "-W", "ignore::DeprecationWarning")
"""Python warns of any fork of a process with threads."""


def run(program: str, *arguments: str, options: Sequence[str] = QUIET) -> tuple[int, str, str]:
    """Run a program; return its exit code, its output and its errors."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = (*options, "-c", program)
    return outcome(start(*arguments, program=command, env=environment))


FORKING: Final = '''\
import json, multiprocessing, os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from incidentkit import SyncIncidentClient, acting_as

url, redis_url, fork, child_does = sys.argv[1:]
THREADS = 4
incidents = SyncIncidentClient.open(url, redis_url or None)
going, stop = threading.Event(), threading.Event()


def use(actor):
    """Write and read; each write is sent only once, so that a dead connection is noticed."""
    with acting_as(actor):
        for _ in range(3):
            incident = incidents.create("Disk is full", source="operator")
            incidents.update_status(incident.incident_id, "completed")
            incidents.list()
    return True


def loops():
    return [thread.name for thread in threading.enumerate()].count("incidentkit")


def use_until_stopped():
    while not stop.is_set():
        use("parent")
        going.set()
        # So that the child finds the file unlocked at times.
        stop.wait(0.2)


def child():
    answer = None
    if child_does == "call":
        # All at once, since the first call opens the client.
        barrier = threading.Barrier(THREADS)

        def call(number):
            barrier.wait(30)
            return use(f"child {number}")

        assert not incidents.connected and loops() == 0
        with ThreadPoolExecutor(THREADS) as threads:
            answer = [*threads.map(call, range(THREADS)), loops()]
    elif child_does == "close":
        answer = incidents.close()
    with open("child.json", "w") as file:
        json.dump(answer, file)


def wait_for(pid):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return "hangs"


incidents.connect()
with ThreadPoolExecutor(THREADS) as threads:
    running = [threads.submit(use_until_stopped) for _ in range(THREADS)]
    going.wait(30)
    if fork == "held":
        # A thread that is opening or closing the client at the fork is missing in the child.
        held, forked = threading.Event(), threading.Event()

        def hold():
            with incidents._lifetime._turn:
                held.set()
                forked.wait(30)

        threading.Thread(target=hold).start()
        held.wait(30)
    if fork == "multiprocessing":
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(30)
        code = "hangs" if process.exitcode is None else process.exitcode
        process.kill()
    else:
        pid = os.fork()
        if not pid:
            child()
            # As a program ends, but without the threads of the pool, which are the parent's.
            threads._threads.clear()
            sys.exit()
        code = wait_for(pid)
    if fork == "held":
        forked.set()
    stop.set()
    answers = [each.result(30) for each in running]
answer = [code, use("parent")]
incidents.close()
with open("parent.json", "w") as file:
    json.dump(answer, file)
'''
"""Forks while threads call the client, and writes what the parent and the child found to files.

The deadlines only end a program that hangs.
"""


@needs_fork
@pytest.mark.parametrize(
    ("url", "fork", "child_does"),
    [
        ("sqlite", "fork", "call"),
        ("postgresql", "fork", "call"),
        ("sqlite", "held", "call"),
        ("postgresql", "multiprocessing", "call"),
        ("postgresql", "fork", "close"),
    ],
    indirect=["url"],
)
def test_a_forked_process_opens_its_own_connections(
    url: str, redis_url: str, fork: str, child_does: str
) -> None:
    """The first calls in the child open the client once, and the parent's threads continue."""
    code, _, errors = run(FORKING, url, redis_url, fork, child_does)
    assert code == 0, errors
    assert not [word for word in WARNINGS if word in errors], errors
    parent, child = (json.loads(Path(f"{who}.json").read_text()) for who in ("parent", "child"))
    assert parent == [0, True]
    assert child == ([True] * 4 + [1] if child_does == "call" else None)


OUTLIVING: Final = """\
import os, sys, threading
from incidentkit import SyncIncidentClient

incidents = SyncIncidentClient.open(sys.argv[1])
incidents.connect()
stop = threading.Event()


def write():
    while not stop.wait(0.005):
        incidents.create("The parent writes", source="operator")


writing = threading.Thread(target=write)
writing.start()
wrote, write_end = os.pipe()
read_end, closed = os.pipe()
if not os.fork():
    incidents.create("The child writes", source="operator")
    os.write(closed, b"x")
    os.read(wrote, 1)
    incidents.create("The child writes on", source="operator")
    incidents.close()
    os._exit(0)
os.read(read_end, 1)
stop.set()
writing.join()
incidents.close()
os.write(write_end, b"x")
assert os.wait()[1] == 0
"""


@needs_fork
def test_a_child_keeps_its_file_when_its_parent_closes_it(migrated_sqlite_url: str) -> None:
    """Writes of the child after the parent has closed its client are in the file."""
    code, _, errors = run(OUTLIVING, migrated_sqlite_url)
    assert (code, errors) == (0, "")
    with SyncIncidentClient.open(migrated_sqlite_url) as incidents:
        assert len(incidents.search(text="child").incidents) == 2


IN_MEMORY: Final = """\
import os, sys
from incidentkit import IncidentKitError, SyncIncidentClient

incidents = SyncIncidentClient.open("sqlite+aiosqlite:///:memory:")
incidents.connect()
incidents.create("Disk is full", source="operator")
if not os.fork():
    for call in (incidents.list, incidents.connect, incidents.close, incidents.connect):
        try:
            print(call())
        except IncidentKitError as error:
            print(error)
    sys.exit()
os.wait()
print(len(incidents.list()))
"""


@needs_fork
def test_a_database_in_memory_stays_in_its_process() -> None:
    """In a forked process, a client on a database in memory raises; it never has an empty one."""
    code, out, errors = run(IN_MEMORY)
    assert (code, errors) == (0, "")
    reason = "it is in the memory of the parent process"
    told = out.splitlines()
    assert [reason in line for line in told] == [True, True, False, True, False]
    assert [told[2], told[4]] == ["None", "1"]


IN_A_CALL: Final = r"""\
import os, sys
from datetime import UTC, datetime, timedelta
from incidentkit import NewIncident, SyncIncidentClient, WrongEventLoop

incidents = SyncIncidentClient.open(sys.argv[1])
incidents.connect()
incidents.create_many([NewIncident("Disk is full", "operator", "completed")] * 2)
children = []


def say(what):
    # In one piece, since the child writes too.
    os.write(1, f"{what}\n".encode())


def progress(purged, total):
    children.append(os.fork())


try:
    say(incidents.purge(datetime.now(UTC) + timedelta(days=1), progress=progress))
except WrongEventLoop as error:
    say(error)
if children[0]:
    assert os.waitpid(children[0], 0)[1] == 0
say(len(incidents.list()))
"""


@needs_fork
def test_a_call_that_forks_ends_in_the_child(migrated_sqlite_url: str) -> None:
    """A call that is running at the fork raises in the child, and continues in the parent."""
    code, out, errors = run(IN_A_CALL, migrated_sqlite_url)
    assert (code, errors) == (0, "")
    *numbers, told = sorted(out.splitlines())
    assert numbers == ["0", "0", "2"]
    assert "before this process was forked" in told


APP: Final = """\
import os
from incidentkit import SyncIncidentClient, acting_as

incidents = SyncIncidentClient.from_env()
incidents.connect()


def app(environ, respond):
    with acting_as(str(os.getpid())):
        incident = incidents.create("Disk is full", source="operator")
    actor = incidents.history(incident.incident_id)[0].actor
    respond("200 OK", [("Content-Type", "text/plain")])
    return [f"{incident.incident_id} {actor}".encode()]
"""


@needs_fork
def test_gunicorn_with_a_preloaded_app(migrated_postgres_url: str, tmp_path: Path) -> None:
    """Two workers with threads, forked from a process with an open client, record incidents."""
    (tmp_path / "app.py").write_text(APP)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "INCIDENTKIT_DATABASE_URL": migrated_postgres_url,
    }
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    arguments = ["--preload", "--workers", "2", "--worker-class", "gthread", "--threads", "4"]
    log = tmp_path / "log"
    with log.open("wb") as errors:
        server = start(
            *arguments,
            *("--bind", f"127.0.0.1:{port}", "app:app"),
            program=("-m", "gunicorn"),
            env=environment,
            stderr=errors,
        )
        deadline = time.monotonic() + DEADLINE
        while log.read_text().count("Booting worker") < 2:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)

        def call(_: int) -> list[str]:
            with httpx2.Client(timeout=DEADLINE) as http:
                return http.get(f"http://127.0.0.1:{port}/").raise_for_status().text.split()

        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(call, range(40)))
        server.send_signal(signal.SIGTERM)
        code, _, _ = outcome(server)
    told = log.read_text()
    assert code == 0, told
    assert sorted(int(number) for number, _ in answers) == list(range(1, 41))
    assert str(server.pid) not in {actor for _, actor in answers}
    assert not [word for word in WARNINGS if word in told], told


PATCHED: Final = """\
import sys
exec(sys.argv[1])
from incidentkit import SyncIncidentClient, WrongEventLoop

incidents = SyncIncidentClient.open(sys.argv[2])
try:
    incidents.connect()
except WrongEventLoop as error:
    print(error)
else:
    print(incidents.create("Disk is full", source="operator").incident_id)
    incidents.close()
"""


@pytest.mark.parametrize(
    ("patch", "name"),
    [
        ("from gevent import monkey; monkey.patch_all()", "gevent"),
        ("from gevent import monkey; monkey.patch_queue()", "gevent"),
        ("import eventlet; eventlet.monkey_patch()", "eventlet"),
        ("import gevent", None),
    ],
)
def test_replaced_threads_are_refused_by_name(
    patch: str, name: str | None, migrated_sqlite_url: str
) -> None:
    """With the threads of gevent or eventlet, the error of `connect` names them and the remedy."""
    _, out, errors = run(PATCHED, patch, migrated_sqlite_url, options=("-W", "ignore"))
    told = f"{name} has replaced the threads and sockets" if name else "1\n"
    assert out.startswith(told), errors
    assert ("gthread" in out) == (name is not None)


ENDING: Final = r"""\
import sys, threading, time
from incidentkit import ClientClosed, StoreUnavailable, SyncIncidentClient

url, end = sys.argv[1:]
incidents = SyncIncidentClient.open(url)
incidents.connect()
wrote = threading.Event()


def write(times):
    try:
        for _ in range(times):
            incident = incidents.create("Disk is full", source="operator")
            sys.stdout.write(f"{incident.incident_id}\n")
            sys.stdout.flush()
            wrote.set()
    except (ClientClosed, StoreUnavailable) as error:
        threads_end.append(str(error))


threads_end = []
if end == "threads":
    # Python waits for them, after the main thread has ended.
    for _ in range(3):
        threading.Thread(target=write, args=(5,)).start()
elif end == "daemons":
    for _ in range(3):
        threading.Thread(target=write, args=(10**6,), daemon=True).start()
elif end == "feed":
    threading.Thread(target=lambda: [*incidents.changes()], daemon=True).start()
    threading.excepthook = lambda failure: None
    write(1)
elif end == "exit in a thread":
    thread = threading.Thread(target=lambda: (write(1), sys.exit(3)))
    thread.start()
    thread.join()
elif end == "exit":
    write(1)
    sys.exit(5)
if end != "feed":
    wrote.wait(30)
"""
"""Ends without having closed its client, and prints the id of each incident that was stored."""


@pytest.mark.parametrize(
    ("url", "end"),
    [
        ("sqlite", "threads"),
        ("postgresql", "threads"),
        ("sqlite", "daemons"),
        ("postgresql", "daemons"),
        ("postgresql", "feed"),
        ("sqlite", "exit in a thread"),
    ],
    indirect=["url"],
)
def test_the_end_of_the_interpreter_closes_the_client(url: str, end: str) -> None:
    """A program that never closes its client ends, without a warning, and loses no incident."""
    code, out, errors = run(ENDING, url, end, options=("-X", "dev"))
    assert code == 0, errors
    assert not [word for word in WARNINGS if word in errors], errors
    told = {int(line) for line in out.split()}
    assert told
    with SyncIncidentClient.open(url) as incidents:
        stored = {incident.incident_id for incident in incidents.iterate()}
    assert told <= stored
    if end == "threads" and url.startswith("postgresql"):
        assert len(told) == 15


def test_the_end_of_the_interpreter_ends_the_connections(migrated_postgres_url: str) -> None:
    """The server sees no lost connection: each one is closed properly."""
    code, _, errors = run(ENDING, migrated_postgres_url, "exit", options=("-X", "dev"))
    assert code == 5, errors
    assert not [word for word in WARNINGS if word in errors], errors
    with psycopg.connect(migrated_postgres_url) as connection:
        ((abandoned,),) = connection.execute(
            "SELECT sessions_abandoned FROM pg_stat_database WHERE datname = current_database()"
        ).fetchall()
    assert abandoned == 0

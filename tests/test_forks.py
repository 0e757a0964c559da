"""After a fork the parent's client goes on, and the child's says to connect again."""

from __future__ import annotations

import json
import os
import sys
from itertools import product
from pathlib import Path
from typing import Final

import pytest

from incidentkit import IncidentClient, WrongEventLoop, affinity
from tests.programs import open_connections, outcome, start

PROGRAM: Final = '''\
import asyncio, gc, json, multiprocessing, os, sys, time
import uvloop
from incidentkit import IncidentClient, IncidentKitError

url, redis_url, loop, fork, child_does = sys.argv[1:]
factory = uvloop.new_event_loop if loop == "uvloop" else asyncio.new_event_loop
client = IncidentClient.open(url, redis_url or None)


async def use():
    """Write and read; each write is sent only once, so that a dead connection is noticed."""
    async with asyncio.timeout(30):
        for _ in range(3):
            incident = await client.create("Disk is full", source="operator")
            await client.update_status(incident.incident_id, "completed")
            await client.list()
        await client.check()
        while client.cache_available is False:
            # A page may have been on its way to Redis while the event loop was not running.
            await asyncio.sleep(0.05)
            await client.check()
    return True


async def try_verbs():
    told = []
    for verb in (client.list, client.check, client.read_changes, use):
        try:
            await verb()
        except IncidentKitError as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


async def connect_again():
    async with client:
        return await use()


def child(runner=None):
    global client
    if child_does == "verbs":
        answer = asyncio.run(try_verbs())
    elif child_does == "inherited loop":
        answer = runner.run(try_verbs())
    elif child_does == "close":
        answer = asyncio.run(client.close())
    elif child_does == "connect":
        answer = asyncio.run(connect_again())
    elif child_does == "forget":
        client = None
        answer = gc.collect() and None
    else:
        answer = None
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


async def fork_while_running():
    await client.connect()
    await use()
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    await asyncio.to_thread(process.join, 30)
    code = process.exitcode
    if code is None:
        process.kill()
    answer = [code, await use()]
    await client.close()
    return answer


runner = asyncio.Runner(loop_factory=factory)
if fork == "running":
    answer = runner.run(fork_while_running())
else:
    runner.run(client.connect())
    runner.run(use())
    pid = os.fork()
    if not pid:
        # Ends as any program does, with its finalizers, but for the event loop of the parent.
        child(runner)
        sys.exit()
    code = wait_for(pid)
    answer = [code, runner.run(use())]
    runner.run(client.close())
with open("parent.json", "w") as file:
    json.dump(answer, file)
runner.close()
'''
"""Forks with an open client, and writes what the parent and the child found to files.

The deadlines only end a program that hangs.
"""

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork"),
    pytest.mark.unmeasured,
]

CHILDREN: Final = ("close", "connect", "forget", "end")
LOOPS: Final = ("asyncio", "uvloop")
FORKS: Final = ("running", "between")


def run(url: str, redis_url: str, *how: str) -> tuple[object, object]:
    """Return what the parent and the child found."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    program = start(url, redis_url, *how, program=("-W", "ignore", "-c", PROGRAM), env=environment)
    code, _, errors = outcome(program)
    assert code == 0, errors
    parent, child = (json.loads(Path(f"{who}.json").read_text()) for who in ("parent", "child"))
    return parent, child


MIGRATING: Final = """\
import asyncio, os, sys, threading, time
from incidentkit.store import migrate

migrating, forked = threading.Event(), threading.Event()


def work(connection):
    migrating.set()
    forked.wait(30)


threading.Thread(target=lambda: asyncio.run(migrate.run(sys.argv[1], work))).start()
migrating.wait(30)
pid = os.fork()
if not pid:
    asyncio.run(migrate.check(sys.argv[1]))
    os._exit(0)
for _ in range(3000):
    ended, status = os.waitpid(pid, os.WNOHANG)
    if ended:
        break
    time.sleep(0.01)
else:
    os.kill(pid, 9)
    os.waitpid(pid, 0)
forked.set()
sys.exit(0 if ended and status == 0 else "the child hangs or has failed")
"""
"""Forks while another thread migrates."""


def test_a_process_that_is_forked_during_a_migration_can_migrate(
    migrated_sqlite_url: str, migrated_postgres_url: str
) -> None:
    """A migration of the parent, which does not run in the child, does not block the child's."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for url in (migrated_sqlite_url, migrated_postgres_url):
        program = start(url, program=("-W", "ignore", "-c", MIGRATING), env=environment)
        code, _, errors = outcome(program)
        assert code == 0, errors


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("fork", FORKS)
def test_verbs_in_a_forked_process_are_refused(url: str, loop: str, fork: str) -> None:
    """In the child every verb raises WrongEventLoop with the remedy; the parent's client works."""
    parent, told = run(url, "", loop, fork, "verbs")
    assert parent == [0, True]
    assert isinstance(told, list)
    assert len(told) == 4
    assert all("WrongEventLoop" in each and "connect it after the fork" in each for each in told)


@pytest.mark.parametrize("loop", LOOPS)
def test_the_parents_event_loop_is_refused_in_a_forked_process(url: str, loop: str) -> None:
    """Verbs are refused in the child even on the inherited event loop."""
    parent, told = run(url, "", loop, "between", "inherited loop")
    assert isinstance(told, list)
    assert len(told) == 4
    assert all("connect it after the fork" in each for each in told)
    assert isinstance(parent, list)
    assert parent[0] == 0


@pytest.mark.parametrize(
    ("url", "loop", "fork", "child_does"),
    [
        # Half of all combinations: each event loop meets every fork and every child.
        (url, loop, fork, child_does)
        for place, (fork, child_does) in enumerate(product(FORKS, CHILDREN))
        for url, loop in product(("sqlite", "postgresql"), LOOPS)
        if (url == "sqlite") == (loop == LOOPS[(place + place // len(CHILDREN)) % 2])
    ],
    indirect=["url"],
)
def test_a_forked_process_does_not_harm_its_parent(
    url: str, redis_url: str, loop: str, fork: str, child_does: str
) -> None:
    """No use of the client's copy in the child affects the parent's connections.

    A child that connects the client can use it.
    """
    parent, answer = run(url, redis_url, loop, fork, child_does)
    assert parent == [0, True]
    assert answer is (True if child_does == "connect" else None)


async def test_a_forked_process_keeps_no_connection(
    migrated_postgres_url: str, redis_url: str
) -> None:
    """At the fork the child is disconnected from every server, before any other code of it runs."""
    before = open_connections()
    client = IncidentClient.open(migrated_postgres_url, redis_url)
    await client.connect()
    await client.list()
    await client.check()
    assert len(open_connections() - before) >= 2
    # What os.fork() calls in the child.
    affinity._fork_all()
    assert open_connections() == before
    with pytest.raises(WrongEventLoop, match="connect it after the fork"):
        await client.list()
    await client.close()


async def test_a_failure_at_the_fork_leaves_no_other_client_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every client is disconnected, even if disconnecting one of them fails."""
    clients = [affinity.Affinity() for _ in range(3)]
    disconnected = []

    def fail() -> None:
        disconnected.append(True)
        raise OSError("Too many open files")

    for each in clients:
        each.on_fork = fail
    monkeypatch.setattr(affinity, "_affinities", clients)
    # What os.fork() calls in the child, which only prints the error.
    with pytest.raises(OSError, match="Too many"):
        affinity._fork_all()
    assert disconnected == [True] * 3
    assert all(each.forked for each in clients)

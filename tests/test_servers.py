"""The test servers start, stop, crash and freeze as the fault tests need."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import asyncpg
import psutil
import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from tests.servers import (
    HOST,
    PostgresServer,
    RedisCluster,
    RedisSentinel,
    RedisServer,
    Server,
    ServerError,
)

both = pytest.mark.parametrize("kind", [PostgresServer, RedisServer])


async def _write(server: Server) -> None:
    if isinstance(server, PostgresServer):
        connection = await asyncpg.connect(server.url)
        await connection.execute("CREATE TABLE kept AS SELECT 'here' AS value")
        await connection.close()
    else:
        async with Redis.from_url(server.url) as client:
            await client.set("kept", "here")


async def _read(server: Server) -> str:
    if isinstance(server, PostgresServer):
        connection = await asyncpg.connect(server.url, timeout=1)
        value = await connection.fetchval("SELECT value FROM kept")
        await connection.close()
        return str(value)
    async with Redis.from_url(server.url, socket_timeout=1, decode_responses=True) as client:
        return str(await client.get("kept"))


def _children() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@both
async def test_data_outlives_a_crash_and_a_restart(kind: type[Server]) -> None:
    """Written data survives a kill and a restart of the server."""
    with kind() as server:
        await _write(server)
        server.kill()
        with pytest.raises((OSError, RedisError)):
            await _read(server)
        server.start()
        assert await _read(server) == "here"
        server.restart()
        assert await _read(server) == "here"


@both
async def test_a_paused_server_is_silent_until_it_is_resumed(kind: type[Server]) -> None:
    """A paused server accepts connections without answering, and continues once resumed."""
    with kind() as server:
        await _write(server)
        server.pause()
        with pytest.raises((TimeoutError, RedisTimeoutError)):
            await _read(server)
        server.resume()
        assert await _read(server) == "here"


@both
def test_nothing_is_left_after_a_server_was_closed(kind: type[Server]) -> None:
    """Leaving the `with` block ends every process of the server, even if it is paused."""
    others = _children()
    with kind() as server:
        pids = _children() - others
        assert {process.pid for process in server.processes()} & pids
        server.pause()
    assert not [pid for pid in pids if _runs(pid)]
    assert not server.processes()


@pytest.mark.parametrize("kind", [RedisCluster, RedisSentinel])
def test_nothing_is_left_of_servers_that_work_together(
    kind: type[RedisCluster | RedisSentinel],
) -> None:
    """Leaving the `with` block ends every server, even a paused one, and removes its folder."""
    others = _children()
    with kind() as group:
        pids = _children() - others
        folders = [server.folder for server in group.servers]
        assert len(folders) == 3
        assert all(folder and folder.exists() for folder in folders)
        group.servers[0].kill()
        group.servers[1].pause()
    assert not [pid for pid in pids if _runs(pid)]
    assert not [folder for folder in folders if folder and folder.exists()]


def test_nothing_is_left_of_servers_that_do_not_work_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Servers that cannot form a cluster are ended."""

    def give_up(_condition: object) -> None:
        raise ServerError

    others = _children()
    monkeypatch.setattr("tests.servers._wait_until", give_up)
    with pytest.raises(ServerError), RedisCluster():
        pass
    assert _children() == others


@both
@pytest.mark.parametrize("paused", [False, True])
def test_nothing_is_left_after_the_tests_were_killed(
    kind: type[Server],
    paused: bool,
) -> None:
    """A server and its folder do not outlive a killed process that started it."""
    program = f"""
import signal
from tests.servers import {kind.__name__}
server = {kind.__name__}()
server.start()
if {paused}:
    server.pause()
print(server.folder, *(process.pid for process in server.processes()), flush=True)
signal.pause()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        text=True,
    ) as tests:
        assert tests.stdout is not None
        started = tests.stdout.readline()
        tests.kill()
    folder, *pids = started.split()
    assert pids
    deadline = time.monotonic() + 10
    while any(_runs(int(pid)) for pid in pids) or Path(folder).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@both
def test_a_server_that_cannot_start_shows_its_log(kind: type[Server]) -> None:
    """The error for a port in use contains the log of the server."""
    server = kind()
    taken = socket.create_server((HOST, server.port))
    with taken, pytest.raises(ServerError, match=r"[Aa]ddress already in use"):
        server.start()
    server.close()

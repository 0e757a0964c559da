"""The compared services, each a process with one worker, and the load on them."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil

from benchmarks.rounds import Round
from tests.servers import HOST, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tests.servers import Server

ROOT: Final = Path(__file__).parents[1]
CONNECTIONS: Final = 32
POOL: Final = 20
UVICORN: Final = ("--loop", "uvloop", "--http", "httptools", "--no-access-log")


class Service:
    """A running service.

    Attributes:
        url: Its address.
        servers: The servers that it uses; their CPU time is measured too.
        changes: Status changes requested so far.
    """

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self.url = url
        self.servers: Sequence[Server] = ()
        self.changes = 0
        self._process = psutil.Process(process.pid)

    def cpu(self) -> float:
        """Return the CPU seconds used so far."""
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def peak(self) -> int:
        """Return the peak resident memory, in bytes."""
        status = Path(f"/proc/{self._process.pid}/status").read_text("ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    def memory(self) -> int:
        """Return the resident memory, in bytes."""
        return int(self._process.memory_info().rss)

    async def load(self, scenario: str, incidents: int, seconds: float, seed: int) -> Round:
        """Send requests from a separate process, each connection as fast as it gets answers."""
        changing = scenario in ("update", "mixed", "list_uncached", "deep_changed")
        if changing:
            seed = self.changes
        before = [self.cpu(), *map(cpu_of, self.servers)]
        report = await _run_load(self.url, scenario, incidents, seconds, seed)
        after = [self.cpu(), *map(cpu_of, self.servers)]
        cpu, *servers = (
            (end - start) / report["seconds"] for start, end in zip(before, after, strict=True)
        )
        self.changes += report["changes"]
        latency = {percent: report[f"p{percent}"] for percent in (50, 95, 99)}
        rate = report["requests"] / report["seconds"]
        return Round(rate, latency, cpu, report["errors"], servers)


def cpu_of(server: Server) -> float:
    """Return the CPU seconds that all processes of a server have used."""
    main, *others = (process.cpu_times() for process in server.processes())
    ended = main.children_user + main.children_system
    return ended + sum(times.user + times.system for times in (main, *others))


def memory_of(server: Server) -> int:
    """Return the memory of all processes of a server, in bytes, counting shared pages once."""
    return sum(process.memory_full_info().pss for process in server.processes())


def load_program() -> str:
    """Return the program that makes the load."""
    return "wrk" if shutil.which("wrk") else "benchmarks/load.py"


async def _run_load(
    url: str, scenario: str, incidents: int, seconds: float, seed: int
) -> dict[str, Any]:
    arguments = [scenario, str(incidents), str(seed)]
    wrk = shutil.which("wrk")
    command = (
        [
            *(wrk, "-t1", f"-c{CONNECTIONS}", f"-d{seconds:.0f}s", "--timeout", "30s"),
            *("-s", str(ROOT / "benchmarks" / "load.lua"), url, "--", *arguments),
        ]
        if wrk and seconds >= 1
        else [
            *(sys.executable, "-m", "benchmarks.load", url, str(CONNECTIONS), str(seconds)),
            *arguments,
        ]
    )
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=subprocess.PIPE)
    output, _ = await process.communicate()
    report: dict[str, Any] = json.loads(output.splitlines()[-1])
    return report


@contextmanager
def ours(database: str, redis: str | None, log: Path, checkout: Path = ROOT) -> Iterator[Service]:
    """Run `incidentkit serve` from a checkout, with every default but the size of the pool."""
    environment = {"INCIDENTKIT_DATABASE_URL": database}
    if redis is not None:
        environment["INCIDENTKIT_REDIS_URL"] = redis
    if database.startswith("postgresql"):
        environment |= {"DB_POOL_SIZE": str(POOL), "DB_MAX_OVERFLOW": "0"}
    with _running(("-m", "incidentkit", "serve"), environment, log, checkout) as service:
        yield service


@contextmanager
def plain(database: str, redis: str | None, log: Path) -> Iterator[Service]:
    """Run the rival `plain`."""
    database = database.replace("postgresql://", "postgresql+asyncpg://")
    environment = {"PLAIN_DATABASE": database}
    if redis is not None:
        environment["PLAIN_REDIS"] = redis
    command = ("-m", "uvicorn", "benchmarks.plain:app", *UVICORN)
    with _running(command, environment, log) as service:
        yield service


@contextmanager
def floor(database: str, log: Path) -> Iterator[Service]:
    """Run the rival `floor`."""
    command = ("-m", "uvicorn", "benchmarks.floor:app", *UVICORN)
    with _running(command, {"FLOOR_DATABASE": database}, log) as service:
        yield service


@contextmanager
def _running(
    command: tuple[str, ...], environment: Mapping[str, str], log: Path, folder: Path = ROOT
) -> Iterator[Service]:
    port = free_port()
    url = f"http://{HOST}:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command, "--port", str(port)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder), **environment},
            stdout=output,
            stderr=output,
        )
    try:
        _await(url, process, log)
        yield Service(process, url)
    finally:
        process.terminate()
        process.wait()


def _await(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    while True:
        try:
            with urllib.request.urlopen(f"{url}/incident/get?limit=1", timeout=5):  # noqa: S310
                return
        except (urllib.error.URLError, ConnectionError):
            if process.poll() is not None:
                raise RuntimeError(log.read_text("utf-8", "replace")[-2000:]) from None

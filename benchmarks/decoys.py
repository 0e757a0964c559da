"""Measures quick calls beside a crowd, and beside the same crowd at a decoy.

A crowd keeps a service busy while the latency of quick calls is measured: once with the crowd at
the same service, and once with the crowd at a decoy, a service with a database of its own. The
cores are as busy either way, so that a difference is the time that a call waits in the service.
"""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
import time
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from benchmarks import services
from benchmarks.crowd import HOT
from benchmarks.results import Result, at_most
from benchmarks.rounds import VoidRoundError, percentiles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

TIMES: Final = 3.0
MORE: Final = 10.0
AGAINST: Final = "3 times the p99 beside a decoy, or 10 ms more"
"""What is allowed: the larger of both."""

SETTLE: Final = 1.0
"""Seconds from the start of a crowd to the first measured call."""

NUMBERS: Final = itertools.count(HOT + 1)


def _create() -> str:
    return "POST /incident/create"


QUICK: Final[dict[str, Callable[[], str]]] = {
    "get": lambda: f"GET /incident/get/{next(NUMBERS) % 1000 + 2}",
    "list, cached": lambda: "GET /incident/get?page=1&limit=10",
    "create": _create,
}
BODY: Final = b'{"incident_message": "Line to the warehouse is down", "source": "partner"}'


@contextmanager
def crowd(module: str, url: str, kind: str, *numbers: int) -> Iterator[None]:
    """Keep a service busy from another process."""
    arguments = ("-m", module, url, kind, *map(str, numbers))
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=services.ROOT, stdin=subprocess.PIPE
    )
    try:
        yield
    finally:
        process.communicate()


async def measure(
    url: str,
    calls: Mapping[str, Callable[[], str]],
    crowds: Sequence[Callable[[], AbstractContextManager[None]]],
    rounds: int,
    seconds: float,
) -> dict[str, list[float]]:
    """Return the p99 of each call in milliseconds, beside each crowd: the median of the rounds."""
    found: dict[str, list[list[float]]] = {name: [[] for _ in crowds] for name in calls}
    for _ in range(rounds):
        for place, crowd in enumerate(crowds):
            with crowd():
                await asyncio.sleep(SETTLE)
                for name, call in calls.items():
                    times = await _times(url, name, call, seconds)
                    found[name][place].append(percentiles(times)[99])
    return {name: [median(each) for each in measured] for name, measured in found.items()}


def report(result: Result, beside: str, measured: Mapping[str, Sequence[float]]) -> None:
    """Add the row of a crowd: the call that comes closest to what is allowed, or exceeds it."""
    shares = {
        name: there / max(TIMES * decoy, decoy + MORE) for name, (there, decoy) in measured.items()
    }
    result.rows.append(at_most(f"p99 beside {beside}", AGAINST, 1, max(shares.values())))
    table = result.details.setdefault(
        "p99 of a call, in milliseconds",
        [["beside", "call", "there", "beside a decoy", "of what is allowed"]],
    )
    table += [
        [beside, name, f"{there:.1f}", f"{decoy:.1f}", f"{shares[name]:.2f}"]
        for name, (there, decoy) in measured.items()
    ]


async def _times(url: str, name: str, call: Callable[[], str], seconds: float) -> list[float]:
    """Return the seconds that a call takes, made again and again by one caller."""
    reader, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)
    times: list[float] = []
    ends_at = time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < ends_at:  # noqa: PLR2004
        request = call()
        body = BODY if request.startswith("POST") else b""
        head = f"{request} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        kind = "Content-Type: application/json\r\n" if body else ""
        started = time.perf_counter()
        writer.write(f"{head}{kind}\r\n".encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = int(answer.lower().partition(b"content-length: ")[2].split()[0])
        await reader.readexactly(length)
        times.append(time.perf_counter() - started)
        status = int(answer.split(b" ", 2)[1])
        if status >= 400:  # noqa: PLR2004
            raise VoidRoundError(f"{name} was answered with {status}")
    writer.close()
    return times

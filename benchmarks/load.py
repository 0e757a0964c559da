"""Makes the load where wrk is missing: `python -m benchmarks.load URL CONNECTIONS SECONDS ...`.

It sends the same requests as `load.lua` and prints the same line, but uses more CPU time.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from benchmarks.rounds import percentiles

if TYPE_CHECKING:
    from collections.abc import Callable

STATUSES: Final = ("new", "completed", "failed")
SOURCES: Final = ("operator", "monitoring", "partner")
FIRST_ERROR: Final = 400


class Load:
    """The requests of a scenario, one after the other.

    Args:
        scenario: The name of the scenario.
        incidents: Incidents in the database.
        seed: Where the sequence of requests begins.
    """

    def __init__(self, scenario: str, incidents: int, seed: int) -> None:
        self._incidents = incidents
        self._seed = seed
        self._sent = 0
        self.changes = 0
        self._random = random.Random(seed)  # noqa: S311
        self._request: Callable[[], bytes] = getattr(self, f"_{scenario}")

    def request(self) -> bytes:
        """Return the next request."""
        self._sent += 1
        return self._request()

    def _fixed(self) -> bytes:
        return _get("/fixed")

    def _list_cached(self) -> bytes:
        return _get("/incident/get?page=1&limit=10")

    def _list_uncached(self) -> bytes:
        turn = (self._sent - 1) % 5121
        if turn == 0:
            return self._update()
        mixed = turn * 1999 % 5120
        path = f"/incident/get?page={mixed % 20 + 1}&limit={mixed // 20 % 16 + 10}"
        by_status, by_source = mixed // 320 % 4, mixed // 320 // 4
        if by_status:
            path += f"&status={STATUSES[by_status - 1]}"
        if by_source:
            path += f"&source={SOURCES[by_source - 1]}"
        return _get(path)

    def _get(self) -> bytes:
        return _get(f"/incident/get/{self._random.randint(1, self._incidents)}")

    def _create(self) -> bytes:
        body = json.dumps(
            {
                "incident_message": f"Disk {self._sent} of db {self._seed} is full",
                "source": SOURCES[self._sent % 3],
            }
        ).encode()
        head = (
            "POST /incident/create HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    def _update(self) -> bytes:
        turn = self._seed + self.changes
        self.changes += 1
        incident_id = turn % self._incidents + 1
        status = STATUSES[1 + (turn // self._incidents + (incident_id % 3 == 1)) % 2]
        path = f"/incident/update-status?incident_id={incident_id}&status={status}"
        return f"PATCH {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()

    def _mixed(self) -> bytes:
        return self._update() if self._sent % 20 == 0 else self._list_cached()

    def _deep(self) -> bytes:
        return _get(f"/incident/get?page={50_000 + self._seed + self._sent}&limit=10")

    def _deep_changed(self) -> bytes:
        return self._update() if self._sent % 2 else self._deep()


def _get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


async def run(url: str, connections: int, seconds: float, load: Load) -> dict[str, float]:
    """Keep connections busy for some seconds, and return the figures."""
    host, port = urlsplit(url).hostname, urlsplit(url).port
    ends_at = time.perf_counter() + seconds
    times: list[float] = []
    errors = 0

    async def connection() -> None:
        nonlocal errors
        reader, writer = await asyncio.open_connection(host, port)
        # At least one request, even if the time is over before all are connected.
        while True:
            started = time.perf_counter()
            writer.write(load.request())
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split()[0])
            await reader.readexactly(length)
            times.append(time.perf_counter() - started)
            errors += int(head.split(b" ", 2)[1]) >= FIRST_ERROR
            if time.perf_counter() >= ends_at:
                break
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(connection() for _ in range(connections)))
    return {
        "requests": len(times),
        "changes": load.changes,
        "seconds": time.perf_counter() - started,
        "errors": errors,
        **{f"p{percent}": value for percent, value in percentiles(times).items()},
    }


def main() -> None:
    """Read the command line, and run the load."""
    url, connections, seconds, scenario, incidents, seed = sys.argv[1:]
    load = Load(scenario, int(incidents), int(seed))
    print(json.dumps(asyncio.run(run(url, int(connections), float(seconds), load))))


if __name__ == "__main__":
    main()

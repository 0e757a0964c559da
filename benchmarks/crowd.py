"""Keeps a service busy until its input ends: `python -m benchmarks.crowd URL KIND CALLERS SIZE`.

Each caller sends one request after the other, whatever the answers are. `abandoned` closes its
connection before the answer comes.
"""

from __future__ import annotations

import asyncio
import random
import string
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Final
from urllib.parse import quote_plus, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable

WORDS: Final = quote_plus(" ".join((string.ascii_lowercase + string.digits)[:32]))
"""The words of a search that every index finds at great length: each begins thousands of others."""

PAUSE: Final = 0.05
"""Seconds from a refusal to the next request of a caller."""

HOT: Final = 1
"""The id of the incident that every caller wants to change."""


def requests(kind: str, incidents: int, choose: random.Random) -> Callable[[], bytes]:
    """Return a function that makes the requests of one kind."""
    kinds: dict[str, Callable[[], str]] = {
        "searches": lambda: f"GET /incident/search?text={WORDS}&total=true",
        "abandoned": lambda: f"GET /incident/search?text={WORDS}&total=true",
        "totals": lambda: "GET /incident/search?total=true",
        "deep": lambda: (
            f"GET /incident/get?page={choose.randint(incidents // 20, incidents // 10)}"
        ),
        "exports": lambda: "GET /incident/search?limit=1000&order=oldest",
        "histories": lambda: f"GET /incident/history/{HOT}",
        "changes": lambda: "GET /incident/changes?limit=1000",
        "hot": lambda: f"PATCH /incident/update-status?incident_id={HOT}&status=failed",
    }
    make = kinds[kind]

    def request() -> bytes:
        return f"{make()} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()

    return request


async def _answer(reader: asyncio.StreamReader) -> int:
    """Read an answer, and return its status."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split()[0])
    await reader.readexactly(length)
    return int(head.split(b" ", 2)[1])


async def _caller(
    url: str, request: Callable[[], bytes], patience: Callable[[], float | None]
) -> None:
    host, port = urlsplit(url).hostname, urlsplit(url).port
    while True:
        with suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                async with asyncio.timeout(patience()):
                    while True:
                        writer.write(request())
                        if await _answer(reader) >= 400:  # noqa: PLR2004
                            await asyncio.sleep(PAUSE)
            finally:
                writer.close()


async def run(url: str, kind: str, callers: int, incidents: int) -> None:
    """Keep the service busy until the input ends."""
    choose = random.Random(kind)  # noqa: S311
    request = requests(kind, incidents, choose)

    def patience() -> float | None:
        return choose.uniform(0.1, 0.3) if kind == "abandoned" else None

    tasks = [asyncio.ensure_future(_caller(url, request, patience)) for _ in range(callers)]
    await asyncio.to_thread(sys.stdin.read)
    for task in tasks:
        task.cancel()


def main() -> None:
    """Read the command line, and keep the service busy."""
    url, kind, callers, incidents = sys.argv[1:]
    asyncio.run(run(url, kind, int(callers), int(incidents)))


if __name__ == "__main__":
    main()

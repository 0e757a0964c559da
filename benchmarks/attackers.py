"""Misuses a service until its input ends: `python -m benchmarks.attackers URL KIND CONNECTIONS`.

Each attacker keeps one connection, and opens another one about a second after it was closed. Only
the attackers that do not read the answers send whole requests.
"""

from __future__ import annotations

import asyncio
import random
import socket
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter
    from collections.abc import Awaitable, Callable

PAUSE: Final = 1.0
"""Seconds from the end of a connection to the next one, and from one byte to the next."""

HEAD: Final = b"POST /incident/create HTTP/1.1\r\nHost: localhost\r\n"
BODY: Final = b"Content-Type: application/json\r\nContent-Length: 60000\r\n\r\n"
ENDLESS: Final = HEAD + b"X: " + b"a" * 100_000
LARGE: Final = b"GET /incident/get?limit=1000 HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def _silent(reader: StreamReader, _: StreamWriter) -> None:
    await reader.read()


async def _slow(reader: StreamReader, writer: StreamWriter) -> None:
    """Send a byte of a head or of a body a second."""
    writer.write(HEAD + random.choice((b"X: ", BODY)))  # noqa: S311
    while not reader.at_eof():
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(PAUSE)


async def _unread(reader: StreamReader, writer: StreamWriter) -> None:
    """Ask for a large page, and read nothing of it."""
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(LARGE)
    # A closed connection is noticed by the next write.
    while not reader.at_eof():
        await asyncio.sleep(PAUSE)
        writer.write(b"\r\n")
        await writer.drain()


async def _endless(reader: StreamReader, writer: StreamWriter) -> None:
    writer.write(ENDLESS)
    await reader.read()


KINDS: Final[dict[str, Callable[[StreamReader, StreamWriter], Awaitable[None]]]] = {
    "silent": _silent,
    "slow": _slow,
    "unread": _unread,
    "endless": _endless,
}


async def _connect(host: str, port: int) -> tuple[StreamReader, StreamWriter]:
    """Connect, with a small buffer for what is received."""
    connection = socket.socket()
    try:
        connection.setblocking(False)  # noqa: FBT003
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await asyncio.get_running_loop().sock_connect(connection, (host, port))
        return await asyncio.open_connection(sock=connection)
    except BaseException:
        connection.close()
        raise


async def _attacker(
    url: str, attack: Callable[[StreamReader, StreamWriter], Awaitable[None]]
) -> None:
    host, port = urlsplit(url).hostname, urlsplit(url).port
    # Not all at once.
    await asyncio.sleep(random.uniform(0, PAUSE))  # noqa: S311
    while True:
        with suppress(OSError):
            reader, writer = await _connect(str(host), port or 80)
            try:
                await attack(reader, writer)
            finally:
                writer.close()
        # Otherwise, one delay would make all of them return together.
        await asyncio.sleep(random.uniform(PAUSE / 2, PAUSE * 3 / 2))  # noqa: S311


async def run(url: str, kind: str, connections: int) -> None:
    """Misuse the service until the input ends; `mixed` is a quarter of each kind."""
    attacks = list(KINDS.values()) if kind == "mixed" else [KINDS[kind]]
    tasks = [
        asyncio.ensure_future(_attacker(url, attacks[number % len(attacks)]))
        for number in range(connections)
    ]
    await asyncio.to_thread(sys.stdin.read)
    for task in tasks:
        task.cancel()


def main() -> None:
    """Read the command line, and misuse the service."""
    url, kind, connections = sys.argv[1:]
    asyncio.run(run(url, kind, int(connections)))


if __name__ == "__main__":
    main()

"""Two processes for a test of the feed: one changes incidents, the other follows the changes.

``python -m tests.follower write URL FILE NAME`` records each acknowledged write until its standard
input ends. ``python -m tests.follower follow URL FILE`` records each change and resumes after the
last one in the file; the test kills it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import asyncpg

from incidentkit import (
    IncidentClient,
    IncidentStatus,
    StoreUnavailable,
)
from incidentkit.wire import encode_event

STATUSES = tuple(IncidentStatus)
INCIDENTS = 4
"""Number of incidents that all processes change."""

BETWEEN = 0.02
"""Seconds before a failed call is retried."""

AWAY = (
    OSError,
    StoreUnavailable,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)


async def connect(url: str) -> IncidentClient:
    """Return an open client; retry until the server answers."""
    client = IncidentClient.open(url)
    while True:
        with suppress(StoreUnavailable):
            await client.connect()
            return client
        await asyncio.sleep(BETWEEN)


async def write(url: str, file: int, name: str) -> None:
    """Write directly, and in transactions that began before other changes of the incidents."""
    client = await connect(url)
    ended = asyncio.ensure_future(asyncio.to_thread(sys.stdin.buffer.read))

    async def change(number: int) -> None:
        count = number
        while not ended.done():
            count += 1
            note = f"{name}-{number}-{count}"
            try:
                await client.note(count % INCIDENTS + 1, note)
                os.write(file, f"{note}\n".encode())
                await client.update_status((count + number) % INCIDENTS + 1, STATUSES[count % 3])
            except StoreUnavailable:
                await asyncio.sleep(BETWEEN)

    async def join() -> None:
        count = 0
        while not ended.done():
            count += 1
            with suppress(*AWAY):
                connection = await asyncpg.connect(url)
                try:
                    async with connection.transaction():
                        await connection.fetchval("SELECT pg_current_xact_id()")
                        for incident_id in range(1, INCIDENTS + 1):
                            await client.note(incident_id, "beside an older transaction")
                        note = f"{name}-joined-{count}"
                        joined = client.join(connection)
                        await joined.note(1, note)
                        await joined.update_status(2, STATUSES[count % 3])
                finally:
                    await connection.close(timeout=1)
                os.write(file, f"{note}\n".encode())
            await asyncio.sleep(BETWEEN)

    await asyncio.gather(change(0), change(1), change(2), join())
    await client.close()


async def follow(url: str, file: int, after: str | None) -> None:
    """Record every change after a cursor."""
    client = await connect(url)
    async for change in client.changes(after):
        os.write(file, encode_event(change) + b"\n")


def last_cursor(path: Path) -> str | None:
    """Cut off an incomplete line, and return the cursor of the last change in the file, if any."""
    noted = path.read_bytes()
    noted = noted[: noted.rfind(b"\n") + 1]
    path.write_bytes(noted)
    return str(json.loads(noted.splitlines()[-1])["cursor"]) if noted else None


def main(role: str, url: str, path: str, *name: str) -> None:
    """Run the writer or the follower."""
    with Path(path).open("ab", buffering=0) as file:
        if role == "follow":
            asyncio.run(follow(url, file.fileno(), last_cursor(Path(path))))
        else:
            asyncio.run(write(url, file.fileno(), *name))


if __name__ == "__main__":
    main(*sys.argv[1:])

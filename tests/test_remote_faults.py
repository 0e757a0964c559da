"""A client of a service whose connections are cut, and which is killed and restarted.

`INCIDENTKIT_TEST_FAULTS` runs the full form: a thousand creates, and twenty restarts.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from contextlib import ExitStack, aclosing
from typing import TYPE_CHECKING, Any, Final

import pytest

from incidentkit import EventKind, IncidentClient, RemoteOptions
from tests.cutting import CuttingProxy
from tests.hosts import run_sql
from tests.programs import Service, service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.unmeasured

FULL: Final = "INCIDENTKIT_TEST_FAULTS" in os.environ
CREATES: Final = 1000 if FULL else 100
KILLS: Final = 5 if FULL else 1
RESTARTS: Final = 20 if FULL else 1
CALLERS: Final = 10

PATIENT: Final = RemoteOptions(deadline=60, attempts=100, read_timeout=10)
"""Waits for a service that is restarted."""


class Restarted:
    """A service on a database, behind a proxy, that can be killed and started again."""

    def __init__(self, database_url: str, proxy: CuttingProxy, folder: Path) -> None:
        self._url = database_url
        self._proxy = proxy
        self._folder = folder
        self._running = ExitStack()
        self._service: Service | None = None
        self._starts = 0

    async def start(self) -> None:
        """Start the service."""
        self._starts += 1
        log = self._folder / f"{self._starts}.log"
        env = {**os.environ, "INCIDENTKIT_DATABASE_URL": self._url}
        running = service(log, env=env)
        self._service = await asyncio.to_thread(self._running.enter_context, running)
        self._proxy.target = int(self._service.url.rpartition(":")[2])

    async def kill(self) -> None:
        """Kill the service without a warning."""
        assert self._service is not None
        self._proxy.target = None
        await asyncio.to_thread(self._service.end, signal.SIGKILL)

    def close(self) -> None:
        """End the service."""
        self._running.close()


@pytest.fixture
async def proxy() -> AsyncIterator[CuttingProxy]:
    """A proxy that cuts the connection after about every twentieth request."""
    async with CuttingProxy(rate=0.05).listening() as proxy:
        yield proxy


@pytest.fixture
async def restarted(
    migrated_postgres_url: str, proxy: CuttingProxy, tmp_path: Path
) -> AsyncIterator[Restarted]:
    """A running service on PostgreSQL behind the proxy."""
    restarted = Restarted(migrated_postgres_url, proxy, tmp_path)
    await restarted.start()
    yield restarted
    await asyncio.to_thread(restarted.close)


async def test_cut_connections_and_kills_store_each_write_once(
    restarted: Restarted, proxy: CuttingProxy, migrated_postgres_url: str
) -> None:
    """Each create, change and note takes effect once, whenever its connection or service ends."""
    numbers = iter(range(CREATES))
    done: list[int] = []
    due = asyncio.Semaphore(0)

    async def report(incidents: IncidentClient) -> None:
        for number in numbers:
            created = await incidents.create(f"Disk {number} is full", source="monitoring")
            assert created.incident_message == f"Disk {number} is full"
            if number % 5 == 0:
                changed = await incidents.update_status(
                    created.incident_id, "completed", expected_version=created.tag
                )
                assert changed.version == 2
                await incidents.note(created.incident_id, f"It was disk {number}")
            done.append(number)
            if len(done) % (CREATES // (KILLS + 1)) == 0:
                due.release()

    async def disturb() -> None:
        for _ in range(KILLS):
            await due.acquire()
            await restarted.kill()
            await restarted.start()

    async with IncidentClient.open(proxy.url, remote=PATIENT) as incidents:
        await asyncio.gather(disturb(), *(report(incidents) for _ in range(CALLERS)))
    assert proxy.cuts > 0
    assert sorted(done) == list(range(CREATES))
    rows = await run_sql(migrated_postgres_url, 'SELECT incident_message FROM "Incident"')
    assert Counter(rows) == Counter((f"Disk {n} is full",) for n in range(CREATES))
    events = await run_sql(
        migrated_postgres_url, "SELECT kind, count(*) FROM incident_event GROUP BY kind"
    )
    fifth = CREATES // 5
    assert dict(events) == {"created": CREATES, "status_changed": fifth, "noted": fifth}


async def test_a_follower_gets_each_change_once_over_restarts(
    restarted: Restarted, proxy: CuttingProxy
) -> None:
    """A follower that began at `latest` gets each change once, in order."""
    seen: list[int] = []
    expected: list[int] = []
    started = asyncio.Event()

    async def follow() -> None:
        async with IncidentClient.open(proxy.url, remote=PATIENT) as incidents:
            after = (await incidents.read_changes("latest")).next
            started.set()
            changes: Any = incidents.changes(after)
            async with aclosing(changes):
                async for change in changes:
                    assert change.kind is EventKind.CREATED
                    seen.append(change.incident_id)
                    if len(seen) == 5 * (RESTARTS + 1):
                        return

    async def create(incidents: IncidentClient) -> None:
        for _ in range(5):
            created = await incidents.create("Disk is full", source="monitoring")
            expected.append(created.incident_id)

    following = asyncio.ensure_future(follow())
    async with asyncio.timeout(240), IncidentClient.open(proxy.url, remote=PATIENT) as incidents:
        await started.wait()
        for _ in range(RESTARTS):
            await create(incidents)
            await restarted.kill()
            await restarted.start()
        await create(incidents)
        await following
    assert seen == expected

"""Measures whether slow, silent and hostile connections hold up good clients."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import asyncpg

from benchmarks import services
from benchmarks.databases import create_database
from benchmarks.decoys import QUICK, crowd, measure, report
from benchmarks.results import Result
from incidentkit.store.migrate import upgrade
from tests.servers import PostgresServer

INCIDENTS: Final = 2_000

KINDS: Final = {
    "silent": "{} connections that send nothing",
    "slow": "{} connections that send a byte of a request a second",
    "unread": "{} connections that ask for 1,000 incidents and read nothing",
    "endless": "{} connections that send headers without an end",
    "mixed": "{} connections, a quarter of each kind",
}

FILL: Final = (
    'INSERT INTO "Incident" (incident_message, incident_type, source, created_at) '
    "SELECT 'Disk is full on db ' || i, 'new', 'partner', now() FROM generate_series(1, $1) AS i"
)


async def _fill(url: str) -> None:
    await upgrade(url)
    connection = await asyncpg.connect(url)
    await connection.execute(FILL, INCIDENTS)
    await connection.close()


async def run(*, rounds: int, seconds: float, connections: int) -> Result:
    """Measure quick calls beside every kind of attackers.

    Args:
        rounds: Measurements of each call beside each kind, and beside the same at a decoy.
        seconds: Length of one.
        connections: Connections of the attackers.
    """
    result = Result([], rounds=f"{rounds} rounds of {seconds:g} seconds for each call, interleaved")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        server = stack.enter_context(PostgresServer(durable=True))
        sides = []
        for name in ("a", "b"):
            url = await create_database(server.url, name)
            await _fill(url)
            sides.append(stack.enter_context(services.ours(url, None, folder / f"{name}.log")))
        for kind, what in KINDS.items():
            crowds = [
                partial(crowd, "benchmarks.attackers", side.url, kind, connections)
                for side in sides
            ]
            measured = await measure(sides[0].url, QUICK, crowds, rounds, seconds)
            report(result, what.format(f"{connections:,}"), measured)
    return result


def start(*, quick: bool, seconds: float | None = None, connections: int | None = None) -> Result:
    """Measure, in a short run with few connections or in a long one."""
    return asyncio.run(
        run(
            rounds=1 if quick else 3,
            seconds=seconds or (0.5 if quick else 2.0),
            connections=connections or (100 if quick else 1_000),
        )
    )

"""Run the work of a command on its database, until it is done or interrupted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from threading import Timer
from typing import Any, Final, TypeAlias, TypeVar

import click

from incidentkit.cli.interrupts import INTERRUPTED, interrupts
from incidentkit.cli.options import Servers
from incidentkit.client import IncidentClient
from incidentkit.domain.errors import ClientClosed
from incidentkit.opening import check_exists
from incidentkit.store.database import DEFAULT_DATABASE_URL

PATIENCE: Final = 1.0
"""Seconds that an interrupted command has to close its connections."""

_T = TypeVar("_T")
Work: TypeAlias = Callable[[IncidentClient], Awaitable[_T]]


def run(servers: Servers, work: Work[_T], *, creates: bool = False) -> _T:
    """Return the result of work that changes incidents, on an open client.

    Args:
        servers: The servers of the client.
        work: Calls the client at once. It is first called with a client that is not open, so that
            faulty arguments are reported before a database is opened or created.
        creates: Whether to create an SQLite file that does not exist.

    Raises:
        StoreError: If the file does not exist.
        SchemaOutOfDate: If the file has no incidents.
    """

    async def on_client() -> _T:
        incidents = IncidentClient.from_settings(servers.settings)
        with suppress(ClientClosed):
            return await work(incidents)
        if not creates:
            check_exists(servers.settings.database_url, with_schema=True)
        async with incidents:
            return await work(incidents)

    return run_coroutine(on_client())


def read(servers: Servers, work: Work[_T]) -> _T:
    """Return the result of work that only reads, on an open client; as :func:`run` otherwise."""

    async def named(incidents: IncidentClient) -> _T:
        if incidents.connected:
            name_default(servers)
        return await work(incidents)

    return run(servers, named)


def name_default(servers: Servers) -> None:
    """Say on stderr which database a command reads, if it is the default one."""
    if servers.is_default:
        file = DEFAULT_DATABASE_URL.rpartition("/")[2]
        click.echo(f"Reading {file} in the current folder, the default database.", err=True)


def run_coroutine(work: Coroutine[Any, Any, _T]) -> _T:
    """Return the result of a coroutine.

    Raises:
        Exit: If an interrupt cancelled it.
    """
    try:
        result = asyncio.run(_cancelled_by_interrupt(work))
    except BaseException as error:
        if not interrupts.received:
            raise
        # A cancelled command may fail in its own way.
        raise click.exceptions.Exit(INTERRUPTED) from error
    if interrupts.received:
        raise click.exceptions.Exit(INTERRUPTED)
    return result


async def _cancelled_by_interrupt(work: Coroutine[Any, Any, _T]) -> _T:
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work)

    def cancel() -> None:
        # It logs a connection that was just being opened.
        logging.getLogger("asyncio").disabled = True
        task.cancel()
        timer = Timer(PATIENCE, interrupts.end)
        timer.daemon = True
        timer.start()

    interrupts.cancel = lambda: loop.call_soon_threadsafe(cancel)
    try:
        return await task
    finally:
        interrupts.cancel = None

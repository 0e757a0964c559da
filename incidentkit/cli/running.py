"""Run a coroutine on an open client, for one command."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from incidentkit.client import IncidentClient
from incidentkit.settings import Settings

_T = TypeVar("_T")


def run(settings: Settings, work: Callable[[IncidentClient], Awaitable[_T]]) -> _T:
    """Open a client, and return the result of the work on it."""

    async def on_client() -> _T:
        async with IncidentClient.from_settings(settings) as incidents:
            return await work(incidents)

    return asyncio.run(on_client())

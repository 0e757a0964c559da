"""Stop the streams of an app and drop a connection, through hooks that ASGI does not have.

A server offers it as an ASGI extension, in the scope of each request::

    scope["extensions"]["incidentkit"] = {
        "stopping": asyncio.Event(), "abort": transport.abort, "log": log
    }

``stopping`` is set once the server begins to stop. ``abort()`` closes the connection at once and
drops all unsent data. ``log`` counts the records that the server could not write. Each of them is
optional; ``incidentkit serve`` has all. Without ``stopping``, a signal that stops the process takes
its place; without ``abort``, no connection is dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol, TypedDict

from starlette.types import Scope

from incidentkit.http.stop_signals import on_stop_signal

EXTENSION: Final = "incidentkit"

SETTLE: Final = 0.25
"""Seconds from a signal until it counts: by then the server takes no new requests."""


class ServerLog(Protocol):
    """The log of a server.

    Attributes:
        dropped: Records that this process could not write, since it started.
        failing: Whether records were dropped since the last one that was written.
    """

    dropped: int
    failing: bool


class ServerHooks(TypedDict, total=False):
    """The content of the extension."""

    stopping: asyncio.Event
    abort: Callable[[], None]
    log: ServerLog


async def wait_for_stop(scope: Scope) -> None:
    """Return once the request's server begins to stop."""
    stopping = _hooks(scope).get("stopping")
    if stopping is not None:
        await stopping.wait()
        return
    signalled = asyncio.Event()
    loop = asyncio.get_running_loop()

    def wake() -> None:
        # A closed event loop has nothing left to stop.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(signalled.set)

    with on_stop_signal(wake):
        await signalled.wait()
        # A reader that is ended now and reconnects at once must find the server closed.
        await asyncio.sleep(SETTLE)


def abort(scope: Scope) -> bool:
    """Drop the request's connection with all that is unsent, and return whether that is possible.

    ASGI has no message for this, and a stopping server waits even for a reader that reads nothing.
    """
    drop = _hooks(scope).get("abort")
    if drop is None:
        return False
    drop()
    return True


def server_log(scope: Scope) -> ServerLog | None:
    """Return the log of the request's server; None if the server has none to look at."""
    return _hooks(scope).get("log")


def _hooks(scope: Scope) -> ServerHooks:
    extensions = scope.get("extensions") or {}
    hooks: ServerHooks = extensions.get(EXTENSION, {})
    return hooks

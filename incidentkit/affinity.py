"""Bind open resources to the event loop and the process that opened them.

Connections, locks and waiting calls work only on the event loop that made them. A fork copies them
without their threads, and both processes share the sockets. An open store, client or turn therefore
keeps an :class:`Affinity`, and compares its loop with the running one before each call.
"""

from __future__ import annotations

import os
from asyncio import AbstractEventLoop
from asyncio import _get_running_loop as running_loop
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final, Protocol, runtime_checkable
from weakref import WeakSet

from incidentkit.domain.errors import WrongEventLoop

__all__ = [
    "Abandonable",
    "Affinity",
    "Severable",
    "check_loop_of",
    "check_running_loop",
    "keep",
    "running_loop",
    "sever",
]

NO_LOOP: Final = (
    "No asyncio event loop is running here: call incidentkit from a coroutine that asyncio runs; "
    "trio is not supported"
)
OTHER_LOOP: Final = (
    "The client was opened on another event loop: open a client in each asyncio.run(), or keep one "
    "loop for all calls with asyncio.Runner. In pytest-asyncio, give the client's fixture and its "
    "tests the same loop_scope"
)
OTHER_THREAD: Final = (
    "The client was opened on an event loop that runs in another thread: call it there with "
    "asyncio.run_coroutine_threadsafe(), or open a client in each thread"
)
OTHER_PROCESS: Final = (
    "The client was opened before this process was forked: connect it after the fork, in each "
    "process"
)

_FORKED: Final = object()
"""Stands for the event loop of the process that this one was forked from."""

_inherited: Final[list[object]] = []
"""Connections of that process, kept alive: their finalizers would end them for both processes."""


class Affinity:
    """The event loop, and the process, in which something is open.

    Attributes:
        loop: The event loop; compare it with :func:`running_loop`. In a process that was forked
            since, it equals no event loop.
        on_fork: Called in a forked process before any other code of it; it must not touch the event
            loop or a server. None: there is nothing to do.

    Raises:
        WrongEventLoop: If no asyncio event loop is running.
    """

    __slots__ = ("__weakref__", "loop", "on_fork")

    def __init__(self) -> None:
        self.loop: Any = check_running_loop()
        self.on_fork: Callable[[], object] | None = None
        _affinities.add(self)

    @property
    def here(self) -> bool:
        """Whether the event loop is the one that is running."""
        return running_loop() is self.loop

    @property
    def forked(self) -> bool:
        """Whether this process was forked from the one with the event loop."""
        return self.loop is _FORKED

    @property
    def ended(self) -> bool:
        """Whether the event loop can run no more in this process."""
        return self.forked or bool(self.loop.is_closed())

    def check_free(self) -> None:
        """Raise unless the event loop is the running one, or has ended.

        Raises:
            WrongEventLoop: If it may still be using what is open.
        """
        if not self.here and not self.ended:
            raise self.error()

    def error(self) -> WrongEventLoop:
        """Return the error for a call that is not made on the event loop."""
        if self.forked:
            return WrongEventLoop(OTHER_PROCESS)
        if running_loop() is None:
            return WrongEventLoop(NO_LOOP)
        return WrongEventLoop(OTHER_THREAD if self.loop.is_running() else OTHER_LOOP)

    def fork(self, releasing: ExitStack) -> None:
        """Note that this process was forked from the one with the event loop.

        Args:
            releasing: Gets :attr:`on_fork`, to call it once every affinity is marked.
        """
        if self.forked:
            return
        keep(self.loop)
        self.loop = _FORKED
        if self.on_fork is not None:
            releasing.callback(self.on_fork)


_affinities: Final[WeakSet[Affinity]] = WeakSet()


def _fork_all() -> None:
    # If one fails, as at the limit of open files, the others must still leave the parent.
    with ExitStack() as releasing:
        for affinity in list(_affinities):
            affinity.fork(releasing)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_fork_all)


@runtime_checkable
class Abandonable(Protocol):
    """A store or a cache that a client can leave behind on an event loop that has ended."""

    def abandon(self) -> None:
        """Release what is open without its event loop, which is closed or in another process.

        May block: the client calls it in a thread.
        """


@runtime_checkable
class Severable(Protocol):
    """A cache that can disconnect from what a parent process has open."""

    def sever(self) -> None:
        """Disconnect this process, without the event loop and without telling the server."""


def keep(inherited: object) -> None:
    """Keep an object of a parent process from being finalized while this process runs."""
    _inherited.append(inherited)


def check_running_loop() -> AbstractEventLoop:
    """Return the event loop that is running.

    Raises:
        WrongEventLoop: If it is not one of asyncio, or there is none.
    """
    loop = running_loop()
    if loop is None:
        raise WrongEventLoop(NO_LOOP)
    return loop


def check_loop_of(host: object, name: str) -> None:
    """Raise unless a connection or a pool of asyncpg belongs to the running event loop.

    Args:
        host: The connection or the pool; asyncpg has no public name for its loop.
        name: Its kind, for the error.

    Raises:
        WrongEventLoop: If it belongs to another one.
    """
    loop = getattr(host, "_loop", None)
    if loop is not None and loop is not running_loop():
        raise WrongEventLoop(
            f"The {name} belongs to another event loop: use it, and the client, on the event loop "
            f"that opened it"
        )


def sever(transport: Any) -> None:
    """Disconnect this process from the socket of a transport, without the event loop.

    The descriptor is replaced by one of the null device. What uses the transport later, such as a
    finalizer, then reaches neither the server nor the event loop of a parent process.

    Args:
        transport: A transport of any event loop; None: there is nothing to do.
    """
    socket = None if transport is None else transport.get_extra_info("socket")
    descriptor = -1 if socket is None else socket.fileno()
    if descriptor < 0:
        return
    null = os.open(os.devnull, os.O_RDWR)
    try:
        os.dup2(null, descriptor, inheritable=False)
    finally:
        os.close(null)

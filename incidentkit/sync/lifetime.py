"""Open and close the portal of a client, including after a fork and when the interpreter exits."""

from __future__ import annotations

import atexit
import os
from collections.abc import Coroutine
from contextlib import suppress
from threading import RLock
from typing import TYPE_CHECKING, Any, Final, TypeVar
from weakref import WeakSet, finalize

import incidentkit.sync as lazily
from incidentkit.domain.errors import ClientClosed, IncidentKitError

if TYPE_CHECKING:
    from incidentkit.client import IncidentClient
    from incidentkit.sync.portal import Portal

_T = TypeVar("_T")


class Lifetime:
    """The portal of a client, from connecting to closing.

    In a process that was forked meanwhile, the next call opens a new portal. A client that is still
    open when the interpreter exits, or when it is garbage-collected, is closed.

    Args:
        client: The asynchronous client, which runs on the portal.
    """

    def __init__(self, client: IncidentClient) -> None:
        self._client = client
        self._portal: Portal | None = None
        # The portal on which the client is being opened, or failed to open.
        self._opening: Portal | None = None
        # Whether a parent process had the client open.
        self._inherited = False
        # Held while the client opens or closes. Reentrant, since a signal handler may call it too.
        self._turn = RLock()
        self._end: Any = None
        _lifetimes.add(self)

    def is_open(self) -> bool:
        """Return whether the client is open, in this process."""
        return self._portal is not None and self._client.connected

    def connect(self) -> None:
        """Open the client; if it is already open, do nothing."""
        if self.is_open():
            return
        with self._turn:
            if self.is_open():
                return
            if self._portal is not None:
                # Closing was interrupted.
                self.close()
            if self._opening is not None:
                # Opening was interrupted, and so was closing the parts that were open.
                self._opening.close()
            portal = self._opening = lazily.Portal()
            try:
                portal.run(self._client.connect())
                self._end = finalize(self, _leave, portal, self._client)
                self._end.atexit = False
                self._portal = portal
                self._opening = None
                self._inherited = False
            except BaseException:
                if self._client.connected:
                    # Interrupted just after the client was opened.
                    with suppress(ClientClosed):
                        portal.run(self._client.close())
                portal.close()
                raise

    def run(self, call: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine of the client to completion.

        Raises:
            ClientClosed: If the client is not open.
            WrongEventLoop: If an event loop is running in this thread.
        """
        portal = self._portal
        if portal is None:
            try:
                portal = self._open_in_child()
            except BaseException:
                call.close()
                raise
        return portal.run(call)

    def _open_in_child(self) -> Portal:
        with self._turn:
            # Another thread may have been faster.
            if self._inherited:
                self.connect()
            if self._portal is None:
                raise ClientClosed
            return self._portal

    def close(self) -> None:
        """Wait for running writes, then release every connection; once closed, do nothing."""
        with self._turn:
            self._inherited = False
            portal = self._portal
            if portal is None:
                return
            # If this is interrupted, the next call closes what is still open.
            with suppress(ClientClosed):
                portal.run(self._client.close())
            portal.close()
            self._end.detach()
            self._portal = None

    def fork(self) -> None:
        """Leave everything open to the parent process; called in a newly forked process."""
        # It may have been held by a thread that does not exist in this process.
        self._turn = RLock()
        portal, self._portal = self._portal, None
        if portal is not None:
            self._inherited = True
            portal.fork()
        opening, self._opening = self._opening, None
        if opening is not None:
            opening.fork()


_lifetimes: Final[WeakSet[Lifetime]] = WeakSet()


def _leave(portal: Portal, client: IncidentClient) -> None:
    """Close a garbage-collected client, without waiting: this may be the thread of the portal."""
    portal.close_after(client.close())


def _fork_all() -> None:
    for lifetime in list(_lifetimes):
        lifetime.fork()


def _close_all() -> None:
    for lifetime in list(_lifetimes):
        with suppress(IncidentKitError):
            lifetime.close()


# Python runs this once all non-daemon threads have ended.
atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_fork_all)

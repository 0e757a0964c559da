"""Close the connections to SQLite files while the process forks.

SQLite tracks its locks on a file for the whole process. A child that is forked while a connection
is open believes that it holds these locks, although the system did not give them to it: it may wait
forever for one, or write to a log that the parent deletes. If no connection is open at the fork,
each process takes its own locks.
"""

from __future__ import annotations

import os
from threading import get_ident
from typing import Final, Protocol
from weakref import WeakSet


class OpenFile(Protocol):
    """An open file, whose connections can be closed for a moment."""

    def pause(self) -> None:
        """Wait for running statements, close every connection, and start no more statements."""

    def resume(self) -> None:
        """Let statements run again."""


open_files: Final[WeakSet[OpenFile]] = WeakSet()
"""The files of this process that are closed while it forks."""

_paused: Final[dict[int, list[OpenFile]]] = {}
"""The files that each forking thread has paused."""


def _before() -> None:
    paused = _paused[get_ident()] = list(open_files)
    for file in paused:
        file.pause()


def _after_in_parent() -> None:
    for file in _paused.pop(get_ident(), ()):
        file.resume()


def _after_in_child() -> None:
    # They belong to the parent, and nothing uses them here.
    _paused.clear()
    open_files.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
    )

"""Limit each connection to the service, and the number of connections."""

from __future__ import annotations

import logging
import sys
from typing import Final, Protocol

if sys.platform != "win32":
    import resource

logger = logging.getLogger("incidentkit")

MAX_TARGET: Final = 16 * 1024
"""Maximum bytes of the path and the query of a request."""

MAX_HEAD: Final = 64 * 1024
"""Maximum bytes of a request line and its headers, and of the trailers of a body."""

MAX_HEADERS: Final = 100
"""Maximum number of headers of a request."""

FRAMING: Final = 8
"""Bytes of framing that each byte of a chunked body may have, beyond :data:`MAX_HEAD`.

A chunk of one byte takes up to eight, with leading zeros.
"""

RECEIVE_TIMEOUT: Final = 15.0
"""Seconds from the first byte of a request, or from connecting, to the last byte of its body."""

SEND_TIMEOUT: Final = 15.0
"""Seconds in which a reader must take :data:`MIN_TAKEN` bytes of a waiting answer."""

MIN_TAKEN: Final = 16 * 1024
"""Bytes that a reader must take within :data:`SEND_TIMEOUT`, unless fewer are waiting."""

LINGER: Final = 256 * 1024
"""Maximum bytes that are read and dropped after the last answer on a connection.

Closing a connection with unread bytes would destroy the answer on its way to the client.
"""

LINGER_TIMEOUT: Final = 2.0
"""Seconds for which bytes are read and dropped after a refusal."""

MAX_CONNECTIONS: Final = 4096
"""Maximum number of connections of a process, regardless of how many files it may open."""

SPARE: Final = 16
"""Connections beyond the maximum, on which only health checks are answered."""

BACKLOG: Final = 2048
"""Maximum number of connections that wait to be accepted; all may be accepted in one turn."""

OTHER_FILES: Final = 100
"""Files other than connections of clients and of the database: logs, libraries, Redis."""


def backlog(open_files: int) -> int:
    """Return how many connections may wait to be accepted.

    Args:
        open_files: Maximum number of files that the process may open.
    """
    return max(1, min(BACKLOG, open_files // 4))


def connection_limit(open_files: int, database: int = 0) -> int:
    """Return the maximum number of connections of a process, at least 1.

    The other files stay available to the database, to accepting and to health checks.

    Args:
        open_files: Maximum number of files that the process may open.
        database: Maximum number of connections to the database.
    """
    room = backlog(open_files) + SPARE + OTHER_FILES + database
    return max(1, min(MAX_CONNECTIONS, open_files - room))


def max_open_files() -> int:
    """Return the maximum number of files that this process may open."""
    if sys.platform == "win32":
        return MAX_CONNECTIONS + 2 * BACKLOG
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


class Connection(Protocol):
    """A connection that takes a place."""

    def evict(self) -> None:
        """Close the connection."""
        ...


class Places:
    """Limits the number of connections, and closes an idle one to make room for a new one.

    A connection waits while it has sent no request, or only a part of one. Once all places are
    taken, a new connection replaces the one that has waited longest. If every connection has a
    request that is being answered, a new one gets a spare place, or none.

    Args:
        limit: Maximum number of places, at least 1.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken: set[Connection] = set()
        # A dict, because it keeps the order.
        self._waiting: dict[Connection, None] = {}
        self._warned = False

    def take(self, connection: Connection) -> bool | None:
        """Give a place to a new connection, which waits.

        Returns:
            True for a place, False for a spare one, None if there is none.
        """
        if len(self._taken) >= self._limit:
            self._warn()
            oldest = next(iter(self._waiting), None)
            if oldest is not None:
                self.release(oldest)
                oldest.evict()
            elif len(self._taken) >= self._limit + SPARE:
                return None
        self._taken.add(connection)
        self._waiting[connection] = None
        return len(self._taken) <= self._limit

    def wait(self, connection: Connection) -> None:
        """Note that a connection waits for its next request."""
        if connection in self._taken:
            self._waiting[connection] = None

    def work(self, connection: Connection) -> None:
        """Note that a request of the connection is being answered."""
        self._waiting.pop(connection, None)

    def release(self, connection: Connection) -> None:
        """Take back the place of a connection, if it has one."""
        self._waiting.pop(connection, None)
        self._taken.discard(connection)
        if len(self._taken) < self._limit // 2:
            self._warned = False

    def _warn(self) -> None:
        """Warn once, until half of the places are free again."""
        if not self._warned:
            self._warned = True
            logger.warning(
                "All %d connections are in use: each new one replaces one that waits for a "
                "request. Check for clients that connect and send nothing, or allow the process to "
                "open more files",
                self._limit,
            )

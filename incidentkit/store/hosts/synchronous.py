"""Recognize a host's synchronous connections, without importing packages that it does not use."""

from __future__ import annotations

import sys
from threading import RLock
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Connection

from incidentkit.store.database import DatabaseKind

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

_ASYNCHRONOUS: Final = (
    ("sqlalchemy.ext.asyncio", "AsyncConnection"),
    ("sqlalchemy.ext.asyncio", "AsyncSession"),
    ("asyncpg", "Connection"),
    ("asyncpg.pool", "PoolConnectionProxy"),
    ("psycopg", "AsyncConnection"),
    ("aiosqlite", "Connection"),
)
"""Connections that belong to an event loop."""


class ThreadTurn:
    """A lock for the calls of several threads on one connection."""

    def __init__(self) -> None:
        # Reentrant: a host's hooks around a statement may make a call themselves.
        self._lock = RLock()

    async def __aenter__(self) -> None:
        self._lock.acquire()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.release()


def is_a(module: str, name: str, value: object) -> bool:
    """Return whether a value is an instance of a class whose module may not be loaded."""
    return isinstance(value, getattr(sys.modules.get(module), name, ()))


def sqlalchemy_connection(value: object) -> Connection | Session | None:
    """Return SQLAlchemy's ``Connection`` or ``Session`` if a value is one, or a scoped session."""
    if is_a("sqlalchemy.orm", "scoped_session", value):
        scope: Any = value
        value = scope()
    if is_a("sqlalchemy.orm", "Session", value):
        session: Any = value
        found: Session = session
        return found
    return value if isinstance(value, Connection) else None


def django_connection(value: object) -> Any:
    """Return Django's ``DatabaseWrapper`` if a value is one, or a proxy of one."""
    if is_a("django.utils.connection", "ConnectionProxy", value):
        proxy: Any = value
        # The proxy stands for a different one in each thread.
        value = sys.modules["django.db"].connections[proxy.alias]
    return value if is_a("django.db.backends.base.base", "BaseDatabaseWrapper", value) else None


def not_joinable(value: object, kind: DatabaseKind) -> TypeError:
    """Return the error for an object that cannot be joined by a client on a kind of database."""
    if is_a("psycopg", "Connection", value):
        return TypeError(f"The client is on {kind}, not on postgresql")
    if is_a("sqlite3", "Connection", value):
        return TypeError(f"The client is on {kind}, not on sqlite")
    name = type(value).__name__
    if any(is_a(module, each, value) for module, each in _ASYNCHRONOUS):
        return TypeError(f"{name} belongs to an event loop: use IncidentClient.join")
    return TypeError(
        "Only SQLAlchemy's Connection and Session, psycopg's Connection, sqlite3's Connection and "
        f"Django's connection can be joined, not {name}"
    )

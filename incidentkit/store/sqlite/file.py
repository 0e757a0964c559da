"""Connections to an SQLite file, or to a database in memory."""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
from contextlib import suppress
from typing import Any

from sqlalchemy import Engine, NullPool, QueuePool, StaticPool, create_engine, event
from sqlalchemy.engine import URL

from incidentkit.store.options import StoreOptions
from incidentkit.store.sqlite.errors import PRIMARY_CODE
from incidentkit.store.sqlite.url import MEMORY, place_of

logger = logging.getLogger("incidentkit.store")


def scanners(options: StoreOptions) -> int:
    """Return the number of connections for scans."""
    return max(1, options.pool_size // 2)


async def probe(url: URL) -> None:
    """Open the file once; raise SQLAlchemy's DBAPIError if that fails.

    A file that does not exist is created for its owner alone.

    Without this check, aiosqlite would leave a thread behind when it fails to connect, and that
    thread fails too if the event loop ends at once.
    """

    def connect() -> None:
        _create_privately(url)
        engine = create_engine(url.set(drivername="sqlite"), poolclass=NullPool)
        engine.connect().close()

    await asyncio.to_thread(connect)


def _create_privately(url: URL) -> None:
    """Create a missing file with mode 0600, which SQLite gives to the files beside it too.

    SQLite itself would take 0644. Where nothing can be created, SQLite says why.
    """
    if url.query.get("mode") in ("ro", "rw") or "vfs" in url.query:
        return
    with suppress(OSError):
        os.close(os.open(os.path.realpath(place_of(url)), os.O_CREAT | os.O_EXCL, mode=0o600))


def open_engine(url: URL, options: StoreOptions) -> Engine:
    """Return an engine on the database, whose connections commit by themselves."""
    memory = url.database in MEMORY
    engine = create_engine(
        url.set(drivername="sqlite"),
        isolation_level="AUTOCOMMIT",
        pool_reset_on_return=None,
        connect_args={"timeout": options.statement_timeout, "check_same_thread": False},
        hide_parameters=True,
        poolclass=StaticPool if memory else QueuePool,
        # One connection more, for the writer.
        **(
            {}
            if memory
            else {"pool_size": options.pool_size + scanners(options) + 1, "max_overflow": 0}
        ),
    )
    event.listen(engine, "connect", _prepare_connection)
    if options.echo:
        event.listen(engine, "before_cursor_execute", _log_statement)
    return engine


def _prepare_connection(connection: Any, _: object) -> None:
    cursor = connection.cursor()
    try:
        cursor.execute("PRAGMA journal_mode = WAL")
    except sqlite3.OperationalError as error:
        # SQLite does not wait here. The file keeps its mode until a later connection asks again.
        if error.sqlite_errorcode & PRIMARY_CODE != sqlite3.SQLITE_BUSY:
            raise
    # Not NORMAL, which can lose the last commits in a power failure.
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _log_statement(*arguments: Any) -> None:
    logger.info("%s", arguments[2])

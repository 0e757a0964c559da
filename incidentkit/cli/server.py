"""The REST service under uvicorn."""

from __future__ import annotations

import asyncio
import logging.config
import os
import select
import signal
import socket
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, TextIO

import click

from incidentkit.cli.text import harmless
from incidentkit.domain.errors import MissingDependency
from incidentkit.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from incidentkit.client import IncidentClient
    from incidentkit.settings import Settings

logger = logging.getLogger("incidentkit")

GRACE: Final = 10
"""Seconds that requests have to end when the service is told to stop."""

MAX_LINES: Final = 1000
"""Lines of the log that wait to be written together, at most."""

LOGGING: Final[dict[str, Any]] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "line": {
            "()": "incidentkit.cli.server.LineFormatter",
            "fmt": "%(asctime)s %(levelname)-7s %(message)s",
            "datefmt": "%Y-%m-%dT%H:%M:%S%z",
        }
    },
    "handlers": {
        "stderr": {
            "class": "incidentkit.cli.server.LineHandler",
            "formatter": "line",
            "stream": "ext://sys.stderr",
        }
    },
    "root": {"level": "WARNING", "handlers": ["stderr"]},
    "loggers": {"incidentkit": {"level": "INFO"}, "uvicorn": {"level": "INFO"}},
}


class LineHandler(logging.StreamHandler[TextIO]):
    """Writes the lines of one turn of the event loop at once: each write is a call of the system.

    A line of level WARNING or above is written at once, and what waits before it.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self._lines: list[str] = []
        # The lines show neither, and looking them up takes time.
        logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line, and see to it that it is written."""
        try:
            self._lines.append(self.format(record) + self.terminator)
        except Exception:  # noqa: BLE001
            self.handleError(record)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            # As when the service starts, and ends, and in other threads.
            self.flush()
            return
        if record.levelno >= logging.WARNING or len(self._lines) >= MAX_LINES:
            self.flush()
        elif len(self._lines) == 1:
            loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write what waits."""
        self.acquire()
        try:
            lines, self._lines = self._lines, []
            if lines:
                self.stream.write("".join(lines))
            super().flush()
        finally:
            self.release()


class LineFormatter(logging.Formatter):
    """Puts each record on one line, whatever a client sent; only a traceback takes more."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._second = (0, "")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """Return the time in whole seconds, which many a record shares with the one before."""
        second = int(record.created)
        if self._second[0] != second:
            self._second = second, super().formatTime(record, datefmt)
        return self._second[1]

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and a traceback if there is one."""
        if record.exc_info or record.exc_text or record.stack_info:
            return super().format(record)
        # Most are lines alone, and there is one for each request.
        record.message = record.getMessage()
        record.asctime = self.formatTime(record, self.datefmt)
        return self.formatMessage(record)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Return the line, with the id of the request that it is about."""
        line = super().formatMessage(record)
        request_id = getattr(record, "request_id", None)
        if request_id is not None:
            line += f" {request_id}"
        # Starlette gives what failed at its start as a text.
        return _harmless_lines(line) if record.message.startswith("Traceback") else harmless(line)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """Return the traceback, without what a terminal would obey."""
        return _harmless_lines(super().formatException(ei))


def _harmless_lines(text: str) -> str:
    return "\n".join(map(harmless, text.strip().split("\n")))


def check_installed() -> None:
    """Raise unless the extra ``server`` is installed.

    Raises:
        MissingDependency: With the package that is not there.
    """
    for package in ("starlette", "uvicorn"):
        if find_spec(package) is None:
            raise MissingDependency(package, extra="server")


def in_memory(database_url: str) -> bool:
    """Return whether each process would have a database of its own."""
    from incidentkit.store.database import database_kind  # noqa: PLC0415
    from incidentkit.store.sqlite.url import MEMORY, sqlite_url  # noqa: PLC0415

    sqlite = database_kind(database_url) == "sqlite"
    return sqlite and sqlite_url(database_url).database in MEMORY


def configure_logging() -> None:
    """Write the records of the service, and warnings of all else, to stderr."""
    logging.config.dictConfig(LOGGING)


async def check_servers(client: IncidentClient, *, with_cache: bool) -> None:
    """Open the client once, so that what is wrong is told before there is a server.

    Args:
        client: Closed, and closed again.
        with_cache: Whether the cache has to answer. If it need not, it is left to the service to
            say that it does not.
    """
    try:
        await (client.connect() if with_cache else client.store.open())
    finally:
        await client.close()


def run(settings: Settings, host: str, port: int, workers: int) -> bool:
    """Run the service until a signal ends it, and return whether one did.

    Args:
        settings: Whose servers the service uses.
        host: The address to listen on.
        port: The port, 0 to 65535; 0 takes one that is free.
        workers: Processes, at least 1.
    """
    import uvicorn  # noqa: PLC0415

    port = _free_port(host, port)
    os.environ["INCIDENTKIT_DATABASE_URL"] = settings.database_url
    if settings.redis_url is not None:
        os.environ["INCIDENTKIT_REDIS_URL"] = settings.redis_url
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    logger.info("incidentkit %s on %s, documentation on %s/docs", __version__, url, url)
    # Without a handler the signal that ends the service would end the process, with its code.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with _signal_catcher() as caught:
        try:
            uvicorn.run(
                "incidentkit.http.asgi:app",
                host=host,
                port=port,
                workers=workers,
                lifespan="on",
                log_config=LOGGING,
                access_log=False,
                http="incidentkit.cli.protocol:Protocol",
                proxy_headers=False,
                timeout_graceful_shutdown=GRACE,
            )
        except SystemExit as end:
            return not end.code
        # With several workers, uvicorn also returns when one of them could not start.
        return workers == 1 or caught()


@contextmanager
def _signal_catcher() -> Iterator[Callable[[], bool]]:
    """Give a function that tells whether a signal came, whoever handled it."""
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.settimeout(0)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield lambda: bool(select.select([reader], [], [], 0)[0])
        finally:
            signal.set_wakeup_fd(before)


def _free_port(host: str, port: int) -> int:
    """Return the port, or a free one for 0, if it can be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as listener:
            return int(listener.getsockname()[1])
    except OSError as error:
        # create_server() adds the address to the reason, in Python's own notation.
        reason = (error.strerror or "").partition(" (while")[0]
        raise click.ClickException(
            f"Cannot listen on {harmless(host)} port {port}: {reason}"
        ) from error

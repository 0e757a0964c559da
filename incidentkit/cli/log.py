"""The log of ``incidentkit serve``: one line for each record, on stderr."""

from __future__ import annotations

import asyncio
import logging.config
from typing import Any, Final, TextIO

from incidentkit.cli.text import harmless, harmless_lines

MAX_LINES: Final = 1000
"""Maximum number of lines that wait to be written together."""

LOGGING: Final[dict[str, Any]] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "line": {
            "()": "incidentkit.cli.log.LineFormatter",
            "fmt": "%(asctime)s %(levelname)-7s %(message)s",
            "datefmt": "%Y-%m-%dT%H:%M:%S%z",
        }
    },
    "handlers": {
        "stderr": {
            "class": "incidentkit.cli.log.LineHandler",
            "formatter": "line",
            "stream": "ext://sys.stderr",
        }
    },
    "root": {"level": "WARNING", "handlers": ["stderr"]},
    "loggers": {"incidentkit": {"level": "INFO"}, "uvicorn": {"level": "INFO"}},
}
"""Records of the service and of Uvicorn from level INFO, and all others from level WARNING."""


def configure_logging() -> None:
    """Send records to stderr as :data:`LOGGING` says."""
    logging.config.dictConfig(LOGGING)


class LineHandler(logging.StreamHandler[TextIO]):
    """Writes the lines of one turn of the event loop with one system call.

    A line of level WARNING or above is written at once, together with the lines that wait.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self._lines: list[str] = []
        # The lines show none of these, and looking them up takes time.
        logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False

    def emit(self, record: logging.LogRecord) -> None:
        """Add a line, and schedule the write."""
        try:
            self._lines.append(self.format(record) + self.terminator)
        except Exception:  # noqa: BLE001
            self.handleError(record)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            # The service starts or stops, or this is another thread.
            self.flush()
            return
        if record.levelno >= logging.WARNING or len(self._lines) >= MAX_LINES:
            self.flush()
        elif len(self._lines) == 1:
            loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write the lines that wait."""
        self.acquire()
        try:
            lines, self._lines = self._lines, []
            if lines:
                self.stream.write("".join(lines))
            super().flush()
        finally:
            self.release()


class LineFormatter(logging.Formatter):
    """Formats each record as one line that a terminal only prints; a traceback takes several."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._second = (0, "")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """Return the time in whole seconds; it is formatted once a second."""
        second = int(record.created)
        if self._second[0] != second:
            self._second = second, super().formatTime(record, datefmt)
        return self._second[1]

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, followed by the traceback if there is one."""
        if record.exc_info or record.exc_text or record.stack_info:
            return super().format(record)
        # Shorter than the base class: every request logs such a line.
        record.message = record.getMessage()
        record.asctime = self.formatTime(record, self.datefmt)
        return self.formatMessage(record)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Return the line, with the client, the actor and the id of a request at its end."""
        line = super().formatMessage(record)
        of_request = vars(record)
        if "client_address" in of_request:
            line += f" {of_request['client_address'] or '-'} {of_request.get('actor') or '-'}"
        request_id = getattr(record, "request_id", None)
        if request_id is not None:
            line += f" {request_id}"
        # Starlette reports a failed start as a message with the traceback.
        return harmless_lines(line) if record.message.startswith("Traceback") else harmless(line)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """Return the traceback, with control characters escaped."""
        return harmless_lines(super().formatException(ei))

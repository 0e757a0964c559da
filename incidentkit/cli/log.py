"""Write the log of ``incidentkit serve`` to stderr, one line for each record.

Writing to stderr can fail, as on a full disk or once its reader has ended, and it can take any
time, as while its reader stops reading. So a thread writes the lines, and the service drops those
that cannot be written. A non-blocking stderr would not do: the flag belongs to the open file, which
the service shares with the shell and other programs, and it has no effect on files on a disk.
"""

from __future__ import annotations

import json
import logging.config
import os
import threading
import time
from collections import deque
from datetime import UTC, datetime
from typing import Any, Final, Literal, TypeAlias

from incidentkit.cli.text import harmless, harmless_lines

CAPACITY: Final = 10_000
"""Maximum number of records that wait to be written."""

GATHER: Final = 0.02
"""Seconds that a record waits, so that several are written together."""

ATOMIC: Final = 4096
"""Maximum bytes of an atomic write to a pipe, so that lines of several processes do not mix."""

FLUSH_TIMEOUT: Final = 1.0
"""Maximum seconds that an exiting process waits for its last lines to be written."""

STDERR: Final = 2

LOGGING: Final[dict[str, Any]] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "line": {
            "()": "incidentkit.cli.log.LineFormatter",
            "fmt": "%(asctime)s %(levelname)-7s %(message)s",
            "datefmt": "%Y-%m-%dT%H:%M:%S%z",
        },
        "json": {"()": "incidentkit.cli.log.JsonFormatter"},
    },
    "handlers": {"stderr": {"class": "incidentkit.cli.log.LineHandler", "formatter": "line"}},
    "root": {"level": "WARNING", "handlers": ["stderr"]},
    "loggers": {"incidentkit": {"level": "INFO"}, "uvicorn": {"level": "INFO"}},
}
"""Records of the service and of Uvicorn from level INFO, and all others from level WARNING."""


LogFormat: TypeAlias = Literal["line", "json"]

FIELDS: Final = (
    "method",
    "route",
    "status",
    "duration_ms",
    "request_id",
    "actor",
    "client_address",
)
"""The attributes of a record that its JSON object also has."""


def logging_config(log_format: LogFormat) -> dict[str, Any]:
    """Return :data:`LOGGING` with a formatter."""
    handlers = LOGGING["handlers"]
    stderr = {**handlers["stderr"], "formatter": log_format}
    return {**LOGGING, "handlers": {**handlers, "stderr": stderr}}


def configure_logging(log_format: LogFormat = "line") -> None:
    """Send records to stderr as :data:`LOGGING` says."""
    keep_stderr()
    logging.config.dictConfig(logging_config(log_format))


def keep_stderr() -> None:
    """Open stderr if it is closed, so that no connection takes its number and gets the log.

    It becomes a pipe without a reader: every write fails, also in the workers.
    """
    for number in range(STDERR):
        if not _is_open(number):
            os.open(os.devnull, os.O_RDWR)
    if not _is_open(STDERR):
        # The pipe's reading end gets descriptor 2; dup2() replaces it with the writing end.
        _, writer = os.pipe()
        os.dup2(writer, STDERR)
        os.close(writer)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


class LineWriter:
    """Writes lines to a file in a separate thread, and drops those that it cannot write.

    The thread starts with the first line. It writes again and again, however often that fails.

    Args:
        file: The number of the open file.
        capacity: Maximum number of records that wait to be written.

    Attributes:
        dropped: Records that were not written, since the start.
        failing: Whether records were dropped since the last one that was written.
    """

    def __init__(self, file: int, capacity: int = CAPACITY) -> None:
        self.dropped = 0
        self.failing = False
        self._file = file
        self._capacity = capacity
        self._waiting: deque[str] = deque()
        self._thread: threading.Thread | None = None
        self._sleeping = False
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._done = threading.Condition()
        self._writing = False
        self._torn = False

    @property
    def used(self) -> bool:
        """Whether any record has been added yet."""
        return self._thread is not None

    def add(self, text: str) -> None:
        """Add a record, as text that ends with a line feed; never block and never raise."""
        if len(self._waiting) >= self._capacity:
            self._drop(1)
            return
        self._waiting.append(text)
        if self._thread is None:
            self._start()
        elif self._sleeping:
            self._wake.set()

    def flush(self, timeout: float = FLUSH_TIMEOUT) -> bool:
        """Wait until every record is written or dropped; return whether that happened in time.

        Args:
            timeout: Maximum seconds to wait.
        """
        self._hurry.set()
        try:
            with self._done:
                return self._done.wait_for(self._is_idle, timeout)
        finally:
            self._hurry.clear()

    def _is_idle(self) -> bool:
        return not self._waiting and not self._writing

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="incidentkit log", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            # Too many threads, or the process is exiting: the next record tries again.
            self._thread = None

    def _run(self) -> None:
        while True:
            self._sleeping = True
            if not self._waiting:
                self._wake.wait()
            self._sleeping = False
            self._wake.clear()
            self._hurry.wait(GATHER)
            self._writing = True
            try:
                self._write_all()
            finally:
                self._writing = False
                with self._done:
                    self._done.notify_all()

    def _write_all(self) -> None:
        """Write the waiting records, in pieces of whole lines."""
        while self._waiting:
            piece = bytearray(b"\n" if self._torn else b"")
            records = 0
            while self._waiting and (not records or len(piece) + len(self._waiting[0]) <= ATOMIC):
                piece += self._waiting.popleft().encode(errors="backslashreplace")
                records += 1
            if self._write(piece):
                self._recover()
            else:
                self._drop(records)

    def _write(self, piece: bytearray) -> bool:
        left = memoryview(piece)
        while left:
            try:
                left = left[os.write(self._file, left) :]
            except BlockingIOError:
                # Another program has made the file non-blocking.
                time.sleep(GATHER)
            except OSError:
                self._torn = self._torn or len(left) < len(piece)
                return False
        self._torn = False
        return True

    def _drop(self, records: int) -> None:
        self.dropped += records
        self.failing = True

    def _recover(self) -> None:
        if self.failing:
            self.failing = False
            logging.getLogger("incidentkit").warning(
                "The log is being written again; records dropped so far: %d", self.dropped
            )


LOG: Final = LineWriter(STDERR)
"""Writes the log of this process."""


class LineHandler(logging.Handler):
    """Hands each record to :data:`LOG` as text."""

    def __init__(self) -> None:
        super().__init__()
        # The lines show none of these, and looking them up takes time.
        logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
        # They would be written to stderr without this handler.
        logging.captureWarnings(capture=True)

    def emit(self, record: logging.LogRecord) -> None:
        """Add the text of a record."""
        try:
            text = self.format(record)
        except Exception as error:  # noqa: BLE001
            failed = "A record of %s cannot be formatted: %s"
            arguments = record.name, type(error).__name__
            # In the format of the others, which a program may read.
            text = self.format(
                logging.LogRecord("incidentkit", logging.ERROR, "", 0, failed, arguments, None)
            )
        LOG.add(text + "\n")

    def flush(self) -> None:
        """Wait for the last lines before the process exits."""
        LOG.flush()


class LineFormatter(logging.Formatter):
    """Formats each record as one line, harmless on a terminal; a traceback takes several."""

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


class JsonFormatter(logging.Formatter):
    """Formats each record as a JSON object in one line, in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object, with the traceback as a string if there is one."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)

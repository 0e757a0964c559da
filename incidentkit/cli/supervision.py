"""Uvicorn's server and its supervisor of workers, with signals that end them at every moment.

While a service runs, the first signal lets running requests finish, and a second interrupt does
not. Before that, a signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import parent_process, resource_tracker
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Final

import uvicorn
from uvicorn.server import HANDLED_SIGNALS
from uvicorn.supervisors import Multiprocess

from incidentkit.cli.interrupts import interrupts
from incidentkit.cli.log import LOG

GRACE: Final = 10
"""Seconds that running requests have to finish after a signal to stop."""

PING: Final = 0.1
"""Seconds that a supervisor waits for a starting worker, before it looks for signals again."""

farewells: Final[list[Callable[[], object]]] = [LOG.flush]
"""Functions to call before the process ends at once, in this order."""


class Server(uvicorn.Server):
    """The server of a process without workers."""

    finished = False

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Run until a signal arrives."""
        # Uvicorn restores these handlers once it has stopped.
        for number in HANDLED_SIGNALS:
            signal.signal(number, self.handle_exit)
        interrupts.farewell = _say_farewell
        interrupts.cancel = partial(self.handle_exit, signal.SIGINT, None)
        super().run(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running requests finish."""
        await super().shutdown(sockets)
        self.finished = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop; at once if the service has not started, or if an interrupt is the second signal."""
        if not self.started:
            _end(sig)
        elif self.finished:
            # Uvicorn raises the signals again.
            return
        elif self.should_exit and sig == signal.SIGINT:
            _say_farewell()
            os._exit(0)
        else:
            interrupts.exit_code = 0
            super().handle_exit(sig, frame)


class Supervisor(Multiprocess):
    """Runs workers, and stops them on a signal.

    A terminal sends an interrupt to the workers too. They start with that signal blocked, as it is
    in the supervisor: only the supervisor stops a worker.

    Attributes:
        signalled: Whether a signal has arrived that stops the service.
    """

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket]) -> None:
        super().__init__(config, sockets)
        self.signalled = False
        self._answered: set[int | None] = set()
        interrupts.exit_code = 0
        interrupts.farewell = self._kill
        interrupts.cancel = partial(self.signal_queue.append, signal.SIGINT)
        if sys.platform != "win32":
            # It unblocks the signal when it starts, which would be with the first worker.
            resource_tracker.ensure_running()
            interrupts.block()

    def keep_subprocess_alive(self) -> None:
        """Replace workers that have exited or hang, once every worker has answered a first time.

        A worker that is still starting does not answer, and uvicorn would take it for a hung one.
        """
        starting = {worker.pid: worker for worker in self.processes if worker.process.is_alive()}
        for pid in starting.keys() - self._answered:
            if starting[pid].ping(PING):
                self._answered.add(pid)
        if starting.keys() <= self._answered:
            super().keep_subprocess_alive()

    def handle_int(self) -> None:
        """Stop after an interrupt."""
        self.signalled = True
        super().handle_int()

    def handle_term(self) -> None:
        """Stop after SIGTERM."""
        self.signalled = True
        super().handle_term()

    def _kill(self) -> None:
        for worker in self.processes:
            worker.process.kill()
        _say_farewell()


def stop_with_parent() -> None:
    """Stop this process once its supervisor is gone; do nothing if it has none."""
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_stop_after, args=(parent,), daemon=True).start()


def _stop_after(parent: BaseProcess) -> None:
    parent.join()
    # Uvicorn's handler lets running requests finish.
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2 * GRACE)
    _say_farewell()
    os._exit(1)


def _say_farewell() -> None:
    for call in farewells:
        call()


def _end(number: int) -> None:
    """End the process as the signal does by default; for an interrupt, with its exit code."""
    if number == signal.SIGINT:
        interrupts.end()
    _say_farewell()
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)

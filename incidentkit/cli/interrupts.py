"""End the program on Ctrl+C: at once, with exit code 130 and without a traceback.

Python would raise KeyboardInterrupt wherever the main thread happens to be, such as in an import,
and not before a system call that has just begun returns. Instead, a thread waits for the signal,
which is blocked in all other threads. It ends the process, except while a command has connections
to close: then the first interrupt cancels the command, and the second one ends it.

This module loads next to nothing: it is the first one that the program uses.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

INTERRUPTED: Final = 130
"""Exit code of an interrupted command: 128 plus the number of the signal, as in a shell."""


class Interrupts:
    """Handles SIGINT.

    Attributes:
        cancel: Cancels the running command, from another thread; None: there is nothing to clean
            up.
        received: Whether an interrupt has arrived.
        farewell: Called before the process ends at once, such as to show the cursor again.
        exit_code: The code with which it ends.
    """

    def __init__(self) -> None:
        self.cancel: Callable[[], object] | None = None
        self.received = False
        self.farewell: Callable[[], object] | None = None
        self.exit_code = INTERRUPTED
        self._installed = False

    def install(self) -> None:
        """Handle SIGINT from now on, unless the process ignores it or has a handler of its own."""
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            return
        if sys.platform == "win32":
            signal.signal(signal.SIGINT, lambda *_: self._handle())
            return
        self._installed = True
        self.block()
        _thread.start_new_thread(self._wait, ())

    def block(self) -> None:
        """Block SIGINT in this thread, and in the threads and processes that it starts."""
        if sys.platform != "win32" and self._installed:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def end(self) -> None:
        """End the process at once, at any moment."""
        try:
            if self.farewell is not None:
                self.farewell()
        finally:
            os._exit(self.exit_code)

    def _wait(self) -> None:
        while sys.platform != "win32":
            signal.sigwait({signal.SIGINT})
            self._handle()

    def _handle(self) -> None:
        # Set before `cancel` is read: a command that ends now sees it.
        self.received = True
        cancel, self.cancel = self.cancel, None
        if cancel is None:
            self.end()
            return
        try:
            cancel()
        except RuntimeError:
            # The event loop has been closed meanwhile.
            self.end()


interrupts: Final = Interrupts()
"""The handler of this process."""

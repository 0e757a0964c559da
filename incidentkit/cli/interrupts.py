"""End the program on Ctrl+C: at once, with exit code 130 and without a traceback.

Python would raise KeyboardInterrupt wherever the program happens to be: in the middle of an import,
of a callback or of the cleanup. This handler ends the process instead, except while a command has
connections to close. Then the first interrupt cancels the command, and the second one ends it.

This module loads next to nothing: it is the first one that the program uses.
"""

from __future__ import annotations

import atexit
import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Final

INTERRUPTED: Final = 130
"""Exit code of an interrupted command: 128 and the number of the signal, as a shell has it."""


class Interrupts:
    """Handles SIGINT.

    Attributes:
        cancel: Cancels the running command; None: there is nothing to clean up.
        received: Whether an interrupt has arrived.
        farewell: Written to stderr if the process ends at once, such as to show the cursor again.
    """

    def __init__(self) -> None:
        self.cancel: Callable[[], object] | None = None
        self.received = False
        self.farewell = b""

    def install(self) -> None:
        """Handle SIGINT from now on, unless the process ignores it or has a handler of its own."""
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)
            # Registered first, so called last: no thread is left to wait for, and Python would
            # restore the signal's default action, which ends the process without an exit code.
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)

    def _handle(self, _: int, __: FrameType | None) -> None:
        self.received = True
        cancel, self.cancel = self.cancel, None
        if cancel is None:
            self.end()
        else:
            cancel()

    def end(self) -> None:
        """End the process, whatever it is doing."""
        try:
            if self.farewell:
                os.write(2, self.farewell)
        finally:
            os._exit(INTERRUPTED)


interrupts: Final = Interrupts()
"""The handler of this process."""

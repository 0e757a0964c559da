"""Listen for the signals that stop a process, in case its server does not tell the app."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Final, TypeAlias

Handler: TypeAlias = Callable[[int, FrameType | None], object]
Listener: TypeAlias = Callable[[], object]

SIGNALS: Final = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)
]

MEMORY: Final = 5.0
"""Seconds for which a signal also reaches new listeners: a server may need some time to stop."""


class _Tap:
    """Calls the listeners, then the handler that was installed before."""

    listeners: Final[set[Listener]] = set()
    heard_at = float("-inf")

    def __init__(self, handler: Handler) -> None:
        self.handler = handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        _Tap.heard_at = time.monotonic()
        try:
            for listener in tuple(self.listeners):
                listener()
        finally:
            self.handler(number, frame)


@contextmanager
def on_stop_signal(listener: Listener) -> Iterator[None]:
    """Call the listener on each signal that stops the process, before the signal's own handler.

    The server's own handlers still run, and are restored once there is no listener. A signal
    without a handler is left alone. Handlers are installed only in the main thread.
    """
    _Tap.listeners.add(listener)
    for number in SIGNALS:
        handler = signal.getsignal(number)
        if callable(handler) and not isinstance(handler, _Tap):
            _install(number, _Tap(handler))
    try:
        if time.monotonic() - _Tap.heard_at < MEMORY:
            listener()
        yield
    finally:
        _Tap.listeners.discard(listener)
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if not _Tap.listeners and isinstance(handler, _Tap):
                _install(number, handler.handler)


def _install(number: int, handler: Handler) -> None:
    # Raised outside the main thread.
    with suppress(ValueError):
        signal.signal(number, handler)

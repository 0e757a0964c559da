"""Notice a replay: a write that returns the first answer of its idempotency key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final


class Replay:
    """Whether a write was a replay.

    Attributes:
        happened: Whether it returned the first answer of its key, and changed nothing.
    """

    def __init__(self) -> None:
        self.happened = False


REPLAY: Final[ContextVar[Replay | None]] = ContextVar("incidentkit_replay", default=None)
"""Records whether the caller's write was a replay; None: nothing watches for one."""


@contextmanager
def watching_for_replay() -> Iterator[Replay]:
    """Yield an object that says whether the one write inside the block was a replay."""
    replay = Replay()
    token = REPLAY.set(replay)
    try:
        yield replay
    finally:
        REPLAY.reset(token)

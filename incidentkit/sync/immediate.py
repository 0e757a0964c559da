"""Run coroutines that never wait."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

from incidentkit.pacing import NOTHING_ELSE_RUNS

_T = TypeVar("_T")


def run_immediately(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """Run to completion, without an event loop, a coroutine that never suspends.

    Raises:
        RuntimeError: If it suspends.
    """
    token = NOTHING_ELSE_RUNS.set(True)
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: _T = end.value
        return result
    finally:
        NOTHING_ELSE_RUNS.reset(token)
    coroutine.close()
    raise RuntimeError("the coroutine waits for an event loop")

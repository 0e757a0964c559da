"""The actor: who makes a change, for the history of the incident."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

from incidentkit.domain import rules

ACTOR: Final[ContextVar[str | None]] = ContextVar("incidentkit_actor", default=None)
"""The current actor; None: no actor is named."""


@contextmanager
def acting_as(actor: str) -> Iterator[None]:
    """Name the actor of every change made inside the block, and by tasks started there.

    The actor is kept in a :mod:`context variable <contextvars>`: concurrent tasks do not see each
    other's, and the innermost block wins.

    Args:
        actor: Who makes the changes, such as a user name: 1 to 255 characters.

    Raises:
        InvalidIncident: If the name breaks this rule.
    """
    token = ACTOR.set(rules.check("actor", rules.name, actor))
    try:
        yield
    finally:
        ACTOR.reset(token)

"""Who acts: the actor that the history of an incident names."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from incidentkit.models import check_actor

if TYPE_CHECKING:
    from collections.abc import Iterator

_actor: ContextVar[str | None] = ContextVar("incidentkit_actor", default=None)


@contextmanager
def acting_as(actor: str) -> Iterator[None]:
    """Name the actor of every change that is made inside, also by tasks that start there.

    It is kept in a :mod:`context variable <contextvars>`, so that concurrent tasks do not see each
    other's; the innermost one counts.

    Args:
        actor: Who acts, such as a user's name: 1 to 255 characters.

    Raises:
        InvalidIncident: If it cannot be stored.
    """
    token = _actor.set(check_actor(actor))
    try:
        yield
    finally:
        _actor.reset(token)


def current_actor() -> str | None:
    """Return who acts here; None means that nobody is named."""
    return _actor.get()

"""Limit how much one sender does at a time, so that others get their share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from attrs import frozen

from incidentkit.domain.errors import InvalidSettings
from incidentkit.domain.values import (
    MAX_PER_TOKEN,
    READERS_PER_TOKEN,
    REQUESTS_PER_TOKEN,
    SEARCHES_PER_TOKEN,
)
from incidentkit.http.problems import Refusal
from incidentkit.wire.kinds import Kind

RETRY: Final[Mapping[str, str]] = {"Retry-After": "1"}
"""The header of a refusal: short, since a place is free as soon as one of the requests ends."""


@frozen(kw_only=True)
class Bounds:
    """Limits what one sender may do at a time in a process, if the app authenticates.

    Anonymous callers have no limits of their own: behind a proxy they all have one address. They
    share what the process can do.

    Attributes:
        requests: Requests that are being answered, 1 to 10,000. Streams of changes do not count.
        readers: Streams and waiting polls, 1 to 10,000; all senders together have 100.
        searches: Searches with ``text`` or ``total``, 1 to 10,000.

    Raises:
        InvalidSettings: If one of them is out of range.
    """

    requests: int = REQUESTS_PER_TOKEN
    readers: int = READERS_PER_TOKEN
    searches: int = SEARCHES_PER_TOKEN

    def __attrs_post_init__(self) -> None:
        for name in ("requests", "readers", "searches"):
            if not 1 <= getattr(self, name) <= MAX_PER_TOKEN:
                raise InvalidSettings(f"bounds.{name}", f"must be from 1 to {MAX_PER_TOKEN}")


class Places:
    """Counts the requests of each sender that are running, and refuses more than a maximum.

    Args:
        maximum: For each sender.
        what: What is counted, in the plural.
    """

    def __init__(self, maximum: int, what: str) -> None:
        self._maximum = maximum
        self._what = what
        # Only senders with a running request have an entry.
        self._taken: dict[str, int] = {}

    @contextmanager
    def place(self, sender: str | None) -> Iterator[None]:
        """Hold a place inside the block.

        Args:
            sender: The name of the sender; None: one without limits.

        Raises:
            Refusal: If the sender has the maximum already.
        """
        if sender is None:
            yield
            return
        taken = self._taken.get(sender, 0)
        if taken >= self._maximum:
            detail = (
                f"Too many {self._what} at a time, the maximum is {self._maximum}: try again when "
                "one has ended"
            )
            raise Refusal(Kind.TOO_MANY_REQUESTS, detail, headers=RETRY)
        self._taken[sender] = taken + 1
        try:
            yield
        finally:
            left = self._taken.pop(sender) - 1
            if left:
                self._taken[sender] = left

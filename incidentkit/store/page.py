"""One page of the list, as a store reads it and a cache keeps it."""

from __future__ import annotations

from collections.abc import Callable

from incidentkit.domain.values import Incident
from incidentkit.wire.encoding import encode_incidents


class Page:
    """One page of the list.

    Args:
        incidents: Newest first; or a function that makes them on first use.
        token: The token of the incidents in the same snapshot of the database, as
            :meth:`StoreOperations.token` returns it.
        json: The JSON array of the incidents, or a function that makes it on first use. None: it
            is made from the incidents.
    """

    __slots__ = ("_incidents", "_json", "token")

    def __init__(
        self,
        incidents: list[Incident] | Callable[[], list[Incident]],
        token: str | None,
        json: bytes | Callable[[], bytes] | None = None,
    ) -> None:
        self._incidents = incidents
        self._json = json
        self.token = token

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Page):
            return NotImplemented
        return self.token == other.token and self.incidents == other.incidents

    __hash__ = None  # type: ignore[assignment]

    @property
    def incidents(self) -> list[Incident]:
        """The incidents, newest first."""
        if callable(self._incidents):
            self._incidents = self._incidents()
        return self._incidents

    @property
    def json(self) -> bytes:
        """The incidents as a JSON array."""
        if self._json is None:
            self._json = encode_incidents(self.incidents)
        elif callable(self._json):
            self._json = self._json()
        return self._json

"""Where pages that lie deep begin, remembered for as long as no incident changes."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from incidentkit.domain.queries import ListQuery
    from incidentkit.domain.values import IncidentSource, IncidentStatus

    _Filters: TypeAlias = tuple[IncidentStatus | None, IncidentSource | None]

Bookmark: TypeAlias = tuple[int, int]
"""How many incidents come before one in a list, and its id."""

MAX_BOOKMARKS: Final = 1000


class Bookmarks:
    """The first incidents of deep pages, by what the list is filtered by.

    All of them are of one token: another one says that incidents have changed, and may stand
    elsewhere.
    """

    def __init__(self) -> None:
        self._token = ""
        self._kept: dict[_Filters, list[Bookmark]] = {}
        self._count = 0

    def before(self, query: ListQuery) -> tuple[Bookmark, str] | None:
        """Return the nearest one that leaves less to pass over, with its token; None if none does.

        On SQLite to pass over an incident from there takes as long as four from the top.
        """
        kept = self._kept.get((query.status, query.source), [])
        place = bisect_right(kept, query.offset, key=lambda bookmark: bookmark[0])
        if not place or (query.offset - kept[place - 1][0]) * 4 > query.offset:
            return None
        return kept[place - 1], self._token

    def add(self, query: ListQuery, incident_id: int, token: str | None) -> None:
        """Remember the first incident of a page that was read when the token was this one.

        None for the token says that a change could not be told.
        """
        if token is None:
            return
        if token != self._token:
            self._token, self._kept, self._count = token, {}, 0
        kept = self._kept.setdefault((query.status, query.source), [])
        bookmark = (query.offset, incident_id)
        place = bisect_left(kept, bookmark)
        if kept[place : place + 1] == [bookmark]:
            return
        if self._count == MAX_BOOKMARKS:
            self._kept, self._count = {}, 0
            kept, place = self._kept.setdefault((query.status, query.source), []), 0
        kept.insert(place, bookmark)
        self._count += 1

"""One search: which statements to run, and in which order."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

from attrs import evolve

from incidentkit.domain.queries import SearchQuery
from incidentkit.domain.values import MAX_LIMIT, IncidentOrder, SearchPage
from incidentkit.store.dialect import Dialect
from incidentkit.store.executor import Fetch, Rows
from incidentkit.store.sql.rows import COUNT, STORED_AT, read_detailed, read_incident, read_rows
from incidentkit.store.sql.search import (
    Shape,
    count_found,
    select_page,
    select_page_among_first,
    select_page_and_total_found,
    select_page_found,
)

SCAN: Final = 500
"""Number of incidents whose messages a search scans first, to see how common its words are."""

FOUND_PER_SCANNED: Final = 15
"""Number of incidents that the index of words returns and the database sorts in the time that it
takes to scan one message."""

LIMITS: Final = (100, MAX_LIMIT + 1)
"""Constant LIMITs that let PostgreSQL reuse one plan for every smaller limit."""

SHORT: Final = 100
"""Maximum number of rows of a read from an index that does not count as a scan."""

SHORT_DETAILED: Final = 10
"""The same for rows with details, each of up to 16 KiB."""


class Search:
    """The statements of a search and their values.

    Args:
        dialect: The statements of the database.
        query: The search.

    Attributes:
        short: Whether all that it reads is a page of few rows from an index.
    """

    def __init__(self, dialect: Dialect, query: SearchQuery) -> None:
        self._query = query
        statuses, sources = sorted(query.status or ()), sorted(query.source or ())
        oldest_first = query.order is IncidentOrder.OLDEST
        # Ids start at 1: with 0, a place is a bound on the time alone.
        low, high = (query.created_after, 0), (query.created_before, 0)
        self._everything = low, high
        onward = False
        if query.after is not None:
            place = (query.after.created_at, query.after.incident_id)
            low, high = (max(low, place), high) if oldest_first else (low, min(high, place))
            onward = not dialect.indexes_pairs and low < high
        limit = min(each for each in LIMITS if each > query.limit)
        self._shape = Shape(
            statuses=len(statuses),
            sources=len(sources),
            oldest_first=oldest_first,
            words_match=None if query.text is None else dialect.words_match,
            with_key=query.dedup_key is not None,
            pairs=dialect.indexes_pairs,
            onward=onward,
            most=limit if dialect.keeps_plans else None,
            details=query.details,
        )
        self._values: Mapping[str, Any] = {
            **({} if query.text is None else dialect.phrases(query.text)),
            "dedup_key": query.dedup_key,
            # One more row tells whether there is another page.
            "limit": query.limit + 1,
            **{f"status_{n}": status.value for n, status in enumerate(statuses)},
            **{f"source_{n}": source.value for n, source in enumerate(sources)},
            **_place("low", low),
            **_place("high", high),
        }
        short = SHORT_DETAILED if query.details else SHORT
        self.short = query.text is None and not query.total and query.limit <= short

    async def run(self, fetch: Fetch) -> SearchPage:
        """Read one page.

        Without words that is one statement, and one more for a total that the page does not tell.
        With words it is one statement with a total, and up to three without. With a deduplication
        key it is always one.

        Args:
            fetch: Runs a statement.
        """
        if self._shape.with_key and not self._query.total:
            rows, total = await fetch(select_page_found(self._shape), self._values), None
        elif self._query.text is None and not self._shape.with_key:
            rows = await fetch(select_page(self._shape), self._values)
            total = await self._total(fetch, rows)
        elif self._query.total:
            rows, total = await self._find_and_count(fetch)
        else:
            rows, total = await self._find(fetch), None
        limit = self._query.limit
        read = read_detailed if self._query.details else read_incident
        incidents = await read_rows(read, rows[:limit])
        following = None
        if len(rows) > limit:
            following = self._query.cursor(rows[limit - 1][STORED_AT], incidents[-1].incident_id)
        return SearchPage(incidents, following, total)

    async def _total(self, fetch: Fetch, rows: Rows) -> int | None:
        """Return the number of incidents of all pages, if the query asks for it."""
        if not self._query.total:
            return None
        if self._query.after is None and len(rows) <= self._query.limit:
            # The first page is the last one too.
            return len(rows)
        low, high = self._everything
        values = {**self._values, **_place("low", low), **_place("high", high)}
        ((total,),) = await fetch(
            count_found(evolve(self._shape, onward=False, details=False)), values
        )
        return int(total)

    async def _find_and_count(self, fetch: Fetch) -> tuple[Rows, int]:
        """Return the rows of a page with the words, and the number of incidents of all pages."""
        low, high = self._everything
        values = {**self._values, **_place("from", low), **_place("until", high)}
        rows = await fetch(select_page_and_total_found(self._shape), values)
        return [row for row in rows if row[STORED_AT] is not None], int(rows[0][COUNT])

    async def _find(self, fetch: Fetch) -> Rows:
        """Return the rows of a page with the words."""
        among_first = select_page_among_first(self._shape)
        rows = await fetch(among_first, {**self._values, "scan": SCAN})
        if len(rows) > self._query.limit:
            return rows
        scan = messages_to_scan(rows, self._query.limit)
        if scan:
            rows = await fetch(among_first, {**self._values, "scan": scan})
            if len(rows) > self._query.limit:
                return rows
        return await fetch(select_page_found(self._shape), self._values)


def messages_to_scan(rows: Rows, limit: int) -> int:
    """Return how many messages to scan for a page, given those found among the first; 0: none.

    The rarer the words are, the more messages must be scanned for a page. The more common they are,
    the more incidents the index returns.
    """
    if not rows:
        return 0
    share = len(rows) / SCAN
    # Half as many more, since the words may be rarer further on.
    scan = round(1.5 * (limit + 1) / share)
    incidents = rows[0][COUNT]
    return scan if scan * FOUND_PER_SCANNED < share * incidents else 0


def _place(name: str, place: tuple[datetime, int]) -> dict[str, Any]:
    return {f"{name}_at": place[0], f"{name}_id": place[1]}

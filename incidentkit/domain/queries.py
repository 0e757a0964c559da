"""Queries: the reads that a caller requests, checked when they are made."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from attrs import field, frozen

from incidentkit.domain import rules
from incidentkit.domain.cursor import encode_cursor
from incidentkit.domain.errors import FieldError, InvalidIncident
from incidentkit.domain.rules import EventCursor, SearchCursor, collect, raise_faults
from incidentkit.domain.values import (
    CHANGES_LIMIT,
    DEEP,
    DEFAULT_LIMIT,
    MAX_LIMIT,
    MAX_OFFSET,
    IncidentOrder,
    IncidentSource,
    IncidentStatus,
)

ANY: Final = "any"
"""Stands for an absent filter in a page's cache key."""


@frozen(field_transformer=collect)
class ListQuery:
    """One page of the list of incidents, newest first.

    Args:
        page: 1 is the newest page.
        limit: Incidents per page, 1 to 1000.
        status: Only incidents with this status; None: any status.
        source: Only incidents from this source; None: any source.

    Raises:
        InvalidIncident: With every faulty field, or if ``page`` times ``limit`` exceeds 2^63-1.
    """

    page: int = field(default=1, converter=rules.page)
    limit: int = field(default=DEFAULT_LIMIT, converter=rules.limit)
    status: IncidentStatus | None = field(default=None, converter=rules.optional_status)
    source: IncidentSource | None = field(default=None, converter=rules.optional_source)

    def __attrs_post_init__(self) -> None:
        raise_faults(self)
        if self.page * self.limit > MAX_OFFSET:
            raise InvalidIncident([FieldError("page", f"times limit must be at most {MAX_OFFSET}")])

    @property
    def offset(self) -> int:
        """Number of newer incidents before this page."""
        return (self.page - 1) * self.limit

    @property
    def deep(self) -> bool:
        """Whether so many incidents come before its end that reading it may take long."""
        return self.page * self.limit > DEEP

    @property
    def cache_key(self) -> str:
        """The key of this page in a cache, ``incidents:{page}:{limit}:{status}:{source}``."""
        return f"incidents:{self.page}:{self.limit}:{self.status or ANY}:{self.source or ANY}"


def _has_the_order(query: SearchQuery, _: object, after: SearchCursor) -> None:
    if query.order in rules.ORDERS and query.order is not after.order:
        raise ValueError(f"is a cursor of the order {after.order}")


@frozen(field_transformer=collect, kw_only=True)
class SearchQuery:
    """One page of a search: its filters, its order and its size.

    Args:
        status: One status or several; None: any status.
        source: One source or several; None: any source.
        created_after: Only incidents created at this time or later; None: no lower bound.
        created_before: Only incidents created before this time; None: no upper bound.
        dedup_key: Only incidents with this deduplication key; None: any, or none.
        text: Words and phrases that the message must contain: 1 to 200 characters with at least one
            letter or digit, and at most 32 different words and phrases, not counting those that
            another one includes. None: any message.
        order: ``newest`` or ``oldest`` first.
        limit: Incidents per page, 1 to 1000.
        after: The cursor of the page before; None: the first page.
        total: Whether to count the incidents of all pages, which takes time if there are many.
        details: Whether to read the details of each incident.

    Raises:
        InvalidIncident: With every faulty field.
    """

    status: frozenset[IncidentStatus] | None = field(default=None, converter=rules.statuses)
    source: frozenset[IncidentSource] | None = field(default=None, converter=rules.sources)
    created_after: datetime = field(default=None, converter=rules.lower_bound)
    created_before: datetime = field(default=None, converter=rules.upper_bound)
    dedup_key: str | None = field(default=None, converter=rules.optional_name)
    text: str | None = field(default=None, converter=rules.optional_text)
    order: IncidentOrder = field(default=IncidentOrder.NEWEST, converter=rules.order)
    limit: int = field(default=DEFAULT_LIMIT, converter=rules.limit)
    after: SearchCursor | None = field(
        default=None, converter=rules.optional_search_cursor, validator=_has_the_order
    )
    total: bool = field(default=False, converter=rules.flag)
    details: bool = field(default=False, converter=rules.flag)

    __attrs_post_init__ = raise_faults

    def cursor(self, created_at: datetime, incident_id: int) -> str:
        """Return the cursor that continues after an incident.

        Args:
            created_at: Its time with the fraction of a second that the database holds.
            incident_id: Its id.
        """
        microseconds = (created_at - rules.EPOCH) // rules.MICROSECOND
        return encode_cursor(microseconds, incident_id, rules.ORDERS.index(self.order))


def _is_of_the_incident(query: HistoryQuery, _: object, after: EventCursor) -> None:
    if query.incident_id != after.incident_id:
        raise ValueError("is not a cursor of this incident")


@frozen(field_transformer=collect, eq=False, repr=False)
class HistoryQuery:
    """One page of the history of an incident.

    Args:
        incident_id: 1 to 2^63-1.
        limit: Maximum number of events, 1 to 1000.
        after: The cursor of an event of this incident; None: from the first event.

    Raises:
        InvalidIncident: With every faulty field.
    """

    incident_id: int = field(converter=rules.incident_id)
    limit: int = field(default=MAX_LIMIT, converter=rules.limit)
    after: EventCursor | None = field(
        default=None, converter=rules.optional_event_cursor, validator=_is_of_the_incident
    )

    __attrs_post_init__ = raise_faults

    @property
    def event_id(self) -> int:
        """The id of the last event before; 0 before the first event."""
        return 0 if self.after is None else self.after.event_id


@frozen(field_transformer=collect, eq=False, repr=False)
class ChangesQuery:
    """One page of the changes of all incidents.

    Args:
        after: The cursor of a change, or ``latest``; None: from the first change.
        limit: Maximum number of changes, 1 to 1000.
        wait: Seconds to wait for a change if there is none yet, 0 to 30.

    Raises:
        InvalidIncident: With every faulty field.
    """

    after: str | None = field(default=None, converter=rules.changes_cursor)
    limit: int = field(default=CHANGES_LIMIT, converter=rules.limit)
    wait: float = field(default=0.0, converter=rules.wait)

    __attrs_post_init__ = raise_faults

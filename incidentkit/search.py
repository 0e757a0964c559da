"""What a search asks for, and what it returns."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, TypeVar

from attrs import frozen

from incidentkit.cursor import decode_cursor, encode_cursor
from incidentkit.models import (
    DEFAULT_LIMIT,
    EARLIEST_TIME,
    LATEST_TIME,
    MAX_ID,
    Check,
    Incident,
    IncidentSource,
    IncidentStatus,
    limit_rule,
    optional,
    source_rule,
    status_rule,
    storable,
    time_bound,
)

if TYPE_CHECKING:
    from collections.abc import Callable

TEXT_MAX_LENGTH: Final = 200

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)

_E = TypeVar("_E", bound=StrEnum)


class IncidentOrder(StrEnum):
    """The order of a search, by ``created_at`` and then by id."""

    NEWEST = "newest"
    OLDEST = "oldest"


_ORDERS: Final = tuple(IncidentOrder)


@frozen
class SearchPage:
    """One page of a search.

    Attributes:
        incidents: In the order that was asked for.
        next: The cursor of the next page; None on the last one.
        total: How many incidents there are on all pages together; None unless it was asked for.
    """

    incidents: list[Incident]
    next: str | None
    total: int | None


@frozen(init=False)
class SearchQuery:
    """Which incidents, in which order, and how many of them.

    Args:
        status: A status, or several, of which an incident has one; None means any.
        source: A source, or several, of which an incident has one; None means any.
        created_after: Only incidents that were created then or later; None means at any time.
        created_before: Only incidents that were created earlier; None means at any time.
        text: Words of which the message has each, as a word or as the beginning of one, in any
            letter case: 1 to 200 characters with at least one letter or digit. None means any
            message.
        order: By which end to begin.
        limit: Incidents a page, 1 to 1000.
        after: The cursor to go on with; None means the first page.
        total: Whether to count the incidents of all pages, which takes time if there are many.

    Raises:
        InvalidIncident: With every faulty field.
    """

    status: frozenset[IncidentStatus]
    source: frozenset[IncidentSource]
    created_after: datetime
    created_before: datetime
    text: str | None
    order: IncidentOrder
    limit: int
    after: tuple[datetime, int] | None
    total: bool

    def __init__(  # noqa: PLR0913
        self,
        *,
        status: Iterable[IncidentStatus | str] | IncidentStatus | str | None = None,
        source: Iterable[IncidentSource | str] | IncidentSource | str | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        text: str | None = None,
        order: IncidentOrder | str = IncidentOrder.NEWEST,
        limit: int = DEFAULT_LIMIT,
        after: str | None = None,
        total: bool = False,
    ) -> None:
        check = Check()
        statuses = check("status", _some(status_rule, IncidentStatus), status)
        sources = check("source", _some(source_rule, IncidentSource), source)
        start = check("created_after", optional(time_bound), created_after)
        end = check("created_before", optional(time_bound), created_before)
        words = check("text", optional(_words), text)
        checked_order = check("order", _order, order)
        checked_limit = check("limit", limit_rule, limit)
        place = check("after", _cursor(checked_order), after)
        checked_total = check("total", _flag, total)
        check.done()
        self.__attrs_init__(  # pyright: ignore[reportAttributeAccessIssue]
            statuses,
            sources,
            start or EARLIEST_TIME,
            end or LATEST_TIME,
            words,
            checked_order,
            checked_limit,
            place,
            checked_total,
        )

    def cursor(self, created_at: datetime, incident_id: int) -> str:
        """Return the cursor of what comes behind an incident.

        Args:
            created_at: As the database has it, with its fraction of a second.
            incident_id: Its id.
        """
        return encode_cursor(
            (created_at - _EPOCH) // _MICROSECOND, incident_id, _ORDERS.index(self.order)
        )


def _some(rule: Callable[[object], _E], enum: type[_E]) -> Callable[[object], frozenset[_E]]:
    """Return the rule for one member or several; the empty set means any."""

    def members(value: object) -> frozenset[_E]:
        if value is None:
            return frozenset()
        if isinstance(value, str) or not isinstance(value, Iterable):
            return frozenset([rule(value)])
        found = frozenset(rule(one) for one in value)
        if not found:
            raise ValueError("must name at least one, or be None")
        return frozenset() if len(found) == len(enum) else found

    return members


def _words(value: object) -> str:
    text = storable(value)
    if not 1 <= len(text) <= TEXT_MAX_LENGTH or not any(map(str.isalnum, text)):
        raise ValueError(
            f"must have 1 to {TEXT_MAX_LENGTH} characters, and among them a letter or a digit"
        )
    return text


def _order(value: object) -> IncidentOrder:
    if not isinstance(value, str) or value not in _ORDERS:
        raise ValueError(f"must be one of: {', '.join(_ORDERS)}")
    return IncidentOrder(value)


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")  # noqa: TRY004
    return value


def _cursor(order: IncidentOrder | None) -> Callable[[object], Any]:
    def place(value: object) -> tuple[datetime, int] | None:
        if value is None:
            return None
        if not isinstance(value, str):
            raise ValueError("must be a string")  # noqa: TRY004
        microseconds, incident_id, number = decode_cursor(value, 3)
        if not 0 < incident_id <= MAX_ID or number not in range(len(_ORDERS)):
            raise ValueError("is not a cursor")
        if order is not None and _ORDERS[number] is not order:
            raise ValueError(f"is a cursor of the order {_ORDERS[number]}")
        try:
            return _EPOCH + microseconds * _MICROSECOND, incident_id
        except OverflowError:
            raise ValueError("is not a cursor") from None

    return place

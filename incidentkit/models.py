"""What an incident is, and every rule that its values obey."""

from __future__ import annotations

import unicodedata
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from attrs import NOTHING, field, fields_dict, frozen

from incidentkit.errors import FieldError, InvalidIncident

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MESSAGE_MIN_LENGTH: Final = 5
MESSAGE_MAX_LENGTH: Final = 1000
FORBIDDEN_MESSAGES: Final = frozenset({"test", "none", "null"})

MAX_ID: Final = 2**63 - 1
DEFAULT_LIMIT: Final = 10
MAX_LIMIT: Final = 1000
MAX_OFFSET: Final = 2**63 - 1

ANY: Final = "any"
"""Stands for an absent filter in a page's cache key."""

_E = TypeVar("_E", bound=StrEnum)
_T = TypeVar("_T")


class IncidentStatus(StrEnum):
    """Where an incident stands; carried in the field ``incident_type``."""

    NEW = "new"
    COMPLETED = "completed"
    FAILED = "failed"


class IncidentSource(StrEnum):
    """Who reported an incident."""

    OPERATOR = "operator"
    MONITORING = "monitoring"
    PARTNER = "partner"


def _message(value: object) -> str:
    """Strip the message, then hold it against the rules of the origin's contract."""
    if not isinstance(value, str):
        raise ValueError("must be a string")  # noqa: TRY004
    if "\x00" in value:
        raise ValueError("must not contain a NUL character")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("must not contain a lone surrogate")
    message = value.strip()
    # Normalising takes quadratic time, and what is too long is none of these words.
    if (
        len(message) <= MESSAGE_MAX_LENGTH
        and unicodedata.normalize("NFKC", message).casefold() in FORBIDDEN_MESSAGES
    ):
        raise ValueError(f"must not be one of: {', '.join(sorted(FORBIDDEN_MESSAGES))}")
    if not MESSAGE_MIN_LENGTH <= len(message) <= MESSAGE_MAX_LENGTH:
        raise ValueError(
            f"must have {MESSAGE_MIN_LENGTH} to {MESSAGE_MAX_LENGTH} characters "
            "after surrounding white space is removed"
        )
    return message


def _member(enum: type[_E]) -> Callable[[object], _E]:
    """Return the rule that a value is a member of the enum, or the string of one."""
    members = {member.value: member for member in enum}
    reason = f"must be one of: {', '.join(members)}"

    def rule(value: object) -> _E:
        member = members.get(value) if isinstance(value, str) else None
        if member is None:
            raise ValueError(reason)
        return member

    return rule


def _integer(low: int, high: int) -> Callable[[object], int]:
    """Return the rule that a value is an integer (and not a bool) between the two bounds."""

    def rule(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"must be an integer from {low} to {high}")
        return int(value)

    return rule


_status: Final = _member(IncidentStatus)
_source: Final = _member(IncidentSource)
_incident_id: Final = _integer(1, MAX_ID)
_page: Final = _integer(1, MAX_OFFSET)
_limit: Final = _integer(1, MAX_LIMIT)


class _Check:
    """Collects the faults of several fields, so that all of them can be told at once."""

    def __init__(self) -> None:
        self.errors: list[FieldError] = []

    def __call__(self, name: str, rule: Callable[[object], _T], value: object) -> _T:
        """Return what the rule makes of the value, which counts only once `done` has returned."""
        try:
            return rule(value)
        except ValueError as error:
            self.errors.append(FieldError(name, str(error)))
            return cast("_T", None)

    def done(self) -> None:
        if self.errors:
            raise InvalidIncident(self.errors)


@frozen(init=False)
class NewIncident:
    """An incident to be created: its values are checked and normalised when it is made.

    Args:
        incident_message: What happened. Surrounding white space is removed; the rest has 5 to
            1000 code points, is none of ``test``, ``none`` and ``null`` (compared after Unicode
            NFKC and casefold), and holds neither a NUL nor a lone surrogate.
        source: Who reports it: an :class:`IncidentSource` or its string value.
        incident_type: The status that it starts with: an :class:`IncidentStatus` or its string
            value.

    Raises:
        InvalidIncident: With every faulty field.
    """

    incident_message: str
    source: IncidentSource
    incident_type: IncidentStatus = IncidentStatus.NEW

    def __init__(
        self,
        incident_message: str,
        source: IncidentSource | str,
        incident_type: IncidentStatus | str = IncidentStatus.NEW,
    ) -> None:
        check = _Check()
        checked_message = check("incident_message", _message, incident_message)
        checked_source = check("source", _source, source)
        checked_type = check("incident_type", _status, incident_type)
        check.done()
        self.__attrs_init__(  # pyright: ignore[reportAttributeAccessIssue]
            checked_message, checked_source, checked_type
        )

    @classmethod
    def from_mapping(cls, values: Mapping[Any, Any]) -> NewIncident:
        """Make one from named values, refusing what is unknown and naming what is missing.

        Raises:
            InvalidIncident: With every faulty, unknown or missing field.
        """
        check = _Check()
        for name in values:
            if name not in _NEW_INCIDENT_RULES:
                check.errors.append(FieldError(str(name), "is not a known field"))
        for name, rule in _NEW_INCIDENT_RULES.items():
            if name in values:
                check(name, rule, values[name])
            elif fields_dict(cls)[name].default is NOTHING:
                check.errors.append(FieldError(name, "is required"))
        check.done()
        return cls(**values)


_NEW_INCIDENT_RULES: Final[Mapping[str, Callable[[object], object]]] = {
    "incident_message": _message,
    "source": _source,
    "incident_type": _status,
}


def _whole_utc_second(value: datetime) -> datetime:
    if value.tzinfo is None:
        raise ValueError("created_at must be an aware datetime")
    return value.astimezone(UTC).replace(microsecond=0)


@frozen
class Incident:
    """An incident as it is stored.

    Attributes:
        incident_id: Given by the database, 1 to 2^63-1, never used twice.
        incident_message: What happened.
        incident_type: The status.
        source: Who reported it.
        created_at: When the database stored it: aware, in UTC, in whole seconds, which is the
            resolution of the wire format.
    """

    incident_id: int
    incident_message: str
    incident_type: IncidentStatus
    source: IncidentSource
    created_at: datetime = field(converter=_whole_utc_second)


@frozen(init=False)
class ListQuery:
    """Which page of the list of incidents, newest first.

    Args:
        page: 1 is the newest page.
        limit: Incidents a page, 1 to 1000.
        status: Only incidents with this status; None means any.
        source: Only incidents from this source; None means any.

    Raises:
        InvalidIncident: With every faulty field, also if ``page`` times ``limit`` passes 2^63-1.
    """

    page: int
    limit: int
    status: IncidentStatus | None
    source: IncidentSource | None

    def __init__(
        self,
        page: int = 1,
        limit: int = DEFAULT_LIMIT,
        status: IncidentStatus | str | None = None,
        source: IncidentSource | str | None = None,
    ) -> None:
        check = _Check()
        checked_page = check("page", _page, page)
        checked_limit = check("limit", _limit, limit)
        checked_status = None if status is None else check("status", _status, status)
        checked_source = None if source is None else check("source", _source, source)
        check.done()
        if checked_page * checked_limit > MAX_OFFSET:
            raise InvalidIncident([FieldError("page", f"times limit must be at most {MAX_OFFSET}")])
        self.__attrs_init__(  # pyright: ignore[reportAttributeAccessIssue]
            checked_page, checked_limit, checked_status, checked_source
        )

    @property
    def offset(self) -> int:
        """How many newer incidents come before this page."""
        return (self.page - 1) * self.limit

    @property
    def cache_key(self) -> str:
        """What this page is called in the cache, ``incidents:{page}:{limit}:{status}:{source}``."""
        return f"incidents:{self.page}:{self.limit}:{self.status or ANY}:{self.source or ANY}"


def check_incident_id(incident_id: int) -> int:
    """Return the id if it is one.

    Raises:
        InvalidIncident: If it is not an integer from 1 to 2^63-1.
    """
    check = _Check()
    checked = check("incident_id", _incident_id, incident_id)
    check.done()
    return checked


def check_status_change(
    incident_id: int, status: IncidentStatus | str
) -> tuple[int, IncidentStatus]:
    """Return the id and the status if both are valid.

    Raises:
        InvalidIncident: With every faulty field.
    """
    check = _Check()
    checked_id = check("incident_id", _incident_id, incident_id)
    checked_status = check("status", _status, status)
    check.done()
    return checked_id, checked_status

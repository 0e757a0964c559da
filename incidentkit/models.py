"""What an incident is, and every rule that its values obey."""

from __future__ import annotations

import unicodedata
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from attrs import NOTHING, Factory, field, fields_dict, frozen

from incidentkit.cursor import decode_cursor
from incidentkit.errors import FieldError, InvalidIncident

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

MESSAGE_MIN_LENGTH: Final = 5
MESSAGE_MAX_LENGTH: Final = 1000
FORBIDDEN_MESSAGES: Final = frozenset({"test", "none", "null"})

NAME_MAX_LENGTH: Final = 255
"""Characters of an actor, a deduplication key or an idempotency key."""

NOTE_MAX_LENGTH: Final = 1000

MAX_ID: Final = 2**63 - 1
DEFAULT_LIMIT: Final = 10
MAX_LIMIT: Final = 1000
MAX_OFFSET: Final = 2**63 - 1

MAX_MANY: Final = 100_000
"""Incidents that are created together, at most."""

MAX_FAULTS: Final = 10
"""How many of these are named if they are none."""

MAX_WAIT: Final = 30
"""Seconds that a call may wait for changes."""

LATEST: Final = "latest"
"""Stands for the cursor of the newest change."""

EARLIEST_TIME: Final = datetime(1, 1, 2, tzinfo=UTC)
LATEST_TIME: Final = datetime(9999, 12, 31, tzinfo=UTC)
"""Bounds of every time that an incident can have."""

ANY: Final = "any"
"""Stands for an absent filter in a page's cache key."""

_E = TypeVar("_E", bound=StrEnum)
_T = TypeVar("_T")


class IncidentStatus(StrEnum):
    """Where an incident stands; carried in the field ``incident_type``."""

    NEW = "new"
    COMPLETED = "completed"
    FAILED = "failed"


OPEN: Final = IncidentStatus.NEW
"""The status of an incident that is open; one with any other has ended."""


class IncidentSource(StrEnum):
    """Who reported an incident."""

    OPERATOR = "operator"
    MONITORING = "monitoring"
    PARTNER = "partner"


class EventKind(StrEnum):
    """What happened to an incident."""

    CREATED = "created"
    RECURRED = "recurred"
    STATUS_CHANGED = "status_changed"
    NOTED = "noted"
    PURGED = "purged"


def storable(value: object) -> str:
    """Return the value if it is a text that both databases can hold."""
    if not isinstance(value, str):
        raise ValueError("must be a string")  # noqa: TRY004
    if "\x00" in value:
        raise ValueError("must not contain a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("must not contain a lone surrogate") from None
    return value


def _message(value: object) -> str:
    """Strip the message, then hold it against the rules of the origin's contract."""
    message = storable(value).strip()
    # Normalising takes quadratic time, and never makes a text shorter than it is.
    if (
        len(message) < MESSAGE_MIN_LENGTH
        and unicodedata.normalize("NFKC", message).casefold() in FORBIDDEN_MESSAGES
    ):
        raise ValueError(f"must not be one of: {', '.join(sorted(FORBIDDEN_MESSAGES))}")
    if not MESSAGE_MIN_LENGTH <= len(message) <= MESSAGE_MAX_LENGTH:
        raise ValueError(
            f"must have {MESSAGE_MIN_LENGTH} to {MESSAGE_MAX_LENGTH} characters "
            "after surrounding white space is removed"
        )
    return message


def _text(low: int, high: int) -> Callable[[object], str]:
    """Return the rule that a value is a text of so many characters, taken as it is."""

    def rule(value: object) -> str:
        text = storable(value)
        if not low <= len(text) <= high:
            raise ValueError(f"must have {low} to {high} characters")
        return text

    return rule


def optional(rule: Callable[[object], _T]) -> Callable[[object], _T | None]:
    """Return the rule that a value is None, or keeps the rule."""
    return lambda value: None if value is None else rule(value)


def _note(value: object) -> str:
    """Strip the note, then hold it against the rules."""
    note = storable(value).strip()
    if not 1 <= len(note) <= NOTE_MAX_LENGTH:
        raise ValueError(
            f"must have 1 to {NOTE_MAX_LENGTH} characters after surrounding white space is removed"
        )
    return note


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


status_rule: Final = _member(IncidentStatus)
source_rule: Final = _member(IncidentSource)
_incident_id: Final = _integer(1, MAX_ID)
_page: Final = _integer(1, MAX_OFFSET)
limit_rule: Final = _integer(1, MAX_LIMIT)
_version: Final = _integer(1, MAX_ID)
_name: Final = _text(1, NAME_MAX_LENGTH)


class Check:
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
        """Raise if there were faults.

        Raises:
            InvalidIncident: With all of them.
        """
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
        dedup_key: What it is about, in 1 to 255 characters: while an incident with this key is
            open, no second one is made, and that one counts a further occurrence. Only for an
            incident that starts as ``new``. None means that it is always a new one.

    Raises:
        InvalidIncident: With every faulty field.
    """

    incident_message: str
    source: IncidentSource
    incident_type: IncidentStatus = IncidentStatus.NEW
    dedup_key: str | None = None

    def __init__(
        self,
        incident_message: str,
        source: IncidentSource | str,
        incident_type: IncidentStatus | str = IncidentStatus.NEW,
        dedup_key: str | None = None,
    ) -> None:
        check = Check()
        checked_message = check("incident_message", _message, incident_message)
        checked_source = check("source", source_rule, source)
        checked_type = check("incident_type", status_rule, incident_type)
        checked_key = check("dedup_key", optional(_name), dedup_key)
        if checked_key is not None and checked_type not in (None, OPEN):
            check.errors.append(FieldError("dedup_key", f"needs the incident_type {OPEN}"))
        check.done()
        self.__attrs_init__(  # pyright: ignore[reportAttributeAccessIssue]
            checked_message, checked_source, checked_type, checked_key
        )

    @classmethod
    def from_mapping(cls, values: Mapping[Any, Any]) -> NewIncident:
        """Make one from named values, refusing what is unknown and naming what is missing.

        Raises:
            InvalidIncident: With every faulty, unknown or missing field.
        """
        if not _NEW_INCIDENT_NEEDS <= values.keys() <= _NEW_INCIDENT_RULES.keys():
            _check_mapping(cls, _NEW_INCIDENT_RULES, values)
        return cls(**values)


def _check_mapping(
    model: type[Any],
    rules: Mapping[str, Callable[[object], object]],
    values: Mapping[Any, Any],
) -> None:
    """Hold named values against the rules of a model's fields.

    Raises:
        InvalidIncident: With every faulty, unknown or missing field.
    """
    check = Check()
    for name in values:
        if name not in rules:
            check.errors.append(FieldError(str(name), "is not a known field"))
    for name, rule in rules.items():
        if name in values:
            check(name, rule, values[name])
        elif fields_dict(model)[name].default is NOTHING:
            check.errors.append(FieldError(name, "is required"))
    check.done()


_NEW_INCIDENT_RULES: Final[Mapping[str, Callable[[object], object]]] = {
    "incident_message": _message,
    "source": source_rule,
    "incident_type": status_rule,
    "dedup_key": optional(_name),
}
_NEW_INCIDENT_NEEDS: Final = {"incident_message", "source"}


def _whole_utc_second(value: datetime) -> datetime:
    # As the databases return it.
    if value.tzinfo is UTC and not value.microsecond:
        return value
    if value.tzinfo is None:
        raise ValueError("a time must be an aware datetime")
    return value.astimezone(UTC).replace(microsecond=0)


def _whole_utc_second_or_none(value: datetime | None) -> datetime | None:
    return None if value is None else _whole_utc_second(value)


@frozen
class Incident:
    """An incident as it is stored.

    Attributes:
        incident_id: Given by the database, 1 to 2^63-1, never used twice.
        incident_message: What happened.
        incident_type: The status.
        source: Who reported it.
        created_at: When the database stored it: aware, in UTC, in whole seconds, which is the
            resolution of the wire format; so are the other times.
        version: 1 when it is created, and one more with each change of its fields.
        dedup_key: What it is about; None means that nothing is counted as a repetition of it.
        occurrences: How often it was reported, at least 1.
        last_seen_at: When it was last reported.
        ended_at: When its status left ``new``; None while it is open, and if its end was not
            recorded because somebody else's program changed the status.
    """

    incident_id: int
    incident_message: str
    incident_type: IncidentStatus
    source: IncidentSource
    created_at: datetime = field(converter=_whole_utc_second)
    version: int = 1
    dedup_key: str | None = None
    occurrences: int = 1
    last_seen_at: datetime = field(
        default=Factory(lambda self: self.created_at, takes_self=True), converter=_whole_utc_second
    )
    ended_at: datetime | None = field(default=None, converter=_whole_utc_second_or_none)


@frozen
class IncidentEvent:
    """One change of an incident, as it was recorded with it; a row of ``incident_event``.

    Attributes:
        cursor: Its place in the order of all events, for ``after=``.
        incident_id: The incident that changed.
        kind: What happened.
        from_status: The status before; None where the status did not change.
        to_status: The status after; None where the status did not change.
        actor: Who did it; None if nobody was named.
        note: What was said about it; None if nothing was. Of a recurrence, the message that it
            came with, if that differs from the incident's.
        at: When the database recorded it: aware, in UTC, in whole seconds.
    """

    cursor: str
    incident_id: int
    kind: EventKind
    from_status: IncidentStatus | None
    to_status: IncidentStatus | None
    actor: str | None
    note: str | None
    at: datetime = field(converter=_whole_utc_second)


@frozen
class ChangePage:
    """Some changes, and where to go on.

    Attributes:
        changes: In the order of their commits; empty if there are none yet.
        next: The cursor to go on behind them. None means that nothing has ever happened, and to
            begin at the beginning once more.
    """

    changes: list[IncidentEvent]
    next: str | None


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
        check = Check()
        checked_page = check("page", _page, page)
        checked_limit = check("limit", limit_rule, limit)
        checked_status = None if status is None else check("status", status_rule, status)
        checked_source = None if source is None else check("source", source_rule, source)
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


def check_many(incidents: Iterable[NewIncident]) -> list[NewIncident]:
    """Return incidents that are to be created together.

    Raises:
        InvalidIncident: If one is something else, or there are more than :data:`MAX_MANY`.
    """
    # Not all of an iterator that may have no end.
    checked = list(islice(incidents, MAX_MANY + 1))
    if len(checked) > MAX_MANY:
        raise InvalidIncident([FieldError("incidents", f"must be at most {MAX_MANY}")])
    given: list[object] = [*checked]
    wrong = [n for n, incident in enumerate(given) if not isinstance(incident, NewIncident)]
    if wrong:
        reason = "must be a NewIncident"
        raise InvalidIncident([FieldError(f"incidents[{n}]", reason) for n in wrong[:MAX_FAULTS]])
    return checked


def check_incident_id(incident_id: int) -> int:
    """Return the id if it is one.

    Raises:
        InvalidIncident: If it is not an integer from 1 to 2^63-1.
    """
    check = Check()
    checked = check("incident_id", _incident_id, incident_id)
    check.done()
    return checked


def check_history(incident_id: int, limit: int, after: str | None) -> tuple[int, int, int]:
    """Return the id, the limit, and the id of the event that the cursor stands for, or 0.

    Raises:
        InvalidIncident: With every faulty argument.
    """
    check = Check()
    checked_id = check("incident_id", _incident_id, incident_id)
    checked_limit = check("limit", limit_rule, limit)
    _, event_id, _, of_incident = check("after", optional(event_cursor), after) or (0, 0, 0, None)
    if of_incident not in (None, checked_id):
        check.errors.append(FieldError("after", "is not a cursor of this incident"))
    check.done()
    return checked_id, checked_limit, event_id


def event_cursor(value: object) -> tuple[int, ...]:
    """Return the numbers in the cursor of an event: its place, its nonce and its incident.

    Raises:
        ValueError: With the rule that it breaks.
    """
    if not isinstance(value, str):
        raise ValueError("must be a string")  # noqa: TRY004
    return decode_cursor(value, 4)


def check_changes(after: str | None, limit: int, wait: float) -> None:
    """Return if these say which changes to read.

    Raises:
        InvalidIncident: With every faulty argument.
    """
    check = Check()
    if after != LATEST:
        check("after", optional(event_cursor), after)
    check("limit", limit_rule, limit)
    check("wait", _wait, wait)
    check.done()


def _wait(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MAX_WAIT:
        raise ValueError(f"must be a number of seconds from 0 to {MAX_WAIT}")
    return value


def check_ended_before(ended_before: datetime) -> datetime:
    """Return the time if it is an aware one.

    Raises:
        InvalidIncident: If it is not.
    """
    check = Check()
    checked = check("ended_before", time_bound, ended_before)
    check.done()
    return checked


def time_bound(value: object) -> datetime:
    """Return an aware time in UTC, rounded up to a whole second: incidents show no others.

    Raises:
        ValueError: With the rule that it breaks.
    """
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise ValueError("must be an aware datetime")
    time = min(max(value, EARLIEST_TIME), LATEST_TIME).astimezone(UTC)
    return time.replace(microsecond=0) + timedelta(seconds=time.microsecond > 0)


def check_actor(actor: str) -> str:
    """Return the actor's name if it can be stored.

    Raises:
        InvalidIncident: If it has not 1 to 255 characters.
    """
    check = Check()
    checked = check("actor", _name, actor)
    check.done()
    return checked


def check_idempotency_key(idempotency_key: str) -> str:
    """Return the key if it is one.

    Raises:
        InvalidIncident: If it has not 1 to 255 characters.
    """
    check = Check()
    checked = check("idempotency_key", _name, idempotency_key)
    check.done()
    return checked


@frozen(init=False)
class NewNote:
    """A note to be added to the history of an incident.

    Args:
        note: Surrounding white space is removed; the rest has 1 to 1000 characters.

    Raises:
        InvalidIncident: If it has not.
    """

    note: str

    def __init__(self, note: str) -> None:
        check = Check()
        checked_note = check("note", _note, note)
        check.done()
        self.__attrs_init__(checked_note)  # pyright: ignore[reportAttributeAccessIssue]

    @classmethod
    def from_mapping(cls, values: Mapping[Any, Any]) -> NewNote:
        """Make one from named values, refusing what is unknown and naming what is missing.

        Raises:
            InvalidIncident: With every faulty, unknown or missing field.
        """
        _check_mapping(cls, {"note": _note}, values)
        return cls(**values)


def check_note(incident_id: int, note: str) -> tuple[int, str]:
    """Return the id and the note if both are valid.

    Raises:
        InvalidIncident: With every faulty argument.
    """
    check = Check()
    checked_id = check("incident_id", _incident_id, incident_id)
    checked_note = check("note", _note, note)
    check.done()
    return checked_id, checked_note


@frozen(init=False)
class StatusChange:
    """A change of an incident's status.

    Args:
        incident_id: 1 to 2^63-1.
        status: The status that it gets.
        note: What is said about it, in 1 to 1000 characters; None means nothing.
        expected_version: The version that the incident has to have; None means any.

    Raises:
        InvalidIncident: With every faulty field.
    """

    incident_id: int
    status: IncidentStatus
    note: str | None
    expected_version: int | None

    def __init__(
        self,
        incident_id: int,
        status: IncidentStatus | str,
        note: str | None = None,
        expected_version: int | None = None,
    ) -> None:
        check = Check()
        checked_id = check("incident_id", _incident_id, incident_id)
        checked_status = check("status", status_rule, status)
        checked_note = check("note", optional(_note), note)
        checked_version = check("expected_version", optional(_version), expected_version)
        check.done()
        self.__attrs_init__(  # pyright: ignore[reportAttributeAccessIssue]
            checked_id, checked_status, checked_note, checked_version
        )

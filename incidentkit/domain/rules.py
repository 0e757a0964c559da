"""Check given values, and collect every fault before one error is raised.

A rule takes a given value and returns the value to use, or raises ValueError with the reason. A
model has its rules as attrs converters, and rules about several fields as validators.
:func:`collect` makes converters leave a :class:`Fault` in the field instead of raising.
:func:`raise_faults`, which attrs calls once all fields are set, runs the validators and raises one
error for all faults::

    @frozen(field_transformer=collect)
    class NewNote:
        note: str = field(converter=note)

        __attrs_post_init__ = raise_faults
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import wraps
from itertools import islice
from typing import Any, Final, NamedTuple, TypeVar

from attrs import NOTHING, Attribute, AttrsInstance, fields, fields_dict

from incidentkit.domain.cursor import decode_cursor
from incidentkit.domain.errors import FieldError, InvalidIncident
from incidentkit.domain.values import (
    EARLIEST_TIME,
    FORBIDDEN_MESSAGES,
    LATEST,
    LATEST_TIME,
    MAX_ID,
    MAX_LIMIT,
    MAX_MANY,
    MAX_OFFSET,
    MAX_WAIT,
    MESSAGE_MAX_LENGTH,
    MESSAGE_MIN_LENGTH,
    NAME_MAX_LENGTH,
    NOTE_MAX_LENGTH,
    OPEN,
    TAG_PATTERN,
    TEXT_MAX_LENGTH,
    TEXT_MAX_WORDS,
    IncidentOrder,
    IncidentSource,
    IncidentStatus,
    OrderName,
    SourceName,
    StatusName,
    VersionMatch,
)
from incidentkit.domain.words import phrases

MAX_FAULTS: Final = 10
"""Maximum number of invalid items listed in one error."""

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND: Final = timedelta(microseconds=1)
_RULE: Final = "rule"
"""The metadata key of a field's validator: a rule about several fields."""

ORDERS: Final = tuple(IncidentOrder)
"""The orders of a search, at the index that stands for each in a cursor."""

_E = TypeVar("_E", bound=StrEnum)
_Given = TypeVar("_Given")
_T = TypeVar("_T")


class Fault:
    """Stands in a field for a faulty value until the error that names the field is raised.

    Attributes:
        parts: The rules that parts of the given value break, by their places inside it, such as
            ``.labels[3]`` or ``[7]``; the empty place is the value itself.
    """

    def __init__(self, parts: Mapping[str, str]) -> None:
        self.parts = parts

    def errors(self, name: str) -> list[FieldError]:
        """Return the errors of the field with this name."""
        return [FieldError(f"{name}{place}", reason) for place, reason in self.parts.items()]


class PartError(ValueError):
    """A part of a value breaks a rule.

    Attributes:
        at: The place of the part inside the value, such as ``.labels[3]``; empty: the value itself.
    """

    def __init__(self, reason: str, at: str = "") -> None:
        super().__init__(reason)
        self.at = at


class PartsError(ValueError):
    """Several parts of a value break rules.

    Attributes:
        parts: The rules that they break, by their places inside the value.
    """

    def __init__(self, parts: Mapping[str, str]) -> None:
        super().__init__(", ".join(f"{place} {reason}" for place, reason in parts.items()))
        self.parts = parts


def collect(_: type, attributes: list[Attribute[Any]]) -> list[Attribute[Any]]:
    """Make the rules of a model's fields leave a fault instead of raising; for attrs."""
    return [
        attribute.evolve(
            converter=_converting(attribute.converter),
            # Run by raise_faults(), since a host may disable the validators of attrs.
            validator=None,
            metadata={
                **attribute.metadata,
                **({_RULE: attribute.validator} if attribute.validator else {}),
            },
        )
        for attribute in attributes
    ]


def _converting(rule: Any) -> Callable[[Any], Any]:
    # attrs copies the types in the signature of the model from the rule.
    @wraps(rule)
    def convert(value: Any) -> Any:
        try:
            return rule(value)
        except PartError as error:
            return Fault({error.at: str(error)})
        except PartsError as error:
            return Fault(error.parts)
        except ValueError as error:
            return Fault({"": str(error)})

    return convert


def raise_faults(model: AttrsInstance) -> None:
    """Raise if a field of the model holds a fault, or breaks a rule about several fields.

    Raises:
        InvalidIncident: With every fault, in the order of the fields.
    """
    faults = []
    for attribute in fields(type(model)):
        value = getattr(model, attribute.name)
        rule = attribute.metadata.get(_RULE)
        if rule is not None and value is not None and type(value) is not Fault:
            try:
                rule(model, attribute, value)
            except ValueError as error:
                value = Fault({"": str(error)})
        if type(value) is Fault:
            faults += value.errors(attribute.name)
    if faults:
        raise InvalidIncident(faults)


def check_names(model: type[AttrsInstance], given: Mapping[Any, Any]) -> None:
    """Raise if named values do not fit the fields of a model.

    Raises:
        InvalidIncident: With every unknown, faulty or missing field.
    """
    known = fields_dict(model)
    required = {name for name, attribute in known.items() if attribute.default is NOTHING}
    if required <= given.keys() <= known.keys():
        return
    faults = [FieldError(str(name), "is not a known field") for name in given if name not in known]
    for name, attribute in known.items():
        if name not in given:
            if name in required:
                faults.append(FieldError(name, "is required"))
            continue
        convert: Any = attribute.converter
        value = convert(given[name])
        if isinstance(value, Fault):
            faults += value.errors(name)
    raise InvalidIncident(faults)


def check(name: str, rule: Callable[[_Given], _T], value: _Given) -> _T:
    """Return the value to use for a single argument.

    Raises:
        InvalidIncident: With the argument's name and the reason.
    """
    try:
        return rule(value)
    except ValueError as error:
        raise InvalidIncident([FieldError(name, str(error))]) from None


def storable(value: object) -> str:
    """Return a text that both databases can hold: without NUL characters or lone surrogates."""
    if not isinstance(value, str):
        raise ValueError("must be a string")  # noqa: TRY004
    if "\x00" in value:
        raise ValueError("must not contain a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("must not contain a lone surrogate") from None
    return value


def message(value: str) -> str:
    """Return the message, if it is valid, without surrounding white space."""
    stripped = storable(value).strip()
    # Normalizing takes quadratic time. A longer text never becomes one of these: NFKC shortens a
    # text only by composing characters, and no composed character is ASCII.
    if (
        len(stripped) < MESSAGE_MIN_LENGTH
        and unicodedata.normalize("NFKC", stripped).casefold() in FORBIDDEN_MESSAGES
    ):
        raise ValueError(f"must not be one of: {', '.join(sorted(FORBIDDEN_MESSAGES))}")
    if not MESSAGE_MIN_LENGTH <= len(stripped) <= MESSAGE_MAX_LENGTH:
        raise ValueError(
            f"must have {MESSAGE_MIN_LENGTH} to {MESSAGE_MAX_LENGTH} characters "
            "after surrounding white space is removed"
        )
    return stripped


def note(value: str) -> str:
    """Return the note without surrounding white space."""
    stripped = storable(value).strip()
    if not 1 <= len(stripped) <= NOTE_MAX_LENGTH:
        raise ValueError(
            f"must have 1 to {NOTE_MAX_LENGTH} characters after surrounding white space is removed"
        )
    return stripped


def optional_note(value: str | None) -> str | None:
    """Return the note, or None."""
    return None if value is None else note(value)


def name(value: str) -> str:
    """Return an actor, a deduplication key or an idempotency key, exactly as given."""
    text = storable(value)
    if not 1 <= len(text) <= NAME_MAX_LENGTH:
        raise ValueError(f"must have 1 to {NAME_MAX_LENGTH} characters")
    return text


def optional_name(value: str | None) -> str | None:
    """Return the name, or None."""
    return None if value is None else name(value)


def names(value: Iterable[str]) -> tuple[str, ...]:
    """Return at most 100,000 deduplication keys; a single string is refused."""
    return _names(value)


def _names(value: object) -> tuple[str, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise ValueError("must be several strings, as in a list")  # noqa: TRY004
    # Read no more than needed: an iterator may be endless.
    given = tuple(islice(value, MAX_MANY + 1))
    if len(given) > MAX_MANY:
        raise ValueError(f"must be at most {MAX_MANY}")
    wrong: dict[str, str] = {}
    for number, each in enumerate(given):
        try:
            name(each)
        except ValueError as error:
            wrong[f"[{number}]"] = str(error)
            if len(wrong) == MAX_FAULTS:
                break
    if wrong:
        raise PartsError(wrong)
    return given


_INCIDENT_TAG: Final = re.compile(TAG_PATTERN, re.ASCII)
_STATUSES: Final = {member.value: member for member in IncidentStatus}
_LAST_STATUSES: Final = {name: member for name, member in _STATUSES.items() if member is not OPEN}
_SOURCES: Final = {member.value: member for member in IncidentSource}
_ORDERS: Final = {member.value: member for member in IncidentOrder}


def _member(value: object, members: Mapping[str, _E]) -> _E:
    member = members.get(value) if isinstance(value, str) else None
    if member is None:
        raise ValueError(f"must be one of: {', '.join(members)}")
    return member


def status(value: IncidentStatus | StatusName) -> IncidentStatus:
    """Return the status; a string stands for the member with this value."""
    return _member(value, _STATUSES)


def optional_status(value: IncidentStatus | StatusName | None) -> IncidentStatus | None:
    """Return the status, or None."""
    return None if value is None else status(value)


def last_status(value: IncidentStatus | StatusName) -> IncidentStatus:
    """Return the status of an incident that has ended: any but ``new``."""
    return _member(value, _LAST_STATUSES)


def source(value: IncidentSource | SourceName) -> IncidentSource:
    """Return the source; a string stands for the member with this value."""
    return _member(value, _SOURCES)


def optional_source(value: IncidentSource | SourceName | None) -> IncidentSource | None:
    """Return the source, or None."""
    return None if value is None else source(value)


def order(value: IncidentOrder | OrderName) -> IncidentOrder:
    """Return the order; a string stands for the member with this value."""
    return _member(value, _ORDERS)


def statuses(
    value: Iterable[IncidentStatus | StatusName] | IncidentStatus | StatusName | None,
) -> frozenset[IncidentStatus] | None:
    """Return one status or several as a set; None, or all of them, is no filter."""
    return _some(value, _STATUSES)


def sources(
    value: Iterable[IncidentSource | SourceName] | IncidentSource | SourceName | None,
) -> frozenset[IncidentSource] | None:
    """Return one source or several as a set; None, or all of them, is no filter."""
    return _some(value, _SOURCES)


def _some(value: object, known: Mapping[str, _E]) -> frozenset[_E] | None:
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Iterable):
        return frozenset([_member(value, known)])
    members = frozenset(_member(one, known) for one in value)
    if not members:
        raise ValueError("must name at least one, or be None")
    return None if len(members) == len(known) else members


def _integer(value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"must be an integer from {low} to {high}")
    return int(value)


def incident_id(value: int) -> int:
    """Return the id, 1 to 2^63-1."""
    return _integer(value, 1, MAX_ID)


def optional_version(value: int | str | VersionMatch | None) -> int | str | VersionMatch | None:
    """Return the version, 1 to 2^63-1; the tag of an incident; a condition on both; or None."""
    if isinstance(value, VersionMatch):
        for each in (*(value.any_of or ()), *value.none_of):
            _version(each)
        return value
    return None if value is None else _version(value)


def _version(value: int | str) -> int | str:
    if isinstance(value, str):
        if _INCIDENT_TAG.fullmatch(value) is None:
            raise ValueError(f"must be an integer from 1 to {MAX_ID}, or the tag of an incident")
        return value
    return _integer(value, 1, MAX_ID)


def page(value: int) -> int:
    """Return the page, at least 1."""
    return _integer(value, 1, MAX_OFFSET)


def limit(value: int) -> int:
    """Return the limit, 1 to 1000."""
    return _integer(value, 1, MAX_LIMIT)


def optional_batch(value: int | None) -> int | None:
    """Return the number of incidents to commit at a time, or None."""
    return None if value is None else _integer(value, 1, MAX_MANY)


def flag(value: bool) -> bool:  # noqa: FBT001
    """Return the flag; only a bool is accepted, not 0 or 1."""
    if not isinstance(value, bool):
        raise ValueError("must be true or false")  # noqa: TRY004
    return value


def wait(value: float) -> float:
    """Return the seconds to wait, 0 to 30."""
    return _seconds(value)


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MAX_WAIT:
        raise ValueError(f"must be a number of seconds from 0 to {MAX_WAIT}")
    return value


_NO_TIME: Final = "must be YYYY-MM-DD HH:MM:SS in UTC, or a time of RFC 3339"
TIME_PATTERN: Final = (
    r"(\d{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01]))"
    r"[Tt ]([01]\d:[0-5]\d|2[0-3]:[0-5]\d):([0-5]\d|60)(?:\.(\d+))?"
    r"([Zz]|[+-](?:[01]\d|2[0-3]):[0-5]\d)?"
)
"""A time in a request. Some days of this form do not exist."""

_TIME: Final = re.compile(TIME_PATTERN, re.ASCII)
_BLANK_OFFSET: Final = re.compile(r":\d\d(?:\.\d+)? \d\d:\d\d$", re.ASCII)


def time_text(value: str) -> datetime:
    """Return the time of a text: ``YYYY-MM-DD HH:MM:SS`` in UTC, or RFC 3339 with an offset.

    The date and the time may be separated by the letter ``T``, in either case. A leap second counts
    as the second after it.
    """
    found = _TIME.fullmatch(value)
    if found is None:
        if _BLANK_OFFSET.search(value):
            raise ValueError("has a blank where its offset needs a +: write %2B in a URL")
        raise ValueError(_NO_TIME)
    date, time, second, fraction, offset = found.groups()
    text = f"{date}T{time}:{'59' if second == '60' else second}{offset or 'Z'}".upper()
    try:
        moment = datetime.fromisoformat(text)
        if second == "60":
            moment += timedelta(seconds=1)
        elif fraction and fraction.strip("0"):
            moment += timedelta(microseconds=max(1, int(f"{fraction:0<6}"[:6])))
    except (OverflowError, ValueError):
        raise ValueError(_NO_TIME) from None
    return moment


def time_bound(value: datetime) -> datetime:
    """Return an aware time in UTC, rounded up to a whole second, the resolution of incidents."""
    return _time_bound(value)


def _time_bound(value: object) -> datetime:
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise ValueError("must be an aware datetime")
    time = min(max(value, EARLIEST_TIME), LATEST_TIME).astimezone(UTC)
    return time.replace(microsecond=0) + timedelta(seconds=time.microsecond > 0)


_ORIGIN: Final = re.compile(
    r"[a-z][a-z0-9+.-]*://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[1-9]\d{0,4})?", re.ASCII
)
_DEFAULT_PORTS: Final = {"http": ":80", "https": ":443"}


def origin(value: str) -> str:
    """Return the origin of a page as a browser sends it, or ``*`` for any origin."""
    text = _string(value).lower()
    if text != "*" and _ORIGIN.fullmatch(text) is None:
        raise ValueError("must be origins such as https://board.example.com, or *")
    return text.removesuffix(_DEFAULT_PORTS.get(text.partition("://")[0], "?"))


def lower_bound(value: datetime | None) -> datetime:
    """Return the bound; None is a bound below every time."""
    return EARLIEST_TIME if value is None else time_bound(value)


def upper_bound(value: datetime | None) -> datetime:
    """Return the bound; None is a bound above every time."""
    return LATEST_TIME if value is None else time_bound(value)


def optional_text(value: str | None) -> str | None:
    """Return the text of a search, or None."""
    if value is None:
        return None
    text = storable(value)
    found = phrases(text) if len(text) <= TEXT_MAX_LENGTH else []
    if not found:
        raise ValueError(
            f"must have 1 to {TEXT_MAX_LENGTH} characters, with at least one letter or digit"
        )
    if len(found) > TEXT_MAX_WORDS:
        raise ValueError(f"must have at most {TEXT_MAX_WORDS} different words and phrases")
    return text


class EventCursor(NamedTuple):
    """The numbers in the cursor of an event.

    Attributes:
        transaction_id: The transaction that recorded it.
        event_id: Its id.
        nonce: A random number that distinguishes events with the same id in two databases.
        incident_id: The incident that changed.
    """

    transaction_id: int
    event_id: int
    nonce: int
    incident_id: int


def event_cursor(value: str) -> EventCursor:
    """Return the numbers in the cursor of an event."""
    return EventCursor(*decode_cursor(_string(value), len(EventCursor._fields)))


def optional_event_cursor(value: str | None) -> EventCursor | None:
    """Return the numbers in the cursor of an event, or None."""
    return None if value is None else event_cursor(value)


def changes_cursor(value: str | None) -> str | None:
    """Return the cursor of an event, ``latest`` or None."""
    if value is not None and value != LATEST:
        event_cursor(value)
    return value


class SearchCursor(NamedTuple):
    """The content of a search cursor: the last incident of the page before.

    Attributes:
        created_at: Its time, with the fraction of a second that the database holds.
        incident_id: Its id.
        order: The order of the search.
    """

    created_at: datetime
    incident_id: int
    order: IncidentOrder


def optional_search_cursor(value: str | None) -> SearchCursor | None:
    """Return the content of a search cursor, or None."""
    if value is None:
        return None
    microseconds, incident_id_, number = decode_cursor(_string(value), len(SearchCursor._fields))
    if not 0 < incident_id_ <= MAX_ID or number not in range(len(ORDERS)):
        raise ValueError("is not a cursor")
    try:
        created_at = EPOCH + microseconds * MICROSECOND
    except OverflowError:
        raise ValueError("is not a cursor") from None
    return SearchCursor(created_at, incident_id_, ORDERS[number])


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a string")  # noqa: TRY004
    return value

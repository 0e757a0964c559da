"""Validation rules for incidents and lists."""
# ruff: noqa: RUF001  (the tests use look-alike letters)

from __future__ import annotations

import unicodedata
from datetime import UTC, datetime, timedelta, timezone
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Any

import pytest
from attrs import evolve, validators
from attrs.exceptions import FrozenInstanceError
from hypothesis import example, given
from hypothesis import strategies as st

from incidentkit import (
    FieldError,
    Incident,
    IncidentSource,
    IncidentStatus,
    InvalidIncident,
    ListQuery,
    NewIncident,
    acting_as,
)
from incidentkit.domain import rules
from incidentkit.domain.commands import StatusChange
from tests.strategies import (
    WHITE_SPACE,
    characters,
    padding,
    sources,
    statuses,
    strange_values,
    stripped_messages,
)

if TYPE_CHECKING:
    from collections.abc import Callable

MAX = 9223372036854775807

NOT_A_STRING = "must be a string"
NUL = "must not contain a NUL character"
SURROGATE = "must not contain a lone surrogate"
FORBIDDEN = "must not be one of: none, null, test"
LENGTH = "must have 5 to 1000 characters after surrounding white space is removed"
STATUS = "must be one of: new, completed, failed"
SOURCE = "must be one of: operator, monitoring, partner"
ID = "must be an integer from 1 to 9223372036854775807"

# Every way to write a letter that becomes the letter after NFKC and casefold.
SPELLINGS: dict[str, list[str]] = {}
for _character in map(chr, range(0x20000)):
    if (_plain := unicodedata.normalize("NFKC", _character).casefold()) in set("testnonull"):
        SPELLINGS.setdefault(_plain, []).append(_character)

forbidden = st.sampled_from(["test", "none", "null"]).flatmap(
    lambda word: st.builds("".join, st.tuples(*(st.sampled_from(SPELLINGS[c]) for c in word)))
)

unprintable = st.text(st.sampled_from("\x00\ud800\udbff\udc00\udfff"), min_size=1, max_size=2)


class Disguised:
    """An object whose string is the value of a member."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text


# Values that are no member of either enum, nor the string of one.
strangers = strange_values.filter(
    lambda value: value not in [*IncidentStatus, *IncidentSource]
) | st.sampled_from(
    [
        *[True, 0, None, b"new", ["new"], {"operator": 1}],
        *["New", " new", "operator\x00", Disguised("new"), Disguised("operator")],
    ]
)

not_integers = strange_values.filter(lambda value: type(value) is not int) | st.sampled_from(
    [True, False, 1.0, "1", "1_0", "٣", None, b"1"]
)

offsets = st.timedeltas(timedelta(hours=-23, minutes=-59), timedelta(hours=23, minutes=59))
aware_datetimes = st.datetimes(
    datetime(1, 1, 2),  # noqa: DTZ001
    datetime(9999, 12, 30),  # noqa: DTZ001
    timezones=st.builds(timezone, offsets),
)


def faults(make: Callable[[], object]) -> dict[str, str]:
    """Return the reason for each faulty field, in the order of the error."""
    with pytest.raises(InvalidIncident) as caught:
        make()
    errors = caught.value.errors
    assert len({error.field for error in errors}) == len(errors) > 0
    return {error.field: error.reason for error in errors}


def message_fault(message: Any) -> str:
    """Return the reason for the message's fault, which must be the only one."""
    found = faults(lambda: NewIncident(message, IncidentSource.OPERATOR))
    assert list(found) == ["incident_message"]
    return found["incident_message"]


# Messages


@given(padding, stripped_messages(max_size=1000), padding)
def test_message_is_stored_stripped_and_otherwise_unaltered(
    before: str, message: str, after: str
) -> None:
    """Surrounding white space is removed, and no other code point changes."""
    incident = NewIncident(before + message + after, "operator")
    assert incident.incident_message == message
    assert type(incident.incident_message) is str


@given(st.text(characters, max_size=12))
@example("")
@example(WHITE_SPACE)
@example("full" + " " * 1000)
@example("\u200bfull")
def test_only_length_decides_over_ordinary_text(text: str) -> None:
    """A storable text is accepted exactly when 5 to 1000 code points remain after stripping."""
    length = len(text.strip())
    if 5 <= length <= 1000:
        assert NewIncident(text, "partner").incident_message == text.strip()
    else:
        assert message_fault(text) in ({LENGTH, FORBIDDEN} if length <= 4 else {LENGTH})


@pytest.mark.parametrize("character", ["x", "ß", "Ａ", "\U0001f525", "\u0301"])
@pytest.mark.parametrize(("length", "accepted"), [(4, False), (5, True), (1000, True)])
def test_shortest_and_longest_message(character: str, length: int, *, accepted: bool) -> None:
    """A message has 5 to 1000 code points, counted after stripping."""
    text = f" \t{character * length}\n"
    if accepted:
        assert NewIncident(text, "operator").incident_message == character * length
        assert message_fault(f" {character * 1001} ") == LENGTH
    else:
        assert message_fault(text) == LENGTH


@given(padding, forbidden, padding)
@example("", "test", "")
@example("", "TeSt", " ")
@example("\u3000", "ｎｕｌｌ", "")
@example(" ", "𝐍𝕆ⓝᵉ", "\xa0")
@example("", "teﬆ", "")
@example("", "teſt", "")
def test_forbidden_words_are_refused_however_they_are_written(
    before: str, word: str, after: str
) -> None:
    """A forbidden word is refused in any case, width or style, and with blanks around it."""
    assert message_fault(before + word + after) == FORBIDDEN


@given(forbidden, stripped_messages())
@example("test", "ing of the pump")
@example("ｎｕｌｌ", "-and-void")
def test_forbidden_words_may_stand_in_a_longer_message(word: str, rest: str) -> None:
    """A longer message may contain a forbidden word, and is stored as sent."""
    assert NewIncident(word + rest, "operator").incident_message == word + rest
    assert NewIncident(rest + word, "operator").incident_message == rest + word


@given(st.text(characters, max_size=20), unprintable, st.text(characters, max_size=20))
@example("Disk is full", "\x00", "")
@example("Disk is full", "\ud83d\ude00", "")
@example(" " * 10, "\x00", "")
def test_what_no_database_stores_is_refused(before: str, poison: str, after: str) -> None:
    """The error names a NUL or a lone surrogate anywhere in the message."""
    assert message_fault(before + poison + after) == (NUL if "\x00" in poison else SURROGATE)


@given(strange_values.filter(lambda value: not isinstance(value, str)))
@example(None)
@example(b"Disk is full")
@example(["Disk is full"])
def test_message_of_another_type_is_refused(value: object) -> None:
    """A value that is not a string is refused, even if it could be converted."""
    assert message_fault(value) == NOT_A_STRING


# Statuses and sources


@given(statuses, sources)
def test_members_and_their_values_are_both_accepted(
    status: IncidentStatus, source: IncidentSource
) -> None:
    """A member and its string give the same incident, which holds the member."""
    by_member = NewIncident("Disk is full", source, status)
    values: tuple[Any, Any] = (str(source.value), str(status.value))
    by_value = NewIncident("Disk is full", *values)
    assert by_member == by_value
    assert by_value.source is source
    assert by_value.incident_type is status


def test_values_of_the_enums_are_the_origins() -> None:
    """The enum values are the origin's, in its order."""
    assert [status.value for status in IncidentStatus] == ["new", "completed", "failed"]
    assert [source.value for source in IncidentSource] == ["operator", "monitoring", "partner"]


def test_incident_starts_as_new() -> None:
    """The default status is `new`."""
    assert NewIncident("Disk is full", "operator").incident_type is IncidentStatus.NEW


def test_member_of_an_enum_of_the_hosts_own_is_accepted() -> None:
    """A host's own string enum with the same values is accepted."""

    class Severity(StrEnum):
        OPEN = "new"

    status: Any = Severity.OPEN
    assert NewIncident("Disk is full", "partner", status).incident_type is IncidentStatus.NEW


@given(strangers)
def test_anything_else_is_no_status_and_no_source(value: Any) -> None:
    """The error for a wrong status or source lists all allowed values."""
    assert faults(lambda: NewIncident("Disk is full", value, value)) == {
        "source": SOURCE,
        "incident_type": STATUS,
    }


@given(sources, statuses)
def test_source_is_no_status_nor_the_other_way_round(source: Any, status: Any) -> None:
    """A member of the wrong enum is refused."""
    assert faults(lambda: NewIncident("Disk is full", status, source)) == {
        "source": SOURCE,
        "incident_type": STATUS,
    }


# All faults at once


@given(message=st.booleans(), source=st.booleans(), status=st.booleans())
def test_every_faulty_field_is_told_in_the_order_of_the_fields(
    *, message: bool, source: bool, status: bool
) -> None:
    """One error names exactly the faulty fields, for a call and for a mapping."""
    values: dict[str, Any] = {
        "incident_type": "done" if status else "failed",
        "source": "nobody" if source else "partner",
        "incident_message": "tiny" if message else "Disk is full",
    }
    expected = {
        field: reason
        for field, reason, faulty in [
            ("incident_message", LENGTH, message),
            ("source", SOURCE, source),
            ("incident_type", STATUS, status),
        ]
        if faulty
    }
    if expected:
        for make in (
            lambda: NewIncident(**values),
            lambda: NewIncident.from_mapping(values),
        ):
            assert list(faults(make).items()) == list(expected.items())
    else:
        assert NewIncident.from_mapping(values) == NewIncident(**values)


def test_mapping_makes_the_same_incident_as_a_call() -> None:
    """A mapping is checked and normalized like arguments, and is not changed."""
    values = {"incident_message": "  Disk is full ", "source": "partner"}
    incident = NewIncident.from_mapping(values)
    assert incident == NewIncident("Disk is full", IncidentSource.PARTNER, IncidentStatus.NEW)
    assert values == {"incident_message": "  Disk is full ", "source": "partner"}


@given(
    present=st.sets(st.sampled_from(["incident_message", "source", "incident_type"])),
    unknown=st.lists(
        st.text(max_size=10) | st.integers() | st.none() | st.binary(max_size=3),
        unique_by=str,
        max_size=3,
    ).filter(lambda names: not {"incident_message", "source", "incident_type"} & set(names)),
)
@example(present=set(), unknown=[])
@example(present={"incident_message", "source"}, unknown=["status", 1, None])
@example(present={"incident_message", "source"}, unknown=["Source", "source "])
def test_mapping_has_all_required_fields_and_no_other(
    present: set[str], unknown: list[object]
) -> None:
    """One error names every unknown key, of any type, and every missing field."""
    complete = {
        "incident_message": "Disk is full",
        "source": "operator",
        "incident_type": "completed",
    }
    values: dict[Any, Any] = dict.fromkeys(unknown) | {name: complete[name] for name in present}
    expected = {str(name): "is not a known field" for name in unknown} | {
        name: "is required" for name in ("incident_message", "source") if name not in present
    }
    if expected:
        assert faults(lambda: NewIncident.from_mapping(values)) == expected
    else:
        assert NewIncident.from_mapping(values).source is IncidentSource.OPERATOR


def test_given_but_empty_field_is_faulty_rather_than_missing() -> None:
    """None is a value like any other: it neither counts as missing nor takes the default."""
    values = dict.fromkeys(["incident_message", "source", "incident_type"])
    assert faults(lambda: NewIncident.from_mapping(values)) == {
        "incident_message": NOT_A_STRING,
        "source": SOURCE,
        "incident_type": STATUS,
    }


# Immutability


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (NewIncident("Disk is full", "operator"), "incident_message"),
        (
            Incident(
                1,
                "Disk",
                IncidentStatus.NEW,
                IncidentSource.PARTNER,
                datetime(2025, 1, 1, tzinfo=UTC),
            ),
            "incident_type",
        ),
        (ListQuery(), "page"),
        (FieldError("page", "is wrong"), "reason"),
    ],
)
def test_models_cannot_be_changed(model: object, name: str) -> None:
    """No attribute can be set, removed or added, so a checked value stays valid."""
    before = getattr(model, name)
    with pytest.raises(FrozenInstanceError):
        setattr(model, name, "other")
    with pytest.raises(FrozenInstanceError):
        delattr(model, name)
    with pytest.raises(AttributeError):
        setattr(model, name + "_", "other")
    assert getattr(model, name) == before


@given(stripped_messages(), stripped_messages(), sources)
def test_equal_values_make_equal_and_hashable_models(
    one: str, other: str, source: IncidentSource
) -> None:
    """New incidents are equal, with equal hashes, exactly when their values are equal."""
    assert NewIncident(one, source) == NewIncident(f" {one} ", source.value)
    assert hash(NewIncident(one, source)) == hash(NewIncident(f" {one} ", source.value))
    assert (NewIncident(one, source) == NewIncident(other, source)) is (one == other)


def test_changed_copy_is_checked_again() -> None:
    """`attrs.evolve` checks the rules again."""
    incident = NewIncident("Disk is full", "operator")
    assert evolve(incident, incident_message=" Network is down ").incident_message == (
        "Network is down"
    )
    assert faults(lambda: evolve(incident, incident_message="null")) == {
        "incident_message": FORBIDDEN
    }


# The time of an incident


@given(aware_datetimes)
def test_created_at_is_the_whole_second_in_utc(given_time: datetime) -> None:
    """A time in any zone is converted to UTC and truncated to whole seconds."""
    incident = Incident(1, "Disk", IncidentStatus.NEW, IncidentSource.PARTNER, given_time)
    assert incident.created_at.tzinfo is UTC
    assert incident.created_at.microsecond == 0
    assert timedelta(0) <= given_time - incident.created_at < timedelta(seconds=1)


def test_created_at_without_a_zone_is_refused() -> None:
    """A naive time is an error."""
    naive = datetime(2025, 1, 1, 12)  # noqa: DTZ001
    with pytest.raises(ValueError, match="must be an aware datetime"):
        Incident(1, "Disk", IncidentStatus.NEW, IncidentSource.PARTNER, naive)


# Lists


@given(
    page=st.integers(1, MAX),
    limit=st.integers(1, 1000),
    status=st.none() | statuses,
    source=st.none() | sources,
)
@example(page=1, limit=1000, status=None, source=None)
@example(page=MAX, limit=1, status=None, source=None)
@example(page=MAX // 1000, limit=1000, status=None, source=None)
@example(page=MAX // 1000 + 1, limit=1000, status=None, source=None)
@example(page=2**62, limit=2, status=None, source=None)
def test_page_times_limit_fits_the_database(
    page: int, limit: int, status: IncidentStatus | None, source: IncidentSource | None
) -> None:
    """A page and a limit are accepted exactly when they and their product are in bounds."""
    if page * limit > MAX:
        assert faults(lambda: ListQuery(page, limit, status, source)) == {
            "page": f"times limit must be at most {MAX}"
        }
        return
    query = ListQuery(page, limit, status, source)
    assert (query.page, query.limit) == (page, limit)
    assert query.status is status
    assert query.source is source
    assert query.offset == (page - 1) * limit
    assert query.offset + query.limit <= MAX


def test_list_starts_at_the_newest_ten_of_all() -> None:
    """The default list is the first page of ten, without a filter."""
    query = ListQuery()
    assert (query.page, query.limit, query.status, query.source) == (1, 10, None, None)
    assert query.offset == 0


@given(not_integers)
def test_page_limit_and_id_are_integers_and_nothing_like_them(value: Any) -> None:
    """Bools, floats and strings of digits are refused as integers."""
    assert faults(lambda: ListQuery(value, value)) == {
        "page": ID,
        "limit": "must be an integer from 1 to 1000",
    }
    assert faults(lambda: rules.check("incident_id", rules.incident_id, value)) == {
        "incident_id": ID
    }


@given(st.integers(max_value=0) | st.integers(min_value=MAX + 1))
@example(0)
@example(-1)
@example(MAX + 1)
@example(10**5000)
def test_numbers_out_of_bounds_are_refused(value: int) -> None:
    """A number beyond 64 bits is refused, even one with 5,000 digits."""
    assert faults(lambda: ListQuery(page=value)) == {"page": ID}
    assert faults(lambda: ListQuery(limit=value)) == {"limit": "must be an integer from 1 to 1000"}
    assert faults(lambda: rules.check("incident_id", rules.incident_id, value)) == {
        "incident_id": ID
    }


@pytest.mark.parametrize(("limit", "accepted"), [(1, True), (1000, True), (1001, False)])
def test_limit_ends_at_a_thousand(limit: int, *, accepted: bool) -> None:
    """A page holds at most a thousand incidents."""
    if accepted:
        assert ListQuery(limit=limit).limit == limit
    else:
        assert faults(lambda: ListQuery(limit=limit)) == {
            "limit": "must be an integer from 1 to 1000"
        }


def test_integers_of_another_type_become_plain_ones() -> None:
    """A member of an integer enum becomes a plain integer."""

    class Page(IntEnum):
        SECOND = 2

    query = ListQuery(Page.SECOND)
    assert query.cache_key == "incidents:2:10:any:any"
    assert type(query.page) is int
    assert type(rules.incident_id(Page.SECOND)) is int


@given(strangers.filter(lambda value: value is not None))
def test_every_faulty_argument_of_a_list_is_told(value: Any) -> None:
    """One error reports all faults of a list query, in the order of its arguments."""
    assert list(faults(lambda: ListQuery(0, 0, value, value)).items()) == [
        ("page", ID),
        ("limit", "must be an integer from 1 to 1000"),
        ("status", STATUS),
        ("source", SOURCE),
    ]


@pytest.mark.parametrize(
    ("query", "key"),
    [
        (ListQuery(), "incidents:1:10:any:any"),
        (ListQuery(2, 50), "incidents:2:50:any:any"),
        (ListQuery(1, 10, "new"), "incidents:1:10:new:any"),
        (ListQuery(1, 10, IncidentStatus.FAILED), "incidents:1:10:failed:any"),
        (ListQuery(1, 10, None, "partner"), "incidents:1:10:any:partner"),
        (ListQuery(3, 7, "completed", IncidentSource.OPERATOR), "incidents:3:7:completed:operator"),
        (ListQuery(MAX, 1), f"incidents:{MAX}:1:any:any"),
    ],
)
def test_cache_key_is_the_origins(query: ListQuery, key: str) -> None:
    """A cache key holds the plain numbers and values, and `any` for an absent filter."""
    assert query.cache_key == key


@given(st.lists(st.builds(ListQuery, st.integers(1, 20), st.integers(1, 20)), max_size=10))
def test_different_lists_have_different_cache_keys(queries: list[ListQuery]) -> None:
    """Two lists share a key only if they are the same list."""
    assert len({query.cache_key for query in queries}) == len(set(queries))


# Ids and status changes


@given(st.integers(1, MAX))
@example(1)
@example(MAX)
def test_id_in_its_bounds_is_returned(value: int) -> None:
    """Every positive 64-bit integer is a valid id."""
    assert rules.check("incident_id", rules.incident_id, value) == value


@given(st.integers(1, MAX), statuses)
def test_status_change_accepts_member_and_value(value: int, status: IncidentStatus) -> None:
    """A status change takes a member or its string, and keeps the member."""
    either: tuple[Any, ...] = (status, str(status.value))
    for given_status in either:
        change = StatusChange(value, given_status)
        assert change.incident_id == value
        assert change.status is status


@given(strangers)
def test_status_change_tells_both_faults(value: Any) -> None:
    """A wrong id and a wrong status are reported in one error, the id first."""
    assert list(faults(lambda: StatusChange(0, value)).items()) == [
        ("incident_id", ID),
        ("status", STATUS),
    ]


def test_a_message_of_any_length_is_refused_at_once() -> None:
    """A message of several megabytes is refused by its length, before it is normalized."""
    with pytest.raises(InvalidIncident, match="characters"):
        NewIncident("a" + "\u0315\u0300" * 2_000_000, source="operator")


@pytest.mark.parametrize("actor", ["", "x" * 256, "a\x00b", None, 7])
def test_an_actor_that_cannot_be_stored_is_refused(actor: Any) -> None:
    """An invalid actor is refused before the block runs."""
    with pytest.raises(InvalidIncident) as caught, acting_as(actor):
        raise AssertionError
    assert [error.field for error in caught.value.errors] == ["actor"]


def test_a_host_that_disables_the_validators_of_attrs_keeps_the_rules() -> None:
    """The rules about several fields hold although a host has disabled its own validators."""
    validators.set_disabled(True)
    try:
        with pytest.raises(InvalidIncident, match="dedup_key needs the incident_type new"):
            NewIncident("Disk is full", "partner", "failed", dedup_key="disk")
    finally:
        validators.set_disabled(False)

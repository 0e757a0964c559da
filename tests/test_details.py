"""The rules of details, and incidents that are made to fit the rules."""

from __future__ import annotations

import copy
import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from attrs import evolve
from hypothesis import example, given, settings
from hypothesis import strategies as st

from incidentkit import (
    FieldError,
    Incident,
    IncidentSource,
    IncidentStatus,
    InvalidIncident,
    NewIncident,
)
from incidentkit.domain.details import check_details
from incidentkit.domain.values import DETAILS_MAX_DEPTH, DETAILS_MAX_SIZE, MAX_ID, NAME_MAX_LENGTH
from incidentkit.store.idempotency import idempotency
from tests.strategies import characters, scalars

NOW = datetime(2026, 3, 1, 9, 30, tzinfo=UTC)

texts = st.text(characters, max_size=20)
integers = st.integers(-MAX_ID - 1, MAX_ID)
numbers = integers | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=10,
)


def depth(value: object) -> int:
    """Return the levels of objects and arrays of a value."""
    if not isinstance(value, (dict, list)):
        return 0
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth, inner), default=0)


some_details = st.dictionaries(texts, values, max_size=5).filter(
    lambda value: depth(value) <= DETAILS_MAX_DEPTH
)


def compact(value: object) -> bytes:
    """Return a value as compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def as_jsonb(value: object) -> str:
    """Return a value as PostgreSQL writes it: each number in full, as a decimal."""
    match value:
        case None | bool() | str():
            return json.dumps(value, ensure_ascii=False)
        case dict():
            members = (f"{json.dumps(name)}: {as_jsonb(each)}" for name, each in value.items())
            return f"{{{', '.join(members)}}}"
        case list():
            return f"[{', '.join(map(as_jsonb, value))}]"
    return f"{Decimal(json.dumps(value)):f}"


def new(details: Any) -> NewIncident:
    """Return a new incident with these details."""
    return NewIncident("Disk is full", "monitoring", details=details)


def fault(details: object) -> FieldError:
    """Return the one fault of invalid details."""
    with pytest.raises(InvalidIncident) as caught:
        new(details)
    (error,) = caught.value.errors
    return error


@given(some_details)
@example({"n": [1e16, -1.7976931348623157e308, 1e22, 1.2345678901234567e30]})
@example({"n": [5e-324, 1e-5, 0.0001, -0.0, 7.0, 2**53 + 1.0]})
def test_details_come_back_from_either_database(given_details: dict[str, Any]) -> None:
    """Checked details equal the given ones, as JSON and as PostgreSQL writes JSON."""
    checked = check_details(given_details)
    assert checked == given_details
    assert json.loads(compact(checked)) == checked
    assert json.loads(as_jsonb(checked)) == checked
    # An incident's details can be given again.
    assert check_details(json.loads(as_jsonb(checked))) == checked


@given(st.dictionaries(st.text() | scalars, scalars | st.lists(scalars), max_size=3) | scalars)
def test_any_value_is_details_or_a_named_fault(value: Any) -> None:
    """Anything else is refused, with an error whose field name can be encoded in UTF-8."""
    faults: tuple[FieldError, ...] = ()
    try:
        assert new(value).details == value
    except InvalidIncident as error:
        faults = error.errors
    assert [one.field.encode()[:7] for one in faults] == [b"details"][: len(faults)]


def test_the_size_is_that_of_compact_json() -> None:
    """Details have at most 16,384 bytes, counted in UTF-8 with numbers written in full."""
    base: dict[str, Any] = {"a": ["é\n\x01\\", True, False, None, -1.5e-7, 12, {}, []], "b": ""}
    full = len(compact(base)) - len("-1.5e-07") + len("-0.00000015")
    base["b"] = "x" * (DETAILS_MAX_SIZE - full)
    assert new(base).details == base
    base["b"] += "x"
    error = fault(base)
    assert error.field == "details"
    assert error.reason.startswith("must be at most 16384 bytes")
    # As text, each takes 326 characters in PostgreSQL.
    assert fault({"n": [5e-324] * 60}) == error
    assert fault({"n": [1] * 100_000_000}) == error
    assert fault({"x" * 100_000_000: 1}) == error


def test_the_depth_is_limited() -> None:
    """Objects and arrays are at most five levels deep; one that contains itself is refused."""
    deepest = {"a": [{"b": [{"c": 1}]}]}
    assert new(deepest).details == deepest
    reason = "is nested too deeply: details have at most 5 levels of objects and arrays"
    assert fault({"a": [{"b": [{"c": []}]}]}) == FieldError("details.a[0].b[0].c", reason)
    endless: dict[str, Any] = {"list": []}
    endless["list"].append(endless)
    assert fault(endless) == FieldError("details.list[0].list[0].list", reason)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert fault({"a": deep}) == FieldError("details.a[0][0][0][0]", reason)


@pytest.mark.parametrize(
    ("details", "field", "reason"),
    [
        ("{}", "details", "must be a JSON object"),
        ({1: 2}, "details", "must have strings as keys"),
        ({"a": {None: 2}}, "details.a", "must have strings as keys"),
        ({"labels": [0, 1, 2, b"x"]}, "details.labels[3]", "must be a dict, a list, a tuple,"),
        ({"when": {"at": object()}}, "details.when.at", "must be a dict, a list, a tuple,"),
        ({"n": float("nan")}, "details.n", "must be a finite number"),
        ({"n": [float("-inf")]}, "details.n[0]", "must be a finite number"),
        ({"n": 2**63 + 1}, "details.n", "must be an integer from -9223372036854775808 to"),
        ({"n": 10**5000}, "details.n", "must be an integer from -9223372036854775808 to"),
        ({"n": "a\x00"}, "details.n", "must not contain a NUL character"),
        ({"n": ["\ud800"]}, "details.n[0]", "must not contain a lone surrogate"),
        ({"\ud800": 1}, 'details["\\ud800"]', "must not contain a lone surrogate"),
        ({"a": {"x\x00": 1}}, 'details.a["x\\u0000"]', "must not contain a NUL character"),
        ({"a b": {"": set()}}, 'details["a b"][""]', "must be a dict, a list, a tuple,"),
        ({"k" * 50: set()}, f'details["{"k" * 40}\\u2026"]', "must be a dict, a list, a tuple,"),
    ],
)
def test_a_fault_is_named_with_its_path(details: object, field: str, reason: str) -> None:
    """An error names the path to the faulty part, and its rule."""
    error = fault(details)
    assert error.field == field
    assert error.reason.startswith(reason)


def test_details_are_a_copy_of_plain_values() -> None:
    """The dict may change later; tuples, enums and subclasses become plain values."""

    class Text(str):
        __slots__ = ()

    given_details: dict[Any, Any] = {"a": (1, [Text("x")]), IncidentSource.PARTNER: True}
    made = new(given_details)
    given_details["a"][1].clear()
    assert made.details is not None
    assert made.details == {"a": [1, ["x"]], "partner": True}
    assert made.details is not None
    assert type(made.details["a"][1][0]) is str
    assert [type(key) for key in made.details] == [str, str]


def test_details_count_in_the_equality_of_new_incidents_alone() -> None:
    """New incidents with other details differ; a stored incident's details never change."""
    one, other = new({"a": 1}), new({"a": 2})
    assert one != other
    assert one == new({"a": 1})
    assert len({one, new({"a": 1})}) == 1
    stored = Incident(1, "Disk is full", IncidentStatus.NEW, IncidentSource.PARTNER, NOW)
    detailed = evolve(stored, details={"a": 1})
    assert (detailed, hash(detailed), detailed.tag) == (stored, hash(stored), stored.tag)


def test_the_fingerprint_without_details_is_that_of_earlier_versions() -> None:
    """A retry across an upgrade is recognized; with details, the order of keys does not matter."""
    plain = idempotency("k", "create", NewIncident("Disk is full", "monitoring"))
    assert plain.fingerprint == "872f5331b92afb2d7788ab5b6d81de1eb5e3fa2882457b64646ee785d1004cb6"
    first, second = ({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1})
    assert idempotency("k", "create", new(first)) == idempotency("k", "create", new(second))
    assert idempotency("k", "create", new(first)) != idempotency("k", "create", new({"a": 1}))
    assert idempotency("k", "create", new({})) != plain


# Fitting


@given(
    st.text(characters) | st.text(characters, min_size=900, max_size=1200),
    st.none() | st.text(characters) | st.text(characters, min_size=250, max_size=300),
)
@example("", "")
@example("NULL", None)
@example(" \n", None)
@example(" " * 2000 + "x", None)
@example("🔥" * 1001, "🔥" * 256)
@example("x" * 1000, "x" * 255)
def test_any_text_fits(message: str, key: str | None) -> None:
    """Any text without NUL and surrogates makes a valid incident; a valid one is unchanged."""
    made = NewIncident.fitting(message, "monitoring", dedup_key=key)
    try:
        assert made == NewIncident(message, "monitoring", dedup_key=key)
    except InvalidIncident:
        stripped = message.strip()
        if len(stripped) > 1000:
            assert made.incident_message == f"{stripped[:999]}…"
        elif made.incident_message != stripped:
            assert made.incident_message == f"Incident: {stripped or 'no message'}"
    if key is not None and len(key) > NAME_MAX_LENGTH:
        assert made.dedup_key is not None
        assert made.dedup_key[:190] == key[:190]
        assert len(made.dedup_key) == NAME_MAX_LENGTH


def test_long_keys_stay_equal_and_different() -> None:
    """Equal long keys stay equal, different ones stay different, and their start is readable."""
    keys = ["k" * 300, "k" * 301, "k" * 300 + "x", "k" * 300]
    made = [NewIncident.fitting("Disk is full", "partner", dedup_key=key).dedup_key for key in keys]
    assert made[0] == made[3]
    assert len(set(made)) == 3
    assert all(key is not None and key.startswith("k" * 190 + "~") for key in made)


# A text of thousands of characters that Hypothesis chooses one by one is more than it takes.
long_texts = st.builds(str.__mul__, st.text(characters, min_size=1), st.integers(1000, 5000))


@given(st.dictionaries(texts, texts | long_texts, max_size=4))
@settings(max_examples=30)
def test_details_with_long_texts_fit(given_details: dict[str, Any]) -> None:
    """The longest texts are cut with an ellipsis until the details fit, and no others."""
    long = {f"long {n}": f"{n}é\n🔥" * 5000 for n in range(3)}
    for details in (given_details, given_details | long):
        made = NewIncident.fitting("Disk is full", "partner", details=details).details
        assert made is not None
        assert list(made) == list(details)
        if len(compact(details)) <= DETAILS_MAX_SIZE:
            assert made == details
            continue
        assert DETAILS_MAX_SIZE - 60 <= len(compact(made)) <= DETAILS_MAX_SIZE
        cut = [name for name in details if made[name] != details[name]]
        for name in cut:
            assert details[name].startswith(made[name].removesuffix("…"))
        shortest = min(len(compact(made[name])) for name in cut)
        assert all(len(compact(made[name])) <= shortest + 12 for name in made)


def test_fitting_changes_valid_details_in_nothing() -> None:
    """Details of exactly the largest size are not cut."""
    details = {"a": "x" * (DETAILS_MAX_SIZE - len(compact({"a": ""})))}
    assert NewIncident.fitting("Disk is full", "partner", details=details).details == details


@pytest.mark.parametrize(
    ("given_fields", "field"),
    [
        ({"incident_message": 7}, "incident_message"),
        ({"incident_message": "x\x00" * 1000}, "incident_message"),
        ({"incident_message": "\ud800"}, "incident_message"),
        ({"source": "nobody"}, "source"),
        ({"dedup_key": "x" * 300 + "\x00"}, "dedup_key"),
        ({"dedup_key": 7}, "dedup_key"),
        ({"dedup_key": "disk", "incident_type": "failed"}, "dedup_key"),
        ({"details": []}, "details"),
        ({"details": {"a": object()}}, "details.a"),
        ({"details": {"a": [1] * 20_000}}, "details"),
        ({"details": {"x" * 20_000: 1}}, "details"),
        ({"details": {"a": "x" * 20_000, "b": [[[[[1]]]]]}}, "details"),
        ({"details": {"a": "x" * 20_000 + "\x00"}}, "details"),
    ],
)
def test_anything_else_that_is_wrong_is_refused(given_fields: dict[str, Any], field: str) -> None:
    """Fitting mends only lengths: a wrong type, a NUL or an unknown source is an error."""
    fields: dict[str, Any] = {"incident_message": "Disk is full", "source": "partner"}
    with pytest.raises(InvalidIncident) as caught:
        NewIncident.fitting(**(fields | given_fields))
    assert [error.field for error in caught.value.errors] == [field]


def test_copies_are_independent() -> None:
    """Fitting copies details too."""
    details: dict[str, Any] = {"a": ["x" * 20_000, 1]}
    before = copy.deepcopy(details)
    made = NewIncident.fitting("Disk is full", "partner", details=details)
    assert details == before
    assert made.details is not None
    assert made.details["a"][1] == 1

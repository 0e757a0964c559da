"""Details: one JSON object for each incident."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from incidentkit import IdempotencyKeyReused, InvalidIncident, NewIncident
from tests.conformance.refusals import refused

if TYPE_CHECKING:
    from tests.conformance.embodiments import Verbs

NUMBERS = [
    *(0, 1, -1, 2**53 + 1, 2**63 - 1, -(2**63), 10**22, 2**1000),
    *(0.1, -0.0, 7.0, 1e15, 123456789012345.6, 1e16, 1.2345678901234567e30, 1.7e308),
    *(1e-4, 1e-5, 1.5e-7, -5e-324, 2.2250738585072014e-308),
]
TEXTS = [
    *("", " ", "null", '"\\/\b\f\n\r\t', "\x01\x1f\x7f\x85", "%s %(a)s :b {c} $1", "'; --"),
    *("Zażółć", "磁盘", "🔥", "\u2028\u2029", "\ufeff", "e\u0301", "\\u0000"),
]
EVERYTHING: dict[str, Any] = {
    "numbers": NUMBERS,
    "texts": TEXTS,
    "constants": [True, False, None],
    "empty": [{}, [], ""],
    "": {text: text for text in TEXTS},
    "a": {"b": {"c": {"d": {"e": 1}}}},
    "filler": "é" * 6000,
}
"""Everything that details may hold."""


async def report(incidents: Verbs, details: dict[str, Any] | None, **options: Any) -> int:
    """Report a full disk, and return its id."""
    created = await incidents.create(
        "Disk is full", source="monitoring", details=details, **options
    )
    assert created.details == details
    return created.incident_id


async def test_details_are_read_by_everything_but_a_list(incidents: Verbs) -> None:
    """Reads of one incident and writes return equal details; lists and plain searches do not."""
    incident_id = await report(incidents, EVERYTHING)
    plain = await incidents.create("Disk is full", source="monitoring")
    assert plain.details is None
    changed = await incidents.update_status(incident_id, "completed")
    same = await incidents.update_status(incident_id, "completed", note="Once more")
    got = await incidents.get(incident_id)
    assert [each.details for each in (changed, same, got)] == [EVERYTHING] * 3
    assert (await incidents.get(plain.incident_id)).details is None
    listed = await incidents.list()
    searched = (await incidents.search()).incidents
    assert listed == searched == [plain, got]
    assert {each.details is None for each in (*listed, *searched)} == {True}


async def test_a_search_reads_details_on_request(incidents: Verbs) -> None:
    """With `details=True`, every kind of search and `iterate` read them, in the same order."""
    given: list[dict[str, Any] | None] = [{"n": n} if n % 2 else None for n in range(25)]
    new = [
        NewIncident(
            f"Disk {n} is full", "monitoring", dedup_key="disk" if n == 3 else None, details=each
        )
        for n, each in enumerate(given)
    ]
    created = await incidents.create_many(new)
    assert [each.details for each in created] == given
    by_id = {each.incident_id: each.details for each in created}
    queries: list[dict[str, Any]] = [
        {},
        {"total": True},
        {"text": "disk"},
        {"text": "disk", "total": True},
        {"text": "3", "dedup_key": "disk"},
        {"dedup_key": "disk", "total": True},
        {"status": ["new", "failed"], "source": ["monitoring", "partner"]},
        {"text": "nowhere", "total": True},
    ]
    for query in queries:
        for order in ("newest", "oldest"):
            after: str | None = None
            while True:
                options = {**query, "order": order, "limit": 10, "after": after}
                without = await incidents.search(**options)
                page = await incidents.search(**options, details=True)
                assert page == without
                for one in page.incidents:
                    assert one.details == by_id[one.incident_id]
                after = page.next
                if after is None:
                    break
    found = [each async for each in incidents.iterate(details=True, batch=7, order="oldest")]
    assert {each.incident_id: each.details for each in found} == by_id
    plain = [each async for each in incidents.iterate(batch=7)]
    assert {each.details is None for each in plain} == {True}


async def test_concurrent_calls_keep_their_details(incidents: Verbs) -> None:
    """Calls that run at the same time, and may share statements, keep their details apart."""
    given: list[dict[str, Any] | None] = [{"n": n} if n % 3 else None for n in range(30)]
    created = await asyncio.gather(
        *(incidents.create("Disk is full", source="monitoring", details=each) for each in given)
    )
    assert [each.details for each in created] == given
    ids = [each.incident_id for each in created]
    changed = await asyncio.gather(*(incidents.update_status(each, "failed") for each in ids))
    assert [each.details for each in changed] == given
    read = await asyncio.gather(*(incidents.get(each) for each in ids))
    assert [each.details for each in read] == given


async def test_the_first_details_stay(incidents: Verbs) -> None:
    """A repetition returns the details of the first report, and does not change them."""
    incident_id = await report(incidents, {"host": "db-1"}, dedup_key="disk")
    for other in ({"host": "db-2"}, None):
        again = await incidents.create(
            "Disk is full", source="monitoring", dedup_key="disk", details=other
        )
        assert (again.incident_id, again.details) == (incident_id, {"host": "db-1"})
    new = NewIncident("Disk is full", "monitoring", dedup_key="disk", details={"host": "db-3"})
    key = NewIncident("Disk is full", "monitoring", dedup_key="first", details={"host": "db-4"})
    many = await incidents.create_many([new, key, key])
    assert [each.details for each in many] == [{"host": "db-1"}, {"host": "db-4"}, {"host": "db-4"}]
    assert (await incidents.get(incident_id)).details == {"host": "db-1"}
    without = await report(incidents, None, dedup_key="plain")
    again = await incidents.create(
        "Disk is full", source="monitoring", dedup_key="plain", details={"host": "db-1"}
    )
    assert (again.incident_id, again.details) == (without, None)


async def test_details_are_part_of_a_repeated_write(incidents: Verbs) -> None:
    """A retry with equal details, in any order of keys, gets the first answer with its details."""
    details = {"host": "db-1", "load": [1.5, {"a": 1, "b": 2}]}
    reordered = {"load": [1.5, {"b": 2, "a": 1}], "host": "db-1"}
    first = await report(incidents, details, idempotency_key="one")
    assert await report(incidents, reordered, idempotency_key="one") == first
    for other in (None, {"host": "db-2"}):
        with pytest.raises(IdempotencyKeyReused):
            await report(incidents, other, idempotency_key="one")
    new = [NewIncident("Disk is full", "monitoring", details=each) for each in (details, None)]
    for _ in range(2):
        many = await incidents.create_many(new, idempotency_key="many")
        assert [each.details for each in many] == [details, None]
    for _ in range(2):
        changed = await incidents.update_status(first, "failed", idempotency_key="status")
        assert changed.details == details


async def test_faulty_details_are_refused_by_name(incidents: Verbs) -> None:
    """An error names the faulty part, and nothing is stored."""
    create: Any = incidents.create
    search: Any = incidents.search
    deep: dict[str, Any] = {}
    deep["a"] = deep
    many: list[Any] = []
    for _ in range(100_000):
        many = [many]
    cases: list[tuple[object, str]] = [
        ([], "details"),
        ("{}", "details"),
        ({"a": {1: 2}}, "details.a"),
        ({"labels": [1, 2, 3, object()]}, "details.labels[3]"),
        ({"a b": [{"c": b"x"}]}, 'details["a b"][0].c'),
        ({"n": float("nan")}, "details.n"),
        ({"n": 2**63 + 1}, "details.n"),
        ({"n": "a\0b"}, "details.n"),
        ({"n\ud800": 1}, 'details["n\\ud800"]'),
        ({"a": "x" * 16384}, "details"),
        (deep, "details.a.a.a.a.a"),
        ({"a": many}, "details.a[0][0][0][0]"),
    ]
    for details, field in cases:
        call = create("Disk is full", source="monitoring", details=details)
        assert await refused(call) == [field]
    assert await incidents.list() == []
    with pytest.raises(InvalidIncident, match="details must be true or false"):
        await search(details=1)

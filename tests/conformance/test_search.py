"""Searching and iterating."""

from __future__ import annotations

from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest

from incidentkit import (
    Incident,
    IncidentOrder,
    IncidentSource,
    IncidentStatus,
    InvalidIncident,
    NewIncident,
    OrderName,
    SearchPage,
    SourceName,
)
from tests.conformance.gaps import Need, needs
from tests.conformance.refusals import refused

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.conformance.embodiments import Embodiment, Verbs

ORDERS: tuple[OrderName, ...] = ("newest", "oldest")


async def of_every_kind(incidents: Verbs) -> list[Incident]:
    """Create an incident of each source and status, and return them, oldest first."""
    kinds = product(IncidentSource, IncidentStatus)
    return await incidents.create_many(NewIncident("Disk is full", *kind) for kind in kinds)


async def ids(found: AsyncIterator[Incident]) -> list[int]:
    """Return the ids of all incidents that an iteration yields."""
    return [incident.incident_id async for incident in found]


async def messages(incidents: Verbs, text: str) -> list[str]:
    """Return the messages that match a text, oldest first."""
    found = await incidents.search(text=text, order="oldest")
    return [incident.incident_message for incident in found.incidents]


async def test_without_incidents_nothing_is_found(incidents: Verbs) -> None:
    """Without incidents, the only page is empty."""
    assert await incidents.search() == SearchPage([], None, None)
    assert await incidents.search(text="disk", total=True) == SearchPage([], None, 0)
    assert await ids(incidents.iterate()) == []


async def test_it_returns_current_incidents(incidents: Verbs) -> None:
    """A search returns an incident in its current state, even after a change."""
    created = await incidents.create("Disk is full", source="monitoring", dedup_key="disk")
    assert (await incidents.search()).incidents == [created]
    changed = await incidents.update_status(created.incident_id, "failed")
    assert (await incidents.search(status="failed")).incidents == [changed]
    assert (await incidents.search(status="new")).incidents == []


async def test_pages_partition_the_matches(incidents: Verbs) -> None:
    """Pages of any size, in both orders, contain each match once and report the total."""
    created = await of_every_kind(incidents)
    filters: dict[str, Any] = {"status": ["new", "failed"], "text": "disk"}
    matching = [one for one in created if one.incident_type in ("new", "failed")]
    for limit, order in product((1, 2, 3, 6, 7), ORDERS):
        found: list[Incident] = []
        after = None
        while True:
            page = await incidents.search(
                **filters, limit=limit, order=order, after=after, total=True
            )
            assert page.total == len(matching)
            found += page.incidents
            after = page.next
            if after is None:
                break
            assert len(page.incidents) == limit
        assert found == (matching if order == "oldest" else matching[::-1])


async def test_the_default_page_has_ten_and_no_total(incidents: Verbs) -> None:
    """By default, a page has the ten newest incidents and no total."""
    created = await incidents.create_many([NewIncident("Disk is full", "partner")] * 11)
    page = await incidents.search()
    assert page.incidents == created[:0:-1]
    assert page.total is None
    assert (await incidents.search(after=page.next)).incidents == created[:1]


@needs(Need.OUTSIDE_SQL)
async def test_order_is_by_time_and_then_by_id(incidents: Verbs, embodiment: Embodiment) -> None:
    """Matches are ordered by time and, within a second, by id, across pages."""
    await incidents.create_many([NewIncident("Disk is full", "monitoring")] * 6)
    for year, some in ((2020, "5, 2"), (2999, "1, 3")):
        at = embodiment.moment(datetime(year, 1, 1, tzinfo=UTC))
        await embodiment.sql(
            f'UPDATE "Incident" SET created_at = {at} WHERE incident_id IN ({some})'
        )
    newest = [3, 1, 6, 4, 5, 2]
    assert await ids(incidents.iterate(batch=1)) == newest
    assert await ids(incidents.iterate(order="oldest", batch=4)) == newest[::-1]
    assert await ids(incidents.iterate(text="disk", batch=2)) == newest


@pytest.mark.parametrize("order", ORDERS)
async def test_incidents_are_found_by_their_key(incidents: Verbs, order: OrderName) -> None:
    """A deduplication key finds its incidents, open and ended, in pages and with other filters."""
    for number in range(6):
        for key in ("disk", "Disk", None, "disk:1"):
            await incidents.create(f"Report {number}", source="monitoring", dedup_key=key)
        found = await incidents.search(dedup_key="disk", status="new", total=True)
        (open_,) = found.incidents
        assert (open_.dedup_key, open_.incident_message, found.total) == (
            "disk",
            f"Report {number}",
            1,
        )
        if number < 5:
            status = (IncidentStatus.COMPLETED, IncidentStatus.FAILED)[number % 2]
            await incidents.update_status(open_.incident_id, status)
    every = await ids(incidents.iterate(dedup_key="disk", order=order, batch=4))
    assert every == sorted(every, reverse=order == "newest")
    assert len(every) == 6
    for limit in (1, 4, 6):
        after, pages = None, []
        while True:
            page = await incidents.search(
                dedup_key="disk", order=order, limit=limit, after=after, total=True
            )
            assert page.total == 6
            pages += [incident.incident_id for incident in page.incidents]
            after = page.next
            if after is None:
                break
        assert pages == every
    ended: dict[str, Any] = {
        "dedup_key": "disk",
        "status": ["failed", "completed"],
        "source": "monitoring",
    }
    assert len((await incidents.search(**ended)).incidents) == 5
    assert len((await incidents.search(**ended, text="report 3")).incidents) == 1
    assert (await incidents.search(dedup_key="disk", source="partner")).incidents == []
    assert (await incidents.search(dedup_key="none", total=True)).total == 0
    call: Any = incidents.search
    for wrong in ("", "x" * 256, "a\x00b", 7):
        assert await refused(call(dedup_key=wrong)) == ["dedup_key"]


async def test_filters_are_one_value_or_several(incidents: Verbs) -> None:
    """A status or source is one value or several, of which any may match, as members or strings."""
    created = await of_every_kind(incidents)

    async def count(**filters: Any) -> int:
        return len((await incidents.search(limit=100, **filters)).incidents)

    assert await count() == len(created) == 9
    assert await count(status="new") == await count(status={IncidentStatus.NEW}) == 3
    assert await count(source=IncidentSource.PARTNER, status=["new"]) == 1
    assert await count(status=["new", "failed", "new"], source=("partner",)) == 2
    assert await count(status=iter(IncidentStatus), source={*IncidentSource}) == 9
    (found,) = (await incidents.search(status="failed", source="operator")).incidents
    assert (found.incident_type, found.source) == ("failed", "operator")


@needs(Need.OUTSIDE_SQL)
async def test_time_bounds_are_half_open(incidents: Verbs, embodiment: Embodiment) -> None:
    """`created_after` is inclusive and `created_before` exclusive."""
    start = datetime(2026, 1, 1, tzinfo=UTC)
    await incidents.create_many([NewIncident("Disk is full", "partner")] * 4)
    for number in range(1, 5):
        at = embodiment.moment(start + timedelta(seconds=number))
        await embodiment.sql(
            f'UPDATE "Incident" SET created_at = {at} WHERE incident_id = {number}'
        )

    async def found(after: float | None, before: float | None) -> list[int]:
        return await ids(
            incidents.iterate(
                created_after=None if after is None else start + timedelta(seconds=after),
                created_before=None if before is None else start + timedelta(seconds=before),
                order=IncidentOrder.OLDEST,
            )
        )

    assert await found(2, None) == [2, 3, 4]
    assert await found(None, 3) == [1, 2]
    assert await found(2, 4) == [2, 3]
    assert await found(2, 2) == await found(3, 2) == []
    # Incidents show whole seconds.
    assert await found(1.5, 3.5) == [2, 3]


async def test_extreme_time_bounds_are_accepted(incidents: Verbs) -> None:
    """The earliest and the latest datetime are accepted as bounds."""
    await incidents.create("Disk is full", source="partner")
    earliest = datetime.min.replace(tzinfo=UTC)
    latest = datetime.max.replace(tzinfo=UTC)
    found = await incidents.search(created_after=earliest, created_before=latest)
    assert len(found.incidents) == 1
    assert (await incidents.search(created_before=earliest)).incidents == []
    assert (await incidents.search(created_after=latest)).incidents == []


async def test_words_and_phrases_are_found(incidents: Verbs) -> None:
    """A message matches if it has each word and phrase of the text; only a last word may begin."""
    said = ["Disk is full", "Disks of DB-1: full!", "Диск db-2 полон", "is_not a disk"]
    await incidents.create_many(NewIncident(message, "partner") for message in said)
    disk, disks, cyrillic, is_not = said
    for text, expected in {
        "disk": [disk, disks, is_not],
        "DISK": [disk, disks, is_not],
        "disks": [disks],
        "full disk": [disk, disks],
        "disk full": [disk],
        "dis ful": [],
        "db": [disks, cyrillic],
        "db-1": [disks],
        "DB 1": [disks],
        "1 db": [disks],
        "1-db": [],
        '"full disk"': [],
        '"is full"': [disk],
        '"disk is"': [disk],
        '"dis"': [],
        "диск ПО": [cyrillic],
        "ДИ ПО": [],
        "not": [is_not],
        "isk": [],
        "disk nothing": [],
    }.items():
        assert await messages(incidents, text) == expected, text


async def test_joined_words_are_one_phrase(incidents: Verbs) -> None:
    """Words that punctuation joins are found only where they stand whole, one after the other."""
    for text, found, others in (
        ("10.0.0.1", "10.0.0.1 is down", ["10.1.0.55 is down", "110.0.0.1", "10.0.0.12 is up"]),
        ("db-1", "db-1 is slow", ["db8 got 1 error", "db-10 is slow", "on 1 db", "mdb-1"]),
        ("CVE-2024-1234", "See CVE-2024-1234.", ["See CVE-2024-12345", "CVE 1234-2024"]),
        ("user@example.com", "<User@Example.com>", ["user@example.org", "example.com user"]),
    ):
        created = [await incidents.create(each, source="partner") for each in (found, *others)]
        page = await incidents.search(text=text, created_after=created[0].created_at, total=True)
        assert [each.incident_message for each in page.incidents] == [found], text
        assert page.total == 1


async def test_text_of_any_script_is_found(incidents: Verbs) -> None:
    """Letter case, normal forms and widths make no difference; marks belong to their words."""
    said = {
        "Gera\u0308teu\u0308bersicht": ["Geräteübersicht", "GERÄTEÜBER", "gera\u0308teu\u0308"],
        "Geräte im Überblick": ['"GERA\u0308TE"', "Geräte U\u0308"],
        "ΔΊΣΚΟΣ γεμάτος": ["δίσκος", "ΔΊΣΚΟΣ", "δίσκοσ"],
        "Straße gesperrt": ["STRASSE", "strasse gesp"],
        "ＦＵＬＬ　ＤＩＳＫ": ['"full disk"', "ｆｕｌｌ"],
        "कैमरा खराब": ["कैमरा", "कै"],
        "कमरा ठंडा": ["कमरा", "कम"],
        "磁盘已满，请检查": ["磁盘", "盘已", "满请", "磁盘 检查", "查"],
        "ディスクが満杯です": ["スク", "ﾃﾞｨｽｸ", "満杯"],
        "ดิสก์เต็มแล้ว": ["เต็ม", "ดิสก์"],
        "디스크가 가득": ["디스크", "디스크가 가"],
        "هاردديسك ممتلئ": ["ممتلئ", "هارد"],
    }
    await incidents.create_many(NewIncident(message, "partner") for message in said)
    for message, texts in said.items():
        for text in texts:
            expected = [each for each, asked in said.items() if text in asked]
            assert await messages(incidents, text) == expected, text
        assert await messages(incidents, message) == [message]
    for text in ("कमर रा", "盘磁", "盘 full", "geraete", "übersicht"):
        assert await messages(incidents, text) == [], text


async def test_words_of_any_kind_are_found(incidents: Verbs) -> None:
    """Numbers, hashes and addresses are found in full, and single words by their beginnings."""
    single = ["9056e4e", "1e5e3", "0x1f0", "x" * 300, "абвгд"]
    joined = [
        *("5e-3x", "12.5e4", "a@example.com", "https://example.com/path?x=1"),
        "3f2b8c1e-5d4a-4f6b-9c8d-7e6f5a4b3c2d",
    ]
    message = f"Here {' '.join([*single, *joined])} ends"
    await incidents.create(message, source="partner")
    for text in (*single, *joined, *(word[:4] for word in single), "here ends"):
        assert await messages(incidents, text[:200]) == [message], text
    for text in ("x" * 150 + "y", "12.5e", "a@example.co", "3f2b8c1e-5d4a-4f6b-9c8d-7e6f"):
        assert await messages(incidents, text) == [], text


async def test_operators_in_text_are_plain_text(incidents: Verbs) -> None:
    """A search treats operators of the full-text indexes as plain text."""
    message = "The disk and a NEAR one"
    await incidents.create(message, source="partner")
    for text in (
        'disk"*',
        "disk AND",
        "a*",
        "disk:*",
        "(disk",
        "(a NEAR)",
        "\\disk",
        "'disk",
        "disk%",
    ):
        assert await messages(incidents, text) == [message], text
    for text in ("NEAR(disk)", "a%e", "di_k", "%disk%one", "^near"):
        assert await messages(incidents, text) == ([message] if text == "^near" else []), text
    for text in ('"', "'; --", "*", " ", '""', "%", "_"):
        assert await refused(incidents.search(text=text)) == ["text"]


async def test_a_phrase_that_another_includes_changes_nothing(incidents: Verbs) -> None:
    """A repeated word, or one that another word or phrase includes, has no effect."""
    said = ["Disk display", "Disk is full", "Display is dark", "Диски полон"]
    await incidents.create_many(NewIncident(message, "partner") for message in said)
    for text, same in (
        ("disk DISK di dis", "di disk dis"),
        ("disk display dis", "display disk"),
        ("display disk d", "disk display"),
        ("is is-full full", '"is full"'),
        ("Диски диск", '"диски"'),
    ):
        assert await messages(incidents, text) == await messages(incidents, same), text
        counted = await incidents.search(text=text, limit=1, total=True)
        assert counted.total == len(await messages(incidents, same))


async def test_the_number_of_phrases_is_bounded(incidents: Verbs) -> None:
    """A text has at most 32 different words and phrases, not counting included ones."""
    letters = "abcdefghijklmnopqrstuvwxyz012345"
    message = " ".join(letters)
    await incidents.create(message, source="partner")
    for text in (message, message.upper(), f"{message} a b c", f"{message} " * 3, f'"{message}"'):
        assert await messages(incidents, text) == [message], text
    assert await messages(incidents, " ".join("a" * n for n in range(18, 0, -1))) == []
    with pytest.raises(InvalidIncident, match="at most 32 different words and phrases"):
        await incidents.search(text=f"{message} 6")
    assert await refused(incidents.search(text=f"{message} 6", limit=0)) == ["text", "limit"]


async def test_long_phrases_are_found(incidents: Verbs) -> None:
    """A phrase may have more words than an index is asked for, and repeat one very often."""
    chinese = "".join(map(chr, range(0x4E00, 0x4E00 + 150)))
    repeated = "あ" * 990 + "いう"
    for message in (chinese, repeated):
        await incidents.create(message, source="partner")
    assert await messages(incidents, chinese) == [chinese]
    assert await messages(incidents, chinese[:-2] + chinese[-1]) == []
    assert await messages(incidents, "あ" * 190 + "い") == [repeated]
    assert await messages(incidents, "あいう") == [repeated]
    assert await messages(incidents, "あうい") == []


async def test_every_total_is_exact(incidents: Verbs) -> None:
    """A total counts the matches of all pages, on a full page, the last one and an empty one."""
    await of_every_kind(incidents)
    matching: list[tuple[dict[str, Any], int]] = [
        ({}, 9),
        ({"text": "disk"}, 9),
        ({"status": "new"}, 3),
        ({"status": "new", "text": "full"}, 3),
        ({"text": "nothing"}, 0),
        ({"created_before": datetime(2020, 1, 1, tzinfo=UTC)}, 0),
        ({"created_before": datetime(2020, 1, 1, tzinfo=UTC), "text": "disk"}, 0),
    ]
    for filters, count in matching:
        for limit, order in product((1, 3, 8, 9, 10, 1000), ORDERS):
            search = {**filters, "limit": limit, "order": order, "total": True}
            page = await incidents.search(**search)
            assert page.total == count, search
            assert (page.next is None) == (count <= limit), search
            if page.next is not None:
                assert (await incidents.search(**search, after=page.next)).total == count, search
    last = (await incidents.search(limit=8)).next
    for text in (None, "disk"):
        page = await incidents.search(text=text, after=last, status="failed", total=True)
        assert page == SearchPage([], None, 3)


async def test_large_pages_with_words_are_complete(incidents: Verbs) -> None:
    """Pages of hundreds of incidents of a second or two have every match once, in their order."""
    new = [NewIncident(f"Disk {n} is {'hot' if n % 3 else 'full'}", "partner") for n in range(1300)]
    created = [*await incidents.create_many(new[:650]), *await incidents.create_many(new[650:])]
    for text, limit, order in zip(("disk", "hot"), (1000, 600), ORDERS, strict=True):
        expected = [one for one in created if text in one.incident_message.lower()]
        first = await incidents.search(text=text, limit=limit, order=order)
        assert len(first.incidents) == limit
        second = await incidents.search(text=text, limit=limit, order=order, after=first.next)
        assert second.next is None
        found = [*first.incidents, *second.incidents]
        assert found == (expected if order == "oldest" else expected[::-1])


@needs(Need.OUTSIDE_SQL)
async def test_the_text_index_follows_messages(incidents: Verbs, embodiment: Embodiment) -> None:
    """A message that plain SQL has changed or deleted is found only by its current text."""
    await incidents.create("Disk is full", source="partner")
    await embodiment.sql("UPDATE \"Incident\" SET incident_message = 'Line is down'")
    assert await messages(incidents, "disk") == []
    assert await messages(incidents, "line") == ["Line is down"]
    await embodiment.sql('DELETE FROM "Incident"')
    assert await messages(incidents, "line") == []


async def test_inserts_do_not_shift_pages(incidents: Verbs) -> None:
    """Incidents created between two pages cause no gaps and no repeats."""
    created = await incidents.create_many([NewIncident("Disk is full", "partner")] * 5)
    there = [incident.incident_id for incident in created]
    for order in ORDERS:
        seen: list[int] = []
        page = await incidents.search(limit=2, order=order)
        while True:
            seen += [one.incident_id for one in page.incidents]
            if page.next is None or len(seen) > 20:
                break
            if len(seen) < 6:
                await incidents.create("In between", source="partner")
            page = await incidents.search(limit=2, order=order, after=page.next)
        assert len(set(seen)) == len(seen)
        assert [one for one in seen if one in there] == (
            there if order == "oldest" else there[::-1]
        )


async def test_a_cursor_keeps_its_order_but_not_its_filters(incidents: Verbs) -> None:
    """Filters may change between pages; the order may not."""
    created = await of_every_kind(incidents)
    page = await incidents.search(limit=4, order="oldest")
    rest = await incidents.search(order="oldest", status="failed", after=page.next)
    assert rest.incidents == [one for one in created[4:] if one.incident_type == "failed"]
    with pytest.raises(InvalidIncident, match="after is a cursor of the order oldest"):
        await incidents.search(order="newest", after=page.next)


async def test_a_cursor_respects_time_bounds(incidents: Verbs) -> None:
    """A search after a cursor returns only incidents within its time bounds."""
    await incidents.create_many([NewIncident("Disk is full", "partner")] * 3)
    now = (await incidents.get(1)).created_at
    earlier, later = now - timedelta(hours=1), now + timedelta(hours=1)
    for order in ORDERS:
        after = (await incidents.search(limit=1, order=order)).next
        too_late = await incidents.search(order=order, after=after, created_after=later)
        too_early = await incidents.search(order=order, after=after, created_before=earlier)
        assert [*too_late.incidents, *too_early.incidents] == []
        found = await incidents.search(
            order=order, after=after, created_after=earlier, created_before=later
        )
        assert len(found.incidents) == 2


async def test_every_invalid_argument_is_named(incidents: Verbs) -> None:
    """Invalid arguments are refused and named, never ignored."""
    await incidents.create("Disk is full", source="partner")
    (event,) = await incidents.history(1)
    naive = datetime(2026, 1, 1)  # noqa: DTZ001
    faulty: list[tuple[dict[str, Any], list[str]]] = [
        ({"status": "open"}, ["status"]),
        ({"status": []}, ["status"]),
        ({"status": ["new", None], "source": 7}, ["status", "source"]),
        ({"created_after": "2026-01-01"}, ["created_after"]),
        ({"created_after": naive, "created_before": 7}, ["created_after", "created_before"]),
        ({"text": ""}, ["text"]),
        ({"text": "-?!"}, ["text"]),
        ({"text": "x" * 201}, ["text"]),
        ({"text": "a\x00b"}, ["text"]),
        ({"text": 7}, ["text"]),
        ({"order": "best"}, ["order"]),
        ({"order": None, "limit": 0, "after": "?"}, ["order", "limit", "after"]),
        ({"limit": 1001}, ["limit"]),
        ({"limit": True}, ["limit"]),
        ({"after": 7}, ["after"]),
        ({"after": ""}, ["after"]),
        ({"after": event.cursor}, ["after"]),
        ({"total": 1}, ["total"]),
    ]
    for arguments, fields in faulty:
        assert await refused(incidents.search(**arguments)) == fields, arguments


async def test_iterating_yields_every_match(incidents: Verbs) -> None:
    """Batches of any size yield every match once, in order, and iteration can stop early."""
    created = await of_every_kind(incidents)
    for batch, order in product((1, 4, 9, 100), ORDERS):
        expected = [one.incident_id for one in created if one.source != "partner"]
        some: list[SourceName] = ["operator", "monitoring"]
        found = incidents.iterate(source=iter(some), text="disk", order=order, batch=batch)
        assert await ids(found) == (expected if order == "oldest" else expected[::-1])
    left: Any = incidents.iterate(batch=2)
    async with aclosing(left):
        async for incident in left:
            assert incident == created[-1]
            break


async def test_iterating_refuses_invalid_arguments(incidents: Verbs) -> None:
    """Iterating raises InvalidIncident for each invalid argument."""
    faulty: list[dict[str, Any]] = [
        {"status": "open"},
        {"text": ""},
        {"order": "best"},
        {"created_after": 7},
        {"batch": 0},
        {"batch": 1001},
    ]
    for arguments in faulty:
        with pytest.raises(InvalidIncident):
            await ids(incidents.iterate(**arguments))

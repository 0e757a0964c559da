"""Reading pages of the list."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from itertools import product
from typing import TYPE_CHECKING, Any

from incidentkit import IncidentSource, IncidentStatus, ListQuery, NewIncident
from tests.conformance.gaps import Need, needs
from tests.conformance.refusals import refused

if TYPE_CHECKING:
    from incidentkit import Incident
    from tests.conformance.embodiments import Embodiment, Verbs


async def of_every_kind(incidents: Verbs) -> list[Incident]:
    """Create an incident of each source and status, and return them, newest first."""
    kinds = product(IncidentSource, IncidentStatus)
    created = await incidents.create_many(NewIncident("Disk is full", *kind) for kind in kinds)
    return created[::-1]


async def test_without_incidents_every_page_is_empty(incidents: Verbs) -> None:
    """Without incidents, every page is empty."""
    assert await incidents.list() == []
    assert await incidents.list(page=7, limit=1, status="new", source="partner") == []


async def test_the_newest_incident_comes_first(incidents: Verbs) -> None:
    """Each new incident comes first in the list."""
    created: list[Incident] = []
    for number in range(4):
        created.insert(0, await incidents.create(f"Disk {number} is full", source="monitoring"))
        assert await incidents.list() == created


@needs(Need.OUTSIDE_SQL)
async def test_order_is_by_time_and_then_by_id(incidents: Verbs, embodiment: Embodiment) -> None:
    """Pages are ordered by time and, within a second, by id, newest first."""
    await incidents.create_many([NewIncident("Disk is full", "monitoring")] * 6)
    for year, ids in ((2020, "5, 2"), (2999, "1, 3")):
        at = embodiment.moment(datetime(year, 1, 1, tzinfo=UTC))
        await embodiment.sql(
            f'UPDATE "Incident" SET created_at = {at} WHERE incident_id IN ({ids})'
        )
    pages = [await incidents.list(page, 2) for page in (1, 2, 3, 4)]
    ids_of_pages = [[incident.incident_id for incident in page] for page in pages]
    assert ids_of_pages == [[3, 1], [6, 4], [5, 2], []]


async def test_pages_partition_the_list(incidents: Verbs) -> None:
    """Pages of any size contain each incident once; the default size is 10."""
    created = await incidents.create_many([NewIncident("Disk is full", "monitoring")] * 25)
    everything = await incidents.list(limit=1000)
    assert everything == created[::-1]
    assert await incidents.list() == everything[:10]
    for limit in (1, 7, 25):
        pages = [await incidents.list(page, limit) for page in range(1, 25 // limit + 3)]
        assert [incident for page in pages for incident in page] == everything
        assert pages[-1] == []


async def test_filters_return_exactly_the_matches(incidents: Verbs) -> None:
    """Each filter, alone or combined, returns exactly the matching incidents."""
    everything = await of_every_kind(incidents)
    for status, source in product((None, *IncidentStatus), (None, *IncidentSource)):
        assert await incidents.list(limit=1000, status=status, source=source) == [
            incident
            for incident in everything
            if status in (None, incident.incident_type) and source in (None, incident.source)
        ]


async def test_filters_are_members_or_strings(incidents: Verbs) -> None:
    """A status or source can be an enum member or a string."""
    await of_every_kind(incidents)
    by_member = await incidents.list(
        status=IncidentStatus.FAILED, source=IncidentSource.PARTNER, page=1, limit=5
    )
    assert len(by_member) == 1
    assert await incidents.list(1, 5, "failed", "partner") == by_member


async def test_pages_partition_the_matches_of_a_filter(incidents: Verbs) -> None:
    """With a filter, pages count only the matching incidents."""
    everything = await of_every_kind(incidents)
    failed = [one for one in everything if one.incident_type is IncidentStatus.FAILED]
    pages = [await incidents.list(page, 2, status="failed") for page in (1, 2, 3)]
    assert pages == [failed[:2], failed[2:], []]


async def test_a_status_change_moves_between_filtered_lists(incidents: Verbs) -> None:
    """A filtered list that was read before a status change shows the change when read again."""
    incident = await incidents.create("Disk is full", source="monitoring")
    assert await incidents.list(status="new") == [incident]
    assert await incidents.list(status="failed") == []
    changed = await incidents.update_status(incident.incident_id, "failed")
    assert await incidents.list(status="new") == []
    assert await incidents.list(status="failed") == await incidents.list() == [changed]


async def test_a_cached_page_is_equal(incidents: Verbs) -> None:
    """A page that is read twice, possibly from a cache, is equal down to the types."""
    await of_every_kind(incidents)
    first, second = await incidents.list(), await incidents.list()
    assert first == second
    assert {type(incident.incident_type) for incident in second} == {IncidentStatus}
    assert {type(incident.source) for incident in second} == {IncidentSource}


async def test_the_farthest_page_is_empty(incidents: Verbs) -> None:
    """The largest allowed offset returns an empty page."""
    await incidents.create("Disk is full", source="monitoring")
    assert await incidents.list(page=2**63 - 1, limit=1) == []


async def test_each_write_is_in_the_next_list(incidents: Verbs) -> None:
    """With many concurrent readers and writers, each write is in its writer's next list."""

    async def write_and_read(number: int) -> None:
        incident = await incidents.create(f"Incident {number}", source="operator")
        assert incident in await incidents.list(limit=1000)
        done = await incidents.update_status(incident.incident_id, "completed")
        listed = await incidents.list(limit=1000)
        assert done in listed
        assert incident not in listed

    await asyncio.gather(*(write_and_read(number) for number in range(30)))


@needs(Need.OTHER_CLIENT)
async def test_writes_of_another_client_are_listed(incidents: Verbs, other: Verbs) -> None:
    """A list, cached or not, always shows the latest commit of another client."""
    expected: list[Incident] = []
    for number in range(5):
        incident = await incidents.create(f"Incident {number}", source="operator")
        assert await other.list() == [incident, *expected]
        expected.insert(0, await other.update_status(incident.incident_id, "completed"))
        assert await incidents.list() == expected


@needs(Need.OUTSIDE_SQL)
async def test_writes_of_another_program_are_listed(
    incidents: Verbs, embodiment: Embodiment
) -> None:
    """A list shows rows written by plain SQL, with every field filled in."""
    assert await incidents.list() == []
    await embodiment.sql(
        'INSERT INTO "Incident" (incident_message, incident_type, source) '
        "VALUES ('By hand', 'new', 'operator')"
    )
    (incident,) = await incidents.list()
    assert incident.incident_message == "By hand"
    assert (incident.version, incident.occurrences, incident.dedup_key) == (1, 1, None)
    assert incident.last_seen_at == incident.created_at
    assert await incidents.history(incident.incident_id) == []
    changed = await incidents.update_status(incident.incident_id, "completed")
    assert await incidents.list() == [changed]
    assert len(await incidents.history(incident.incident_id)) == 1
    await embodiment.sql('DELETE FROM "Incident"')
    assert await incidents.list() == []


async def test_every_invalid_argument_is_named(incidents: Verbs) -> None:
    """One error names every invalid argument."""
    call: Any = incidents.list
    assert await refused(call(page=0, limit=1001, status="open", source="nobody")) == [
        "page",
        "limit",
        "status",
        "source",
    ]
    for page in (0, -1, 2**63, True, "1", 1.0, None):
        assert await refused(call(page)) == ["page"]
    for limit in (0, -1, 1001, True, "1", 1.0, None):
        assert await refused(call(limit=limit)) == ["limit"]
    assert await refused(call(page=2**62, limit=3)) == ["page"]


@needs(Need.LIST_JSON)
async def test_json_has_the_incidents_of_the_page(incidents: Verbs) -> None:
    """`list_json` returns the incidents of `list`, even from the cache."""
    everything = await of_every_kind(incidents)
    for query in (ListQuery(), ListQuery(2, 2, "failed", "partner"), ListQuery(1, 2, "new")):
        listed = await incidents.list(query.page, query.limit, query.status, query.source)
        for _ in range(2):
            found = json.loads(await incidents.list_json(query))
            assert [one["incident_id"] for one in found] == [one.incident_id for one in listed]
    first = json.loads(await incidents.list_json(ListQuery()))[0]
    assert first["incident_message"] == everything[0].incident_message
    assert first["incident_type"] == everything[0].incident_type.value
    assert first["source"] == everything[0].source.value
    assert first["created_at"] == f"{everything[0].created_at:%Y-%m-%d %H:%M:%S}"

"""Deep pages are read from the nearest bookmark and stay correct through every change."""

from __future__ import annotations

import random
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest

from incidentkit import IncidentClient, IncidentSource, IncidentStatus, ListQuery, NewIncident
from incidentkit.domain.values import DEEP
from incidentkit.store.bookmarks import MAX_BOOKMARKS, Bookmarks
from incidentkit.store.sql.statements import SELECT_PAGE
from tests.hosts import run_sql
from tests.test_sharing import counted, fill, plan

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

STATUSES = (None, *IncidentStatus)
SOURCES = (None, *IncidentSource)


@pytest.fixture
async def client(url: str) -> AsyncIterator[IncidentClient]:
    """A client of a database with many incidents of every kind."""
    async with IncidentClient.open(url) as client:
        await client.create_many(
            NewIncident(f"Disk {n} is full", list(IncidentSource)[n % 7 % 3])
            for n in range(2 * DEEP)
        )
        for n in range(0, 2 * DEEP, 9):
            await client.update_status(n + 1, list(IncidentStatus)[1 + n % 2])
        yield client


async def everything(url: str) -> list[tuple[int, str, str]]:
    """Return the id, status and source of all incidents in the order of a list."""
    rows = await run_sql(
        url,
        "SELECT incident_id, CAST(incident_type AS text), CAST(source AS text) "
        'FROM "Incident" ORDER BY created_at DESC, incident_id DESC',
    )
    return [(incident_id, status, source) for incident_id, status, source in rows]


@pytest.mark.parametrize("seed", range(3))
async def test_a_page_is_true_whatever_was_read_and_written_before(
    client: IncidentClient, url: str, seed: int
) -> None:
    """Deep pages match the table, read in any order and between changes of every kind."""
    chosen = random.Random(seed)
    for _ in range(8):
        incidents = await everything(url)
        for _ in range(20):
            status = chosen.choice(STATUSES[:2])
            source = chosen.choice(SOURCES) if status is None else None
            limit = chosen.choice((1, 7, 100))
            page = 1 + (DEEP + chosen.randrange(-120, 200)) // limit
            query = ListQuery(page, limit, status, source)
            expected = [
                incident_id
                for incident_id, its_status, its_source in incidents
                if status in (None, its_status) and source in (None, its_source)
            ][query.offset : query.offset + limit]
            found = await client.store.list(query)
            assert [one.incident_id for one in found.incidents] == expected, query
        change = chosen.randrange(3)
        victim = chosen.choice(incidents)[0]
        if change == 0:
            await client.create("Disk is full again", source="operator")
        elif change == 1:
            await client.update_status(victim, chosen.choice(("completed", "failed")))
        else:
            await run_sql(url, f'DELETE FROM "Incident" WHERE incident_id = {victim}')


async def test_the_next_page_is_read_from_the_last(
    migrated_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first deep page, and the first one after a change, is read from the top."""
    await fill(migrated_postgres_url)
    async with counted(migrated_postgres_url, monkeypatch) as (client, sent):
        for number in range(3):
            await client.list(page=DEEP + number, limit=10)
        await client.create("Disk is full", source="partner")
        for number in range(3, 5):
            await client.list(page=DEEP + number, limit=10)
    pages = [statement for statement in sent if "OFFSET" in statement]
    onward = ["AS start" in statement for statement in pages]
    # After the change, a read finds its bookmark outdated and starts again from the top.
    assert onward == [False, True, True, True, False, True]


@pytest.mark.parametrize("filters", list(product((False, True), repeat=2)))
async def test_the_next_page_begins_in_the_index(
    migrated_postgres_url: str, filters: tuple[bool, bool]
) -> None:
    """A page after a bookmark starts in the index and reads no row before it."""
    await fill(migrated_postgres_url)
    values = {"status": "new", "source": "partner", "limit": 10, "offset": 10}
    values |= {"start_id": 5000, "start_token": "0"}
    found = await plan(migrated_postgres_url, SELECT_PAGE[*filters, "onward"], values)
    assert "Index Only Scan Backward" in found
    (line,) = [line for line in found.splitlines() if "ROW(created_at, incident_id) <=" in line]
    assert "Index Cond" in line


def test_bookmarks_are_bounded() -> None:
    """The number of bookmarks is bounded, and the latest one is always kept."""
    bookmarks = Bookmarks()
    for n in range(3 * MAX_BOOKMARKS):
        bookmarks.add(ListQuery(n + 1, 10), n, "token")
        bookmarks.add(ListQuery(n + 1, 10), n, "token")
    assert sum(map(len, bookmarks._kept.values())) <= MAX_BOOKMARKS
    found = bookmarks.before(ListQuery(3 * MAX_BOOKMARKS + 1, 10))
    assert found == ((10 * (3 * MAX_BOOKMARKS - 1), 3 * MAX_BOOKMARKS - 1), "token")


def test_a_page_that_is_known_is_no_news_when_there_is_no_room() -> None:
    """Adding a known bookmark again evicts none, even when there is no room for another."""
    bookmarks = Bookmarks()
    for n in range(MAX_BOOKMARKS):
        bookmarks.add(ListQuery(n + 1, 10), n + 1, "token")
    bookmarks.add(ListQuery(MAX_BOOKMARKS, 10), MAX_BOOKMARKS, "token")
    assert bookmarks.before(ListQuery(501, 10)) == ((5000, 501), "token")


def test_a_page_that_lies_too_far_before_is_of_no_use() -> None:
    """A bookmark is used only if skipping rows from it is cheaper than from the top."""
    bookmarks = Bookmarks()
    bookmarks.add(ListQuery(201, 10), 7, "token")
    assert bookmarks.before(ListQuery(260, 10)) == ((2000, 7), "token")
    assert bookmarks.before(ListQuery(300, 10)) is None
    assert bookmarks.before(ListQuery(200, 10)) is None


async def test_after_a_change_nothing_is_passed_over_in_vain(migrated_postgres_url: str) -> None:
    """A read from an outdated bookmark returns no incident, only the current token."""
    await fill(migrated_postgres_url)
    values = {"status": None, "source": None, "limit": 10, "offset": 0, "start_id": 5000}
    async with IncidentClient.open(migrated_postgres_url) as client:
        store: Any = client.store
        executor = store._connections
        token = await client.store.token()
        statement = SELECT_PAGE[False, False, "onward"]
        assert len(await executor.read(statement, values | {"start_token": token})) == 10
        (alone,) = await executor.read(statement, values | {"start_token": "another"})
        assert (alone[0], alone[-1]) == (None, token)

"""Searches compared with a plain list, and their query plans, on both databases."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.dialects.sqlite import dialect
from sqlalchemy.ext.asyncio import create_async_engine

from incidentkit import (
    Incident,
    IncidentClient,
    IncidentOrder,
    IncidentSource,
    IncidentStatus,
    InvalidIncident,
)
from incidentkit.domain.cursor import encode_cursor
from incidentkit.domain.queries import SearchQuery
from incidentkit.domain.words import phrases
from incidentkit.store import StoreOptions
from incidentkit.store.postgresql import statements as postgresql_statements
from incidentkit.store.postgresql.driver import compile_statement
from incidentkit.store.searching import messages_to_scan
from incidentkit.store.sql.rows import COUNT
from incidentkit.store.sql.search import (
    Shape,
    select_page,
    select_page_among_first,
    select_page_and_total_found,
    select_page_found,
)
from incidentkit.store.sqlite import statements as sqlite_statements
from tests.hosts import run_sql, sqlalchemy_url
from tests.strategies import sources, statuses

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

_T = TypeVar("_T")

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)

WORDS = ("Disk", "disks", "DB", "db-1", "full", "диск", "Диски", "полон", "x7", "1", "is_not")

messages = st.lists(st.sampled_from(WORDS), min_size=3, max_size=6).map(", ".join)
seconds = st.integers(0, 4)


class World:
    """A client, and a plain list of the incidents in its database."""

    def __init__(self, url: str) -> None:
        self.runner = asyncio.Runner()
        self.client = IncidentClient.open(url)
        self.engine = create_async_engine(sqlalchemy_url(url))
        self.run(self.client.connect())
        self.model: list[Incident] = []

    def run(self, call: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine to completion."""
        return self.runner.run(call)

    def close(self) -> None:
        """Close everything that was opened."""
        self.run(self.client.close())
        self.run(self.engine.dispose())
        self.runner.close()

    async def fill(self, rows: list[tuple[str, str, str, int]]) -> None:
        """Replace all incidents with the rows."""
        async with self.engine.begin() as connection:
            await connection.execute(text('DELETE FROM "Incident"'))
            zone = "" if connection.dialect.name == "sqlite" else "+00"
            for message, status, source, second in rows:
                at = f"{EPOCH + timedelta(seconds=second):%Y-%m-%d %H:%M:%S}{zone}"
                await connection.execute(
                    text(
                        'INSERT INTO "Incident" (incident_message, incident_type, source, '
                        f"created_at) VALUES (:message, '{status}', '{source}', '{at}')"
                    ),
                    {"message": message},
                )
        self.model = await self.client.list(limit=1000)

    def matching(
        self,
        *,
        order: IncidentOrder,
        wanted: set[IncidentStatus] | None,
        origins: set[IncidentSource] | None,
        after: int | None,
        before: int | None,
        said: str | None,
    ) -> list[Incident]:
        """Return the incidents that a search must find."""
        found = [
            one
            for one in self.model
            if (wanted is None or one.incident_type in wanted)
            and (origins is None or one.source in origins)
            and (after is None or one.created_at >= EPOCH + timedelta(seconds=after))
            and (before is None or one.created_at < EPOCH + timedelta(seconds=before))
            and (said is None or has_words(one.incident_message, said))
        ]
        return found if order is IncidentOrder.NEWEST else found[::-1]


def has_words(message: str, said: str) -> bool:
    """Return whether a message has each word, the last one as the beginning of a word."""
    words = re.findall(r"[^\W_]+", message.lower())
    *asked, last = (re.findall(r"[^\W_]+", one) for one in said.lower().split())
    return all(has_phrase(words, phrase) for phrase in asked) and (
        any(word.startswith(last[0]) for word in words)
        if len(last) == 1
        else has_phrase(words, last)
    )


def has_phrase(words: list[str], phrase: list[str]) -> bool:
    """Return whether words stand one after the other."""
    return any(words[at : at + len(phrase)] == phrase for at in range(len(words)))


@pytest.fixture
def world(url: str) -> Iterator[World]:
    """A client on each database, with its list."""
    with closing(World(url)) as world:
        yield world


SAID = ("disk", "DISK db", "диск", "ДИСК ПО", "x", "db-1", "1-db", "full disks", "zz")

searches = st.fixed_dictionaries(
    {
        "order": st.sampled_from(IncidentOrder),
        "wanted": st.none() | st.sets(statuses, min_size=1),
        "origins": st.none() | st.sets(sources, min_size=1),
        "after": st.none() | seconds,
        "before": st.none() | seconds,
        "said": st.none() | st.sampled_from(SAID),
    }
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    rows=st.lists(st.tuples(messages, statuses, sources, seconds), max_size=12),
    asked=st.lists(st.tuples(searches, st.integers(1, 5)), min_size=1, max_size=6),
)
def test_pages_are_those_of_a_plain_list(
    world: World,
    rows: list[tuple[str, str, str, int]],
    asked: list[tuple[dict[str, Any], int]],
) -> None:
    """For any filters, order and limit, the pages add up to the matching incidents."""
    world.run(world.fill(rows))
    for search, limit in asked:
        expected = world.matching(**search)
        filters = {
            "status": search["wanted"],
            "source": search["origins"],
            "created_after": at(search["after"]),
            "created_before": at(search["before"]),
            "text": search["said"],
            "order": search["order"],
        }
        found, after = [], None
        while True:
            page = world.run(world.client.search(**filters, limit=limit, after=after, total=True))
            assert page.total == len(expected)
            assert len(page.incidents) <= limit
            found += page.incidents
            after = page.next
            if after is None:
                break
            assert len(page.incidents) == limit
        assert found == expected

        async def iterated(filters: dict[str, Any], limit: int) -> list[Incident]:
            return [one async for one in world.client.iterate(**filters, batch=limit)]

        assert world.run(iterated(filters, limit)) == expected


def at(second: int | None) -> datetime | None:
    """Return the time of a second of the model."""
    return None if second is None else EPOCH + timedelta(seconds=second)


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    rows=st.lists(st.tuples(messages, statuses, sources, seconds), min_size=4, max_size=10),
    order=st.sampled_from(IncidentOrder),
    limit=st.integers(1, 3),
    data=st.data(),
)
def test_a_cursor_stays_right_while_others_write(
    world: World,
    rows: list[tuple[str, str, str, int]],
    order: IncidentOrder,
    limit: int,
    data: st.DataObject,
) -> None:
    """Rows that exist throughout come exactly once, whatever is added or removed meanwhile."""
    world.run(world.fill(rows))
    there = {one.incident_id for one in world.model}
    removed: set[int] = set()

    async def disturb() -> None:
        second, gone = data.draw(seconds), data.draw(st.sampled_from(sorted(there)))
        removed.add(gone)
        async with world.engine.begin() as connection:
            zone = "" if connection.dialect.name == "sqlite" else "+00"
            moment = f"{EPOCH + timedelta(seconds=second):%Y-%m-%d %H:%M:%S}{zone}"
            await connection.execute(
                text(
                    'INSERT INTO "Incident" (incident_message, incident_type, source, created_at) '
                    f"VALUES ('In between', 'new', 'partner', '{moment}')"
                )
            )
            await connection.execute(text(f'DELETE FROM "Incident" WHERE incident_id = {gone}'))

    seen: list[Incident] = []
    after = None
    while True:
        page = world.run(world.client.search(order=order, limit=limit, after=after))
        seen += page.incidents
        if page.next is None:
            break
        after = page.next
        world.run(disturb())
    ids = [one.incident_id for one in seen]
    assert len(set(ids)) == len(ids)
    assert there - removed <= set(ids)
    keys = [(one.created_at, one.incident_id) for one in seen]
    assert keys == sorted(keys, reverse=order is IncidentOrder.NEWEST)


async def test_fractions_of_a_second_are_in_order(migrated_postgres_url: str) -> None:
    """Rows that differ by less than a second are paged in their order."""
    connection = await asyncpg.connect(migrated_postgres_url)
    for fraction in (5, 1, 9, 3):
        await connection.execute(
            'INSERT INTO "Incident" (incident_message, incident_type, source, created_at) VALUES '
            f"('Fraction {fraction}', 'new', 'partner', '2026-01-01 10:00:00.{fraction}+00')"
        )
    await connection.close()
    async with IncidentClient.open(migrated_postgres_url) as incidents:
        for order, expected in (
            (IncidentOrder.OLDEST, [1, 3, 5, 9]),
            (IncidentOrder.NEWEST, [9, 5, 3, 1]),
        ):
            found = [one async for one in incidents.iterate(order=order, batch=1)]
            assert [int(one.incident_message[-1]) for one in found] == expected
        second = datetime(2026, 1, 1, 10, tzinfo=UTC)
        # They all show 10:00:00.
        assert len((await incidents.search(created_after=second)).incidents) == 4
        assert len((await incidents.search(created_before=second)).incidents) == 0
        half = second + timedelta(milliseconds=500)
        assert len((await incidents.search(created_after=half)).incidents) == 0
        assert len((await incidents.search(created_before=half)).incidents) == 4


@pytest.mark.parametrize(
    "cursor",
    [
        encode_cursor(0, 1, 1),
        encode_cursor(0, 1, 2),
        encode_cursor(2**63 - 1, 1, 0),
        encode_cursor(0, 0, 0),
        encode_cursor(0, 1, 0) + "=",
    ],
)
async def test_a_forged_cursor_is_refused(incidents: IncidentClient, cursor: str) -> None:
    """A cursor with impossible values is refused."""
    with pytest.raises(InvalidIncident) as caught:
        await incidents.search(after=cursor)
    assert [error.field for error in caught.value.errors] == ["after"]


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    words=st.lists(
        st.text("abcefxyz019ABE", min_size=5, max_size=12)
        | st.text("абвгдеАБВ", min_size=5, max_size=8)
        | st.uuids().map(str),
        min_size=1,
        max_size=4,
    )
)
@example(words=["9056e4e", "1e5e3", "5e-3x", "0x1f", "12.5e4"])
@example(words=["a@example.com", "https://example.com/path?x=1", "x" * 300])
def test_a_message_is_found_by_its_own_words(world: World, words: list[str]) -> None:
    """A message is found by its words and their beginnings, even words like numbers or hashes."""
    message = f"Here {' '.join(words)} ends"
    created = world.run(world.client.create(message, source="partner"))
    for said in (*words, *(re.split(r"[\W_]", word)[0][:5] for word in words), message):
        whole = said if len(said) <= 200 else said[:200].rpartition(" ")[0] or said[:200]
        page = world.run(world.client.search(text=whole, limit=1))
        assert [one.incident_id for one in page.incidents] == [created.incident_id]


async def test_times_of_another_program_on_sqlite_are_paged(sqlite_url: str) -> None:
    """Times from another program, with a fraction or a `T`, are paged in order."""
    async with IncidentClient.open(sqlite_url) as incidents:
        for at in (
            "2026-01-01 00:00:00.000000",
            "2026-01-01T00:00:00",
            "2026-01-01 00:00:00.7",
        ):
            row = f"('By hand', 'new', 'partner', '{at}')"
            await run_sql(
                sqlite_url,
                'INSERT INTO "Incident" (incident_message, incident_type, source, created_at) '
                f"VALUES {row}, {row}",
            )
        for order, expected in (
            (IncidentOrder.OLDEST, [1, 2, 3, 4, 5, 6]),
            (IncidentOrder.NEWEST, [6, 5, 4, 3, 2, 1]),
        ):
            found = [one.incident_id async for one in incidents.iterate(order=order, batch=2)]
            assert found == expected


async def test_messages_of_before_are_found(sqlite_url: str, empty_postgres_url: str) -> None:
    """An upgrade indexes the existing messages."""
    from incidentkit.store.migrate import upgrade

    for url in (sqlite_url, empty_postgres_url):
        await upgrade(url, "e4a81c3f5d27")
        await run_sql(
            url,
            'INSERT INTO "Incident" (incident_message, incident_type, source) '
            "VALUES ('Диск is full', 'completed', 'partner')",
        )
        await upgrade(url)
        async with IncidentClient.open(url) as incidents:
            (found,) = (await incidents.search(text="дис")).incidents
            assert found.ended_at is not None
            assert await incidents.history(found.incident_id) == []


async def test_a_joined_search_sees_its_transaction(migrated_postgres_url: str) -> None:
    """A search joined to a host's transaction sees its writes; a search outside does not."""
    connection = await asyncpg.connect(migrated_postgres_url)
    async with IncidentClient.open(migrated_postgres_url) as incidents, connection.transaction():
        joined = incidents.join(connection)
        await joined.create("Disk is full", source="partner")
        assert len((await joined.search(text="disk", total=True)).incidents) == 1
        assert (await incidents.search(text="disk", total=True)).total == 0
    await connection.close()


# Plans

SHAPES = [
    (statuses, sources, oldest)
    for statuses, sources, oldest in product((0, 1, 2), (0, 1, 2), (False, True))
]


def bound(query: SearchQuery) -> dict[str, Any]:
    """Return values for any shape, for a page deep in the list."""
    return {
        "low_at": query.created_after,
        "low_id": 0,
        "high_at": EPOCH + timedelta(seconds=10_000),
        "high_id": 10_000,
        "phrases": ["needle"],
        "begins": True,
        "limit": 11,
        # One row in a thousand is `failed`, one in a hundred is from `partner`.
        "status_0": "failed",
        "status_1": "new",
        "source_0": "partner",
        "source_1": "operator",
    }


FILL = (
    'INSERT INTO "Incident" (incident_message, incident_type, source, created_at) '
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000) "
    "SELECT CASE WHEN i % 4000 = 0 THEN 'A needle' ELSE 'Disk is full' END, {type}, {source}, {at} "
    "FROM n"
)


@pytest.fixture(scope="module")
def filled_sqlite(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with 20,000 incidents."""
    path = tmp_path_factory.mktemp("filled") / "incidents.db"

    async def make() -> None:
        async with IncidentClient.open(f"sqlite+aiosqlite:///{path}"):
            pass

    asyncio.run(make())
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            FILL.format(
                type="CASE WHEN i % 1000 = 0 THEN 'failed' ELSE 'new' END",
                source="CASE WHEN i % 100 = 0 THEN 'partner' ELSE 'operator' END",
                at="datetime('2026-01-01', '+' || i || ' seconds')",
            )
        )
        connection.execute("ANALYZE")
    return str(path)


@pytest.mark.parametrize(("statuses", "sources", "oldest"), SHAPES)
@pytest.mark.parametrize("onward", [False, True])
def test_sqlite_reads_an_index_in_order(
    filled_sqlite: str, statuses: int, sources: int, oldest: bool, onward: bool
) -> None:
    """Each branch of a page is read from an index, and a single branch needs no sort."""
    shape = Shape(statuses, sources, oldest, None, pairs=False, onward=onward)
    values = bound(SearchQuery())
    statement: Any = select_page(shape)
    with closing(sqlite3.connect(filled_sqlite)) as connection:
        plan = connection.execute(*explained(statement, values)).fetchall()
    steps = [row[3] for row in plan]
    searched = [step for step in steps if step.startswith("SEARCH Incident USING INDEX")]
    assert len(searched) == max(statuses, 1) * max(sources, 1) * (1 + onward), steps
    assert not [step for step in steps if step.startswith("SCAN Incident")], steps
    if len(searched) == 1:
        assert not [step for step in steps if "TEMP B-TREE" in step], steps


@pytest.fixture
async def filled_postgres(migrated_postgres_url: str) -> str:
    """A PostgreSQL database with 20,000 incidents."""
    connection = await asyncpg.connect(migrated_postgres_url)
    await connection.execute(
        FILL.format(
            type="CAST(CASE WHEN i % 1000 = 0 THEN 'failed' ELSE 'new' END AS incidentstatus)",
            source="CAST(CASE WHEN i % 100 = 0 THEN 'partner' ELSE 'operator' END "
            "AS incidentsource)",
            at="CAST('2026-01-01 00:00:00+00' AS timestamptz) + i * interval '1 second'",
        )
    )
    await connection.execute('VACUUM ANALYZE "Incident"')
    await connection.close()
    return migrated_postgres_url


def steps_of(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield each step of a plan."""
    yield plan
    for step in plan.get("Plans", ()):
        yield from steps_of(step)


async def test_postgresql_reads_an_index_in_order(filled_postgres: str) -> None:
    """Each branch reads at most about a page of rows from an index, at any depth and filter."""
    connection = await asyncpg.connect(filled_postgres)
    values = bound(SearchQuery())
    for statuses_, sources_, oldest in SHAPES:
        compiled = compile_statement(select_page(Shape(statuses_, sources_, oldest, None)))
        record = await connection.fetchval(
            f"EXPLAIN (ANALYZE, FORMAT JSON) {compiled.text}",
            *(values[name] for name in compiled.parameters),
        )
        (plan,) = json.loads(record)
        read = [step for step in steps_of(plan["Plan"]) if step.get("Relation Name") == "Incident"]
        assert len(read) == max(statuses_, 1) * max(sources_, 1)
        for step in read:
            assert step["Node Type"] in ("Index Scan", "Index Only Scan"), step
            assert step["Actual Rows"] <= 11
            # An index without the filter is used only where nearly every row matches.
            assert step.get("Rows Removed by Filter", 0) <= 11
    await connection.close()


async def test_words_are_found_by_their_index(filled_postgres: str, filled_sqlite: str) -> None:
    """Words are found by their index, and the scan of the first incidents is limited."""
    connection = await asyncpg.connect(filled_postgres)
    values = bound(SearchQuery()) | {"scan": 500}
    values["high_at"] = datetime(9999, 12, 31, tzinfo=UTC)
    values |= {"from_at": values["low_at"], "from_id": 0}
    values |= {"until_at": values["high_at"], "until_id": 0}
    shape = Shape(2, 1, oldest_first=False, words_match=postgresql_statements.WORDS_MATCH)
    for statement in (select_page_found(shape), select_page_and_total_found(shape)):
        compiled = compile_statement(statement)
        plan = await connection.fetch(
            f"EXPLAIN {compiled.text}", *(values[name] for name in compiled.parameters)
        )
        lines = "\n".join(line for (line,) in plan)
        assert lines.count('Bitmap Index Scan on "ix_Incident_incident_message"') == 1
        assert "Seq Scan" not in lines
    compiled = compile_statement(select_page_among_first(shape))
    (plan,) = json.loads(
        await connection.fetchval(
            f"EXPLAIN (ANALYZE, FORMAT JSON) {compiled.text}",
            *(values[name] for name in compiled.parameters),
        )
    )
    scans = [step for step in steps_of(plan["Plan"]) if step.get("Relation Name") == "Incident"]
    assert all(step["Actual Rows"] <= 500 for step in scans)
    await connection.close()
    shape = Shape(0, 0, oldest_first=False, words_match=sqlite_statements.WORDS_MATCH)
    found: Any = select_page_found(shape)
    text_ = found.compile(dialect=dialect(), compile_kwargs={"literal_binds": False}).string
    given = ["2026-01-01", 0, "2027-01-01", 0, '"needle"*', 11, 0]
    with closing(sqlite3.connect(filled_sqlite)) as file:
        steps = file.execute(f"EXPLAIN QUERY PLAN {text_}", given).fetchall()
    assert any("VIRTUAL TABLE INDEX" in row[3] for row in steps)


async def test_keys_are_found_by_their_index(filled_postgres: str, filled_sqlite: str) -> None:
    """The incidents with a key are read from its index, whatever the other filters are."""
    values = bound(SearchQuery()) | {"dedup_key": "disk"}
    values |= {"from_at": values["low_at"], "from_id": 0}
    values |= {"until_at": values["high_at"], "until_id": 0}
    connection = await asyncpg.connect(filled_postgres)
    for pairs, (statuses_, sources_, oldest) in product((True, False), SHAPES):
        shape = Shape(statuses_, sources_, oldest, None, with_key=True, pairs=pairs)
        for statement in (select_page_found(shape), select_page_and_total_found(shape)):
            if pairs:
                compiled = compile_statement(statement)
                rows = await connection.fetch(
                    f"EXPLAIN {compiled.text}", *(values[name] for name in compiled.parameters)
                )
                steps = [line for (line,) in rows if "Incident" in line]
                assert [step for step in steps if '"ix_Incident_dedup_key"' in step], steps
                assert not [step for step in steps if "Seq Scan" in step], steps
                continue
            with closing(sqlite3.connect(filled_sqlite)) as file:
                plan = file.execute(*explained(statement, values)).fetchall()
            steps = [row[3] for row in plan if "Incident" in row[3]]
            assert len(steps) == 1
            assert "USING INDEX ix_Incident_dedup_key (dedup_key=?)" in steps[0]
    await connection.close()


def explained(statement: Any, values: dict[str, Any]) -> tuple[str, list[Any]]:
    """Return the statement that explains another one on SQLite, and its values."""
    compiled = statement.compile(dialect=dialect())
    names = compiled.positiontup or []
    given = [
        value.strftime("%Y-%m-%d %H:%M:%S") if isinstance(value, datetime) else value
        for value in (values.get(name, compiled.params.get(name)) for name in names)
    ]
    return f"EXPLAIN QUERY PLAN {compiled.string}", given


async def analyze(url: str) -> None:
    """Let PostgreSQL learn how many incidents there are; SQLite needs nothing for that."""
    if url.startswith("postgresql"):
        await run_sql(url, 'ANALYZE "Incident"')


@pytest.mark.parametrize("limit", [10, 600])
async def test_words_of_many_and_of_few_are_found(url: str, limit: int) -> None:
    """Pages are complete and in order, whether all messages have the words or only the oldest."""
    async with IncidentClient.open(url) as incidents:
        await run_sql(
            url,
            'INSERT INTO "Incident" (incident_message, incident_type, source) '
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1200) "
            "SELECT CASE WHEN i < 31 THEN 'A needle' ELSE 'Straw' END || ' of db', "
            "'new', 'partner' FROM n",
        )
        for said, expected in (("db", 1200), ("needle", 30), ("straw db", 1170)):
            found = [one.incident_id async for one in incidents.iterate(text=said, batch=limit)]
            assert len(found) == expected
            assert found == sorted(found, reverse=True)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log of the statements that a client with `echo` sends."""
    caplog.set_level("INFO", "incidentkit.store")
    return caplog


def statements(log: pytest.LogCaptureFixture) -> list[str]:
    """Return the statements in a log."""
    return [record.getMessage().strip() for record in log.records]


async def many(url: str, size: int) -> None:
    """Store incidents in two seconds: every message says disk, every second one half."""
    await run_sql(
        url,
        'INSERT INTO "Incident" (incident_message, incident_type, source, created_at) '
        f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {size}) "
        "SELECT CASE WHEN i % 2 = 0 THEN 'Disk in half' ELSE 'Disk in room' END, 'new', "
        f"'partner', CASE WHEN i * 2 < {size} THEN {second('2026-01-01 00:00:00', url)} "
        f"ELSE {second('2026-01-01 00:00:01', url)} END FROM n",
    )
    await analyze(url)


def second(at: str, url: str) -> str:
    """Return a time as SQL."""
    return f"CAST('{at}+00' AS timestamptz)" if url.startswith("postgresql") else f"'{at}'"


async def test_a_large_page_of_a_common_word_is_scanned(
    url: str, log: pytest.LogCaptureFixture
) -> None:
    """A page of any size is read in its order if enough messages have the words."""
    async with IncidentClient.open(url, options=StoreOptions(echo=True)) as incidents:
        await many(url, 40_000)
        for said, limit, step in (("disk", 1000, 1), ("half", 400, 2)):
            for order, sign in ((IncidentOrder.NEWEST, -1), (IncidentOrder.OLDEST, 1)):
                log.clear()
                page = await incidents.search(text=said, limit=limit, order=order)
                page = await incidents.search(text=said, limit=limit, order=order, after=page.next)
                ids = [one.incident_id for one in page.incidents]
                first = (limit + 1) * step if sign > 0 else 40_000 - limit * step
                assert ids == [first + sign * step * n for n in range(limit)]
                # Two scans for each page, and none of the index of words.
                assert [shown.split()[:2] for shown in statements(log)] == [["WITH", "first"]] * 4


async def test_few_of_many_messages_are_found_by_their_index(
    url: str, log: pytest.LogCaptureFixture
) -> None:
    """A large page of a word in every second one of few messages is read from their index."""
    async with IncidentClient.open(url, options=StoreOptions(echo=True)) as incidents:
        await many(url, 2_000)
        log.clear()
        page = await incidents.search(text="half", limit=800)
        assert [one.incident_id for one in page.incidents] == list(range(2_000, 400, -2))
        # The first scan, and the index.
        assert [shown.split()[1] for shown in statements(log)] == ["first", "found"]


async def test_a_total_is_counted_only_if_the_page_does_not_tell_it(
    url: str, log: pytest.LogCaptureFixture
) -> None:
    """A total takes a statement of its own only without words, and if there is another page."""
    async with IncidentClient.open(url, options=StoreOptions(echo=True)) as incidents:
        await many(url, 8)

        async def counted(**search: Any) -> tuple[int, int | None]:
            log.clear()
            page = await incidents.search(**search, total=True)
            return len(log.records), page.total

        first = (await incidents.search(limit=3)).next
        assert await counted(limit=8) == (1, 8)
        assert await counted(limit=7) == (2, 8)
        assert await counted(limit=5, after=first) == (2, 8)
        assert await counted(source="operator") == (1, 0)
        assert await counted(text="half", limit=1) == (1, 4)
        assert await counted(text="half", limit=4) == (1, 4)
        assert await counted(text="disk", limit=5, after=first) == (1, 8)
        assert await counted(text="needle") == (1, 0)
        last = (await incidents.search(text="disk", limit=7)).next
        (found,) = (await incidents.search(text="disk", after=last)).incidents
        assert found.incident_id == 1
        assert await counted(text="half", after=last) == (1, 4)


def test_phrases_are_dropped_that_say_nothing_more() -> None:
    """Each phrase is looked for once, without those that another one includes, in any case."""

    def asked(text: str) -> list[str]:
        return [f"{one.words}*" if one.begins else one.words for one in phrases(text)]

    assert asked("disk Disk DISK") == ["disk"]
    assert asked("disk disks d_is") == ["disk", "disks", "d is"]
    assert asked("disk dis") == ["disk"]
    assert asked("dis disk") == ["dis", "disk*"]
    assert asked("1 db-1 db") == ["db 1"]
    assert asked("Диски ДИСК полон") == ["диски", "диск", "полон*"]
    assert asked('"disk is full" is full') == ["disk is full"]
    assert asked('disk "is full"') == ["disk", "is full"]
    assert asked("disk “is full”, now") == ["disk", "is full", "now*"]
    assert asked('disk "is full') == ["disk", "is", "full*"]
    assert asked("disk. ") == ["disk*"]
    assert asked('disk "is"') == ["disk", "is"]
    assert asked("? -") == []


def test_the_longer_way_to_a_page_is_not_taken() -> None:
    """Messages are scanned for a page if that takes less time than the index of words."""

    def rows(found: int, incidents: int) -> list[tuple[object, ...]]:
        return [(*[None] * COUNT, incidents)] * found

    assert messages_to_scan([], 1000) == 0
    assert messages_to_scan(rows(500, 100_000), 1000) == 1502
    assert messages_to_scan(rows(250, 100_000), 500) == 1503
    assert messages_to_scan(rows(50, 100_000), 500) == 0
    assert messages_to_scan(rows(500, 5_000), 1000) == 0
    assert messages_to_scan(rows(500, -1), 1000) == 0

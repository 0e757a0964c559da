"""Hosts with triggers, columns, sequences, an isolation level and pools of their own.

Everything works with them, or ends with an error that says what is in the way.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from sqlalchemy import StaticPool, event, inspect, text

from incidentkit import (
    IncidentClient,
    IncidentSource,
    IncidentStatus,
    InvalidSettings,
    NewIncident,
    StoreError,
    acting_as,
)
from incidentkit.store.migrate import check, upgrade
from incidentkit.store.schema import VERSION_TABLE
from incidentkit.store.sql.tables import metadata
from tests.hosts import host_engine, run_sql

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

    from sqlalchemy import Connection

    from incidentkit import Incident

LATER = timedelta(hours=1)


async def everything(client: IncidentClient) -> list[object]:
    """Run every verb, alone and together with others; return what does not depend on the time."""
    outcomes: list[object] = []

    def note(value: object) -> None:
        outcomes.append(re.sub(r"datetime\([^)]*\)|cursor='[^']*'", "", repr(value)))

    await client.check()
    with acting_as("shop"):
        note(await client.create("Disk is full", source="partner"))
        for _ in range(2):
            note(await client.create("Order 1 is late", source="partner", dedup_key="order-1"))
            note(await client.create("Line is down", source="operator", idempotency_key="key"))
    new = [NewIncident(f"Batch {n}", "monitoring") for n in range(3)]
    keyed = [NewIncident("Keyed", "monitoring", dedup_key=f"key-{n % 2}") for n in range(3)]
    note(await client.create_many([*new, *keyed]))
    many = await asyncio.gather(
        *(client.create(f"Report {n}", source="partner") for n in range(30))
    )
    note([(one.incident_message, one.version) for one in many])
    note(await client.update_status(1, "failed", note="Lost", expected_version=1))
    note(await client.update_status(1, "failed", note="Lost again"))
    note(await client.update_status(1, "new"))
    note(await client.note(1, "Found"))
    ended = await asyncio.gather(
        *(client.update_status(one.incident_id, "completed", note="Done") for one in many)
    )
    note([(one.incident_message, str(one.incident_type)) for one in ended])
    for _ in range(2):
        # The second time, the page comes from the cache.
        note([one.incident_message for one in await client.list(limit=50)][30:])
    open_, partner = IncidentStatus.NEW, IncidentSource.PARTNER
    operator = IncidentSource.OPERATOR
    lists = await asyncio.gather(*(client.list(1, 2, status, source) for status, source in (
        (None, None), (open_, None), (None, partner), (open_, operator))))  # fmt: skip
    note([len(each) for each in lists])
    note(await client.list(page=20, limit=100))
    note(len(await asyncio.gather(*(client.get(one.incident_id) for one in many))))
    for words in (None, "report"):
        page = await client.search(
            text=words, status=["new", "completed"], source=["partner", "operator"], limit=5,
            total=True,
        )  # fmt: skip
        note((page.total, len(page.incidents)))
        assert page.next is not None
        more = await client.search(
            text=words, status=["new", "completed"], source=["partner", "operator"], limit=500,
            after=page.next,
        )  # fmt: skip
        note(len(more.incidents))
    note(await client.history(1))
    async with asyncio.timeout(60):
        while len((changes := await client.read_changes(limit=1000)).changes) < 74:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    kinds = Counter((str(each.kind), each.from_status, each.to_status) for each in changes.changes)
    note(sorted(kinds.items(), key=repr))
    note((await client.read_changes("latest")).changes)
    note(await client.purgeable(datetime.now(UTC) + LATER))
    note(await client.purge(datetime.now(UTC) + LATER))
    note(await client.history(many[0].incident_id))
    note((await client.read_changes(changes.changes[-1].cursor)).changes == [])
    note(await client.feed_blocker())
    return outcomes


@asynccontextmanager
async def recorded(url: str, statements: set[str]) -> AsyncIterator[IncidentClient]:
    """Open a client on an engine, and record its statements."""
    async with host_engine(url) as engine:
        event.listen(
            engine.sync_engine, "before_cursor_execute", lambda *args: statements.add(args[2])
        )
        async with IncidentClient.open(engine) as client:
            yield client


def identifiers(statements: set[str]) -> set[str]:
    """Return every name and keyword of some statements."""
    bare = " ".join(re.sub(r"'[^']*'", "", each) for each in statements)
    return set(re.findall(r"[A-Za-z_][A-Za-z0-9_]*", bare))


def _columns(table: str, connection: Connection) -> set[str]:
    return {each["name"] for each in inspect(connection).get_columns(table)}


async def add_columns(url: str, names: set[str]) -> int:
    """Add a column of each name to each table, except where there is one; return the number."""
    added = 0
    async with host_engine(url) as engine, engine.begin() as connection:
        for table in (*metadata.tables.keys() - {"incident_token"}, VERSION_TABLE):
            columns_of = partial(_columns, table)
            found = await connection.run_sync(columns_of)
            new = sorted(names - found - SYSTEM_COLUMNS)
            if url.startswith("sqlite"):
                new = sorted({name.casefold(): name for name in new}.values())
                new = [name for name in new if name.casefold() not in found]
                for name in new:
                    await connection.execute(text(f'ALTER TABLE "{table}" ADD "{name}" VARCHAR'))
            else:
                columns = ", ".join(f'ADD "{name}" varchar' for name in new)
                await connection.execute(text(f'ALTER TABLE "{table}" {columns}'))
            added += len(new)
    return added


SYSTEM_COLUMNS = {"cmax", "cmin", "ctid", "tableoid", "xmax", "xmin"}
"""The names of columns that PostgreSQL keeps for itself."""


async def test_columns_of_any_name_do_no_harm(
    url: str, request: pytest.FixtureRequest, tmp_path: Any
) -> None:
    """With a column in each table for every name in a statement, every verb works as without."""
    if url.startswith("sqlite"):
        other = f"sqlite+aiosqlite:///{tmp_path / 'other.db'}"
    else:
        other = str(request.getfixturevalue("empty_postgres_url"))
    statements: set[str] = set()
    async with recorded(url, statements) as client:
        expected = await everything(client)
    names = identifiers(statements)
    names |= {"id", "now", "from_status", "actor", "message", "key", "n", "rowid", "rank"}
    await upgrade(other)
    assert await add_columns(other, names) > 500
    async with recorded(other, statements) as client:
        assert await everything(client) == expected
    if not url.startswith("sqlite"):
        async with IncidentClient.open(other) as client:
            assert len(await client.list()) > 0


# Triggers


def trigger(url: str, table: str, event: str, body: str, when: str = "true") -> list[str]:
    """Return the statements that create a trigger.

    Args:
        url: The database.
        table: The table.
        event: Before which event it runs; on SQLite it may also be after.
        body: What it runs: on PostgreSQL the body of its function.
        when: Its condition.
    """
    name = f"host_{table}_{event.rpartition(' ')[2]}".lower()
    if url.startswith("sqlite"):
        return [f'CREATE TRIGGER {name} {event} ON "{table}" WHEN {when} BEGIN {body}; END']
    rows = f'{event} ON "{table}" FOR EACH ROW WHEN ({when})'
    return [
        f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body}; END $$",
        f"CREATE TRIGGER {name} {rows} EXECUTE FUNCTION {name}()",
    ]


async def run_all(url: str, statements: list[str]) -> None:
    """Run statements, one after the other."""
    for statement in statements:
        await run_sql(url, statement)


def keeping_out(url: str, table: str, event: str, when: str = "true") -> list[str]:
    """Return the statements that create a trigger which keeps an event from happening."""
    body = "SELECT RAISE(IGNORE)" if url.startswith("sqlite") else "RETURN NULL"
    return trigger(url, table, f"BEFORE {event}", body, when)


KEPT_OUT = "a trigger of the database suppresses"


async def refuses(call: Awaitable[object]) -> None:
    """Assert that a call ends at once with the error that names the trigger."""
    async with asyncio.timeout(30):
        with pytest.raises(StoreError, match=KEPT_OUT):
            await call


async def test_a_trigger_that_keeps_incidents_out_is_named(
    url: str, incidents: IncidentClient
) -> None:
    """A create whose row a trigger suppresses raises an error; concurrent calls do not."""
    await run_all(url, keeping_out(url, "Incident", "INSERT", "new.incident_message LIKE 'Kept%'"))
    kept = NewIncident("Kept out", "partner")
    keyed = NewIncident("Kept out", "partner", dedup_key="key")
    good = NewIncident("Disk is full", "partner")
    await refuses(incidents.create(kept))
    await refuses(incidents.create(keyed))
    await refuses(incidents.create(kept, idempotency_key="key"))
    await refuses(incidents.create_many([good, kept]))
    await refuses(
        incidents.create_many([good, keyed, NewIncident("Full disk", "partner", dedup_key="a")])
    )
    assert await incidents.list() == []
    calls = [incidents.create(kept if n % 5 == 0 else good) for n in range(20)]
    async with asyncio.timeout(30):
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [isinstance(each, StoreError) for each in outcomes] == [n % 5 == 0 for n in range(20)]
    assert len(await incidents.list(limit=100)) == 16
    # The key is free.
    await incidents.create(good, idempotency_key="key")


@pytest.mark.parametrize(
    ("table", "event"),
    [
        ("Incident", "UPDATE"),
        ("Incident", "DELETE"),
        ("incident_event", "INSERT"),
        ("incident_event", "DELETE"),
        ("incident_purged_event", "INSERT"),
        ("incident_idempotency_key", "INSERT"),
        ("incident_idempotency_key", "UPDATE"),
    ],
)
async def test_a_trigger_that_keeps_a_row_out_is_named(
    url: str, incidents: IncidentClient, table: str, event: str
) -> None:
    """A write of which a trigger suppresses any row raises an error, and changes nothing."""
    first = await incidents.create("Disk is full", source="partner", dedup_key="key")
    second = await incidents.create("Line is down", source="partner", incident_type="failed")
    await run_all(url, keeping_out(url, table, event))
    before = await incidents.history(1), await incidents.history(2), await incidents.list()
    many = [NewIncident(f"Batch {n}", "partner") for n in range(3)]
    if (table, event) == ("incident_event", "INSERT"):
        await refuses(incidents.create("Disk is full", source="partner"))
        await refuses(incidents.create_many(many))
        await refuses(incidents.note(1, "Lost"))
    if (table, event) in (("incident_event", "INSERT"), ("Incident", "UPDATE")):
        await refuses(incidents.update_status(1, "failed"))
        await refuses(incidents.update_status(2, "new"))
        await refuses(incidents.create("Disk is full", source="partner", dedup_key="key"))
        await refuses(incidents.resolve("key"))
        await refuses(incidents.resolve_many(["none", "key"]))
        shared = [incidents.update_status(n, "completed") for n in (1, 2)]
        async with asyncio.timeout(30):
            outcomes = await asyncio.gather(*shared, return_exceptions=True)
        assert all(KEPT_OUT in str(each) for each in outcomes)
    if table == "incident_idempotency_key":
        await refuses(incidents.create(many[0], idempotency_key="key"))
        await refuses(incidents.create_many(many, idempotency_key="key"))
    elif event == "DELETE" or table in ("incident_event", "incident_purged_event"):
        await refuses(incidents.purge(datetime.now(UTC) + LATER))
    assert (
        await incidents.history(1),
        await incidents.history(2),
        await incidents.list(),
    ) == before
    assert await incidents.get(1) == first
    assert await incidents.get(2) == second


STATUS = {
    "sqlite": 'UPDATE "Incident" SET incident_type = {0} WHERE incident_id = new.incident_id',
    "postgresql": "new.incident_type := {0}; RETURN new",
}


def setting_status(url: str, event: str, status: str, when: str) -> list[str]:
    """Return the statements that create a trigger which sets the status of a row."""
    kind = url.partition("+")[0].partition(":")[0]
    moment = "AFTER" if kind == "sqlite" else "BEFORE"
    return trigger(url, "Incident", f"{moment} {event}", STATUS[kind].format(status), when)


async def test_a_trigger_that_changes_the_status_is_recorded(
    url: str, incidents: IncidentClient
) -> None:
    """The incident and its event have the status that a trigger has set."""
    await run_all(url, setting_status(url, "INSERT", "'failed'", "new.source = 'partner'"))
    await run_all(url, setting_status(url, "UPDATE", "'failed'", "new.incident_type = 'completed'"))
    stored = [
        await incidents.create("Disk is full", source="partner"),
        *await incidents.create_many([NewIncident("Disk is full", "partner")] * 2),
        *await asyncio.gather(*(incidents.create("Full disk", source="partner") for _ in range(5))),
    ]
    for one in stored:
        assert str(one.incident_type) == "failed"
        assert await incidents.get(one.incident_id) == one
        (event,) = await incidents.history(one.incident_id)
        assert event.to_status is one.incident_type
    new = [await incidents.create("Line is down", source="operator") for _ in range(6)]
    keyed = [NewIncident("Line is down", "operator", dedup_key=key) for key in "ab"]
    await incidents.create_many(keyed)
    changed: list[Incident | None] = [
        await incidents.update_status(new[0].incident_id, "completed"),
        *await asyncio.gather(
            *(incidents.update_status(one.incident_id, "completed") for one in new[1:])
        ),
        await incidents.resolve("a"),
        *await incidents.resolve_many(["b"]),
    ]
    assert None not in changed
    for one in filter(None, changed):
        assert str(one.incident_type) == "failed"
        assert await incidents.get(one.incident_id) == one
        event = (await incidents.history(one.incident_id))[-1]
        assert (event.from_status, event.to_status) == ("new", "failed")


async def test_a_trigger_that_restores_the_status_is_named(
    url: str, incidents: IncidentClient
) -> None:
    """A change that a trigger undoes raises an error, and leaves no event."""
    new = [
        await incidents.create("Disk is full", source="partner", dedup_key=key)
        for key in ("a", None, None, None)
    ]
    await run_all(
        url, setting_status(url, "UPDATE", "old.incident_type", "new.incident_type = 'failed'")
    )
    await refuses(incidents.update_status(1, "failed"))
    await refuses(incidents.resolve("a", status="failed"))
    await refuses(incidents.resolve_many(["a"], status="failed"))
    async with asyncio.timeout(30):
        outcomes = await asyncio.gather(
            *(incidents.update_status(one.incident_id, "failed") for one in new),
            return_exceptions=True,
        )
    assert all(KEPT_OUT in str(each) for each in outcomes)
    for one in new:
        assert await incidents.get(one.incident_id) == one
        assert len(await incidents.history(one.incident_id)) == 1
    assert str((await incidents.update_status(1, "completed")).incident_type) == "completed"


async def test_an_incident_that_is_open_again_is_not_purged(
    url: str, incidents: IncidentClient
) -> None:
    """An incident that another program has opened again stays, although it has ended before."""
    for _ in range(2):
        await incidents.create("Disk is full", source="partner", incident_type="failed")
    await run_sql(url, "UPDATE \"Incident\" SET incident_type = 'new' WHERE incident_id = 1")
    later = datetime.now(UTC) + LATER
    assert await incidents.purgeable(later) == 1
    assert await incidents.purge(later) == 1
    assert [one.incident_id for one in await incidents.list()] == [1]


async def test_redundant_updates_may_be_left_out(migrated_postgres_url: str) -> None:
    """With `suppress_redundant_updates_trigger`, notes of one transaction are all recorded."""
    url = migrated_postgres_url
    await run_sql(
        url,
        'CREATE TRIGGER z_host BEFORE UPDATE ON "Incident" FOR EACH ROW '
        "EXECUTE FUNCTION suppress_redundant_updates_trigger()",
    )
    async with IncidentClient.open(url) as incidents:
        await incidents.create("Disk is full", source="partner")
        connection = await asyncpg.connect(url)
        async with connection.transaction():
            joined = incidents.join(connection)
            for n in range(3):
                assert (await joined.note(1, f"Note {n}")).note == f"Note {n}"
            await joined.update_status(1, "failed")
            await joined.update_status(1, "failed", note="Lost")
        await connection.close()
        assert len(await incidents.history(1)) == 6


IDS = {
    "descending": [
        'ALTER SEQUENCE "Incident_incident_id_seq" INCREMENT -1 MAXVALUE 9999 RESTART 9999'
    ],
    "cached": ['ALTER SEQUENCE "Incident_incident_id_seq" CACHE 7'],
    "random": [
        'ALTER TABLE "Incident" ALTER incident_id SET DEFAULT floor(random() * 1e12)::bigint + 1'
    ],
    "of a trigger": trigger(
        "postgresql",
        "Incident",
        "BEFORE INSERT",
        "new.incident_id := 1 + abs(hashtextextended(new.incident_message, 0)) % 1000000000000; "
        "RETURN new",
    ),
    "redacted": trigger(
        "postgresql",
        "Incident",
        "BEFORE INSERT",
        "new.incident_message := reverse(new.incident_message); RETURN new",
    ),
}
"""Ways in which a host assigns ids, or changes messages."""


@pytest.mark.parametrize("ids", IDS)
async def test_each_caller_gets_its_own_incident(migrated_postgres_url: str, ids: str) -> None:
    """If a host assigns other ids, calls that share a statement still get their own incidents."""
    url = migrated_postgres_url
    await run_all(url, IDS[ids])

    def stored(message: str) -> str:
        return message[::-1] if ids == "redacted" else message

    async with IncidentClient.open(url) as incidents:

        async def create(message: str) -> Incident:
            with acting_as(message):
                return await incidents.create(message, source="partner")

        messages = [f"Report {n}" for n in range(100)]
        created = await asyncio.gather(*map(create, messages))
        keyed = [NewIncident(f"Keyed {n}", "partner", dedup_key=f"key {n}") for n in range(50)]
        plain = [NewIncident(f"Batch {n}", "partner") for n in range(50)]
        pairs = zip(keyed, plain, strict=True)
        many = await incidents.create_many([each for pair in pairs for each in pair])
        again = await incidents.create_many(keyed)
        assert [one.incident_message for one in created] == list(map(stored, messages))
        assert [one.incident_message for one in many] == [
            stored(f"{kind} {n}") for n in range(50) for kind in ("Keyed", "Batch")
        ]
        assert [one.incident_id for one in again] == [one.incident_id for one in many[::2]]
        for message, one in zip(messages, created, strict=True):
            (event,) = await incidents.history(one.incident_id)
            assert event.actor == message


@pytest.mark.parametrize(
    "change", ["CACHE 10", "INCREMENT -1 MINVALUE -1000 MAXVALUE 1000 START 1000 RESTART 1000"]
)
async def test_a_sequence_that_breaks_histories_is_named(
    migrated_postgres_url: str, change: str
) -> None:
    """If ids of events do not ascend, opening and checking fail until `db upgrade` corrects it."""
    url = migrated_postgres_url
    async with IncidentClient.open(url) as incidents:
        await incidents.create("Disk is full", source="partner")
        # The sequence of another column is the host's own affair.
        await run_sql(url, "ALTER TABLE incident_event ADD host bigserial")
        await run_sql(url, "ALTER SEQUENCE incident_event_host_seq CACHE 10")
        await incidents.check()
        await run_sql(url, f"ALTER SEQUENCE incident_event_event_id_seq {change}")
        with pytest.raises(StoreError, match=r"incident_event_event_id_seq .*db upgrade"):
            await incidents.check()
        with pytest.raises(StoreError, match="incident_event_event_id_seq"):
            await incidents.read_changes()
        with pytest.raises(StoreError, match=r"incident_event_event_id_seq .*db upgrade"):
            await check(url)
    with pytest.raises(StoreError, match="incident_event_event_id_seq"):
        await IncidentClient.open(url).connect()
    await upgrade(url)
    async with IncidentClient.open(url) as incidents, IncidentClient.open(url) as other:
        for n in range(10):
            await (incidents, other)[n % 2].note(1, f"Note {n}")
        notes = [event.note for event in (await incidents.history(1))[1:]]
        assert notes == [f"Note {n}" for n in range(10)]


CONSTRAINTS = {
    "host_key": ['CREATE UNIQUE INDEX host_key ON "Incident" (source)'],
    "host_check": [
        'ALTER TABLE "Incident" ADD CONSTRAINT host_check CHECK (occurrences > 1) NOT VALID',
    ],
    "NOT NULL of host": [
        'ALTER TABLE "Incident" ADD host int NOT NULL DEFAULT 1',
        'ALTER TABLE "Incident" ALTER host DROP DEFAULT',
    ],
}
"""Constraints of a host that refuse a create, by what an error calls them."""


@pytest.mark.parametrize("name", CONSTRAINTS)
@pytest.mark.parametrize("way", ["url", "postgresql+psycopg"])
async def test_a_constraint_of_the_host_is_named(
    migrated_postgres_url: str, name: str, way: str
) -> None:
    """A write that a constraint refuses ends with an error that names the constraint alone."""
    async with opened(way, migrated_postgres_url) as incidents:
        await incidents.create("Line is down", source="partner")
        await run_all(migrated_postgres_url, CONSTRAINTS[name])
        with pytest.raises(StoreError) as caught:
            await incidents.create("Disk full", source="partner")
        assert caught.value.reason == f"the constraint {name} of the database refused the values"


async def test_a_purge_names_what_refers_to_an_incident(migrated_postgres_url: str) -> None:
    """A purge of an incident to which a host's row refers ends with the name of the constraint."""
    url = migrated_postgres_url
    reference = 'CONSTRAINT host_order REFERENCES "Incident"'
    async with IncidentClient.open(url) as incidents:
        await incidents.create("Disk is full", source="partner", incident_type="failed")
        await run_sql(url, f"CREATE TABLE orders (incident_id bigint {reference})")
        await run_sql(url, "INSERT INTO orders VALUES (1)")
        with pytest.raises(StoreError, match="the constraint host_order of the database"):
            await incidents.purge(datetime.now(UTC) + LATER)


async def test_a_constraint_of_the_host_is_named_on_sqlite(sqlite_url: str) -> None:
    """On SQLite, where not every constraint has a name, the error has what SQLite calls it."""
    async with IncidentClient.open(sqlite_url) as incidents:
        await incidents.create("Disk is full", source="partner")
        await run_all(sqlite_url, CONSTRAINTS["host_key"])
        named = "the constraint UNIQUE of Incident.source of the database"
        with pytest.raises(StoreError, match=named):
            await incidents.create("Full disk", source="partner")


async def test_a_lost_unique_index_is_named(url: str, incidents: IncidentClient) -> None:
    """A create that needs an index which was dropped says what to do; without it, no other does."""
    keyed = NewIncident("Disk is full", "partner", dedup_key="key")
    await incidents.create(keyed)
    await run_sql(url, 'DROP INDEX "ux_Incident_dedup_key"')
    with pytest.raises(StoreError, match=r"a unique index is missing .*`incidentkit db upgrade`"):
        await incidents.create(keyed)
    await incidents.create("Line is down", source="partner")
    await upgrade(url)
    assert (await incidents.create(keyed)).occurrences == 2


async def test_a_rule_is_named(migrated_postgres_url: str) -> None:
    """A write that a rule of the host rewrites raises an error that says so."""
    url = migrated_postgres_url
    await run_sql(url, 'CREATE RULE host AS ON INSERT TO "Incident" DO INSTEAD NOTHING')
    async with IncidentClient.open(url) as incidents:
        with pytest.raises(StoreError, match="a rule of the database"):
            await incidents.create("Disk is full", source="partner")


async def test_keys_that_a_trigger_makes_the_same_are_named(migrated_postgres_url: str) -> None:
    """A trigger may change deduplication keys, but not so that two of one call are the same."""
    url = migrated_postgres_url
    lower = "new.dedup_key := lower(new.dedup_key); RETURN new"
    await run_all(url, trigger(url, "Incident", "BEFORE INSERT", lower))
    async with IncidentClient.open(url) as incidents:
        one, two = [NewIncident("Full disk", "partner", dedup_key=key) for key in ("A", "B")]
        created = await incidents.create_many([one, two, one])
        assert [each.dedup_key for each in created] == ["a", "b", "a"]
        assert created[2].occurrences == 2
        with pytest.raises(StoreError, match="the same dedup_key"):
            await incidents.create_many([one, NewIncident("Full disk", "partner", dedup_key="a")])


# Isolation


async def by_role(url: str) -> None:
    """Make `REPEATABLE READ` the default of a database, as its administrator would."""
    await run_sql(
        url,
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_isolation = %L', "
        "current_database(), 'repeatable read'); END $$",
    )


@asynccontextmanager
async def opened(way: str, url: str) -> AsyncIterator[IncidentClient]:
    """Open a client by URL, on a pool, or on an engine with either driver, maybe with a level."""
    way, _, level = way.partition(" at ")
    async with AsyncExitStack() as stack:
        database: Any = url
        if way == "pool":
            database = await stack.enter_async_context(asyncpg.create_pool(url, min_size=1))
        elif way != "url":
            host = url.replace("postgresql", way, 1)
            options = {"execution_options": {"isolation_level": level}} if level else {}
            database = await stack.enter_async_context(host_engine(host, **options))
        yield await stack.enter_async_context(IncidentClient.open(database))


async def check_reload(incidents: IncidentClient, url: str) -> None:
    """Assert that calls which wait for a table to be reloaded read what was loaded."""
    async with IncidentClient.open(url) as other:
        first = await incidents.create("Disk is full", source="partner")
        assert await incidents.list() == [first]
        connection = await asyncpg.connect(url)
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute('CREATE TEMP TABLE saved AS TABLE "Incident"')
        await connection.execute('TRUNCATE "Incident"')
        await connection.execute('INSERT INTO "Incident" TABLE saved')
        lists = [asyncio.ensure_future(incidents.list(limit=limit)) for limit in (10, 20, 30)]
        deep = asyncio.ensure_future(incidents.list(page=101, limit=10))
        search = asyncio.ensure_future(incidents.search(text="disk"))
        get = asyncio.ensure_future(incidents.get(first.incident_id))
        waiting = (
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        async with asyncio.timeout(30):
            while (await run_sql(url, waiting))[0][0] < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await transaction.commit()
        await connection.close()
        for page in lists:
            assert await page == [first]
        assert await deep == []
        assert (await search).incidents == [first]
        assert await get == first
        for client in (incidents, other):
            assert await client.list() == [first]


WAYS = (
    "url",
    "pool",
    "postgresql+asyncpg",
    "postgresql+psycopg",
    "postgresql+asyncpg at REPEATABLE READ",
    "postgresql+psycopg at SERIALIZABLE",
)


@pytest.mark.parametrize("way", WAYS)
async def test_a_list_that_waits_shows_the_new_rows(migrated_postgres_url: str, way: str) -> None:
    """With `REPEATABLE READ` by default, a list that waits for a reload shows what was loaded."""
    url = migrated_postgres_url
    if " at " not in way:
        await by_role(url)
    async with opened(way, url) as incidents:
        await check_reload(incidents, url)


@pytest.mark.parametrize("way", WAYS)
async def test_own_statements_are_read_committed(migrated_postgres_url: str, way: str) -> None:
    """With `SERIALIZABLE` by default, changes of one incident wait for each other."""
    url = migrated_postgres_url
    if " at " not in way:
        await by_role(url)
    async with opened(way, url) as incidents:
        await incidents.create("Disk is full", source="partner", dedup_key="key")
        async with asyncio.timeout(30):
            await asyncio.gather(
                *(incidents.note(1, f"Note {n}") for n in range(20)),
                *(
                    incidents.create("Disk is full", source="partner", dedup_key="key")
                    for _ in range(20)
                ),
            )
        assert (await incidents.get(1)).occurrences == 21
        assert len(await incidents.history(1)) == 41


async def test_a_joined_transaction_has_the_isolation_of_the_host(
    migrated_postgres_url: str,
) -> None:
    """A joined transaction stays under the default that the host has chosen."""
    url = migrated_postgres_url
    await by_role(url)
    async with IncidentClient.open(url) as incidents:
        connection = await asyncpg.connect(url)
        async with connection.transaction():
            assert await incidents.join(connection).list() == []
            await incidents.create("Disk is full", source="partner")
            assert await incidents.join(connection).list() == []
        await connection.close()


# Pools


async def test_an_engine_with_one_shared_connection_is_refused(
    url: str, incidents: IncidentClient
) -> None:
    """An engine whose callers all share a connection is refused, and the host's writes stay."""
    await incidents.create("Disk is full", source="partner")
    async with host_engine(url, poolclass=StaticPool) as engine, engine.connect() as connection:
        await connection.execute(text("DELETE FROM incident_event"))
        with pytest.raises(InvalidSettings, match="StaticPool"):
            async with IncidentClient.open(engine) as client:
                await client.list()
        await connection.commit()
    assert await incidents.history(1) == []

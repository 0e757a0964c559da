"""How PostgreSQL ends the open incident of a key: statements, locks and plans."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from incidentkit import IncidentClient, NewIncident
from incidentkit.store.postgresql import dialect as postgresql
from incidentkit.store.postgresql import statements as sql
from incidentkit.store.postgresql.driver import compile_statement
from tests.hosts import run_sql
from tests.test_isolation import backends, until
from tests.test_sharing import counted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def host(migrated_postgres_url: str) -> AsyncIterator[Any]:
    """A connection of another program."""
    connection = await asyncpg.connect(migrated_postgres_url)
    yield connection
    await connection.close()


async def _one_waits(url: str) -> bool:
    return await backends(url, "wait_event_type = 'Lock'") == 1


async def test_each_answer_takes_one_statement(
    migrated_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One round trip ends an incident or finds none open; one statement ends 2000."""
    url = migrated_postgres_url
    async with counted(url, monkeypatch) as (client, sent):
        assert await client.resolve("0") is None
        await client.create("Disk is full", source="monitoring", dedup_key="0")
        sent.clear()
        assert await client.resolve("0") is not None
        assert await client.resolve("0", note="Once more") is None
        assert len(sent) == 2

    resolve, parts = postgresql.PostgresDialect.resolve_many, []

    async def counting(self: Any, fetch: Any, **arguments: Any) -> Any:
        async def counted(statement: Any, values: Any) -> Any:
            parts.append(len(values["dedup_keys"]))
            return await fetch(statement, values)

        return await resolve(self, counted, **arguments)

    monkeypatch.setattr(postgresql.PostgresDialect, "resolve_many", counting)
    keys = [f"{n}" for n in range(4001)]
    async with IncidentClient.open(url) as client:
        await client.create_many(
            [NewIncident("Disk is full", "monitoring", dedup_key=key) for key in keys]
        )
        ended = await client.resolve_many([*keys[::-1], "none", *keys])
        assert parts == [2000, 2000, 2]
        assert [each and each.dedup_key for each in ended] == [*keys[::-1], *[None] * 4002]


@pytest.mark.parametrize("many", [False, True])
async def test_an_incident_that_ends_meanwhile_is_none(
    migrated_postgres_url: str, host: Any, *, many: bool
) -> None:
    """A call that waited for the end by another transaction leaves the incident opened after it."""
    url = migrated_postgres_url
    async with IncidentClient.open(url) as client:
        await client.create("Disk is full", source="monitoring", dedup_key="disk")
        async with host.transaction():
            joined = client.join(host)
            await joined.update_status(1, "failed")
            opened = await joined.create("It is full", source="monitoring", dedup_key="disk")
            call: Any = client.resolve_many(["disk"]) if many else client.resolve("disk")
            waiting = asyncio.ensure_future(call)
            await until(lambda: _one_waits(url))
        assert await waiting in (None, [None])
        assert await client.get(opened.incident_id) == opened
        ended = await client.resolve("disk")
        assert ended is not None
        assert ended.incident_id == opened.incident_id


async def test_an_occurrence_that_is_counted_meanwhile_stays(
    migrated_postgres_url: str, host: Any
) -> None:
    """A call that waited for a count, or for an end that was rolled back, ends the incident."""
    url = migrated_postgres_url
    async with IncidentClient.open(url) as client:
        for version, outcome in ((3, "commit"), (2, "rollback")):
            await client.create("Disk is full", source="monitoring", dedup_key="disk")
            transaction = host.transaction()
            await transaction.start()
            joined = client.join(host)
            if outcome == "commit":
                await joined.create("It is full", source="monitoring", dedup_key="disk")
            else:
                await joined.resolve("disk")
            waiting = asyncio.ensure_future(client.resolve("disk"))
            await until(lambda: _one_waits(url))
            await getattr(transaction, outcome)()
            ended = await waiting
            assert ended is not None
            assert (ended.version, ended.occurrences) == (version, version - 1)
            assert ended == await client.get(ended.incident_id)


async def test_keys_in_opposite_orders_never_deadlock(migrated_postgres_url: str) -> None:
    """Calls with many keys take their locks in one order, also against creates of these keys."""
    keys = [f"key {n}" for n in range(60)]
    new = [NewIncident("Disk is full", "monitoring", dedup_key=key) for key in keys]
    async with (
        IncidentClient.open(migrated_postgres_url) as one,
        IncidentClient.open(migrated_postgres_url) as two,
    ):
        ended = await asyncio.gather(
            *(
                call
                for _ in range(6)
                for call in (
                    one.create_many(new),
                    one.resolve_many(keys),
                    two.create_many(new[::-1]),
                    two.resolve_many(keys[::-1]),
                )
            )
        )
        assert len(ended) == 24
        found = (await one.search(limit=1000)).incidents
        assert sum(incident.occurrences for incident in found) == 12 * len(keys)


async def test_the_index_of_open_keys_is_used(migrated_postgres_url: str, host: Any) -> None:
    """Among many incidents, a generic plan finds those to end by the index, without a scan."""
    await run_sql(
        migrated_postgres_url,
        'INSERT INTO "Incident" (incident_message, incident_type, source, dedup_key) '
        "SELECT 'Disk is full', CASE n % 2 WHEN 0 THEN 'new' ELSE 'failed' END::incidentstatus, "
        "'partner', 'key ' || n FROM generate_series(1, 20000) AS n",
    )
    await host.execute('ANALYZE "Incident"; SET plan_cache_mode = force_generic_plan')
    await host.execute(f"PREPARE ending AS {compile_statement(sql.RESOLVE_MANY).text}")
    ((plan,),) = await host.fetch(
        "EXPLAIN (FORMAT JSON) EXECUTE ending(ARRAY['key 1', 'key 2'], 'failed', NULL, NULL)"
    )
    nodes = json.dumps(json.loads(plan))
    assert "ux_Incident_dedup_key" in nodes
    assert '"Seq Scan"' not in nodes

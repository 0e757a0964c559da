"""PostgreSQL databases with other encodings than UTF8."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from incidentkit import (
    Incident,
    IncidentClient,
    InvalidIncident,
    NewIncident,
    StoreError,
    acting_as,
)
from incidentkit.store import migrate
from tests.hosts import run_sql
from tests.sync_hosts import open_sync_host

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

LACKING = {"LATIN1": "€", "WIN1252": "ж", "EUC_JP": "😀"}
"""Encodings, each with a character that it does not have."""


@asynccontextmanager
async def database(server_url: str, encoding: str) -> AsyncIterator[str]:
    """Create a database with an encoding, yield its URL, and drop it."""
    name = f"incidentkit_test_{uuid4().hex}"
    admin = await asyncpg.connect(server_url)
    await admin.execute(
        f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0 "
        "LC_COLLATE 'C' LC_CTYPE 'C' LOCALE_PROVIDER libc"
    )
    try:
        yield urlsplit(server_url)._replace(path=f"/{name}").geturl()
    finally:
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await admin.close()


@asynccontextmanager
async def clients(url: str) -> AsyncIterator[dict[str, IncidentClient]]:
    """Open a client in each way: by the URL, on a pool, and on an engine of each driver."""
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(asyncpg.create_pool(url, min_size=0))
        engines: dict[str, Any] = {
            driver: create_async_engine(url.replace("postgresql:", f"postgresql+{driver}:"))
            for driver in ("asyncpg", "psycopg")
        }
        for engine in engines.values():
            stack.push_async_callback(engine.dispose)
        opened = {}
        for name, given in {"url": url, "pool": pool, **engines}.items():
            opened[name] = await stack.enter_async_context(IncidentClient.open(given))
        yield opened


def calls(
    incidents: Any, character: str
) -> list[tuple[tuple[str, ...], Callable[[], Coroutine[Any, Any, object]]]]:
    """Return calls with a character in one of their texts, each with the names of these."""
    given = f"text {character}"
    create = partial(incidents.create, source="operator")
    plain = NewIncident("Disk is full", source="operator")
    odd = NewIncident(f"Disk {character} is full", source="operator")
    keyed = NewIncident("Disk is full", source="operator", dedup_key=given)

    async def note_as(actor: str) -> object:
        with acting_as(actor):
            return await incidents.note(1, "It came back")

    return [
        (("incident_message",), partial(create, f"Disk {character} is full")),
        (("dedup_key",), partial(create, "Disk is full", dedup_key=given)),
        (("idempotency_key",), partial(create, "Disk is full", idempotency_key=given)),
        (
            ("incidents[1].incident_message", "incidents[2].dedup_key"),
            partial(incidents.create_many, [plain, odd, keyed]),
        ),
        (("note",), partial(incidents.note, 1, given)),
        (("dedup_key",), partial(incidents.resolve, given)),
        (("dedup_keys[1]", "note"), partial(incidents.resolve_many, ["disk", given], note=given)),
        (("note",), partial(incidents.update_status, 1, "failed", note=given)),
        (("actor",), partial(note_as, given)),
        (("text",), partial(incidents.search, text=f"text{character}")),
    ]


@pytest.mark.parametrize(("encoding", "character"), LACKING.items())
async def test_a_character_that_cannot_be_stored_is_a_fault_of_its_field(
    postgres_server_url: str,
    encoding: str,
    character: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A text that the encoding cannot hold is a value error that names the field and character."""
    async with database(postgres_server_url, encoding) as url:
        await migrate.upgrade(url)
        assert f"The encoding of the database is {encoding}: " in caplog.text
        async with clients(url) as opened:
            for way, incidents in opened.items():
                created = await incidents.create("Schlüssel müde", source="operator")
                for fields, call in calls(incidents, character):
                    with pytest.raises(InvalidIncident) as caught:
                        await call()
                    assert tuple(fault.field for fault in caught.value.errors) == fields, way
                    assert f"must not contain {character!r}" in caught.value.errors[0].reason
                assert await incidents.list(limit=1) == [created]
                assert (await incidents.search(text="müde")).incidents[0] == created


async def test_a_character_that_cannot_be_stored_does_not_affect_other_calls(
    postgres_server_url: str,
) -> None:
    """Of calls that share a statement, only those with the character fail."""
    async with database(postgres_server_url, "LATIN1") as url:
        await migrate.upgrade(url)
        async with clients(url) as opened:
            for incidents in opened.values():
                messages = [f"Disk {'€' if n % 3 == 0 else 'ü'} {n}" for n in range(30)]
                outcomes = await asyncio.gather(
                    *(incidents.create(message, source="operator") for message in messages),
                    return_exceptions=True,
                )
                expected = [InvalidIncident if "€" in message else Incident for message in messages]
                assert [type(outcome) for outcome in outcomes] == expected


@pytest.mark.parametrize(
    "driver", ["asyncpg", "psycopg", "pool", "sync-psycopg", "sync-django-postgresql"]
)
async def test_a_hosts_transaction_survives_a_character_that_cannot_be_stored(
    postgres_server_url: str, driver: str
) -> None:
    """After such a value error the host goes on and commits, as after any other one."""
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(database(postgres_server_url, "LATIN1"))
        await migrate.upgrade(url)
        client = await stack.enter_async_context(IncidentClient.open(url))
        transaction: Any
        if driver.startswith("sync"):
            transaction = await stack.enter_async_context(open_sync_host(driver, url))
            await transaction.begin()
            incidents = await transaction.join()
        elif driver == "pool":
            connection = await asyncpg.connect(url)
            stack.push_async_callback(connection.close)
            transaction = connection.transaction()
            await transaction.start()
            incidents = client.join(connection)
        else:
            engine = create_async_engine(url.replace("postgresql:", f"postgresql+{driver}:"))
            stack.push_async_callback(engine.dispose)
            transaction = await stack.enter_async_context(engine.connect())
            incidents = client.join(transaction)
        await incidents.create("Disk is full", source="operator")
        for fields, call in calls(incidents, "€"):
            with pytest.raises(InvalidIncident) as caught:
                await call()
            assert tuple(fault.field for fault in caught.value.errors) == fields
        await incidents.create("Schlüssel müde", source="operator")
        await transaction.commit()
        assert len(await client.list()) == 2


async def test_a_hosts_pool_may_have_another_encoding(migrated_postgres_url: str) -> None:
    """A character that a connection cannot send is a value error too, and ends no connection."""
    settings = {"client_encoding": "LATIN1"}
    async with (
        asyncpg.create_pool(
            migrated_postgres_url, min_size=0, max_size=1, server_settings=settings
        ) as pool,
        IncidentClient.open(pool) as incidents,
    ):
        await incidents.create("Schlüssel müde", source="operator")
        before = await pool.fetchval("SELECT pg_backend_pid()")
        for fields, call in calls(incidents, "€"):
            with pytest.raises(InvalidIncident) as caught:
                await call()
            assert tuple(fault.field for fault in caught.value.errors) == fields
        assert await pool.fetchval("SELECT pg_backend_pid()") == before


async def test_a_database_without_an_encoding_holds_every_text(
    postgres_server_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """SQL_ASCII takes all texts; one that another program stored in another encoding is told."""
    async with database(postgres_server_url, "SQL_ASCII") as url:
        await migrate.upgrade(url)
        assert "The encoding of the database is SQL_ASCII" in caplog.text
        async with IncidentClient.open(url) as incidents:
            for fields, call in calls(incidents, "€"):
                assert await call() is not None, fields
            found = await incidents.search(text="text €")
            assert [incident.dedup_key for incident in found.incidents] == []
            incident = await incidents.create("Schlüssel müde", source="operator")
            assert (await incidents.search(text="müde")).incidents == [incident]
            await run_sql(url, """UPDATE "Incident" SET incident_message = E'Schl\\374ssel müde'""")
            with pytest.raises(StoreError, match="a stored text is not valid UTF-8") as caught:
                await incidents.get(incident.incident_id)
            assert not caught.value.retryable
            await run_sql(url, """UPDATE "Incident" SET incident_message = 'Schlüssel'""")
            engine = create_async_engine(
                url.replace("postgresql:", "postgresql+psycopg:") + "?client_encoding=utf8"
            )
            async with IncidentClient.open(engine) as on_psycopg:
                incident = await on_psycopg.get(incident.incident_id)
                assert incident.incident_message == "Schlüssel"
            await engine.dispose()
            assert (await incidents.get(incident.incident_id)).incident_message == "Schlüssel"


async def test_utf8_is_not_warned_of(
    empty_postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An upgrade of a database with the encoding UTF8 logs nothing."""
    await migrate.upgrade(empty_postgres_url)
    assert "encoding" not in caplog.text

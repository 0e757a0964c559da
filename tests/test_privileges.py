"""The privileges that the deployment guide lists suffice, and an error names what is missing."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import psycopg
import pytest
from attrs import asdict

from incidentkit import IncidentClient, StoreError
from incidentkit.store import RequestRecord, migrate
from incidentkit.store.postgresql.errors import translate_error
from incidentkit.store.request_log import INSERT_REQUEST
from tests.distributions import ROOT
from tests.hosts import host_engine

GUIDE = ROOT / "docs" / "how-to" / "deploy.md"


def granted(role: str, schema: str) -> list[str]:
    """Return the statements of the deployment guide, for a role and a schema."""
    blocks: list[str] = re.findall(r"```sql\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)
    (block,) = (each for each in blocks if each.startswith("GRANT"))
    statements = re.sub("--.*", "", block).replace("TO service", f"TO {role}").split(";")
    return [
        each.replace("SCHEMA public", f"SCHEMA {schema}") for each in statements if each.strip()
    ]


@pytest.fixture(params=["public", "shop"])
def schema(request: pytest.FixtureRequest) -> str:
    """The schema of the tables."""
    return str(request.param)


@pytest.fixture
async def service_url(empty_postgres_url: str, schema: str) -> Any:
    """The URL of a role with the documented privileges, where `PUBLIC` has none."""
    connection = await asyncpg.connect(empty_postgres_url)
    role = f"service_{connection.get_server_pid()}"
    try:
        for statement in (
            f"CREATE ROLE {role} LOGIN",
            "ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC",
            "REVOKE ALL ON SCHEMA public FROM PUBLIC",
        ):
            await connection.execute(statement)
        await migrate.upgrade(empty_postgres_url, schema=schema)
        await connection.execute(f"SET search_path = {schema}")
        for statement in granted(role, schema):
            await connection.execute(statement)
        yield empty_postgres_url.replace("postgres@", f"{role}@")
    finally:
        await connection.execute(f"DROP OWNED BY {role}")
        await connection.execute(f"DROP ROLE {role}")
        await connection.close()


async def test_the_documented_privileges_suffice(service_url: str, schema: str) -> None:
    """Every verb, the request log and `db check` work where `PUBLIC` may run no function."""
    await migrate.check(service_url, schema=schema)
    async with IncidentClient.open(service_url, schema=schema) as incidents:
        created = await incidents.create(
            "Disk is full", source="partner", dedup_key="disk", idempotency_key="key"
        )
        assert await incidents.list() == [created]
        assert (await incidents.search(text="disk", total=True)).total == 1
        await incidents.note(created.incident_id, "Looking")
        await incidents.update_status(created.incident_id, "completed")
        assert len(await incidents.history(created.incident_id)) == 3
        await incidents.read_changes()
        assert await incidents.feed_blocker() is None
        store: Any = incidents.store
        record = RequestRecord(datetime.now(UTC), "GET", "/", 200, 1.0, "id")
        await store.append(INSERT_REQUEST, [asdict(record)])
        assert await incidents.purge(datetime.now(UTC) + timedelta(hours=1)) == 1
        token = (await incidents.tokens.create("ci", "read")).token
        await incidents.tokens.mark_used(token, datetime.now(UTC))
        await incidents.tokens.revoke("ci")


MISSING = {
    "TABLE incident_event": ("SELECT", "the table incident_event"),
    'TABLE "Incident"': ("INSERT", "the table Incident"),
    "TABLE incident_token": ("SELECT", "the table incident_token"),
    "FUNCTION incident_words_1(text)": ("EXECUTE", "the function incident_words_1"),
    'SEQUENCE "Incident_incident_id_seq"': ("USAGE", "the sequence Incident_incident_id_seq"),
    "SCHEMA shop": ("USAGE", "the schema shop"),
}
"""What an account may lack, and how an error names it."""


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg", "pool"])
@pytest.mark.parametrize("schema", ["shop"], indirect=True)
@pytest.mark.usefixtures("schema")
async def test_an_error_names_what_the_account_lacks(
    driver: str, service_url: str, empty_postgres_url: str
) -> None:
    """The error names the object alone: no message, no statement and no value."""
    role = re.search(r"//(\w+)@", service_url)
    assert role is not None
    with psycopg.connect(empty_postgres_url, autocommit=True) as owner:
        for on, (privilege, named) in MISSING.items():
            owner.execute("SET search_path = shop")
            take: Any = f"REVOKE {privilege} ON {on} FROM {role[1]}"
            owner.execute(take)
            with pytest.raises(StoreError) as caught:
                await _use(driver, service_url)
            reason = f"lacks a privilege on {named}; grant those that the deployment guide lists"
            assert caught.value.reason == f"the account {reason}"
            assert caught.value.sqlstate == "42501"
            give: Any = f"GRANT {privilege} ON {on} TO {role[1]}"
            owner.execute(give)
    await _use(driver, service_url)


async def _use(driver: str, url: str) -> None:
    async def use(database: Any) -> None:
        async with IncidentClient.open(database, schema="shop") as incidents:
            await incidents.create("s3cret is full", source="partner")
            await incidents.search(text="full", total=True)
            await incidents.list()
            await incidents.history(1)

    if driver == "pool":
        async with asyncpg.create_pool(url, min_size=1) as pool:
            await use(pool)
    else:
        named = url.replace("postgresql:", f"postgresql+{driver}:")
        async with host_engine(named) as engine:
            await use(engine)


MESSAGES = {
    "permission denied for table Incident": " on the table Incident",
    'permission denied for table "Incident"': " on the table Incident",
    "permission denied for materialized view x y": " on the materialized view x y",
    "permission denied for table a\nDETAIL: s3cret": " on the table a",
    "keine Berechtigung für Tabelle incident_event": " on incident_event",
    "доступ запрещён": "",
    "": "",
}
"""Messages of servers, and what the error says of each."""


@pytest.mark.parametrize(("message", "named"), MESSAGES.items())
def test_nothing_else_of_a_message_is_shown(message: str, named: str) -> None:
    """Of the server's message, which may be in any language, only the object is shown."""
    error = asyncpg.InsufficientPrivilegeError(message)
    assert translate_error(error).reason == (
        f"the account lacks a privilege{named}; grant those that the deployment guide lists"
    )

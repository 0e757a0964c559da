"""A database that serves one test after another shows each a new one."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import psycopg
import pytest

from incidentkit import IncidentClient
from tests.reuse import ReusedDatabases

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from typing import LiteralString

    from tests.conftest import Administrator
    from tests.reuse import ReusedDatabase

DUMP = """
SELECT
    (SELECT array_agg(incident_id) FROM "Incident"),
    (SELECT array_agg(event_id) FROM incident_event),
    (SELECT array_agg(idempotency_key) FROM incident_idempotency_key),
    (SELECT count(*) FROM incident_token)
"""


@pytest.fixture
def one_after_another(
    _administrator: Administrator, _migrated_template: str
) -> Iterator[Callable[[], AbstractContextManager[ReusedDatabase]]]:
    """Returns the database of the next test."""
    with ReusedDatabases(_administrator, max_tests=3) as databases:
        yield partial(databases.database, _migrated_template, schema="public")


async def test_the_next_test_finds_nothing_of_the_one_before(
    one_after_another: Callable[[], AbstractContextManager[ReusedDatabase]],
) -> None:
    """Rows and open connections are gone, ids count from one, and every token is another one."""
    urls, tokens = [], []
    for _ in range(2):
        with one_after_another() as database:
            open_still = psycopg.connect(database.url)
            assert open_still.execute(DUMP).fetchone() == (None, None, None, 16)
            tokens.append(
                {token for (token,) in open_still.execute("SELECT token FROM incident_token")}
            )
            async with IncidentClient.open(database.url) as incidents:
                incident = await incidents.create("Disk is full", source="partner")
                assert incident.incident_id == 1
                open_still.execute('LOCK TABLE "Incident"')
            urls.append(database.url)
        with pytest.raises(psycopg.OperationalError, match="terminat"):
            open_still.execute("SELECT 1")
        open_still.close()
    assert urls[0] == urls[1]
    assert not tokens[0] & tokens[1]


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE orders (order_id integer)",
        "CREATE FUNCTION one() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
        'ALTER TABLE "Incident" DISABLE TRIGGER ALL',
        'ALTER TABLE "Incident" ADD CONSTRAINT refuse CHECK (version < 9)',
        'DROP INDEX "ix_Incident_incident_message"',
        "UPDATE incidentkit_version SET version_num = 'newer'",
        "ALTER TABLE incident_event RENAME COLUMN note TO remark",
    ],
)
def test_a_test_that_changes_the_schema_is_the_last(
    one_after_another: Callable[[], AbstractContextManager[ReusedDatabase]],
    statement: LiteralString,
) -> None:
    """A database is not used again after anything but rows has changed."""
    urls = set()
    for _ in range(2):
        with one_after_another() as database:
            urls.add(database.url)
            with psycopg.connect(database.url) as connection:
                connection.execute(statement)
    assert len(urls) == 2

"""The decisions about a host's connection behind a pooler; `tests/pooler` has real poolers.

A pooler answers a new connection with a process id of its own: here a connection gives a wrong one.
"""

from __future__ import annotations

import itertools
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import asyncpg
import psycopg
import pytest
from click.testing import CliRunner
from sqlalchemy.ext.asyncio import create_async_engine

from incidentkit import IncidentClient, InvalidSettings
from incidentkit.cli import main
from incidentkit.settings import Settings
from incidentkit.store import StoreOptions, migrate
from tests.hosts import host_engine, naming_nothing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

if TYPE_CHECKING:
    AsyncpgConnection = asyncpg.Connection[asyncpg.Record]
else:
    AsyncpgConnection = asyncpg.Connection

BEHIND = "is behind a connection pooler"


class Pooled(AsyncpgConnection):
    """A connection that seems to be behind a pooler."""

    __slots__ = ()

    def get_server_pid(self) -> int:
        """Return the number that the pooler has made up."""
        return super().get_server_pid() + 1


class Renamed(Pooled):
    """A connection behind a pooler that gives prepared statements names of its own."""

    __slots__ = ()

    async def prepare(self, query: str, *, name: Any = None, **options: Any) -> Any:
        """Prepare a statement under another name, as PgBouncer does since 1.21."""
        name = f"PGBOUNCER_{uuid4().hex}" if name else name
        return await super().prepare(query, name=name, **options)


class PooledPsycopg(psycopg.AsyncConnection[Any]):
    """A connection of psycopg that seems to be behind a pooler."""

    @property
    def info(self) -> Any:
        """Return what the pooler has told."""
        return _Info(super().info)


class _Info:
    def __init__(self, info: psycopg.ConnectionInfo) -> None:
        self._info = info

    @property
    def backend_pid(self) -> int:
        return self._info.backend_pid + 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._info, name)


@asynccontextmanager
async def pool(url: str, connection_class: Any = Pooled, **options: Any) -> AsyncIterator[Any]:
    """Open a host's pool."""
    async with asyncpg.create_pool(
        url, min_size=1, connection_class=connection_class, **options
    ) as opened:
        yield opened


@asynccontextmanager
async def asyncpg_engine(
    url: str, connection_class: Any = Pooled, **options: Any
) -> AsyncIterator[Any]:
    """Open a host's engine with asyncpg."""
    options["connection_class"] = connection_class
    async with host_engine(url, connect_args=options) as opened:
        yield opened


@asynccontextmanager
async def psycopg_engine(url: str, **options: Any) -> AsyncIterator[Any]:
    """Open a host's engine with psycopg."""

    async def connect() -> Any:
        return await PooledPsycopg.connect(url, **options)

    opened = create_async_engine("postgresql+psycopg://", async_creator=connect)
    try:
        yield opened
    finally:
        await opened.dispose()


_counted = map("statement_{}".format, itertools.count()).__next__

UNNAMED = naming_nothing("postgresql+asyncpg://")

OPENINGS = {
    "pool": (pool, {}, naming_nothing("postgresql://")),
    "asyncpg": (asyncpg_engine, {}, UNNAMED),
    "psycopg": (psycopg_engine, {}, naming_nothing("postgresql+psycopg://")),
    "unique": (
        asyncpg_engine,
        {"statement_cache_size": 0, "prepared_statement_name_func": _counted},
        {
            "statement_cache_size": 0,
            "prepared_statement_cache_size": 0,
            "prepared_statement_name_func": lambda: f"host_{uuid4()}",
        },
    ),
}
"""How a host opens each kind of database, with options that are unsafe and safe behind a pooler."""

each_opening = pytest.mark.parametrize("kind", OPENINGS)


@each_opening
async def test_a_database_that_is_unsafe_behind_a_pooler_is_refused(
    kind: str, migrated_postgres_url: str
) -> None:
    """The error names the database, and the remedy."""
    open_database, unsafe, _ = OPENINGS[kind]
    async with open_database(migrated_postgres_url, **unsafe) as database:
        with pytest.raises(InvalidSettings, match=BEHIND) as refused:
            await IncidentClient.open(database).connect()
    assert refused.value.name == "database"
    assert re.search("statement_cache_size|prepare_threshold", refused.value.reason)


@each_opening
async def test_a_database_that_is_safe_behind_a_pooler_works(
    kind: str, migrated_postgres_url: str
) -> None:
    """A pool or an engine that names nothing, or names uniquely, is used as any other."""
    open_database, _, safe = OPENINGS[kind]
    async with (
        open_database(migrated_postgres_url, **safe) as database,
        IncidentClient.open(database) as client,
    ):
        created = await client.create("The disk is full", source="operator")
        assert await client.get(created.incident_id) == created


@each_opening
async def test_a_host_can_vouch_for_its_pooler(kind: str, migrated_postgres_url: str) -> None:
    """With `prepared_statements=True`, a pool or an engine is used without a question."""
    open_database, unsafe, _ = OPENINGS[kind]
    unsafe = {} if kind == "unique" else unsafe
    options = StoreOptions(prepared_statements=True)
    async with (
        open_database(migrated_postgres_url, **unsafe) as database,
        IncidentClient.open(database, options=options) as client,
    ):
        assert await client.list() == []


@pytest.mark.parametrize("open_database", [pool, asyncpg_engine])
async def test_a_pooler_that_names_statements_itself_is_safe(
    open_database: Any, migrated_postgres_url: str
) -> None:
    """A host may number its statements if the pooler gives them other names."""
    async with (
        open_database(migrated_postgres_url, Renamed) as database,
        IncidentClient.open(database) as client,
    ):
        assert await client.list() == []


@each_opening
async def test_a_connection_that_is_unsafe_behind_a_pooler_is_not_joined(
    kind: str, migrated_postgres_url: str
) -> None:
    """Every call is refused, and the transaction of the host can go on."""
    open_database, unsafe, _ = OPENINGS[kind]
    async with (
        open_database(migrated_postgres_url, **unsafe) as database,
        IncidentClient.open(migrated_postgres_url) as client,
    ):
        if kind == "pool":
            async with database.acquire() as connection, connection.transaction():
                joined = client.join(connection)
                for _ in range(2):
                    with pytest.raises(InvalidSettings, match=f"connection {BEHIND}"):
                        await joined.list()
                assert await connection.fetchval("SELECT 1") == 1
        else:
            async with database.connect() as connection:
                joined = client.join(connection)
                for _ in range(2):
                    with pytest.raises(InvalidSettings, match=f"connection {BEHIND}"):
                        await joined.list()


@each_opening
async def test_a_connection_that_is_safe_behind_a_pooler_is_joined(
    kind: str, migrated_postgres_url: str
) -> None:
    """The calls run in the transaction of the host."""
    open_database, _, safe = OPENINGS[kind]
    async with (
        open_database(migrated_postgres_url, **safe) as database,
        IncidentClient.open(migrated_postgres_url) as client,
    ):
        if kind == "pool":
            async with database.acquire() as connection, connection.transaction():
                created = await client.join(connection).create("The disk is full", source="partner")
        else:
            async with database.begin() as connection:
                created = await client.join(connection).create("The disk is full", source="partner")
        assert await client.list() == [created]


@pytest.mark.parametrize("value", ["auto", "on", "off"])
async def test_a_url_says_whether_to_prepare(value: str, migrated_postgres_url: str) -> None:
    """`?prepared_statements=` is taken by clients and migrations, beside other parameters."""
    url = f"{migrated_postgres_url}?application_name=ik&prepared_statements={value}&sslmode=disable"
    async with IncidentClient.open(url) as client:
        assert await client.list() == []
    await migrate.check(url)


@pytest.mark.parametrize("value", ["true", "ON", "off&prepared_statements=no"])
def test_a_url_with_another_value_is_refused(value: str) -> None:
    """The error names the parameter and its values, for clients and migrations."""
    url = f"postgresql://localhost/incidents?prepared_statements={value}"
    for use in (IncidentClient.open, migrate.migration_engine):
        with pytest.raises(
            InvalidSettings, match="prepared_statements that is none of: auto, on, off"
        ):
            use(url)


@pytest.mark.parametrize(
    ("by_option", "by_url", "prepares"),
    [
        (None, "", True),
        (None, "off", False),
        (None, "on", True),
        (True, "off", True),
        (False, "on", False),
    ],
)
async def test_the_option_wins_over_the_url(
    by_option: bool | None, by_url: str, prepares: bool, migrated_postgres_url: str
) -> None:
    """Without either, statements are prepared, since there is no pooler."""
    url = migrated_postgres_url + (by_url and f"?prepared_statements={by_url}")
    options = StoreOptions(pool_size=1, max_overflow=0, prepared_statements=by_option)
    async with IncidentClient.open(url, options=options) as client:
        await client.create("The disk is full", source="operator")
        store: Any = client.store
        connections = store._connections._opened().connections
        connection = await connections.take()
        names = await connection.driver.fetch("SELECT name FROM pg_prepared_statements")
        await connections.put(connection)
    assert bool(names) is prepares
    assert all(re.fullmatch(r"incidentkit_[0-9a-f]{16}", name) for (name,) in names)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], False),
        (["--prepared-statements", "on"], True),
        (["--prepared-statements", "auto"], None),
    ],
)
def test_serve_takes_the_setting_as_an_option(
    arguments: list[str], expected: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--prepared-statements` overrides the environment, also by `auto`."""
    served: list[Settings] = []

    def serve(settings: Settings, *_: object, **__: object) -> bool:
        served.append(settings)
        return True

    monkeypatch.setenv("INCIDENTKIT_PREPARED_STATEMENTS", "off")
    monkeypatch.setattr("incidentkit.cli.serve.run_server", serve)
    done = CliRunner().invoke(main, ["serve", *arguments])
    assert done.exit_code == 0, done.output
    (settings,) = served
    assert settings.store.prepared_statements is expected


def test_serve_refuses_another_value() -> None:
    """The error names the values."""
    done = CliRunner().invoke(main, ["serve", "--prepared-statements", "maybe"])
    assert done.exit_code == 2
    assert "'auto', 'on', 'off'" in done.output

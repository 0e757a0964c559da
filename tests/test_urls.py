"""URLs of PostgreSQL, as hosted databases and other drivers write them."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from psycopg import pq

from incidentkit import IncidentClient, InvalidSettings, SchemaOutOfDate, StoreUnavailable
from incidentkit.store import StoreOptions, migrate
from incidentkit.store.database import database_kind
from incidentkit.store.postgresql import url as urls
from incidentkit.store.postgresql.url import parse_url, place_of, place_of_pool
from tests.hosts import host_engine, run_sql
from tests.servers import HOST

if TYPE_CHECKING:
    from pathlib import Path

PASSWORD = "s3cret"

HOSTED = {
    "Heroku": (
        "postgres://app:pa55@ec2-1-2-3-4.compute-1.amazonaws.com:5432/d1",
        "ec2-1-2-3-4.compute-1.amazonaws.com:5432/d1",
        {},
    ),
    "Neon": (
        (
            "postgresql://app:pa55@ep-cool-1-pooler.eu-central-1.aws.neon.tech/neondb"
            "?sslmode=require&channel_binding=require"
        ),
        "ep-cool-1-pooler.eu-central-1.aws.neon.tech:5432/neondb",
        {"sslmode": "require"},
    ),
    "Neon, without SNI": (
        "postgresql://app:pa55@ep-cool-1.aws.neon.tech/neondb?options=endpoint%3Dep-cool-1",
        "ep-cool-1.aws.neon.tech:5432/neondb",
        {"options": "endpoint=ep-cool-1"},
    ),
    "Supabase": (
        (
            "postgresql://postgres.ref:pa55@aws-0-eu-central-1.pooler.supabase.com:6543/postgres"
            "?pgbouncer=true&connection_limit=1"
        ),
        "aws-0-eu-central-1.pooler.supabase.com:6543/postgres",
        {},
    ),
    "Vercel": (
        (
            "postgres://app:pa55@aws-0.pooler.supabase.com:6543/postgres"
            "?sslmode=require&supa=base-pooler.x"
        ),
        "aws-0.pooler.supabase.com:6543/postgres",
        {"sslmode": "require"},
    ),
    "DigitalOcean": (
        (
            "postgresql://doadmin:pa55@db-do-user-1-0.b.db.ondigitalocean.com:25060/defaultdb"
            "?sslmode=require"
        ),
        "db-do-user-1-0.b.db.ondigitalocean.com:25060/defaultdb",
        {"sslmode": "require"},
    ),
    "Render": (
        "postgresql://app:pa55@dpg-1-a.frankfurt-postgres.render.com/app",
        "dpg-1-a.frankfurt-postgres.render.com:5432/app",
        {},
    ),
    "Fly": (
        "postgres://postgres:pa55@app-db.internal:5432/app?sslmode=disable",
        "app-db.internal:5432/app",
        {"sslmode": "disable"},
    ),
    "SQLAlchemy with psycopg": (
        "postgresql+psycopg://app:pa55@db/app?sslmode=prefer&application_name=shop",
        "db:5432/app",
        {"sslmode": "prefer", "application_name": "shop"},
    ),
    "SQLAlchemy with asyncpg": (
        "postgresql+asyncpg://app:pa55@db/app?ssl=verify-full&prepared_statement_cache_size=0",
        "db:5432/app",
        {"sslmode": "verify-full"},
    ),
    "SQLAlchemy with several hosts": (
        "postgresql+psycopg2://app:pa55@/app?host=db1:5432&host=db2:5433",
        "db1:5432,db2:5433/app",
        {},
    ),
    "JDBC and node-postgres": (
        "postgres://app:pa55@db/app?ssl=true",
        "db:5432/app",
        {"sslmode": "require"},
    ),
    "Prisma": (
        "postgresql://app:pa55@db:5432/app?schema=public&pool_timeout=10",
        "db:5432/app",
        {},
    ),
    "libpq with several hosts": (
        "postgresql://app:pa55@db1:5432,db2,[::1]:5434/app?target_session_attrs=read-write",
        "db1:5432,db2:5432,[::1]:5434/app",
        {"target_session_attrs": "read-write"},
    ),
    "libpq with a socket": (
        "postgresql:///app?host=/var/run/postgresql&user=app&password=pa55",
        "/var/run/postgresql:5432/app",
        {},
    ),
    "libpq with a socket as the host": (
        "postgresql://app:pa55@%2Fvar%2Frun:5433/app",
        "/var/run:5433/app",
        {},
    ),
    "libpq with all in the parameters": (
        (
            "postgresql://?host=db&port=5433&dbname=app&user=app&password=pa55"
            "&fallback_application_name=x&keepalives=1&keepalives_idle=30&tcp_user_timeout=1000"
        ),
        "db:5433/app",
        {"application_name": "x"},
    ),
    "a schema": (
        "postgresql://app:pa55@db/app?options=-c%20search_path%3Dshop",
        "db:5432/app (schema shop)",
        {"options": "-c search_path=shop"},
    ),
    "a schema as a setting": (
        "postgresql://app:pa55@db/app?search_path=shop",
        "db:5432/app (schema shop)",
        {"search_path": "shop"},
    ),
}
"""URLs by their origin, with the place and the parameters that reach asyncpg."""


@pytest.mark.parametrize(("url", "place", "parameters"), HOSTED.values(), ids=HOSTED)
def test_the_url_of_a_hosted_database_is_understood(
    url: str, place: str, parameters: dict[str, str]
) -> None:
    """URLs name their place without the account, and parameters with a meaning reach asyncpg."""
    assert database_kind(url) == "postgresql"
    server = parse_url(url)
    assert server.place == place
    arguments = server.arguments
    assert arguments["password"] == "pa55"
    assert arguments["user"] in ("app", "postgres", "doadmin", "postgres.ref")
    passed = dict(pair.split("=") for pair in arguments["dsn"].partition("?")[2].split("&") if pair)
    assert {**passed, **(arguments["server_settings"] or {})} == parameters
    assert "pa55" not in repr(server)


async def connects(url: str, statement: str) -> Any:
    """Return what a statement finds on a connection with the arguments of a URL."""
    connection = await asyncpg.connect(**parse_url(url).arguments)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


@pytest.mark.parametrize(
    "parameters",
    [
        "sslmode=prefer&channel_binding=prefer",
        "sslmode=disable&gssencmode=disable",
        "pgbouncer=true&connection_limit=1",
        "connect_timeout=10&application_name=shop",
        "options=-cstatement_timeout%3D5000",
        "target_session_attrs=read-write",
        "keepalives=1&keepalives_idle=30&keepalives_interval=10&keepalives_count=5",
        "client_encoding=UTF8&min_protocol_version=3.0&load_balance_hosts=disable",
        "passfile=/nowhere/pgpass&krbsrvname=postgres",
        "sslmode=&application_name=",
    ],
)
async def test_a_url_with_parameters_opens(migrated_postgres_url: str, parameters: str) -> None:
    """A client and the migrations accept the same parameters of a URL."""
    for scheme in ("postgres", "postgresql+psycopg", "postgresql+asyncpg"):
        url = migrated_postgres_url.replace("postgresql", scheme, 1) + f"?{parameters}"
        async with IncidentClient.open(url) as client:
            await client.create("Disk is full", source="monitoring")
        await migrate.upgrade(url)
        await migrate.check(url)


async def test_a_parameter_takes_effect(migrated_postgres_url: str) -> None:
    """The name of the application, options and settings reach the server, and hosts are tried."""
    url = migrated_postgres_url
    shop = f"{url}?application_name=shop&fallback_application_name=x"
    assert await connects(shop, "SHOW application_name") == "shop"
    assert await connects(f"{url}?options=-cwork_mem%3D1MB", "SHOW work_mem") == "1MB"
    assert await connects(f"{url}?work_mem=2MB", "SHOW work_mem") == "2MB"
    several = url.replace(f"@{HOST}", f"@{HOST}:1,{HOST}")
    assert await connects(several, "SELECT 1") == 1
    limits = {
        "connect_timeout=3": 3.0,
        "connect_timeout=0": None,
        "connect_timeout=-1": None,
    }
    for parameter, limit in limits.items():
        assert parse_url(f"{url}?{parameter}").arguments["timeout"] == limit
    assert "timeout" not in parse_url(url).arguments


async def test_the_time_limit_of_a_url_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """`connect_timeout` of the URL is used in place of the option."""
    given: list[float] = []

    async def connect(**arguments: Any) -> None:
        given.append(arguments["timeout"])
        raise ConnectionRefusedError

    monkeypatch.setattr(asyncpg, "connect", connect)
    url = "postgresql://app@db/app"
    options = StoreOptions(connect_timeout=7)
    for each in (url, f"{url}?connect_timeout=3"):
        with pytest.raises(StoreUnavailable, match="refused"):
            await IncidentClient.open(each, options=options).connect()
        with pytest.raises(StoreUnavailable, match="refused"):
            await migrate.check(each)
    assert given == [7, migrate.CONNECT_TIMEOUT, 3, 3]


async def test_a_schema_of_its_own(empty_postgres_url: str) -> None:
    """A URL with a search path puts the tables into that schema, and errors name it."""
    await run_sql(empty_postgres_url, "CREATE SCHEMA shop")
    url = f"{empty_postgres_url}?options=-csearch_path%3Dshop"
    with pytest.raises(SchemaOutOfDate, match=r"\(schema shop\) has no incidentkit schema"):
        await IncidentClient.open(url).connect()
    await migrate.upgrade(url)
    async with IncidentClient.open(url) as client:
        await client.create("Disk is full", source="monitoring")
    assert await run_sql(empty_postgres_url, 'SELECT count(*) FROM shop."Incident"') == [(1,)]


def test_every_parameter_of_libpq_is_honored_accepted_or_refused_by_name() -> None:
    """No parameter that libpq knows is sent to the server as a setting that it does not know."""
    known = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
    lists = (urls.HONORED, urls.PASSED_ON, urls.WITHOUT_MEANING, urls.ONLY, urls.REFUSED)
    for name in known:
        assert sum(name in each for each in lists) == 1, name
    assert {*urls.REFUSED} <= known


@pytest.mark.parametrize("name", [*urls.REFUSED, *urls.ONLY])
async def test_a_parameter_that_cannot_be_honored_is_named(name: str) -> None:
    """A client and the migrations refuse it by its name, before anything is sent."""
    url = f"postgresql://app:{PASSWORD}@{HOST}:1/app?{name}=nonsense"
    for work in (lambda: IncidentClient.open(url), lambda: asyncio.run(migrate.upgrade(url))):
        with pytest.raises(InvalidSettings, match=rf"\b{name}\b") as caught:
            await asyncio.to_thread(work)
        assert caught.value.name == "database_url"
        assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (f"postgresql://app:{PASSWORD}@{HOST}:port/app", "a port that is not a number"),
        (f"postgresql://app:{PASSWORD}@{HOST}:70000/app", "a port that is not a number"),
        (f"postgresql://app:{PASSWORD}@db1,db2/app?port=1,2,3", "one port, or as many as hosts"),
        (f"postgresql://app:{PASSWORD}@db1,,db2/app", "an empty host"),
        (f"postgresql://app:{PASSWORD}@::1/app", "an IPv6 address without brackets"),
        (f"postgresql://app:{PASSWORD}@[::1/app", "without its second bracket"),
        (f"postgresql://app:{PASSWORD}#1@db/app", "percent-encode"),
        (f"postgresql://app:{PASSWORD}@1@db/app", "percent-encode"),
        (f"postgresql://app:1/{PASSWORD}@db/app", "percent-encode"),
        (f"postgresql://app:1?{PASSWORD}@db/app", "%3F"),
        (f"postgresql://app:{PASSWORD}%00@db/app", "a NUL character"),
        ("postgresql://app@db/app?sslmode=nonsense", "sslmode"),
        ("postgresql://app@db/app?ssl=nonsense", "ssl"),
        ("postgresql://app@db/app?sslMode=require", "the unknown parameter sslMode"),
        ("postgresql://app@db/app?sslrootcert=/nowhere/ca.pem", "sslrootcert that does not exist"),
        ("postgresql://app@db/app?sslrootcert=system&sslmode=require", "needs sslmode=verify-full"),
        ("postgresql://app@db/app?target_session_attrs=nonsense", "target_session_attrs"),
        ("postgresql://app@db/app?connect_timeout=soon", "connect_timeout"),
        ("postgresql://app@db/app?nonsense", "%3F"),
    ],
)
async def test_a_url_that_cannot_be_read_is_refused(url: str, reason: str) -> None:
    """The reason names the part that is wrong, and never shows the password."""
    for work in (lambda: IncidentClient.open(url), lambda: asyncio.run(migrate.upgrade(url))):
        with pytest.raises(InvalidSettings, match=reason) as caught:
            await asyncio.to_thread(work)
        assert PASSWORD not in str(caught.value)
        assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_certificates_of_the_system_are_used() -> None:
    """`sslrootcert=system` checks the certificate and the host by the system's authorities."""
    arguments = parse_url("postgresql://app@db/app?sslrootcert=system").arguments
    context = arguments["ssl"]
    assert isinstance(context, ssl.SSLContext)
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert "sslrootcert" not in arguments["dsn"]


def test_files_of_certificates_are_passed_on(tmp_path: Path) -> None:
    """Paths of certificates with any characters reach asyncpg."""
    file = tmp_path / "ca & key=1.pem"
    file.touch()
    query = f"sslrootcert={str(file).replace('&', '%26').replace('=', '%3D')}&sslmode=verify-ca"
    dsn = parse_url(f"postgresql://app@db/app?{query}").arguments["dsn"]
    assert "%26%20key%3D1.pem" in dsn


def test_the_environment_of_libpq_completes_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL without a host or a database has the place that asyncpg connects to."""
    monkeypatch.delenv("PGHOST", raising=False)
    monkeypatch.delenv("PGPORT", raising=False)
    monkeypatch.delenv("PGDATABASE", raising=False)
    assert parse_url("postgresql://app@").place == "localhost:5432/app"
    monkeypatch.setenv("PGHOST", "db")
    monkeypatch.setenv("PGPORT", "6543")
    monkeypatch.setenv("PGDATABASE", "shop")
    assert parse_url("postgresql://app@").place == "db:6543/shop"
    assert parse_url("postgresql://?service=shop").place == "of the service shop"


async def test_the_place_of_a_hosts_pool_and_engine() -> None:
    """The place of what a host has opened is that of its URL or of its arguments."""
    url = f"postgresql://app:{PASSWORD}@{HOST}:1/app"
    async with host_engine(url) as engine:
        assert place_of(engine.url) == f"{HOST}:1/app"
    async with host_engine("postgresql://", async_creator=lambda: None) as engine:
        assert place_of(engine.url) is None
    for pool in (
        asyncpg.create_pool(url),
        asyncpg.create_pool(host=HOST, port=1, database="app", password=PASSWORD),
        asyncpg.create_pool("postgresql://app@db/other", host=HOST, port=1, database="app"),
    ):
        assert place_of_pool(pool) == f"{HOST}:1/app"
    assert place_of_pool(object()) is None or PASSWORD not in str(place_of_pool(object()))

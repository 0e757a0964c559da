"""Every failure of a database is reported with its one cause, its place and its code."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import ssl
import struct
import time
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import asyncpg
import psycopg
import pytest
from sqlalchemy import NullPool
from sqlalchemy.ext.asyncio import create_async_engine

from incidentkit import IncidentClient, InvalidSettings, SchemaOutOfDate, StoreError
from incidentkit.store import StoreOptions, migrate
from incidentkit.store.causes import Cause
from incidentkit.store.postgresql import errors as postgresql
from incidentkit.store.sqlite import errors as sqlite
from tests.hosts import run_sql
from tests.servers import HOST, PostgresServer, free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

PASSWORD = "s3cret"
"""Never in a message."""

FAIL = """
CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE planned planned_failure;
BEGIN
    SELECT * INTO planned FROM planned_failure;
    RAISE EXCEPTION USING ERRCODE = planned.code, MESSAGE = planned.message;
END $$
"""
"""Makes the server send the planned SQLSTATE and message."""

MESSAGES = [
    # PgBouncer
    ("08P01", "query_wait_timeout", "no free connection to its server in time"),
    ("08P01", "no more connections allowed (max_client_conn)", "takes no more connections"),
    ("08P01", "server login has been failing, try again later (server_login_retry)", "cannot log"),
    ("08P01", "server login failed: FATAL password authentication failed", "cannot log in"),
    ("08P01", "client_login_timeout (server down)", "cannot log in"),
    ("08P01", "idle transaction timeout", "at one of its time limits"),
    ("08P01", "client_idle_timeout", "at one of its time limits"),
    ("08P01", 'database "app" is disabled', "paused or disabled"),
    ("08P01", "no such database: app", "has no such database"),
    ("08P01", "no such user: app", "the password is missing or wrong"),
    ("08P01", "SASL authentication failed", "the password is missing or wrong"),
    ("08P01", "unsupported startup parameter: options", "refuses a parameter of the URL"),
    ("08P01", "TLS connection required", "accepts only encrypted connections"),
    ("08P01", "bind message supplies 6 parameters", "broke off the connection"),
    # Supavisor
    ("XX000", "Tenant or user not found", "the password is missing or wrong"),
    ("XX000", "Max client connections reached", "takes no more connections"),
    # PostgreSQL
    ("57014", "canceling statement due to statement timeout", "exceeded the server's statement_"),
    ("57014", "canceling statement due to user request", "another session cancelled"),
    ("57014", "annulation de la requête", "the server cancelled the statement"),
    ("28000", "no pg_hba.conf entry for host, no encryption", "add sslmode=require"),
    ("28000", "no pg_hba.conf entry for host, SSL encryption", "does not admit this user"),
    ("28000", 'role "x" does not exist', "does not admit this user"),
    ("28P01", "échec de l'authentification", "the password is missing or wrong"),
    ("3D000", "la base de données « x » n'existe pas", "has no such database"),
    ("53300", "sorry, too many clients already", "takes no more connections"),
    ("55000", 'database "x" is not currently accepting connections', "no connections at present"),
    ("57P03", "the database system is starting up", "starting up, shutting down or recovering"),
    ("0A000", "cached plan must not change result type", "the schema was changed after"),
]
"""SQLSTATEs and messages that are sent, and a part of the reason for each."""


@asynccontextmanager
async def ways(url: str) -> AsyncIterator[dict[str, Callable[[], Awaitable[object]]]]:
    """Yield a function that creates an incident, for each way to connect."""
    plain = StoreOptions(pool_size=1, max_overflow=0)
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(asyncpg.create_pool(url, min_size=0, max_size=1))
        engines = {
            driver: create_async_engine(
                url.replace("postgresql:", f"postgresql+{driver}:"), poolclass=NullPool
            )
            for driver in ("asyncpg", "psycopg")
        }
        client = await stack.enter_async_context(IncidentClient.open(url, options=plain))
        clients = {"url": client}
        databases: dict[str, Any] = {"pool": pool, **engines}
        for name, database in databases.items():
            clients[name] = await stack.enter_async_context(IncidentClient.open(database))

        async def create(name: str) -> object:
            return await clients[name].create("Disk is full", source="monitoring")

        async def create_on(driver: str) -> object:
            async with engines[driver].begin() as connection:
                joined = client.join(connection)
                return await joined.create("Disk is full", source="monitoring")

        async def create_on_connection() -> object:
            async with pool.acquire() as connection, connection.transaction():
                joined = client.join(connection)
                return await joined.create("Disk is full", source="monitoring")

        yield {
            **{name: partial(create, name) for name in clients},
            **{f"joined {name}": partial(create_on, name) for name in engines},
            "joined pool": create_on_connection,
        }
        for engine in engines.values():
            await engine.dispose()


def place(url: str) -> str:
    """Return the place of a database, as an error names it."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port}{parts.path}"


async def plan_failures(url: str) -> None:
    """Make every insert of an incident fail as the table says."""
    await run_sql(url, "CREATE TABLE planned_failure (code text, message text)")
    await run_sql(url, "INSERT INTO planned_failure VALUES ('00000', '')")
    await run_sql(url, FAIL)
    await run_sql(url, 'CREATE TRIGGER fail BEFORE INSERT ON "Incident" EXECUTE FUNCTION fail()')


async def test_each_code_of_the_server_has_its_cause(migrated_postgres_url: str) -> None:
    """A SQLSTATE is reported with its reason, place and chance of a retry, on each connection."""
    url = migrated_postgres_url
    await plan_failures(url)
    async with ways(url) as creates:
        for cause in postgresql.CAUSES:
            for code in cause.codes:
                if cause.text is not None and code in postgresql.AMBIGUOUS:
                    continue
                sent = code.ljust(5, "0")
                if len(code) < 5:
                    sent = f"{code}{'ZZZ'[len(code) - 5 :]}"
                await run_sql(url, f"UPDATE planned_failure SET code = '{sent}', message = 'x'")
                for way, create in creates.items():
                    with pytest.raises(StoreError) as caught:
                        await create()
                    error = caught.value
                    assert type(error) is cause.error, (way, code)
                    assert error.sqlstate == sent
                    assert error.place == place(url)
                    assert error.retryable is cause.retryable
                    if cause.error is not SchemaOutOfDate:
                        assert error.reason == cause.reason, (way, code)
                        assert str(error).endswith(f": {cause.reason} (SQLSTATE {sent})")


async def test_the_message_tells_causes_with_one_code_apart(migrated_postgres_url: str) -> None:
    """Messages of poolers and of the server under a common SQLSTATE get their own reasons."""
    url = migrated_postgres_url
    await plan_failures(url)
    connection = await asyncpg.connect(url)
    async with ways(url) as creates:
        for code, message, reason in MESSAGES:
            await connection.execute(
                "UPDATE planned_failure SET code = $1, message = $2", code, message
            )
            for way in ("url", "psycopg", "joined pool"):
                with pytest.raises(StoreError) as caught:
                    await creates[way]()
                assert reason in caught.value.reason, (way, message)
                assert caught.value.sqlstate == code
    await connection.close()


async def test_an_unknown_failure_names_its_type(migrated_postgres_url: str) -> None:
    """A failure without a known cause names the type of the exception, and its SQLSTATE."""
    url = migrated_postgres_url
    await plan_failures(url)
    await run_sql(url, "UPDATE planned_failure SET code = '39001', message = 'x'")
    async with ways(url) as creates:
        for way, create in creates.items():
            with pytest.raises(StoreError) as caught:
                await create()
            driver = "psycopg" if "psycopg" in way else "asyncpg"
            assert f"failed with {driver}." in caught.value.reason
            assert not caught.value.retryable
            assert str(caught.value).endswith("(SQLSTATE 39001)")
    error = postgresql.translate_error(RuntimeError("x"))
    assert error.reason == "it failed with RuntimeError"
    error = sqlite.translate_error(RuntimeError("x"))
    assert error.reason == "it failed with RuntimeError"


class Pooler:
    """A server that refuses each connection as a pooler does: with an error after its start."""

    def __init__(self) -> None:
        self.code = self.message = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Refuse TLS if the client asks for it, then refuse the connection."""
        (size,) = struct.unpack("!i", await reader.readexactly(4))
        (kind,) = struct.unpack("!i", (await reader.readexactly(size - 4))[:4])
        if kind >> 16 == 1234:
            writer.write(b"N")
            (size,) = struct.unpack("!i", await reader.readexactly(4))
            await reader.readexactly(size - 4)
        fields = {"S": "FATAL", "V": "FATAL", "C": self.code, "M": self.message}
        body = b"".join(f"{name}{text}\0".encode() for name, text in fields.items()) + b"\0"
        writer.write(b"E" + struct.pack("!i", len(body) + 4) + body)
        await writer.drain()
        writer.close()


@asynccontextmanager
async def connecting(url: str) -> AsyncIterator[list[tuple[str, Callable[[], Awaitable[None]]]]]:
    """Yield functions that connect: the client's own way, engines, a pool and a migration."""
    options = StoreOptions(connect_timeout=1)
    limits = {"asyncpg": {"timeout": 1}, "psycopg": {"connect_timeout": 2}}
    async with AsyncExitStack() as stack:
        engines = {
            driver: create_async_engine(
                url.replace("postgresql:", f"postgresql+{driver}:"),
                poolclass=NullPool,
                connect_args=limits[driver],
            )
            for driver in ("asyncpg", "psycopg")
        }
        pool = await stack.enter_async_context(asyncpg.create_pool(url, min_size=0, timeout=1))
        yield [
            ("url", IncidentClient.open(url, options=options).connect),
            ("pool", IncidentClient.open(pool).connect),
            *((name, IncidentClient.open(engine).connect) for name, engine in engines.items()),
            ("migration", lambda: migrate.check(url)),
        ]
        for engine in engines.values():
            await engine.dispose()


async def refusals(url: str) -> dict[str, StoreError]:
    """Return the error of each way to connect, and check what all of them have in common."""
    found = {}
    async with connecting(url) as ways_to_connect:
        for way, connect in ways_to_connect:
            with pytest.raises(StoreError) as caught:
                await connect()
            found[way] = caught.value
    for way, error in found.items():
        assert error.place == place(url), way
        assert PASSWORD not in str(error)
        assert PASSWORD not in repr(error)
    return found


@pytest.mark.parametrize(("code", "message", "reason"), MESSAGES)
async def test_a_pooler_that_refuses_a_connection_is_told(
    code: str, message: str, reason: str
) -> None:
    """A refusal at the start of a connection has the reason of the pooler or the server."""
    pooler = Pooler()
    pooler.code, pooler.message = code, message
    async with await asyncio.start_server(pooler.serve, HOST, 0) as server:
        port = server.sockets[0].getsockname()[1]
        found = await refusals(f"postgresql://app:{PASSWORD}@{HOST}:{port}/app")
    for way, error in found.items():
        if way != "psycopg":
            assert reason in error.reason, way
            assert error.sqlstate == code
        elif message.isascii() and message != "bind message supplies 6 parameters":
            # psycopg gives a message without a SQLSTATE, in the language of the server.
            assert reason in error.reason


def unused(host: str = HOST) -> str:
    """Return the URL of a port on which nothing listens."""
    return f"postgresql://app:{PASSWORD}@{host}:{free_port()}/app"


async def test_a_server_that_does_not_run_is_told() -> None:
    """A refused connection is reported as such, for an address and for a name with several."""
    for url in (unused(), unused("localhost")):
        for error in (await refusals(url)).values():
            assert error.reason == postgresql.REFUSED.reason
            assert error.retryable
    several = OSError("Multiple exceptions: " + f"[Errno {errno.ECONNREFUSED}] Connect call failed")
    assert postgresql.translate_error(several).reason == postgresql.REFUSED.reason


@pytest.mark.parametrize(
    ("number", "cause"),
    [(socket.EAI_NONAME, postgresql.UNKNOWN_HOST), (socket.EAI_AGAIN, postgresql.NO_NAMES)],
)
async def test_an_unknown_host_is_told(
    number: int, cause: Cause, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that does not exist is told apart from a name service that does not answer."""

    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(number, os.strerror(1))

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    for error in (await refusals(unused("db.example.com"))).values():
        assert error.reason == cause.reason
        assert error.retryable is cause.retryable


async def test_a_server_that_never_answers_is_told() -> None:
    """A connection that is not answered in time names the connection, not a statement."""
    with socket.create_server((HOST, 0)) as silent:
        port = silent.getsockname()[1]
        for error in (await refusals(f"postgresql://app:{PASSWORD}@{HOST}:{port}/app")).values():
            assert error.reason == postgresql.NOT_CONNECTED.reason


async def test_a_missing_socket_is_told(tmp_path: object) -> None:
    """A folder without the server's socket is reported with the folder."""
    url = f"postgresql://app:{PASSWORD}@/app?host={tmp_path}"
    async with connecting(url) as ways_to_connect:
        for _, connect in ways_to_connect:
            with pytest.raises(StoreError) as caught:
                await connect()
            assert caught.value.reason == postgresql.NO_SOCKET.reason
            assert caught.value.place == f"{tmp_path}:5432/app"


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ssl.SSLCertVerificationError("certificate has expired"), postgresql.UNTRUSTED),
        (ssl.SSLError("wrong version number"), postgresql.TLS_FAILED),
        (OSError(errno.EHOSTUNREACH, "No route to host"), postgresql.NO_ROUTE),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), postgresql.NO_ROUTE),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), postgresql.LOST_CONNECTION),
        (ConnectionResetError(errno.ECONNRESET, "reset"), postgresql.LOST_CONNECTION),
        (asyncpg.InterfaceError("connection is closed"), postgresql.LOST_CONNECTION),
        (asyncpg.InterfaceError("pool is closing"), postgresql.POOL_CLOSED),
        (
            asyncpg.InterfaceError("cannot perform operation: another operation is in progress"),
            postgresql.IN_USE,
        ),
    ],
)
def test_a_failure_of_the_network_or_the_driver_has_its_cause(
    error: Exception, cause: Cause
) -> None:
    """Exceptions that no test can bring about for real are recognized by their type."""
    translated = postgresql.translate_error(error)
    assert (translated.reason, translated.retryable) == (cause.reason, cause.retryable)
    assert translated.sqlstate is None


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A server whose configuration these tests change."""
    with PostgresServer() as server:
        asyncio.run(migrate.upgrade(server.url))
        yield server


@pytest.fixture
def admit(server: PostgresServer) -> Iterator[Callable[[str], None]]:
    """A function that replaces the server's pg_hba.conf; afterwards the old one is back."""
    assert server.folder is not None
    file = server.folder / "data" / "pg_hba.conf"
    before = file.read_text()

    def admits() -> bool:
        try:
            psycopg.connect(server.url).close()
        except psycopg.OperationalError:
            return False
        return True

    def replace(rules: str, *, everyone: bool = False) -> None:
        file.write_text(rules)
        os.kill(server.processes()[0].pid, signal.SIGHUP)
        while admits() is not everyone:
            time.sleep(0.01)

    yield replace
    replace(before, everyone=True)


def wait_for_port(port: int) -> None:
    """Wait until a server listens."""
    while True:
        try:
            socket.create_connection((HOST, port)).close()
        except ConnectionRefusedError:
            time.sleep(0.01)
        else:
            return


def on(server: PostgresServer, account: str = f"postgres:{PASSWORD}") -> str:
    """Return the URL of a database on the server."""
    return server.url.replace("postgres@", f"{account}@")


async def test_a_wrong_password_is_told(
    server: PostgresServer, admit: Callable[[str], None]
) -> None:
    """A wrong or missing password is reported as such; a retry does not help."""
    admit("host all all all scram-sha-256\n")
    for account in (f"postgres:{PASSWORD}", "postgres"):
        for error in (await refusals(on(server, account))).values():
            assert "the password is missing or wrong" in error.reason
            assert not error.retryable


async def test_a_server_that_wants_tls_is_told(
    server: PostgresServer, admit: Callable[[str], None]
) -> None:
    """A server that accepts only encrypted connections is reported with the parameter to add."""
    admit("hostssl all all all trust\n")
    for error in (await refusals(on(server))).values():
        assert "add sslmode=require to the URL" in error.reason
        assert not error.retryable


async def test_a_server_without_tls_is_told(server: PostgresServer) -> None:
    """A URL that requires TLS of a server without it is reported as that."""
    options = StoreOptions(connect_timeout=30)
    url = on(server)
    for connect in (
        IncidentClient.open(f"{url}?sslmode=require", options=options).connect,
        IncidentClient.open(f"{url}?ssl=true", options=options).connect,
        lambda: migrate.check(f"{url}?sslmode=require"),
    ):
        with pytest.raises(StoreError) as caught:
            await connect()
        assert caught.value.reason == postgresql.NO_TLS.reason
        assert not caught.value.retryable
    engine = create_async_engine(
        url.replace("postgresql:", "postgresql+psycopg:") + "?sslmode=require"
    )
    with pytest.raises(StoreError) as caught:
        await IncidentClient.open(engine).connect()
    assert caught.value.reason == postgresql.NO_TLS.reason
    await engine.dispose()


async def test_an_unknown_user_or_database_is_told(server: PostgresServer) -> None:
    """A user or a database that does not exist is reported as that."""
    for error in (await refusals(on(server, f"nobody:{PASSWORD}"))).values():
        assert "does not admit this user" in error.reason
    for error in (await refusals(urlsplit(on(server))._replace(path="/nowhere").geturl())).values():
        assert "has no such database" in error.reason


async def test_a_server_that_starts_up_is_told() -> None:
    """A server that does not accept connections yet is reported as that; a retry may succeed."""
    with PostgresServer(settings={"hot_standby": "off"}) as server:
        server.stop()
        assert server.folder is not None
        (server.folder / "data" / "standby.signal").touch()
        assert server._guard is not None
        server._process = server._spawn(server._guard, server._command(server._guard))
        wait_for_port(server.port)
        for error in (await refusals(on(server))).values():
            assert "starting up, shutting down or recovering" in error.reason
            assert error.retryable


async def test_a_role_without_free_connections_is_told(server: PostgresServer) -> None:
    """A limit of connections that is reached is reported as that."""
    await run_sql(server.url, "CREATE ROLE few LOGIN CONNECTION LIMIT 0")
    for error in (await refusals(on(server, "few"))).values():
        assert "takes no more connections" in error.reason


def test_the_driver_tells_nothing_of_a_password() -> None:
    """A URL that cannot be parsed is refused without showing any part of it."""
    for url in (
        f"postgresql://app:{PASSWORD}/@{HOST}/app",
        f"postgresql://app:{PASSWORD}@{HOST}:port/app",
        f"postgresql://app:x#{PASSWORD}@{HOST}/app",
    ):
        with pytest.raises(InvalidSettings) as caught:
            IncidentClient.open(url)
        assert PASSWORD not in str(caught.value)
        assert caught.value.__cause__ is None


async def test_what_other_sessions_do_is_told(migrated_postgres_url: str) -> None:
    """Locks, time limits, cancellations and a server that is read-only have their own reasons."""
    url = migrated_postgres_url
    incident: dict[str, Any] = {"source": "monitoring", "dedup_key": "db-1"}
    cancel = (
        "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock'",
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock'",
    )
    holder = await asyncpg.connect(url)

    async def outcome(parameters: str, end: str | None = None) -> StoreError:
        async with IncidentClient.open(f"{url}{parameters}") as client:
            async with holder.transaction():
                await client.join(holder).create("Disk is full", **incident)
                waiting = asyncio.ensure_future(client.create("Disk is full", **incident))
                while end is not None and not await run_sql(url, end):
                    pass
                with pytest.raises(StoreError) as caught:
                    await waiting
            return caught.value

    expected = {
        "55P03": await outcome("?lock_timeout=50"),
        "57014": await outcome("?options=-cstatement_timeout%3D50"),
    }
    assert "another session holds a lock" in expected["55P03"].reason
    assert "the server's statement_timeout" in expected["57014"].reason
    for code, error in expected.items():
        assert (error.sqlstate, error.retryable, error.place) == (code, True, place(url))
    for end, code, reason in (
        (cancel[0], "57014", "another session cancelled the statement"),
        # asyncpg does not report why the server closed the connection.
        (cancel[1], "08003", "the connection was lost"),
    ):
        error = await outcome("", end)
        assert (error.sqlstate, error.retryable) == (code, True)
        assert reason in error.reason
    await holder.close()
    async with IncidentClient.open(f"{url}?default_transaction_read_only=on") as client:
        with pytest.raises(StoreError, match="it takes no writes") as caught:
            await client.create("Disk is full", **incident)
    assert (caught.value.sqlstate, caught.value.retryable) == ("25006", False)


async def test_a_deadlock_is_told(migrated_postgres_url: str) -> None:
    """A transaction that is undone to resolve a deadlock says so."""
    url = migrated_postgres_url
    async with IncidentClient.open(url) as client:
        for key in ("a", "b"):
            await client.create("Disk is full", source="monitoring", dedup_key=key)
        hosts = [await asyncpg.connect(f"{url}?deadlock_timeout=10") for _ in range(2)]
        for host in hosts:
            await host.execute("BEGIN")
        one, two = (client.join(host) for host in hosts)
        await one.update_status(1, "failed")
        await two.update_status(2, "failed")
        outcomes = await asyncio.gather(
            one.update_status(2, "failed"), two.update_status(1, "failed"), return_exceptions=True
        )
        (error,) = (each for each in outcomes if isinstance(each, StoreError))
        assert (error.sqlstate, error.retryable) == ("40P01", True)
        assert "in a deadlock with another transaction" in error.reason
        for host in hosts:
            await host.close()

"""The servers of a test run, and the fixtures that all tests share."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg
import pytest
from coverage import Coverage
from hypothesis import settings
from psycopg.sql import SQL, Identifier
from redis import Redis

from incidentkit import IncidentClient
from incidentkit.cli.log import LOGGING, LineHandler
from tests.distributions import ROOT, Distributions, build, install
from tests.servers import PostgresServer, RedisCluster, RedisSentinel, RedisServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path
    from typing import LiteralString

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=False, print_blob=True)
settings.load_profile("ci" if "CI" in os.environ else "default")

# They need programs beside the tests, so only the nox sessions of these names run them.
collect_ignore = [
    folder
    for folder in ("pooler", "browser", "expose", "metrics", "contract")
    if f"INCIDENTKIT_TEST_{folder.upper()}" not in os.environ
]

LOG_FLAGS = ("logThreads", "logProcesses", "logMultiprocessing")
"""What `LineHandler` switches off in `logging`."""


class Backends:
    """The servers that a process's tests share: the caller's own, or ones started on first use."""

    def __init__(self) -> None:
        self._started = ExitStack()

    @cached_property
    def postgres_url(self) -> str:
        """The URL of the PostgreSQL server on which test databases are created."""
        return (
            os.environ.get("INCIDENTKIT_TEST_POSTGRES_URL")
            or self._started.enter_context(PostgresServer()).url
        )

    @cached_property
    def redis_url(self) -> str:
        """The URL of the first Redis database that the tests may empty."""
        return (
            os.environ.get("INCIDENTKIT_TEST_REDIS_URL")
            or self._started.enter_context(RedisServer()).url
        )

    @cached_property
    def redis_cluster(self) -> RedisCluster:
        """This process's Redis Cluster."""
        return self._started.enter_context(RedisCluster())

    @cached_property
    def redis_sentinel(self) -> RedisSentinel:
        """This process's Redis behind Sentinel."""
        return self._started.enter_context(RedisSentinel())

    def stop(self) -> None:
        """Stop the servers that were started."""
        self._started.close()


class Administrator:
    """Creates and drops databases on one connection for all tests of a process."""

    def __init__(self, server_url: str, connection: psycopg.Connection) -> None:
        self._server_url = server_url
        self._connection = connection
        self._left: list[str] = []

    @contextmanager
    def database(self, *, template: str) -> Iterator[str]:
        """Create a database, yield its URL, and drop it before the next one is created.

        By then its connections have ended: otherwise PostgreSQL looks again after 100 ms.
        """
        self.drop()
        name = f"incidentkit_test_{uuid4().hex}"
        # The server copies the files with less work than it logs every page.
        self._execute("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy", name, template)
        try:
            yield urlsplit(self._server_url)._replace(path=f"/{name}").geturl()
        finally:
            self._left.append(name)

    def drop(self) -> None:
        """Drop the databases that are no longer used."""
        while self._left:
            self._execute("DROP DATABASE {} WITH (FORCE)", self._left.pop())

    def _execute(self, statement: LiteralString, *names: str) -> None:
        self._connection.execute(SQL(statement).format(*map(Identifier, names)))


_backends = pytest.StashKey[Backends]()


def pytest_configure(config: pytest.Config) -> None:
    """Find the servers; a pytest-xdist worker gets the URL of Redis from the main process."""
    os.environ |= getattr(config, "workerinput", {}).get("incidentkit", {})
    config.stash[_backends] = Backends()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the servers at the end of the run."""
    config.stash[_backends].stop()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Pass the URL of Redis to a pytest-xdist worker, which uses a database of its own there.

    A worker starts its own PostgreSQL, where an open transaction in any database holds up the
    feeds of all of them.
    """
    backends = node.config.stash[_backends]
    node.workerinput["incidentkit"] = {"INCIDENTKIT_TEST_REDIS_URL": backends.redis_url}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Run a test that is marked as `unmeasured` at full speed, and the programs that it starts."""
    if Coverage.current() is None or item.get_closest_marker("unmeasured") is None:
        return (yield)
    with pytest.MonkeyPatch.context() as context:
        # With it, `coverage` measures every Python program.
        context.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
        # In a pytest-xdist worker, each one that is stopped lets the one before it continue.
        stopped: list[Coverage] = []
        while (measuring := Coverage.current()) is not None:
            measuring.stop()
            stopped.append(measuring)
        try:
            return (yield)
        finally:
            for measuring in reversed(stopped):
                measuring.start()


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if re.match(r"INCIDENTKIT_(?!TEST_)|POSTGRES_|REDIS_|DB_", name):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Undo what a `serve` in this process does to logging: its log goes to the real stderr."""
    names = (None, *LOGGING["loggers"])
    before = [(logger, logger.level) for logger in map(logging.getLogger, names)]
    flags = {name: getattr(logging, name) for name in LOG_FLAGS}
    yield
    for logger, level in before:
        logger.setLevel(level)
        for handler in [each for each in logger.handlers if isinstance(each, LineHandler)]:
            logger.removeHandler(handler)
            logging.captureWarnings(capture=False)
    for name, value in flags.items():
        setattr(logging, name, value)


@pytest.fixture(scope="session")
def postgres_server_url(pytestconfig: pytest.Config) -> str:
    """The superuser's URL of the PostgreSQL server of this run."""
    return pytestconfig.stash[_backends].postgres_url


@pytest.fixture(scope="session")
def _administrator(postgres_server_url: str) -> Iterator[Administrator]:
    with psycopg.connect(postgres_server_url, autocommit=True) as connection:
        administrator = Administrator(postgres_server_url, connection)
        yield administrator
        administrator.drop()


@pytest.fixture
def empty_postgres_url(_administrator: Administrator) -> Iterator[str]:
    """The URL of a new, empty PostgreSQL database."""
    with _administrator.database(template="template1") as url:
        yield url


@pytest.fixture(scope="session")
def _migrated_template(_administrator: Administrator) -> Iterator[str]:
    from incidentkit.store.migrate import upgrade

    with _administrator.database(template="template1") as url:
        asyncio.run(upgrade(url))
        yield urlsplit(url).path.strip("/")


@pytest.fixture
def migrated_postgres_url(_administrator: Administrator, _migrated_template: str) -> Iterator[str]:
    """The URL of a new PostgreSQL database with the newest schema and no rows."""
    with _administrator.database(template=_migrated_template) as url:
        yield url


TENANTS = ("tenant a", "tenant_b")
"""The schemas of `tenants_url`."""


@pytest.fixture(scope="session")
def _tenants_template(_administrator: Administrator) -> Iterator[str]:
    from incidentkit.store.migrate import upgrade

    async def fill(url: str) -> None:
        for schema in ("public", *TENANTS):
            await upgrade(url, schema=schema)
            if schema != TENANTS[0]:
                async with IncidentClient.open(url, schema=schema) as incidents:
                    await incidents.create(
                        f"Disk of {schema} is full", source="partner", idempotency_key="key"
                    )

    with _administrator.database(template="template1") as url:
        asyncio.run(fill(url))
        yield urlsplit(url).path.strip("/")


@pytest.fixture
def tenants_url(_administrator: Administrator, _tenants_template: str) -> Iterator[str]:
    """The URL of a PostgreSQL database with tables in several schemas.

    Those of the first tenant have no rows. Those of the other tenant and of `public`, where the
    search path leads, have an incident each, and must have nothing else at the end.
    """
    with _administrator.database(template=_tenants_template) as url:
        before = _rows_of_others(url)
        yield url
        assert _rows_of_others(url) == before


def _rows_of_others(url: str) -> list[Any]:
    """Return the rows of every table outside the schema of the first tenant."""
    with psycopg.connect(url) as connection:
        tables = connection.execute(
            "SELECT schemaname, tablename FROM pg_tables WHERE schemaname = ANY(%s) ORDER BY 1, 2",
            (["public", *TENANTS[1:]],),
        ).fetchall()
        return [
            (name, connection.execute(SQL("TABLE {}").format(Identifier(*name))).fetchall())
            for name in tables
        ]


@pytest.fixture(scope="session")
def _two_phase_administrator() -> Iterator[Administrator]:
    with (
        PostgresServer(settings={"max_prepared_transactions": "10", "autovacuum": "off"}) as server,
        psycopg.connect(server.url, autocommit=True) as connection,
    ):
        yield Administrator(server.url, connection)


@pytest.fixture(scope="session")
def _two_phase_template(_two_phase_administrator: Administrator) -> Iterator[str]:
    from incidentkit.store.migrate import upgrade

    with _two_phase_administrator.database(template="template1") as url:
        asyncio.run(upgrade(url))
        yield urlsplit(url).path.strip("/")


@pytest.fixture
def two_phase_url(
    _two_phase_administrator: Administrator, _two_phase_template: str
) -> Iterator[str]:
    """The URL of a migrated database on a server that no other test process uses.

    Transactions can be prepared there; those that a test leaves behind are rolled back. No other
    transaction is open, not even one of autovacuum.
    """
    with _two_phase_administrator.database(template=_two_phase_template) as url:
        yield url
        with psycopg.connect(url, autocommit=True) as connection:
            left = "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"
            for (gid,) in connection.execute(left).fetchall():
                connection.execute(SQL("ROLLBACK PREPARED {}").format(gid))


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of an SQLite database whose file does not exist yet."""
    return f"sqlite+aiosqlite:///{tmp_path / 'incidents.db'}"


@pytest.fixture(scope="session")
def _migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from incidentkit.store.migrate import upgrade

    path = tmp_path_factory.mktemp("template") / "incidents.db"
    asyncio.run(upgrade(f"sqlite+aiosqlite:///{path}"))
    return path


@pytest.fixture
def migrated_sqlite_url(sqlite_url: str, _migrated_file: Path) -> str:
    """The URL of an SQLite database with the newest schema and no rows."""
    shutil.copyfile(_migrated_file, sqlite_url.removeprefix("sqlite+aiosqlite:///"))
    return sqlite_url


@pytest.fixture
def memory_url() -> str:
    """The URL of an SQLite database in memory."""
    return "sqlite+aiosqlite:///:memory:"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database of each kind."""
    name = {"sqlite": "migrated_sqlite_url", "postgresql": "migrated_postgres_url"}[request.param]
    return str(request.getfixturevalue(name))


@pytest.fixture
async def incidents(url: str) -> AsyncIterator[IncidentClient]:
    """An open client on an empty database of each kind."""
    async with IncidentClient.open(url) as client:
        yield client


@pytest.fixture
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise the timeouts of the cache, so that a busy machine does not exceed them."""
    monkeypatch.setattr("incidentkit.cache.redis.SOCKET_TIMEOUT", 30.0)
    monkeypatch.setattr("incidentkit.cache.breaker.CALL_TIMEOUT", 30.0)


@pytest.fixture
def redis_url(pytestconfig: pytest.Config, _patience: None) -> str:
    """The URL of this worker's own, empty Redis database, used with long timeouts."""
    first = urlsplit(pytestconfig.stash[_backends].redis_url)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    url = first._replace(path=f"/{int(first.path.strip('/') or 0) + int(worker)}").geturl()
    with Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
def redis_cluster_url(pytestconfig: pytest.Config, _patience: None) -> str:
    """The URL of an empty Redis Cluster, used with long timeouts."""
    cluster = pytestconfig.stash[_backends].redis_cluster
    for node in cluster.servers:
        with node.client() as client:
            client.flushall()
    return cluster.url


@pytest.fixture
def redis_sentinel_url(pytestconfig: pytest.Config, _patience: None) -> str:
    """The URL of an empty Redis behind Sentinel, used with long timeouts."""
    sentinel = pytestconfig.stash[_backends].redis_sentinel
    with sentinel.servers[0].client() as client:
        client.flushall()
    return sentinel.url


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """The wheel and the sdist of the checkout."""
    return Distributions(
        build(ROOT, "sdist", tmp_path_factory.mktemp("sdist")),
        build(ROOT, "wheel", tmp_path_factory.mktemp("wheel")),
    )


@pytest.fixture(scope="session")
def environment(distributions: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a virtual environment with the wheel and its dependencies."""
    # A path that a pattern, a shell or an interpolation could misread.
    return install(distributions.wheel, tmp_path_factory.mktemp("100% für %(uns)s"))

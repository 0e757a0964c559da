"""Fixtures of the conformance suite."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import pytest

from incidentkit.testing import PrivateDatabase
from tests.conformance.embodiments import EMBODIMENTS, ON_POSTGRES
from tests.conformance.gaps import expected_failure, gaps_of
from tests.conftest import TENANTS
from tests.remotes import Host
from tests.reuse import ReusedDatabases
from tests.servers import PgBouncer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.conformance.embodiments import Embodiment, Verbs
    from tests.conftest import Administrator

MEASURED: Final = ("sqlite-engine", "postgresql-url", "joined-asyncpg-pool", "remote-asgi")
"""The embodiments for which coverage is measured: the others run the same code."""

CHOSEN: Final = tuple(filter(None, os.environ.get("INCIDENTKIT_TEST_EMBODIMENTS", "").split(",")))
"""The embodiments that the suite runs on; none: all."""

MODE: Final[Any] = os.environ.get("INCIDENTKIT_TEST_POOLER")
"""The mode of the pooler that the suite runs through, on PostgreSQL; None: no pooler."""

SIZE: Final = 3
"""Server connections of the pooler. The callers of a test are more; but each joined transaction
holds one, and no test has more than two."""


def pytest_itemcollected(item: pytest.Item) -> None:
    """Expect the test of a declared gap to fail with the declared error."""
    if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
        return
    embodiment = str(item.callspec.params.get("embodiment"))
    if embodiment not in MEASURED:
        item.add_marker(pytest.mark.unmeasured)
    needed = {need for mark in item.iter_markers("needs") for need in mark.args}
    gaps = gaps_of(embodiment, needed)
    if gaps:
        item.add_marker(expected_failure(gaps))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Report the failure of a declared gap without its source, which takes long to parse."""
    with pytest.MonkeyPatch.context() as context:
        if item.get_closest_marker("xfail") is not None:
            context.setattr(item.config.option, "tbstyle", "native")
        return (yield)


@pytest.fixture(scope="session")
def pooler(postgres_server_url: str) -> Iterator[PgBouncer]:
    """The pooler that the suite runs through."""
    with PgBouncer(postgres_server_url, mode=MODE, size=SIZE) as pooler:
        yield pooler


@pytest.fixture
def private_database() -> Iterator[PrivateDatabase]:
    """A database of the test kit."""
    with PrivateDatabase() as database:
        yield database


@pytest.fixture(scope="session")
def service_host() -> Iterator[Host]:
    """The server of all services behind a socket."""
    with Host() as host:
        yield host


@pytest.fixture(scope="session")
def _reused(_administrator: Administrator) -> Iterator[ReusedDatabases]:
    # A pooler would go on with connections of the test before.
    with ReusedDatabases(_administrator, max_tests=1 if MODE else 200) as databases:
        yield databases


@pytest.fixture
def migrated_postgres_url(_reused: ReusedDatabases, _migrated_template: str) -> Iterator[str]:
    """The URL of a PostgreSQL database with the newest schema and no rows."""
    with _reused.database(_migrated_template, schema="public") as database:
        yield database.url


@pytest.fixture
def tenants_url(_reused: ReusedDatabases, _tenants_template: str) -> Iterator[str]:
    """The URL of a PostgreSQL database with tables in several schemas.

    The tests work in that of the first tenant, and must leave the others as they are.
    """
    with _reused.database(_tenants_template, schema=TENANTS[0]) as database:
        before = database.rows_of("public", *TENANTS[1:])
        yield database.url
        assert database.rows_of("public", *TENANTS[1:]) == before


@pytest.fixture(params=CHOSEN or (ON_POSTGRES if MODE else EMBODIMENTS))
def embodiment(request: pytest.FixtureRequest) -> Embodiment:
    """Each embodiment, on an empty database."""
    setup = EMBODIMENTS[request.param]
    embodiment = setup.embodiment(*map(request.getfixturevalue, setup.fixtures))
    if MODE:
        embodiment.put_behind(request.getfixturevalue("pooler"))
    return embodiment


@pytest.fixture
async def incidents(embodiment: Embodiment) -> AsyncIterator[Verbs]:
    """The verbs on an empty database."""
    async with embodiment.open() as verbs:
        yield verbs


@pytest.fixture
async def other(incidents: Verbs, embodiment: Embodiment) -> AsyncIterator[Verbs]:  # noqa: ARG001
    """The verbs of a second client on the same database."""
    async with embodiment.open() as verbs:
        yield verbs

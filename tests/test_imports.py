"""Importing and opening load only what they need, as counted in fresh interpreters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

import incidentkit

if TYPE_CHECKING:
    from collections.abc import Collection

FLOOR: Final = "import asyncio, attrs, cattrs, sqlite3, sqlalchemy, sqlalchemy.dialects.sqlite"
"""The packages that opening an SQLite file builds on."""

BEYOND_FLOOR: Final = 15
"""How many modules of other packages opening an SQLite file may load beyond the floor."""

OPEN: Final = """\
import asyncio
from incidentkit import IncidentClient

async def main():
    async with IncidentClient.open({url!r}):
        pass

asyncio.run(main())
"""


def modules_after(code: str) -> frozenset[str]:
    """Run code in a new interpreter and return the modules that it added to `sys.modules`."""
    program = f"""\
import sys
before = set(sys.modules)
{code}
print("\\n".join(sorted(set(sys.modules) - before)))
"""
    # Coverage would start in the new interpreter too and hide the modules that it loads.
    environment = {name: value for name, value in os.environ.items() if "COVERAGE" not in name}
    environment["PYTHONPATH"] = str(Path(incidentkit.__file__).parent.parent)
    process = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return frozenset(process.stdout.split())


def of_others(modules: Collection[str]) -> frozenset[str]:
    """Return the modules that are not incidentkit's."""
    return frozenset(name for name in modules if name.partition(".")[0] != "incidentkit")


def packages(modules: Collection[str]) -> frozenset[str]:
    """Return the top-level packages of modules."""
    return frozenset(name.partition(".")[0] for name in modules)


@pytest.fixture
def up_to_date_sqlite_url(sqlite_url: str) -> str:
    """The URL of an SQLite file that has the current schema."""
    modules_after(OPEN.format(url=sqlite_url))
    return sqlite_url


def test_importing_the_package_loads_nothing_but_itself() -> None:
    """`import incidentkit` adds only its own modules to `sys.modules`."""
    loaded = modules_after("import incidentkit")
    assert "incidentkit" in loaded
    assert of_others(loaded) == set()


@pytest.mark.parametrize("name", ["IncidentClient", "SyncIncidentClient"])
def test_importing_a_client_loads_no_event_loop_and_no_driver(name: str) -> None:
    """Importing either client loads neither asyncio nor a database package."""
    loaded = modules_after(f"from incidentkit import {name}")
    assert "incidentkit.client" in loaded
    heavy = {"aiosqlite", "alembic", "asyncio", "asyncpg", "redis", "sqlalchemy", "sqlite3"}
    assert packages(loaded).isdisjoint(heavy | {"starlette", "uvicorn"})


def test_the_synchronous_client_costs_little_more_to_import() -> None:
    """Importing the synchronous client adds two small modules to what the other one loads."""
    one, other = (
        of_others(modules_after(f"from incidentkit import {name}"))
        for name in ("SyncIncidentClient", "IncidentClient")
    )
    assert one - other <= {"atexit", "threading"}


def test_a_service_without_metrics_loads_no_observer() -> None:
    """`create_app` without `metrics` loads neither Prometheus nor OpenTelemetry."""
    loaded = modules_after(
        "from incidentkit import IncidentClient\n"
        "from incidentkit.http import create_app\n"
        "create_app(IncidentClient.open('sqlite+aiosqlite:///:memory:'))"
    )
    assert "incidentkit.http.app" in loaded
    assert "incidentkit.http.metrics" not in loaded
    assert packages(loaded).isdisjoint({"opentelemetry", "prometheus_client"})


def test_opening_sqlite_loads_only_what_it_uses(up_to_date_sqlite_url: str) -> None:
    """Opening an up-to-date SQLite file loads no Alembic, no PostgreSQL driver and no server."""
    loaded = modules_after(OPEN.format(url=up_to_date_sqlite_url))
    assert "incidentkit.client" in loaded
    unused = {"aiosqlite", "alembic", "asyncpg", "mako", "redis", "starlette", "uvicorn"}
    assert packages(loaded).isdisjoint(unused)


def test_an_app_loads_only_the_parts_that_it_is_asked_for() -> None:
    """`create_app` without further arguments loads nothing that reads tokens."""
    loaded = modules_after(
        "from incidentkit import IncidentClient\n"
        "from incidentkit.http import create_app\n"
        "create_app(IncidentClient.open('sqlite+aiosqlite:///:memory:'))"
    )
    assert "incidentkit.http.routes" in loaded
    unused = {"http.authentication", "http.browsers", "store.access_tokens"}
    assert loaded.isdisjoint(f"incidentkit.{name}" for name in unused)


def test_opening_sqlite_stays_near_the_floor(up_to_date_sqlite_url: str) -> None:
    """Opening an up-to-date SQLite file loads at most 15 other modules beyond the floor."""
    beyond = of_others(modules_after(OPEN.format(url=up_to_date_sqlite_url))) - modules_after(FLOOR)
    assert len(beyond) <= BEYOND_FLOOR, sorted(beyond)


def test_opening_postgresql_loads_only_what_it_uses(migrated_postgres_url: str) -> None:
    """Opening PostgreSQL with the current schema loads no Alembic and no SQLite driver."""
    loaded = modules_after(OPEN.format(url=migrated_postgres_url))
    assert "asyncpg" in loaded
    unused = {"aiosqlite", "alembic", "mako", "redis", "sqlite3", "starlette", "uvicorn"}
    assert packages(loaded).isdisjoint(unused)

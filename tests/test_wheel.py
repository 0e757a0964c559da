"""The distributions, and the wheel installed away from the checkout."""

from __future__ import annotations

from pathlib import Path

from incidentkit.store.schema import SCHEMA_REVISION
from tests.distributions import (
    DIST_INFO,
    ROOT,
    VERSION,
    Distributions,
    build,
    run_installed,
    unpacked,
)


def test_wheel_holds_the_package_and_its_migrations(distributions: Distributions) -> None:
    """The wheel holds every module, every migration and `py.typed`, and nothing else."""
    files = (path for path in (ROOT / "incidentkit").rglob("*") if path.is_file())
    sources = {
        path.relative_to(ROOT).as_posix() for path in files if path.parent.name != "__pycache__"
    }
    found = {name for name in distributions.wheel_files if not name.startswith(f"{DIST_INFO}/")}
    assert found == sources
    assert "incidentkit/py.typed" in found
    assert "incidentkit/store/migrations/origin.py" in found


def test_wheel_is_small_and_has_its_licenses(distributions: Distributions) -> None:
    """The wheel stays below 2 MB, with the licenses of the project and of Swagger UI."""
    assert distributions.wheel.stat().st_size < 2_000_000
    assert distributions.metadata["License-Expression"] == "MIT AND Apache-2.0"
    licenses = {
        name.removeprefix(f"{DIST_INFO}/licenses/")
        for name in distributions.wheel_files
        if name.startswith(f"{DIST_INFO}/licenses/")
    }
    ui = "incidentkit/http/swagger_ui"
    files = ("LICENSE", "NOTICE", "swagger-ui-bundle.js.LICENSE.txt")
    assert licenses == {"LICENSE", *(f"{ui}/{file}" for file in files)}


def test_sdist_holds_what_it_takes_to_build_and_test(distributions: Distributions) -> None:
    """The sdist holds the files needed to build and test the project, and no CI files."""
    needed = {"pyproject.toml", "README.md", "LICENSE", "alembic.ini", "noxfile.py"}
    needed |= {"incidentkit/py.typed", "migrations/env.py", "tests/conftest.py"}
    assert needed <= distributions.sdist_files
    assert not [name for name in distributions.sdist_files if name.startswith((".ci", ".github"))]


def test_sdist_builds_the_same_wheel(distributions: Distributions, tmp_path: Path) -> None:
    """A wheel built from the sdist equals, byte for byte, one built from the checkout."""
    source = unpacked(distributions.sdist, tmp_path)
    wheel = build(source, "wheel", tmp_path / "dist")
    assert Distributions(distributions.sdist, wheel).wheel_files == distributions.wheel_files


def test_extras_bring_what_their_names_say(distributions: Distributions) -> None:
    """Plain `incidentkit` has both databases; Redis, the service and its client are extras."""
    metadata = distributions.metadata
    assert metadata["Name"] == "incidentkit"
    assert metadata["Version"] == VERSION
    assert metadata["Requires-Python"] == ">=3.11"
    optional = ("metrics", "otel", "redis", "remote", "server")
    assert metadata.get_all("Provides-Extra") == ["all", *optional]
    required: dict[str, set[str]] = {}
    for line in metadata.get_all("Requires-Dist", []):
        requirement, _, extra = line.partition("; extra == ")
        name = requirement.replace("[", ">").partition(">")[0]
        required.setdefault(extra.strip("'\""), set()).add(name)
    assert {"sqlalchemy", "asyncpg", "alembic", "attrs", "cattrs"} <= required[""]
    assert required["redis"] == {"redis"}
    assert {"starlette", "uvicorn"} <= required["server"]
    assert required["metrics"] == {"prometheus-client"}
    assert required["otel"] == {"opentelemetry-api"}
    assert required["remote"] == {"httpx2"}
    extras = set().union(*(required[name] for name in optional))
    assert not required[""] & extras
    assert required["all"] == extras


IN_MEMORY = """
import asyncio, incidentkit
from incidentkit import IncidentClient

async def main():
    async with IncidentClient.open("sqlite+aiosqlite:///:memory:") as incidents:
        await incidents.create("Disk is full", source="monitoring")
        print(len(await incidents.list()))

asyncio.run(main())
print(incidentkit.__file__)
"""

IN_A_FILE = """
import asyncio
from incidentkit import IncidentClient
from incidentkit.store import migrate

async def main():
    for expected in (1, 2):
        async with IncidentClient.from_env() as incidents:
            await incidents.create("Disk is full", source="monitoring")
            assert len(await incidents.list()) == expected
    print(await migrate.current("sqlite+aiosqlite:///incidentkit.db"))

asyncio.run(main())
print(migrate.__file__)
"""


def test_wheel_works_in_memory(environment: Path, tmp_path: Path) -> None:
    """The installed wheel works in memory, without access to the checkout."""
    printed = run_installed(environment / "python", "-I", "-c", IN_MEMORY, cwd=tmp_path)
    count, file = printed.splitlines()
    assert count == "1"
    assert Path(file).is_relative_to(environment.parent)


def test_wheel_brings_its_migrations(environment: Path, tmp_path: Path) -> None:
    """A new SQLite file gets the newest schema from the migrations inside the wheel."""
    printed = run_installed(environment / "python", "-I", "-c", IN_A_FILE, cwd=tmp_path)
    revision, module = printed.splitlines()
    assert revision == SCHEMA_REVISION
    assert Path(module).is_relative_to(environment.parent)
    assert (tmp_path / "incidentkit.db").is_file()


def test_wheel_brings_the_command(environment: Path, tmp_path: Path) -> None:
    """The wheel installs a command that shows its version and upgrades a database."""
    command = environment / "incidentkit"
    python = environment / "python"
    assert VERSION in run_installed(command, "--version", cwd=tmp_path)
    assert VERSION in run_installed(python, "-I", "-m", "incidentkit", "--version", cwd=tmp_path)
    run_installed(command, "db", "upgrade", cwd=tmp_path)
    assert SCHEMA_REVISION in run_installed(command, "db", "current", cwd=tmp_path)

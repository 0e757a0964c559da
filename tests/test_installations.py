"""incidentkit in frozen programs, zip files and copies, and under `python -O`."""

from __future__ import annotations

import ast
import asyncio
import importlib
import os
import runpy
import shutil
import sqlite3
import subprocess
import sys
import zipfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2
import pytest

import incidentkit
from incidentkit.__pyinstaller import get_hook_dirs
from incidentkit.store import migrate
from incidentkit.store.schema import REVISIONS, SCHEMA_REVISION
from tests.distributions import ROOT, Distributions, run, run_installed
from tests.programs import service
from tests.test_docs import fences

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.unmeasured

BUILD_TIMEOUT = 600
"""Seconds for PyInstaller, which takes about half a minute on an idle machine."""

NOT_OURS = ("matplotlib", "numpy", "PIL", "psycopg", "pytest", "setuptools")
"""Packages that only the test environment has, and that PyInstaller would collect."""

IN_MEMORY = """
import asyncio, sys
import incidentkit

async def main():
    async with incidentkit.IncidentClient.open("sqlite+aiosqlite:///:memory:") as incidents:
        await incidents.create("Disk is full", source="monitoring")
        found = await incidents.search(text="disk")
        print(len(await incidents.list()), len(found.incidents))

asyncio.run(main())
print(incidentkit.__file__)
"""


def path_of(sqlite_url: str) -> Path:
    """Return the path of the file that a URL names."""
    return Path(sqlite_url.partition(":///")[2])


def revision_of(sqlite_url: str) -> str:
    """Return the revision of an SQLite file, read without incidentkit."""
    with closing(sqlite3.connect(path_of(sqlite_url))) as file:
        ((revision,),) = file.execute("SELECT version_num FROM incidentkit_version")
    return str(revision)


# Frozen


def frozen(environment: Path, name: str, folder: Path) -> Path:
    """Build a program of the page with its command, and return the program."""
    page = "docs/how-to/freeze.md"
    (program,) = [fence for fence in fences(page, "python") if fence.file == name]
    (folder / name).write_text(program.text, "utf-8")
    command = f"python -m PyInstaller --noconfirm {name}"
    assert command in (line for fence in fences(page, "bash") for line in fence.text.splitlines())
    excluded = [f"--exclude-module={package}" for package in NOT_OURS]
    arguments = [*command.split()[1:], "--log-level=ERROR", *excluded]
    run_installed(environment / "python", *arguments, cwd=folder, timeout=BUILD_TIMEOUT)
    # The program stands alone: its sources and the environment are elsewhere.
    stem = name.removesuffix(".py")
    shutil.move(folder / "dist" / stem, folder / "program")
    return folder / "program" / stem


@pytest.mark.frozen
def test_a_frozen_application(
    environment: Path, tmp_path: Path, sqlite_url: str, migrated_postgres_url: str
) -> None:
    """An application that PyInstaller froze uses a new file, an outdated one, and PostgreSQL."""
    program = frozen(environment, "app.py", tmp_path)
    outdated_url = f"{sqlite_url}.outdated"
    asyncio.run(migrate.upgrade(outdated_url, REVISIONS[0]))
    with closing(sqlite3.connect(path_of(outdated_url))) as file, file:
        file.execute('INSERT INTO "Incident" (incident_message) VALUES (?)', ["A disk of old"])
    for url, count in ((sqlite_url, 1), (outdated_url, 2), (migrated_postgres_url, 1)):
        printed = run(program, cwd=tmp_path, env={"INCIDENTKIT_DATABASE_URL": url})
        assert printed == f"{count} incidents, {count} about a disk\n"
    assert revision_of(sqlite_url) == revision_of(outdated_url) == SCHEMA_REVISION


@pytest.mark.frozen
def test_a_frozen_command_line(environment: Path, tmp_path: Path, empty_postgres_url: str) -> None:
    """A frozen command line migrates PostgreSQL, and serves with several workers and Swagger UI."""
    program = frozen(environment, "incidents.py", tmp_path)
    env = {"INCIDENTKIT_DATABASE_URL": empty_postgres_url}
    assert SCHEMA_REVISION in run(program, "db", "upgrade", cwd=tmp_path, env=env)
    run(program, "create", "Disk is full", "--source", "monitoring", cwd=tmp_path, env=env)
    assert "Disk is full" in run(program, "list", cwd=tmp_path, env=env)
    log = tmp_path / "service.log"
    arguments = ("serve", "--port", "0", "--workers", "2")
    with service(log, *arguments, executable=program, program=(), env=env) as running:
        for path in ("/openapi.json", "/docs/swagger-ui.css", "/health/ready"):
            assert httpx2.get(f"{running.url}{path}").status_code == 200


def faces() -> set[str]:
    """Return the modules that the package's lazy faces load by name."""
    found: set[str] = set()
    for file in (ROOT / "incidentkit").rglob("__init__.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "face":
                found |= ast.literal_eval(node.args[1]).keys()
    return found


def test_the_hook_names_every_module_that_is_loaded_by_name() -> None:
    """PyInstaller is told every module behind a lazy face, and the driver of a host's engine."""
    (folder,) = get_hook_dirs()
    hidden = runpy.run_path(f"{folder}/hook-incidentkit.py")["hiddenimports"]
    assert {"incidentkit.client", "incidentkit.store.backends.sqlite"} <= faces()
    program = runpy.run_path(f"{folder}/hook-incidentkit.cli.py")["hiddenimports"]
    kit = {name for name in faces() if name.startswith("incidentkit.testing.")}
    of_library = faces() - set(program) - kit
    assert of_library | {"incidentkit.store.migrations.origin", "aiosqlite"} <= set(hidden)
    assert not [
        name
        for name in hidden
        if name.startswith(("incidentkit.cli.", "incidentkit.http.", "incidentkit.integrations."))
    ]


# Zip files


def test_the_wheel_is_importable_as_a_zip_file(distributions: Distributions) -> None:
    """The wheel on `sys.path` works as it is, migrations included."""
    place = f"import sys; sys.path.insert(0, {str(distributions.wheel)!r})\n"
    count, file = run(sys.executable, "-P", "-c", place + IN_MEMORY, cwd=Path.cwd()).splitlines()
    assert count == "1 1"
    assert file.startswith(str(distributions.wheel))


@pytest.mark.parametrize("url", ["sqlite+aiosqlite:///:memory:", "postgresql://localhost/nowhere"])
def test_a_driver_in_a_zip_file_is_named(url: str, tmp_path: Path) -> None:
    """A compiled module that a zip file cannot hold is named in an error of the tree."""
    folder = Path(str(importlib.import_module("asyncpg").__file__)).parent
    with zipfile.ZipFile(tmp_path / "asyncpg.zip", "w") as archive:
        for file in folder.rglob("*.py"):
            archive.write(file, file.relative_to(folder.parent))
    place = f"import sys; sys.path.insert(0, {str(tmp_path / 'asyncpg.zip')!r})\n"
    error = failure(place + OPEN.format(url=url), ROOT)
    assert error.startswith("incidentkit.domain.errors.StoreError: ")
    assert "No module named 'asyncpg.protocol" in error


# Copies

OPEN = """
import asyncio
import incidentkit

async def main():
    async with incidentkit.IncidentClient.open({url!r}):
        print("open")

asyncio.run(main())
"""

HOSTS_ENV = "from pathlib import Path\nPath('the-hosts-migrations-ran').touch()\n"


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """The folder of a host that has a copy of the package beside its own Alembic scripts."""
    folder = tmp_path / "host"
    versions = folder / "migrations" / "versions"
    versions.mkdir(parents=True)
    (folder / "migrations" / "env.py").write_text(HOSTS_ENV, "utf-8")
    (versions / "0001_first.py").write_text("revision = '0001'\ndown_revision = None\n", "utf-8")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "incidentkit", folder / "incidentkit", ignore=ignored)
    return folder


def started(code: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run code in a folder, which comes first on its path."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def failure(code: str, folder: Path, *flags: str) -> str:
    """Run code that must fail, and return the last line of its traceback."""
    process = started(code, folder, *flags)
    assert process.returncode == 1, process.stdout
    return process.stderr.splitlines()[-1]


def test_a_copy_runs_only_its_own_migrations(host: Path, sqlite_url: str) -> None:
    """A copy of the package creates its schema, and leaves Alembic scripts beside it alone."""
    asyncio.run(migrate.upgrade(sqlite_url, REVISIONS[0]))
    process = started(OPEN.format(url=sqlite_url) + "print(incidentkit.__file__)", host)
    assert process.stdout.split() == ["open", str(host / "incidentkit" / "__init__.py")]
    assert revision_of(sqlite_url) == SCHEMA_REVISION
    assert not (host / "the-hosts-migrations-ran").exists()


def nothing(migrations: Path) -> None:
    """Leave the folder out."""
    shutil.rmtree(migrations)


def an_empty_folder(migrations: Path) -> None:
    """Leave the modules out, but not the folder."""
    shutil.rmtree(migrations)
    migrations.mkdir()


def one_less(migrations: Path) -> None:
    """Leave one module out."""
    (migrations / "origin.py").unlink()


@pytest.mark.parametrize("left", [nothing, an_empty_folder, one_less])
def test_missing_migrations_are_named(
    host: Path, sqlite_url: str, left: Callable[[Path], None]
) -> None:
    """Without the migrations an outdated file stays as it is; a current one needs none of them."""
    asyncio.run(migrate.upgrade(sqlite_url, REVISIONS[0]))
    left(host / "incidentkit" / "store" / "migrations")
    error = failure(OPEN.format(url=sqlite_url), host)
    assert error.startswith("incidentkit.domain.errors.StoreError: ")
    assert "the migrations are not in this installation" in error
    assert "incidentkit.store.migrations" in error
    assert revision_of(sqlite_url) == REVISIONS[0]
    assert not (host / "the-hosts-migrations-ran").exists()
    asyncio.run(migrate.upgrade(sqlite_url))
    assert started(OPEN.format(url=sqlite_url), host).stdout == "open\n"


def test_a_copy_inside_another_package_is_refused(host: Path) -> None:
    """A copy under another name does not import; the error names the package that it lacks."""
    (host / "vendor").mkdir()
    shutil.move(host / "incidentkit", host / "vendor" / "incidentkit")
    # -S hides an installed incidentkit.
    error = failure("from vendor.incidentkit import IncidentClient", host, "-S")
    assert error == "ModuleNotFoundError: No module named 'incidentkit'"


# Optimized

EVERYTHING = """
import asyncio, datetime, json, sys
from incidentkit import IncidentClient, IncidentKitError, NewIncident
from incidentkit.http.openapi import document
from incidentkit.http.routes import OPERATIONS
from incidentkit.store import migrate

url = sys.argv[1]


async def refused(work):
    try:
        await work
    except IncidentKitError as error:
        print(type(error), error)
    else:
        print("not refused")


async def main():
    await migrate.upgrade(url)
    await refused(migrate.upgrade(url, "@"))
    await refused(migrate.upgrade(url, "head+1"))
    async with IncidentClient.open(url) as incidents:
        await incidents.create("Disk is full", source="monitoring", dedup_key="disk")
        again = await incidents.create("Disk is full", source="monitoring", dedup_key="disk")
        print(again.occurrences)
        await refused(incidents.create("", source="nobody"))
        await refused(incidents.get(0))
        await refused(incidents.get(99))
        line = await incidents.create("Line is down", source="operator", idempotency_key="k")
        await refused(incidents.create("Line is up", source="operator", idempotency_key="k"))
        await incidents.create_many([NewIncident(f"Part {n}", "partner") for n in "ABC"])
        await incidents.update_status(line.incident_id, "completed", expected_version=1)
        await refused(incidents.update_status(line.incident_id, "failed", expected_version=1))
        await incidents.note(line.incident_id, "The line is back")
        print([event.kind for event in await incidents.history(line.incident_id)])
        print([incident.incident_id for incident in await incidents.list()])
        page = await incidents.search(text="disk", total=True)
        print(len(page.incidents), page.total)
        async for event in incidents.changes():
            print(event.kind)
            if event.kind == "noted":
                break
        await refused(incidents.read_changes("nonsense"))
        later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
        print(await incidents.purge(later))
    await migrate.downgrade(url, "-1")
    await migrate.upgrade(url)
    print(await migrate.current(url))
    print(json.dumps(document(OPERATIONS)))

asyncio.run(main())
"""


def test_optimization_changes_nothing(
    sqlite_url: str, empty_postgres_url: str, migrated_postgres_url: str, tmp_path: Path
) -> None:
    """With -O and -OO, verbs, errors, migrations and the OpenAPI document are the same."""

    def printed(url: str, *flags: str) -> str:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return run(sys.executable, *flags, "-c", EVERYTHING, url, cwd=tmp_path, env=env)

    on_sqlite = printed(sqlite_url)
    assert "not refused" not in on_sqlite
    assert printed(f"{sqlite_url}.O", "-O") == on_sqlite
    assert printed(f"{sqlite_url}.OO", "-OO") == on_sqlite
    assert printed(empty_postgres_url, "-OO") == printed(migrated_postgres_url)


def test_no_check_is_an_assertion() -> None:
    """Nothing but the kit for tests has to do with assertions, which `python -O` leaves out."""
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in [*Path(incidentkit.__file__).parent.rglob("*.py"), ROOT / "migrations/env.py"]
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Assert)
        or (isinstance(node, ast.Name) and node.id == "__debug__")
        or (
            isinstance(node, ast.Name)
            and node.id == "AssertionError"
            and "testing" not in file.parts
        )
    ]
    assert found == []

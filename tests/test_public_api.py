"""What `import incidentkit` exports, and what it does not load."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Literal, get_origin

import pytest

import incidentkit
import incidentkit.store
import incidentkit.testing
from incidentkit import IncidentKitError

DRIVERS_AND_SERVERS = [
    "aiosqlite",
    "alembic",
    "asyncpg",
    "click",
    "dotenv",
    "pydantic",
    "redis",
    "sqlalchemy",
    "starlette",
    "uvicorn",
]

# A finder that runs before all others and hides the named packages.
WITHOUT = """
import sys


class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Without())
"""


def run_python(code: str, *, without: tuple[str, ...] = ()) -> str:
    """Run the code in a new interpreter that lacks some packages; return what it prints."""
    found = Path(incidentkit.__file__).parent.parent
    prelude = f"import sys; sys.path.insert(0, {str(found)!r})\n"
    process = subprocess.run(
        [sys.executable, "-c", prelude + WITHOUT.format(packages=without) + code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.parametrize("package", [incidentkit, incidentkit.store, incidentkit.testing])
def test_a_lazy_face_has_the_names_that_type_checkers_see(package: ModuleType) -> None:
    """`__all__` lists, in order, the names that the package declares to type checkers and loads."""
    tree = ast.parse(Path(package.__file__ or "").read_text())
    (choice,) = (node for node in tree.body if isinstance(node, ast.If))
    declared = {
        alias.name
        for node in choice.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert package.__all__ == sorted(declared)
    assert {name for name in dir(package) if not name.startswith("__")} == declared - {
        "__version__"
    }
    for name in declared:
        assert getattr(package, name).__class__ is not ModuleType
    with pytest.raises(AttributeError, match="has no attribute 'unheard_of'"):
        package.unheard_of  # noqa: B018


def test_every_error_is_public() -> None:
    """Every error class can be imported from `incidentkit`."""

    def walk(error: type[Exception]) -> set[str]:
        below = [child for child in error.__subclasses__() if child.__module__ == error.__module__]
        return {error.__name__}.union(*map(walk, below))

    assert walk(IncidentKitError) <= set(incidentkit.__all__)


@pytest.mark.parametrize(
    "name",
    [
        each
        for each in incidentkit.__all__
        # The description of an alias is in the source alone.
        if each != "__version__" and get_origin(getattr(incidentkit, each)) is not Literal
    ],
)
def test_everything_public_is_documented(name: str) -> None:
    """Each public name and each of its public methods has a docstring."""
    thing = getattr(incidentkit, name)
    undocumented = [
        f"{name}.{attribute}"
        for attribute, value in vars(thing).items()
        if not attribute.startswith("_")
        and (inspect.isroutine(value) or isinstance(value, property))
        and not inspect.getdoc(value)
    ]
    assert thing.__doc__
    assert undocumented == []


def test_import_is_light() -> None:
    """Importing the client loads no driver, no server, and nothing of the command line."""
    loaded: list[str] = json.loads(
        run_python(
            "import json; from incidentkit import IncidentClient; "
            "print(json.dumps(sorted(sys.modules)))"
        )
    )
    assert "incidentkit.client" in loaded
    assert {name.partition(".")[0] for name in loaded}.isdisjoint(DRIVERS_AND_SERVERS)
    parts = {
        "http",
        "cli",
        "settings",
        "cache.redis",
        "store.sqlite",
        "store.postgresql",
        "store.backends.sqlite",
    }
    assert {f"incidentkit.{part}" for part in parts}.isdisjoint(loaded)


def test_core_does_without_every_optional_package() -> None:
    """With no extra installed, incidents are created, listed and cached on SQLite."""
    code = """
import asyncio
from incidentkit import IncidentClient

async def main():
    async with IncidentClient.from_env() as incidents:
        incident = await incidents.create("Disk is full", source="monitoring")
        assert await incidents.list() == await incidents.list() == [incident]
        print(incident.incident_id)

asyncio.run(main())
"""
    packages = ("redis", "starlette", "uvicorn")
    assert run_python(code, without=packages) == "1\n"


@pytest.mark.parametrize(
    ("package", "extra", "use"),
    [
        ("redis", "redis", "incidentkit.IncidentClient.open(redis_url='redis://cache')"),
        ("redis", "redis", "incidentkit.IncidentClient.from_env()"),
        ("starlette", "server", "import incidentkit.http"),
        ("starlette", "server", "from incidentkit.http import create_app"),
        ("starlette", "server", "import incidentkit.http.asgi"),
    ],
)
def test_missing_package_is_named_with_its_extra(
    package: str, extra: str, use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Using a part whose package is missing raises an error that says what to install."""
    monkeypatch.setenv("REDIS_HOST", "cache")
    code = f"""
import incidentkit
try:
    {use}
except incidentkit.MissingDependency as error:
    print(error.package, error.extra)
    print(error)
"""
    assert run_python(code, without=(package,)).splitlines() == [
        f"{package} {extra}",
        f"{package} is not installed: pip install 'incidentkit[{extra}]'",
    ]


@pytest.mark.parametrize(
    ("package", "use"),
    [
        ("redis.backoff", "incidentkit.IncidentClient.open(redis_url='redis://cache')"),
        ("anyio", "import incidentkit.http"),
    ],
)
def test_fault_inside_an_installed_package_is_not_taken_for_a_missing_one(
    package: str, use: str
) -> None:
    """An import that fails inside an installed package raises its own error."""
    code = f"""
import incidentkit
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == {package!r}:
            raise ModuleNotFoundError("broken", name=name)

sys.meta_path.insert(0, Broken())
try:
    {use}
except incidentkit.MissingDependency:
    print("blamed the wrong package")
except ModuleNotFoundError as error:
    print(error.name)
"""
    assert run_python(code) == f"{package}\n"

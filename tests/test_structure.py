"""The plan of the package holds: no import circles, few imports in functions, short paths."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import incidentkit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PACKAGE: Final = Path(incidentkit.__file__).parent

CHOOSERS: Final[dict[str, str]] = {
    "incidentkit.cache.opening": "imports the cache that a URL names, so that redis stays optional",
    "incidentkit.cli.loading": "loads the server, which only `serve` needs",
    "incidentkit.opening": "loads the session, the settings and the migrations when they are used",
}
"""Modules that may import inside functions, each with its reason."""

IMPORTS_IN_FUNCTIONS: Final = 6
MOVES: Final = 20
FILES: Final = 10

COUNT_MOVES: Final = """\
import asyncio, json, sys, threading
from pathlib import Path

import incidentkit

package = str(Path(incidentkit.__file__).parent) + "/"
visited = []
recording = False


def on_event(frame, event, argument):
    file = frame.f_code.co_filename
    if recording and event == "call" and file.startswith(package):
        visited.append(file.removeprefix(package))


async def main():
    global recording
    async with incidentkit.IncidentClient.open(sys.argv[1]) as incidents:
        await incidents.create("Disk is full", source="monitoring")
        recording = True
        await incidents.create("Disk is full again", source="monitoring")
        recording = False


threading.setprofile(on_event)
sys.setprofile(on_event)
asyncio.run(main())
sys.setprofile(None)
print(json.dumps(visited))
"""
"""Prints the package's files in the order in which functions in them are called or resumed.

The hook is set before the client opens, because a thread takes the hook that is set when it starts.
"""


def modules(package: Path) -> dict[str, Path]:
    """Return the files of a package by module name."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(tree: ast.AST, module: str, file: Path) -> Iterator[str]:
    """Yield every name that is imported anywhere below a node, dotted in full."""
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def import_graph(package: Path) -> dict[str, set[str]]:
    """Return the modules of a package that each of its modules imports, wherever it does so.

    Imports in functions and under `TYPE_CHECKING` count like those at module level. An import of a
    name counts for the module that the name is, or else for the module that it is taken from.
    """
    files = modules(package)
    graph: dict[str, set[str]] = {}
    for module, file in files.items():
        names = imports(ast.parse(file.read_text("utf-8")), module, file)
        targets = {name if name in files else name.rpartition(".")[0] for name in names}
        graph[module] = (targets & files.keys()) - {module}
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other, directly or through others."""

    def reachable(module: str) -> set[str]:
        found: set[str] = set()
        ahead = [module]
        while ahead:
            new = graph[ahead.pop()] - found
            found |= new
            ahead += new
        return found

    reach = {module: reachable(module) for module in graph}
    groups = {
        tuple(sorted(other for other in reach[module] if module in reach[other]))
        for module in graph
        if module in reach[module]
    }
    return [list(group) for group in sorted(groups)]


def imports_in_functions(package: Path) -> list[str]:
    """Return the module of every import statement that stands inside a function."""
    return [
        module
        for module, file in modules(package).items()
        for statement in _statements_in_functions(ast.parse(file.read_text("utf-8")))
        if isinstance(statement, ast.Import | ast.ImportFrom)
    ]


def _statements_in_functions(tree: ast.AST) -> set[ast.AST]:
    return {
        statement
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for statement in ast.walk(function)
    }


def test_no_module_imports_itself_through_others() -> None:
    """The package has no import circle, with every import counted."""
    assert circles(import_graph(PACKAGE)) == []


def test_circles_are_found_wherever_an_import_stands(tmp_path: Path) -> None:
    """Imports in functions, under `TYPE_CHECKING` and relative ones close a circle too."""
    package = tmp_path / "sample"
    package.mkdir()
    sources = {
        "__init__": "from sample.one import first",
        "one": "def first():\n    import sample.two",
        "two": "if TYPE_CHECKING:\n    from sample import three",
        "three": "from .one import first",
        "four": "from sample import one, four",
    }
    for name, source in sources.items():
        (package / f"{name}.py").write_text(source, "utf-8")
    assert circles(import_graph(package)) == [["sample.one", "sample.three", "sample.two"]]


def test_functions_import_only_where_a_choice_is_made() -> None:
    """At most six imports stand inside functions, each in a module listed with its reason."""
    found = imports_in_functions(PACKAGE)
    assert len(found) <= IMPORTS_IN_FUNCTIONS, found
    assert set(found) == set(CHOOSERS)


def test_a_create_moves_between_few_files(sqlite_url: str) -> None:
    """A create on an open SQLite client visits at most 10 files in at most 20 stretches."""
    process = subprocess.run(
        [sys.executable, "-P", "-c", COUNT_MOVES, sqlite_url],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    visited: list[str] = json.loads(process.stdout)
    stretches = [
        file for place, file in enumerate(visited) if place == 0 or visited[place - 1] != file
    ]
    assert visited
    assert len(stretches) <= MOVES, stretches
    assert len(set(stretches)) <= FILES, sorted(set(stretches))

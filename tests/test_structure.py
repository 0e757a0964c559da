"""The plan of the package holds, and its pictures show it.

There are no import circles, few imports in functions, and short paths.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Final
from xml.etree import ElementTree as ET

import pytest

import incidentkit

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from xml.etree.ElementTree import Element

PACKAGE: Final = Path(incidentkit.__file__).parent
DOCS: Final = Path(__file__).resolve().parent.parent / "docs"
SVG: Final = "{http://www.w3.org/2000/svg}"

CHOOSERS: Final[dict[str, str]] = {
    "incidentkit.cache.opening": "imports the cache that a URL names, so that redis stays optional",
    "incidentkit.cli.loading": "loads the server, which only `serve` needs",
    "incidentkit.cli.metrics": "loads Prometheus, which only `serve --metrics` needs",
    "incidentkit.domain.plain": "loads Pydantic's schema of a model when Pydantic asks for it",
    "incidentkit.http.parts": "loads the parts of the service that an argument asks for",
    "incidentkit.opening": "loads the session, the settings and the migrations when they are used",
}
"""Modules that may import inside functions, each with its reason."""

IMPORTS_IN_FUNCTIONS: Final = 10
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
    """Return the files of a package by module name, without the hooks that PyInstaller runs."""
    found = {}
    files = (file for file in package.rglob("*.py") if file.parent.name != "__pyinstaller")
    for file in sorted(files):
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
    """At most ten imports stand inside functions, each in a module listed with its reason."""
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


class Box:
    """A rectangle of the plan.

    Attributes:
        names: The modules and packages that it stands for.
    """

    def __init__(self, rect: Element) -> None:
        self.names = rect.attrib["data-modules"].split()
        self.left, self.top, width, height = (
            float(rect.attrib[name]) for name in ("x", "y", "width", "height")
        )
        self.right, self.bottom = self.left + width, self.top + height

    def has(self, x: float, y: float, *, reach: float = 0) -> bool:
        """Return whether a point is in the rectangle, or within reach of it."""
        return (
            self.left - reach <= x <= self.right + reach
            and self.top - reach <= y <= self.bottom + reach
        )


def boxes(plan: Element) -> list[Box]:
    """Return the boxes of the plan."""
    return [Box(rect) for rect in plan.iter(f"{SVG}rect") if "data-modules" in rect.attrib]


def box_of(module: str, drawn: Iterable[Box]) -> Box | None:
    """Return the box of a module: its own, or else that of the nearest package around it.

    The box of the whole package is for its face alone.
    """
    homes = {name: box for box in drawn for name in box.names}
    while module not in homes and module.count(".") > 1:
        module = module.rpartition(".")[0]
    return homes.get(module)


def ends(arrow: Element) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the first and the last point of an arrow, whose lines are all upright or level."""
    x, y = 0.0, 0.0
    points = []
    for command, numbers in re.findall(r"([MVH])([-\d. ]+)", arrow.attrib["d"]):
        values = [float(number) for number in numbers.split()]
        x = values[0] if command in "MH" else x
        y = values[-1] if command in "MV" else y
        points.append((x, y))
    return points[0], points[-1]


@pytest.fixture(scope="module")
def plan() -> Element:
    """The picture of the plan of the package."""
    return ET.parse(DOCS / "explanation" / "plan.svg").getroot()


def test_every_module_has_a_box_in_the_plan(plan: Element) -> None:
    """Each module lies in exactly one box of the plan, and the plan has no other module."""
    drawn = boxes(plan)
    names = [name for box in drawn for name in box.names]
    existing = modules(PACKAGE)
    assert len(names) == len(set(names))
    assert set(names) <= existing.keys()
    assert [module for module in existing if box_of(module, drawn) is None] == []


def test_a_box_of_the_plan_shows_its_names(plan: Element) -> None:
    """The last part of each module's name stands in its box."""
    words = [
        (float(text.attrib["x"]), float(text.attrib["y"]), set(re.findall(r"\w+", text.text or "")))
        for text in plan.iter(f"{SVG}text")
    ]
    for box in boxes(plan):
        shown = {word for x, y, found in words if box.has(x, y) for word in found}
        assert {name.rpartition(".")[2] for name in box.names} <= shown


def test_imports_point_down_in_the_plan(plan: Element) -> None:
    """Every import stays in its box or goes to a box further down, but for one lazy face."""
    drawn = boxes(plan)
    upwards = []
    for module, targets in import_graph(PACKAGE).items():
        source = box_of(module, drawn)
        assert source is not None
        for target in targets:
            aim = box_of(target, drawn)
            assert aim is not None
            if aim is not source and aim.top <= source.top:
                upwards.append((module, target))
    assert upwards == [("incidentkit.store", "incidentkit.opening")]


def test_the_arrows_of_the_plan_are_imports(plan: Element) -> None:
    """Each arrow leads from the box of one module to the box of another that it imports."""
    graph = import_graph(PACKAGE)
    drawn = boxes(plan)
    arrows = [path for path in plan.iter(f"{SVG}path") if "data-import" in path.attrib]
    assert arrows
    for arrow in arrows:
        source, target = arrow.attrib["data-import"].split()
        importing = [module for module in graph if box_of(module, drawn) is box_of(source, drawn)]
        imported = {name for module in importing for name in graph[module]}
        assert any(box_of(name, drawn) is box_of(target, drawn) for name in imported), source
        for name, point in zip((source, target), ends(arrow), strict=True):
            box = box_of(name, drawn)
            assert box is not None
            assert box.has(*point, reach=2), (source, target)


def test_the_rows_of_the_plan_are_the_layers_of_the_contracts(plan: Element) -> None:
    """The plan shows the layers that import-linter checks, in their order."""
    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text("utf-8"))
    layers = {
        contract["containers"][0]: contract["layers"]
        for contract in project["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers"
    }
    expected = [{"incidentkit"}]
    for layer in layers["incidentkit"]:
        expected.append({f"incidentkit.{name}" for name in layer.split(" | ")})
        if layer == "store":
            expected += [
                {f"incidentkit.store.{name}" for name in inner.split(" | ")}
                for inner in layers["incidentkit.store"]
            ]
    shown: dict[float, set[str]] = {}
    for box in boxes(plan):
        shown.setdefault(box.top, set()).update(box.names)
    rows = [names - {"incidentkit.__main__"} for _, names in sorted(shown.items())]
    assert rows == expected


def test_the_classes_in_the_flow_exist() -> None:
    """Each class that the picture of a call names is a class of the package."""
    existing = {
        node.name
        for file in modules(PACKAGE).values()
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    flow = ET.parse(DOCS / "explanation" / "flow.svg").getroot()
    texts = [(text, text.text or "") for text in flow.iter(f"{SVG}text")]
    shown = {word for _, text in texts for word in re.findall(r"\b(?:[A-Z][a-z]+){2,}\b", text)}
    shown |= {label for text, label in texts if "name" in text.attrib.get("class", "")}
    assert {"Store", "Records", "IncidentClient"} <= shown
    assert shown <= existing


def test_the_store_inherits_one_level_deep() -> None:
    """No class of the store has a base class of incidentkit that has another such base class."""
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for file in (PACKAGE / "store").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    deep = {
        name
        for name, own in bases.items()
        if any(bases.get(base, set()) & bases.keys() for base in own)
    }
    assert "Store" in bases
    assert deep == set()


def test_modules_are_loaded_by_name_only_by_lazy_faces() -> None:
    """No import hides in a call: only lazy faces load modules by name."""
    calls = {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Name) and node.id in {"__import__", "import_module"}
    }
    assert calls == {"lazy.py"}

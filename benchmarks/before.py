"""Compares the code with another checkout of it, side by side in one run.

`nox -s bench -- before --base BASE` measures each row in interleaved rounds, the checkout that it
is started from against BASE: a folder, or a git revision. A ratio above 1 means that the new code
is faster, or needs less. A row counts as slower if its median ratio is below 0.95 and its upper
quartile below 1.

Both sides run in the same Python environment, each from its own folder, and only their commands and
public names are used. PostgreSQL does not sync to the disk here: the disk is the same for both, and
its noise would hide a difference between them.
"""

from __future__ import annotations

import asyncio
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tarfile
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import asyncpg
from attrs import asdict, field, frozen

from benchmarks import results, services
from benchmarks.databases import create_database, fill, fill_sqlite
from benchmarks.rounds import Round, interleave, one_core
from tests.servers import PostgresServer, RedisServer

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence

    from benchmarks.services import Service

SLOWER_MEDIAN: Final = 0.95
SLOWER_QUARTILE: Final = 1.0

ON_POSTGRESQL: Final = {
    "HTTP: list, cached": "list_cached",
    "HTTP: list, not cached": "list_uncached",
    "HTTP: get": "get",
    "HTTP: create": "create",
    "HTTP: update-status": "update",
    "HTTP: 95 % list, 5 % update-status": "mixed",
}
ON_SQLITE: Final = {
    "HTTP on SQLite: list, cached": "list_cached",
    "HTTP on SQLite: create": "create",
}
"""Scenarios of the load, by row."""

ALONE: Final = {
    "in process: get, 1 caller": ("get", 1),
    "in process: create, 1 caller": ("create", 1),
    "in process: list, cached": ("list", 1),
    "in process: search, first page": ("search", 1),
    "in process: NewIncident(...)": ("construct", 1),
}
TOGETHER: Final = {
    "in process: create, 32 callers": ("create", 32),
    "in process: create_many": ("create_many", None),
}
"""Calls of the SDK and how many callers make them, by row."""

WALL: Final = "wall time"
CPU: Final = "CPU time"
MEMORY: Final = "peak memory"
OTHERS: Final = "modules of others"
MODULES: Final = "modules"
OPENING: Final = (WALL, CPU, MEMORY, OTHERS)
UNITS: Final = {WALL: "ms", CPU: "ms", MEMORY: "MiB", OTHERS: "modules", MODULES: "modules"}

PROBE: Final = """\
import sys, time
before, cpu, wall = set(sys.modules), time.process_time(), time.perf_counter()

def report():
    times = (time.perf_counter() - wall) * 1000, (time.process_time() - cpu) * 1000
    loaded = set(sys.modules) - before
    import json
    with open("/proc/self/status", encoding="ascii") as status:
        memory = int(status.read().partition("VmHWM:")[2].split()[0]) / 1024
    others = [name for name in loaded if name.partition(".")[0] != "incidentkit"]
    print(json.dumps([*times, memory, len(others), len(loaded)]))

"""
"""Reports the costs of the code that follows it, without the start of Python."""

OPEN: Final = """\
import asyncio
from incidentkit import IncidentClient

async def main():
    async with IncidentClient.open({url!r}):
        report()

asyncio.run(main())
"""

IMPORTS: Final = ("import incidentkit", "from incidentkit import IncidentClient")

COLUMNS: Final = ("row", "unit", "new", "old", "ratio", "quartiles", "")
LINE: Final = "{:<56} {:>11} {:>10} {:>10} {:>6} {:>13}  {}"


class BaseError(RuntimeError):
    """The other checkout cannot be used."""


@frozen
class Checkout:
    """One side: a folder that holds incidentkit.

    Attributes:
        name: `new` or `old`.
        folder: The folder.
        bytecode: Where Python caches bytecode, so that a checkout is never written to.
    """

    name: str
    folder: Path
    bytecode: Path

    @property
    def environment(self) -> dict[str, str]:
        """The environment of this side's programs."""
        inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        return inherited | {
            "PYTHONPATH": str(self.folder),
            "PYTHONPYCACHEPREFIX": str(self.bytecode),
        }

    async def start(self, *arguments: str, stdin: int | None = None) -> Process:
        """Start Python so that it imports incidentkit from this checkout."""
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", *arguments),
            cwd=self.folder,
            env=self.environment,
            stdin=stdin,
            stdout=subprocess.PIPE,
        )

    async def run(self, *arguments: str) -> str:
        """Run Python to its end and return its output."""
        process = await self.start(*arguments)
        output, _ = await process.communicate()
        if process.returncode:
            raise BaseError(f"{self.name}: python {arguments[:3]} ended with {process.returncode}")
        return output.decode()

    async def upgrade(self, database: str) -> None:
        """Bring a database to this side's schema."""
        await self.run("-m", "incidentkit", "db", "upgrade", "--database-url", database)

    async def probe(self, code: str) -> Round:
        """Run code that calls `report()`, in a new interpreter, and return its costs."""
        costs = json.loads(await self.run("-c", PROBE + code))
        return Round(1000 / costs[0], {}, costs=dict(zip(UNITS, costs, strict=True)))


class Caller:
    """A process that makes calls of one side's SDK."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def read(self) -> Any:
        """Return the next answer."""
        assert self._process.stdout is not None  # noqa: S101
        line = await self._process.stdout.readline()
        if not line:
            raise BaseError("the process that makes the calls ended")
        return json.loads(line)

    async def measure(self, call: str, callers: int, seconds: float) -> Round:
        """Make calls for some seconds, and return their rate."""
        assert self._process.stdin is not None  # noqa: S101
        self._process.stdin.write(json.dumps([call, callers, seconds]).encode() + b"\n")
        await self._process.stdin.drain()
        return Round(await self.read(), {})


@asynccontextmanager
async def calling(checkout: Checkout, database: str, incidents: int) -> AsyncIterator[Caller]:
    """Run :mod:`benchmarks.side` on a checkout, and make sure that it imported from there."""
    process = await checkout.start(
        *(str(Path(__file__).with_name("side.py")), database, str(incidents)),
        stdin=subprocess.PIPE,
    )
    try:
        caller = Caller(process)
        imported = Path(await caller.read())
        if not imported.is_relative_to(checkout.folder):
            raise BaseError(f"{checkout.name} imported {imported}, outside of {checkout.folder}")
        yield caller
    finally:
        if process.stdin is not None:
            process.stdin.close()
        await process.wait()


def _divide(this: float, that: float) -> float:
    """Return a ratio; what a short run does not use, the clock of a process cannot tell."""
    return this / that if that else math.inf if this else 1.0


@frozen
class Row:
    """One comparison.

    Attributes:
        name: The name of the comparison.
        unit: The unit of the figures.
        new: The figures of the new side, round by round.
        old: The figures of the old side.
    """

    name: str
    unit: str
    new: Sequence[float]
    old: Sequence[float]

    @property
    def ratios(self) -> list[float]:
        """The ratios round by round: new to old of rates, old to new of costs."""
        pairs = zip(self.new, self.old, strict=True)
        rates = self.unit.endswith("/s")
        return [_divide(new, old) if rates else _divide(old, new) for new, old in pairs]

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """The lower quartile of the ratios, their median, and the upper quartile."""
        # With a single round, all three are its ratio.
        ratios = self.ratios if len(self.ratios) > 1 else self.ratios * 2
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, median, high

    @property
    def slower(self) -> bool:
        """Whether the new side counts as slower."""
        _, median, high = self.quartiles
        return median < SLOWER_MEDIAN and high < SLOWER_QUARTILE

    def __str__(self) -> str:
        low, median, high = self.quartiles
        return LINE.format(
            *(self.name, self.unit),
            *(f"{statistics.median(each):,.1f}" for each in (self.new, self.old)),
            *(f"{median:.3f}", f"{low:.3f}-{high:.3f}", "SLOWER" if self.slower else ""),
        )


@frozen
class Comparison:
    """The selected rows and their measurements.

    Attributes:
        sides: The checkouts, the new one first.
        folder: A folder for files of both sides.
        rounds: Rounds of each side in a row.
        seconds: Seconds of a round.
        incidents: Incidents in each database at the start.
        many: Incidents of one `create_many`.
        only: Only rows whose names contain this text are measured.
        rows: The measured rows.
    """

    sides: tuple[Checkout, Checkout]
    folder: Path
    rounds: int
    seconds: float
    incidents: int
    many: int
    only: str = ""
    rows: list[Row] = field(factory=list)

    def wanted(self, names: Sequence[str]) -> list[str]:
        """Return the selected ones of these rows."""
        return [name for name in names if self.only in name]

    async def interleave(
        self, run: Callable[[str, int], Awaitable[Round]]
    ) -> tuple[list[Round], list[Round]]:
        """Let both sides run in turn, and return their rounds."""
        measured = await interleave(
            {side.name: partial(run, side.name) for side in self.sides},
            self.rounds,
            alternate=True,
        )
        new, old = (measured[side.name] for side in self.sides)
        return new, old

    def add(
        self,
        name: str,
        unit: str,
        rounds: tuple[list[Round], list[Round]],
        figure: Callable[[Round], float] = lambda one: one.rate,
    ) -> None:
        """Add a row and print it."""
        new, old = ([figure(one) for one in each] for each in rounds)
        self.rows.append(Row(name, unit, new, old))
        print(self.rows[-1], flush=True)

    async def over_http(self, scenarios: Mapping[str, str], running: Mapping[str, Service]) -> None:
        """Compare services under load: their rate, and the CPU time of one request."""
        for name, scenario in scenarios.items():
            if not self.wanted(_with_cpu([name])):
                continue

            async def one(side: str, number: int, scenario: str = scenario) -> Round:
                load = running[side].load
                return await load(scenario, self.incidents, self.seconds, number)

            rounds = await self.interleave(one)
            self.add(name, "calls/s", rounds)
            self.add(f"{name}, {CPU}", "us", rounds, lambda one: one.cpu / one.rate * 1e6)

    async def in_process(
        self, calls: Mapping[str, tuple[str, int | None]], databases: Mapping[str, str]
    ) -> None:
        """Compare calls of the SDK."""
        async with AsyncExitStack() as stack:
            callers = {
                side.name: await stack.enter_async_context(
                    calling(side, databases[side.name], self.incidents)
                )
                for side in self.sides
            }
            for name in self.wanted(list(calls)):
                call, many = calls[name]

                async def one(
                    side: str, _: int, call: str = call, many: int | None = many
                ) -> Round:
                    return await callers[side].measure(call, many or self.many, self.seconds)

                unit = "incidents/s" if call in ("create_many", "construct") else "calls/s"
                self.add(name, unit, await self.interleave(one))

    async def costs(self, name: str, kinds: Sequence[str], code: Mapping[str, str]) -> None:
        """Compare the costs of code in a new interpreter."""
        rows = dict(zip(_cost_rows(name, kinds), kinds, strict=True))
        if not (wanted := self.wanted(list(rows))):
            return
        checkouts = {side.name: side for side in self.sides}
        rounds = await self.interleave(lambda side, _: checkouts[side].probe(code[side]))
        for row in wanted:
            kind = rows[row]
            self.add(row, UNITS[kind], rounds, lambda one, kind=kind: one.costs[kind])  # type: ignore[misc]

    async def databases(self, server: str, prefix: str) -> dict[str, str]:
        """Make a database for each side, with that side's schema and the same incidents."""
        made = {}
        for side in self.sides:
            made[side.name] = await create_database(server, f"{prefix}_{side.name}")
            await side.upgrade(made[side.name])
            connection = await asyncpg.connect(made[side.name])
            await fill(connection, self.incidents)
            await connection.close()
        return made

    async def files(self) -> dict[str, str]:
        """Make an SQLite file for each side, with that side's schema and the same incidents."""
        made = {}
        for side in self.sides:
            file = self.folder / f"{side.name}.db"
            made[side.name] = f"sqlite+aiosqlite:///{file}"
            await side.upgrade(made[side.name])
            rival = self.folder / f"rival-of-{side.name}.db"
            await asyncio.to_thread(fill_sqlite, file, rival, self.incidents)
        return made


async def compare(comparison: Comparison) -> None:
    """Measure every selected row."""
    for code in IMPORTS:
        both = {side.name: f"{code}\nreport()" for side in comparison.sides}
        await comparison.costs(code, (CPU, MODULES), both)
    await _sqlite(comparison)
    await _alone(comparison)
    await _together(comparison)
    await _postgresql(comparison)
    if not comparison.rows:
        raise BaseError(f"no row contains {comparison.only!r}")


def _with_cpu(names: Iterable[str]) -> list[str]:
    """Return each row over HTTP with the row of its CPU time."""
    return [row for name in names for row in (name, f"{name}, {CPU}")]


def _cost_rows(name: str, kinds: Iterable[str]) -> list[str]:
    return [f"{name}: {kind}" for kind in kinds]


async def _sqlite(comparison: Comparison) -> None:
    over_http = _with_cpu(ON_SQLITE)
    if not comparison.wanted([*over_http, *_cost_rows("open SQLite", OPENING)]):
        return
    urls = await comparison.files()
    opening = {side: OPEN.format(url=url) for side, url in urls.items()}
    await comparison.costs("open SQLite", OPENING, opening)
    if comparison.wanted(over_http):
        with ExitStack() as stack:
            running = {
                side.name: stack.enter_context(
                    services.ours(
                        urls[side.name],
                        None,
                        comparison.folder / f"sqlite-{side.name}.log",
                        side.folder,
                    )
                )
                for side in comparison.sides
            }
            await comparison.over_http(ON_SQLITE, running)


async def _alone(comparison: Comparison) -> None:
    """Measure a single caller, with the server and both sides on one core."""
    if comparison.wanted(list(ALONE)):
        with one_core(), PostgresServer() as postgres:
            databases = await comparison.databases(postgres.url, "alone")
            await comparison.in_process(ALONE, databases)


async def _postgresql(comparison: Comparison) -> None:
    over_http = _with_cpu(ON_POSTGRESQL)
    if not comparison.wanted([*over_http, *_cost_rows("open PostgreSQL", OPENING)]):
        return
    with ExitStack() as stack:
        postgres = stack.enter_context(PostgresServer())
        redis = stack.enter_context(RedisServer("--appendonly", "no"))
        databases = await comparison.databases(postgres.url, "http")
        opening = {side: OPEN.format(url=url) for side, url in databases.items()}
        await comparison.costs("open PostgreSQL", OPENING, opening)
        if comparison.wanted(over_http):
            server = redis.url.rpartition("/")[0]
            running = {
                side.name: stack.enter_context(
                    services.ours(
                        databases[side.name],
                        f"{server}/{number}",
                        comparison.folder / f"postgresql-{side.name}.log",
                        side.folder,
                    )
                )
                for number, side in enumerate(comparison.sides, 1)
            }
            await comparison.over_http(ON_POSTGRESQL, running)


async def _together(comparison: Comparison) -> None:
    """Measure many callers, with all cores."""
    if comparison.wanted(list(TOGETHER)):
        with PostgresServer() as postgres:
            databases = await comparison.databases(postgres.url, "together")
            await comparison.in_process(TOGETHER, databases)


def check_out(base: str, folder: Path) -> Path:
    """Return the folder of a base: itself, or where a git revision was unpacked.

    Raises:
        BaseError: If it is neither a folder with incidentkit in it nor a revision.
    """
    if (Path(base) / "incidentkit" / "__init__.py").is_file():
        return Path(base).resolve()
    archive = subprocess.run(
        ["git", "-C", str(services.ROOT), "archive", "--format=tar", base],  # noqa: S607
        capture_output=True,
        check=False,
    )
    if archive.returncode:
        reason = archive.stderr.decode("utf-8", "replace").strip()
        raise BaseError(f"{base} is neither a checkout nor a git revision: {reason}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    return folder.resolve()


def start(  # noqa: PLR0913
    base: str,
    *,
    rounds: int,
    seconds: float,
    incidents: int,
    many: int,
    only: str = "",
    json_file: Path | None = None,
) -> list[Row]:
    """Compare with a base, print a table, and write it as JSON if a file is given.

    Raises:
        BaseError: If the base cannot be used.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        bytecode = folder / "bytecode"
        sides = (
            Checkout("new", services.ROOT.resolve(), bytecode),
            Checkout("old", check_out(base, folder / "old"), bytecode),
        )
        comparison = Comparison(sides, folder, rounds, seconds, incidents, many, only)
        print(LINE.format(*COLUMNS))
        asyncio.run(compare(comparison))
    if json_file is not None:
        described = {
            "base": base,
            "rounds": f"{rounds} rounds of {seconds:g} seconds",
            "load": services.load_program(),
            "machine": results.machine(),
            "versions": results.versions(),
            "measured_at": results.today(),
            "rows": [
                asdict(row)
                | {"ratios": row.ratios, "quartiles": row.quartiles, "slower": row.slower}
                for row in comparison.rows
            ],
        }
        json_file.write_text(json.dumps(described, indent=1) + "\n", "utf-8")
    slower = [row.name for row in comparison.rows if row.slower]
    print(f"{len(slower)} of {len(comparison.rows)} rows count as slower", *slower, sep="\n  ")
    return comparison.rows

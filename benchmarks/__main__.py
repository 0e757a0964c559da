"""Measures, and rewrites `docs/performance.md`: `nox -s bench`, or `nox -s bench -- SUBJECT`.

A subject that is not named keeps its latest figures. `before` is separate: it compares the code
with another checkout of it, prints a table and leaves the page alone.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Final

import asyncpg
from attrs import evolve

from benchmarks import (
    before,
    growth,
    hostile,
    imports,
    in_process,
    isolation,
    over_http,
    report,
    results,
    search,
    threads,
)
from benchmarks.services import load_program
from tests.servers import PostgresServer, RedisServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from benchmarks.results import Result


def _http(*, quick: bool) -> Result:
    return asyncio.run(over_http.run(rounds=2 if quick else 11, seconds=1.0 if quick else 2.0))


def _sqlite(*, quick: bool) -> Result:
    rounds, seconds = (2, 1.0) if quick else (5, 2.0)
    return asyncio.run(over_http.run_sqlite(rounds=rounds, seconds=seconds))


def _soak(*, quick: bool) -> Result:
    return asyncio.run(over_http.run_soak(seconds=60.0 if quick else 600.0, looks=60))


def _in_process(*, quick: bool) -> Result:
    rounds, calls, many = (2, 500, 5_000) if quick else (9, 4_000, 100_000)
    return in_process.start(rounds=rounds, calls=calls, many=many)


def _threads(*, quick: bool) -> Result:
    rounds, calls = (2, 640) if quick else (11, 3_200)
    return threads.start(rounds=rounds, calls=calls)


def _imports(*, quick: bool) -> Result:
    return imports.run(rounds=5 if quick else 31)


def _growth(*, quick: bool) -> Result:
    return growth.start(quick=quick)


def _search(*, quick: bool) -> Result:
    return search.start(quick=quick)


def _isolation(*, quick: bool) -> Result:
    return isolation.start(quick=quick)


def _hostile(*, quick: bool) -> Result:
    return hostile.start(quick=quick)


SUBJECTS: Final[dict[str, Callable[..., Result]]] = {
    "http": _http,
    "sqlite": _sqlite,
    "soak": _soak,
    "in-process": _in_process,
    "threads": _threads,
    "growth": _growth,
    "search": _search,
    "isolation": _isolation,
    "hostile": _hostile,
    "imports": _imports,
}
"""The subjects of the page, by their names on the command line."""

BEFORE: Final = "before"


async def _server_versions() -> dict[str, str]:
    with PostgresServer() as postgres, RedisServer() as redis:
        connection = await asyncpg.connect(postgres.url)
        version = str(await connection.fetchval("SHOW server_version")).split()[0]
        await connection.close()
        with redis.client() as client:
            info = client.info("server")
    name = str(info.get("server_name", "redis")).capitalize()
    return {"PostgreSQL": version, name: str(info.get("valkey_version", info["redis_version"]))}


def _before(arguments: argparse.Namespace) -> None:
    rounds, seconds, incidents, many = (
        (3, 0.3, 2_000, 2_000) if arguments.quick else (11, 2.0, 100_000, 100_000)
    )
    before.start(
        arguments.base,
        rounds=rounds,
        seconds=seconds,
        incidents=incidents,
        many=many,
        only=arguments.only,
        json_file=arguments.json,
    )


def _measure(names: Iterable[str], kept: dict[str, Result], *, quick: bool) -> None:
    """Measure subjects, and store the figures of each as soon as it is done."""
    versions = results.versions() | asyncio.run(_server_versions())
    for name in names:
        measured = SUBJECTS[name](quick=quick)
        kept[name] = evolve(
            measured,
            versions=versions,
            machine=results.machine(),
            load=load_program(),
            measured_at=results.today(),
        )
        results.save(_in_order(kept))
        for row in measured.rows:
            print(f"{row.what}, against {row.against}: {row.value} (wanted {row.target})")


def _in_order(kept: dict[str, Result]) -> dict[str, Result]:
    return {name: kept[name] for name in SUBJECTS if name in kept}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = ", ".join(SUBJECTS)
    parser.add_argument(
        "subjects", nargs="*", metavar="SUBJECT", help=f"{names}; or {BEFORE}, alone"
    )
    parser.add_argument("--quick", action="store_true", help="a short run, to see that it works")
    parser.add_argument(
        "--page", action="store_true", help="rewrite the page from stored figures, measure nothing"
    )
    alone = parser.add_argument_group(BEFORE)
    alone.add_argument("--base", help="the other checkout: a folder or a git revision")
    alone.add_argument("--only", default="", metavar="TEXT", help="only rows that contain TEXT")
    alone.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    return parser


def main() -> None:
    """Read the command line, measure, and write the page."""
    parser = _parser()
    arguments = parser.parse_args()
    if unknown := set(arguments.subjects) - {*SUBJECTS, BEFORE}:
        parser.error(f"no such subject: {', '.join(sorted(unknown))}")
    if BEFORE in arguments.subjects:
        if len(arguments.subjects) > 1 or arguments.page or arguments.base is None:
            parser.error(f"{BEFORE} needs --base, and runs alone")
        try:
            _before(arguments)
        except before.BaseError as error:
            parser.error(str(error))
        return
    kept = results.load()
    if not arguments.page:
        _measure(arguments.subjects or SUBJECTS, kept, quick=arguments.quick)
    report.write(_in_order(kept))


if __name__ == "__main__":
    main()

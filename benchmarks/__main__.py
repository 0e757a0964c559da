"""Measure, and write `docs/performance.md` anew: `nox -s bench`, or `nox -s bench -- SUBJECT`.

A subject that is not named keeps the figures that were measured last.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import TYPE_CHECKING, Final

import asyncpg
from attrs import evolve

from benchmarks import growth, imports, in_process, over_http, report, results, search
from benchmarks.services import load_program
from tests.servers import PostgresServer, RedisServer

if TYPE_CHECKING:
    from collections.abc import Callable

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


def _imports(*, quick: bool) -> Result:
    return imports.run(rounds=5 if quick else 31)


def _growth(*, quick: bool) -> Result:
    return growth.start(quick=quick)


def _search(*, quick: bool) -> Result:
    return search.start(quick=quick)


SUBJECTS: Final[dict[str, Callable[..., Result]]] = {
    "http": _http,
    "sqlite": _sqlite,
    "soak": _soak,
    "in-process": _in_process,
    "growth": _growth,
    "search": _search,
    "imports": _imports,
}
"""What can be measured, by the name that the command line has for it."""


async def _server_versions() -> dict[str, str]:
    with PostgresServer() as postgres, RedisServer() as redis:
        connection = await asyncpg.connect(postgres.url)
        version = str(await connection.fetchval("SHOW server_version")).split()[0]
        await connection.close()
        with redis.client() as client:
            info = client.info("server")
    name = str(info.get("server_name", "redis")).capitalize()
    return {"PostgreSQL": version, name: str(info.get("valkey_version", info["redis_version"]))}


def main() -> None:
    """Read the command line, measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"of {', '.join(SUBJECTS)}")
    parser.add_argument("--quick", action="store_true", help="less of everything, to see it work")
    parser.add_argument("--page", action="store_true", help="write the page, and measure nothing")
    arguments = parser.parse_args()
    unknown = set(arguments.subjects) - set(SUBJECTS)
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    kept = results.load()
    versions = results.versions()
    if not arguments.page:
        versions |= asyncio.run(_server_versions())
        for name in arguments.subjects or SUBJECTS:
            measured = SUBJECTS[name](quick=arguments.quick)
            kept[name] = evolve(
                measured,
                versions=versions,
                machine=results.machine(),
                measured_at=results.today(),
            )
            results.save({each: kept[each] for each in SUBJECTS if each in kept})
            for row in measured.rows:
                print(f"{row.what}, against {row.against}: {row.value} (wanted {row.target})")
    report.write({each: kept[each] for each in SUBJECTS if each in kept}, load_program())


if __name__ == "__main__":
    main()

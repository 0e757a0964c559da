"""The project's checks: `nox` runs them all, `nox -s tests -- -k cache` runs a part of one."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "no" if "CI" in os.environ else "yes"
nox.options.sessions = ["lint", "types", "tests", "lowest", "docs"]

# Let the sessions write bytecode: the tests start thousands of programs, and each would compile the
# package again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

PROJECT = nox.project.load_toml("pyproject.toml")
# The tests that reach every dependency.
DEPENDENT = (
    "tests/conformance",
    "tests/http",
    "tests/test_cache.py",
    "tests/test_cli.py",
    "tests/test_host_database.py",
    "tests/test_migrations.py",
    "tests/test_remote.py",
    "tests/test_remote_faults.py",
    "tests/test_schemas.py",
    "tests/test_settings.py",
    "tests/test_sqlite.py",
    "tests/test_wire.py",
)
# Every verb on asyncpg, psycopg, SQLAlchemy, redis and httpx2; other embodiments are further ways
# into the package.
EMBODIMENTS = (
    "sqlite-redis",
    "sqlite-engine",
    "postgresql-pool",
    "psycopg-engine",
    "remote-socket",
    "joined-postgresql-session",
    "joined-sync-session-sqlite",
)
PROBE = "import ssl, sqlite3, sys, venv; print(*sys.version_info[:2], sep='.')"


def installed_pythons() -> dict[str, str]:
    """Return the working interpreters by version: the one that runs nox, and those on PATH.

    Every folder on PATH is tried, because a version manager's shim may come first and not run.
    """
    found: dict[str, str] = {}
    for version in (f"3.{minor}" for minor in range(11, 20)):
        if sys.version.startswith(f"{version}."):
            found[version] = sys.executable
        for folder in os.get_exec_path():
            program = shutil.which(f"python{version}", path=folder)
            if version not in found and program and runs(program, version):
                found[version] = program
    return found


def runs(program: str, version: str) -> bool:
    """Return whether a program is a working Python of this version."""
    try:
        probe = subprocess.run(
            [program, "-c", PROBE], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return probe.returncode == 0 and probe.stdout.strip() == version


def groups(*names: str) -> tuple[str, ...]:
    """Return the requirements of dependency groups."""
    return nox.project.dependency_groups(PROJECT, *names)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, formatting, and the import contracts of the package."""
    session.install(*groups("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports", "--no-cache")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types with both checkers."""
    session.install("--editable", ".[all]", *groups("types"))
    session.run("mypy")
    session.run("pyright", "--project", ".")


@nox.session
@nox.parametrize(
    "python", [nox.param(path, id=version) for version, path in installed_pythons().items()]
)
def tests(session: nox.Session) -> None:
    """Run the tests; unless only some are selected, they must cover the package."""
    session.install("--editable", ".[all]", *groups("bench"))
    bar = ["--cov-fail-under=0"] if selects(session.posargs) else []
    session.run("pytest", "-n", "3", "--cov", *bar, *session.posargs)


@nox.session(python=next(iter(installed_pythons().values())))
def lowest(session: nox.Session) -> None:
    """Run tests with the lowest versions of the dependencies; `-- tests` runs all of them."""
    session.install("--editable", ".[all]", *lowest_versions(), *groups("tests"))
    # asyncpg 0.30 leaves connections of cancelled calls to the garbage collector.
    unraisable = ("-W", "ignore::pytest.PytestUnraisableExceptionWarning")
    env = {} if session.posargs else {"INCIDENTKIT_TEST_EMBODIMENTS": ",".join(EMBODIMENTS)}
    session.run("pytest", "-n", "3", *unraisable, *(session.posargs or DEPENDENT), env=env)


def lowest_versions() -> list[str]:
    """Return the requirements of the package and its extras, each at its lowest version."""
    project = PROJECT["project"]
    extras = project["optional-dependencies"].values()
    requirements = itertools.chain(project["dependencies"], *extras)
    return [each.replace(">=", "==", 1) for each in requirements if ">=" in each]


def selects(arguments: list[str]) -> bool:
    """Return whether arguments for pytest select only some of the tests."""
    return any(
        argument.startswith(("-k", "-m", "--co", "--lf", "--last-failed", "--deselect", "--ignore"))
        or Path(argument.partition("::")[0]).exists()
        for argument in arguments
    )


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning or a broken reference fails."""
    session.install("--editable", ".[all]", *groups("docs"))
    session.run(
        "sphinx-build", "-W", "-n", "--keep-going", "docs", "docs/_build/html", *session.posargs
    )


@nox.session(python=next(iter(installed_pythons().values())))
@nox.parametrize("versions", ["newest", "lowest"])
def pooler(session: nox.Session, versions: str) -> None:
    """Run the tests that need PgBouncer, and the conformance suite through it.

    It is the system's, or the program that INCIDENTKIT_TEST_PGBOUNCER names.
    """
    program = os.environ.get("INCIDENTKIT_TEST_PGBOUNCER", "pgbouncer")
    if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin") is None:
        session.error(f"{program} is not installed: apt-get install -y pgbouncer")
    exactly = lowest_versions() if versions == "lowest" else []
    session.install("--editable", ".[all]", *exactly, *groups("tests"))
    through = {"INCIDENTKIT_TEST_POOLER": "transaction"}
    if session.posargs:
        session.run("pytest", *session.posargs, env=through)
        return
    # One after the other, the tests show the figures of several processes.
    session.run("pytest", "tests/pooler", "--log-cli-level=INFO", env=through)
    if versions == "lowest":
        # One way into each driver: the others run the same versions.
        on_postgres = [name for name in EMBODIMENTS if "sqlite" not in name]
        through["INCIDENTKIT_TEST_EMBODIMENTS"] = ",".join(on_postgres)
    session.run("pytest", "tests/conformance", "-n", "2", env=through)


@nox.session(python=next(iter(installed_pythons().values())))
def browser(session: nox.Session) -> None:
    """Run the tests that need Chromium, its driver, and nginx."""
    path = f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"
    packages = {"chromium": "chromium", "chromedriver": "chromium-driver", "nginx": "nginx"}
    for program, package in packages.items():
        if shutil.which(program, path=path) is None:
            session.error(f"{program} is not installed: apt-get install -y {package}")
    session.install("--editable", ".[all]", *groups("tests"))
    env = {"INCIDENTKIT_TEST_BROWSER": "1"}
    session.run("pytest", *(session.posargs or ["tests/browser"]), env=env)


@nox.session
def contract(session: nox.Session) -> None:
    """Look for a difference between the service and its OpenAPI document with Schemathesis.

    `-- -k sqlite` runs a part.
    """
    session.install("--editable", ".[all]", *groups("contract"))
    env = {"INCIDENTKIT_TEST_CONTRACT": "1"}
    session.run("pytest", "tests/contract", *session.posargs, env=env)


@nox.session(python=next(iter(installed_pythons().values())))
def frozen(session: nox.Session) -> None:
    """Build programs with PyInstaller, and run them."""
    if shutil.which("objcopy") is None:
        session.error("objcopy is not installed: apt-get install -y binutils")
    session.install("--editable", ".[all]", *groups("tests"))
    session.run("pytest", "-m", "frozen", "tests/test_installations.py", *session.posargs)


@nox.session
def simulate(session: nox.Session) -> None:
    """Run thousands of simulations of the caches; `-- --seeds 100` runs fewer."""
    session.install("--editable", ".[all]", *groups("tests"))
    session.run("python", "-m", "tests.simulation", *session.posargs)


@nox.session(python=next(iter(installed_pythons().values())))
@nox.parametrize("versions", ["newest", "lowest", "image"])
def audit(session: nox.Session, versions: str) -> None:
    """Look up known vulnerabilities of the dependencies in PyPI's advisories.

    It fails if one of them cannot be looked up. With the lowest versions, those that the
    documentation lists do not count: incidentkit uses none of the vulnerable parts.
    """
    session.install(*groups("audit"))
    pins, ignored = "constraints.txt", []
    if versions != "image":
        pins = resolved(session, lowest_versions() if versions == "lowest" else [])
    if versions == "lowest":
        listed = Path("docs/explanation/dependencies.md").read_text("utf-8")
        ignored = [f"--ignore-vuln={each}" for each in re.findall(r"CVE-\d+-\d+", listed)]
    given = ("--requirement", pins, "--no-deps", "--disable-pip")
    session.run("pip-audit", "--strict", *given, *ignored, *session.posargs)


def resolved(session: nox.Session, exactly: list[str]) -> str:
    """Return a file with the versions that pip would install, itself installing nothing."""
    folder = Path(session.create_tmp())
    report, pins = folder / "report.json", folder / "pins.txt"
    command = ("install", "--quiet", "--dry-run", "--ignore-installed", "--report", str(report))
    session.run("python", "-m", "pip", *command, ".[all]", *exactly)
    found = [each["metadata"] for each in json.loads(report.read_text("utf-8"))["install"]]
    others = [each for each in found if each["name"] != PROJECT["project"]["name"]]
    pins.write_text("".join(f"{each['name']}=={each['version']}\n" for each in others), "utf-8")
    return str(pins)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure everything or the named subjects, and rewrite docs/performance.md."""
    session.install("--editable", ".[all]", *groups("bench"))
    session.run("python", "-m", "benchmarks", *session.posargs)


@nox.session
def large(session: nox.Session) -> None:
    """Measure the upgrade of a million incidents on each database; `-- 100000` takes fewer."""
    session.install("--editable", ".[all]", *groups("tests"))
    rows = session.posargs[0] if session.posargs else "1000000"
    env = {"INCIDENTKIT_TEST_ROWS": rows}
    session.run("pytest", "tests/test_large_tables.py", "--log-cli-level=INFO", env=env)


@nox.session
def faults(session: nox.Session) -> None:
    """Kill and pause processes and servers under load for 300 seconds; `-- 60` takes 60."""
    session.install("--editable", ".[all]", *groups("tests"))
    name = "INCIDENTKIT_TEST_FAULTS"
    seconds = session.posargs[0] if session.posargs else os.environ.get(name, "300")
    unlimited = ("--timeout", "0")
    session.run("pytest", "tests/faults", "--log-cli-level=INFO", *unlimited, env={name: seconds})
    session.run("pytest", "tests/test_remote_faults.py", *unlimited, env={name: seconds})
    # About one restart or cut a second.
    rounds = {"INCIDENTKIT_TEST_FEED_ROUNDS": seconds}
    session.run("pytest", "tests/test_feed.py", "-k", "restarts", *unlimited, env=rounds)


@nox.session(python=next(iter(installed_pythons().values())))
def expose(session: nox.Session) -> None:
    """Follow the guide "Expose the service", with nginx and Prometheus."""
    path = f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"
    packages = {
        "nginx": "nginx",
        "openssl": "openssl",
        "curl": "curl",
        "prometheus": "prometheus",
        "promtool": "prometheus",
    }
    for program, package in packages.items():
        if shutil.which(program, path=path) is None:
            session.error(f"{program} is not installed: apt-get install -y {package}")
    session.install("--editable", ".[all]", *groups("tests"))
    chosen = session.posargs or ["tests/expose"]
    session.run("pytest", *chosen, env={"INCIDENTKIT_TEST_EXPOSE": "1"})


@nox.session(python=next(iter(installed_pythons().values())))
def metrics(session: nox.Session) -> None:
    """Run the tests that need promtool, of Prometheus."""
    if shutil.which("promtool") is None:
        session.error("promtool is not installed: apt-get install -y prometheus")
    session.install("--editable", ".[all]", *groups("tests"))
    chosen = session.posargs or ["tests/metrics"]
    session.run("pytest", *chosen, env={"INCIDENTKIT_TEST_METRICS": "1"})

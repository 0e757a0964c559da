"""The documentation says what is: its programs and commands are run, its tables are complete.

What the words after a fence's language mean:

- ``file=NAME``: the program, or the settings, are kept under that name for what comes after them on
  the page; a name that starts with ``test_`` is for pytest;
- ``alone``: the program configures what a process has once, and so has a process of its own;
- ``servers``: the program finds PostgreSQL and Redis in its environment;
- ``output``: what the program before it prints;
- ``session``: the commands of the page are run one after another, and print what stands there;
- ``expose`` and ``background``: so does tests/expose, with programs that not every machine has.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import io
import json
import os
import re
import runpy
import shlex
import shutil
import sqlite3
import textwrap
import time
import tomllib
from contextlib import ExitStack, closing, redirect_stdout
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import asyncpg
import click
import httpx2
import pytest
import uvicorn
from alembic import command
from alembic.config import Config
from attrs import Attribute, asdict, fields, frozen
from click.testing import CliRunner

import incidentkit
from incidentkit import IncidentKitError, RemoteOptions
from incidentkit.cache import INDEX_KEY, TTL, breaker, memory, redis
from incidentkit.cli import main
from incidentkit.domain.commands import Resolution
from incidentkit.domain.rules import MAX_FAULTS
from incidentkit.domain.values import TEXT_MAX_WORDS
from incidentkit.http import health, problems, request_log
from incidentkit.http.operation import MAX_BODY, MAX_ITEMS, MAX_LARGE_BODY
from incidentkit.http.routes import ADMINISTRATION, DOCS, OPERATIONS
from incidentkit.settings import Environment
from incidentkit.store import RequestRecord, StoreOptions, migrate
from incidentkit.store.postgresql import errors as postgresql_causes
from incidentkit.store.postgresql import statements as postgresql
from incidentkit.store.postgresql import url as urls
from incidentkit.store.postgresql.dialect import PostgresDialect
from incidentkit.store.request_log import INSERT_REQUEST
from incidentkit.store.schema import REVISIONS, VERSION_TABLE
from incidentkit.store.searching import SHORT
from incidentkit.store.sql import statements
from incidentkit.store.sql.tables import TEXT_TABLES, metadata
from incidentkit.store.sqlite import errors as sqlite_causes
from incidentkit.store.sqlite import statements as sqlite
from incidentkit.store.sqlite.dialect import SqliteDialect
from incidentkit.store.sqlite.file import scanners
from incidentkit.store.sqlite.url import PARAMETERS
from incidentkit.wire.kinds import Kind
from tests.programs import outcome, service, start
from tests.test_migrations import ORIGIN_SCHEMA

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

pytestmark = pytest.mark.unmeasured

ROOT: Final = Path(__file__).resolve().parent.parent
PAGES: Final = (*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")))

DATABASE_URL: Final = "postgresql://incidents:secret@localhost:5432/incidents"
REDIS_URL: Final = "redis://localhost:6379/0"
SERVICE_URL: Final = "http://127.0.0.1:8000"
EXAMPLE_DAY: Final = "2026-11-23"

FENCE: Final = re.compile(
    r"^(?P<indent> *)```(?P<info>[^`\n]*)\n(?P<body>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
LINK: Final = re.compile(r"\]\(([^)\s]+)\)")
CODE: Final = re.compile(r"`([^`]+)`")


@frozen
class Fence:
    """A block of code on a page."""

    page: str
    line: int
    language: str
    words: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def file(self) -> str | None:
        """The name under which it is kept."""
        names = [word.removeprefix("file=") for word in self.words if word.startswith("file=")]
        return names[0] if names else None


def page(name: str) -> str:
    """Return the text of a page."""
    return (ROOT / name).read_text(encoding="utf-8")


def fences(name: str, language: str | None = None) -> list[Fence]:
    """Return the fences of a page, of one language or of all."""
    text = page(name)
    found = []
    for match in FENCE.finditer(text):
        first, *words = match["info"].split() or [""]
        line = text.count("\n", 0, match.start()) + 1
        found.append(Fence(name, line, first, tuple(words), textwrap.dedent(match["body"])))
    return [fence for fence in found if language in (None, fence.language)]


NAMES: Final = [path.relative_to(ROOT).as_posix() for path in PAGES]
FENCES: Final = [fence for name in NAMES for fence in fences(name)]


def has_session(name: str) -> bool:
    """Tell whether the commands of a page are run."""
    return any("session" in fence.words for fence in fences(name))


def rows(name: str, heading: str) -> list[list[str]]:
    """Return the rows of the tables of a page whose first heading is this one, cell by cell."""
    found: list[list[str]] = []
    inside = False
    for line in page(name).splitlines():
        if not line.lstrip().startswith("|"):
            inside = False
            continue
        cells = [cell.strip() for cell in line.strip()[1:-1].split("|")]
        if inside:
            found.append(cells)
        inside = inside or cells[0] == heading
    return [cells for cells in found if not set(cells[0]) <= set("-|")]


def code(text: str) -> list[str]:
    """Return what stands as code in a text."""
    return CODE.findall(text)


# Programs


PROGRAMS: Final = [
    fence
    for fence in FENCES
    if fence.language == "python"
    and not (fence.file or "").startswith(("env.py", "test_"))
    # tests/test_installations.py builds and runs those.
    and fence.page != "docs/how-to/freeze.md"
    # Those are run by their page's commands.
    and not (fence.file and has_session(fence.page))
]


def write_files(name: str) -> list[str]:
    """Write the programs of a page that have a name, and return their names."""
    named = {fence.file: fence.text for fence in fences(name, "python") if fence.file}
    for file, text in named.items():
        Path(file).write_text(text, encoding="utf-8")
    return [*named]


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_a_program_runs(
    program: Fence, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each program of the documentation runs without a warning, and prints what the page says."""
    if "servers" in program.words:
        database_url = request.getfixturevalue("migrated_postgres_url")
        monkeypatch.setenv("INCIDENTKIT_DATABASE_URL", database_url)
        monkeypatch.setenv("INCIDENTKIT_REDIS_URL", request.getfixturevalue("redis_url"))
    Path("program.py").write_text(program.text, encoding="utf-8")
    if "alone" in program.words:
        exit_code, printed, err = outcome(start(program=["-W", "error", "program.py"]))
        assert exit_code == 0, err
    else:
        printed = run_program("program.py")
    following = FENCES[FENCES.index(program) + 1 :][:1]
    if following and "output" in following[0].words:
        assert printed == following[0].text


def run_program(file: str) -> str:
    """Return what a program prints, which is run as one of its own, but for what it imports."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        runpy.run_path(file, run_name="__main__")
    return printed.getvalue()


@pytest.mark.parametrize("name", ["docs/how-to/embed.md", "docs/how-to/test.md"])
def test_the_tests_of_a_host_pass(name: str) -> None:
    """The tests that the page shows pass, without a warning from incidentkit."""
    files = [file for file in write_files(name) if file.startswith("test_")]
    assert files
    scope = "asyncio_default_fixture_loop_scope=function"
    kit = ("-p", "incidentkit.testing.plugin", "-p", "pytest_asyncio.plugin")
    exit_code, out, err = outcome(
        start(
            *files,
            program=["-W", "error", "-m", "pytest", "-p", "no:cacheprovider", *kit, "-o", scope],
            env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        )
    )
    assert exit_code == 0, out + err
    assert f"{len(files)} passed" in out


def test_the_hosts_env_py_keeps_our_tables_out(tmp_path: Path, sqlite_url: str) -> None:
    """With the `env.py` of the page a host's autogenerate does not see our tables."""
    (env,) = [fence for fence in FENCES if fence.file == "env.py"]
    asyncio.run(migrate.upgrade(sqlite_url))
    ours = {*metadata.tables, *TEXT_TABLES, VERSION_TABLE}

    def generated(text: str, folder: Path) -> str:
        (folder / "versions").mkdir(parents=True)
        shutil.copy(ROOT / "migrations" / "script.py.mako", folder)
        (folder / "env.py").write_text(text, encoding="utf-8")
        config = Config()
        config.set_main_option("script_location", str(folder))
        config.set_main_option("path_separator", "os")
        config.set_main_option("sqlalchemy.url", sqlite_url.replace("+aiosqlite", ""))
        command.revision(config, "the first", autogenerate=True)
        (made,) = (folder / "versions").glob("*.py")
        return made.read_text(encoding="utf-8").partition("def downgrade")[0]

    line = "        include_name=keep_out_of_autogenerate,\n"
    assert line in env.text
    with_filter = generated(env.text, tmp_path / "with")
    without_filter = generated(env.text.replace(line, ""), tmp_path / "without")
    assert "op.create_table('orders'" in with_filter
    assert "drop_table" not in with_filter
    assert set(re.findall(r"drop_table\('(\w+)'\)", without_filter)) == ours


# Commands


TOKEN: Final = re.compile(r"\bik_[0-9A-Za-z]{49}\b")
"""An access token. Those of a page have a wrong checksum."""


class Session(ExitStack):
    """The terminals of a page: its commands, in the folder of the test."""

    def __init__(self, replacements: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._replacements = replacements or {}
        self._url: str | None = None
        self._tokens: dict[str, str] = {}

    def run(self, name: str) -> None:
        """Do what a page says, and compare what is printed."""
        started = datetime.now(UTC)
        for fence in fences(name):
            if fence.file:
                text = self._with_tokens(self._replaced(fence.text))
                text = text.replace(SERVICE_URL, self._url or SERVICE_URL)
                Path(fence.file).write_text(text, encoding="utf-8")
            if fence.language != "console" or "session" not in fence.words:
                continue
            expected, printed = "", ""
            for part in re.split(r"^\$ ", fence.text, flags=re.MULTILINE)[1:]:
                line, _, output = part.partition("\n")
                expected += f"$ {line}\n{self._replaced(output)}"
                done = self._command([self._with_tokens(each) for each in shlex.split(line)])
                self._tokens |= zip(TOKEN.findall(output), TOKEN.findall(done), strict=False)
                printed += f"$ {line}\n{done}"
            days = {started.date().isoformat(), datetime.now(UTC).date().isoformat()}
            assert _timeless(printed, days) == _timeless(expected, {EXAMPLE_DAY}), str(fence)

    def _command(self, words: list[str]) -> str:
        match words:
            case ["incidentkit", "serve"]:
                self._serve()
                return ""
            case ["incidentkit", *arguments]:
                done = CliRunner().invoke(main, arguments, prog_name="incidentkit")
                assert done.exception is None or isinstance(done.exception, SystemExit)
                return done.output
            case ["python", file]:
                return run_program(file)
            case ["python", *arguments]:
                exit_code, out, err = outcome(start(program=["-W", "error", *arguments]))
                assert exit_code == 0, err
                return out + err
            case ["curl", *arguments]:
                return self._curl(arguments)
        raise AssertionError(f"nobody knows how to run {words}")

    def _with_tokens(self, word: str) -> str:
        """Return a word of a command with the tokens that were created instead of the page's."""
        return TOKEN.sub(lambda found: self._tokens.get(found[0], found[0]), word)

    def _serve(self) -> None:
        """Run the service instead of the one that ran before, if any did."""
        self.close()
        self._url = self.enter_context(service(Path("service.log"))).url

    def _curl(self, arguments: list[str]) -> str:
        """Send what curl would send, which is not on every machine."""
        parser = argparse.ArgumentParser()
        parser.add_argument("-s", action="store_true", required=True)
        parser.add_argument("-X", dest="method")
        parser.add_argument("-H", dest="headers", action="append", default=[])
        parser.add_argument("-d", dest="data")
        parser.add_argument("url")
        given = parser.parse_args(arguments)
        assert given.url.startswith(SERVICE_URL)
        if self._url is None:
            self._serve()
        answer = httpx2.request(
            given.method or ("POST" if given.data else "GET"),
            given.url.replace(SERVICE_URL, str(self._url)),
            content=given.data,
            headers=[tuple(header.split(": ")) for header in given.headers],
        )
        # curl ends no line that the server did not end, but a terminal's prompt is on the next one.
        return answer.text + "\n"

    def _replaced(self, text: str) -> str:
        for example, real in self._replacements.items():
            text = text.replace(example, real)
        return text


def _timeless(text: str, days: set[str]) -> str:
    """Return the text with nothing in it that differs from run to run."""
    for day in days:
        text = re.sub(rf"{day} \d\d:\d\d:\d\d", "<now>", text)
    text = re.sub(r"(It expires at) \S+ \S+", r"\1 <time>", text)
    return TOKEN.sub("<token>", re.sub(r"\b[0-9a-f]{32}\b", "<id>", text))


@pytest.mark.parametrize("name", ["README.md", "docs/index.md"])
def test_the_session_of_a_first_page(name: str) -> None:
    """The commands of the README and of the start page do what they show, unconfigured."""
    with Session() as terminals:
        terminals.run(name)


def test_the_session_of_the_tutorial(empty_postgres_url: str, redis_url: str) -> None:
    """Somebody who follows the tutorial sees what it shows, from SQLite to PostgreSQL and Redis."""
    replaced = {
        DATABASE_URL: empty_postgres_url,
        REDIS_URL: redis_url,
        place_of(DATABASE_URL): place_of(empty_postgres_url),
        "/home/ann/first": str(Path.cwd()),
    }
    with Session(replaced) as terminals:
        terminals.run("docs/tutorial.md")


def place_of(url: str) -> str:
    """Return the database of a URL as an error names it."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port}{parts.path}"


SESSIONS: Final = (
    "docs/how-to/authenticate.md",
    "docs/how-to/django.md",
    "docs/how-to/history.md",
    "docs/how-to/purge.md",
    "docs/how-to/remote.md",
    "docs/reference/command-line.md",
    "docs/reference/rest.md",
)
"""Pages whose commands need no server."""


@pytest.mark.parametrize("name", SESSIONS)
def test_the_session_of_a_guide(name: str) -> None:
    """The commands of the guide do what it shows, with nothing configured."""
    with Session() as terminals:
        terminals.run(name)


def test_the_session_of_the_deployment(
    migrated_postgres_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The health checks answer what the page shows, on PostgreSQL and Redis."""
    monkeypatch.setenv("INCIDENTKIT_DATABASE_URL", migrated_postgres_url)
    monkeypatch.setenv("INCIDENTKIT_REDIS_URL", redis_url)
    with Session() as terminals:
        terminals.run("docs/how-to/deploy.md")


ORIGIN_ROWS: Final = """
INSERT INTO "Incident" (incident_message, incident_type, source, created_at) VALUES
    ('Disk is full on db-1', 'completed', 'monitoring', '2025-05-31 14:30:00.75+00'),
    (NULL, NULL, NULL, NULL),
    ('Payment gateway times out', 'new', 'partner', '2025-06-01 03:00:00+00');
"""


def test_the_session_of_the_migration(
    empty_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever migrates the origin sees what the page shows, with the origin's variables."""
    asyncio.run(execute(empty_postgres_url, ORIGIN_SCHEMA + ORIGIN_ROWS))
    url = urlsplit(empty_postgres_url)
    for name, value in {
        "HOST": url.hostname,
        "PORT": url.port,
        "USER": url.username,
        "PASSWORD": url.password,
        "DB": url.path.strip("/"),
    }.items():
        if value is not None:
            monkeypatch.setenv(f"POSTGRES_{name}", str(value))
    with Session() as terminals:
        terminals.run("docs/how-to/migrate-from-the-origin.md")


def test_every_session_is_run() -> None:
    """No page has commands that are said to be run and are not."""
    assert {name for name in NAMES if has_session(name)} == {
        "README.md",
        "docs/index.md",
        "docs/tutorial.md",
        *SESSIONS,
        "docs/how-to/deploy.md",
        "docs/how-to/migrate-from-the-origin.md",
    }


def shown_commands() -> Iterator[tuple[str, list[str]]]:
    """Yield every command of incidentkit or uvicorn that a fence shows."""
    for fence in FENCES:
        if fence.language not in ("console", "bash"):
            continue
        lines = fence.text.splitlines()
        if fence.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        for part in " && ".join(lines).split(" && "):
            # The output may go to a file.
            words = shlex.split(part.partition(" > ")[0])
            if words[0] in ("incidentkit", "uvicorn"):
                yield str(fence), words


@pytest.mark.parametrize(
    "words", [pytest.param(words, id=f"{at} {words}") for at, words in shown_commands()]
)
def test_a_command_exists(words: list[str]) -> None:
    """Each command that a page shows is one, with its options and arguments."""
    name, *arguments = words
    current: click.Command = main if name == "incidentkit" else uvicorn.main
    # What the group says of its commands, such as their options for help, they keep.
    parent = click.Context(current, **current.context_settings)
    while isinstance(current, click.Group):
        first, *arguments = arguments
        found = current.commands.get(first)
        assert found is not None, first
        current = found
    with (
        CliRunner().isolation("read from stdin"),
        current.make_context(name, arguments, parent=parent) as context,
    ):
        assert context.command is current


def test_the_sessions_of_nox_and_the_extras_exist() -> None:
    """What a page tells to run with nox or to install is there."""
    noxfile = page("noxfile.py")
    project = tomllib.loads(page("pyproject.toml"))["project"]
    text = "\n".join(page(name) for name in NAMES)
    sessions = set(re.findall(r"nox -s (\w+)", text))
    assert sessions
    assert all(f"\ndef {name}(session" in noxfile for name in sessions)
    extras = set(re.findall(r"(?:incidentkit|\"\.)\[(\w+)\]", text))
    assert extras == set(project["optional-dependencies"])


# Statements


async def execute(url: str, *statements: str) -> None:
    """Run statements on PostgreSQL, each batch in a transaction of its own."""
    connection = await asyncpg.connect(url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


async def test_the_statement_that_shifts_times(
    empty_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It mends what asyncpg makes of a naive UTC time in a process in Berlin, summer and winter."""
    (fence,) = fences("docs/how-to/migrate-from-the-origin.md", "sql")
    times = [datetime(2025, month, 15, 12, tzinfo=UTC) for month in (1, 7, 9)]
    connection = await asyncpg.connect(empty_postgres_url)
    try:
        await connection.execute(ORIGIN_SCHEMA)
        monkeypatch.setenv("TZ", "Europe/Berlin")
        time.tzset()
        for moment in times:
            await connection.execute(
                'INSERT INTO "Incident" (created_at) VALUES ($1)', moment.replace(tzinfo=None)
            )
        monkeypatch.undo()
        time.tzset()
        stored = 'SELECT created_at FROM "Incident" ORDER BY incident_id'
        found = [record[0] for record in await connection.fetch(stored)]
        assert [moment.hour for moment in found] == [11, 10, 10]
        await connection.execute(fence.text)
        assert [record[0] for record in await connection.fetch(stored)] == times
    finally:
        monkeypatch.undo()
        time.tzset()
        await connection.close()


async def test_the_query_of_the_database_page(migrated_postgres_url: str, sqlite_url: str) -> None:
    """It counts open incidents on both databases."""
    (fence,) = fences("docs/reference/database.md", "sql")
    for url in (migrated_postgres_url, sqlite_url):
        async with incidentkit.IncidentClient.open(url) as incidents:
            await incidents.create("Disk is full on db-1", source="monitoring")
            await incidents.create("Line is down", source="monitoring", incident_type="failed")
    connection = await asyncpg.connect(migrated_postgres_url)
    assert [tuple(row) for row in await connection.fetch(fence.text)] == [("monitoring", 1)]
    await connection.close()
    with closing(sqlite3.connect(sqlite_url.partition(":///")[2])) as file:
        assert file.execute(fence.text).fetchall() == [("monitoring", 1)]


async def test_the_privileges_of_the_service_are_enough(migrated_postgres_url: str) -> None:
    """With the grants of the page the service's statements work, and the clean-up cleans up."""
    grants, *_, prune = fences("docs/how-to/deploy.md", "sql")
    name = f"service_{os.getpid()}"
    password = "of no consequence"
    try:
        await execute(
            migrated_postgres_url,
            f"CREATE ROLE {name} LOGIN PASSWORD '{password}'",
            grants.text.replace("TO service", f"TO {name}"),
        )
        url = urlsplit(migrated_postgres_url)
        netloc = f"{name}:{password.replace(' ', '%20')}@{url.netloc.rpartition('@')[2]}"
        service_url = url._replace(netloc=netloc).geturl()
        async with incidentkit.IncidentClient.open(service_url) as incidents:
            incident = await incidents.create("Disk is full on db-1", source="monitoring")
            await incidents.update_status(incident.incident_id, "failed")
            assert len(await incidents.list()) == 1
            again = await incidents.create(
                "Line is down", source="operator", dedup_key="line", idempotency_key="k"
            )
            await incidents.note(again.incident_id, "It came back")
            assert len(await incidents.history(again.incident_id)) == 2
            assert await incidents.purge(datetime.now(UTC) + timedelta(days=1)) == 1
            record = RequestRecord(
                datetime(2025, 1, 1, tzinfo=UTC), "GET", "/incident/get", 200, 1.5, "some-id"
            )
            store: Any = incidents.store
            await store.append(INSERT_REQUEST, [asdict(record)])
        await execute(migrated_postgres_url, prune.text)
        connection = await asyncpg.connect(migrated_postgres_url)
        assert await connection.fetchval("SELECT count(*) FROM request_log") == 0
        await connection.close()
    finally:
        await execute(migrated_postgres_url, f"DROP OWNED BY {name}", f"DROP ROLE {name}")


# Completeness


def test_the_readme_is_short() -> None:
    """The README has about a hundred lines."""
    assert len(page("README.md").splitlines()) <= 110


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    """Each relative link of a page is to a file that exists, and has no machine's path."""
    text = FENCE.sub("", page(name))
    for target in LINK.findall(text):
        path = target.partition("#")[0]
        if path and not path.startswith(("http://", "https://")):
            assert (ROOT / name).parent.joinpath(path).exists(), target


@pytest.mark.parametrize("name", NAMES)
def test_no_merge_is_left_open(name: str) -> None:
    """No page has the marks of an unresolved merge."""
    assert not re.search(r"^(<{7}|={7}|>{7})( |$)", page(name), re.MULTILINE)


def test_the_settings_are_those_of_the_environment() -> None:
    """The table of settings has every variable, in order, with its default and its meaning."""
    described: tuple[Attribute[Any], ...] = fields(Environment)
    table = rows("docs/reference/settings.md", "variable")
    plain = [[cell.replace("`", "") for cell in cells] for cells in table]
    assert [cells[0] for cells in plain] == [each.metadata["name"] for each in described]
    assert [cells[2] for cells in plain] == [each.metadata["help"] for each in described]
    for each, cells in zip(described, plain, strict=True):
        assert each.default is None or str(each.default) == cells[1], each.name


def test_the_tree_of_errors_is_the_one_of_the_classes() -> None:
    """The tree has every class where it belongs, and the table what becomes of each."""

    def tree(base: type[Exception], indent: str = "") -> Iterator[str]:
        below = [class_ for class_ in base.__subclasses__() if "incidentkit" in class_.__module__]
        for class_ in below:
            last = class_ is below[-1]
            also = [other.__name__ for other in class_.__bases__ if other is not base]
            label = class_.__name__
            if also:
                label = f"{label:<20} (also {'an' if also[0][0] in 'AEIO' else 'a'} {also[0]})"
            yield f"{indent}{'└' if last else '├'}── {label}"
            yield from tree(class_, indent + ("    " if last else "│   "))

    expected = [IncidentKitError.__name__, *tree(IncidentKitError)]
    (fence,) = [
        fence for fence in fences("docs/reference/errors.md", "text") if "output" not in fence.words
    ]
    assert fence.text.splitlines() == expected
    classes = [re.findall(r"\w+", line)[0] for line in expected[1:]]
    table = rows("docs/reference/errors.md", "error")
    assert sorted(cells[0].strip("`") for cells in table) == sorted(classes)


def test_the_codes_of_problems_are_those_of_the_service() -> None:
    """The table of codes has every kind of problem, with an anchor of that name."""
    expected = [
        [
            f"`{kind.code}`{{#{kind.anchor}}}",
            str(kind.status),
            kind.when,
            "" if kind.error is None else f"`{kind.error.__name__}`",
        ]
        for kind in Kind
    ]
    assert rows("docs/reference/errors.md", "code") == expected
    assert f"`{problems.PAGE}#incident-not-found`" in page("docs/reference/errors.md")


def test_the_causes_of_failures_are_those_of_the_code() -> None:
    """The tables of causes have every cause, with its error, its codes and whether to retry."""
    for heading, causes in (
        ("cause on PostgreSQL", postgresql_causes.CAUSES),
        ("cause on SQLite", sqlite_causes.CAUSES),
    ):
        expected = [
            [
                cause.reason,
                f"`{cause.error.__name__}`",
                "yes" if cause.retryable else "no",
                ", ".join(f"`{code}`" for code in cause.codes),
            ]
            for cause in causes
        ]
        assert rows("docs/reference/errors.md", heading) == expected


def test_the_parameters_of_urls_are_those_of_the_code() -> None:
    """The settings page has every parameter of a URL that is honored, accepted or refused."""
    tables = {
        "parameter of PostgreSQL": {*urls.HONORED, *urls.PASSED_ON},
        "accepted, without an effect": {*urls.WITHOUT_MEANING},
        "accepted with some values": {*urls.ONLY},
        "refused parameter": {*urls.REFUSED},
        "parameter of SQLite": {*PARAMETERS},
    }
    for heading, names in tables.items():
        shown = [
            name for cells in rows("docs/reference/settings.md", heading) for name in code(cells[0])
        ]
        assert sorted(shown) == sorted(names), heading


def test_every_public_name_is_in_the_reference() -> None:
    """What the package exports is described by a page of the reference."""
    reference = page("docs/reference/python.md") + page("docs/reference/errors.md")
    directive = r"auto(?:class|data|exception|function):: (?:[\w.]+\.)?(\w+)"
    described = set(re.findall(directive, reference))
    assert {*incidentkit.__all__} - {"__version__"} <= described


def test_every_public_method_has_an_example() -> None:
    """Each method of a client, and each public function, is called by a program on some page."""
    verbs = (incidentkit.IncidentClient, incidentkit.JoinedIncidents)
    names = {name for class_ in verbs for name in dir(class_) if not name.startswith("_")}
    reference = page("docs/reference/python.md")
    names |= set(re.findall(r"autofunction:: (?:[\w.]+\.)?(\w+)", reference))
    names -= {"connected"}  # It says what its name says.
    programs = "\n".join(fence.text for fence in FENCES if fence.language == "python")
    assert {name for name in names if not re.search(rf"\b{name}\b[(,]", programs)} <= {
        "cache_available",
        "keep_out_of_autogenerate",
        "tokens",
    }
    assert ".tokens.create(" in programs
    assert ".cache_available" in programs
    assert "include_name=keep_out_of_autogenerate" in programs


def test_the_routes_are_those_of_the_service() -> None:
    """The table of routes has every method and path, and each parameter has its row."""
    table = [
        (code(cells[0])[0], code(cells[1])[0]) for cells in rows("docs/reference/rest.md", "method")
    ]
    assert table == [(each.method, each.path) for each in (*OPERATIONS, *ADMINISTRATION, *DOCS)]
    parameters = {code(cells[0])[0] for cells in rows("docs/reference/rest.md", "parameter")}
    assert parameters == {
        parameter.name
        for each in (*OPERATIONS, *ADMINISTRATION)
        for parameter in each.parameters
        if parameter.where == "query"
    }
    statuses = {int(cells[0]) for cells in rows("docs/reference/rest.md", "status")}
    assert statuses == set(problems.TITLES)


def test_the_commands_and_options_are_those_of_the_program() -> None:
    """The tables of the command line have every command and every option, and no other."""

    def commands(
        group: click.Group, path: str = "incidentkit"
    ) -> Iterator[tuple[str, click.Command]]:
        for name, found in group.commands.items():
            if isinstance(found, click.Group):
                yield from commands(found, f"{path} {name}")
            else:
                yield f"{path} {name}", found

    found = dict(commands(main))
    arguments = re.compile(r" \[?[A-Z_]+\]?(\.\.\.)?")
    shown = [
        arguments.sub("", code(cells[0])[0])
        for cells in rows("docs/reference/command-line.md", "command")
    ]
    assert sorted(shown) == sorted(found)
    options = {
        option
        for each in (main, *found.values())
        for parameter in each.params
        if isinstance(parameter, click.Option)
        for option in parameter.opts
    }
    shown_options = {
        code(cells[0])[0].split()[0] for cells in rows("docs/reference/command-line.md", "option")
    }
    assert shown_options == options


def test_the_schema_is_the_declared_one() -> None:
    """The tables of the database page have every table, column, index, check and revision."""
    name = "docs/reference/database.md"
    columns = {code(cells[0])[0] for cells in rows(name, "column")}
    assert columns == {column.name for table in metadata.tables.values() for column in table.c}
    named = set(code(FENCE.sub("", page(name))))
    for table in metadata.tables.values():
        assert f'"{table.name}"' in named or table.name in named
        assert {str(index.name) for index in table.indexes} <= named
        assert {str(each.name) for each in table.constraints if each.name} <= named
    assert VERSION_TABLE in named
    assert tuple(code(cells[0])[0] for cells in rows(name, "revision")) == REVISIONS


def test_the_limits_are_those_of_the_code() -> None:
    """The numbers of the pages are the constants."""
    options = StoreOptions()
    limits = [cells[1] for cells in rows("docs/how-to/deploy.md", "what")]
    assert [float(limit) for limit in limits] == [
        options.connect_timeout,
        options.pool_timeout,
        options.pool_timeout,
        options.statement_timeout,
        options.statement_timeout,
        options.statement_timeout,
        breaker.CALL_TIMEOUT,
        breaker.RETRY_AFTER,
        health.TIMEOUT,
    ]
    deploy, rest, cache = (
        page(f"docs/{name}.md") for name in ("how-to/deploy", "reference/rest", "reference/cache")
    )
    assert f"{options.pool_size + options.max_overflow} by default" in deploy
    text, most = " ".join(deploy.split()), options.pool_size + options.max_overflow
    assert f"a fifth of the connections, at least one; {most // 5} by default" in text
    assert f"half as many as `DB_POOL_SIZE`, at least one; {scanners(options)} by default" in text
    assert f"more than {SHORT} incidents" in text
    assert f"and at most {TEXT_MAX_WORDS} different words" in rest
    assert f"at most {redis.MAX_CONNECTIONS} per process" in deploy
    assert f"up to {request_log.BATCH}" in deploy
    assert f"up to {request_log.CAPACITY} of them wait" in deploy
    assert f"`Retry-After: {problems.RETRY_AFTER}`" in deploy
    assert f"at most {MAX_BODY} bytes" in rest
    assert f"more than {MAX_BODY} bytes" in rest
    assert rest.count(f"{MAX_LARGE_BODY}") == 3
    assert f"at most {MAX_ITEMS} such objects" in rest
    assert f"the first {MAX_FAULTS} invalid incidents" in rest
    assert f"{TTL} seconds" in cache
    assert f"`{INDEX_KEY}`" in cache
    assert f"{memory.DEFAULT_MAX_BYTES // 2**20} MiB" in cache


def test_the_options_of_a_client_of_a_service_are_those_of_the_code() -> None:
    """The table of the guide has their defaults."""
    options = RemoteOptions()
    for cells in rows("docs/how-to/remote.md", "option"):
        assert float(cells[1].removesuffix(" seconds")) == getattr(options, code(cells[0])[0])


def test_the_loggers_are_those_of_the_code() -> None:
    """The table of loggers has each one that the package has."""
    sources = "\n".join(
        path.read_text(encoding="utf-8") for path in ROOT.glob("incidentkit/**/*.py")
    )
    found = set(re.findall(r'getLogger\("(incidentkit[\w.]*)"\)', sources))
    assert {code(cells[0])[0] for cells in rows("docs/how-to/embed.md", "logger")} == found


DEPENDENCIES: Final = "docs/explanation/dependencies.md"


def test_every_dependency_has_its_reason_and_its_floor() -> None:
    """The explanation names each package with its lowest version, as the project requires it."""
    project = tomllib.loads(page("pyproject.toml"))["project"]
    extras = [
        requirement
        for extra, requirements in project["optional-dependencies"].items()
        if extra != "all"
        for requirement in requirements
    ]
    required = [
        re.findall(r"^([\w-]+)(?:\[\w+\])?>=([\w.]+)", requirement)
        for requirement in (*project["dependencies"], *extras)
    ]
    table = rows(DEPENDENCIES, "package")
    named = [[(code(cells[0])[0], cells[2].partition(":")[0])] for cells in table]
    assert sorted(named) == sorted(required)


def test_no_vulnerable_part_of_a_dependency_is_used() -> None:
    """The package has no word of the parts that the page says it does not use."""
    parts = [name for cells in rows(DEPENDENCIES, "vulnerability") for name in code(cells[2])]
    assert {"FileResponse", ".form("} < {*parts}
    folders = {".url": "http"}
    for part in parts:
        word = re.compile(re.escape(part) + r"\b" * part[-1].isalpha())
        for path in ROOT.glob(f"incidentkit/{folders.get(part, '')}/**/*.py"):
            assert not word.search(path.read_text(encoding="utf-8")), f"{part} in {path}"


ARCHITECTURE: Final = "docs/explanation/architecture.md"


def test_the_parts_of_the_architecture_are_those_of_the_package() -> None:
    """Each file that the architecture names is there, and each module is in its table, once."""
    named = []
    for cells in rows(ARCHITECTURE, "part"):
        first, *others = code(cells[1])
        folder = (ROOT / first).parent
        named += [
            ROOT / first,
            *(ROOT / other if "/" in other else folder / other for other in others),
        ]
    assert [file for file in named if not file.exists()] == []
    for module in ROOT.glob("incidentkit/**/*.py"):
        # A package has no row for its face, or for its docstring.
        if module.name != "__init__.py":
            homes = [file for file in named if file in (module, *module.parents)]
            assert len(homes) == 1, module
    elsewhere = code(FENCE.sub("", page(ARCHITECTURE)))
    files = [
        name for name in elsewhere if re.fullmatch(r"(incidentkit|tests)/[\w/]+(\.py|/)", name)
    ]
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_the_statements_of_the_architecture_exist() -> None:
    """Each behaviour is in both dialects, by the statements that the page names."""
    shared = vars(statements)
    table = [cells for cells in rows(ARCHITECTURE, "behaviour") if len(cells) > 2]
    assert table
    for _, member, on_postgresql, on_sqlite in table:
        for dialect, own, cell in (
            (PostgresDialect, postgresql, on_postgresql),
            (SqliteDialect, sqlite, on_sqlite),
        ):
            assert hasattr(dialect, code(member)[0]), member
            assert [name for name in code(cell) if name not in vars(own) | shared] == []


def test_the_classes_of_the_architecture_exist() -> None:
    """Each class, and each method of a class, that the page names is in the package."""
    members: dict[str, set[str]] = {}
    for file in ROOT.glob("incidentkit/**/*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                functions = (ast.FunctionDef, ast.AsyncFunctionDef)
                found = {each.name for each in node.body if isinstance(each, functions)}
                members.setdefault(node.name, set()).update(found)
    names = [
        name
        for name in code(FENCE.sub("", page(ARCHITECTURE)))
        if re.fullmatch(r"[A-Z][a-z]\w+(\.\w+)?", name)
    ]
    assert names
    for name in names:
        class_, _, method = name.partition(".")
        assert class_ in members, name
        assert not method or method in members[class_], name


def test_the_incident_of_the_reference_is_one() -> None:
    """The JSON of the REST page has the fields, in order, that the service answers with."""
    incident, problem = fences("docs/reference/rest.md", "json")
    assert [*json.loads(incident.text)] == [*_fields(incidentkit.Incident)]
    assert [*json.loads(problem.text)] == [*_fields(problems.Problem)]
    table = [code(cells[0])[0] for cells in rows("docs/reference/rest.md", "field")]
    models = (incidentkit.Incident, incidentkit.NewIncident, Resolution)
    assert table == [name for model in models for name in _fields(model)]


def _fields(model: type[Any]) -> list[str]:
    return [attribute.name for attribute in model.__attrs_attrs__]

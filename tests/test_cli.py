"""The command line: what it prints, its exit codes, and how it ends."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import pty
import re
import select
import shlex
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import termios
import unicodedata
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import httpx2
import psutil
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from incidentkit import __version__
from incidentkit.cli import main
from incidentkit.cli.log import LineFormatter
from incidentkit.cli.text import ELLIPSIS, harmless, shorten, width
from incidentkit.domain.cursor import encode_cursor
from incidentkit.store.schema import REVISIONS, SCHEMA_REVISION
from tests.hosts import run_sql
from tests.programs import DEADLINE, outcome, service, start

if TYPE_CHECKING:
    from collections.abc import Iterator

REDIS_AWAY = (
    "Error: The cache is unavailable: Redis at 127.0.0.1:{port}/0 failed with ConnectionError: "
    "start it, or unset INCIDENTKIT_REDIS_REQUIRED"
)
NO_SCHEMA = "The database has no incidentkit schema yet: run `incidentkit db upgrade`.\n"
DISK_FULL = ("create", "Disk is full on db-1", "--source", "monitoring")

texts = st.text(st.characters(exclude_categories=()))


def run(*arguments: str, stdin: str | bytes | None = None) -> Result:
    """Run a command in this process; an exception that is not an exit fails the test."""
    # Unless told otherwise, click 8.1 mixes stderr into stdout.
    mixes = "mix_stderr" in signature(CliRunner).parameters
    apart: dict[str, Any] = {"mix_stderr": False} if mixes else {}
    return CliRunner(**apart).invoke(
        main, arguments, input=stdin, prog_name="incidentkit", catch_exceptions=False
    )


def output(*arguments: str, stdin: str | bytes | None = None) -> str:
    """Return the output of a command, which must succeed."""
    result = run(*arguments, stdin=stdin)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def errors(*arguments: str, exit_code: int) -> list[str]:
    """Return the stderr lines of a command, which must fail."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    return result.stderr.splitlines()


@pytest.fixture(autouse=True)
def _database(migrated_sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name a database with the newest schema, which every command uses without an option."""
    monkeypatch.setenv("INCIDENTKIT_DATABASE_URL", migrated_sqlite_url)


@pytest.fixture
def _no_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name no database, so that commands use the default one."""
    monkeypatch.delenv("INCIDENTKIT_DATABASE_URL")


@pytest.fixture
def unused_port() -> int:
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


# Text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\x9b31mred", r"\x9b31mred"),
        ("two\r\nlines", r"two\r\nlines"),
        ("bell\x07\x08\x7f", r"bell\x07\x08\x7f"),
        ("\u202eesrever", r"\u202eesrever"),
        ("\u2066isolated\u2069", r"\u2066isolated\u2069"),
        ("zero\u200bwidth\ufeff", r"zero\u200bwidth\ufeff"),
        ("sepa\u2028rated\u2029", r"sepa\u2028rated\u2029"),
        ("tag\U000e0041", r"tag\U000e0041"),
        ("Ärger, 日本語\u3000und 🔥\u00a0!", "Ärger, 日本語\u3000und 🔥\u00a0!"),
        (r"C:\new", r"C:\new"),
    ],
)
def test_what_a_terminal_would_obey_is_shown_as_an_escape(text: str, shown: str) -> None:
    """Control, bidirectional, zero-width and separating characters are escaped, others are not."""
    assert harmless(text) == shown


@given(texts)
def test_harmless_text_is_one_line_without_controls(text: str) -> None:
    """Harmless text is one line without control, format or separator characters."""
    shown = harmless(text)
    assert not {unicodedata.category(character) for character in shown} & {
        *("Cc", "Cf", "Cs", "Zl", "Zp")
    }
    assert len(shown.splitlines()) <= 1
    assert harmless(shown) == shown


@given(texts.map(harmless), st.integers(len(ELLIPSIS), 30))
def test_shortened_text_fits(text: str, columns: int) -> None:
    """A text that is too wide is cut at its end, as late as possible."""
    shown = shorten(text, columns)
    assert width(shown) <= columns
    assert shown == text or text.startswith(shown.removesuffix(ELLIPSIS))
    assert shown == text or width(shown) >= columns - 1


def test_wide_characters_take_two_columns_and_accents_none() -> None:
    """The width counts terminal columns, not code points."""
    assert width("日本") == 4
    assert width("e\u0301") == 1
    assert shorten("日本語日本語", 10) == "日本語..."


# Incidents


def test_create_shows_the_incident() -> None:
    """`create` shows the new incident with the id and the time from the database."""
    lines = dict(re.split(r" {2,}", line) for line in output(*DISK_FULL).splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", lines.pop("created_at"))
    assert lines.pop("last_seen_at").endswith(" UTC")
    assert lines == {
        "incident_id": "1",
        "incident_type": "new",
        "source": "monitoring",
        "version": "1",
        "occurrences": "1",
        "incident_message": "Disk is full on db-1",
    }


def test_json_is_the_wire_format_on_one_line() -> None:
    """Each command's `--json` prints the object or array that REST returns."""
    created = output("create", "Ärger\n日本", "--source", "partner", "--json")
    assert created.endswith("}\n")
    assert len(created.splitlines()) == 1
    assert "日本" in created
    incident = json.loads(created)
    assert incident.keys() == {
        *("incident_id", "incident_message", "incident_type", "source", "created_at"),
        *("version", "dedup_key", "occurrences", "last_seen_at", "ended_at"),
    }
    assert incident["incident_message"] == "Ärger\n日本"
    assert json.loads(output("get", "1", "--json")) == incident
    assert json.loads(output("list", "--json")) == [incident]
    completed = json.loads(output("update-status", "1", "completed", "--json"))
    assert completed["ended_at"] >= incident["created_at"]
    assert completed == incident | {
        "incident_type": "completed",
        "version": 2,
        "ended_at": completed["ended_at"],
    }
    assert json.loads(output("list", "--page", "2", "--json")) == []


HUGE = (
    "must be an integer from -9223372036854775808 to 9223372036854775807, or one that a double "
    "holds exactly"
)


def test_details_are_given_and_shown_as_json() -> None:
    """`create` takes details, `get` shows them on one line, and `search` adds them to its JSON."""
    details = {"volume": "/var", "log": "one\ntwo\u202e", "used": 0.98}
    created = output(*DISK_FULL, "--details", json.dumps(details), "--json")
    assert json.loads(created)["details"] == details
    shown = '{"volume":"/var","log":"one\\ntwo\\u202e","used":0.98}'
    assert shown in [line.split("  ")[-1].strip() for line in output("get", "1").splitlines()]
    output("create", "Disk is full", "--source", "partner", "--details", "-", stdin='{"n": 1}')
    plain, detailed = (
        json.loads(output("search", "--order", "oldest", "--json", *more))["incidents"]
        for more in ([], ["--details"])
    )
    assert [each["details"] for each in detailed] == [details, {"n": 1}]
    assert all("details" not in each for each in plain)
    for text, line in (
        ("{", "Error: Invalid value for '--details': it is not JSON"),
        ("null", "Error: Invalid value for '--details': it is not a JSON object"),
        ("[]", "Error: details must be a JSON object"),
        (
            '{"a": [{"b": 1, "b": 2}]}',
            "Error: Invalid value for '--details': it repeats a name within an object",
        ),
        ('{"a": [NaN]}', "Error: details.a[0] must be a finite number"),
        *(
            (f'{{"a": [{huge}]}}', f"Error: details.a[0] {HUGE}")
            for huge in ("1" + "0" * 5000, "-" + "9" * 5000)
        ),
        (
            '{"a":' + "[" * 20_000 + "]" * 20_000 + "}",
            "Error: Invalid value for '--details': it is nested too deeply",
        ),
    ):
        assert errors(*DISK_FULL, "--details", text, exit_code=2)[-1] == line


def test_list_is_a_table_with_the_newest_first() -> None:
    """Columns align under their names, newest first, and each message stays on its line."""
    output("create", "one\ntwo \x1b[2J", "--source", "partner", "--incident-type", "completed")
    output(*DISK_FULL)
    head, newest, oldest = output("list").splitlines()
    assert head.split() == [
        *("incident_id", "created_at", "incident_type", "source", "incident_message")
    ]
    for name, new, old in [
        ("incident_id", "2 ", "1 "),
        ("incident_type", "new ", "completed "),
        ("source", "monitoring ", "partner "),
        ("incident_message", "Disk is full on db-1", r"one\ntwo \x1b[2J"),
    ]:
        assert newest[head.index(name) :].startswith(new)
        assert oldest[head.index(name) :].startswith(old)


def test_list_is_filtered_and_paged() -> None:
    """`list` filters and pages as the client's `list` does."""
    for source in ("operator", "partner", "partner"):
        output("create", "Disk is full", "--source", source)
    output("update-status", "2", "failed")

    def ids(*options: str) -> list[int]:
        return [found["incident_id"] for found in json.loads(output("list", "--json", *options))]

    assert ids() == [3, 2, 1]
    assert ids("--limit", "2") == [3, 2]
    assert ids("--limit", "2", "--page", "2") == [1]
    assert ids("--source", "partner") == [3, 2]
    assert ids("--source", "partner", "--status", "failed") == [2]


def test_an_empty_list_prints_nothing_but_says_so() -> None:
    """An empty list prints a message on stderr, or an empty array with `--json`."""
    result = run("list")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "No incidents.\n")
    assert output("list", "--json") == "[]\n"


def test_a_dash_reads_the_message_from_stdin() -> None:
    """With `-`, `create` reads the message from stdin."""
    created = output("create", "-", "--source", "operator", "--json", stdin="Diskette voll €\n")
    assert json.loads(created)["incident_message"] == "Diskette voll €"


def test_a_dash_reads_a_note_from_stdin() -> None:
    """With `-`, `note` and `update-status --note` read the note from stdin."""
    output(*DISK_FULL)
    output("note", "1", "-", stdin="The logs fill it\n")
    output("update-status", "1", "completed", "--note", "-", stdin="Removed\n")
    events = json.loads(output("history", "1", "--json"))
    assert [event["note"] for event in events] == [None, "The logs fill it", "Removed"]


def test_stdin_that_is_not_utf8_is_refused() -> None:
    """A message that is not UTF-8 is a usage error."""
    result = run("create", "-", "--source", "operator", stdin=b"caf\xe9 au lait")
    assert result.exit_code == 2
    assert "stdin is not UTF-8" in result.stderr


def test_stdin_that_is_closed_is_refused() -> None:
    """A dash without a stdin is a usage error."""
    command = f"{sys.executable} -m incidentkit create - --source operator <&-"
    ended = subprocess.run(["/bin/sh", "-c", command], check=False, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "stdin cannot be read" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_redis_is_told_of_what_the_command_line_changes(redis_url: str, sqlite_url: str) -> None:
    """With `--redis-url`, a cached page does not outlive a change."""
    servers = ("--database-url", sqlite_url, "--redis-url", redis_url)
    assert json.loads(output("list", "--json", *servers)) == []
    output(*DISK_FULL, *servers)
    assert len(json.loads(output("list", "--json", *servers))) == 1
    output("update-status", "1", "failed", *servers)
    assert json.loads(output("list", "--json", *servers))[0]["incident_type"] == "failed"


# Errors


def test_a_missing_incident_is_a_failure() -> None:
    """Reading or changing a missing incident exits with 1 and one line."""
    assert errors("get", "7", exit_code=1) == ["Error: Incident 7 not found"]
    assert errors("update-status", "7", "failed", exit_code=1) == ["Error: Incident 7 not found"]


def test_every_faulty_field_is_named() -> None:
    """Invalid values exit with 2 and one line for each field."""
    lines = errors("create", "hi", "--source", "me", "--incident-type", "old", exit_code=2)
    assert [line.split()[1] for line in lines] == ["incident_message", "source", "incident_type"]
    lines = errors("list", "--page", "0", "--limit", "1001", "--status", "x", exit_code=2)
    assert [line.split()[1] for line in lines] == ["page", "limit", "status"]
    assert errors("update-status", "0", "done", exit_code=2) == [
        "Error: incident_id must be an integer from 1 to 9223372036854775807",
        "Error: status must be one of: new, completed, failed",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["get", "seven"],
        ["create", "Disk is full"],
        ["list", "--limit", "ten"],
        ["list", "--colour"],
        ["serve", "--port", "65536"],
        ["serve", "--workers", "0"],
        ["serve", "--host", ""],
        ["serve", "--workers", "2", "--database-url", "sqlite+aiosqlite:///:memory:"],
        ["db", "upgrade", "head", "now"],
        ["nonsense"],
    ],
)
def test_bad_usage_points_at_the_help(arguments: list[str]) -> None:
    """An unknown command or option, or an invalid number, exits with 2 and names the help."""
    lines = errors(*arguments, exit_code=2)
    assert lines[0].startswith("Usage: incidentkit")
    assert lines[1].endswith(("-h' for help.", "--help' for help."))
    assert lines[-1].startswith("Error: ")


def test_debug_shows_the_chain_of_an_error(unused_port: int) -> None:
    """`--debug` shows the exceptions behind an error before its line, and never a password."""
    url = f"postgresql://user:secret@127.0.0.1:{unused_port}/incidents"
    for command in (["list"], ["db", "check"], ["serve", "--port", "0"]):
        (line,) = errors(*command, "--database-url", url, exit_code=1)
        lines = errors("--debug", *command, "--database-url", url, exit_code=1)
        assert lines[-1] == line
        assert lines[0] == "Traceback (most recent call last):"
        assert any(each.startswith("ConnectionRefusedError: ") for each in lines)
        assert "The above exception was the direct cause of the following exception:" in lines
        assert (
            f"incidentkit.domain.errors.StoreUnavailable: {line.removeprefix('Error: ')}" in lines
        )
        assert "secret" not in "".join(lines)
    broken = "postgresql://user:secret/@127.0.0.1/incidents"
    assert "secret" not in "".join(errors("--debug", "list", "--database-url", broken, exit_code=2))


def _commands(group: click.Group, *path: str) -> Iterator[list[str]]:
    for name, command in group.commands.items():
        yield [*path, name]
        if isinstance(command, click.Group):
            yield from _commands(command, *path, name)


def options() -> Iterator[tuple[list[str], click.Option]]:
    """Yield every option of every command, with the command's name."""
    for path in ([], *_commands(main)):
        command: click.Command = main
        for name in path:
            assert isinstance(command, click.Group)
            command = command.commands[name]
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                yield path, parameter


SINGLE_VALUED = [
    pytest.param(path, option.opts[0], id=" ".join([*path, option.opts[0]]))
    for path, option in options()
    if not option.is_flag and not option.multiple
]


@pytest.mark.parametrize(("command", "option"), SINGLE_VALUED)
def test_a_repeated_option_is_refused(command: list[str], option: str) -> None:
    """An option that takes one value is not given two, even if they are equal."""
    for second in ([option, "1"], [f"{option}=2"]):
        lines = errors(*command, option, "1", *second, exit_code=2)
        assert lines[0].startswith("Usage: incidentkit")
        assert lines[-1] == f"Error: Option '{option}' takes one value; it was given 2 times."


def test_a_repeated_option_does_not_wait_for_stdin() -> None:
    """A repeated option is refused before the message is read from stdin."""
    reader, writer = os.pipe()
    program = start("create", "-", "--source", "partner", "--source", "operator", stdin=reader)
    exit_code, _, err = outcome(program)
    os.close(reader)
    os.close(writer)
    assert (exit_code, "takes one value" in err) == (2, True)


def test_flags_and_options_of_several_values_may_be_repeated() -> None:
    """A repeated flag changes nothing, `search` takes several statuses, and help wins over all."""
    assert json.loads(output("list", "--json", "--json")) == []
    assert json.loads(output("search", *("--status", "new") * 2, "--json"))["incidents"] == []
    assert output("list", *("--limit", "1") * 2, "--help").startswith("Usage: ")
    assert output("--version", "--version") == f"incidentkit {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("create", "Disk is f\udcfcll", "--source", "partner"), "INCIDENT_MESSAGE"),
        (("search", "--text", "\udce4"), "--text"),
        (("search", "--status", "new", "--status", "\udce4"), "--status"),
        (("note", "1", "\udce4"), "NOTE"),
        (("list", "--database-url", "sqlite+aiosqlite:///\udce4.db"), "--database-url"),
        (("purge", "--older-than", "90d", "--actor", "\udce4"), "--actor"),
    ],
)
def test_an_argument_in_another_encoding_is_named(arguments: tuple[str, ...], name: str) -> None:
    """An argument that is not in the terminal's encoding is refused by its name."""
    line = errors(*arguments, exit_code=2)[-1]
    assert line.startswith(f"Error: Invalid value for '{name}': ")
    assert line.endswith(f"it is not in the terminal's encoding, {sys.getfilesystemencoding()}")


def test_bytes_of_another_encoding_are_named() -> None:
    """What a terminal in Latin-1 sends to a program in UTF-8 is refused by the option's name."""
    program = [sys.executable, "-X", "utf8", "-m", "incidentkit"]
    ended = subprocess.run(
        [*map(os.fsencode, program), b"search", b"--text", b"\xe4"],
        check=False,
        capture_output=True,
    )
    assert ended.returncode == 2
    assert b"'--text': it is not in the terminal's encoding, utf-8" in ended.stderr


# The default database, and files that do not exist


READING = [
    ("list",),
    ("search",),
    ("get", "1"),
    ("history", "1"),
    ("watch",),
    ("purge", "--older-than", "1d", "--dry-run"),
    ("db", "current"),
    ("db", "check"),
]
CHANGING = [
    ("update-status", "1", "failed"),
    ("resolve", "disk"),
    ("note", "1", "Order a disk"),
    ("purge", "--older-than", "1d"),
    ("db", "downgrade"),
]
MISSING = "there is no such file: correct the path, or create it with `incidentkit db upgrade`"
DEFAULT = "Reading incidentkit.db in the current folder, the default database.\n"


@pytest.mark.parametrize("command", [*READING, *CHANGING])
def test_only_create_creates_a_database(command: tuple[str, ...], tmp_path: Path) -> None:
    """A command that needs incidents fails without its SQLite file, and says how to create it."""
    folder = tmp_path / "else where"
    folder.mkdir()
    for url in (
        f"sqlite+aiosqlite:///{folder}/missing.db",
        f"sqlite+aiosqlite:///file:{folder}/missing.db?uri=true",
    ):
        (line,) = errors(*command, "--database-url", url, exit_code=1)
        assert line == f"Error: The database {folder}/missing.db cannot be used: {MISSING}"
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("_no_database")
@pytest.mark.parametrize("command", READING)
def test_a_missing_default_database_is_named(command: tuple[str, ...], tmp_path: Path) -> None:
    """Without a setting, a command that reads names the default file if it does not exist."""
    before = {*tmp_path.iterdir()}
    (line,) = errors(*command, exit_code=1)
    assert line == f"Error: The database {tmp_path}/incidentkit.db cannot be used: {MISSING}"
    assert {*tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "command", [command for command in (*READING, *CHANGING) if command[0] != "db"]
)
def test_no_tables_are_created_in_a_foreign_file(command: tuple[str, ...], tmp_path: Path) -> None:
    """A command that needs incidents changes nothing in an SQLite file of another program."""
    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE bookmark (name TEXT)")
    connection.close()
    before = foreign.read_bytes()
    (line,) = errors(*command, "--database-url", f"sqlite+aiosqlite:///{foreign}", exit_code=1)
    assert "no incidentkit schema" in line
    assert "run `incidentkit db upgrade`" in line
    assert foreign.read_bytes() == before


@pytest.mark.parametrize(
    "command",
    [
        ("create", "hi", "--source", "partner"),
        ("list", "--page", "0"),
        ("watch", "--after", "nonsense"),
        ("db", "upgrade", "nonsense"),
        ("db", "downgrade", "nonsense"),
    ],
)
def test_faulty_arguments_create_no_database(command: tuple[str, ...], tmp_path: Path) -> None:
    """Faulty arguments are reported before a file is opened, missed or created."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'new.db'}"
    (line,) = errors(*command, "--database-url", url, exit_code=2)
    assert MISSING not in line
    assert not (tmp_path / "new.db").exists()


@pytest.mark.usefixtures("_no_database")
def test_a_command_that_reads_names_the_default_database() -> None:
    """What reads the default database says so on stderr; what changes it does not."""
    assert "Disk is full" in output(*DISK_FULL)
    for command in READING:
        if command[0] != "watch":
            result = run(*command)
            assert (result.exit_code, result.stderr) == (0, DEFAULT)
            assert result.stdout
    with start("watch", "--from-start") as program:
        assert "created" in line_of(program)
        program.send_signal(signal.SIGINT)
        assert outcome(program)[::2] == (130, DEFAULT)
    assert "failed" in output("update-status", "1", "failed")
    assert output("get", "1", "--database-url", "sqlite+aiosqlite:///incidentkit.db")


def test_the_file_that_a_command_uses_is_named_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command names the `.env` that it uses on stderr, with control characters escaped."""
    monkeypatch.delenv("INCIDENTKIT_DATABASE_URL", raising=False)
    folder = Path("a\x1b[31m folder")
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path(".env").write_text("INCIDENTKIT_DATABASE_URL=sqlite:///own.db\n", "utf-8")
    result = run(*DISK_FULL, "--json")
    assert json.loads(result.stdout)["incident_id"] == 1
    shown = str(Path.cwd()).replace("\x1b", "\\x1b")
    assert result.stderr.splitlines() == [f"Using settings from {shown}/.env"]
    assert run("list", "--database-url", "sqlite:///own.db").stderr == ""


@pytest.mark.parametrize("name", ["INCIDENTKIT_DATABASE_URL", "POSTGRES_HOST"])
def test_a_named_database_is_not_announced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a database that nothing names is the default one, even if the file is the same."""
    output(*DISK_FULL, "--database-url", "sqlite+aiosqlite:///incidentkit.db")
    monkeypatch.delenv("INCIDENTKIT_DATABASE_URL")
    url = "sqlite+aiosqlite:///incidentkit.db"
    values = {"INCIDENTKIT_DATABASE_URL": url, "POSTGRES_HOST": "/nowhere"}
    monkeypatch.setenv(name, values[name])
    assert DEFAULT not in run("list").stderr


# Unknown variables


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("INCIDENTKIT_DATABSE_URL", "is unknown: did you mean INCIDENTKIT_DATABASE_URL?"),
        ("INCIDENTKIT_POOL_SIZE", "is unknown: did you mean DB_POOL_SIZE?"),
        ("INCIDENTKIT_POSTGRES_HOST", "is unknown: did you mean POSTGRES_HOST?"),
        ("INCIDENTKIT_COLOUR", "is unknown: unset it"),
    ],
)
@pytest.mark.parametrize("place", ["process", "file"])
def test_an_unknown_variable_is_refused(
    place: str, name: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command refuses an unknown INCIDENTKIT_* variable, and names the nearest one."""
    if place == "process":
        monkeypatch.setenv(name, "secret")
    else:
        Path(".env").write_text(f"{name}=secret\n", "utf-8")
    for command in (*READING, *CHANGING, DISK_FULL, ("db", "upgrade"), ("serve", "--port", "0")):
        assert errors(*command, exit_code=2) == [f"Error: {name} {fault}"]
    assert output("--version")


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("INCIDENTKIT_DATABASE_URL", "mysql://root:secret@db", "INCIDENTKIT_DATABASE_URL must"),
        ("INCIDENTKIT_REDIS_URL", "http://secret", "INCIDENTKIT_REDIS_URL must"),
        ("POSTGRES_PORT", "secret", "POSTGRES_PORT must"),
        ("DB_POOL_SIZE", "secret", "DB_POOL_SIZE must"),
    ],
)
def test_a_bad_setting_is_named_without_its_value(
    variable: str, value: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An invalid setting exits with 2, and its value, which may be a secret, is not shown."""
    if variable.startswith("POSTGRES_"):
        monkeypatch.delenv("INCIDENTKIT_DATABASE_URL")
    monkeypatch.setenv(variable, value)
    (line,) = errors("list", exit_code=2)
    assert named in line
    assert "secret" not in line


def test_a_bad_setting_of_an_option_names_the_option() -> None:
    """An invalid value of an option is an error that names the option."""
    (line,) = errors("list", "--database-url", "mysql://secret", exit_code=2)
    assert line.startswith("Error: --database-url")
    assert "secret" not in line


def test_settings_come_from_a_file_too(tmp_path: Path) -> None:
    """A `.env` in the current folder is read; an unreadable one is an error that names it."""
    file = tmp_path / ".env"
    file.write_text("DB_POOL_SIZE=0")
    used, line = errors("list", exit_code=2)
    assert used == f"Using settings from {file}"
    assert line.startswith("Error: DB_POOL_SIZE")
    file.write_bytes(b"\xff\xfe")
    assert errors("list", exit_code=2) == ["Error: .env cannot be read: it is not UTF-8"]


def test_an_option_replaces_what_the_environment_names(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An option satisfies INCIDENTKIT_REDIS_REQUIRED, and replaces a faulty variable."""
    monkeypatch.setenv("INCIDENTKIT_REDIS_REQUIRED", "1")
    monkeypatch.setenv("INCIDENTKIT_DATABASE_URL", "mysql://db")
    database = ("--database-url", "sqlite+aiosqlite:///incidents.db")
    (line,) = errors("list", *database, exit_code=2)
    assert line.startswith("Error: INCIDENTKIT_REDIS_REQUIRED needs a Redis")
    assert output("list", "--json", *database, "--redis-url", redis_url) == "[]\n"


@pytest.mark.parametrize("option", ["--database-url", "--redis-url"])
def test_an_empty_option_is_refused(option: str) -> None:
    """An empty option is an error: it does not select the default database."""
    (line,) = errors("list", option, " ", exit_code=2)
    assert line.startswith(f"Error: {option}")
    assert line.endswith(" is empty")


@pytest.mark.parametrize("command", [("list",), ("db", "current"), ("serve", "--port", "0")])
def test_a_database_that_is_away_is_one_line(command: tuple[str, ...], unused_port: int) -> None:
    """An unreachable database exits with 1 and one line, without a traceback or its URL."""
    url = f"postgresql://user:secret@127.0.0.1:{unused_port}/incidents"
    line = (
        f"Error: The database 127.0.0.1:{unused_port}/incidents is unavailable: "
        "the connection was refused; check that the server runs at this address\n"
    )
    assert outcome(start(*command, "--database-url", url)) == (1, "", line)


def test_a_redis_that_is_required_and_away_is_one_line(
    unused_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With INCIDENTKIT_REDIS_REQUIRED, a command without Redis exits with 1."""
    monkeypatch.setenv("INCIDENTKIT_REDIS_REQUIRED", "1")
    url = f"redis://:secret@127.0.0.1:{unused_port}/0"
    (line,) = errors("list", "--redis-url", url, exit_code=1)
    assert line == REDIS_AWAY.format(port=unused_port)


# History, search and purge


def test_what_happened_is_shown_with_who_did_it() -> None:
    """`history` has a line for each change, with its actor and note, and `note` adds one."""
    output(*DISK_FULL, "--dedup-key", "disk", "--actor", "bob")
    output("create", "Disk is at 100 %", "--source", "operator", "--dedup-key", "disk")
    output("update-status", "1", "completed", "--note", "Mended", "--actor", "alice")
    added = output("note", "1", "Order\x1b[2J a disk")
    assert "noted" in added
    assert "\\x1b[2J" in added
    lines = output("history", "1").splitlines()
    assert lines[0].split() == ["at", "kind", "from_status", "to_status", "actor", "note"]
    told = [re.sub(r"^[0-9: -]{19} UTC +", "", line).split(maxsplit=4) for line in lines[1:]]
    assert told == [
        ["created", "new", "bob"],
        ["recurred", "Disk", "is", "at", "100 %"],
        ["status_changed", "new", "completed", "alice", "Mended"],
        ["noted", "Order\\x1b[2J", "a", "disk"],
    ]
    events = json.loads(output("history", "1", "--json", "--limit", "2"))
    assert [event["kind"] for event in events] == ["created", "recurred"]
    (third, _) = json.loads(output("history", "1", "--json", "--after", events[1]["cursor"]))
    assert third["actor"] == "alice"


def test_a_command_can_be_repeated() -> None:
    """With an idempotency key, a repeated command shows the first answer and changes nothing."""
    first = output(*DISK_FULL, "--idempotency-key", "k", "--json")
    assert output(*DISK_FULL, "--idempotency-key", "k", "--json") == first
    change = ("update-status", "1", "failed", "--idempotency-key", "c", "--json")
    assert output(*change) == output(*change)
    other = ("create", "Line is down", *DISK_FULL[2:], "--idempotency-key", "k")
    (line,) = errors(*other, exit_code=2)
    assert line == "Error: idempotency_key was used with other parameters"
    assert len(json.loads(output("list", "--json"))) == 1


def test_resolve_ends_the_open_incidents_of_keys() -> None:
    """`resolve` shows what it ended, and names on stderr a key without an open incident."""
    for key in ("disk", "line", "fan"):
        output(*DISK_FULL, "--dedup-key", key)
    shown = output("resolve", "disk", "--note", "-", "--actor", "alice", stdin="Removed\n")
    assert re.search(r"^dedup_key +disk$", shown, re.MULTILINE)
    assert re.search(r"^incident_type +completed$", shown, re.MULTILINE)
    last = json.loads(output("history", "1", "--json"))[-1]
    assert (last["note"], last["actor"]) == ("Removed", "alice")
    result = run("resolve", "disk", "line", "new\nline", "--status", "failed")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["incident_id", "2"]
    assert result.stderr.splitlines() == [
        "No incident with the key disk is open.",
        r"No incident with the key new\nline is open.",
    ]
    command = ("resolve", "line", "fan", "--json", "--idempotency-key", "k")
    line, fan = json.loads(output(*command))
    assert (line, fan["incident_id"], fan["incident_type"]) == (None, 3, "completed")
    assert json.loads(output(*command)) == [line, fan]
    result = run("resolve", "disk")
    assert (result.exit_code, result.stdout) == (0, "")
    assert errors("resolve", "disk", "", "--status", "new", exit_code=2) == [
        "Error: dedup_keys[1] must have 1 to 255 characters",
        "Error: status must be one of: completed, failed",
    ]


def test_a_change_that_is_not_allowed_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong version or a forbidden transition fails with one line that gives the reason."""
    output(*DISK_FULL)
    expected = ("update-status", "1", "failed", "--expected-version", "2")
    assert errors(*expected, exit_code=1) == ["Error: Incident 1 has moved on: it is at version 1"]
    monkeypatch.setenv("INCIDENTKIT_TRANSITIONS", "new:completed")
    assert errors("update-status", "1", "failed", exit_code=1) == [
        "Error: Incident 1 cannot go from new to failed"
    ]
    assert "completed" in output("update-status", "1", "completed", "--expected-version", "1")


def test_search_shows_a_page_and_how_to_go_on() -> None:
    """`search` takes several filters, and writes the total and the next cursor to stderr."""
    for source in ("monitoring", "partner", "operator"):
        output("create", f"Disk of {source} is full", "--source", source)
    arguments = ("search", "--text", "DISK", "--source", "partner", "--source", "operator")
    first = run(*arguments, "--limit", "1", "--total")
    assert first.exit_code == 0
    assert [line.split()[0] for line in first.stdout.splitlines()] == ["incident_id", "3"]
    total, following = first.stderr.splitlines()
    assert total == "2 in total."
    cursor = following.removeprefix("For the next page: --after ")
    second = output(*arguments, "--limit", "1", "--after", cursor)
    assert [line.split()[0] for line in second.splitlines()] == ["incident_id", "2"]
    page = json.loads(output(*arguments, "--order", "oldest", "--json"))
    assert [incident["incident_id"] for incident in page["incidents"]] == [2, 3]
    assert (page["next"], page["total"]) == (None, None)
    nothing = run("search", "--created-before", "2020-01-01T00:00:00+03:00")
    assert (nothing.exit_code, nothing.stdout, nothing.stderr) == (0, "", "No incidents.\n")
    assert len(output("search", "--created-after", "2020-01-01").splitlines()) == 4


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--status", "open"), "Error: status must be one of: new, completed, failed"),
        (("--order", "best"), "Error: order must be one of: newest, oldest"),
        (("--after", "x"), "Error: after is not a cursor"),
    ],
)
def test_a_faulty_search_says_what_it_should_be(arguments: tuple[str, str], line: str) -> None:
    """An invalid search option exits with 2 and one line that says what is wrong."""
    assert errors("search", *arguments, exit_code=2) == [line]


def test_search_finds_by_a_key() -> None:
    """Search shows the incidents with a deduplication key."""
    for key in ("disk", "line"):
        output("create", f"About the {key}", "--source", "operator", "--dedup-key", key)
    shown = output("search", "--dedup-key", "disk", "--json")
    assert [each["dedup_key"] for each in json.loads(shown)["incidents"]] == ["disk"]


def test_a_note_can_be_repeated() -> None:
    """A note with a key is added once, and one on another version is refused."""
    output("create", "Disk is full", "--source", "operator")
    repeated = ("note", "1", "It is hot", "--idempotency-key", "k", "--expected-version", "1")
    assert output(*repeated) == output(*repeated)
    assert len(json.loads(output("history", "1", "--json"))) == 2
    (line,) = errors("note", "1", "It is hot", "--expected-version", "2", exit_code=1)
    assert "has moved on: it is at version 1" in line


def test_a_faulty_time_is_refused() -> None:
    """A time that is not in ISO 8601 is a usage error."""
    result = run("search", "--created-after", "yesterday")
    assert result.exit_code == 2
    assert "must be a time such as 2026-11-23" in result.stderr


def test_watch_takes_one_place_to_begin() -> None:
    """`--after` and `--from-start` exclude each other, and a foreign cursor is an error."""
    result = run("watch", "--from-start", "--after", "latest")
    assert result.exit_code == 2
    foreign = encode_cursor(1, 2, 3, 4)
    assert errors("watch", "--after", foreign, exit_code=1) == [
        "Error: The cursor is unknown in this database: start again without a cursor"
    ]


def test_purge_removes_what_ended_long_ago() -> None:
    """`purge` takes an age with its unit, and shows the number of removed incidents."""
    output(*DISK_FULL)
    output("update-status", "1", "failed")
    result = run("purge", "--older-than", "90d")
    assert (result.exit_code, result.stdout) == (0, "0 incidents removed.\n")
    with sqlite3.connect("incidents.db") as connection:
        connection.execute("UPDATE \"Incident\" SET ended_at = '2020-01-01 00:00:00'")
    connection.close()
    result = run("purge", "--older-than", "13w", "--actor", "janitor")
    assert (result.exit_code, result.stdout) == (0, "1 incident removed.\n")
    (event,) = json.loads(output("history", "1", "--json"))
    assert (event["kind"], event["actor"]) == ("purged", "janitor")
    assert errors("get", "1", exit_code=1) == ["Error: Incident 1 not found"]


def test_a_dry_run_of_a_purge_removes_nothing() -> None:
    """`purge --dry-run` shows the number of incidents that a purge would remove."""
    for _ in range(2):
        output(*DISK_FULL, "--incident-type", "completed")
    output(*DISK_FULL)
    dry = ("purge", "--older-than", "0m", "--dry-run")
    assert output("purge", "--older-than", "1d", "--dry-run") == "0 incidents would be removed.\n"
    assert output(*dry) == "2 incidents would be removed.\n"
    assert len(json.loads(output("list", "--json"))) == 3
    assert output("purge", "--older-than", "0m") == "2 incidents removed.\n"
    assert output(*dry) == "0 incidents would be removed.\n"


@pytest.mark.parametrize("age", ["90", "d", "-1d", "1.5h", "90 d", "1y", "999999d", ""])
def test_an_age_without_a_unit_is_refused(age: str) -> None:
    """An age is a whole number with m, h, d or w."""
    result = run("purge", "--older-than", age)
    assert result.exit_code == 2
    assert "must be a number with m, h, d or w, such as 90d" in result.stderr


# Schema


def test_db_takes_a_postgres_database_up_and_down(empty_postgres_url: str) -> None:
    """`db` upgrades and downgrades a database; on an empty one, errors name the command."""
    database = ("--database-url", empty_postgres_url)
    assert output("db", "current", *database) == NO_SCHEMA
    for command in (["db", "check"], ["list"], ["serve", "--port", "0"]):
        exit_code, _, err = outcome(start(*command, *database))
        assert exit_code == 1
        assert len(err.splitlines()) == 1
        assert "run `incidentkit db upgrade`" in err
    assert outcome(start("db", "upgrade", *database)) == (
        0,
        f"{SCHEMA_REVISION} (head)\n",
        "The tables are in the schema public.\n",
    )
    assert output("db", "current", *database) == f"{SCHEMA_REVISION} (head)\n"
    assert output("db", "check", *database) == "The schema is up to date.\n"
    output(*DISK_FULL, *database)
    assert output("db", "downgrade", *database) == f"{REVISIONS[-2]}\n"
    assert output("db", "downgrade", "-1", *database) == f"{REVISIONS[-3]}\n"
    (line,) = errors("db", "check", *database, exit_code=1)
    assert REVISIONS[-3] in line
    for revision, reached in ((REVISIONS[-3], REVISIONS[-3]), ("+2", f"{SCHEMA_REVISION} (head)")):
        result = run("db", "upgrade", revision, *database)
        assert (result.exit_code, result.stdout) == (0, f"{reached}\n")
    assert json.loads(output("get", "1", "--json", *database))["source"] == "monitoring"


def test_db_works_on_sqlite(sqlite_url: str) -> None:
    """The same commands work on SQLite."""
    database = ("--database-url", sqlite_url)
    assert output("db", "upgrade", *database) == f"{SCHEMA_REVISION} (head)\n"
    assert output("db", "downgrade", "base", "--yes", *database) == NO_SCHEMA
    assert output("db", "downgrade", "base", *database) == NO_SCHEMA


def test_db_names_and_restores_a_lost_trigger(
    migrated_postgres_url: str, migrated_sqlite_url: str
) -> None:
    """`db check` names what is missing although the revision is the newest; `db upgrade` mends."""
    url = migrated_postgres_url
    asyncio.run(run_sql(url, 'DROP TRIGGER incident_token_truncate ON "Incident"'))
    asyncio.run(run_sql(migrated_sqlite_url, "DROP TRIGGER incident_text_insert"))
    for database_url, name in (
        (url, "incident_token_truncate"),
        (migrated_sqlite_url, "incident_text_insert"),
    ):
        database = ("--database-url", database_url)
        assert output("db", "current", *database) == f"{SCHEMA_REVISION} (head)\n"
        (line,) = errors("db", "check", *database, exit_code=1)
        assert f"the trigger {name} is missing: run `incidentkit db upgrade`" in line
        restored = f"Restored the trigger {name}.\n{SCHEMA_REVISION} (head)\n"
        result = run("db", "upgrade", *database)
        assert (result.exit_code, result.stdout) == (0, restored)
        assert output("db", "check", *database) == "The schema is up to date.\n"


@pytest.mark.parametrize(
    ("at", "revision"),
    [
        (SCHEMA_REVISION, "base"),
        (SCHEMA_REVISION, f"-{len(REVISIONS)}"),
        (SCHEMA_REVISION, f"head-{len(REVISIONS)}"),
        (SCHEMA_REVISION, f"{REVISIONS[0][:4]}-1"),
        (REVISIONS[1], "-2"),
        (REVISIONS[0], "-1"),
    ],
)
def test_db_does_not_remove_incidents_unasked(sqlite_url: str, at: str, revision: str) -> None:
    """A downgrade that would drop the table is refused without `--yes`, and the rows stay."""
    database = ("--database-url", sqlite_url)
    output(*DISK_FULL, *database)
    if at != SCHEMA_REVISION:
        output("db", "downgrade", at, *database)
    (line,) = errors("db", "downgrade", revision, *database, exit_code=2)
    assert line == (
        f"Error: a downgrade to {revision} drops the incident table with all its rows: "
        "add --yes to confirm"
    )
    output("db", "upgrade", *database)
    assert len(json.loads(output("list", "--json", *database))) == 1


@pytest.mark.parametrize("answer", [b"y", b"n"])
def test_db_asks_on_a_terminal_before_it_removes_incidents(answer: bytes, sqlite_url: str) -> None:
    """On a terminal, a downgrade asks for confirmation, and only a yes drops the table."""
    database = ("--database-url", sqlite_url)
    output(*DISK_FULL, *database)
    keyboard, terminal = pty.openpty()
    command = [sys.executable, "-m", "incidentkit", "db", "downgrade", "base", *database]
    with subprocess.Popen(
        command, stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as program:
        os.write(keyboard, answer + b"\n")
        _, err = program.communicate(timeout=DEADLINE)
    os.close(terminal)
    os.close(keyboard)
    assert b"drops the incident table with all its rows. Continue?" in err
    removed = output("db", "current", *database) == NO_SCHEMA
    assert (program.returncode == 0) is removed is (answer == b"y")


def test_an_unknown_revision_is_bad_usage(sqlite_url: str) -> None:
    """An unknown revision exits with 2."""
    for command in ("upgrade", "downgrade"):
        for revision in ("nonsense", "heads@base"):
            (line,) = errors("db", command, revision, "--database-url", sqlite_url, exit_code=2)
            assert line.startswith("Error: revision ")


# Help


@pytest.mark.parametrize("command", [[], *_commands(main)])
def test_every_command_has_help(command: list[str]) -> None:
    """The help describes the command and each of its options."""
    text = output(*command, "--help")
    assert text == output(*command, "-h")
    usage = " ".join(["incidentkit", *command])
    assert text.startswith(f"Usage: {usage} ")
    for option in re.findall(r"^  (?:-\w, )?--\S+(.*)", text, re.MULTILINE):
        assert option.strip()


def test_the_version_is_the_package_s() -> None:
    """`--version` prints the name and the version."""
    assert output("--version") == f"incidentkit {__version__}\n"


def loaded_by(*arguments: str) -> set[str]:
    """Run a command in its own process and return the modules that it loads."""
    program = f"""
import sys
from incidentkit.cli import main
try:
    main({arguments!r})
finally:
    print(*sorted(sys.modules), file=sys.stderr)
"""
    ended = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    return set(ended.stderr.decode().split())


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["create", "--help"], ["serve", "--help"], ["db", "--help"]],
)
def test_help_loads_no_driver_and_no_server(arguments: list[str]) -> None:
    """`--help` and `--version` load no database library, no Redis client and no server."""
    loaded = loaded_by(*arguments)
    assert "incidentkit.cli" in loaded
    assert not loaded & {"sqlalchemy", "alembic", "asyncpg", "starlette", "uvicorn", "redis"}


@pytest.mark.parametrize("arguments", [DISK_FULL, ("list",), ("db", "current")])
def test_only_serve_loads_the_server(arguments: tuple[str, ...]) -> None:
    """Commands other than `serve` load neither Uvicorn nor Starlette."""
    assert not loaded_by(*arguments) & {"starlette", "uvicorn"}


def test_help_needs_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve --help` works without the server's packages."""
    for package in ("starlette", "uvicorn"):
        monkeypatch.setitem(sys.modules, package, None)
    assert "--workers" in output("serve", "--help")


# Completion


SHELLS = ("bash", "zsh", "fish")
INCIDENTKIT = """
import sys
from incidentkit.__main__ import run
sys.argv[0] = "incidentkit"
run()
"""
"""Runs the program under its own name."""


def completions(shell: str, *words: str) -> list[str]:
    """Return the values that the program offers to a shell for the last of the words."""
    # Fish passes the word itself, other shells its place.
    last = words[-1] if shell == "fish" else str(len(words))
    variables = {
        "_INCIDENTKIT_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": shlex.join(["incidentkit", *words[:-1]]) + f" {words[-1]}",
        "COMP_CWORD": last,
    }
    reader, writer = os.pipe()
    program = start(program=("-c", INCIDENTKIT), env={**os.environ, **variables}, stdin=reader)
    exit_code, out, err = outcome(program)
    os.close(reader)
    os.close(writer)
    assert (exit_code, err) == (0, "")
    lines = out.splitlines()
    # Zsh gets three lines for each: its type, the value and its help.
    if shell == "zsh":
        return lines[1::3]
    return [line.removeprefix("plain,").partition("\t")[0] for line in lines]


@pytest.mark.parametrize("shell", SHELLS)
def test_shells_complete_values(shell: str) -> None:
    """Bash, Zsh and Fish are offered the values of options and arguments that fit."""
    assert completions(shell, "list", "--status", "") == ["new", "completed", "failed"]
    assert completions(shell, "search", "--status", "new", "--source", "p") == ["partner"]
    assert completions(shell, "search", "--order", "o") == ["oldest"]
    assert completions(shell, "update-status", "7", "f") == ["failed"]
    assert completions(shell, "db", "upgrade", "h") == ["head"]
    assert completions(shell, "pur") == ["purge"]


def test_completion_does_not_read_stdin() -> None:
    """A dash before the word that is completed does not wait for input."""
    assert completions("bash", "create", "-", "--sou") == ["--source"]


def test_completion_offers_sqlite_files(tmp_path: Path) -> None:
    """`--database-url` is completed to SQLite files and folders, and to PostgreSQL's scheme."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "old.sqlite3").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".hidden").mkdir()
    sqlite = "sqlite+aiosqlite:///"
    urls = [f"{sqlite}incidents.db", f"{sqlite}other/"]
    assert completions("zsh", "list", "--database-url", "") == ["postgresql://", *urls]
    assert completions("zsh", "list", "--database-url", f"{sqlite}o") == urls[1:]
    nested = completions("fish", "list", "--database-url", f"{sqlite}other/")
    assert nested == [f"{sqlite}other/old.sqlite3"]
    absolute = completions("fish", "list", "--database-url", f"{sqlite}{tmp_path}/i")
    assert absolute == [f"{sqlite}{tmp_path}/incidents.db"]


def test_every_list_of_values_is_offered() -> None:
    """An option or argument whose help lists its values completes to exactly those."""
    listed = 0
    for path in _commands(main):
        command: click.Command = main
        for name in path:
            assert isinstance(command, click.Group)
            command = command.commands[name]
        for parameter in command.params:
            values = (parameter.metavar or "").strip("[]").split("|")
            if len(values) > 1:
                listed += 1
                context = click.Context(command)
                offered = [item.value for item in parameter.shell_complete(context, "")]
                assert offered == values, (path, parameter.name)
    assert listed >= 8


def test_bash_completes_after_the_line_of_the_documentation(tmp_path: Path) -> None:
    """With the documented line, Bash completes a word."""
    script = tmp_path / "incidentkit"
    script.write_text(f"#!{sys.executable}\n{INCIDENTKIT}")
    script.chmod(0o755)
    commands = """
eval "$(_INCIDENTKIT_COMPLETE=bash_source incidentkit)"
COMP_WORDS=(incidentkit list --status f) COMP_CWORD=3
_incidentkit_completion incidentkit
echo "${COMPREPLY[@]}"
"""
    path = os.pathsep.join((str(tmp_path), os.environ["PATH"]))
    done = subprocess.run(
        ["bash", "--norc", "-c", commands],
        env={**os.environ, "PATH": path},
        check=True,
        capture_output=True,
    )
    assert (done.stdout, done.stderr) == (b"failed\n", b"")


# Streams and signals


def _lines_on_a_terminal(columns: int, *arguments: str) -> list[str]:
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    with start(*arguments, stdout=writer, env=environment) as program:
        os.close(writer)
        chunks = []
        try:
            while chunk := os.read(reader, 65536):
                chunks.append(chunk)
        except OSError:  # on Linux: the other end is closed
            pass
        os.close(reader)
    assert program.returncode == 0
    return b"".join(chunks).decode().splitlines()


def test_messages_are_shortened_for_a_terminal_only() -> None:
    """`list` cuts messages to the terminal's width; a pipe, `get` and JSON show them in full."""
    message = "Platte voll 日本語 " * 20
    output("create", message, "--source", "operator")
    head, line = _lines_on_a_terminal(100, "list")
    assert head.split()[-1] == "incident_message"
    assert line.endswith("...")
    assert 99 <= width(line) <= 100
    assert _lines_on_a_terminal(40, "list")[1].endswith("Platte voll 日本...")
    for arguments in (["list"], ["get", "1"], ["list", "--json"]):
        assert message.strip() in output(*arguments)
    assert message.strip() in _lines_on_a_terminal(100, "get", "1")[-1]
    assert message.strip() in _lines_on_a_terminal(100, "list", "--json")[0]


def test_what_the_terminal_cannot_show_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A character missing from stdout's encoding is escaped; JSON is always UTF-8."""
    output("create", "日本 €uro", "--source", "operator")
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    for arguments, shown in [(["list"], r"\u65e5\u672c \u20acuro"), (["list", "--json"], "日本")]:
        exit_code, out, err = outcome(start(*arguments))
        assert (exit_code, err) == (0, "")
        assert shown in out


# Live changes


@contextmanager
def watching(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `incidentkit watch`; an interrupt must end it with 130 and without output."""
    with start("watch", *arguments) as program:
        try:
            yield program
            program.send_signal(signal.SIGINT)
            assert outcome(program)[::2] == (130, "")
        finally:
            program.kill()


def line_of(program: subprocess.Popen[bytes]) -> str:
    """Return the next line that a program prints."""
    assert program.stdout is not None
    return program.stdout.readline().decode()


def test_watch_shows_a_change_on_a_line_that_no_terminal_obeys() -> None:
    """`watch` shows a change on one line and escapes control characters in every field."""
    output("create", "Disk is full\x1b[31m", "--source", "partner", "--actor", "ann\x1b[2J")
    with watching("--from-start") as program:
        time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"
        line = re.escape(r"  1  created  new  by ann\x1b[2J")
        assert re.fullmatch(f"{time}{line}\n", line_of(program))
        output("update-status", "1", "failed", "--note", "two\nlines")
        line = re.escape(r"  1  status_changed  new -> failed  two\nlines")
        assert re.fullmatch(f"{time}{line}\n", line_of(program))


@pytest.mark.parametrize("cursor", ["nonsense", ""])
def test_watch_refuses_what_is_no_cursor(cursor: str) -> None:
    """An invalid cursor, such as an empty one, is refused."""
    assert errors("watch", "--after", cursor, exit_code=2) == ["Error: after is not a cursor"]


def test_watch_begins_with_what_comes() -> None:
    """Without an option, `watch` shows only changes made after it starts."""
    output(*DISK_FULL)
    with watching("--json") as program:
        assert program.stdout is not None
        while not select.select([program.stdout], [], [], 0.1)[0]:
            output("create", "Line is down", "--source", "partner")
        assert json.loads(line_of(program))["incident_id"] > 1


@pytest.mark.parametrize(
    "arguments", [["list"], ["list", "--json"], ["watch", "--from-start"], ["--help"]]
)
def test_a_closed_pipe_ends_the_command_quietly(arguments: list[str]) -> None:
    """A closed pipe, as in `incidentkit list | head -1`, exits with 1 and without output."""
    output(*DISK_FULL)
    reader, writer = os.pipe()
    os.close(reader)
    program = start(*arguments, stdout=writer)
    os.close(writer)
    assert outcome(program) == (1, "", "")


def test_a_full_disk_is_one_line() -> None:
    """Writing to a full disk exits with 1 and one line."""
    output(*DISK_FULL)
    with Path("/dev/full").open("wb") as full:
        exit_code, _, err = outcome(start("list", stdout=full))
    assert exit_code == 1
    assert err == "Error: Cannot write to stdout: No space left on device\n"


def test_no_stdout_is_no_failure() -> None:
    """A command whose stdout is closed succeeds."""
    command = f"{sys.executable} -m incidentkit {{}} >&-"
    for arguments in ("create 'Disk is full' --source operator", "list", "list --json"):
        ended = subprocess.run(
            ["/bin/sh", "-c", command.format(arguments)], check=False, capture_output=True
        )
        assert (ended.returncode, ended.stderr) == (0, b"")
    assert "Disk is full" in output("list")


def test_an_interrupt_ends_a_command_quietly() -> None:
    """Ctrl+C while the database does not answer exits with 130 and without output."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(DEADLINE)
        url = f"postgresql://user@127.0.0.1:{silent.getsockname()[1]}/incidents"
        program = start("list", "--database-url", url)
        connection, _ = silent.accept()
        with connection:
            program.send_signal(signal.SIGINT)
            assert outcome(program) == (130, "", "")


# The service


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_serve_answers_until_it_is_told_to_end(
    number: signal.Signals, workers: str, sqlite_url: str, tmp_path: Path
) -> None:
    """The service uses the database of its option, logs each request once, and exits with 0."""
    output(*DISK_FULL, "--database-url", sqlite_url)
    log = tmp_path / "log"
    with service(log, "--database-url", sqlite_url, "--workers", workers) as running:
        assert f"{running.url}/docs" in log.read_text()
        (incident,) = httpx2.get(f"{running.url}/incident/get").json()
        assert incident["incident_message"] == "Disk is full on db-1"
        headers = {"X-Request-ID": "one-of-mine"}
        assert httpx2.get(f"{running.url}/incident/get/7", headers=headers).status_code == 404
        assert running.end(number) == 0
    lines = log.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} [A-Z]+ ", line) for line in lines)
    (request,) = (line for line in lines if "one-of-mine" in line)
    assert re.search(
        r" INFO +GET /incident/get/{incident_id} 404 \d+\.\d ms 127\.0\.0\.1 - one-of-mine$",
        request,
    )
    assert sum("/incident/get 200" in line for line in lines) == 1


def test_serve_uses_the_redis_of_its_option(
    redis_url: str, sqlite_url: str, tmp_path: Path
) -> None:
    """The service uses the Redis of its option."""
    servers = ("--database-url", sqlite_url, "--redis-url", redis_url)
    with service(tmp_path / "log", *servers) as running:
        ready = httpx2.get(f"{running.url}/health/ready")
        assert ready.status_code == 200
        httpx2.get(f"{running.url}/incident/get").raise_for_status()
        assert running.end(signal.SIGTERM) == 0
    output(*DISK_FULL, *servers)
    assert len(json.loads(output("list", "--json", *servers))) == 1


@pytest.mark.usefixtures("_no_database")
def test_serve_hands_its_options_to_workers_unseen(sqlite_url: str, tmp_path: Path) -> None:
    """Workers get the database URL through neither their arguments nor their environment."""
    output(*DISK_FULL, "--database-url", sqlite_url)
    with service(tmp_path / "log", "--database-url", sqlite_url, "--workers", "2") as running:
        children = psutil.Process(running.program.pid).children()
        shown = [text for child in children for text in child.cmdline()]
        assert sum("spawn_main" in text for text in shown) == 2
        shown += [text for child in children for text in child.environ().values()]
        assert not [text for text in shown if sqlite_url in text]
        assert len(httpx2.get(f"{running.url}/incident/get").json()) == 1
        assert running.end(signal.SIGTERM) == 0


def test_serve_says_once_that_redis_is_away(
    unused_port: int, sqlite_url: str, tmp_path: Path
) -> None:
    """If an optional Redis is unreachable, the service starts and logs one warning."""
    away = f"redis://127.0.0.1:{unused_port}/0"
    servers = ("--database-url", sqlite_url, "--redis-url", away)
    with service(tmp_path / "log", *servers) as running:
        httpx2.get(f"{running.url}/incident/get").raise_for_status()
        assert running.end(signal.SIGTERM) == 0
        assert running.log.read_text().count("The cache is unavailable") == 1


def test_serve_does_not_start_without_a_redis_that_is_required(
    unused_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With INCIDENTKIT_REDIS_REQUIRED, the service does not start without Redis."""
    monkeypatch.setenv("INCIDENTKIT_REDIS_REQUIRED", "1")
    monkeypatch.setenv("INCIDENTKIT_REDIS_URL", f"redis://127.0.0.1:{unused_port}/0")
    exit_code, _, err = outcome(start("serve", "--port", "0"))
    assert exit_code == 1
    assert err.splitlines()[-1] == REDIS_AWAY.format(port=unused_port)
    assert "Traceback" not in err


def test_serve_on_a_port_that_is_taken_is_one_line() -> None:
    """A port in use exits with 1 and one line that names it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        exit_code, _, err = outcome(start("serve", "--port", port))
    assert exit_code == 1
    assert err == f"Error: Cannot listen on 127.0.0.1 port {port}: Address already in use\n"


def test_serve_on_a_host_that_is_not_there_is_one_line() -> None:
    """A host name without an address exits with 1 and one line that names it."""
    exit_code, _, err = outcome(start("serve", "--host", "nowhere.invalid", "--allow-anonymous"))
    assert exit_code == 1
    assert re.fullmatch(r"Error: Cannot listen on nowhere\.invalid port 8000: [^(]+\n", err)


UNCHECKED = """
from incidentkit.cli import main, server

async def nothing(*_, **__):
    pass

server.check_servers = nothing
main()
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_serve_whose_app_does_not_start_is_a_failure(workers: str, unused_port: int) -> None:
    """If the app fails to start, the service exits with 1 and logs the error."""
    url = f"postgresql://user:secret@127.0.0.1:{unused_port}/incidents"
    arguments = ["serve", "--port", "0", "--workers", workers, "--database-url", url]
    exit_code, _, err = outcome(start(*arguments, program=["-c", UNCHECKED]))
    assert exit_code == 1
    assert (
        f"\nincidentkit.domain.errors.StoreUnavailable: The database 127.0.0.1:{unused_port}/"
        "incidents is unavailable: the connection was refused"
    ) in err
    assert "secret" not in err


def test_log_lines_are_harmless() -> None:
    """Neither a message nor an exception can forge a line or control the terminal."""
    formatter = LineFormatter("%(levelname)s %(message)s")
    record = logging.LogRecord("x", logging.INFO, "x.py", 1, "a\nb \x1b[2J", (), None)
    assert formatter.format(record) == r"INFO a\nb \x1b[2J"
    record.msg, record.exc_info = "Oh", (ValueError, ValueError("a \x1b[2J"), None)
    assert formatter.format(record).splitlines() == ["INFO Oh", r"ValueError: a \x1b[2J"]


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "httptools"])
def test_serve_names_the_extra_that_is_not_installed(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a package of the server, the error names the extra to install."""
    monkeypatch.setitem(sys.modules, package, None)
    (line,) = errors("serve", exit_code=1)
    assert line == f"Error: {package} is not installed: pip install 'incidentkit[server]'"

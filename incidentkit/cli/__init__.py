"""The command ``incidentkit``: thin commands around the SDK."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import shutil
import sys
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from functools import wraps
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from incidentkit.cli.text import change_line, details, events, harmless, table
from incidentkit.client import IncidentClient
from incidentkit.domain.actor import acting_as
from incidentkit.domain.errors import (
    CacheUnavailable,
    IncidentKitError,
    InvalidIncident,
    InvalidSettings,
)
from incidentkit.domain.values import (
    DEFAULT_LIMIT,
    LATEST,
    MAX_LIMIT,
    IncidentOrder,
    IncidentSource,
    IncidentStatus,
)
from incidentkit.settings import Settings
from incidentkit.version import __version__
from incidentkit.wire import (
    dump_json,
    encode_event,
    encode_events,
    encode_incident,
    encode_incidents,
    wire_converter,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from incidentkit.domain.values import Incident

__all__ = ["main"]

INTERRUPTED: Final = 130
MAX_STDIN_BYTES: Final = 1024 * 1024

_T = TypeVar("_T")

_STATUSES: Final = f"[{'|'.join(IncidentStatus)}]"
_SOURCES: Final = f"[{'|'.join(IncidentSource)}]"
_DATABASE_URL: Final = "INCIDENTKIT_DATABASE_URL"
_REDIS_URL: Final = "INCIDENTKIT_REDIS_URL"
_OPTIONS: Final = {
    **dict.fromkeys(("database_url", _DATABASE_URL), f"--database-url or {_DATABASE_URL}"),
    **dict.fromkeys(("redis_url", _REDIS_URL), f"--redis-url or {_REDIS_URL}"),
}


class _Refused(click.ClickException):
    """What was given breaks a rule: one line for each, and the exit code of a usage error."""

    exit_code = 2

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__("\nError: ".join(map(harmless, reasons)))


class _Commands(click.Group):
    """Commands whose errors are lines on stderr and exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InvalidIncident as error:
            raise _Refused([f"{fault.field} {fault.reason}" for fault in error.errors]) from error
        except InvalidSettings as error:
            name = _OPTIONS.get(error.name, error.name)
            raise _Refused([f"{name} {error.reason}"]) from error
        except CacheUnavailable as error:
            reason = f"{error}, and INCIDENTKIT_REDIS_REQUIRED forbids going on without it"
            raise click.ClickException(harmless(reason)) from error
        except IncidentKitError as error:
            raise click.ClickException(harmless(str(error))) from error
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
def main() -> None:
    """Record and follow incidents.

    The database is the one that the environment or a file `.env` names, with
    INCIDENTKIT_DATABASE_URL or POSTGRES_*; when they name none it is the SQLite file
    incidentkit.db in the current folder. Likewise INCIDENTKIT_REDIS_URL or REDIS_HOST name the
    Redis that caches lists. A password is safer there than in --database-url, which other users
    of the machine can see.

    \b
    Examples:
      incidentkit serve
      incidentkit create "Disk is full on db-1" --source monitoring
      dmesg | tail -n 1 | incidentkit create - --source operator --json
      incidentkit list --status new --limit 50
      incidentkit search --text "disk db-1" --order oldest
      incidentkit update-status 7 completed --note "The old logs were removed"
      incidentkit history 7
      incidentkit watch
      incidentkit purge --older-than 90d
      incidentkit db upgrade

    \b
    Exit codes:
      0    done
      1    it failed: not found, database away, schema out of date
      2    what was asked for is not valid, or a setting is not
      130  interrupted
    """  # noqa: D301
    # asyncio would write to stderr what an interrupted connection leaves behind; what the service
    # logs has a handler of its own.
    logging.getLogger("asyncio").addHandler(logging.NullHandler())


def _takes_database(command: Callable[..., None]) -> Callable[..., None]:
    """Give the command the settings, in which the option `--database-url` wins."""

    @click.option(
        "--database-url",
        metavar="URL",
        help="postgresql://user:password@host:port/database or sqlite+aiosqlite:///file, "
        "instead of what the environment names.",
    )
    @wraps(command)
    def with_settings(database_url: str | None, **arguments: Any) -> None:
        given = {_DATABASE_URL: database_url, _REDIS_URL: arguments.pop("redis_url", None)}
        overrides = {name: url for name, url in given.items() if url is not None}
        for name, url in overrides.items():
            if not url.strip():
                raise InvalidSettings(name, "is empty")
        command(Settings.from_env(overrides=overrides), **arguments)

    return with_settings


def _takes_servers(command: Callable[..., None]) -> Callable[..., None]:
    """Give the command the settings, in which both options of servers win."""
    with_redis = click.option(
        "--redis-url",
        metavar="URL",
        help="redis://host:port/db, instead of what the environment names.",
    )
    return with_redis(_takes_database(command))


def _takes_actor(command: Callable[..., None]) -> Callable[..., None]:
    """Run the command as the actor that the option names."""

    @click.option("--actor", metavar="NAME", help="Who does it, for the history.")
    @wraps(command)
    def as_actor(actor: str | None, **arguments: Any) -> None:
        with nullcontext() if actor is None else acting_as(actor):
            command(**arguments)

    return as_actor


_takes_idempotency_key: Final = click.option(
    "--idempotency-key",
    metavar="KEY",
    help="Given again, it changes nothing for 24 hours, and shows what was shown first.",
)


class _Time(click.ParamType[datetime]):
    """A time of ISO 8601, in UTC unless it says otherwise."""

    name = "time"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime:
        try:
            time = datetime.fromisoformat(str(value))
        except ValueError:
            self.fail("must be a time such as 2026-11-23 or 2026-11-23T09:30:00Z", param, ctx)
        return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


_TIME: Final = _Time()

_takes_json: Final = click.option(
    "--json", "as_json", is_flag=True, help="Write JSON on one line, for programs."
)


def _run(settings: Settings, work: Callable[[IncidentClient], Awaitable[_T]]) -> _T:
    """Return what the work on an open client returns."""

    async def run() -> _T:
        async with IncidentClient.from_settings(settings) as incidents:
            return await work(incidents)

    return asyncio.run(run())


def _write(output: str | bytes) -> None:
    """Write a line to stdout; that it cannot be written ends the program."""
    if isinstance(output, str):
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        output = output.encode(encoding, "backslashreplace").decode(encoding)
    try:
        click.echo(output)
    except OSError as error:
        # Python would fail to flush the rest once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            raise click.exceptions.Exit(1) from error
        raise click.ClickException(f"The output cannot be written: {error.strerror}") from error


def _write_incident(incident: Incident, *, as_json: bool) -> None:
    _write(encode_incident(incident) if as_json else details(incident))


def _message(_: click.Context, __: click.Parameter, value: str) -> str:
    """Read the message from stdin if it is a dash."""
    if value != "-":
        return value
    try:
        with click.open_file("-", "rb") as stdin:
            data: bytes = stdin.read(MAX_STDIN_BYTES)
        return data.decode()
    except UnicodeDecodeError as error:
        raise click.BadParameter("stdin is not UTF-8") from error
    except (OSError, RuntimeError) as error:
        raise click.BadParameter("stdin cannot be read") from error


@main.command()
@click.argument("incident_message", callback=_message)
@click.option("--source", required=True, metavar=_SOURCES, help="Who reports it.")
@click.option(
    "--incident-type",
    metavar=_STATUSES,
    default=IncidentStatus.NEW.value,
    show_default=True,
    help="The status that it starts with.",
)
@click.option(
    "--dedup-key",
    metavar="KEY",
    help="What it is about: while an incident with this key is open, that one occurs again.",
)
@_takes_idempotency_key
@_takes_actor
@_takes_json
@_takes_servers
def create(settings: Settings, incident_message: str, *, as_json: bool, **fields: Any) -> None:
    """Record an incident, and show it with its id.

    INCIDENT_MESSAGE says what happened, in 5 to 1000 characters; a dash reads it from stdin.

    \b
    Examples:
      incidentkit create "Disk is full on db-1" --source monitoring
      dmesg | tail -n 1 | incidentkit create - --source operator
      incidentkit create "Disk is full on db-1" --source monitoring --dedup-key disk:db-1
    """  # noqa: D301
    incident = _run(settings, lambda incidents: incidents.create(incident_message, **fields))
    _write_incident(incident, as_json=as_json)


@main.command("list")
@click.option("--page", type=int, default=1, show_default=True, help="1 is the newest page.")
@click.option(
    "--limit",
    type=int,
    default=DEFAULT_LIMIT,
    show_default=True,
    help=f"Incidents a page, 1 to {MAX_LIMIT}.",
)
@click.option("--status", metavar=_STATUSES, help="Only incidents with this status.")
@click.option("--source", metavar=_SOURCES, help="Only incidents from this source.")
@_takes_json
@_takes_servers
def list_incidents(settings: Settings, *, as_json: bool, **query: Any) -> None:
    """Show one page of incidents, newest first.

    On a terminal, messages are shortened to its width.

    \b
    Examples:
      incidentkit list --status new --source monitoring
      incidentkit list --limit 1000 --json | jq '.[].incident_message'
    """  # noqa: D301
    page = _run(settings, lambda incidents: incidents.list(**query))
    if as_json:
        _write(encode_incidents(page))
    else:
        _write_table(page)


def _write_table(incidents: Sequence[Incident]) -> None:
    if not incidents:
        click.echo("No incidents.", err=True)
        return
    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    _write(table(incidents, shutil.get_terminal_size().columns if on_terminal else None))


@main.command()
@click.option("--status", multiple=True, metavar=_STATUSES, help="With one of these statuses.")
@click.option("--source", multiple=True, metavar=_SOURCES, help="From one of these sources.")
@click.option("--created-after", type=_TIME, help="Created then or later, in UTC.")
@click.option("--created-before", type=_TIME, help="Created earlier, in UTC.")
@click.option("--text", help="Words, or beginnings of words, that the message has.")
@click.option(
    "--order",
    metavar=f"[{'|'.join(IncidentOrder)}]",
    default=IncidentOrder.NEWEST.value,
    show_default=True,
    help="By which end to begin.",
)
@click.option(
    "--limit",
    type=int,
    default=DEFAULT_LIMIT,
    show_default=True,
    help=f"Incidents a page, 1 to {MAX_LIMIT}.",
)
@click.option("--after", metavar="CURSOR", help="Go on with the next page.")
@click.option("--total", is_flag=True, help="Count the incidents of all pages.")
@_takes_json
@_takes_servers
def search(settings: Settings, *, as_json: bool, **query: Any) -> None:
    """Find incidents, and show one page of them.

    How to go on, and the total, stand on stderr; with --json they are part of the object.

    \b
    Examples:
      incidentkit search --status new --status failed --text "disk db-1"
      incidentkit search --created-after 2026-11-01 --order oldest --total
    """  # noqa: D301
    for name in ("status", "source"):
        query[name] = query[name] or None
    page = _run(settings, lambda incidents: incidents.search(**query))
    if as_json:
        _write(dump_json(wire_converter().unstructure(page)))
        return
    _write_table(page.incidents)
    if page.total is not None:
        click.echo(f"{page.total} in total.", err=True)
    if page.next is not None:
        click.echo(f"For the next page: --after {page.next}", err=True)


@main.command()
@click.argument("incident_id", type=int)
@_takes_json
@_takes_servers
def get(settings: Settings, incident_id: int, *, as_json: bool) -> None:
    """Show one incident, its message in full."""
    incident = _run(settings, lambda incidents: incidents.get(incident_id))
    _write_incident(incident, as_json=as_json)


@main.command()
@click.argument("incident_id", type=int)
@click.argument("status", metavar=_STATUSES)
@click.option("--note", metavar="TEXT", help="What the history says of it.")
@click.option(
    "--expected-version",
    type=int,
    help="The version that it has to have, or nothing is changed.",
)
@_takes_idempotency_key
@_takes_actor
@_takes_json
@_takes_servers
def update_status(
    settings: Settings, incident_id: int, status: str, *, as_json: bool, **options: Any
) -> None:
    """Change an incident's status, and show the incident.

    \b
    Example:
      incidentkit update-status 7 completed --note "The old logs were removed" --actor alice
    """  # noqa: D301
    incident = _run(
        settings, lambda incidents: incidents.update_status(incident_id, status, **options)
    )
    _write_incident(incident, as_json=as_json)


@main.command()
@click.argument("incident_id", type=int)
@click.argument("text", metavar="NOTE")
@_takes_actor
@_takes_json
@_takes_servers
def note(settings: Settings, incident_id: int, text: str, *, as_json: bool) -> None:
    """Add a note to an incident's history, and show it."""
    event = _run(settings, lambda incidents: incidents.note(incident_id, text))
    _write(encode_event(event) if as_json else events([event]))


@main.command()
@click.argument("incident_id", type=int)
@click.option(
    "--limit",
    type=int,
    default=MAX_LIMIT,
    show_default=True,
    help=f"Events, 1 to {MAX_LIMIT}.",
)
@click.option("--after", metavar="CURSOR", help="Go on behind the event with this cursor.")
@_takes_json
@_takes_servers
def history(settings: Settings, incident_id: int, *, as_json: bool, **query: Any) -> None:
    """Show what happened to an incident, oldest first.

    The cursor of an event is in the output of --json.
    """
    found = _run(settings, lambda incidents: incidents.history(incident_id, **query))
    _write(encode_events(found) if as_json else events(found))


@main.command()
@click.option("--after", metavar="CURSOR", help="Go on behind the change with this cursor.")
@click.option("--from-start", is_flag=True, help="Begin with the first change of all.")
@_takes_json
@_takes_servers
def watch(settings: Settings, *, after: str | None, from_start: bool, as_json: bool) -> None:
    """Show every change of every incident as it happens, until interrupted.

    Without options it shows what comes from now on. The cursor of a change is in the output of
    --json, which has one change on each line.

    \b
    Example:
      incidentkit watch --json | jq 'select(.to_status == "failed")'
    """  # noqa: D301
    if from_start and after is not None:
        raise click.UsageError("--after and --from-start exclude each other")

    if after is None and not from_start:
        after = LATEST

    async def work(incidents: IncidentClient) -> None:
        async for change in incidents.changes(after):
            _write(encode_event(change) if as_json else change_line(change))

    _run(settings, work)


class _Age(click.ParamType[timedelta]):
    """A time so many minutes, hours, days or weeks ago."""

    name = "age"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> timedelta:
        match = re.fullmatch(r"([0-9]{1,5})([mhdw])", str(value))
        if match is None:
            self.fail("must be a number with m, h, d or w, such as 90d", param, ctx)
        unit = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}[match[2]]
        return timedelta(**{unit: int(match[1])})


@main.command()
@click.option(
    "--older-than",
    type=_Age(),
    required=True,
    metavar="AGE",
    help="How long ago they ended, at least: a number with m, h, d or w.",
)
@_takes_actor
@_takes_servers
def purge(settings: Settings, older_than: timedelta) -> None:
    """Remove incidents that ended long ago, with their histories.

    It is done in batches, beside a service that runs. Of each incident an event remains that tells
    of it.

    \b
    Example:
      incidentkit purge --older-than 90d
    """  # noqa: D301
    ended_before = datetime.now(UTC) - older_than

    async def work(incidents: IncidentClient) -> int:
        hidden = sys.stderr is None or not sys.stderr.isatty()
        with click.progressbar(length=0, label="Purging", file=sys.stderr, hidden=hidden) as bar:

            def progress(done: int, total: int) -> None:
                bar.length = total
                bar.update(done - bar.pos)

            return await incidents.purge(ended_before, progress=progress)

    count = _run(settings, work)
    _write(f"{count} incident{'' if count == 1 else 's'} removed.")


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="The port to listen on; 0 takes one that is free.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Processes that answer requests.",
)
@_takes_servers
def serve(settings: Settings, host: str, port: int, workers: int) -> None:
    """Run the REST service until it is interrupted or terminated.

    SQLite's schema is brought up to date first; PostgreSQL's is only checked: run
    `incidentkit db upgrade` once for each new version. Needs the extra `server`:
    pip install 'incidentkit[server]'. Interrupted or terminated, it answers what it was asked,
    and exits with 0.

    \b
    Examples:
      incidentkit serve
      incidentkit serve --host 0.0.0.0 --port 80 --workers 4
    """  # noqa: D301
    from incidentkit.cli import server  # noqa: PLC0415

    if not host:
        # It would mean every address of the machine.
        raise click.UsageError("--host is empty")
    server.check_installed()
    if workers > 1 and server.in_memory(settings.database_url):
        raise click.UsageError("a database in memory is not shared by several --workers")
    server.configure_logging()
    asyncio.run(
        server.check_servers(
            IncidentClient.from_settings(settings), with_cache=settings.redis_required
        )
    )
    click.get_current_context().exit(0 if server.run(settings, host, port, workers) else 1)


@main.group()
def db() -> None:
    """Bring the database's schema up to date, or look at it.

    \b
    Examples:
      incidentkit db upgrade
      incidentkit db downgrade -1
    """  # noqa: D301


@db.command()
@click.argument("revision", default="head")
@_takes_database
def upgrade(settings: Settings, revision: str) -> None:
    """Bring the schema up to REVISION, by default the newest; no row is lost.

    A database of the origin's is taken over as it is. It is safe to run from several places at
    once.
    """
    from incidentkit.store import migrate  # noqa: PLC0415

    asyncio.run(migrate.upgrade(settings.database_url, revision))
    _write_revision(settings)


@db.command(context_settings={"ignore_unknown_options": True})
@click.argument("revision", default="-1")
@click.option("--yes", is_flag=True, help="Do not ask before the table of incidents is removed.")
@_takes_database
def downgrade(settings: Settings, revision: str, *, yes: bool) -> None:
    """Bring the schema down to REVISION, by default by one step.

    Down to the origin's revision, dadc1db062ae, incidents are kept; below it, `base` removes the
    table of incidents with all its rows, if that is confirmed.
    """
    from incidentkit.store import migrate  # noqa: PLC0415

    at = None if yes else asyncio.run(migrate.current(settings.database_url))
    if _removes_incidents(revision, at):
        warning = f"{revision} removes the table of incidents with all its rows"
        if sys.stdin is None or not sys.stdin.isatty():
            raise _Refused([f"{warning}: add --yes if that is meant"])
        click.confirm(f"{warning}. Go on?", abort=True, err=True)
    asyncio.run(migrate.downgrade(settings.database_url, revision))
    _write_revision(settings)


def _removes_incidents(revision: str, at: str | None) -> bool:
    """Return whether a downgrade to the revision, absolute or relative, ends below the origin's."""
    from incidentkit.store.schema import REVISIONS  # noqa: PLC0415

    if at is None:
        return False
    start, dash, steps = revision.rpartition("-")
    if not (dash and steps.isdecimal()):
        return revision.rpartition("@")[2] == "base"
    known = [number for number, name in enumerate(REVISIONS) if name.startswith(start or at)]
    # What is not known is for Alembic to refuse, or counts from the newest, like `head-1`.
    return int(steps) > (known[0] if known else len(REVISIONS) - 1)


@db.command()
@_takes_database
def current(settings: Settings) -> None:
    """Show the revision that the schema is at."""
    _write_revision(settings)


@db.command()
@_takes_database
def check(settings: Settings) -> None:
    """Exit with 1, and say what to do, unless the schema is at the newest revision."""
    from incidentkit.store import migrate  # noqa: PLC0415

    asyncio.run(migrate.check(settings.database_url))
    _write("The schema is up to date.")


def _write_revision(settings: Settings) -> None:
    from incidentkit.store import migrate, tables  # noqa: PLC0415

    revision = asyncio.run(migrate.current(settings.database_url))
    if revision is None:
        _write("Nothing of incidentkit's is there yet: run `incidentkit db upgrade`.")
    else:
        _write(f"{revision} (head)" if revision == tables.SCHEMA_REVISION else revision)

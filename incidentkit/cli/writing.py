"""Commands that change incidents."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final

import click

from incidentkit.cli.commands import Command
from incidentkit.cli.completion import offering
from incidentkit.cli.interrupts import interrupts
from incidentkit.cli.options import (
    SOURCES,
    STATUSES,
    Age,
    Servers,
    takes_actor,
    takes_idempotency_key,
    takes_json,
    takes_servers,
)
from incidentkit.cli.output import write, write_incident, write_table
from incidentkit.cli.running import read, run
from incidentkit.cli.text import events, harmless
from incidentkit.domain.values import OPEN, IncidentSource, IncidentStatus, StatusName
from incidentkit.wire import encode_event, encode_optionals

MAX_STDIN_BYTES: Final = 1024 * 1024
"""Maximum number of bytes that are read from stdin."""

MAX_DIGITS: Final = 400
"""Maximum number of digits to read from an integer: more than any double has."""

SHOW_CURSOR: Final = b"\x1b[?25h\n"
"""Shows the cursor again, which a progress bar hides."""


_LAST_STATUSES: Final = tuple(each.value for each in IncidentStatus if each is not OPEN)


def _read_text(ctx: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """Return the text, read from stdin for a dash."""
    # The completion of a shell parses the arguments too, on the terminal's stdin.
    if value != "-" or ctx.resilient_parsing:
        return value
    try:
        with click.open_file("-", "rb") as stdin:
            data: bytes = stdin.read(MAX_STDIN_BYTES)
        return data.decode()
    except UnicodeDecodeError as error:
        raise click.BadParameter("stdin is not UTF-8") from error
    except (OSError, RuntimeError) as error:
        raise click.BadParameter("stdin cannot be read") from error


def _read_object(
    ctx: click.Context, parameter: click.Parameter, value: str | None
) -> dict[str, Any] | None:
    """Return the JSON value of the text; the rules of details check it."""
    text = _read_text(ctx, parameter, value)
    try:
        details: dict[str, Any] | None = (
            None
            if text is None
            else json.loads(text, object_pairs_hook=_once_each, parse_int=_read_integer)
        )
    except ValueError as error:
        raise click.BadParameter("it is not JSON") from error
    except RecursionError as error:
        raise click.BadParameter("it is nested too deeply") from error
    if text is not None and details is None:
        raise click.BadParameter("it is not a JSON object")
    return details


def _read_integer(digits: str) -> int:
    """Return an integer; of a huge one, as many digits as the rules of details need to refuse it.

    Python itself reads at most some thousand digits.
    """
    return int(digits[:MAX_DIGITS])


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict, unless it has a name more than once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise click.BadParameter("it repeats a name within an object")
    return found


_takes_expected_version: Final = click.option(
    "--expected-version",
    type=int,
    help="Change nothing unless the incident has this version.",
)


@click.command(cls=Command)
@click.argument("incident_message", callback=_read_text)
@click.option(
    "--source",
    required=True,
    metavar=SOURCES,
    shell_complete=offering(IncidentSource),
    help="Who reports it.",
)
@click.option(
    "--incident-type",
    metavar=STATUSES,
    shell_complete=offering(IncidentStatus),
    default=IncidentStatus.NEW.value,
    show_default=True,
    help="The initial status.",
)
@click.option(
    "--dedup-key",
    metavar="KEY",
    help="A key for the problem: while an incident with this key is open, a further report counts "
    "as an occurrence of it.",
)
@click.option(
    "--details",
    metavar="JSON",
    callback=_read_object,
    help="Further information, as a JSON object; a dash reads it from stdin.",
)
@takes_idempotency_key
@takes_actor
@takes_json
@takes_servers
def create(servers: Servers, incident_message: str, *, as_json: bool, **fields: Any) -> None:
    """Record an incident, and show it with its id.

    INCIDENT_MESSAGE says what happened, in 5 to 1000 characters; a dash reads it from stdin.

    \b
    Examples:
      incidentkit create "Disk is full on db-1" --source monitoring
      dmesg | tail -n 1 | incidentkit create - --source operator
      incidentkit create "Disk is full on db-1" --source monitoring --dedup-key disk:db-1
      incidentkit create "Disk is full" --source operator --details '{"host": "db-1"}'
    """  # noqa: D301
    incident = run(
        servers, lambda incidents: incidents.create(incident_message, **fields), creates=True
    )
    write_incident(incident, as_json=as_json)


@click.command(cls=Command)
@click.argument("incident_id", type=int)
@click.argument("status", metavar=STATUSES, shell_complete=offering(IncidentStatus))
@click.option(
    "--note",
    metavar="TEXT",
    callback=_read_text,
    help="A note for the history; a dash reads it from stdin.",
)
@_takes_expected_version
@takes_idempotency_key
@takes_actor
@takes_json
@takes_servers
def update_status(
    servers: Servers, incident_id: int, status: StatusName, *, as_json: bool, **options: Any
) -> None:
    """Change an incident's status, and show the incident.

    \b
    Example:
      incidentkit update-status 7 completed --note "The old logs were removed" --actor alice
    """  # noqa: D301
    incident = run(
        servers, lambda incidents: incidents.update_status(incident_id, status, **options)
    )
    write_incident(incident, as_json=as_json)


@click.command(cls=Command)
@click.argument("dedup_keys", metavar="KEY...", nargs=-1, required=True)
@click.option(
    "--status",
    metavar=f"[{'|'.join(_LAST_STATUSES)}]",
    shell_complete=offering(_LAST_STATUSES),
    default=IncidentStatus.COMPLETED.value,
    show_default=True,
    help="The new status.",
)
@click.option(
    "--note",
    metavar="TEXT",
    callback=_read_text,
    help="A note for the history of each; a dash reads it from stdin.",
)
@takes_idempotency_key
@takes_actor
@takes_json
@takes_servers
def resolve(
    servers: Servers, dedup_keys: tuple[str, ...], *, as_json: bool, **options: Any
) -> None:
    """End the open incidents that have these deduplication keys, and show them.

    All end, or none. A key without an open incident is named on stderr, and is no failure. With
    --json, the array has one item for each key: the incident, or null.

    \b
    Examples:
      incidentkit resolve disk:db-1 --note "The old logs were removed"
      incidentkit resolve disk:db-1 disk:db-2 --status failed --json
    """  # noqa: D301
    ended = run(servers, lambda incidents: incidents.resolve_many(dedup_keys, **options))
    if as_json:
        write(encode_optionals(ended))
        return
    for key, incident in zip(dedup_keys, ended, strict=True):
        if incident is None:
            click.echo(f"No incident with the key {harmless(key)} is open.", err=True)
    found = [incident for incident in ended if incident is not None]
    if len(dedup_keys) == len(found) == 1:
        write_incident(found[0], as_json=False)
    elif found:
        write_table(found)


@click.command(cls=Command)
@click.argument("incident_id", type=int)
@click.argument("text", metavar="NOTE", callback=_read_text)
@_takes_expected_version
@takes_idempotency_key
@takes_actor
@takes_json
@takes_servers
def note(servers: Servers, incident_id: int, text: str, *, as_json: bool, **options: Any) -> None:
    """Add a note to an incident's history, and show it.

    NOTE is the text; a dash reads it from stdin.
    """
    event = run(servers, lambda incidents: incidents.note(incident_id, text, **options))
    write(encode_event(event) if as_json else events([event]))


@click.command(cls=Command)
@click.option(
    "--older-than",
    type=Age(),
    required=True,
    metavar="AGE",
    help="Minimum time since the incident ended: a number with m, h, d or w, such as 90d.",
)
@click.option(
    "--dry-run", is_flag=True, help="Show how many incidents would be removed, and remove none."
)
@takes_actor
@takes_servers
def purge(servers: Servers, older_than: timedelta, *, dry_run: bool) -> None:
    """Remove incidents that ended long ago, with their histories.

    Works in batches, and can run beside the service. For each removed incident one event stays,
    which records the removal.

    \b
    Examples:
      incidentkit purge --older-than 90d --dry-run
      incidentkit purge --older-than 90d
    """  # noqa: D301
    ended_before = datetime.now(UTC) - older_than
    if dry_run:
        count = read(servers, lambda incidents: incidents.purgeable(ended_before))
        write(f"{_incidents(count)} would be removed.")
        return
    with _progress_bar() as progress:
        count = run(servers, lambda incidents: incidents.purge(ended_before, progress=progress))
    write(f"{_incidents(count)} removed.")


def _incidents(count: int) -> str:
    return f"{count} incident{'' if count == 1 else 's'}"


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None] | None]:
    """Yield a function that shows the progress on the terminal; None if stderr is not one."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    bars: list[Any] = []
    with ExitStack() as shown:

        def progress(done: int, total: int) -> None:
            if not bars:
                interrupts.farewell = partial(os.write, 2, SHOW_CURSOR)
                bar = click.progressbar(length=total, label="Purging", file=sys.stderr)
                bars.append(shown.enter_context(bar))
            bars[0].length = total
            bars[0].update(done - bars[0].pos)

        yield progress
    interrupts.farewell = None

"""Commands that change incidents."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from io import StringIO
from typing import Any, Final

import click

from incidentkit.cli.options import (
    SOURCES,
    STATUSES,
    Age,
    takes_actor,
    takes_idempotency_key,
    takes_json,
    takes_servers,
)
from incidentkit.cli.output import write, write_incident
from incidentkit.cli.running import run
from incidentkit.cli.text import events
from incidentkit.client import IncidentClient
from incidentkit.domain.values import IncidentStatus
from incidentkit.settings import Settings
from incidentkit.wire import encode_event

MAX_STDIN_BYTES: Final = 1024 * 1024
"""Maximum number of bytes that are read from stdin."""


def _read_message(_: click.Context, __: click.Parameter, value: str) -> str:
    """Return the message, read from stdin for a dash."""
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


@click.command()
@click.argument("incident_message", callback=_read_message)
@click.option("--source", required=True, metavar=SOURCES, help="Who reports it.")
@click.option(
    "--incident-type",
    metavar=STATUSES,
    default=IncidentStatus.NEW.value,
    show_default=True,
    help="The initial status.",
)
@click.option(
    "--dedup-key",
    metavar="KEY",
    help="The problem: while an incident with this key is open, a further report counts as an "
    "occurrence of it.",
)
@takes_idempotency_key
@takes_actor
@takes_json
@takes_servers
def create(settings: Settings, incident_message: str, *, as_json: bool, **fields: Any) -> None:
    """Record an incident, and show it with its id.

    INCIDENT_MESSAGE says what happened, in 5 to 1000 characters; a dash reads it from stdin.

    \b
    Examples:
      incidentkit create "Disk is full on db-1" --source monitoring
      dmesg | tail -n 1 | incidentkit create - --source operator
      incidentkit create "Disk is full on db-1" --source monitoring --dedup-key disk:db-1
    """  # noqa: D301
    incident = run(settings, lambda incidents: incidents.create(incident_message, **fields))
    write_incident(incident, as_json=as_json)


@click.command()
@click.argument("incident_id", type=int)
@click.argument("status", metavar=STATUSES)
@click.option("--note", metavar="TEXT", help="A note for the history.")
@click.option(
    "--expected-version",
    type=int,
    help="Change nothing unless the incident has this version.",
)
@takes_idempotency_key
@takes_actor
@takes_json
@takes_servers
def update_status(
    settings: Settings, incident_id: int, status: str, *, as_json: bool, **options: Any
) -> None:
    """Change an incident's status, and show the incident.

    \b
    Example:
      incidentkit update-status 7 completed --note "The old logs were removed" --actor alice
    """  # noqa: D301
    incident = run(
        settings, lambda incidents: incidents.update_status(incident_id, status, **options)
    )
    write_incident(incident, as_json=as_json)


@click.command()
@click.argument("incident_id", type=int)
@click.argument("text", metavar="NOTE")
@takes_actor
@takes_json
@takes_servers
def note(settings: Settings, incident_id: int, text: str, *, as_json: bool) -> None:
    """Add a note to an incident's history, and show it."""
    event = run(settings, lambda incidents: incidents.note(incident_id, text))
    write(encode_event(event) if as_json else events([event]))


@click.command()
@click.option(
    "--older-than",
    type=Age(),
    required=True,
    metavar="AGE",
    help="Minimum time since the incident ended: a number with m, h, d or w, such as 90d.",
)
@takes_actor
@takes_servers
def purge(settings: Settings, older_than: timedelta) -> None:
    """Remove incidents that ended long ago, with their histories.

    Works in batches, and can run beside the service. For each removed incident one event stays,
    which records the removal.

    \b
    Example:
      incidentkit purge --older-than 90d
    """  # noqa: D301
    ended_before = datetime.now(UTC) - older_than

    async def work(incidents: IncidentClient) -> int:
        on_terminal = sys.stderr is not None and sys.stderr.isatty()
        shown = sys.stderr if on_terminal else StringIO()
        with click.progressbar(length=0, label="Purging", file=shown) as bar:

            def progress(done: int, total: int) -> None:
                bar.length = total
                bar.update(done - bar.pos)

            return await incidents.purge(ended_before, progress=progress)

    count = run(settings, work)
    write(f"{count} incident{'' if count == 1 else 's'} removed.")

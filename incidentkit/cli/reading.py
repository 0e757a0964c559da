"""Commands that show incidents, their histories and their changes."""

from __future__ import annotations

from typing import Any, Final

import click

from incidentkit.cli.commands import Command
from incidentkit.cli.completion import offering
from incidentkit.cli.options import (
    SOURCES,
    STATUSES,
    Servers,
    Time,
    takes_json,
    takes_servers,
)
from incidentkit.cli.output import write, write_incident, write_table
from incidentkit.cli.running import read
from incidentkit.cli.text import change_line, events
from incidentkit.client import IncidentClient
from incidentkit.domain.values import (
    DEFAULT_LIMIT,
    LATEST,
    MAX_LIMIT,
    IncidentOrder,
    IncidentSource,
    IncidentStatus,
)
from incidentkit.wire import (
    encode_event,
    encode_events,
    encode_incidents,
    encode_object,
)

_takes_limit: Final = click.option(
    "--limit",
    type=int,
    default=DEFAULT_LIMIT,
    show_default=True,
    help=f"Incidents per page, 1 to {MAX_LIMIT}.",
)


@click.command("list", cls=Command)
@click.option("--page", type=int, default=1, show_default=True, help="1 is the newest page.")
@_takes_limit
@click.option(
    "--status",
    metavar=STATUSES,
    shell_complete=offering(IncidentStatus),
    help="Only incidents with this status.",
)
@click.option(
    "--source",
    metavar=SOURCES,
    shell_complete=offering(IncidentSource),
    help="Only incidents from this source.",
)
@takes_json
@takes_servers
def list_incidents(servers: Servers, *, as_json: bool, **query: Any) -> None:
    """Show one page of incidents, newest first.

    On a terminal, messages are shortened to its width.

    \b
    Examples:
      incidentkit list --status new --source monitoring
      incidentkit list --limit 1000 --json | jq '.[].incident_message'
    """  # noqa: D301
    page = read(servers, lambda incidents: incidents.list(**query))
    if as_json:
        write(encode_incidents(page))
    else:
        write_table(page)


@click.command(cls=Command)
@click.option(
    "--status",
    multiple=True,
    metavar=STATUSES,
    shell_complete=offering(IncidentStatus),
    help="Only incidents with this status; repeat it for several.",
)
@click.option(
    "--source",
    multiple=True,
    metavar=SOURCES,
    shell_complete=offering(IncidentSource),
    help="Only incidents from this source; repeat it for several.",
)
@click.option(
    "--created-after",
    type=Time(),
    help="Only incidents created at this time or later; UTC unless it has an offset.",
)
@click.option(
    "--created-before",
    type=Time(),
    help="Only incidents created before this time; UTC unless it has an offset.",
)
@click.option("--dedup-key", metavar="KEY", help="Only incidents with this deduplication key.")
@click.option("--text", help='Words and "phrases" that the message must all contain.')
@click.option(
    "--order",
    metavar=f"[{'|'.join(IncidentOrder)}]",
    shell_complete=offering(IncidentOrder),
    default=IncidentOrder.NEWEST.value,
    show_default=True,
    help="Which incidents come first.",
)
@_takes_limit
@click.option("--after", metavar="CURSOR", help="Continue with the page after this cursor.")
@click.option("--total", is_flag=True, help="Count the incidents of all pages.")
@click.option("--details", is_flag=True, help="Add the details of each incident to --json.")
@takes_json
@takes_servers
def search(servers: Servers, *, as_json: bool, **query: Any) -> None:
    """Find incidents, and show one page of them.

    The total and the option for the next page go to stderr; --json has both in its object.

    \b
    Examples:
      incidentkit search --status new --status failed --text "disk db-1"
      incidentkit search --created-after 2026-11-01 --order oldest --total
    """  # noqa: D301
    for name in ("status", "source"):
        query[name] = query[name] or None
    page = read(servers, lambda incidents: incidents.search(**query))
    if as_json:
        incidents = encode_incidents(page.incidents)
        write(encode_object("incidents", incidents, {"next": page.next, "total": page.total}))
        return
    write_table(page.incidents)
    if page.total is not None:
        click.echo(f"{page.total} in total.", err=True)
    if page.next is not None:
        click.echo(f"For the next page: --after {page.next}", err=True)


@click.command(cls=Command)
@click.argument("incident_id", type=int)
@takes_json
@takes_servers
def get(servers: Servers, incident_id: int, *, as_json: bool) -> None:
    """Show one incident, with its message in full and its details."""
    incident = read(servers, lambda incidents: incidents.get(incident_id))
    write_incident(incident, as_json=as_json)


@click.command(cls=Command)
@click.argument("incident_id", type=int)
@click.option(
    "--limit",
    type=int,
    default=MAX_LIMIT,
    show_default=True,
    help=f"Maximum number of events, 1 to {MAX_LIMIT}.",
)
@click.option("--after", metavar="CURSOR", help="Continue after the event with this cursor.")
@takes_json
@takes_servers
def history(servers: Servers, incident_id: int, *, as_json: bool, **query: Any) -> None:
    """Show what happened to an incident, oldest first.

    Use --json to see the cursor of each event.
    """
    found = read(servers, lambda incidents: incidents.history(incident_id, **query))
    write(encode_events(found) if as_json else events(found))


@click.command(cls=Command)
@click.option("--after", metavar="CURSOR", help="Continue after the change with this cursor.")
@click.option("--from-start", is_flag=True, help="Start with the very first change.")
@takes_json
@takes_servers
def watch(servers: Servers, *, after: str | None, from_start: bool, as_json: bool) -> None:
    """Show every change of every incident as it happens, until interrupted.

    Starts with the next change unless an option says otherwise. With --json, each line is one
    change, with its cursor.

    \b
    Example:
      incidentkit watch --json | jq 'select(.to_status == "failed")'
    """  # noqa: D301
    if from_start and after is not None:
        raise click.UsageError("--after and --from-start exclude each other")
    start = None if from_start else LATEST if after is None else after

    async def work(incidents: IncidentClient) -> None:
        async for change in incidents.changes(start):
            write(encode_event(change) if as_json else change_line(change))

    read(servers, work)

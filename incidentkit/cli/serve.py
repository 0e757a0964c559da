"""The command that runs the REST service."""

from __future__ import annotations

import click
from attrs import evolve

from incidentkit.cli.commands import Command
from incidentkit.cli.loading import run_server
from incidentkit.cli.options import Servers, takes_servers
from incidentkit.domain.rules import origin
from incidentkit.store.options import PREPARED_STATEMENTS


@click.command(cls=Command)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="The port to listen on; 0 picks a free one.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Number of processes that answer requests.",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    metavar="ORIGIN",
    help="An origin, such as https://board.example.com, whose pages may use the service in a "
    "browser; repeat it for several. Overrides the environment.",
)
@click.option(
    "--prepared-statements",
    type=click.Choice(tuple(PREPARED_STATEMENTS)),
    help="Whether PostgreSQL keeps statements prepared; auto: not behind a connection pooler. "
    "Overrides the environment.",
)
@takes_servers
def serve(  # noqa: PLR0913
    servers: Servers,
    host: str,
    port: int,
    workers: int,
    *,
    cors_origins: tuple[str, ...],
    prepared_statements: str | None,
) -> None:
    """Run the REST service until it is interrupted or terminated.

    Brings SQLite's schema up to date first, and only checks PostgreSQL's: run
    `incidentkit db upgrade` once for each new version. On SIGINT or SIGTERM it answers the
    requests that it has received, and exits with 0. Needs the extra `server`:
    pip install 'incidentkit[server]'.

    \b
    Examples:
      incidentkit serve
      incidentkit serve --host 0.0.0.0 --port 80 --workers 4
    """  # noqa: D301
    if not host:
        # Python's sockets take an empty host for every address of the machine.
        raise click.UsageError("--host is empty: name an address, such as 127.0.0.1")
    settings = servers.settings
    if prepared_statements is not None:
        chosen = PREPARED_STATEMENTS[prepared_statements]
        settings = evolve(settings, store=evolve(settings.store, prepared_statements=chosen))
    if cors_origins:
        try:
            settings = evolve(settings, cors_origins=tuple(map(origin, cors_origins)))
        except ValueError as error:
            raise click.UsageError(f"--cors-origin {error}") from None
    ended_well = run_server(settings, host, port, workers)
    click.get_current_context().exit(0 if ended_well else 1)

"""The command that runs the REST service."""

from __future__ import annotations

import click
from attrs import evolve

from incidentkit.cli.commands import Command
from incidentkit.cli.loading import run_server
from incidentkit.cli.options import Servers, takes_servers
from incidentkit.environment import allowed_host, trusted_proxy
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
    "--prepared-statements",
    type=click.Choice(tuple(PREPARED_STATEMENTS)),
    help="Whether PostgreSQL keeps statements prepared; auto: not behind a connection pooler. "
    "Overrides the environment.",
)
@click.option(
    "--allow-anonymous",
    is_flag=True,
    help="Answer requests without a token, even on an address that others reach, and if there are "
    "tokens. Overrides the environment.",
)
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    metavar="HOST",
    help="A host name under which the service is reached; may be repeated. On loopback, localhost "
    "and its addresses always are. Overrides the environment.",
)
@click.option(
    "--trusted-proxy",
    "trusted_proxies",
    multiple=True,
    metavar="ADDRESS",
    help="A proxy whose X-Forwarded-For names the client: its address or network; may be repeated. "
    "Overrides the environment.",
)
@takes_servers
def serve(  # noqa: PLR0913
    servers: Servers,
    *,
    host: str,
    port: int,
    workers: int,
    prepared_statements: str | None,
    allowed_hosts: tuple[str, ...],
    trusted_proxies: tuple[str, ...],
    allow_anonymous: bool,
) -> None:
    """Run the REST service until it is interrupted or terminated.

    Brings SQLite's schema up to date first, and only checks PostgreSQL's: run
    `incidentkit db upgrade` once for each new version. On SIGINT or SIGTERM it answers the
    requests that it has received, and exits with 0. Needs the extra `server`:
    pip install 'incidentkit[server]'.

    On loopback, it answers everybody until there is an access token. On any other address it starts
    only with a token or --allow-anonymous.

    \b
    Examples:
      incidentkit serve
      incidentkit serve --host 0.0.0.0 --port 80 --workers 4
      incidentkit serve --allowed-host incidents.example.com --trusted-proxy 127.0.0.1
    """  # noqa: D301
    if not host:
        # Python's sockets take an empty host for every address of the machine.
        raise click.UsageError("--host is empty: name an address, such as 127.0.0.1")
    settings = servers.settings
    if prepared_statements is not None:
        chosen = PREPARED_STATEMENTS[prepared_statements]
        settings = evolve(settings, store=evolve(settings.store, prepared_statements=chosen))
    settings = evolve(
        settings,
        allow_anonymous=allow_anonymous or settings.allow_anonymous,
        allowed_hosts=tuple(map(_host, allowed_hosts)) or settings.allowed_hosts,
        trusted_proxies=tuple(map(_proxy, trusted_proxies)) or settings.trusted_proxies,
    )
    ended_well = run_server(settings, host, port, workers)
    click.get_current_context().exit(0 if ended_well else 1)


def _host(value: str) -> str:
    try:
        return allowed_host(value)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--allowed-host'") from None


def _proxy(value: str) -> str:
    try:
        return trusted_proxy(value)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--trusted-proxy'") from None

"""The command that runs the REST service."""

from __future__ import annotations

import re
import socket
from typing import Final, Literal

import click
from attrs import evolve
from click.core import ParameterSource

from incidentkit.cli.commands import Command
from incidentkit.cli.listening import MODE, Address, Inherited, Tcp, Unix
from incidentkit.cli.loading import run_server
from incidentkit.cli.options import Servers, takes_servers
from incidentkit.domain.rules import origin
from incidentkit.domain.values import MAX_PER_TOKEN, MAX_STREAM_LIFETIME, MIN_STREAM_LIFETIME
from incidentkit.environment import allowed_host, trusted_proxy
from incidentkit.store.options import PREPARED_STATEMENTS

_PER_TOKEN: Final = click.IntRange(1, MAX_PER_TOKEN)


def read_mode(_: click.Context, __: click.Parameter, value: str) -> int:
    """Parse permissions in octal digits.

    Raises:
        BadParameter: If they are not.
    """
    if not re.fullmatch("0?[0-7]{3}", value):
        raise click.BadParameter("must be three octal digits, such as 660")
    return int(value, 8)


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
    "--uds",
    type=click.Path(dir_okay=False),
    help="Listen on a Unix socket at this path instead, for a proxy on the same machine.",
)
@click.option(
    "--uds-mode",
    metavar="OCTAL",
    default=f"{MODE:o}",
    show_default=True,
    callback=read_mode,
    help="The permissions of the Unix socket.",
)
@click.option(
    "--fd",
    type=click.IntRange(min=3),
    help="Listen on a socket that another program has opened, such as systemd: 3 is the first.",
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
@click.option(
    "--stream-lifetime",
    type=click.IntRange(MIN_STREAM_LIFETIME, MAX_STREAM_LIFETIME),
    metavar="SECONDS",
    help="Seconds after which a stream of changes ends, and its reader resumes it. Overrides the "
    "environment.",
)
@click.option(
    "--requests-per-token",
    type=_PER_TOKEN,
    help="Requests of one token that a process answers at a time. Overrides the environment.",
)
@click.option(
    "--readers-per-token",
    type=_PER_TOKEN,
    help="Streams of changes and waiting polls that one token may have in a process. Overrides the "
    "environment.",
)
@click.option(
    "--searches-per-token",
    type=_PER_TOKEN,
    help="Searches of one token that a process runs at a time. Overrides the environment.",
)
@click.option("--metrics", is_flag=True, help="Serve /metrics for Prometheus.")
@click.option(
    "--log-format",
    type=click.Choice(("line", "json")),
    default="line",
    show_default=True,
    help="How each record of the log is written to stderr.",
)
@click.option(
    "--allow-anonymous",
    is_flag=True,
    help="Answer requests without a token on any address, even if there are tokens. Overrides the "
    "environment.",
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
    uds: str | None,
    uds_mode: int,
    fd: int | None,
    workers: int,
    cors_origins: tuple[str, ...],
    prepared_statements: str | None,
    stream_lifetime: int | None,
    requests_per_token: int | None,
    readers_per_token: int | None,
    searches_per_token: int | None,
    metrics: bool,
    log_format: Literal["line", "json"],
    allowed_hosts: tuple[str, ...],
    trusted_proxies: tuple[str, ...],
    allow_anonymous: bool,
) -> None:
    """Run the REST service until it is interrupted or terminated.

    Brings SQLite's schema up to date first, and only checks PostgreSQL's: run
    `incidentkit db upgrade` once for each new version. On SIGINT or SIGTERM it answers the
    requests that it has received, and exits with 0. Needs the extra `server`:
    pip install 'incidentkit[server]'.

    On loopback, requests need no access token until one exists. On any other address, the service
    starts only with a token or --allow-anonymous.

    \b
    Examples:
      incidentkit serve
      incidentkit serve --host 0.0.0.0 --port 80 --workers 4
      incidentkit serve --uds /run/incidentkit/http.sock
      incidentkit serve --allowed-host incidents.example.com --trusted-proxy 127.0.0.1
    """  # noqa: D301
    address = _address(Tcp(host, port), uds, uds_mode, fd)
    settings = servers.settings
    if prepared_statements is not None:
        chosen = PREPARED_STATEMENTS[prepared_statements]
        settings = evolve(settings, store=evolve(settings.store, prepared_statements=chosen))
    if stream_lifetime is not None:
        settings = evolve(settings, stream_lifetime=stream_lifetime)
    if cors_origins:
        try:
            settings = evolve(settings, cors_origins=tuple(map(origin, cors_origins)))
        except ValueError as error:
            raise click.UsageError(f"--cors-origin {error}") from None
    settings = evolve(
        settings,
        requests_per_token=requests_per_token or settings.requests_per_token,
        readers_per_token=readers_per_token or settings.readers_per_token,
        searches_per_token=searches_per_token or settings.searches_per_token,
        allow_anonymous=allow_anonymous or settings.allow_anonymous,
        allowed_hosts=tuple(map(_host, allowed_hosts)) or settings.allowed_hosts,
        trusted_proxies=tuple(map(_proxy, trusted_proxies)) or settings.trusted_proxies,
    )
    ended_well = run_server(settings, address, workers, metrics=metrics, log_format=log_format)
    click.get_current_context().exit(0 if ended_well else 1)


def _address(tcp: Tcp, uds: str | None, uds_mode: int, fd: int | None) -> Address:
    """Return where to listen.

    Raises:
        UsageError: If several places are given, or an empty one.
    """
    context = click.get_current_context()
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("host", "port", "uds", "uds_mode", "fd")
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]
    if fd is not None and len(given) > 1:
        raise click.UsageError(f"--fd names a socket that listens already: omit {given[0]}")
    if uds is not None and {"--host", "--port"} & {*given}:
        raise click.UsageError("--uds takes the place of --host and --port: omit them")
    if uds is None and "--uds-mode" in given:
        raise click.UsageError("--uds-mode needs --uds")
    if fd is not None:
        return Inherited(fd)
    if uds is not None:
        if not uds or not hasattr(socket, "AF_UNIX"):
            raise click.UsageError("--uds needs a path, on a system with Unix sockets")
        return Unix(uds, uds_mode)
    if not tcp.host:
        # Python's sockets read an empty host as every address of the machine.
        raise click.UsageError("--host is empty: name an address, such as 127.0.0.1")
    return tcp


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

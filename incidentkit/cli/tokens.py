"""Commands that create, list and revoke the access tokens of the REST service."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from incidentkit.cli.commands import Group
from incidentkit.cli.options import Age, Servers, takes_database, takes_json
from incidentkit.cli.output import write
from incidentkit.cli.running import read, run
from incidentkit.cli.text import GAP
from incidentkit.domain.tokens import AccessToken, Scope
from incidentkit.wire import dump_json, wire_converter

HEADINGS = ("name", "scopes", "created_at", "expires_at", "last_used_at", "state")


@click.group(cls=Group)
def token() -> None:
    """Create, list and revoke the access tokens of the REST service.

    \b
    Examples:
      incidentkit token create ci --scope report --scope read --expires 90d
      incidentkit token list
      incidentkit token revoke ci
    """  # noqa: D301


@token.command()
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(tuple(scope.value for scope in Scope)),
    required=True,
    multiple=True,
    help="A scope of the token; repeat the option for several. No scope includes another.",
)
@click.option(
    "--expires",
    "expires_in",
    type=Age(),
    metavar="AGE",
    help="The time until it expires: a number with m, h, d or w, such as 15m, 12h or 90d; never by "
    "default.",
)
@takes_json
@takes_database
def create(
    servers: Servers,
    name: str,
    scopes: Sequence[str],
    expires_in: timedelta | None,
    *,
    as_json: bool,
) -> None:
    """Create a token, and show it once.

    NAME is the actor of its changes. Only a digest of the token is stored, so it cannot be shown
    again.

    \b
    Examples:
      incidentkit token create ci --scope report --scope read --expires 90d
      incidentkit token create alertmanager --scope report > alertmanager.token
    """  # noqa: D301
    created = run(
        servers,
        lambda incidents: incidents.tokens.create(name, scopes, expires_in=expires_in),
        creates=True,
    )
    if as_json:
        write(dump_json({"token": created.secret, **_fields(created.token)}))
        return
    ends = created.token.expires_at
    until = "It does not expire." if ends is None else f"It expires at {_time(ends)} UTC."
    click.echo(f"Keep the token now: it is not shown again. {until}", err=True)
    write(created.secret)


@token.command("list")
@takes_json
@takes_database
def list_tokens(servers: Servers, *, as_json: bool) -> None:
    """Show every token without its secret, including expired and revoked ones."""
    found = read(servers, lambda incidents: incidents.tokens.list())
    if as_json:
        write(dump_json([_fields(each) for each in found]))
        return
    if not found:
        click.echo("No tokens.", err=True)
        return
    rows = [HEADINGS, *map(_cells, found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    write("\n".join(GAP.join(map(str.ljust, row, widths)).rstrip() for row in rows))


@token.command()
@click.argument("name")
@takes_database
def revoke(servers: Servers, name: str) -> None:
    """Revoke the token named NAME; a running service refuses it within 5 seconds."""
    revoked = run(servers, lambda incidents: incidents.tokens.revoke(name))
    write(f"Revoked {revoked.name}.")


def _fields(token: AccessToken) -> dict[str, Any]:
    fields: dict[str, Any] = wire_converter().unstructure(token)
    return {**fields, "scopes": sorted(token.scopes), "state": _state(token)}


def _cells(token: AccessToken) -> tuple[str, ...]:
    times = (token.created_at, token.expires_at, token.last_used_at)
    return (
        token.name,
        ",".join(sorted(token.scopes)),
        *("-" if time is None else f"{_time(time)} UTC" for time in times),
        _state(token),
    )


def _state(token: AccessToken) -> str:
    """Return ``active``, ``expired`` or ``revoked``; expired wins if it came first."""
    ended, expires = token.revoked_at, token.expires_at
    if ended is not None and (expires is None or ended < expires):
        return "revoked"
    return "active" if token.active(datetime.now(UTC)) else "expired"


def _time(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M:%S}"

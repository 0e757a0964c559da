"""The program: its commands, and how it ends."""

from __future__ import annotations

import logging
from traceback import format_exception
from typing import Any, Final

import click

from incidentkit.cli.commands import Group
from incidentkit.cli.db import db
from incidentkit.cli.failures import failure
from incidentkit.cli.interrupts import INTERRUPTED
from incidentkit.cli.reading import get, history, list_incidents, search, watch
from incidentkit.cli.serve import serve
from incidentkit.cli.text import harmless_lines
from incidentkit.cli.tokens import token
from incidentkit.cli.writing import create, note, purge, resolve, update_status
from incidentkit.domain.errors import IncidentKitError
from incidentkit.version import __version__


class Program(Group):
    """Reports errors as lines on stderr and as an exit code, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that the context names."""
        try:
            return super().invoke(ctx)
        except IncidentKitError as error:
            if ctx.params["debug"]:
                click.echo(harmless_lines("".join(format_exception(error))), err=True)
            raise failure(error) from error
        except KeyboardInterrupt:
            # Raised where `main` is called by another program, with handlers of its own.
            ctx.exit(INTERRUPTED)


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="On an error, also show the exceptions that caused it.")
def main(*, debug: bool) -> None:  # noqa: ARG001
    """Record and follow incidents.

    Set INCIDENTKIT_DATABASE_URL or POSTGRES_* in the environment, or in a file `.env`, to name the
    database; the default is the SQLite file incidentkit.db in the current folder. Set
    INCIDENTKIT_REDIS_URL or REDIS_HOST to cache lists in Redis. Keep passwords there: other users
    of the machine can read a --database-url.

    \b
    Examples:
      incidentkit serve
      incidentkit create "Disk is full on db-1" --source monitoring
      dmesg | tail -n 1 | incidentkit create - --source operator --json
      incidentkit list --status new --limit 50
      incidentkit search --text "disk db-1" --order oldest
      incidentkit update-status 7 completed --note "The old logs were removed"
      incidentkit resolve disk:db-1
      incidentkit history 7
      incidentkit watch
      incidentkit purge --older-than 90d
      incidentkit token create ci --scope report --expires 90d
      incidentkit db upgrade

    \b
    Exit codes:
      0    success
      1    failure: not found, database unavailable, schema out of date
      2    invalid argument, option or setting
      130  interrupted
    """  # noqa: D301
    # When a command is interrupted, asyncio logs the connection that it leaves open. The service
    # sets up handlers of its own.
    logging.getLogger("asyncio").addHandler(logging.NullHandler())


COMMANDS: Final = (
    create,
    list_incidents,
    search,
    get,
    update_status,
    resolve,
    note,
    history,
    watch,
    purge,
    serve,
    token,
    db,
)

for command in COMMANDS:
    main.add_command(command)

"""Commands that migrate the database's schema."""

from __future__ import annotations

import os
import sys
from functools import partial

import click

from incidentkit.cli.commands import Group
from incidentkit.cli.completion import offering
from incidentkit.cli.failures import Refused
from incidentkit.cli.interrupts import interrupts
from incidentkit.cli.options import Servers, takes_database
from incidentkit.cli.output import write
from incidentkit.cli.running import name_default, run_coroutine
from incidentkit.cli.text import harmless, held_up
from incidentkit.domain.errors import StoreError
from incidentkit.domain.values import FeedBlocker
from incidentkit.opening import check_exists, migrations, store_from_url
from incidentkit.settings import Settings
from incidentkit.store.schema import REVISIONS, SCHEMA_REVISION, migrations_below, migrations_to


@click.group(cls=Group)
def db() -> None:
    """Bring the database's schema up to date, or look at it.

    \b
    Examples:
      incidentkit db upgrade
      incidentkit db downgrade -1
    """  # noqa: D301


@db.command()
@click.argument("revision", default="head", shell_complete=offering(("head", *REVISIONS)))
@takes_database
def upgrade(servers: Servers, revision: str) -> None:
    """Bring the schema up to REVISION, by default the newest; no row is lost.

    Takes over a database of the origin as it is. Restores functions, triggers and indexes that are
    missing or were changed. Safe to run from several places at once.
    """
    url = servers.settings.database_url
    # A faulty revision is reported before a file is created.
    migrations_to(revision, 0)
    for part in run_coroutine(migrations().upgrade(url, revision)):
        write(f"Restored {part}.")
    _write_revision(run_coroutine(migrations().current(url)))


@db.command(context_settings={"ignore_unknown_options": True})
@click.argument("revision", default="-1", shell_complete=offering(("-1", *REVISIONS, "base")))
@click.option("--yes", is_flag=True, help="Drop the incident table without asking.")
@takes_database
def downgrade(servers: Servers, revision: str, *, yes: bool) -> None:
    """Bring the schema down to REVISION, by default by one step.

    Incidents are kept down to the origin's revision, dadc1db062ae. Below it, `base` drops the
    incident table with all its rows, after a confirmation.
    """
    url = servers.settings.database_url
    migrations_to(revision, len(REVISIONS))
    check_exists(url, with_schema=False)
    at = None if yes else run_coroutine(migrations().current(url))
    if at is not None and migrations_to(revision, migrations_below(at)) == 0:
        warning = f"a downgrade to {revision} drops the incident table with all its rows"
        if sys.stdin is None or not sys.stdin.isatty():
            raise Refused([f"{warning}: add --yes to confirm"])
        # An interrupt leaves the prompt's line.
        interrupts.farewell = partial(os.write, 2, b"\n")
        click.confirm(f"{warning.capitalize()}. Continue?", abort=True, err=True)
        interrupts.farewell = None
    run_coroutine(migrations().downgrade(url, revision))
    _write_revision(run_coroutine(migrations().current(url)))


@db.command()
@takes_database
def current(servers: Servers) -> None:
    """Show the revision of the schema."""
    url = servers.settings.database_url
    check_exists(url, with_schema=False)
    revision = run_coroutine(migrations().current(url))
    name_default(servers)
    _write_revision(revision)


@db.command()
@takes_database
def check(servers: Servers) -> None:
    """Exit with 1, and say what to do, unless the schema has the newest revision.

    Its functions, triggers and indexes must be as the revision defines them.

    Also warns of a transaction on PostgreSQL that holds the change feed up.
    """
    url = servers.settings.database_url
    check_exists(url, with_schema=False)
    run_coroutine(migrations().check(url))
    name_default(servers)
    write("The schema is up to date.")
    try:
        blocker = run_coroutine(_feed_blocker(servers.settings))
    except StoreError as error:
        # Such as a missing privilege: the schema is in order all the same.
        _warn(f"cannot tell whether the change feed is held up: {error}")
    else:
        if blocker is not None:
            _warn(held_up(blocker))


async def _feed_blocker(settings: Settings) -> FeedBlocker | None:
    store = store_from_url(settings.database_url, settings.store)
    await store.open()
    try:
        return await store.feed_blocker()
    finally:
        await store.close()


def _warn(message: str) -> None:
    click.echo(f"Warning: {harmless(message)}", err=True)


def _write_revision(revision: str | None) -> None:
    if revision is None:
        write("The database has no incidentkit schema yet: run `incidentkit db upgrade`.")
    else:
        write(f"{revision} (head)" if revision == SCHEMA_REVISION else revision)

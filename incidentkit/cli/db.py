"""Commands that migrate the database's schema."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
from incidentkit.opening import check_exists, migrations, store_from_url
from incidentkit.settings import Settings
from incidentkit.store.schema import (
    REVISIONS,
    SCHEMA_REVISION,
    migrations_below,
    migrations_to,
    upgrade_command,
)


@click.group(cls=Group)
def db() -> None:
    """Upgrade, downgrade or inspect the schema of the database.

    \b
    Examples:
      incidentkit db upgrade
      incidentkit db downgrade -1
    """  # noqa: D301


@db.command()
@click.argument("revision", default="head", shell_complete=offering(("head", *REVISIONS)))
@takes_database
def upgrade(servers: Servers, revision: str) -> None:
    """Upgrade the schema to REVISION, by default the newest.

    No row is lost. Also upgrades a database of Incident API. Restores missing or changed functions,
    triggers and indexes. You can start it in several places at once, and run it again if it was
    killed. A long upgrade reports its progress. On PostgreSQL, creates the schema of --schema if it
    does not exist, and says which schema has the tables.
    """
    url, schema = servers.settings.database_url, servers.settings.schema
    # A faulty revision is reported before a file is created.
    migrations_to(revision, 0)
    with _progress():
        done = run_coroutine(migrations().upgrade(url, revision, schema=schema))
    for part in done.restored:
        write(f"Restored {part}.")
    if done.schema is not None:
        click.echo(f"The tables are in the schema {harmless(done.schema)}.", err=True)
    _write_revision(run_coroutine(migrations().current(url, schema=schema)), schema)


@db.command(context_settings={"ignore_unknown_options": True})
@click.argument("revision", default="-1", shell_complete=offering(("-1", *REVISIONS, "base")))
@click.option("--yes", is_flag=True, help="Drop the incident table without asking.")
@takes_database
def downgrade(servers: Servers, revision: str, *, yes: bool) -> None:
    """Downgrade the schema to REVISION, by default by one step.

    Incidents are kept down to the first revision, dadc1db062ae. Below it, `base` drops the
    incident table with all its rows, after a confirmation.
    """
    url, schema = servers.settings.database_url, servers.settings.schema
    migrations_to(revision, len(REVISIONS))
    check_exists(url, with_schema=False)
    at = None if yes else run_coroutine(migrations().current(url, schema=schema))
    if at is not None and migrations_to(revision, migrations_below(at)) == 0:
        warning = f"a downgrade to {revision} drops the incident table with all its rows"
        if sys.stdin is None or not sys.stdin.isatty():
            raise Refused([f"{warning}: add --yes to confirm"])
        # An interrupt leaves the prompt's line.
        interrupts.farewell = partial(os.write, 2, b"\n")
        click.confirm(f"{warning.capitalize()}. Continue?", abort=True, err=True)
        interrupts.farewell = None
    with _progress():
        run_coroutine(migrations().downgrade(url, revision, schema=schema))
    _write_revision(run_coroutine(migrations().current(url, schema=schema)), schema)


@db.command()
@takes_database
def current(servers: Servers) -> None:
    """Show the revision of the schema."""
    url, schema = servers.settings.database_url, servers.settings.schema
    check_exists(url, with_schema=False)
    revision = run_coroutine(migrations().current(url, schema=schema))
    name_default(servers)
    _write_revision(revision, schema)


@db.command()
@takes_database
def check(servers: Servers) -> None:
    """Check that a client can use the database.

    Compares the revision, functions, triggers and indexes with those that this version needs. If
    they differ, exits with 1 and says what to do.

    Also warns of a transaction on PostgreSQL that holds up the change feed.
    """
    url, schema = servers.settings.database_url, servers.settings.schema
    check_exists(url, with_schema=False)
    run_coroutine(migrations().check(url, schema=schema))
    warning = run_coroutine(_open(servers.settings))
    name_default(servers)
    write("The schema is up to date.")
    if warning is not None:
        click.echo(f"Warning: {harmless(warning)}", err=True)


async def _open(settings: Settings) -> str | None:
    """Open the store as a client does, and return a warning about the change feed."""
    store = store_from_url(settings.database_url, settings.store, schema=settings.schema)
    await store.open()
    try:
        blocker = await store.feed_blocker()
    except StoreError as error:
        # For example a missing privilege: the schema itself is in order.
        return f"cannot tell whether the change feed is held up: {error}"
    finally:
        await store.close()
    return None if blocker is None else held_up(blocker)


class _Lines(logging.Handler):
    """Writes each record to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the message."""
        click.echo(harmless(record.getMessage()), err=True)


@contextmanager
def _progress() -> Iterator[None]:
    """Show on stderr the progress of a migration, and what it waits for."""
    logger, lines = logging.getLogger("incidentkit.store"), _Lines()
    level = logger.level
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(lines)
        logger.setLevel(level)


def _write_revision(revision: str | None, schema: str | None) -> None:
    if revision is None:
        command = upgrade_command(schema)
        write(f"The database has no incidentkit schema yet: run `{command}`.")
    else:
        write(f"{revision} (head)" if revision == SCHEMA_REVISION else revision)

"""Write results to stdout: text for people, JSON for programs."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Sequence

import click

from incidentkit.cli.text import details, table
from incidentkit.domain.values import Incident
from incidentkit.wire import encode_incident


def write(output: str | bytes) -> None:
    """Write a line to stdout.

    Raises:
        ClickException: If stdout cannot be written, such as on a full disk.
        Exit: If the reader of a pipe is gone.
    """
    if isinstance(output, str):
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        output = output.encode(encoding, "backslashreplace").decode(encoding)
    try:
        click.echo(output)
    except OSError as error:
        # Otherwise Python flushes stdout again on exit, and fails again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            raise click.exceptions.Exit(1) from error
        raise click.ClickException(f"Cannot write to stdout: {error.strerror}") from error


def write_incident(incident: Incident, *, as_json: bool) -> None:
    """Write all fields of an incident."""
    write(encode_incident(incident) if as_json else details(incident))


def write_table(incidents: Sequence[Incident]) -> None:
    """Write one line for each incident; on a terminal, shorten messages to its width."""
    if not incidents:
        click.echo("No incidents.", err=True)
        return
    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    write(table(incidents, shutil.get_terminal_size().columns if on_terminal else None))

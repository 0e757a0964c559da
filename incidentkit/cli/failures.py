"""Report errors as lines on stderr and an exit code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import click

from incidentkit.cli.options import DATABASE_URL, REDIS_URL
from incidentkit.cli.text import harmless
from incidentkit.domain.errors import (
    CacheUnavailable,
    IncidentKitError,
    InvalidIncident,
    InvalidSettings,
)

NAMES: Final = {
    "database_url": f"--database-url or {DATABASE_URL}",
    DATABASE_URL: f"--database-url or {DATABASE_URL}",
    "redis_url": f"--redis-url or {REDIS_URL}",
    REDIS_URL: f"--redis-url or {REDIS_URL}",
}
"""Settings that are also options, by their names in errors."""


class Refused(click.ClickException):
    """Reports each reason on a line of its own, with the exit code of a usage error."""

    exit_code = 2

    def __init__(self, reasons: Iterable[str]) -> None:
        super().__init__("\nError: ".join(map(harmless, reasons)))


def failure(error: IncidentKitError) -> click.ClickException:
    """Return the exception with which click reports an error of the SDK."""
    match error:
        case InvalidIncident():
            return Refused(f"{fault.field} {fault.reason}" for fault in error.errors)
        case InvalidSettings():
            return Refused([f"{NAMES.get(error.name, error.name)} {error.reason}"])
        case CacheUnavailable():
            advice = "start it, or unset INCIDENTKIT_REDIS_REQUIRED"
            return click.ClickException(harmless(f"{error}: {advice}"))
        case _:
            return click.ClickException(harmless(str(error)))

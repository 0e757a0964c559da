"""Options that several commands share, and the types of their values."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime, timedelta
from functools import wraps
from typing import Any, Final

import click
from attrs import frozen

from incidentkit.cli.completion import offer_databases
from incidentkit.cli.log import JsonFormatter
from incidentkit.cli.text import harmless
from incidentkit.domain.actor import acting_as
from incidentkit.domain.errors import InvalidSettings
from incidentkit.domain.rules import time_text
from incidentkit.domain.values import IncidentSource, IncidentStatus
from incidentkit.environment import unknown_variables
from incidentkit.settings import Settings, names_database, read_variables

STATUSES: Final = f"[{'|'.join(IncidentStatus)}]"
SOURCES: Final = f"[{'|'.join(IncidentSource)}]"

DATABASE_URL: Final = "INCIDENTKIT_DATABASE_URL"
REDIS_URL: Final = "INCIDENTKIT_REDIS_URL"
SCHEMA: Final = "INCIDENTKIT_SCHEMA"
"""The variables that ``--database-url``, ``--redis-url`` and ``--schema`` override."""

_database_option: Final = click.option(
    "--database-url",
    metavar="URL",
    shell_complete=offer_databases,
    help="postgresql://user:password@host:port/database or sqlite+aiosqlite:///file; overrides "
    "the environment.",
)
_schema_option: Final = click.option(
    "--schema",
    metavar="NAME",
    help="The PostgreSQL schema that has the tables; overrides the environment.",
)
_redis_option: Final = click.option(
    "--redis-url", metavar="URL", help="redis://host:port/db; overrides the environment."
)


@frozen
class Servers:
    """The servers of a command.

    Attributes:
        settings: How to reach and to use them.
        is_default: Whether the database is the default one, since nothing names another.
    """

    settings: Settings
    is_default: bool


def takes_database(command: Callable[..., None]) -> Callable[..., None]:
    """Pass the servers to a command; its database options override the environment."""

    @_schema_option
    @_database_option
    @wraps(command)
    def with_servers(database_url: str | None, schema: str | None, **arguments: Any) -> None:
        command(_servers({DATABASE_URL: database_url, SCHEMA: schema}), **arguments)

    return with_servers


def takes_servers(command: Callable[..., None]) -> Callable[..., None]:
    """Pass the servers to a command; an option for each overrides the environment."""

    @_redis_option
    @_schema_option
    @_database_option
    @wraps(command)
    def with_servers(
        database_url: str | None, schema: str | None, redis_url: str | None, **arguments: Any
    ) -> None:
        given = {DATABASE_URL: database_url, SCHEMA: schema, REDIS_URL: redis_url}
        as_json = arguments.get("log_format") == "json"
        command(_servers(given, as_json=as_json), **arguments)

    return with_servers


def _servers(options: dict[str, str | None], *, as_json: bool = False) -> Servers:
    overrides = {name: value for name, value in options.items() if value is not None}
    for name, value in overrides.items():
        if not value.strip():
            raise InvalidSettings(name, "is empty")
    variables = read_variables(overrides=overrides)
    if variables.file is not None:
        text = f"Using settings from {variables.file}"
        click.echo(_json_record(text) if as_json else harmless(text), err=True)
    values = variables.values
    for name, fault in unknown_variables(values).items():
        raise InvalidSettings(name, fault)
    return Servers(Settings.from_mapping(values), is_default=not names_database(values))


def _json_record(text: str) -> str:
    """Return a line of the log in JSON, before there is a log."""
    record = logging.LogRecord("incidentkit.cli", logging.INFO, __file__, 0, text, None, None)
    return JsonFormatter().format(record)


def takes_actor(command: Callable[..., None]) -> Callable[..., None]:
    """Run a command as the actor that ``--actor`` names."""

    @click.option("--actor", metavar="NAME", help="Who makes the change, for the history.")
    @wraps(command)
    def as_actor(actor: str | None, **arguments: Any) -> None:
        with nullcontext() if actor is None else acting_as(actor):
            command(**arguments)

    return as_actor


takes_idempotency_key: Final = click.option(
    "--idempotency-key",
    metavar="KEY",
    help="Make the command safe to repeat: for 24 hours, the same key changes nothing more and "
    "shows the first result again.",
)

takes_json: Final = click.option(
    "--json", "as_json", is_flag=True, help="Write JSON on one line, for programs."
)


# Not generic before click 8.4.
class Time(click.ParamType):  # type: ignore[type-arg]
    """A date, or a time of RFC 3339; UTC unless it has an offset."""

    name = "time"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime:
        """Return the aware time."""
        text = str(value)
        try:
            return time_text(f"{text} 00:00:00" if len(text) == len("2026-11-23") else text)
        except ValueError:
            self.fail("must be a time such as 2026-11-23 or 2026-11-23T09:30:00Z", param, ctx)


class Age(click.ParamType):  # type: ignore[type-arg]
    """A number of minutes, hours, days or weeks, such as ``90d``."""

    name = "age"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> timedelta:
        """Return the length of time."""
        match = re.fullmatch(r"([0-9]{1,5})([mhdw])", str(value))
        if match is None:
            self.fail("must be a number with m, h, d or w, such as 90d", param, ctx)
        unit = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}[match[2]]
        return timedelta(**{unit: int(match[1])})

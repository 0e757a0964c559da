"""What the environment, or a ``.env`` file, says of the servers to use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, cast
from urllib.parse import quote

import environ
from attrs import field, frozen
from dotenv import dotenv_values

from incidentkit.errors import InvalidSettings
from incidentkit.store.base import StoreOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

DEFAULT_DATABASE_URL: Final = "sqlite+aiosqlite:///incidentkit.db"

RequestLog = Literal["log", "database"]


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        if not (value.isascii() and value.isdigit() and len(value) <= len(str(high))):
            raise ValueError(f"must be an integer from {low} to {high}")
        number = int(value)
        if not low <= number <= high:
            raise ValueError(f"must be an integer from {low} to {high}")
        return number

    return parse


def _flag(value: str) -> bool:
    flags = {"1": True, "true": True, "yes": True, "on": True}
    flags |= {"0": False, "false": False, "no": False, "off": False}
    try:
        return flags[value.lower()]
    except KeyError:
        raise ValueError("must be true or false") from None


def _request_log(value: str) -> RequestLog:
    if value not in ("log", "database"):
        raise ValueError("must be one of: log, database")
    return cast("RequestLog", value)


def _variable(name: str, default: object, parse: Callable[[str], Any], help_: str) -> Any:
    """Declare a variable whose fault is told by its name and never by its value."""

    def convert(value: object) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return parse(value.strip())
        except ValueError as error:
            raise InvalidSettings(name, str(error)) from None

    return environ.var(default=default, name=name, converter=convert, help=help_)


_PORT: Final = _integer(1, 65535)


@environ.config(prefix="", frozen=True)
class Environment:
    """Every variable that incidentkit reads; empty ones count as not set."""

    database_url: str | None = _variable(
        "INCIDENTKIT_DATABASE_URL",
        None,
        str,
        "postgresql://user:password@host:port/database or sqlite+aiosqlite:///file; "
        "wins over POSTGRES_*",
    )
    redis_url: str | None = _variable(
        "INCIDENTKIT_REDIS_URL",
        None,
        str,
        "redis://host:port/db; wins over REDIS_*",
    )
    redis_required: bool = _variable(
        "INCIDENTKIT_REDIS_REQUIRED", "false", _flag, "refuse to start without Redis"
    )
    request_log: RequestLog = _variable(
        "INCIDENTKIT_REQUEST_LOG",
        "log",
        _request_log,
        "where the REST service records requests: log (the logger incidentkit.http), or database "
        "(the table request_log as well)",
    )
    postgres_host: str | None = _variable("POSTGRES_HOST", None, str, "PostgreSQL's host")
    postgres_port: int | None = _variable("POSTGRES_PORT", None, _PORT, "PostgreSQL's port")
    postgres_db: str | None = _variable("POSTGRES_DB", None, str, "the database")
    postgres_user: str | None = _variable("POSTGRES_USER", None, str, "the user")
    postgres_password: str | None = environ.var(
        default=None, name="POSTGRES_PASSWORD", help="the password"
    )
    redis_host: str | None = _variable("REDIS_HOST", None, str, "Redis' host")
    redis_port: int = _variable("REDIS_PORT", 6379, _PORT, "Redis' port")
    redis_db: int = _variable("REDIS_DB", 0, _integer(0, 1_000_000), "Redis' database number")
    pool_size: int = _variable(
        "DB_POOL_SIZE", 5, _integer(1, 10_000), "database connections that may be kept"
    )
    max_overflow: int = _variable(
        "DB_MAX_OVERFLOW", 10, _integer(0, 10_000), "further connections under load"
    )
    echo: bool = _variable("DB_ECHO", "false", _flag, "log each SQL statement, without its values")


@frozen
class Settings:
    """Which database and cache a client uses, and how.

    Attributes:
        database_url: Where incidents are kept.
        redis_url: The Redis that caches lists; None means none.
        redis_required: Whether a client refuses to open while Redis does not answer.
        request_log: Where the REST service records requests.
        store: Sizes and timeouts of the database.
    """

    database_url: str = field(default=DEFAULT_DATABASE_URL, repr=False)
    redis_url: str | None = field(default=None, repr=False)
    redis_required: bool = False
    request_log: RequestLog = "log"
    store: StoreOptions = field(factory=StoreOptions)

    @classmethod
    def from_env(cls, env_file: str | os.PathLike[str] | None = ".env") -> Settings:
        """Read the process's environment, and under it the file if there is one.

        The process's environment is only read, never changed.

        Args:
            env_file: A file of ``NAME=value`` lines; None means none.

        Raises:
            InvalidSettings: With the variable and the rule that it breaks.
        """
        in_file = dotenv_values(env_file) if env_file and Path(env_file).is_file() else {}
        return cls.from_mapping({**in_file, **os.environ})

    @classmethod
    def from_mapping(cls, variables: Mapping[str, str | None]) -> Settings:
        """Read the variables from a mapping.

        Raises:
            InvalidSettings: With the variable and the rule that it breaks.
        """
        given = {name: value for name, value in variables.items() if value and value.strip()}
        environment = environ.to_config(Environment, given)
        return cls(
            database_url=environment.database_url
            or _postgres_url(environment)
            or DEFAULT_DATABASE_URL,
            redis_url=environment.redis_url or _redis_url(environment),
            redis_required=environment.redis_required,
            request_log=environment.request_log,
            store=StoreOptions(
                pool_size=environment.pool_size,
                max_overflow=environment.max_overflow,
                echo=environment.echo,
            ),
        )


def _postgres_url(environment: Environment) -> str | None:
    """Return the URL of the origin's variables; any one of them means a PostgreSQL server."""
    host, port = environment.postgres_host, environment.postgres_port
    user, password = environment.postgres_user, environment.postgres_password
    database = environment.postgres_db
    if not any((host, port, user, password, database)):
        return None
    user = user or "postgres"
    account = quote(user, safe="") + (f":{quote(password, safe='')}" if password else "")
    host = host or "localhost"
    if ":" in host:
        host = f"[{host}]"
    return f"postgresql://{account}@{host}:{port or 5432}/{quote(database or user, safe='')}"


def _redis_url(environment: Environment) -> str | None:
    if not environment.redis_host:
        return None
    host = environment.redis_host
    if ":" in host:
        host = f"[{host}]"
    return f"redis://{host}:{environment.redis_port}/{environment.redis_db}"

"""What the environment, or a ``.env`` file, says of the servers to use."""

from __future__ import annotations

import os
import re
from ipaddress import IPv6Address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, cast
from urllib.parse import quote

import environ
from attrs import field, frozen
from dotenv import dotenv_values

from incidentkit.cache.base import TTL
from incidentkit.cache.opening import check_redis_url
from incidentkit.domain.errors import InvalidSettings
from incidentkit.domain.transitions import Graph  # noqa: TC001
from incidentkit.domain.values import IncidentStatus
from incidentkit.store.database import DEFAULT_DATABASE_URL, database_kind
from incidentkit.store.options import StoreOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

RequestLog = Literal["log", "database"]

_HOST: Final = re.compile(r"[A-Za-z0-9._-]+")


PREFIXES: Final = ("INCIDENTKIT_", "POSTGRES_", "REDIS_", "DB_")


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        if not (value.isascii() and value.isdigit() and len(value) <= len(str(high))):
            raise ValueError(f"must be an integer from {low} to {high}")
        number = int(value)
        if not low <= number <= high:
            raise ValueError(f"must be an integer from {low} to {high}")
        return number

    return parse


def _seconds(value: str) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value) or float(value) > TTL:
        raise ValueError(f"must be a number of seconds from 0 to {TTL}")
    return float(value)


def _flag(value: str) -> bool:
    flags = {"1": True, "true": True, "yes": True, "on": True}
    flags |= {"0": False, "false": False, "no": False, "off": False}
    try:
        return flags[value.lower()]
    except KeyError:
        raise ValueError("must be true or false") from None


def _transitions(value: str) -> Graph:
    graph: dict[str, list[str]] = {}
    for pair in value.split(","):
        before, colon, after = pair.strip().partition(":")
        if not colon or not {before, after} <= {*IncidentStatus}:
            statuses = ", ".join(IncidentStatus)
            raise ValueError(f"must be pairs such as new:completed, with commas, of: {statuses}")
        graph.setdefault(before, []).append(after)
    return graph


def _request_log(value: str) -> RequestLog:
    if value not in ("log", "database"):
        raise ValueError("must be one of: log, database")
    return cast("RequestLog", value)


def _database_url(value: str) -> str:
    database_kind(value)
    return value


def _cache_url(value: str) -> str:
    check_redis_url(value)
    return value


def _host(value: str) -> str:
    """Return the host as it stands in a URL."""
    if _HOST.fullmatch(value):
        return value
    bracketed = value.startswith("[") and value.endswith("]")
    address, percent, zone = (value[1:-1] if bracketed else value).partition("%")
    try:
        IPv6Address(address)
    except ValueError:
        raise ValueError("must be a host name or an IP address") from None
    if percent and not _HOST.fullmatch(zone):
        raise ValueError("must be a host name or an IP address")
    return f"[{address}{percent and '%25'}{zone}]"


def _host_or_socket(value: str) -> str:
    """Return the host as it stands in a URL, or the folder of a Unix socket as it is."""
    # asyncpg takes a comma for the end of the first of several hosts.
    if value.startswith("/") and "," not in value and value.isprintable():
        return value
    try:
        return _host(value)
    except ValueError as error:
        raise ValueError(f"{error}, or the absolute path of a socket's folder") from None


def _variable(name: str, default: object, parse: Callable[[str], Any], help_: str) -> Any:
    """Declare a variable whose fault is told by its name and never by its value."""

    def convert(value: object) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return parse(value.strip())
        except InvalidSettings as error:
            raise InvalidSettings(name, error.reason) from None
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
        _database_url,
        "postgresql://user:password@host:port/database or sqlite+aiosqlite:///file; "
        "wins over POSTGRES_*",
    )
    redis_url: str | None = _variable(
        "INCIDENTKIT_REDIS_URL",
        None,
        _cache_url,
        "redis://host:port/db, redis+cluster://host:port,host:port or "
        "redis+sentinel://host:port,host:port/service/db; wins over REDIS_*",
    )
    redis_required: bool = _variable(
        "INCIDENTKIT_REDIS_REQUIRED",
        "false",
        _flag,
        "refuse to start without Redis, which has to be named then",
    )
    max_staleness: float = _variable(
        "INCIDENTKIT_MAX_STALENESS",
        "0",
        _seconds,
        "seconds, 0 to 3600, by which a list may be behind a change by another process",
    )
    transitions: Graph | None = _variable(
        "INCIDENTKIT_TRANSITIONS",
        None,
        _transitions,
        "the changes of a status that are allowed, such as new:completed,new:failed; all if not "
        "set",
    )
    request_log: RequestLog = _variable(
        "INCIDENTKIT_REQUEST_LOG",
        "log",
        _request_log,
        "where the REST service records requests: log (the logger incidentkit.http), or database "
        "(the table request_log as well)",
    )
    postgres_host: str | None = _variable(
        "POSTGRES_HOST",
        None,
        _host_or_socket,
        "PostgreSQL's host, or the absolute path of its socket's folder",
    )
    postgres_port: int | None = _variable("POSTGRES_PORT", None, _PORT, "PostgreSQL's port")
    postgres_db: str | None = _variable("POSTGRES_DB", None, str, "the database")
    postgres_user: str | None = _variable("POSTGRES_USER", None, str, "the user")
    postgres_password: str | None = environ.var(
        default=None, name="POSTGRES_PASSWORD", help="the password"
    )
    redis_host: str | None = _variable("REDIS_HOST", None, _host, "Redis' host")
    redis_port: int = _variable("REDIS_PORT", 6379, _PORT, "Redis' port")
    redis_db: int = _variable("REDIS_DB", 0, _integer(0, 1_000_000), "Redis' database number")
    pool_size: int = _variable(
        "DB_POOL_SIZE", 5, _integer(1, 10_000), "database connections that may be kept"
    )
    max_overflow: int = _variable(
        "DB_MAX_OVERFLOW",
        10,
        _integer(0, 10_000),
        "further connections under load; of no effect on SQLite",
    )
    echo: bool = _variable("DB_ECHO", "false", _flag, "log each SQL statement, without its values")


@frozen
class Settings:
    """Which database and cache a client uses, and how.

    Attributes:
        database_url: Where incidents are kept.
        redis_url: The Redis that caches lists; None means none.
        redis_required: Whether a client refuses to open while Redis does not answer.
        max_staleness: Seconds by which a list may be behind a change by another process.
        transitions: For each status those that may follow it; None allows every change.
        request_log: Where the REST service records requests.
        store: Sizes and timeouts of the database.
    """

    database_url: str = field(default=DEFAULT_DATABASE_URL, repr=False)
    redis_url: str | None = field(default=None, repr=False)
    redis_required: bool = False
    max_staleness: float = 0.0
    transitions: Graph | None = None
    request_log: RequestLog = "log"
    store: StoreOptions = field(factory=StoreOptions)

    @classmethod
    def from_env(
        cls,
        env_file: str | os.PathLike[str] | None = ".env",
        *,
        overrides: Mapping[str, str] | None = None,
    ) -> Settings:
        """Read the process's environment, and under it the file if there is one.

        The process's environment is only read, never changed.

        Args:
            env_file: A file of ``NAME=value`` lines in UTF-8; None means none.
            overrides: Variables that win over both.

        Raises:
            InvalidSettings: With the variable and the rule that it breaks.
        """
        in_file = _read_file(env_file) if env_file else {}
        in_process = {name: value for name, value in os.environ.items() if value.strip()}
        return cls.from_mapping({**in_file, **in_process, **(overrides or {})})

    @classmethod
    def from_mapping(cls, variables: Mapping[str, str | None]) -> Settings:
        """Read the variables from a mapping.

        Raises:
            InvalidSettings: With the variable and the rule that it breaks.
        """
        given = {name: value for name, value in variables.items() if value and value.strip()}
        # What is overruled is not judged: Kubernetes sets POSTGRES_PORT and REDIS_PORT to URLs of
        # its own in every pod beside services of these names.
        overruled = ("POSTGRES_",) * ("INCIDENTKIT_DATABASE_URL" in given)
        overruled += ("REDIS_",) * ("INCIDENTKIT_REDIS_URL" in given or "REDIS_HOST" not in given)
        given = {name: value for name, value in given.items() if not name.startswith(overruled)}
        for name, value in given.items():
            if name.startswith(PREFIXES) and not value.isascii():
                _check_text(name, value)
        environment = environ.to_config(Environment, given)
        redis_url = environment.redis_url or _redis_url(environment)
        if environment.redis_required and redis_url is None:
            reason = "needs a Redis: set INCIDENTKIT_REDIS_URL or REDIS_HOST"
            raise InvalidSettings("INCIDENTKIT_REDIS_REQUIRED", reason)
        return cls(
            database_url=environment.database_url
            or _postgres_url(environment)
            or DEFAULT_DATABASE_URL,
            redis_url=redis_url,
            redis_required=environment.redis_required,
            max_staleness=environment.max_staleness,
            transitions=environment.transitions,
            request_log=environment.request_log,
            store=StoreOptions(
                pool_size=environment.pool_size,
                max_overflow=environment.max_overflow,
                echo=environment.echo,
            ),
        )


def _read_file(env_file: str | os.PathLike[str]) -> dict[str, str | None]:
    """Return the variables of the file; none if it is not there, or is no file."""
    try:
        return dotenv_values(env_file) if Path(env_file).is_file() else {}
    except UnicodeError:
        reason = "it is not UTF-8"
    except OSError as error:
        reason = error.strerror or type(error).__name__
    raise InvalidSettings(os.fspath(env_file), f"cannot be read: {reason}")


def _check_text(name: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        # Without its cause, which shows the value.
        raise InvalidSettings(name, "is not UTF-8") from None


def _postgres_url(environment: Environment) -> str | None:
    """Return the URL of the origin's variables; any one of them means a PostgreSQL server."""
    host, port = environment.postgres_host, environment.postgres_port
    user, password = environment.postgres_user, environment.postgres_password
    database = environment.postgres_db
    if not any((host, port, user, password, database)):
        return None
    user = user or "postgres"
    account = quote(user, safe="") + (f":{quote(password, safe='')}" if password else "")
    host, port, database = host or "localhost", port or 5432, quote(database or user, safe="")
    if host.startswith("/"):
        return f"postgresql://{account}@/{database}?host={quote(host)}&port={port}"
    return f"postgresql://{account}@{host}:{port}/{database}"


def _redis_url(environment: Environment) -> str | None:
    if not environment.redis_host:
        return None
    return f"redis://{environment.redis_host}:{environment.redis_port}/{environment.redis_db}"

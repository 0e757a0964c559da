"""The environment variables that incidentkit reads, and the rule of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from ipaddress import IPv6Address, ip_network
from typing import Any, Final, Literal, TypeAlias, cast

from attrs import field, fields, frozen

from incidentkit.cache.opening import check_redis_url
from incidentkit.domain.errors import InvalidSettings
from incidentkit.domain.rules import origin
from incidentkit.domain.transitions import Graph
from incidentkit.domain.values import (
    MAX_PER_TOKEN,
    MAX_STALENESS,
    MAX_STREAM_LIFETIME,
    MIN_STREAM_LIFETIME,
    READERS_PER_TOKEN,
    REQUESTS_PER_TOKEN,
    SEARCHES_PER_TOKEN,
    STREAM_LIFETIME,
    IncidentStatus,
)
from incidentkit.store.database import database_kind
from incidentkit.store.options import PREPARED_STATEMENTS
from incidentkit.store.schema import check_schema

RequestLog: TypeAlias = Literal["log", "database"]

_HOST: Final = re.compile(r"[A-Za-z0-9._-]+")
_ALLOWED_HOST: Final = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")
_FLAGS: Final = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off"), False),
}


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        # int() takes more than digits, and time that grows with the square of their number.
        digits = value.isascii() and value.isdigit() and len(value) <= len(str(high))
        if not digits or not low <= int(value) <= high:
            raise ValueError(f"must be an integer from {low} to {high}")
        return int(value)

    return parse


def _seconds(value: str) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value) or float(value) > MAX_STALENESS:
        raise ValueError(f"must be a number of seconds from 0 to {MAX_STALENESS}")
    return float(value)


def _flag(value: str) -> bool:
    flag = _FLAGS.get(value.lower())
    if flag is None:
        raise ValueError("must be true or false")
    return flag


def _transitions(value: str) -> Graph:
    graph: dict[str, list[str]] = {}
    for pair in value.split(","):
        before, colon, after = pair.strip().partition(":")
        if not colon or not {before, after} <= {*IncidentStatus}:
            statuses = ", ".join(IncidentStatus)
            raise ValueError(
                f"must be pairs such as new:completed, separated by commas, of: {statuses}"
            )
        graph.setdefault(before, []).append(after)
    return graph


def _request_log(value: str) -> RequestLog:
    if value not in ("log", "database"):
        raise ValueError("must be one of: log, database")
    return cast("RequestLog", value)


def _origins(value: str) -> tuple[str, ...]:
    return tuple(origin(each.strip()) for each in value.split(",")) if value else ()


def _prepared_statements(value: str) -> bool | None:
    if value not in PREPARED_STATEMENTS:
        raise ValueError(f"must be one of: {', '.join(PREPARED_STATEMENTS)}")
    return PREPARED_STATEMENTS[value]


def _database_url(value: str) -> str:
    database_kind(value)
    return value


def _schema(value: str) -> str:
    check_schema(value, "postgresql")
    return value


def _redis_url(value: str) -> str:
    check_redis_url(value)
    return value


def allowed_host(value: str) -> str:
    """Return a host as requests name it, in lower case: a name or an address, maybe with a port.

    Raises:
        ValueError: If it is something else, such as a URL.
    """
    if _ALLOWED_HOST.fullmatch(value) is None:
        raise ValueError(
            "must be a host as requests name it, such as incidents.example.com or localhost:8080"
        )
    return value.lower()


def trusted_proxy(value: str) -> str:
    """Return the address or the network of a proxy; ``unix`` is that at a Unix socket.

    Raises:
        ValueError: If it is something else.
    """
    if value != "unix":
        try:
            ip_network(value, strict=False)
        except ValueError:
            raise ValueError(
                "must be an IP address, a network such as 10.0.0.0/8, or unix"
            ) from None
    return value


def _several(parse: Callable[[str], str]) -> Callable[[str], tuple[str, ...]]:
    return lambda value: tuple(parse(each.strip()) for each in value.split(","))


def _host(value: str) -> str:
    """Return the host in the form that a URL takes."""
    if _HOST.fullmatch(value):
        return value
    bracketed = value.startswith("[") and value.endswith("]")
    address, percent, zone = (value[1:-1] if bracketed else value).partition("%")
    try:
        IPv6Address(address)
    except ValueError:
        raise ValueError("must be a host name or an IP address") from None
    if not percent:
        return f"[{address}]"
    if not _HOST.fullmatch(zone):
        raise ValueError("must be a host name or an IP address")
    return f"[{address}%25{zone}]"


def _host_or_socket(value: str) -> str:
    """Return the host in the form that a URL takes, or the folder of a Unix socket unchanged."""
    # asyncpg takes a comma as the separator between two hosts.
    if value.startswith("/") and "," not in value and value.isprintable():
        return value
    try:
        return _host(value)
    except ValueError as error:
        raise ValueError(f"{error}, or the absolute path of a socket's folder") from None


def _variable(name: str, default: object, parse: Callable[[str], Any], help_: str) -> Any:
    """Declare a variable; an error shows its name and its rule, and never its value."""

    def convert(value: object) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return parse(value.strip())
        except InvalidSettings as error:
            raise InvalidSettings(name, error.reason) from None
        except ValueError as error:
            raise InvalidSettings(name, str(error)) from None

    return field(default=default, converter=convert, metadata={"name": name, "help": help_})


_PORT: Final = _integer(1, 65535)
_PER_TOKEN: Final = _integer(1, MAX_PER_TOKEN)


@frozen(repr=False)
class Environment:
    """Every variable that incidentkit reads; some are secret, so the repr shows none."""

    database_url: str | None = _variable(
        "INCIDENTKIT_DATABASE_URL",
        None,
        _database_url,
        "postgresql://user:password@host:port/database or sqlite+aiosqlite:///file; "
        "wins over POSTGRES_*",
    )
    schema: str | None = _variable(
        "INCIDENTKIT_SCHEMA",
        None,
        _schema,
        "the PostgreSQL schema that has the tables; by default the first one in the search path "
        "that has them",
    )
    redis_url: str | None = _variable(
        "INCIDENTKIT_REDIS_URL",
        None,
        _redis_url,
        "redis://host:port/db, redis+cluster://host:port,host:port or "
        "redis+sentinel://host:port,host:port/service/db; wins over REDIS_*",
    )
    redis_required: bool = _variable(
        "INCIDENTKIT_REDIS_REQUIRED",
        "false",
        _flag,
        "refuse to start unless a Redis is named and answers",
    )
    max_staleness: float = _variable(
        "INCIDENTKIT_MAX_STALENESS",
        "0",
        _seconds,
        "seconds, 0 to 3600, by which a list may lag behind a change by another process",
    )
    transitions: Graph | None = _variable(
        "INCIDENTKIT_TRANSITIONS",
        None,
        _transitions,
        "the status changes that are allowed, such as new:completed,new:failed; all if not set",
    )
    request_log: RequestLog = _variable(
        "INCIDENTKIT_REQUEST_LOG",
        "log",
        _request_log,
        "where the REST service records requests: log (the logger incidentkit.http), or database "
        "(the table request_log as well)",
    )
    stream_lifetime: int = _variable(
        "INCIDENTKIT_STREAM_LIFETIME",
        str(STREAM_LIFETIME),
        _integer(MIN_STREAM_LIFETIME, MAX_STREAM_LIFETIME),
        f"seconds, {MIN_STREAM_LIFETIME} to {MAX_STREAM_LIFETIME}, after which the REST service "
        "ends a stream of changes, which its reader then resumes",
    )
    cors_origins: tuple[str, ...] = _variable(
        "INCIDENTKIT_CORS_ORIGINS",
        "",
        _origins,
        "the origins of pages that may use the REST service in a browser, such as "
        "https://board.example.com, separated by commas; * is any; none if not set",
    )
    requests_per_token: int = _variable(
        "INCIDENTKIT_REQUESTS_PER_TOKEN",
        str(REQUESTS_PER_TOKEN),
        _PER_TOKEN,
        f"requests of one token, 1 to {MAX_PER_TOKEN}, that a process of the REST service answers "
        "at a time",
    )
    readers_per_token: int = _variable(
        "INCIDENTKIT_READERS_PER_TOKEN",
        str(READERS_PER_TOKEN),
        _PER_TOKEN,
        f"streams of changes and waiting polls, 1 to {MAX_PER_TOKEN}, that one token may have in a "
        "process",
    )
    searches_per_token: int = _variable(
        "INCIDENTKIT_SEARCHES_PER_TOKEN",
        str(SEARCHES_PER_TOKEN),
        _PER_TOKEN,
        f"searches of one token with text, total or details, 1 to {MAX_PER_TOKEN}, that a process "
        "runs at a time",
    )
    allow_anonymous: bool = _variable(
        "INCIDENTKIT_ALLOW_ANONYMOUS",
        "false",
        _flag,
        "whether the REST service answers requests without a token on any address, even if there "
        "are tokens",
    )
    allowed_hosts: tuple[str, ...] | None = _variable(
        "INCIDENTKIT_ALLOWED_HOSTS",
        None,
        _several(allowed_host),
        "the host names under which the REST service is reached, separated by commas; on "
        "loopback, localhost and its addresses always are, and elsewhere any host if not set",
    )
    trusted_proxies: tuple[str, ...] | None = _variable(
        "INCIDENTKIT_TRUSTED_PROXIES",
        None,
        _several(trusted_proxy),
        "the proxies whose X-Forwarded-For names the client: addresses, networks or unix, "
        "separated by commas",
    )
    prepared_statements: bool | None = _variable(
        "INCIDENTKIT_PREPARED_STATEMENTS",
        "auto",
        _prepared_statements,
        "whether PostgreSQL keeps statements prepared: on, off, or auto (not behind a connection "
        "pooler); on and off win over the URL",
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
    # Surrounding white space is part of a password.
    postgres_password: str | None = field(
        default=None, metadata={"name": "POSTGRES_PASSWORD", "help": "the password"}
    )
    redis_host: str | None = _variable("REDIS_HOST", None, _host, "Redis' host")
    redis_port: int = _variable("REDIS_PORT", 6379, _PORT, "Redis' port")
    redis_db: int = _variable("REDIS_DB", 0, _integer(0, 1_000_000), "Redis' database number")
    pool_size: int = _variable(
        "DB_POOL_SIZE",
        5,
        _integer(1, 10_000),
        "database connections that stay open; on PostgreSQL, until unused for five minutes",
    )
    max_overflow: int = _variable(
        "DB_MAX_OVERFLOW",
        10,
        _integer(0, 10_000),
        "further connections under load; ignored on SQLite",
    )
    echo: bool = _variable("DB_ECHO", "false", _flag, "log each SQL statement, without its values")

    @classmethod
    def read(cls, given: Mapping[str, str]) -> Environment:
        """Read the variables from a mapping of their names to their values.

        Raises:
            InvalidSettings: With the variable and the rule that it breaks.
        """
        names = {each.name: each.metadata["name"] for each in fields(cls)}
        values: dict[str, Any] = {key: given[name] for key, name in names.items() if name in given}
        return cls(**values)


VARIABLES: Final[tuple[str, ...]] = tuple(each.metadata["name"] for each in fields(Environment))
"""The name of every variable."""

PREFIX: Final = "INCIDENTKIT_"
"""The prefix of the names that mean nothing to other programs."""

_TESTS: Final = "INCIDENTKIT_TEST_"
"""The prefix of the variables of this project's own tests."""

_SERVICE_HOST: Final = "_SERVICE_HOST"
"""The end of a variable that Kubernetes sets for each service, beside others."""


def unknown_variables(names: Iterable[str]) -> dict[str, str]:
    """Return each name that is meant for incidentkit and unknown to it, and what is wrong with it.

    In a pod beside a service named ``incidentkit`` or ``incidentkit-web``, Kubernetes sets
    ``INCIDENTKIT_PORT`` or ``INCIDENTKIT_WEB_SERVICE_HOST``: those are not meant.
    """
    own = {name for name in names if name.startswith(PREFIX)} - {*VARIABLES}
    services = {name.removesuffix(_SERVICE_HOST) for name in own if name.endswith(_SERVICE_HOST)}
    injected = tuple(
        f"{service}_{part}_"
        for service in {"INCIDENTKIT", *services}
        for part in ("PORT", "SERVICE")
    )
    return {
        name: _suggestion(name)
        for name in sorted(own)
        if not f"{name}_".startswith((_TESTS, *injected))
    }


def _suggestion(name: str) -> str:
    # Without the prefix, which would make every name look alike.
    known = {variable.removeprefix(PREFIX): variable for variable in VARIABLES}
    nearest = get_close_matches(name.removeprefix(PREFIX), known, n=1)
    return f"is unknown: did you mean {known[nearest[0]]}?" if nearest else "is unknown: unset it"

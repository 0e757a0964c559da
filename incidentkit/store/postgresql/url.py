"""URLs of PostgreSQL, in the forms that libpq, SQLAlchemy and hosted databases give them.

Every parameter of libpq is either passed on, or accepted because it means nothing here, or refused
by its name. A parameter that libpq does not know is a setting of the server, such as
``search_path``.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping, Sequence
from getpass import getuser
from os import environ
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, quote, unquote, urlencode

import asyncpg
from attrs import field, frozen
from sqlalchemy.engine import URL

from incidentkit.domain.errors import InvalidSettings
from incidentkit.store.options import PREPARED_STATEMENTS

SSL_MODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")

HONORED: Final = (
    "application_name",
    "connect_timeout",
    "database",
    "dbname",
    "fallback_application_name",
    "host",
    "options",
    "passfile",
    "password",
    "port",
    "prepared_statements",
    "requiressl",
    "ssl",
    "user",
)
"""Parameters that this module reads, or leaves to the server as libpq does. All but
``prepared_statements`` are those of libpq and asyncpg."""

PASSED_ON: Final[tuple[str, ...]] = (
    "gsslib",
    "krbsrvname",
    "service",
    "ssl_max_protocol_version",
    "ssl_min_protocol_version",
    "sslcert",
    "sslcrl",
    "sslkey",
    "sslnegotiation",
    "sslpassword",
    "sslmode",
    "sslrootcert",
    "target_session_attrs",
)
"""Parameters that asyncpg reads from a URL as libpq does."""

TARGETS: Final = ("any", "primary", "standby", "prefer-standby", "read-write", "read-only")
"""The values of ``target_session_attrs``."""

FILES: Final = ("sslcert", "sslcrl", "sslkey", "sslrootcert")
"""Parameters with the path of a file that must exist."""

WITHOUT_MEANING: Final = (
    # Of libpq: dead connections are found by time limits, and asyncpg neither compresses nor binds
    # the authentication to the TLS channel.
    "channel_binding",
    "keepalives",
    "keepalives_count",
    "keepalives_idle",
    "keepalives_interval",
    "sslcompression",
    "tcp_user_timeout",
    # Of other drivers, object mappers and services.
    "async_fallback",
    "connection_limit",
    "pgbouncer",
    "pool_timeout",
    "prepared_statement_cache_size",
    "prepared_statement_name_func",
    "statement_cache_size",
    "supa",
    "uselibpqcompat",
    "workaround",
)
"""Parameters that are accepted, and change nothing."""

ONLY: Final[Mapping[str, tuple[str, ...]]] = {
    "client_encoding": ("utf8", "utf-8", "unicode", "auto"),
    "gssdelegation": ("0",),
    "gssencmode": ("disable", "prefer"),
    "load_balance_hosts": ("disable",),
    "max_protocol_version": ("3.0", "3.2", "latest"),
    "min_protocol_version": ("3.0",),
    "replication": ("false", "off", "no", "0"),
    "schema": ("public",),
    "sslcertmode": ("allow",),
    "sslsni": ("1",),
}
"""Parameters that are accepted with these values only, which are what happens anyway."""

REFUSED: Final[Mapping[str, str]] = {
    "hostaddr": "write the address in place of the host",
    "oauth_client_id": "log in with a password or a certificate",
    "oauth_client_secret": "log in with a password or a certificate",
    "oauth_issuer": "log in with a password or a certificate",
    "oauth_scope": "log in with a password or a certificate",
    "require_auth": "let the server's pg_hba.conf require a method",
    "requirepeer": "protect the folder of the socket instead",
    "scram_client_key": "log in with a password or a certificate",
    "scram_server_key": "log in with a password or a certificate",
    "sslcrldir": "name a single file with sslcrl",
    "sslkeylogfile": "set the environment variable SSLKEYLOGFILE",
}
"""Parameters of libpq that are not supported, and what to do instead."""

_FLAGS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("1", "on", "true", "yes", "no-verify"), "require"),
    **dict.fromkeys(("0", "false", "no", "off"), "disable"),
}
"""Values of ``ssl=`` besides the modes, by the mode that each stands for."""

_REFUSALS: Final = ("22023", "42501", "42601", "42602", "42704", "55P02")
"""SQLSTATEs of a setting that does not exist, cannot have the value, or may not be changed."""

_PARAMETER: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.$]*")
"""The names of settings of the server. Part of a password with a ``?`` seldom is one."""

_DEFAULT_PORT: Final = 5432
_MAX_PORT: Final = 65535


@frozen
class Server:
    """The server and the database that a URL names.

    Attributes:
        place: Hosts, ports and database, and the schema if the URL sets one; not the account.
        arguments: The arguments of ``asyncpg.connect``. There is a ``timeout`` among them only if
            the URL sets one.
        settings: Those of the URL's parameters that are settings of the server.
        prepared_statements: Whether statements stay prepared; None: the URL does not say.
    """

    place: str
    arguments: Mapping[str, Any] = field(repr=False)
    settings: frozenset[str] = frozenset()
    prepared_statements: bool | None = None


def parse_url(database_url: str) -> Server:
    """Return the server that a URL names.

    Raises:
        InvalidSettings: If the URL cannot be parsed, or a parameter is not supported.
    """
    authority, path, parameters = _split(database_url)
    account, _, addresses = authority.rpartition("@")
    user, _, password = map(unquote, account.partition(":"))
    hosts, ports = _hosts(parameters, addresses)
    database = unquote(path)
    for name in ("database", "dbname"):
        database = parameters.pop(name, "") or database
    arguments: dict[str, Any] = {
        "host": hosts or None,
        "port": ports or None,
        "user": parameters.pop("user", "") or user or None,
        "password": parameters.pop("password", "") or password or None,
        "passfile": parameters.pop("passfile", "") or None,
        "database": database or None,
        **_timeout(parameters),
        **_driver_parameters(parameters),
    }
    prepared_statements = _prepared_statements(parameters)
    fallback = parameters.pop("fallback_application_name", None)
    if fallback is not None:
        parameters.setdefault("application_name", fallback)
    _refuse(parameters)
    arguments["server_settings"] = parameters or None
    service = re.search(r"[?&]service=([^&]+)", arguments.get("dsn", ""))
    return Server(
        f"of the service {unquote(service[1])}"
        if service and not hosts
        else _place(hosts, ports, database or _default_database(arguments["user"]), parameters),
        arguments,
        frozenset(parameters),
        prepared_statements,
    )


def _split(database_url: str) -> tuple[str, str, dict[str, str]]:
    """Return the account and the addresses, the path, and the parameters, of which the last counts.

    Raises:
        InvalidSettings: If the parts cannot be told apart.
    """
    rest, _, query = database_url.partition("://")[2].partition("?")
    authority, _, path = rest.partition("/")
    if "#" in database_url or "@" in path or "/" in path or authority.count("@") > 1:
        raise _invalid("has an extra #, / or @: percent-encode such characters in the password")
    if "\x00" in unquote(database_url):
        raise _invalid("has a NUL character")
    try:
        database_url.encode()
    except UnicodeEncodeError:
        # Without its cause, which has the URL.
        raise _invalid("is not UTF-8") from None
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:
        raise _invalid("has a ? that no parameter follows: write %3F in a password") from None
    if not all(_PARAMETER.fullmatch(name) for name, _ in pairs):
        raise _invalid("has an extra ?, or a parameter without a name: write %3F in a password")
    parameters: dict[str, str] = {}
    for name, value in pairs:
        # SQLAlchemy repeats these for several hosts.
        several = name in ("host", "port") and name in parameters
        if value:
            parameters[name] = f"{parameters[name]},{value}" if several else value
    return authority, path, parameters


def _hosts(parameters: dict[str, str], addresses: str) -> tuple[list[str], list[int]]:
    """Return the hosts and their ports; both are empty if the URL leaves them to the environment.

    Raises:
        InvalidSettings: If an address cannot be parsed.
    """
    named = parameters.pop("host", "")
    if named:
        pairs = [_address(each, brackets=False) for each in named.split(",")]
    else:
        pairs = [_address(each, brackets=True) for each in addresses.split(",")]
        pairs = [(unquote(host), port) for host, port in pairs]
    hosts = [host for host, _ in pairs]
    ports = [port for _, port in pairs]
    numbers = parameters.pop("port", "")
    if numbers:
        ports = numbers.split(",")
        if len(ports) not in (1, len(hosts)):
            raise _invalid("must have one port, or as many as hosts")
        ports *= len(hosts) // len(ports)
    if len(hosts) > 1 and not all(hosts):
        raise _invalid("has an empty host")
    found = [_port(port) for port in ports] if any(ports) else []
    return [host for host in hosts if host], found


def _address(text: str, *, brackets: bool) -> tuple[str, str]:
    """Return a host or the folder of a socket, and a port or an empty text.

    Args:
        text: The address.
        brackets: Whether an IPv6 address must be in brackets.
    """
    if text.startswith("/") or (not brackets and text.count(":") > 1 and "[" not in text):
        return text, ""
    host, _, port = text.partition(":")
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]")
        if not bracket or port[:1] not in ("", ":"):
            raise _invalid("has an IPv6 address without its second bracket")
        port = port[1:]
    if ":" in port:
        raise _invalid("has an IPv6 address without brackets, or a second : after a host")
    return host, port


def _port(text: str) -> int:
    if not text:
        return _DEFAULT_PORT
    if not (text.isascii() and text.isdecimal() and 0 < int(text[:6]) <= _MAX_PORT):
        raise _invalid("has a port that is not a number from 1 to 65535")
    return int(text)


def _timeout(parameters: dict[str, str]) -> dict[str, float | None]:
    """Return the time limit for a new connection; as in libpq, zero is no limit."""
    text = parameters.pop("connect_timeout", "")
    if not text:
        return {}
    if not re.fullmatch(r"-?[0-9]{1,9}(\.[0-9]{1,9})?", text):
        raise _invalid("has a connect_timeout that is not a number of seconds")
    return {"timeout": float(text) if float(text) > 0 else None}


def _prepared_statements(parameters: dict[str, str]) -> bool | None:
    value = parameters.pop("prepared_statements", "auto")
    if value not in PREPARED_STATEMENTS:
        raise _invalid(
            f"has a prepared_statements that is none of: {', '.join(PREPARED_STATEMENTS)}"
        )
    return PREPARED_STATEMENTS[value]


def _driver_parameters(parameters: dict[str, str]) -> dict[str, Any]:
    """Return the parameters that asyncpg reads, as a URL and, for the system's certificates, TLS.

    Raises:
        InvalidSettings: If one of them has a value that it cannot have.
    """
    mode = _ssl_mode(parameters)
    if mode is not None:
        parameters["sslmode"] = mode
    target = parameters.get("target_session_attrs", "any")
    if target not in TARGETS:
        raise _invalid(f"has a target_session_attrs that is none of: {', '.join(TARGETS)}")
    passed = {name: parameters.pop(name) for name in PASSED_ON if name in parameters}
    system = passed.get("sslrootcert") == "system"
    for name in FILES:
        if name in passed and not (system and name == "sslrootcert") and not _exists(passed[name]):
            raise _invalid(f"names a file in {name} that does not exist")
    if not system:
        return {"dsn": f"postgresql://?{urlencode(passed, quote_via=quote)}"}
    if mode not in (None, "verify-full"):
        raise _invalid("has sslrootcert=system, which needs sslmode=verify-full")
    context = ssl.create_default_context()
    if "sslcert" in passed:
        try:
            key, secret = passed.get("sslkey"), passed.get("sslpassword", "")
            context.load_cert_chain(passed["sslcert"], key, secret)
        except OSError:
            raise _invalid("names a certificate in sslcert that cannot be used") from None
    others = {name: value for name, value in passed.items() if not name.startswith("ssl")}
    return {"dsn": f"postgresql://?{urlencode(others, quote_via=quote)}", "ssl": context}


def _exists(path: str) -> bool:
    return Path(path).is_file()


def _ssl_mode(parameters: dict[str, str]) -> str | None:
    """Return the mode by ``sslmode``, or by the names that it has elsewhere."""
    found = None
    for name in ("requiressl", "ssl", "sslmode"):
        given = parameters.pop(name, None)
        if given is None:
            continue
        found = _FLAGS.get(given.lower(), given.lower())
        if found not in SSL_MODES:
            raise _invalid(f"has a parameter {name} that is none of: {', '.join(SSL_MODES)}")
    return found


def _refuse(parameters: dict[str, str]) -> None:
    """Drop the parameters without a meaning.

    Raises:
        InvalidSettings: If one of the others is not supported.
    """
    for name in WITHOUT_MEANING:
        parameters.pop(name, None)
    for name, instead in REFUSED.items():
        if name in parameters:
            raise _invalid(f"has the parameter {name}, which is not supported: {instead}")
    for name, values in ONLY.items():
        if name in parameters and parameters.pop(name).lower() not in values:
            allowed = " or ".join(values)
            raise _invalid(f"has the parameter {name}, which can only be {allowed}")
    for name in parameters:
        # The server would report it only after a connection without TLS.
        if name.lower().startswith("ssl"):
            raise _invalid(f"has the unknown parameter {name}")


def refused_parameter(server: Server, error: BaseException) -> InvalidSettings | None:
    """Return the error for a setting that the server or a pooler refuses when it connects.

    Args:
        server: The server.
        error: The exception of asyncpg. None is returned if it has another cause.
    """
    if not isinstance(error, asyncpg.PostgresError):
        return None
    pooler = "unsupported startup parameter" in str(error)
    if not pooler and error.sqlstate not in _REFUSALS:
        return None
    words = set(re.findall(r"[\w.]+", str(error).lower()))
    named = [name for name in server.settings if name.lower() in words]
    name = next(iter(named), "options" if "options" in server.settings else None)
    if name is None:
        return None
    who = "the connection pooler" if pooler else "the server"
    return _invalid(f"has the parameter {name}, which {who} refuses")


def _place(
    hosts: Sequence[str], ports: Sequence[int], database: str | None, settings: Mapping[str, str]
) -> str:
    """Return the text that names a database in an error."""
    hosts = hosts or [environ.get("PGHOST") or "localhost"]
    numbers: list[object] = [*ports] or [environ.get("PGPORT") or _DEFAULT_PORT] * len(hosts)
    addresses = [
        f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        for host, port in zip(hosts, numbers, strict=False)
    ]
    schema = settings.get("search_path") or _search_path(settings.get("options", ""))
    where = f" (schema {schema})" if schema else ""
    return f"{','.join(addresses)}{f'/{database}' if database else ''}{where}"


def _search_path(options: str) -> str | None:
    """Return the schema that the options of a session set."""
    found = re.search(r"(?:-c\s*|--)search_path=((?:[^\s\\]|\\.)+)", options)
    return found and found[1].replace("\\", "")


def _default_database(user: str | None) -> str | None:
    """Return the database of a URL that names none."""
    name = environ.get("PGDATABASE") or user or environ.get("PGUSER")
    if name:
        return name
    try:
        return getuser()
    except (KeyError, OSError):
        return None


def place_of(url: URL) -> str | None:
    """Return the place of the database of a host's engine; None if it connects by a function."""
    if not (url.host or url.database or url.query):
        return None
    try:
        return parse_url(url.set(username=None, password=None).render_as_string()).place
    except InvalidSettings:
        return f"{url.host}:{url.port or _DEFAULT_PORT}/{url.database}"


def place_of_pool(pool: object) -> str | None:
    """Return the place of the database of a host's pool; None if the pool does not tell."""
    (dsn,) = getattr(pool, "_connect_args", None) or (None,)
    options: Mapping[str, Any] = getattr(pool, "_connect_kwargs", None) or {}
    try:
        server = parse_url(dsn if isinstance(dsn, str) else "postgresql://")
    except InvalidSettings:
        return None
    merged = {**server.arguments, **{name: given for name, given in options.items() if given}}
    hosts, ports = _listed(merged.get("host")), _listed(merged.get("port"))
    database = merged.get("database") or _default_database(merged.get("user"))
    return _place(hosts, ports * (len(hosts) if len(ports) == 1 else 1), database, {})


def place_of_connection(connection: object) -> str | None:
    """Return the place of the database of a host's connection; None if it does not tell."""
    address = getattr(connection, "_addr", None)
    database = getattr(getattr(connection, "_params", None), "database", None)
    if isinstance(address, tuple):
        host, port = address[:2]
        return _place([host], [port], database, {})
    return None if address is None else f"{address}/{database}"


def place_of_server(host: str, port: int, database: str) -> str:
    """Return the place of a database on a server.

    Args:
        host: The host, or the folder of the socket.
        port: The port.
        database: The name of the database.
    """
    return _place([host], [port], database, {})


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] if value else []


def _invalid(reason: str) -> InvalidSettings:
    return InvalidSettings("database_url", reason)

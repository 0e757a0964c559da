"""Settings: the servers that a client uses, read from the environment and a ``.env`` file."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import quote

from attrs import field, frozen

from incidentkit.domain.errors import InvalidSettings
from incidentkit.domain.transitions import Graph
from incidentkit.domain.values import (
    READERS_PER_TOKEN,
    REQUESTS_PER_TOKEN,
    SEARCHES_PER_TOKEN,
    STREAM_LIFETIME,
)
from incidentkit.env_file import EnvFile, read_env_file
from incidentkit.environment import VARIABLES, Environment, RequestLog, unknown_variables
from incidentkit.store.database import DEFAULT_DATABASE_URL, database_kind
from incidentkit.store.options import StoreOptions
from incidentkit.store.schema import check_schema

__all__ = ["PREFIXES", "Environment", "RequestLog", "Settings"]

logger = logging.getLogger("incidentkit")

PREFIXES: Final = ("INCIDENTKIT_", "POSTGRES_", "REDIS_", "DB_")
"""The prefixes of every variable."""


@frozen
class Settings:
    """The database and the cache of a client, and how it uses them.

    Attributes:
        database_url: The database of the incidents.
        redis_url: The Redis that caches lists; None: no Redis.
        redis_required: Whether a client refuses to open unless Redis answers.
        max_staleness: Seconds by which a list may lag behind a change by another process.
        transitions: For each status, the statuses that may follow it; None allows every change.
        request_log: Where the REST service records requests.
        stream_lifetime: Seconds after which the REST service ends a stream of changes.
        cors_origins: The origins of pages that may use the REST service in a browser.
        requests_per_token: Requests of one token that the REST service answers at a time.
        readers_per_token: Streams and waiting polls that one token may have.
        searches_per_token: Searches with ``text`` or ``total`` that it runs at a time.
        allow_anonymous: Whether the REST service answers requests without a token, wherever it
            listens.
        allowed_hosts: The hosts under which it is reached, besides those of loopback.
        trusted_proxies: The proxies whose ``X-Forwarded-For`` names the client.
        store: Sizes and time limits of the database.
        schema: The PostgreSQL schema that has the tables; None: the first one in the search path
            that has them.
    """

    database_url: str = field(default=DEFAULT_DATABASE_URL, repr=False)
    redis_url: str | None = field(default=None, repr=False)
    redis_required: bool = False
    max_staleness: float = 0.0
    transitions: Graph | None = None
    request_log: RequestLog = "log"
    stream_lifetime: int = STREAM_LIFETIME
    cors_origins: tuple[str, ...] = ()
    requests_per_token: int = REQUESTS_PER_TOKEN
    readers_per_token: int = READERS_PER_TOKEN
    searches_per_token: int = SEARCHES_PER_TOKEN
    allow_anonymous: bool = False
    allowed_hosts: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = ()
    store: StoreOptions = field(factory=StoreOptions)
    schema: str | None = None

    @classmethod
    def from_env(
        cls,
        env_file: str | os.PathLike[str] | None = ".env",
        *,
        overrides: Mapping[str, str] | None = None,
    ) -> Settings:
        """Read the environment of the process, and fill in missing variables from a file.

        The environment of the process is never changed. An unknown ``INCIDENTKIT_*`` variable,
        such as a misspelled one, is logged as a warning with the nearest name. A file that sets a
        variable is logged with level INFO.

        Args:
            env_file: A file of ``NAME=value`` lines in UTF-8, which may be missing; None: no file.
                It must belong to the user of the process or to root.
            overrides: Variables that win over both.

        Raises:
            InvalidSettings: With the variable and the rule that it breaks, or with the file.
        """
        variables = read_variables(env_file, overrides)
        if variables.file is not None:
            logger.info("Using settings from %s", variables.file)
        for name, fault in unknown_variables(variables.values).items():
            logger.warning("%s %s", name, fault)
        return cls.from_mapping(variables.values)

    @classmethod
    def from_mapping(cls, variables: Mapping[str, str | None]) -> Settings:
        """Read the variables from a mapping; an empty one counts as not set.

        Raises:
            InvalidSettings: With the variable and the rule that it breaks.
        """
        given = _given(variables)
        overruled = _overruled_prefixes(given)
        used = {name: value for name, value in given.items() if not name.startswith(overruled)}
        _check_encoding(used)
        environment = Environment.read(used)
        redis_url = environment.redis_url or _redis_url(environment)
        if environment.redis_required and redis_url is None:
            reason = "needs a Redis: set INCIDENTKIT_REDIS_URL or REDIS_HOST"
            raise InvalidSettings("INCIDENTKIT_REDIS_REQUIRED", reason)
        database_url = (
            environment.database_url or _postgres_url(environment) or DEFAULT_DATABASE_URL
        )
        if environment.schema is not None:
            _check_schema(environment.schema, database_url)
        return cls(
            database_url=database_url,
            redis_url=redis_url,
            redis_required=environment.redis_required,
            max_staleness=environment.max_staleness,
            transitions=environment.transitions,
            request_log=environment.request_log,
            stream_lifetime=environment.stream_lifetime,
            cors_origins=environment.cors_origins,
            requests_per_token=environment.requests_per_token,
            readers_per_token=environment.readers_per_token,
            searches_per_token=environment.searches_per_token,
            allow_anonymous=environment.allow_anonymous,
            allowed_hosts=environment.allowed_hosts or (),
            trusted_proxies=environment.trusted_proxies or (),
            store=StoreOptions(
                pool_size=environment.pool_size,
                max_overflow=environment.max_overflow,
                echo=environment.echo,
                prepared_statements=environment.prepared_statements,
            ),
            schema=environment.schema,
        )


@frozen
class Variables:
    """The variables of the process and of a file.

    Attributes:
        values: The value of each variable that is not empty.
        file: The file, if it sets one of incidentkit's variables; otherwise None.
    """

    values: dict[str, str] = field(repr=False)
    file: Path | None


def read_variables(
    env_file: str | os.PathLike[str] | None = ".env", overrides: Mapping[str, str] | None = None
) -> Variables:
    """Return the variables of the process and of a file that are not empty, and the overrides.

    Raises:
        InvalidSettings: If the file cannot be used, or a variable refers to another one.
    """
    stronger = {**_given(os.environ), **(overrides or {})}
    file = read_env_file(env_file) if env_file else None
    if file is None:
        return Variables(stronger, None)
    in_file = _given(file.values)
    used = [name for name in VARIABLES if name in in_file and name not in stronger]
    _check_references(file, used)
    return Variables({**in_file, **stronger}, file.path if used else None)


def _check_references(file: EnvFile, used: Sequence[str]) -> None:
    for name in used:
        if name in file.references:
            raise InvalidSettings(
                name,
                f"refers to a variable in {file.path}, and references such as ${{NAME}} are not "
                "replaced: write the value itself, in single quotes if it contains ${",
            )


def names_database(variables: Mapping[str, str]) -> bool:
    """Return whether the variables name a database; otherwise it is the default one."""
    return any(
        name in variables
        for name in VARIABLES
        if name == "INCIDENTKIT_DATABASE_URL" or name.startswith("POSTGRES_")
    )


def _given(variables: Mapping[str, str | None]) -> dict[str, str]:
    """Return the variables without those that are empty, which count as not set."""
    return {name: value for name, value in variables.items() if value and value.strip()}


def _overruled_prefixes(given: Mapping[str, str]) -> tuple[str, ...]:
    """Return the prefixes of the variables that are ignored because another one is set.

    Their values are not checked: in a pod beside a service named ``postgres`` or ``redis``,
    Kubernetes sets ``POSTGRES_PORT`` or ``REDIS_PORT`` to a URL.
    """
    prefixes: list[str] = []
    if "INCIDENTKIT_DATABASE_URL" in given:
        prefixes.append("POSTGRES_")
    if "INCIDENTKIT_REDIS_URL" in given or "REDIS_HOST" not in given:
        prefixes.append("REDIS_")
    return tuple(prefixes)


def _check_encoding(given: Mapping[str, str]) -> None:
    """Raise InvalidSettings if one of incidentkit's variables is not UTF-8."""
    for name, value in given.items():
        if not name.startswith(PREFIXES):
            continue
        try:
            value.encode()
        except UnicodeEncodeError:
            # Without its cause, which shows the value.
            raise InvalidSettings(name, "is not UTF-8") from None


def _check_schema(schema: str, database_url: str) -> None:
    """Raise InvalidSettings, with the variable, if the database cannot have the schema."""
    try:
        check_schema(schema, database_kind(database_url))
    except InvalidSettings as error:
        raise InvalidSettings("INCIDENTKIT_SCHEMA", error.reason) from None


def _postgres_url(environment: Environment) -> str | None:
    """Return the URL that the POSTGRES_* variables make up; None if none of them is set."""
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

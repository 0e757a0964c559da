"""Settings from the environment and from a `.env` file."""

from __future__ import annotations

import os
import pickle
import traceback
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import asyncpg
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from incidentkit import IncidentClient, InvalidSettings
from incidentkit.environment import unknown_variables
from incidentkit.settings import Settings
from incidentkit.store.database import DEFAULT_DATABASE_URL
from incidentkit.store.options import StoreOptions
from incidentkit.store.postgresql.url import parse_url
from tests.strategies import characters

if TYPE_CHECKING:
    from collections.abc import Mapping

VARIABLES = [
    "INCIDENTKIT_DATABASE_URL",
    "INCIDENTKIT_REDIS_URL",
    "INCIDENTKIT_REDIS_REQUIRED",
    "INCIDENTKIT_REQUEST_LOG",
    "INCIDENTKIT_CORS_ORIGINS",
    "INCIDENTKIT_PREPARED_STATEMENTS",
    "POSTGRES_HOST",
    "POSTGRES_PORT",
    "POSTGRES_DB",
    "POSTGRES_USER",
    "POSTGRES_PASSWORD",
    "REDIS_HOST",
    "REDIS_PORT",
    "REDIS_DB",
    "DB_POOL_SIZE",
    "DB_MAX_OVERFLOW",
    "DB_ECHO",
]

SQLITE = "sqlite+aiosqlite:///incidentkit.db"

# An environment variable holds no NUL, and blanks around a name are ignored.
values = st.text(characters, min_size=1, max_size=30).filter(str.strip)
names = values.map(str.strip)


def database_url(**variables: str) -> str:
    """Return the database URL that the variables select."""
    return Settings.from_mapping(variables).database_url


def redis_url(**variables: str) -> str | None:
    """Return the Redis URL that the variables select."""
    return Settings.from_mapping(variables).redis_url


def fault(variables: Mapping[str, str]) -> InvalidSettings:
    """Return the error that the variables raise."""
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_mapping(variables)
    return caught.value


# Defaults


def test_without_configuration_there_is_an_sqlite_file_and_no_redis() -> None:
    """The defaults are a file in the working folder, no Redis and a pool of 5 + 10 connections."""
    settings = Settings.from_env()
    assert settings == Settings.from_mapping({}) == Settings()
    assert settings.database_url == SQLITE
    assert settings.redis_url is None
    assert settings.redis_required is False
    assert settings.request_log == "log"
    assert settings.store == StoreOptions(pool_size=5, max_overflow=10, echo=False)


@pytest.mark.parametrize("empty", ["", " ", "\t\n"])
@pytest.mark.parametrize("name", VARIABLES)
def test_empty_variable_counts_as_not_set(name: str, empty: str) -> None:
    """An empty variable, as left by Compose files, counts as not set."""
    assert Settings.from_mapping({name: empty}) == Settings()


def test_other_variables_mean_nothing() -> None:
    """Variables with other names or in other spellings are ignored."""
    variables = {"DATABASE_URL": "postgresql://other", "postgres_host": "db", "REDIS_URL": "x"}
    assert Settings.from_mapping(variables) == Settings()


# The database


@pytest.mark.parametrize(
    ("variables", "url"),
    [
        ({"POSTGRES_HOST": "db"}, "postgresql://postgres@db:5432/postgres"),
        ({"POSTGRES_PORT": "5433"}, "postgresql://postgres@localhost:5433/postgres"),
        ({"POSTGRES_DB": "incidents"}, "postgresql://postgres@localhost:5432/incidents"),
        ({"POSTGRES_USER": "ann"}, "postgresql://ann@localhost:5432/ann"),
        ({"POSTGRES_PASSWORD": "pw"}, "postgresql://postgres:pw@localhost:5432/postgres"),
        (
            {
                "POSTGRES_HOST": "db",
                "POSTGRES_PORT": "6432",
                "POSTGRES_DB": "incidents",
                "POSTGRES_USER": "ann",
                "POSTGRES_PASSWORD": "pw",
            },
            "postgresql://ann:pw@db:6432/incidents",
        ),
        ({"POSTGRES_HOST": "::1"}, "postgresql://postgres@[::1]:5432/postgres"),
        ({"POSTGRES_HOST": "2001:db8::7"}, "postgresql://postgres@[2001:db8::7]:5432/postgres"),
        ({"POSTGRES_HOST": "[::1]"}, "postgresql://postgres@[::1]:5432/postgres"),
        ({"POSTGRES_HOST": "fe80::1%eth0"}, "postgresql://postgres@[fe80::1%25eth0]:5432/postgres"),
        ({"POSTGRES_HOST": " db "}, "postgresql://postgres@db:5432/postgres"),
        ({"POSTGRES_HOST": "my_db.a-b.C9"}, "postgresql://postgres@my_db.a-b.C9:5432/postgres"),
        (
            {"POSTGRES_HOST": "/var/run/postgresql", "POSTGRES_PASSWORD": "p/w"},
            "postgresql://postgres:p%2Fw@/postgres?host=/var/run/postgresql&port=5432",
        ),
        (
            {"POSTGRES_HOST": "/run/a&ssl=b c", "POSTGRES_PORT": "6432", "POSTGRES_DB": "x"},
            "postgresql://postgres@/x?host=/run/a%26ssl%3Db%20c&port=6432",
        ),
    ],
)
def test_any_of_the_origins_variables_means_postgresql(variables: dict[str, str], url: str) -> None:
    """One POSTGRES_* variable is enough; the others default to libpq's values."""
    assert database_url(**variables) == url


@pytest.mark.parametrize(
    ("host", "reached"),
    [
        ("db", ("db", 6432)),
        ("fe80::1%eth0", ("fe80::1%eth0", 6432)),
        ("/run/a&ssl=b c", "/run/a&ssl=b c/.s.PGSQL.6432"),
    ],
)
async def test_driver_reaches_the_host(
    host: str, reached: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host name, an address and a socket's folder reach asyncpg unchanged."""
    tried: list[object] = []

    async def connect(*, addr: object, **_: object) -> None:
        tried.append(addr)
        raise ConnectionRefusedError

    monkeypatch.setattr("asyncpg.connect_utils._connect_addr", connect)
    url = database_url(POSTGRES_HOST=host, POSTGRES_PORT="6432", POSTGRES_DB="x")
    with pytest.raises(ConnectionRefusedError):
        await asyncpg.connect(**parse_url(url).arguments)
    assert tried[0] == reached


@given(user=names, password=values, database=names)
@example(user="o'hara@corp", password="p@ss:w/rd?#%20[&]", database="a/b?c#d%41")
@example(user="a:b/c?d#e", password=" leading and trailing ", database="инциденты")
@example(user="u", password="%", database="..")
def test_odd_names_and_passwords_reach_the_server_unaltered(
    user: str, password: str, database: str
) -> None:
    """Names and passwords with any characters survive the URL unchanged."""
    url = database_url(
        POSTGRES_HOST="db",
        POSTGRES_USER=user,
        POSTGRES_PASSWORD=password,
        POSTGRES_DB=database,
    )
    assert url.isascii()
    assert url.isprintable()
    parts = urlsplit(url)
    assert (parts.scheme, parts.hostname, parts.port) == ("postgresql", "db", 5432)
    assert (parts.query, parts.fragment) == ("", "")
    assert unquote(parts.username or "") == user
    assert unquote(parts.password or "") == password
    assert unquote(parts.path[1:]) == database


@pytest.mark.parametrize("url", ["postgresql://ann@db/incidents", "sqlite+aiosqlite:///:memory:"])
def test_own_database_variable_wins_over_the_origins(url: str) -> None:
    """INCIDENTKIT_DATABASE_URL overrules every POSTGRES_* variable."""
    assert database_url(INCIDENTKIT_DATABASE_URL=url, POSTGRES_HOST="db", POSTGRES_DB="x") == url


@pytest.mark.parametrize(
    ("variables", "options"),
    [
        ({"DB_POOL_SIZE": "1"}, StoreOptions(pool_size=1)),
        ({"DB_POOL_SIZE": "10000"}, StoreOptions(pool_size=10_000)),
        ({"DB_MAX_OVERFLOW": "0"}, StoreOptions(max_overflow=0)),
        ({"DB_MAX_OVERFLOW": " 25 "}, StoreOptions(max_overflow=25)),
        *(
            ({"DB_ECHO": text}, StoreOptions(echo=echo))
            for echo, texts in {
                True: ["1", "true", "True", "YES", " on "],
                False: ["0", "false", "FALSE", "no", "Off"],
            }.items()
            for text in texts
        ),
    ],
)
def test_pool_and_echo_are_the_origins(variables: dict[str, str], options: StoreOptions) -> None:
    """DB_POOL_SIZE and DB_MAX_OVERFLOW set the size of the pool, DB_ECHO its log."""
    assert Settings.from_mapping(variables).store == options


# Redis


@pytest.mark.parametrize(
    ("variables", "url"),
    [
        ({"REDIS_HOST": "cache"}, "redis://cache:6379/0"),
        ({"REDIS_HOST": "cache", "REDIS_PORT": "6380"}, "redis://cache:6380/0"),
        ({"REDIS_HOST": "cache", "REDIS_PORT": "6380", "REDIS_DB": "3"}, "redis://cache:6380/3"),
        ({"REDIS_HOST": "::1", "REDIS_DB": "15"}, "redis://[::1]:6379/15"),
        ({"REDIS_HOST": "[fe80::1%eth0]"}, "redis://[fe80::1%25eth0]:6379/0"),
        ({"REDIS_PORT": "6380"}, None),
        ({"REDIS_DB": "3"}, None),
        ({"REDIS_PORT": "6380", "REDIS_DB": "3"}, None),
    ],
)
def test_host_alone_means_redis(variables: dict[str, str], url: str | None) -> None:
    """REDIS_HOST selects Redis; REDIS_PORT and REDIS_DB alone do not."""
    assert redis_url(**variables) == url
    assert database_url(**variables) == SQLITE


def test_own_redis_variable_wins_over_the_origins() -> None:
    """INCIDENTKIT_REDIS_URL overrules every REDIS_* variable."""
    url = "rediss://:pw@cache:6390/2"
    assert redis_url(INCIDENTKIT_REDIS_URL=url, REDIS_HOST="other", REDIS_DB="1") == url


@pytest.mark.parametrize(
    "url",
    [
        "redis://cache:6379/abc",
        "redis://cache/1/2",
        "redis://:hunter2/x@127.0.0.1/0",
        "redis://:2/hunter2@127.0.0.1/0",
        "redis://:hunter#2@cache/0",
        "redis://cache/0?hunter2=x",
        "redis://cache/0?hunter2=",
        "redis://cache/0?db=hunter2",
        "redis://cache/0?protocol=9",
        "rediss://cache/0?ssl_cert_reqs=hunter2",
        "redis://cache:99999/0",
        "redis://[::1/0",
        "unix://",
    ],
)
def test_redis_url_of_which_a_part_means_nothing_is_refused(url: str) -> None:
    """A URL that redis-py would ignore in part, or reject on first use, is refused on opening."""
    with pytest.raises(InvalidSettings) as caught:
        IncidentClient.open(SQLITE, url)
    assert caught.value.name == "redis_url"
    assert "hunter" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    "url",
    [
        "redis://cache",
        "redis://cache/",
        "redis://ann:p%2F%23@cache:6390/15?socket_timeout=1",
        "rediss://cache/0?ssl_cert_reqs=none&ssl_ca_certs=/etc/ca.pem",
        "redis://cache?db=3&client_name=x",
        "unix:///run/redis.sock?db=1",
    ],
)
def test_redis_url_may_have_any_part_of_redis_pys(url: str) -> None:
    """A URL may have a user, password, database, TLS, socket and redis-py's parameters."""
    assert IncidentClient.open(SQLITE, url)._cache is not None


@pytest.mark.parametrize(("text", "required"), [("1", True), ("true", True), ("0", False)])
def test_redis_may_be_required(text: str, *, required: bool) -> None:
    """INCIDENTKIT_REDIS_REQUIRED decides whether a client opens without Redis."""
    variables = {"INCIDENTKIT_REDIS_REQUIRED": text, "REDIS_HOST": "cache"}
    assert Settings.from_mapping(variables).redis_required is required


def test_redis_that_is_required_has_to_be_named() -> None:
    """INCIDENTKIT_REDIS_REQUIRED without a Redis is refused."""
    variables = {"INCIDENTKIT_REDIS_REQUIRED": "1", "REDIS_PORT": "6379"}
    error = fault(variables)
    assert error.name == "INCIDENTKIT_REDIS_REQUIRED"
    assert error.reason == "needs a Redis: set INCIDENTKIT_REDIS_URL or REDIS_HOST"
    assert redis_url(**variables, INCIDENTKIT_REDIS_URL="redis://x/0") == "redis://x/0"
    assert redis_url(REDIS_PORT="6379", INCIDENTKIT_REDIS_REQUIRED="0") is None


@pytest.mark.parametrize(("value", "expected"), [("auto", None), ("on", True), ("off", False)])
def test_prepared_statements_are_on_off_or_found_out(value: str, expected: bool | None) -> None:
    """INCIDENTKIT_PREPARED_STATEMENTS is `auto`, `on` or `off`."""
    settings = Settings.from_mapping({"INCIDENTKIT_PREPARED_STATEMENTS": value})
    assert settings.store.prepared_statements is expected


def test_streams_have_a_lifetime() -> None:
    """INCIDENTKIT_STREAM_LIFETIME is a number of seconds, an hour by default."""
    assert Settings.from_mapping({}).stream_lifetime == 3600
    settings = Settings.from_mapping({"INCIDENTKIT_STREAM_LIFETIME": "10"})
    assert settings.stream_lifetime == 10


@pytest.mark.parametrize("place", ["log", "database"])
def test_request_log_has_two_places(place: str) -> None:
    """INCIDENTKIT_REQUEST_LOG is `log` or `database`."""
    settings = Settings.from_mapping({"INCIDENTKIT_REQUEST_LOG": place})
    assert settings.request_log == place


# Faults

PORT = "must be an integer from 1 to 65535"
HOST = "must be a host name or an IP address"
URL = "must start with postgresql:// or sqlite+aiosqlite:///"
REDIS_URL = (
    "must start with redis://, redis+cluster:// or redis+sentinel://, with rediss for TLS, "
    "or unix://"
)
FLAG = "must be true or false"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        *(
            (name, value, PORT)
            for name in ("POSTGRES_PORT", "REDIS_PORT")
            for value in ("0", "65536", "-5432", "+5432", "5432.0", "5_432", "٥٤٣٢", "9" * 5000)
        ),
        *(
            (name, value, HOST + also)
            for name, also in (
                ("POSTGRES_HOST", ", or the absolute path of a socket's folder"),
                ("REDIS_HOST", ""),
            )
            for value in (
                *("db/x", "user@db", "db:5432", "db?x", "db#x", "a b", "db,other", "d\u00e4", "%"),
                *("[db]", "[::1", "::1]", "::1%", "::1%a/b", "[::1]:5432", "1::2::3", "./run"),
            )
        ),
        ("POSTGRES_HOST", "/a,/b", f"{HOST}, or the absolute path of a socket's folder"),
        ("POSTGRES_HOST", "/a\nb", f"{HOST}, or the absolute path of a socket's folder"),
        ("REDIS_HOST", "/run/redis.sock", HOST),
        *(("INCIDENTKIT_DATABASE_URL", value, URL) for value in ("mysql://x", "x", "sqlite:x")),
        *(("INCIDENTKIT_REDIS_URL", value, REDIS_URL) for value in ("http://x", "redis", "//x")),
        ("REDIS_DB", "-1", "must be an integer from 0 to 1000000"),
        ("REDIS_DB", "main", "must be an integer from 0 to 1000000"),
        ("DB_POOL_SIZE", "0", "must be an integer from 1 to 10000"),
        ("DB_POOL_SIZE", "10001", "must be an integer from 1 to 10000"),
        ("DB_POOL_SIZE", "five", "must be an integer from 1 to 10000"),
        ("DB_MAX_OVERFLOW", "-7", "must be an integer from 0 to 10000"),
        ("DB_MAX_OVERFLOW", "1e2", "must be an integer from 0 to 10000"),
        ("DB_ECHO", "maybe", FLAG),
        ("DB_ECHO", "2", FLAG),
        ("INCIDENTKIT_REDIS_REQUIRED", "please", FLAG),
        ("INCIDENTKIT_REQUEST_LOG", "syslog", "must be one of: log, database"),
        *(
            (
                "INCIDENTKIT_CORS_ORIGINS",
                value,
                "must be origins such as https://board.example.com, or *",
            )
            for value in ("board.example.com", "https://a.example.com,", "https://a.example.com/")
        ),
        ("INCIDENTKIT_REQUEST_LOG", "LOG", "must be one of: log, database"),
        ("INCIDENTKIT_STREAM_LIFETIME", "9", "must be an integer from 10 to 86400"),
        ("INCIDENTKIT_PREPARED_STATEMENTS", "true", "must be one of: auto, on, off"),
    ],
)
def test_fault_names_the_variable_and_its_rule(name: str, value: str, reason: str) -> None:
    """An error names the variable and the rule that its value breaks."""
    error = fault({"REDIS_HOST": "cache", name: value})
    assert (error.name, error.reason) == (name, reason)
    assert str(error) == f"{name} {reason}"


# A value in the wrong variable may be a password.
SECRET = "hunter2-Zürich"


@pytest.mark.parametrize(
    "name",
    [
        "INCIDENTKIT_DATABASE_URL",
        "INCIDENTKIT_REDIS_URL",
        "POSTGRES_HOST",
        "REDIS_HOST",
        "POSTGRES_PORT",
        "REDIS_PORT",
        "REDIS_DB",
        "DB_POOL_SIZE",
        "DB_MAX_OVERFLOW",
        "DB_ECHO",
        "INCIDENTKIT_REDIS_REQUIRED",
        "INCIDENTKIT_REQUEST_LOG",
    ],
)
def test_fault_never_repeats_the_value(name: str) -> None:
    """Neither the error nor its traceback shows the value."""
    error = fault({"REDIS_HOST": "cache", "POSTGRES_PASSWORD": SECRET, name: SECRET})
    assert error.name == name
    shown = f"{error}{error!r}{''.join(traceback.format_exception(error))}"
    assert "hunter2" not in shown.lower()


@pytest.mark.parametrize("name", ["INCIDENTKIT_DATABASE_URL", "INCIDENTKIT_REDIS_URL"])
def test_url_of_another_kind_is_refused_without_showing_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error for an unsupported URL does not show its credentials."""
    monkeypatch.setenv(name, f"mysql://ann:{SECRET}@db/incidents")
    with pytest.raises(InvalidSettings, match=rf"^{name} must start with .*://") as caught:
        IncidentClient.from_env()
    shown = f"{caught.value!r}{''.join(traceback.format_exception(caught.value))}"
    assert "hunter2" not in shown


@pytest.mark.parametrize(
    "variables",
    [
        {"POSTGRES_HOST": "db", "POSTGRES_PASSWORD": SECRET},
        {"INCIDENTKIT_DATABASE_URL": f"postgresql://ann:{SECRET}@db/incidents"},
        {"INCIDENTKIT_REDIS_URL": f"redis://:{SECRET}@cache/0"},
    ],
)
def test_settings_can_be_logged(variables: dict[str, str]) -> None:
    """The repr of the settings shows no URL, and so no password."""
    settings = Settings.from_mapping(variables)
    assert "hunter2" not in f"{settings!r}{settings}"
    assert "://" not in repr(settings)


def test_settings_can_be_pickled() -> None:
    """Pickled settings, as sent to the workers of the service, keep every value."""
    settings = Settings.from_mapping(
        {
            "INCIDENTKIT_DATABASE_URL": "postgresql://ann:pw@db/incidents",
            "INCIDENTKIT_REDIS_URL": "redis://:pw@cache/0",
            "INCIDENTKIT_REDIS_REQUIRED": "1",
            "INCIDENTKIT_MAX_STALENESS": "0.5",
            "INCIDENTKIT_TRANSITIONS": "new:completed,new:failed",
            "INCIDENTKIT_REQUEST_LOG": "database",
            "INCIDENTKIT_CORS_ORIGINS": "https://Board.example.com:443, http://localhost:3000",
            "DB_POOL_SIZE": "7",
        }
    )
    assert settings != Settings()
    assert settings.cors_origins == ("https://board.example.com", "http://localhost:3000")
    assert pickle.loads(pickle.dumps(settings)) == settings


# Unknown variables


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("INCIDENTKIT_DATABSE_URL", "is unknown: did you mean INCIDENTKIT_DATABASE_URL?"),
        ("INCIDENTKIT_REDIS_REQURED", "is unknown: did you mean INCIDENTKIT_REDIS_REQUIRED?"),
        ("INCIDENTKIT_MAX_OVERFLOW", "is unknown: did you mean DB_MAX_OVERFLOW?"),
        ("INCIDENTKIT_PORTAL", "is unknown: unset it"),
        ("INCIDENTKIT_DB_PORT_5432_TCP", "is unknown: unset it"),
    ],
)
def test_an_unknown_variable_has_a_nearest_name(name: str, fault: str) -> None:
    """A misspelled INCIDENTKIT_* variable is unknown, and the nearest known one is named."""
    assert unknown_variables([name, "INCIDENTKIT_REDIS_URL", "PATH"]) == {name: fault}


@pytest.mark.parametrize("service", ["INCIDENTKIT", "INCIDENTKIT_DB", "INCIDENTKIT_WEB_API"])
def test_what_kubernetes_sets_is_not_meant(service: str) -> None:
    """What Kubernetes sets for a service named like incidentkit is not taken for a setting."""
    injected = [
        f"{service}_{part}"
        for part in (
            *("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_8000_TCP"),
            *(f"PORT_8000_TCP_{part}" for part in ("PROTO", "PORT", "ADDR")),
        )
    ]
    assert unknown_variables(injected) == {}
    misspelled = "INCIDENTKIT_REDIS_URI"
    assert unknown_variables([*injected, misspelled]).keys() == {misspelled}


def test_known_variables_are_known() -> None:
    """Neither incidentkit's own variables nor those of its tests or of others are unknown."""
    own = {*VARIABLES, "INCIDENTKIT_MAX_STALENESS", "INCIDENTKIT_TRANSITIONS"}
    others = {"INCIDENTKIT_TEST_POSTGRES_URL", "DB_POOLSIZE", "REDIS_URL", "_INCIDENTKIT_COMPLETE"}
    assert unknown_variables(own | others) == {}


@pytest.mark.parametrize("place", ["process", "file"])
def test_from_env_logs_a_warning_for_an_unknown_variable(
    place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A client opens with a misspelled variable, and the log says what it may have meant."""
    if place == "process":
        monkeypatch.setenv("INCIDENTKIT_DATABSE_URL", SECRET)
    else:
        Path(".env").write_text(f"INCIDENTKIT_DATABSE_URL={SECRET}\n", "utf-8")
    assert IncidentClient.from_env().connected is False
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("incidentkit", "WARNING")
    assert record.getMessage() == (
        "INCIDENTKIT_DATABSE_URL is unknown: did you mean INCIDENTKIT_DATABASE_URL?"
    )


def test_an_empty_unknown_variable_counts_as_not_set(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An empty variable, as left by Compose files, is not reported."""
    monkeypatch.setenv("INCIDENTKIT_DATABSE_URL", " ")
    Settings.from_env()
    assert caplog.records == []


# The process's environment and the file


def test_file_is_read_from_the_working_folder() -> None:
    """A `.env` file in the working folder is read by default."""
    Path(".env").write_text(
        "# the origin's file\n"
        "POSTGRES_DB=incidents\n"
        "POSTGRES_USER='ann'\n"
        'export POSTGRES_PASSWORD="p#ss w=rd"\n'
        "POSTGRES_HOST=db  # beside us\n"
        "POSTGRES_PORT=\n"
        "REDIS_HOST=cache\n"
        "DB_POOL_SIZE=7\n"
        "DB_ECHO=True\n",
        encoding="utf-8",
    )
    assert Settings.from_env() == Settings(
        database_url="postgresql://ann:p%23ss%20w%3Drd@db:5432/incidents",
        redis_url="redis://cache:6379/0",
        store=StoreOptions(pool_size=7, echo=True),
    )


def test_process_wins_over_the_file_variable_by_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable of the process overrides the one in the file; other variables stay."""
    Path(".env").write_text("POSTGRES_HOST=file\nPOSTGRES_DB=file\nDB_POOL_SIZE=7\n", "utf-8")
    monkeypatch.setenv("POSTGRES_HOST", "process")
    assert Settings.from_env() == Settings(
        database_url="postgresql://postgres@process:5432/file",
        store=StoreOptions(pool_size=7),
    )


@pytest.mark.parametrize("empty", ["", " \t"])
def test_empty_variable_of_the_process_leaves_the_files(
    empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty variable of the process does not override the one in the file."""
    Path(".env").write_text("POSTGRES_HOST=file\n", "utf-8")
    monkeypatch.setenv("POSTGRES_HOST", empty)
    assert Settings.from_env().database_url == "postgresql://postgres@file:5432/postgres"


def test_overrides_win_over_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """An override replaces a variable of the process and of the file, even an invalid one."""
    Path(".env").write_text("INCIDENTKIT_DATABASE_URL=mysql://file\nREDIS_HOST=file\n", "utf-8")
    monkeypatch.setenv("INCIDENTKIT_REDIS_URL", "http://process")
    monkeypatch.setenv("INCIDENTKIT_REDIS_REQUIRED", "1")
    urls = {"INCIDENTKIT_DATABASE_URL": "sqlite:///x", "INCIDENTKIT_REDIS_URL": "redis://x"}
    settings = Settings.from_env(overrides=urls)
    assert (settings.database_url, settings.redis_url) == ("sqlite:///x", "redis://x")


def test_own_variable_in_the_file_wins_over_the_origins_in_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """INCIDENTKIT_DATABASE_URL in the file overrules POSTGRES_* in the process."""
    Path(".env").write_text("INCIDENTKIT_DATABASE_URL=postgresql://own/db\n", "utf-8")
    monkeypatch.setenv("POSTGRES_HOST", "origin")
    assert Settings.from_env().database_url == "postgresql://own/db"


@pytest.mark.parametrize("as_path", [str, Path])
def test_file_may_be_elsewhere(
    as_path: type[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A given file is read instead of the one in the working folder."""
    monkeypatch.chdir(tmp_path)
    Path(".env").write_text("POSTGRES_HOST=here\n", "utf-8")
    other = tmp_path / "conf" / "service.env"
    other.parent.mkdir()
    other.write_text("REDIS_HOST=there\n", "utf-8")
    assert Settings.from_env(as_path(other)) == Settings(redis_url="redis://there:6379/0")


def test_file_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """With None for the file, only the environment of the process is read."""
    Path(".env").write_text("POSTGRES_HOST=file\nREDIS_HOST=file\n", "utf-8")
    monkeypatch.setenv("REDIS_HOST", "process")
    assert Settings.from_env(None) == Settings(redis_url="redis://process:6379/0")


def test_missing_file_is_no_fault(tmp_path: Path) -> None:
    """A missing file, or a folder of that name, counts as an empty file."""
    assert Settings.from_env("nowhere/.env") == Settings()
    Path(".env").mkdir()
    assert Settings.from_env() == Settings()
    assert Settings.from_env(tmp_path) == Settings()


def test_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """The error for a file that is not UTF-8 names it, and shows no content."""
    Path(".env").write_bytes(b"POSTGRES_PASSWORD=hunter2\xff\n")
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_env()
    assert str(caught.value) == ".env cannot be read: it is not UTF-8"
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__context__ is None
    other = tmp_path / "other.env"
    other.write_bytes(b"\xff")
    with pytest.raises(InvalidSettings, match=r"other\.env cannot be read"):
        Settings.from_env(other)


def test_file_that_may_not_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error for an unreadable file gives its name and the system's reason."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "secret/.env")

    Path(".env").touch()
    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_env()
    assert str(caught.value) == ".env cannot be read: Permission denied"


@pytest.mark.parametrize(
    ("line", "password"),
    [
        ("'${HOME}'", "${HOME}"),
        ("'it\\'s ${HOME:-x} # here'  # a comment", "it's ${HOME:-x} # here"),
        ("$HOME", "$HOME"),
        ('"$HOME"', "$HOME"),
        ("a${b", "a${b"),
        ("$(whoami)", "$(whoami)"),
        ('"a\\nb"', "a\nb"),
        ("'a\\nb'", "a\\nb"),
    ],
)
def test_nothing_in_the_file_is_replaced(line: str, password: str) -> None:
    """Single quotes are literal, double quotes have escapes, and no variable is looked up."""
    Path(".env").write_text(f"POSTGRES_PASSWORD={line}\n", "utf-8")
    assert Settings.from_env() == Settings.from_mapping({"POSTGRES_PASSWORD": password})


@pytest.mark.parametrize("value", ["${SECRET}", "a${SECRET:-b}c", '"${SECRET}"', "x'${SECRET}'"])
@pytest.mark.parametrize("name", ["POSTGRES_PASSWORD", "INCIDENTKIT_DATABASE_URL"])
def test_a_reference_in_the_file_is_refused(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error for a reference outside single quotes names the variable, and shows no value."""
    monkeypatch.setenv("SECRET", "hunter2")
    Path(".env").write_text(f"OTHER=${{SECRET}}\nexport {name}={value}\n", "utf-8")
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_env()
    assert caught.value.name == name
    assert str(Path(".env").absolute()) in str(caught.value)
    assert "SECRET" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_reference_that_is_not_used_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference of another program, or in a value that is overridden, is not judged."""
    Path(".env").write_text(
        "SHOP_URL=${HOST}\nPOSTGRES_USER=${HOST}\nPOSTGRES_DB=${HOST}\nPOSTGRES_DB=shop\n", "utf-8"
    )
    monkeypatch.setenv("POSTGRES_USER", "ann")
    assert Settings.from_env().database_url == "postgresql://ann@localhost:5432/shop"


def belongs_to_another(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a file to another user; if only root may, make the process one of another user."""
    if os.geteuid() == 0:
        os.chown(path, 4711, -1, follow_symlinks=False)
    else:
        monkeypatch.setattr("os.geteuid", lambda: 4711)


def test_a_file_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of another user is an error that names it, whatever it sets; one of root's is not."""
    file = Path(".env")
    file.write_text("OTHER=1\n", "utf-8")
    belongs_to_another(file, monkeypatch)
    with pytest.raises(InvalidSettings, match=r"^\.env belongs to another user \(uid \d+\): "):
        Settings.from_env()
    assert Settings.from_env(None) == Settings()


def test_a_link_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's symbolic link to a file of one's own is refused; one's own is followed."""
    own = tmp_path / "own.env"
    own.write_text("REDIS_HOST=here\n", "utf-8")
    Path(".env").symlink_to(own)
    assert Settings.from_env().redis_url == "redis://here:6379/0"
    belongs_to_another(Path(".env"), monkeypatch)
    with pytest.raises(InvalidSettings, match="belongs to another user"):
        Settings.from_env()


def test_a_file_of_root_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user reads a file of root's, as in a container."""
    Path(".env").write_text("REDIS_HOST=here\n", "utf-8")
    real = Path(".env").stat()
    status = os.stat_result((0o100644, *real[1:4], 0, 0, *real[6:]))
    monkeypatch.setattr("os.fstat", lambda _: status)
    monkeypatch.setattr("os.lstat", lambda _: status)
    monkeypatch.setattr("os.geteuid", lambda: 4711)
    assert Settings.from_env().redis_url == "redis://here:6379/0"


@pytest.mark.parametrize(
    ("mode", "own_group", "warned"),
    [(0o600, True, False), (0o664, True, False), (0o664, False, True), (0o646, True, True)],
)
def test_a_file_that_others_can_write_is_logged(
    mode: int,
    own_group: bool,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A warning names a file that all users, or members of another group, can write."""
    file = Path(".env")
    file.write_text("REDIS_HOST=here\n", "utf-8")
    file.chmod(mode)
    if not own_group:
        monkeypatch.setattr("os.getegid", lambda: 4711)
    assert Settings.from_env().redis_url == "redis://here:6379/0"
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [".env can be written by other users: run chmod go-w .env"] * warned


def test_the_file_that_is_used_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log names, with level INFO, a file that sets a variable, and no other file."""
    caplog.set_level("INFO", "incidentkit")
    file = Path(".env")
    Settings.from_env()
    file.write_text("SHOP=1\nREDIS_PORT=\n", "utf-8")
    Settings.from_env()
    file.write_text("REDIS_HOST=here\n", "utf-8")
    with monkeypatch.context() as context:
        context.setenv("REDIS_HOST", "process")
        Settings.from_env()
    assert caplog.records == []
    Settings.from_env()
    assert [record.getMessage() for record in caplog.records] == [
        f"Using settings from {file.absolute()}"
    ]


def test_a_line_that_is_no_assignment_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A warning names the line that is passed over, without its text."""
    Path(".env").write_text("REDIS_HOST=here\nPOSTGRES_PASSWORD='hunter2\n", "utf-8")
    assert Settings.from_env().redis_url == "redis://here:6379/0"
    (record,) = caplog.records
    assert record.getMessage() == ".env: line 2 is not an assignment"


def test_fault_in_the_file_is_told_like_any_other() -> None:
    """The error for a faulty variable in the file names the variable."""
    Path(".env").write_text("REDIS_HOST=cache\nREDIS_PORT=cache:6379\n", "utf-8")
    with pytest.raises(InvalidSettings, match=f"^REDIS_PORT {PORT}$"):
        Settings.from_env()


def test_environment_of_the_process_is_never_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a file does not change the environment of the process."""
    monkeypatch.setenv("POSTGRES_HOST", "process")
    Path(".env").write_text("POSTGRES_HOST=file\nREDIS_HOST=file\nOTHER_OF_THE_HOST=1\n", "utf-8")
    before = dict(os.environ)
    Settings.from_env()
    assert dict(os.environ) == before


async def test_client_uses_what_the_environment_names(
    monkeypatch: pytest.MonkeyPatch, sqlite_url: str, tmp_path: Path
) -> None:
    """`IncidentClient.from_env` opens the configured database, or the default file."""
    async with IncidentClient.from_env() as incidents:
        await incidents.create("Disk is full", source="monitoring")
    assert (tmp_path / "incidentkit.db").is_file()
    monkeypatch.setenv("INCIDENTKIT_DATABASE_URL", sqlite_url)
    async with IncidentClient.from_env() as incidents:
        assert await incidents.list() == []


@pytest.mark.parametrize(
    "variables",
    [
        {"INCIDENTKIT_DATABASE_URL": "postgresql://h/x", "POSTGRES_PORT": "tcp://10.0.0.1:5432"},
        {"INCIDENTKIT_REDIS_URL": "redis://h/0", "REDIS_PORT": "tcp://10.0.0.1:6379"},
        {"REDIS_PORT": "tcp://10.0.0.1:6379", "REDIS_DB": "x"},
    ],
)
def test_a_variable_that_is_overruled_is_not_judged(variables: dict[str, str]) -> None:
    """A variable that another one overrides is not checked: Kubernetes sets some of them."""
    settings = Settings.from_mapping(variables)
    assert settings.database_url == variables.get("INCIDENTKIT_DATABASE_URL", DEFAULT_DATABASE_URL)
    assert settings.redis_url == variables.get("INCIDENTKIT_REDIS_URL")


@pytest.mark.parametrize("name", ["POSTGRES_USER", "POSTGRES_PASSWORD", "POSTGRES_DB"])
def test_a_value_that_is_no_text_is_refused_by_name(name: str) -> None:
    """The error for a variable that is not UTF-8 names it."""
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_mapping({name: "x\udcff"})
    assert caught.value.name == name

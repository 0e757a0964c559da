"""No secret of a URL or a variable is in an error, a traceback, a log or a repr."""

from __future__ import annotations

import asyncio
import logging
import re
import traceback
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from incidentkit import IncidentClient, IncidentKitError
from incidentkit.cache import cache_from_url
from incidentkit.env_file import read_env_file
from incidentkit.environment import Environment
from incidentkit.http.health import readiness
from incidentkit.settings import Settings, read_variables
from incidentkit.store import StoreOptions, migrate, store_from_url
from incidentkit.store.postgresql.url import parse_url
from tests.test_cli import run

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

WORD: Final = "hunter2"
"""What every part of a secret contains: so a part that is shown is found too."""

TEMPLATES: Final = (
    "postgresql://ann:{0}@127.0.0.1:1/incidents",
    "postgresql+asyncpg://ann:{0}@127.0.0.1:1,localhost:1/incidents?sslmode=disable",
    "postgres://ann@127.0.0.1:1/incidents?password={0}",
    "postgresql://127.0.0.1:1/incidents?user=ann&password={0}&application_name=x",
    "postgresql://ann:{0}@/incidents?host=/nowhere&port=1",
    "postgresql://ann@127.0.0.1:1/incidents?sslmode=require&sslpassword={0}",
    "redis://:{0}@127.0.0.1:1/0",
    "redis://ann:{0}@127.0.0.1:1/0?socket_timeout=1",
    "redis://127.0.0.1:1/0?password={0}",
    "rediss://ann:{0}@127.0.0.1:1",
    "unix:///nowhere?password={0}",
    "redis+cluster://ann:{0}@127.0.0.1:1,127.0.0.1:2",
    "redis+sentinel://ann:{0}@127.0.0.1:1/main/0",
    "redis+sentinel://127.0.0.1:1/main/0?sentinel_password={0}",
)

DAMAGES: Final[tuple[Callable[[str], str], ...]] = (
    lambda url: url,
    lambda url: url.replace("127.0.0.1:1", "127.0.0.1:port"),
    lambda url: url.replace("127.0.0.1:1", "127.0.0.1:99999999"),
    lambda url: url.replace("127.0.0.1:1", "[127.0.0.1"),
    lambda url: url.replace("127.0.0.1", ""),
    lambda url: url.replace("://", ":/"),
    lambda url: url.replace("://", ""),
    lambda url: f" {url}\t",
    lambda url: f"x{url}",
    lambda url: f"{url}&nothing=1",
    lambda url: f"{url}?sslmode=bad&db=bad",
    lambda url: f"{url}#x",
    lambda url: f"{url}\x00",
    lambda url: f"{url}\ud800",
    lambda url: url.replace("@", "@@"),
    lambda url: url.replace("@", ""),
    lambda url: url.replace("=", ""),
    lambda url: url.replace(":", ""),
    lambda url: url.upper(),
    lambda url: url[: len(url) // 2],
    lambda url: url[len(url) // 4 :],
)
"""URLs with typical typing errors."""

separators = st.text(st.sampled_from("/?#@:%&=+,;[]\\ \t\n'\"!$~é\u2028"), max_size=3)
secrets = st.lists(separators, min_size=1, max_size=3).map(
    lambda found: WORD.join(["", *found, ""])
)
urls = st.builds(
    lambda template, secret, encode, damage: damage(template.format(encode(secret))),
    st.sampled_from(TEMPLATES),
    secrets,
    st.sampled_from([lambda secret: quote(secret, safe=""), quote, str]),
    st.sampled_from(DAMAGES),
).filter(lambda url: "@" not in url or WORD not in re.split("[/?#]", url.rpartition("@")[2])[0])
"""What stands after the last @ is the host: a URL that was cut off may have a secret there."""


class Shown:
    """All that a program may show: errors with their causes, records of the log, and reprs."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def error(self, error: BaseException) -> None:
        """Add an error with its traceback, and those that it came from."""
        formatted = traceback.format_exception(error)
        self.texts += [str(error), repr(error), repr(error.args), *formatted]
        if isinstance(error, IncidentKitError):
            self.texts.append(repr(vars(error)))

    def record(self, record: logging.LogRecord) -> None:
        """Add a record of the log, with its arguments."""
        self.texts += [logging.Formatter().format(record), repr(record.args)]


@contextmanager
def watched() -> Iterator[Shown]:
    """Collect what is logged, at every level and by every library, and check all at the end."""
    shown = Shown()
    handler = logging.Handler()
    handler.emit = shown.record  # type: ignore[method-assign]
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield shown
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
    assert [text for text in shown.texts if WORD in text.lower()] == []


@settings(max_examples=200, deadline=None)
@given(urls)
def test_no_part_of_a_url_is_shown_when_it_is_read(url: str) -> None:
    """No reader of a URL, whether it takes or refuses it, shows its secret."""
    readers: list[Callable[[], object]] = [
        lambda: parse_url(url),
        lambda: cache_from_url(url),
        lambda: store_from_url(url),
        lambda: IncidentClient.open(url),
        lambda: IncidentClient.open("sqlite:///:memory:", url),
        lambda: Settings(database_url=url, redis_url=url),
        lambda: Settings.from_mapping({"INCIDENTKIT_DATABASE_URL": url}),
        lambda: Settings.from_mapping({"INCIDENTKIT_REDIS_URL": url}),
        lambda: Environment.read({"INCIDENTKIT_DATABASE_URL": url}),
        lambda: Environment.read({"INCIDENTKIT_REDIS_URL": url}),
    ]
    with watched() as shown:
        for read in readers:
            try:
                found = read()
            except IncidentKitError as error:
                shown.error(error)
            else:
                shown.texts += [repr(found), str(found)]


@settings(max_examples=30, deadline=None)
@given(urls)
def test_no_part_of_a_url_is_shown_when_it_is_used(url: str) -> None:
    """No call on a server that cannot be reached shows the secret of its URL."""
    with watched() as shown:
        asyncio.run(use_all(shown, url))


async def use_all(shown: Shown, url: str) -> None:
    """Use a URL in every way that needs a server, and collect what is shown."""
    await use(shown, lambda: IncidentClient.open(url))
    await use(shown, lambda: IncidentClient.open("sqlite:///:memory:", url))
    await use(shown, lambda: IncidentClient.open("sqlite:///:memory:", url, redis_required=True))
    await attempt(shown, partial(migrate.upgrade, url))
    await attempt(shown, partial(migrate.current, url))


async def use(shown: Shown, open_client: Callable[[], IncidentClient]) -> None:
    """Call a client, and collect what is shown."""
    try:
        client = open_client()
    except IncidentKitError as error:
        shown.error(error)
        return
    await attempt(shown, client.connect)
    await attempt(shown, client.list)
    await attempt(shown, partial(client.create, "Disk is full", source="partner"))
    await attempt(shown, partial(readiness, client, None, cache_required=True))
    await attempt(shown, client.store.check)
    await attempt(shown, client.close)


async def attempt(shown: Shown, call: Callable[[], Awaitable[object]]) -> None:
    """Collect the answer of a call, or its error."""
    try:
        shown.texts.append(repr(await call()))
    except IncidentKitError as error:
        shown.error(error)


@settings(max_examples=50, deadline=None)
@given(urls)
def test_no_part_of_a_url_is_shown_by_a_command(url: str) -> None:
    """No command shows the secret of a URL, not even with --debug."""
    with watched() as shown:
        for option in ("--database-url", "--redis-url"):
            result = run("--debug", "list", option, url)
            shown.texts += [result.stdout, result.stderr]


async def test_no_password_is_shown_by_servers_that_refuse_it(
    empty_postgres_url: str, redis_url: str
) -> None:
    """Servers that answer, and refuse the account, the database or the schema, show no password."""
    postgres, redis = urlsplit(empty_postgres_url), urlsplit(redis_url)
    here = f"{postgres.hostname}:{postgres.port}"
    urls = [
        f"postgresql://postgres:{WORD}@{here}{postgres.path}",
        f"postgresql://postgres:{WORD}@{here}/nowhere",
        f"postgresql://nobody:{WORD}@{here}{postgres.path}",
        f"postgresql://postgres:{WORD}@{here}{postgres.path}?nothing.{{}}=1",
        f"postgresql://postgres:{WORD}@{here}{postgres.path}?nothing=1",
        f"postgresql://postgres:{WORD}@{here}{postgres.path}?sslmode=require",
        f"redis://ann:{WORD}@{redis.hostname}:{redis.port}/0",
        f"redis://:{WORD}@{redis.hostname}:{redis.port}/0",
        f"redis+cluster://:{WORD}@{redis.hostname}:{redis.port}",
        f"redis+sentinel://{redis.hostname}:{redis.port}/main?sentinel_password={WORD}",
        f"redis://:{WORD}@{here}/0",
    ]
    with watched() as shown:
        for url in urls:
            await use_all(shown, url)
    assert any("is not permitted" in text or "does not exist" in text for text in shown.texts)


async def test_no_password_is_shown_that_a_server_repeats() -> None:
    """A Redis that repeats the password in its error does not reveal it."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1000):
            writer.write(f"-ERR unknown command 'AUTH', with args: 'ann' '{WORD}'\r\n".encode() * 2)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1")
    async with server:
        port = server.sockets[0].getsockname()[1]
        with watched() as shown:
            await use_all(shown, f"redis://ann:{WORD}@127.0.0.1:{port}/0")
    assert any("failed with" in text for text in shown.texts)


def test_no_password_is_shown_by_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No repr of what is read from the environment and from a file shows a password."""
    monkeypatch.setenv("POSTGRES_PASSWORD", WORD)
    Path(".env").write_text(f"INCIDENTKIT_REDIS_URL=redis://:{WORD}@h/0\n", "utf-8")
    with watched() as shown:
        shown.texts += [
            repr(read_variables()),
            repr(read_env_file(".env")),
            repr(Settings.from_env()),
        ]


async def test_no_password_is_shown_by_objects_that_are_open(
    migrated_postgres_url: str, redis_url: str
) -> None:
    """Neither what a client consists of nor its log of statements shows a password."""
    url = migrated_postgres_url.replace("postgres@", f"postgres:{WORD}@")
    assert WORD in url
    with watched() as shown:
        shown.texts += [
            repr(read_variables()),
            repr(read_env_file(".env")),
            repr(Settings.from_env()),
        ]
        options = StoreOptions(echo=True)
        async with IncidentClient.open(url, redis_url, options=options) as client:
            await client.create("Disk is full", source="monitoring")
            await client.list()
            shown.texts += [repr(each) for each in reachable(client)]


def reachable(top: object) -> Iterator[object]:
    """Yield the objects of the package that an object consists of."""
    seen: set[int] = set()
    ahead = [top]
    while ahead:
        each = ahead.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if type(each).__module__.startswith("incidentkit"):
            yield each
            names = [*getattr(each, "__dict__", ()), *getattr(type(each), "__slots__", ())]
            ahead += [getattr(each, name) for name in names if hasattr(each, name)]

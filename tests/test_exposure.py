"""Access to `incidentkit serve` on loopback, on other addresses and behind a proxy."""

from __future__ import annotations

import importlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from attrs import evolve

from incidentkit import IncidentClient, InvalidSettings, StoreError
from incidentkit.cli.exposure import check_exposure, exposed_app, is_local
from incidentkit.cli.failures import Refused
from incidentkit.cli.listening import Inherited, Tcp, Unix
from incidentkit.http.problems import Refusal
from incidentkit.settings import Settings
from tests.programs import DEADLINE, outcome, service, start

if TYPE_CHECKING:
    from pathlib import Path

VALID = {"--allowed-host": "LocalHost:8080", "--trusted-proxy": "unix"}
DANGER = "anyone who can reach 0.0.0.0 could read and change incidents, since "
NO_TOKEN = (
    "there is no active token: create one with `incidentkit token create NAME --scope read "
    "--scope write`, or allow anonymous callers with --allow-anonymous"
)


async def token_on(url: str, **options: Any) -> str:
    """Create a token that may read, and return its secret."""
    async with IncidentClient.open(url) as incidents:
        return (await incidents.tokens.create("ci", "read", **options)).secret


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.0.2.1", False),
        ("example.com", False),
    ],
)
def test_loopback_is_what_only_this_machine_reaches(host: str, loopback: bool) -> None:
    """A loopback address and `localhost` are local; any other name may resolve to anything."""
    assert is_local(Tcp(host, 8000)) is loopback


@pytest.mark.parametrize(("host", "local"), [("127.0.0.1", True), ("0.0.0.0", False)])
def test_an_inherited_socket_counts_as_what_it_is(host: str, local: bool) -> None:
    """An inherited socket is local if its address is."""
    with socket.create_server((host, 0)) as listener:
        assert is_local(Inherited(listener.fileno()), listener) is local


def test_only_this_machine_reaches_a_unix_socket() -> None:
    """A Unix socket is local, whether created or inherited."""
    with socket.socket(socket.AF_UNIX) as listener:
        assert is_local(Inherited(listener.fileno()), listener)
    assert is_local(Unix("incidentkit.sock"))


def test_an_inherited_public_socket_needs_a_token(migrated_sqlite_url: str) -> None:
    """An inherited socket on a public address needs a token too."""
    env = {**os.environ, "INCIDENTKIT_DATABASE_URL": migrated_sqlite_url}
    with socket.create_server(("0.0.0.0", 0)) as listener:
        listener.set_inheritable(True)
        fd = str(listener.fileno())
        done = subprocess.run(
            [sys.executable, "-m", "incidentkit", "serve", "--fd", fd],
            pass_fds=[listener.fileno()],
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
    danger = f"anyone who can reach the socket {fd} could read and change incidents, since "
    assert (done.returncode, done.stderr) == (2, f"Error: {danger}{NO_TOKEN}\n")


def test_a_public_address_needs_a_token_or_a_decision(migrated_sqlite_url: str) -> None:
    """Without a token or --allow-anonymous, `serve` refuses to start and names the next command."""
    env = {**os.environ, "INCIDENTKIT_DATABASE_URL": migrated_sqlite_url}
    told = f"Error: {DANGER}{NO_TOKEN}\n"
    assert outcome(start("serve", "--host", "0.0.0.0", env=env)) == (2, "", told)


async def check(settings: Settings, host: str, incidents: IncidentClient) -> None:
    """Run the check of an address."""
    address = Tcp(host, 8000)
    await check_exposure(incidents, settings, address, local=is_local(address))


def served(settings: Settings, host: str) -> Any:
    """Return the app that `serve` runs at an address."""
    client = IncidentClient.from_settings(settings)
    return exposed_app(client, settings, local=is_local(Tcp(host, 8000)))


async def test_only_an_active_token_counts(migrated_sqlite_url: str) -> None:
    """A service on a public address whose tokens have all ended does not start either."""
    settings = Settings(migrated_sqlite_url)
    async with IncidentClient.open(migrated_sqlite_url) as incidents:
        await incidents.tokens.create("ci", "read")
        await check(settings, "0.0.0.0", incidents)
        await incidents.tokens.revoke("ci")
        with pytest.raises(Refused, match=re.escape(NO_TOKEN)):
            await check(settings, "0.0.0.0", incidents)
        await check(settings, "127.0.0.1", incidents)
        await check(evolve(settings, allow_anonymous=True), "0.0.0.0", incidents)
        in_memory = Settings("sqlite+aiosqlite:///:memory:")
        with pytest.raises(Refused, match="a database in memory has no tokens: allow anonymous"):
            await check(in_memory, "0.0.0.0", incidents)


async def test_a_service_that_cannot_read_tokens_does_not_start(
    migrated_sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing privilege is found before the service listens, on loopback too."""
    settings = Settings(migrated_sqlite_url)
    async with IncidentClient.open(migrated_sqlite_url) as incidents:

        async def refuse(*_: object) -> None:
            raise StoreError("the account lacks a privilege")

        monkeypatch.setattr(incidents.store, "fetch", refuse)
        with pytest.raises(StoreError, match="lacks a privilege"):
            await check(settings, "127.0.0.1", incidents)
        await check(evolve(settings, allow_anonymous=True), "127.0.0.1", incidents)


@pytest.mark.parametrize("value", ["maybe", "2", "yes!"])
def test_the_decision_is_read_strictly(value: str) -> None:
    """A value that is not a boolean is refused, and the error names the variable."""
    with pytest.raises(InvalidSettings, match="INCIDENTKIT_ALLOW_ANONYMOUS must be true or false"):
        Settings.from_mapping({"INCIDENTKIT_ALLOW_ANONYMOUS": value})


async def test_a_public_address_with_a_token_answers_only_that(
    migrated_sqlite_url: str, tmp_path: Path
) -> None:
    """The log has the client and the name of the token, never the token."""
    secret = await token_on(migrated_sqlite_url)
    env = {**os.environ, "INCIDENTKIT_DATABASE_URL": migrated_sqlite_url}
    with service(tmp_path / "log", "--host", "0.0.0.0", env=env) as running:
        url = f"{running.url}/incident/get"
        assert httpx2.get(url).status_code == 401
        assert httpx2.get(url, headers=bearer(secret)).status_code == 200
        assert running.end(signal.SIGTERM) == 0
    log = running.log.read_text()
    assert secret not in log
    assert re.search(r" 200 [\d.]+ ms 127\.0\.0\.1 ci ", log)
    assert re.search(r" 401 [\d.]+ ms 127\.0\.0\.1 - ", log)


async def test_every_worker_notices_the_first_token(
    migrated_postgres_url: str, tmp_path: Path
) -> None:
    """On loopback, anonymous callers are answered until there is a token, and never again."""
    env = {**os.environ, "INCIDENTKIT_DATABASE_URL": migrated_postgres_url}
    with service(tmp_path / "log", "--workers", "2", env=env) as running:
        url = f"{running.url}/incident/get"
        assert {httpx2.get(url).status_code for _ in range(10)} == {200}
        secret = await token_on(migrated_postgres_url)
        deadline = time.monotonic() + DEADLINE
        answers: set[int] = set()
        while answers != {401} and time.monotonic() < deadline:
            # On new connections, which all workers take.
            answers = {httpx2.get(url).status_code for _ in range(20)}
        assert answers == {401}
        assert httpx2.get(url, headers=bearer(secret)).status_code == 200
        async with IncidentClient.open(migrated_postgres_url) as incidents:
            await incidents.tokens.revoke("ci")
        assert {httpx2.get(url).status_code for _ in range(10)} == {401}


def bearer(secret: str) -> dict[str, str]:
    """Return the header with a token."""
    return {"Authorization": f"Bearer {secret}"}


@pytest.mark.parametrize(
    ("host", "settings", "stranger", "foreign_host"),
    [
        ("127.0.0.1", {}, 200, 421),
        ("127.0.0.1", {"allowed_hosts": ("evil.example",)}, 200, 200),
        ("0.0.0.0", {}, 401, 401),
        ("0.0.0.0", {"allow_anonymous": True}, 200, 200),
        ("0.0.0.0", {"allow_anonymous": True, "allowed_hosts": ("a.example",)}, 200, 421),
    ],
)
async def test_the_address_decides_who_is_let_in(
    migrated_sqlite_url: str,
    host: str,
    settings: dict[str, Any],
    stranger: int,
    foreign_host: int,
) -> None:
    """Without tokens, loopback is open under its own names; other addresses are not."""
    app: Any = served(Settings(migrated_sqlite_url, **settings), host)
    async with app.client:
        for name, status in (("localhost", stranger), ("evil.example", foreign_host)):
            transport = httpx2.ASGITransport(app)
            url = f"http://{name}:8000"
            async with httpx2.AsyncClient(transport=transport, base_url=url) as client:
                assert (await client.get("/incident/get")).status_code == status


async def test_a_trusted_proxy_names_the_client(migrated_sqlite_url: str) -> None:
    """Failed checks count for the address that a trusted proxy has seen."""
    settings = Settings(migrated_sqlite_url, trusted_proxies=("127.0.0.1",))
    app: Any = served(settings, "127.0.0.1")
    async with (
        app.client,
        httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app), base_url="http://localhost"
        ) as client,
    ):
        statuses = {}
        for address in ["192.0.2.1"] * 21 + ["192.0.2.2"]:
            headers = {**bearer("wrong"), "X-Forwarded-For": address}
            response = await client.get("/incident/get", headers=headers)
            statuses[address] = response.status_code
        assert statuses == {"192.0.2.1": 429, "192.0.2.2": 401}


@pytest.mark.parametrize("server", ["serve", "asgi"])
async def test_the_settings_bound_each_token(
    migrated_sqlite_url: str, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    """The limits per token in the environment reach the app under any server."""
    monkeypatch.setenv("INCIDENTKIT_DATABASE_URL", migrated_sqlite_url)
    for name, value in (("REQUESTS", 3), ("READERS", 2), ("SEARCHES", 1)):
        monkeypatch.setenv(f"INCIDENTKIT_{name}_PER_TOKEN", str(value))
    monkeypatch.delitem(sys.modules, "incidentkit.http.asgi", raising=False)
    if server == "serve":
        app: Any = served(Settings.from_env(), "127.0.0.1")
    else:
        app = importlib.import_module("incidentkit.http.asgi").app
        monkeypatch.delitem(sys.modules, "incidentkit.http.asgi")
    for places, count in ((app.requests, 3), (app.readers, 2), (app.searches, 1)):
        with ExitStack() as taken:
            for _ in range(count):
                taken.enter_context(places.place("ci"))
            with pytest.raises(Refusal, match="the maximum"):
                taken.enter_context(places.place("ci"))


async def test_under_another_server_a_token_closes_the_app(
    migrated_sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`incidentkit.http.asgi:app` answers anonymous callers until there is a token."""
    monkeypatch.setenv("INCIDENTKIT_DATABASE_URL", migrated_sqlite_url)
    monkeypatch.setenv("INCIDENTKIT_ALLOWED_HOSTS", "incidents.example.com")
    monkeypatch.delitem(sys.modules, "incidentkit.http.asgi", raising=False)
    app: Any = importlib.import_module("incidentkit.http.asgi").app
    try:
        async with app.client:
            for host, status in (("incidents.example.com", 200), ("evil.example", 421)):
                transport = httpx2.ASGITransport(app)
                url = f"http://{host}"
                async with httpx2.AsyncClient(transport=transport, base_url=url) as client:
                    assert (await client.get("/incident/get")).status_code == status
            secret = (await app.client.tokens.create("ci", "read")).secret
            url = "http://localhost"
            async with httpx2.AsyncClient(
                transport=httpx2.ASGITransport(app), base_url=url
            ) as client:
                answer = await client.get("/incident/get", headers=bearer(secret))
                assert answer.status_code == 200
                assert (await client.get("/incident/get")).status_code == 401
    finally:
        sys.modules.pop("incidentkit.http.asgi", None)


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("--allowed-host", "http://a.example", "must be a host as requests name it"),
        ("--allowed-host", "a.example/", "must be a host as requests name it"),
        ("--trusted-proxy", "proxy.example", "must be an IP address, a network"),
        ("--trusted-proxy", "10.0.0.0/33", "must be an IP address, a network"),
    ],
)
def test_hosts_and_proxies_are_read_strictly(option: str, value: str, rule: str) -> None:
    """A value that would never match is refused, by the option and by the variable."""
    code, _, told = outcome(start("serve", option, value))
    assert code == 2
    assert f"Invalid value for '{option}': {rule}" in told
    names = {"--allowed-host": "ALLOWED_HOSTS", "--trusted-proxy": "TRUSTED_PROXIES"}
    with pytest.raises(InvalidSettings, match=rule):
        Settings.from_mapping({f"INCIDENTKIT_{names[option]}": f"{VALID[option]}, {value}"})

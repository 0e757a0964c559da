"""Check the Dockerfile and docker-compose.yml without a Docker engine."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest
from attrs import evolve
from dotenv import dotenv_values
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from incidentkit.environment import VARIABLES
from incidentkit.settings import Settings
from scripts.make_constraints import image_python
from tests.programs import outcome, service, start

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parent.parent
DOT_ENV = {
    "POSTGRES_DB": "mine",
    "POSTGRES_USER": "me",
    "POSTGRES_PASSWORD": "secret",
    "POSTGRES_HOST": "localhost",
    "POSTGRES_PORT": "6543",
    "REDIS_HOST": "localhost",
    "REDIS_PORT": "7777",
    "REDIS_DB": "3",
    "DB_POOL_SIZE": "20",
    "DB_MAX_OVERFLOW": "0",
    "DB_ECHO": "True",
    "INCIDENTKIT_DATABASE_URL": "sqlite+aiosqlite:///elsewhere.db",
    "INCIDENTKIT_REDIS_REQUIRED": "true",
    "INCIDENTKIT_REQUEST_LOG": "database",
    "INCIDENTKIT_ALLOW_ANONYMOUS": "0",
    "INCIDENTKIT_ALLOWED_HOSTS": "incidents.example.com",
    "INCIDENTKIT_TRUSTED_PROXIES": "10.0.0.0/8,unix",
    "INCIDENTKIT_SCHEMA": "mine",
    "INCIDENTKIT_MAX_STALENESS": "7",
    "INCIDENTKIT_TRANSITIONS": "new:completed",
    "INCIDENTKIT_STREAM_LIFETIME": "77",
    "INCIDENTKIT_CORS_ORIGINS": "https://board.example.com",
    "INCIDENTKIT_REQUESTS_PER_TOKEN": "7",
    "INCIDENTKIT_READERS_PER_TOKEN": "6",
    "INCIDENTKIT_SEARCHES_PER_TOKEN": "5",
    "INCIDENTKIT_PREPARED_STATEMENTS": "off",
}


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions, each with the rest of its line."""
    text = (ROOT / "Dockerfile").read_text()
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines) if name]


def last(name: str) -> str:
    """Return the arguments of the last instruction of a name, which belongs to the final image."""
    return [rest for instruction, rest in instructions() if instruction == name][-1]


def compose(variables: Mapping[str, str | None]) -> dict[str, Any]:
    """Return docker-compose.yml with its variables replaced, as `docker compose config` does."""

    def replace(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else variables.get(match["name"]) or match["default"]

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: replaced(each) for name, each in value.items()}
        if isinstance(value, list):
            return [replaced(each) for each in value]
        if not isinstance(value, str):
            return value
        return re.sub(r"\$\$|\$\{(?P<name>\w+):-(?P<default>[^}]*)\}", replace, value)

    yaml: Any = importlib.import_module("yaml")
    project: dict[str, Any] = replaced(yaml.safe_load((ROOT / "docker-compose.yml").read_text()))
    return project


def environment(name: str, variables: Mapping[str, str | None]) -> dict[str, str]:
    """Return the environment of a container."""
    found: dict[str, str] = compose(variables)["services"][name]["environment"]
    return found


# The image


def test_the_image_does_not_run_as_root() -> None:
    """The image runs as a numeric user other than root, who owns the working directory."""
    user = last("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert f"useradd --no-log-init --uid {user.partition(':')[0]} " in last("RUN")
    assert last("RUN").endswith(last("WORKDIR"))


def test_the_image_starts_the_service_for_all_addresses() -> None:
    """Entrypoint and command are in exec form, so that signals reach the service."""
    command = [*json.loads(last("ENTRYPOINT")), *json.loads(last("CMD"))]
    assert command == ["incidentkit", "serve", "--host", "0.0.0.0"]
    assert last("EXPOSE") == "8000"


def test_the_image_gets_what_it_needs_and_no_more() -> None:
    """Every copied file exists and passes .dockerignore, and the build needs no other."""
    copied = [
        source
        for name, rest in instructions()
        if name == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    assert sorted(copied) == sorted(line[1:] for line in ignored if line.startswith("!"))
    assert all((ROOT / source).exists() for source in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    licenses = [
        file.relative_to(ROOT).parts[0]
        for pattern in project["project"]["license-files"]
        for file in ROOT.glob(pattern)
    ]
    assert {project["project"]["readme"], *licenses} < set(copied)
    targets = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert targets.keys() == {"packages"}
    assert {*targets["packages"]} < set(copied)


def constraints() -> dict[str, Version]:
    """Return the version of each package in the image."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in pins)
    return {canonicalize_name(pin.name): Version(str(pin.specifier)[2:]) for pin in pins}


def test_the_image_has_the_versions_of_the_constraints() -> None:
    """Every installation in the image takes the constraints, or no package of an index."""
    installs = [
        command
        for name, rest in instructions()
        if name == "RUN"
        for command in rest.split("&&")
        if re.search(r"pip (install|wheel)", command)
    ]
    assert len(installs) == 3
    for command in installs:
        constrained = "--constraint constraints.txt" in command
        assert constrained or "--no-build-isolation --no-deps" in command
    assert f"FROM python:{image_python()}-slim AS build" in (ROOT / "Dockerfile").read_text()


def test_the_constraints_fit_the_project() -> None:
    """Each package that the project or its build requires has a version, which the project takes.

    If this fails, run `python3.13 scripts/make_constraints.py`.
    """
    pins = constraints()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    required = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    required += [line for name, lines in extras.items() if name != "all" for line in lines]
    for requirement in map(Requirement, required):
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier


def test_the_constraints_are_whole() -> None:
    """Each package that one of the packages requires, in the versions installed here, is there."""
    pins, image = constraints(), {"python_version": image_python(), "sys_platform": "linux"}
    for name in pins:
        try:
            lines = distribution(name).requires or []
        except PackageNotFoundError:
            continue  # Only the image has it.
        for requirement in map(Requirement, lines):
            if requirement.marker is None or requirement.marker.evaluate({"extra": "", **image}):
                assert canonicalize_name(requirement.name) in pins, f"{name} requires {requirement}"


# The stack


def test_every_variable_reaches_the_service() -> None:
    """The service takes its settings from `.env`, except for the stack's own servers."""
    assert {*DOT_ENV, "INCIDENTKIT_REDIS_URL"} == {*VARIABLES}
    settings = Settings.from_mapping(environment("incidentkit", DOT_ENV))
    outside = Settings.from_mapping({**DOT_ENV, "INCIDENTKIT_DATABASE_URL": ""})
    database, cache = settings.database_url, settings.redis_url
    assert settings == evolve(outside, database_url=database, redis_url=cache)
    socket = "host=/var/run/postgresql&port=5432"
    assert settings.database_url == f"postgresql://me:secret@/mine?{socket}"
    assert settings.redis_url == "redis://redis:6379/3"
    assert settings.redis_required
    assert settings.request_log == "database"
    assert not settings.allow_anonymous
    assert settings.allowed_hosts == ("incidents.example.com",)
    assert settings.trusted_proxies == ("10.0.0.0/8", "unix")
    store = settings.store
    assert (store.pool_size, store.max_overflow, store.echo) == (20, 0, True)


@pytest.mark.parametrize("variables", [{}, DOT_ENV], ids=["defaults", ".env"])
def test_the_servers_are_the_ones_that_the_service_uses(variables: dict[str, str]) -> None:
    """PostgreSQL gets the account that service and migration use, with or without `.env`."""
    postgres = environment("postgres", variables)
    assert environment("migrate", variables) == environment("incidentkit", variables)
    settings = Settings.from_mapping(environment("incidentkit", variables))
    used = urlsplit(settings.database_url)
    assert postgres["POSTGRES_USER"] == used.username
    assert postgres["POSTGRES_PASSWORD"] == used.password
    assert postgres["POSTGRES_DB"] == used.path.strip("/")
    services = compose(variables)["services"]
    (folder,) = parse_qs(used.query)["host"]
    assert f"socket:{folder}" in services["postgres"]["volumes"]
    for name in ("incidentkit", "migrate"):
        assert services[name]["volumes"] == [f"socket:{folder}:ro"]
    assert settings.redis_url is not None
    redis = urlsplit(settings.redis_url).hostname
    assert {*services[redis]["networks"]} < {*services["incidentkit"]["networks"]}


def test_the_service_starts_after_the_migration_and_its_servers() -> None:
    """The migration waits for PostgreSQL, and the service for the migration and its servers."""
    services = compose({})["services"]
    assert services["migrate"]["depends_on"]["postgres"] == {"condition": "service_healthy"}
    assert services["incidentkit"]["depends_on"] == {
        "migrate": {"condition": "service_completed_successfully"},
        "postgres": {"condition": "service_healthy"},
        "redis": {"condition": "service_healthy"},
    }
    for server in ("postgres", "redis"):
        assert services[server]["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")


def test_the_health_check_of_postgres_asks_for_the_database() -> None:
    """The check uses TCP, which the temporary server that sets up a new database refuses."""
    services = compose({})["services"]
    _, command = services["postgres"]["healthcheck"]["test"]
    names = {"POSTGRES_USER": "a b", "POSTGRES_DB": "c d"}
    asked = subprocess.run(
        ["/bin/sh", "-c", command.replace("pg_isready", "echo")],
        check=True,
        capture_output=True,
        text=True,
        env=names,
    )
    assert asked.stdout == "--host=127.0.0.1 --username=a b --dbname=c d\n"


def test_the_stack_runs_until_it_is_stopped() -> None:
    """Servers and service restart after a crash, the migration runs once, and data is kept."""
    project = compose({})
    services = project["services"]
    assert services["migrate"]["restart"] == "no"
    assert services["migrate"]["healthcheck"] == {"disable": True}
    for name in ("incidentkit", "postgres", "redis"):
        assert services[name]["restart"] == "unless-stopped"
    volume, _, folder = services["postgres"]["volumes"][0].partition(":")
    assert volume in project["volumes"]
    # Since version 18, the image keeps its data in a subfolder named after the version.
    assert (services["postgres"]["image"], folder) == ("postgres:18", "/var/lib/postgresql")


def test_only_this_machine_reaches_the_stack() -> None:
    """One port is published, on loopback; the servers are in no network that leads elsewhere."""
    project = compose({})
    services = project["services"]
    published = {name: each["ports"] for name, each in services.items() if "ports" in each}
    assert published == {"incidentkit": ["127.0.0.1:8000:8000"]}
    # Its default password is of use only in its container, and for those with its socket.
    assert services["postgres"]["network_mode"] == "none"
    assert services["migrate"]["network_mode"] == "none"
    assert services["redis"]["networks"] == ["servers"]
    assert project["networks"]["servers"] == {"internal": True}
    sharing = {
        name
        for name, each in services.items()
        if [volume for volume in each.get("volumes", ()) if volume.startswith("socket:")]
    }
    assert sharing == {"incidentkit", "migrate", "postgres"}


@pytest.mark.parametrize("name", ["incidentkit", "migrate", "postgres", "redis"])
def test_no_container_has_rights_that_it_does_not_need(name: str) -> None:
    """No container runs as root, has or gets a capability, or writes outside its volumes."""
    container = compose({})["services"][name]
    assert container["cap_drop"] == ["ALL"]
    assert container["security_opt"] == ["no-new-privileges:true"]
    assert container["read_only"] is True
    assert container.keys().isdisjoint({"cap_add", "privileged", "devices", "pid", "ipc"})
    assert container.get("user") == (None if "build" in container else name)


def test_the_stack_allows_anonymous_callers_explicitly() -> None:
    """Only this machine reaches the stack, and a setting closes it to callers without a token."""
    settings = Settings.from_mapping(environment("incidentkit", {}))
    assert settings.allow_anonymous
    assert settings.allowed_hosts == ("localhost", "127.0.0.1")
    closed = environment("incidentkit", {"INCIDENTKIT_ALLOW_ANONYMOUS": "0"})
    assert not Settings.from_mapping(closed).allow_anonymous


def test_the_containers_commands_work_together(
    empty_postgres_url: str, redis_url: str, tmp_path: Path
) -> None:
    """The commands of the migration, the image and its health check work together."""
    postgres, redis = urlsplit(empty_postgres_url), urlsplit(redis_url)
    variables = {
        "POSTGRES_USER": postgres.username,
        "POSTGRES_PASSWORD": postgres.password,
        "POSTGRES_DB": postgres.path.strip("/"),
        "REDIS_DB": redis.path.strip("/"),
    }
    there = {
        **os.environ,
        **environment("incidentkit", variables),
        "POSTGRES_HOST": str(postgres.hostname),
        "POSTGRES_PORT": str(postgres.port),
        "REDIS_HOST": str(redis.hostname),
        "REDIS_PORT": str(redis.port),
    }
    migration = compose(variables)["services"]["migrate"]["command"]
    assert outcome(start(*migration, env=there))[0] == 0
    assert last("HEALTHCHECK").count(" CMD ") == 1
    python, *check = json.loads(last("HEALTHCHECK").partition(" CMD ")[2])
    assert python == "python"
    command = json.loads(last("CMD"))
    with service(tmp_path / "log", *command[1:], env=there) as running:
        port = str(urlsplit(running.url).port)
        check = [argument.replace("8000", port) for argument in check]
        assert subprocess.run([sys.executable, *check], check=False).returncode == 0
        ready = httpx2.get(f"http://127.0.0.1:{port}/health/ready").json()
        assert (ready["database"]["state"], ready["cache"]["state"]) == ("ok", "ok")
    assert (
        subprocess.run([sys.executable, *check], check=False, stderr=subprocess.DEVNULL).returncode
        == 1
    )


def test_the_example_of_a_dot_env_can_be_used_as_it_is() -> None:
    """`.env.example` names every variable that is read, with valid values."""
    example = ROOT / ".env.example"
    settings = Settings.from_env(example)
    assert settings.database_url == "postgresql://postgres:change_me@localhost:5432/incidents"
    assert settings.redis_url == "redis://localhost:6379/0"
    named = set(re.findall(r"^(?:# )?([A-Z_]+)=", example.read_text(), re.MULTILINE))
    assert named == {*VARIABLES}
    assert compose(dotenv_values(example)) == compose(
        {**dotenv_values(example), "POSTGRES_HOST": "elsewhere", "REDIS_PORT": "1"}
    )

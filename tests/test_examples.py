"""Each example is run as the program that it is."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest

from tests.programs import outcome, service, start

pytestmark = pytest.mark.unmeasured

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
WARNINGS = ("-W", "error")


def run(name: str) -> tuple[int, str, str]:
    """Return the exit code of an example, and what it wrote."""
    return outcome(start(program=[*WARNINGS, str(EXAMPLES / name)]))


def rows(statement: str, file: str = "incidentkit.db") -> list[tuple[object, ...]]:
    """Return rows of an SQLite database, by default the one of a program without settings."""
    with closing(sqlite3.connect(file)) as connection:
        return connection.execute(statement).fetchall()


def test_every_example_is_run_here() -> None:
    """No example is left out."""
    tests = [Path(__file__), *Path(__file__).parent.glob("integrations/test_*.py")]
    source = "".join(file.read_text(encoding="utf-8") for file in tests)
    names = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert names == [
        "celery_worker.py",
        "django_host.py",
        "embedded.py",
        "fastapi_host.py",
        "flask_host.py",
        "order_and_incident.py",
        "own_cache.py",
        "servers.py",
    ]
    for name in names:
        assert re.search(rf'"{name[:-3]}(\.py|:\w+)?"', source), name


def test_embedded() -> None:
    """The program records in an SQLite file, which the next run goes on with."""
    exit_code, out, err = run("embedded.py")
    assert (exit_code, err) == (0, "")
    first, second, closed, message, dedup_key = out.splitlines()
    assert {line.partition(" monitoring ")[2] for line in (first, second)} == {
        "Disk of db-1 is 97 % full",
        "Disk of web-1 is 93 % full",
    }
    assert closed == "Incident 2 is completed"
    assert message == "incident_message must not be one of: none, null, test"
    assert dedup_key == "dedup_key must have 1 to 255 characters"
    assert run("embedded.py")[0] == 0
    statuses = 'SELECT incident_type FROM "Incident" ORDER BY incident_id'
    assert rows(statuses) == [("new",), ("completed",), ("new",), ("completed",)]


def test_servers(empty_postgres_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program says what to run on a new database, then uses PostgreSQL and Redis."""
    postgres, redis = urlsplit(empty_postgres_url), urlsplit(redis_url)
    for name, value in {
        "POSTGRES_HOST": postgres.hostname,
        "POSTGRES_PORT": postgres.port,
        "POSTGRES_USER": postgres.username,
        "POSTGRES_PASSWORD": postgres.password or "",
        "POSTGRES_DB": postgres.path.strip("/"),
        "REDIS_HOST": redis.hostname,
        "REDIS_PORT": redis.port,
        "REDIS_DB": redis.path.strip("/"),
    }.items():
        monkeypatch.setenv(name, str(value))
    assert run("servers.py") == (1, "", "Run `incidentkit db upgrade` first\n")
    assert outcome(start("db", "upgrade"))[0] == 0
    for number in (1, 2):
        exit_code, out, err = run("servers.py")
        assert (exit_code, err) == (0, "")
        assert out.splitlines() == [
            f"Incident {number} is the newest of {number}",
            "Both lists are the same",
            "Lists are cached",
        ]
    (_, out, _) = outcome(start("list", "--json"))
    assert [incident["incident_message"] for incident in json.loads(out)] == [
        "Payments are slow",
        "Payments are slow",
    ]
    monkeypatch.setenv("POSTGRES_PORT", "1")
    exit_code, _, err = run("servers.py")
    assert (exit_code, err[:16]) == (1, "Try again later:")


def test_fastapi_host(tmp_path: Path) -> None:
    """The application's own route and the mounted service share one client."""
    uvicorn = [*WARNINGS, "-m", "uvicorn", "--app-dir", str(EXAMPLES), "fastapi_host:app"]
    with service(
        tmp_path / "log", "--port", "0", program=uvicorn, alive="/incidents/health/live"
    ) as host:
        answer = httpx2.post(f"{host.url}/orders/7/lost")
        assert answer.status_code == 200
        assert answer.json()["incident_message"] == "Order 7 is lost"
        got = httpx2.get(f"{host.url}/incidents/incident/get/1")
        assert got.content == answer.content
        created = httpx2.post(
            f"{host.url}/incidents/incident/create",
            json={"incident_message": "Shelf 3 is empty", "source": "partner"},
        )
        assert created.status_code == 201
        assert created.headers["Location"].endswith("/incidents/incident/get/2")
        assert httpx2.get(f"{host.url}/docs").status_code == 200
        assert httpx2.get(f"{host.url}/incidents/docs").status_code == 200
        assert httpx2.get(f"{host.url}/incidents/health/ready").json()["ready"]
        host.end(signal.SIGINT)
    assert "Traceback" not in host.log.read_text()
    assert rows('SELECT count(*) FROM "Incident"') == [(2,)]


def test_own_cache() -> None:
    """After each change each client asks for the page once, and what one has read serves both."""
    output = "The cache was asked for a page 4 times and had it 2 times\n"
    assert run("own_cache.py") == (0, output, "")


def test_order_and_incident() -> None:
    """An order and its incident are kept together, and vanish together, with all their traces."""
    output = ["Not paid: harp", "Order 1: piano", "Incident 1: Pack order 1 by hand: piano"]
    exit_code, out, err = run("order_and_incident.py")
    assert (exit_code, out.splitlines(), err) == (0, output, "")
    assert run("order_and_incident.py")[0] == 0
    assert rows("SELECT item FROM orders", "shop.db") == [("piano",), ("piano",)]
    assert rows('SELECT count(*) FROM "Incident"', "shop.db") == [(2,)]
    assert rows("SELECT count(*) FROM incident_event", "shop.db") == [(2,)]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_says_how_to_run_it(path: Path) -> None:
    """Its docstring has the commands, for the file as it is named."""
    commands = re.findall(r"^    \$ (.+)$", path.read_text(), re.MULTILINE)
    # It is not published: each example is installed from a checkout.
    assert commands[0].startswith("python -m pip install ")
    assert commands[0].split()[4].strip("'").startswith(".")
    assert any(path.stem in command for command in commands)

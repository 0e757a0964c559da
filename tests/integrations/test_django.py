"""The app for Django."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx2
import pytest
from django.core.exceptions import ImproperlyConfigured

from incidentkit.integrations.django.databases import url_of
from incidentkit.store.postgresql.url import parse_url
from tests.programs import outcome, service, start
from tests.test_examples import EXAMPLES, WARNINGS, rows

PROJECT = """\
import json, os, sys
from django.conf import settings
from django.core.management import execute_from_command_line

settings.configure(
    **json.loads(os.environ["SHOP"]),
    INSTALLED_APPS=["incidentkit.integrations.django", "django.contrib.contenttypes", "shop"],
    ROOT_URLCONF=__name__,
)
urlpatterns = []
execute_from_command_line(sys.argv)
"""

USE = """\
from django.db import transaction
from incidentkit.integrations.django import client, join

client().create("Disk is full", source="monitoring")
try:
    with transaction.atomic():
        join().create("This one vanishes", source="monitoring")
        raise ZeroDivisionError
except ZeroDivisionError:
    pass
with transaction.atomic():
    join().create("This one stays", source="monitoring")
print([each.incident_message for each in client().list()])
"""

TESTS = """\
from django.db import connection
from django.contrib.contenttypes.models import ContentType
from django.test import TestCase

from incidentkit.integrations.django import client, join


class Orders(TestCase):
    def record(self):
        ContentType.objects.get_or_create(app_label="shop", model="order")
        self.assertEqual(join().list(), [])
        self.assertEqual(join().create("Disk is full", source="monitoring").version, 1)
        self.assertEqual(len(join().list()), 1)
        if connection.vendor == "postgresql":
            # As a view under test might: its connections must not keep the database from being
            # dropped.
            self.assertEqual(client().list(), [])

    def test_first(self):
        self.record()

    def test_second(self):
        self.record()
"""


def sqlite(name: str, **options: Any) -> dict[str, Any]:
    """Return the settings of an SQLite database."""
    return {"ENGINE": "django.db.backends.sqlite3", "NAME": name, **options}


def postgresql(url: str) -> dict[str, Any]:
    """Return the settings of a PostgreSQL database."""
    parts = urlsplit(url)
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": parts.path.strip("/"),
        "USER": parts.username,
        "PASSWORD": unquote(parts.password or ""),
        "HOST": parts.hostname,
        "PORT": parts.port,
    }


def manage(*arguments: str, database: dict[str, Any], **settings: Any) -> tuple[int, str, str]:
    """Run a command of a project in the current folder."""
    Path("manage.py").write_text(PROJECT, encoding="utf-8")
    Path("shop").mkdir(exist_ok=True)
    Path("shop/__init__.py").touch()
    Path("shop/tests.py").write_text(TESTS, encoding="utf-8")
    given = json.dumps({"DATABASES": {"default": database}, **settings})
    return outcome(
        start(*arguments, program=[*WARNINGS, "manage.py"], env={**os.environ, "SHOP": given})
    )


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """An empty database of a project."""
    if request.param == "sqlite":
        return sqlite(str(tmp_path / "shop 100%.db"))
    return postgresql(request.getfixturevalue("empty_postgres_url"))


def test_a_project_records_beside_and_inside_its_transactions(database: dict[str, Any]) -> None:
    """After `migrate`, the client and joined transactions work on the project's database."""
    assert manage("migrate", database=database)[::2] == (0, "")
    assert manage("incidentkit", "check", database=database) == (
        0,
        "The schema is up to date.\n",
        "",
    )
    exit_code, out, err = manage("shell", "-v", "0", "-c", USE, database=database)
    assert (exit_code, out, err) == (0, "['This one stays', 'Disk is full']\n", "")


def test_the_tests_of_a_project_roll_back(database: dict[str, Any]) -> None:
    """Django's test runner creates the tables, and each test begins without incidents."""
    exit_code, out, err = manage("test", database=database)
    assert exit_code == 0, out + err
    assert "Ran 2 tests" in err


def test_an_outdated_schema_names_the_command_of_the_project(database: dict[str, Any]) -> None:
    """The errors of a client and of the check name the command to run."""
    if "sqlite" in database["ENGINE"]:
        # A client would bring the file up to date.
        exit_code, _, err = manage("incidentkit", "check", database=database)
    else:
        exit_code, _, err = manage("shell", "-v", "0", "-c", USE, database=database)
    assert exit_code == 1
    assert "run `python manage.py incidentkit upgrade`" in err
    assert manage("incidentkit", "upgrade", database=database)[::2] == (0, "")
    assert manage("incidentkit", "check", database=database)[0] == 0


def test_a_faulty_setting_is_named(tmp_path: Path) -> None:
    """An unknown or invalid key of INCIDENTKIT is refused by name."""
    database = sqlite(str(tmp_path / "shop.db"))
    for setting, fault in [
        (
            {"REDIS_ULR": "redis://localhost"},
            "INCIDENTKIT: REDIS_ULR is unknown: did you mean INCIDENTKIT_REDIS_URL?",
        ),
        ({"MAX_STALENESS": -1}, "INCIDENTKIT_MAX_STALENESS must be a number of seconds"),
    ]:
        _, _, err = manage("shell", "-v", "0", "-c", USE, database=database, INCIDENTKIT=setting)
        assert fault in err


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({"NAME": "shop"}, {"database": "shop"}),
        (
            {"NAME": "a/b", "USER": "u@x", "PASSWORD": "p:/?#", "HOST": "db", "PORT": "5433"},
            {"database": "a/b", "user": "u@x", "password": "p:/?#", "host": ["db"], "port": [5433]},
        ),
        (
            {"NAME": "shop", "HOST": "/run/pg", "OPTIONS": {"pool": True, "sslmode": None}},
            {"database": "shop", "host": ["/run/pg"]},
        ),
        ({"NAME": "shop", "HOST": "::1", "PORT": 1}, {"host": ["::1"], "port": [1]}),
    ],
)
def test_the_url_has_what_the_client_needs(
    settings: dict[str, Any], arguments: dict[str, Any]
) -> None:
    """The address, the account and the database reach the driver as the project wrote them."""
    server = parse_url(url_of("default", "postgresql", settings))
    assert {name: server.arguments[name] for name in arguments} == arguments


@pytest.mark.parametrize("name", ["file:shop.db", "file:shop.db?mode=rwc", "file:a%20b%2525.db"])
def test_a_client_opens_the_file_that_a_uri_names(tmp_path: Path, name: str) -> None:
    """If the name of a database is an SQLite URI, Django and the client open the same file."""
    database = sqlite(name)
    assert manage("migrate", database=database)[::2] == (0, "")
    exit_code, out, err = manage("shell", "-v", "0", "-c", USE, database=database)
    assert (exit_code, out, err) == (0, "['This one stays', 'Disk is full']\n", "")
    assert len([*tmp_path.glob("*.db*")]) == 1


def test_other_databases_are_refused() -> None:
    """The error names the alias and the kind of its database."""
    with pytest.raises(ImproperlyConfigured, match=r"DATABASES\['legacy'\] is mysql"):
        url_of("legacy", "mysql", {"NAME": "shop"})


def test_the_example_serves_from_forked_workers(tmp_path: Path) -> None:
    """Gunicorn workers that share a preloaded project record on connections of their own."""
    variables = {**os.environ, "SHOP_DATABASE": str(tmp_path / "shop.db")}
    example = [*WARNINGS, str(EXAMPLES / "django_host.py")]
    assert outcome(start("migrate", program=example, env=variables))[0] == 0
    gunicorn = [*WARNINGS, "-m", "gunicorn", "--no-control-socket", "--preload", "--workers", "2"]
    options = ["--chdir", str(EXAMPLES), "--bind", "127.0.0.1:0", "django_host:application"]
    with service(
        tmp_path / "log", program=[*gunicorn, *options], env=variables, alive="/incidents"
    ) as host:
        for order in range(1, 9):
            answer = httpx2.post(f"{host.url}/orders/{order}/ship")
            assert (answer.status_code, answer.text) == (502, f"Not shipped, see incident {order}")
        messages = [each["incident_message"] for each in httpx2.get(f"{host.url}/incidents").json()]
    assert messages == [f"Order {order} could not be shipped" for order in range(8, 0, -1)]
    assert "Traceback" not in host.log.read_text()
    lost = rows("SELECT order_id FROM lost_order", variables["SHOP_DATABASE"])
    assert [order for (order,) in lost] == [*range(1, 9)]

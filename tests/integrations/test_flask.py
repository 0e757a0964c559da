"""The extension for Flask."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx2
import pytest
from flask import Flask

from incidentkit import InvalidSettings, SyncIncidentClient
from incidentkit.integrations.flask import IncidentKit
from tests.programs import service
from tests.test_examples import EXAMPLES, WARNINGS


def application(**config: Any) -> tuple[Flask, IncidentKit]:
    """Return an application with the extension."""
    app = Flask("shop")
    app.config.update(config)
    incidents = IncidentKit()
    incidents.init_app(app)
    return app, incidents


def test_the_client_opens_at_its_first_use(sqlite_url: str) -> None:
    """A setting of the application names the database, which opens only when the client is used."""
    app, incidents = application(INCIDENTKIT_DATABASE_URL=sqlite_url)
    file = Path(sqlite_url.removeprefix("sqlite+aiosqlite:///"))
    assert not file.exists()
    with app.app_context():
        client = incidents.client
        assert client.create("Disk is full", source="monitoring").incident_id == 1
        assert incidents.client is client
    client.close()
    assert file.exists()


def test_each_application_has_its_own_client(tmp_path: Path) -> None:
    """One extension serves several applications, each on its own database."""
    incidents = IncidentKit()
    for name in ("first", "second"):
        app = Flask(name)
        app.config["INCIDENTKIT_DATABASE_URL"] = f"sqlite+aiosqlite:///{tmp_path / name}"
        incidents.init_app(app)
        with app.app_context():
            assert incidents.client.create("Disk is full", source="monitoring").incident_id == 1
            incidents.client.close()


def test_a_given_client_is_used(sqlite_url: str) -> None:
    """A client that the application passes takes precedence over the settings."""
    app = Flask("shop")
    with SyncIncidentClient.open(sqlite_url) as client:
        incidents = IncidentKit(app, client=client)
        with app.app_context():
            assert incidents.client is client


def test_a_faulty_setting_is_refused_at_the_start() -> None:
    """`init_app` names the setting and its rule."""
    with pytest.raises(InvalidSettings, match=r"INCIDENTKIT_MAX_STALENESS must be a number"):
        application(INCIDENTKIT_MAX_STALENESS="long")


def test_an_application_without_the_extension_is_told() -> None:
    """The error names the missing call."""
    with Flask("shop").app_context(), pytest.raises(RuntimeError, match=r"call init_app\(app\)"):
        _ = IncidentKit().client


def test_the_example_serves_from_forked_workers(tmp_path: Path) -> None:
    """Gunicorn workers that share a preloaded application record on connections of their own."""
    gunicorn = [
        *WARNINGS,
        "-m",
        "gunicorn",
        "--no-control-socket",
        "--preload",
        "--workers",
        "2",
        "--threads",
        "2",
    ]
    options = ["--chdir", str(EXAMPLES), "--bind", "127.0.0.1:0", "flask_host:app"]
    variables = {
        **os.environ,
        "INCIDENTKIT_DATABASE_URL": f"sqlite+aiosqlite:///{tmp_path / 'incidents.db'}",
    }
    with service(
        tmp_path / "log", program=[*gunicorn, *options], env=variables, alive="/incidents"
    ) as host:
        for order in range(1, 9):
            answer = httpx2.post(f"{host.url}/orders/{order}/ship")
            assert (answer.status_code, answer.text) == (502, f"Not shipped, see incident {order}")
        messages = [each["incident_message"] for each in httpx2.get(f"{host.url}/incidents").json()]
    assert messages == [f"Order {order} could not be shipped" for order in range(8, 0, -1)]
    assert "Traceback" not in host.log.read_text()

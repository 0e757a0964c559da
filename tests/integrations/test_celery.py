"""The example for Celery, with real worker processes."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import psutil
import pytest

from incidentkit import Incident, IncidentStatus, SyncIncidentClient
from tests.programs import outcome, start
from tests.test_examples import EXAMPLES

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.unmeasured

CALL = """\
import celery_worker
for euros in {euros}:
    celery_worker.charge.delay(euros)
"""


def test_a_failed_task_opens_an_incident_that_a_success_ends(
    migrated_postgres_url: str, redis_url: str, tmp_path: Path
) -> None:
    """Forked workers record failures as occurrences of one incident, and end it on success."""
    variables = {
        **os.environ,
        "BROKER_URL": redis_url,
        "INCIDENTKIT_DATABASE_URL": migrated_postgres_url,
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES), *sys.path]),
    }

    def send(*euros: int) -> None:
        call = CALL.format(euros=euros)
        assert outcome(start(program=["-c", call], env=variables))[::2] == (0, "")

    options = ["--app", "celery_worker", "worker", "--pool", "prefork", "--concurrency", "2"]
    log = tmp_path / "log"
    with (
        log.open("wb") as output,
        SyncIncidentClient.open(migrated_postgres_url) as incidents,
        start(*options, program=["-m", "celery"], env=variables, stderr=output) as worker,
    ):
        try:
            changes = incidents.changes()
            send(0, 0, 0)
            opened = [next(changes) for _ in range(3)]
            assert [event.kind for event in opened] == ["created", "recurred", "recurred"]
            send(7)
            assert next(changes).to_status is IncidentStatus.COMPLETED
            (incident,) = incidents.list()
            assert described(incident) == ("celery_worker.charge", 3, "completed")
            assert len(psutil.Process(worker.pid).children()) >= 2
        finally:
            worker.terminate()
            worker.wait(60)
    assert "Signal handler" not in log.read_text()


def described(incident: Incident) -> tuple[str | None, int, str]:
    """Return the problem, its occurrences and its status."""
    return incident.dedup_key, incident.occurrences, incident.incident_type.value

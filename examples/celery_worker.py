"""Record an incident when a Celery task fails, and end it when the task succeeds again.

Run it in a checkout, with a Redis:

.. code-block:: console

    $ python -m pip install . 'celery[redis]'
    $ cd examples
    $ celery -A celery_worker worker
    $ celery -A celery_worker call celery_worker.charge --args '[0]'
    $ incidentkit list
"""

import os
from typing import Any

from celery import Celery, signals

from incidentkit import NewIncident, SyncIncidentClient

app = Celery("celery_worker", broker=os.environ.get("BROKER_URL", "redis://localhost:6379/0"))
incidents = SyncIncidentClient.from_env()


@signals.worker_init.connect
def connect(**_: Any) -> None:
    """Open the client; each worker process opens its own connections at its first call."""
    incidents.connect()


@signals.task_failure.connect
def record(sender: Any, task_id: str, exception: Exception, **_: Any) -> None:
    """Record the failure once, even if Celery delivers the task again."""
    incidents.create(
        NewIncident.fitting(f"{sender.name}: {exception}", "monitoring", dedup_key=sender.name),
        idempotency_key=f"{task_id} failed",
    )


@signals.task_success.connect
def resolve(sender: Any, **_: Any) -> None:
    """End the incident of the task, if one is open."""
    incidents.resolve(sender.name)


@app.task
def charge(euros: int) -> None:
    """Charge a customer."""
    if euros <= 0:
        raise ValueError(f"{euros} euros cannot be charged")

"""Record incidents inside an asyncio program, in an SQLite file and without a server.

Run it in a checkout:

.. code-block:: console

    $ python -m pip install .
    $ python examples/embedded.py

It writes to `incidentkit.db` in the current folder; `incidentkit list` shows the incidents.
"""

import asyncio

from incidentkit import IncidentClient, IncidentSource, IncidentStatus, InvalidIncident

NEARLY_FULL = 90


async def check_disk(incidents: IncidentClient, host: str, used_percent: int) -> None:
    """Record an incident if the disk is nearly full."""
    if used_percent > NEARLY_FULL:
        await incidents.create(
            f"Disk of {host} is {used_percent} % full", source=IncidentSource.MONITORING
        )


async def main() -> None:
    """Check some disks, list the open incidents, and complete the newest."""
    async with IncidentClient.open("sqlite+aiosqlite:///incidentkit.db") as incidents:
        async with asyncio.TaskGroup() as checks:
            for host, used_percent in {"db-1": 97, "db-2": 41, "web-1": 93}.items():
                checks.create_task(check_disk(incidents, host, used_percent))

        for incident in await incidents.list(status="new", limit=5):
            print(incident.created_at, incident.source, incident.incident_message)

        newest, *_ = await incidents.list(limit=1)
        closed = await incidents.update_status(newest.incident_id, IncidentStatus.COMPLETED)
        print(f"Incident {closed.incident_id} is {closed.incident_type}")

        try:
            await incidents.create("null", source="partner", dedup_key="")
        except InvalidIncident as invalid:
            for error in invalid.errors:
                print(f"{error.field} {error.reason}")


asyncio.run(main())

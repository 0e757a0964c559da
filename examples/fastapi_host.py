"""Mount the incident service in a FastAPI application that also records incidents itself.

Run it in a checkout:

.. code-block:: console

    $ python -m pip install '.[all]' fastapi
    $ uvicorn --app-dir examples fastapi_host:app
    $ curl -X POST http://127.0.0.1:8000/orders/7/ship
    $ curl http://127.0.0.1:8000/incidents/incident/get

The application has its Swagger UI at `/docs`, the service at `/incidents/docs`.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException

from incidentkit import IncidentClient
from incidentkit.http import create_app
from incidentkit.http import lifespan as incidents_lifespan

incidents = IncidentClient.from_env()
service = create_app(incidents)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Open the client; FastAPI does not run the lifespan of a mounted application."""
    async with incidents_lifespan(service):
        yield


app = FastAPI(title="Shop", lifespan=lifespan)
app.mount("/incidents", service)


@app.post("/orders/{order_id}/ship")
async def ship(order_id: int) -> None:
    """Fail, and record an incident about the failure."""
    incident = await incidents.create(
        f"Order {order_id} could not be shipped", source="operator", incident_type="failed"
    )
    raise HTTPException(502, f"Not shipped, see incident {incident.incident_id}")

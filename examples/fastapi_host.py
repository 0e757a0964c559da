"""A FastAPI application that records incidents, with the incident service under `/incidents`.

Run it in a checkout:

.. code-block:: console

    $ python -m pip install . fastapi uvicorn
    $ uvicorn --app-dir examples fastapi_host:app
    $ curl -X POST http://127.0.0.1:8000/orders/7/lost
    $ curl http://127.0.0.1:8000/incidents/incident/get

The application has its Swagger UI at `/docs`, the service at `/incidents/docs`.
"""

from fastapi import FastAPI

from incidentkit import Incident, IncidentClient
from incidentkit.integrations.fastapi import Client, install

app = FastAPI(title="Shop")
install(app, IncidentClient.from_env(), path="/incidents")


@app.post("/orders/{order}/lost")
async def lost(order: int, incidents: Client) -> Incident:
    """Record an incident, and return it."""
    return await incidents.create(f"Order {order} is lost", source="operator")

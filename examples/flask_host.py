"""Record incidents in a Flask application.

Run it in a checkout:

.. code-block:: console

    $ python -m pip install . flask
    $ flask --app examples/flask_host.py run
    $ curl -X POST http://127.0.0.1:5000/orders/7/ship
    $ curl http://127.0.0.1:5000/incidents
"""

from typing import Any

from flask import Flask

from incidentkit.integrations.flask import IncidentKit

app = Flask(__name__)
incidents = IncidentKit(app)


@app.post("/orders/<int:order_id>/ship")
def ship(order_id: int) -> tuple[str, int]:
    """Fail, and record an incident about the failure."""
    incident = incidents.client.create(f"Order {order_id} could not be shipped", source="operator")
    return f"Not shipped, see incident {incident.incident_id}", 502


@app.get("/incidents")
def newest() -> list[dict[str, Any]]:
    """List the newest incidents."""
    return [incident.to_dict() for incident in incidents.client.list()]

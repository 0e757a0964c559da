"""Load the optional parts of the service, each only when an argument asks for it."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.applications import Starlette

from incidentkit.client import IncidentClient
from incidentkit.http.operation import Operation


def add_cors(app: Starlette, origins: Sequence[str]) -> None:
    """Let pages of other origins use the app in a browser.

    Raises:
        InvalidSettings: If one of them is not an origin.
    """
    from incidentkit.http.cors import allow_origins  # noqa: PLC0415

    allow_origins(app, origins)


def metrics_of(client: IncidentClient) -> tuple[Operation, ...]:
    """Return the operation that answers with the metrics of a client.

    Raises:
        InvalidSettings: If the client has no observer whose metrics can be scraped.
    """
    from incidentkit.http.metrics import METRICS, check_observer  # noqa: PLC0415

    check_observer(client)
    return METRICS

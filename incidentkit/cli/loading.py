"""Load the server when ``serve`` runs: other commands need neither Uvicorn nor Starlette."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from incidentkit.cli.listening import Address
from incidentkit.domain.errors import MissingDependency
from incidentkit.settings import Settings


def run_server(
    settings: Settings,
    address: Address,
    workers: int,
    *,
    metrics: bool,
    log_format: Literal["line", "json"],
) -> bool:
    """Run the REST service as :func:`incidentkit.cli.server.run` does.

    Raises:
        MissingDependency: If the extra ``server`` is not installed.
    """
    for package in ("starlette", "uvicorn", "httptools"):
        if find_spec(package) is None:
            raise MissingDependency(package, extra="server")
    if metrics and find_spec("prometheus_client") is None:
        raise MissingDependency("prometheus-client", extra="metrics")
    from incidentkit.cli import server  # noqa: PLC0415

    return server.run(settings, address, workers, metrics=metrics, log_format=log_format)

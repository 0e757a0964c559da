"""Load the server when ``serve`` runs: other commands need neither Uvicorn nor Starlette."""

from __future__ import annotations

from importlib.util import find_spec

from incidentkit.cli.listening import Address
from incidentkit.domain.errors import MissingDependency
from incidentkit.settings import Settings


def run_server(settings: Settings, address: Address, workers: int) -> bool:
    """Run the REST service as :func:`incidentkit.cli.server.run` does.

    Raises:
        MissingDependency: If the extra ``server`` is not installed.
    """
    for package in ("starlette", "uvicorn", "httptools"):
        if find_spec(package) is None:
            raise MissingDependency(package, extra="server")
    from incidentkit.cli import server  # noqa: PLC0415

    return server.run(settings, address, workers)

"""Load what only one command needs, when that command runs.

``incidentkit create`` loads neither Uvicorn and Starlette, which only ``serve`` needs, nor
Alembic, which only ``db`` needs.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Protocol

from incidentkit.domain.errors import MissingDependency
from incidentkit.settings import Settings


def run_server(settings: Settings, host: str, port: int, workers: int) -> bool:
    """Run the REST service as :func:`incidentkit.cli.server.run` does.

    Raises:
        MissingDependency: If the extra ``server`` is not installed.
    """
    for package in ("starlette", "uvicorn"):
        if find_spec(package) is None:
            raise MissingDependency(package, extra="server")
    from incidentkit.cli import server  # noqa: PLC0415

    return server.run(settings, host, port, workers)


class Migrations(Protocol):
    """The functions of :mod:`incidentkit.store.migrate`."""

    async def upgrade(self, database_url: str, revision: str = ...) -> None:
        """Bring the schema up to a revision."""

    async def downgrade(self, database_url: str, revision: str = ...) -> None:
        """Bring the schema down to a revision."""

    async def current(self, database_url: str) -> str | None:
        """Return the revision of the schema, or None if there is no schema."""
        ...

    async def check(self, database_url: str) -> None:
        """Raise unless the schema has the newest revision."""


def migrations() -> Migrations:
    """Return the module that migrates databases."""
    from incidentkit.store import migrate  # noqa: PLC0415

    return migrate

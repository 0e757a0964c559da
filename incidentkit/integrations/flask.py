"""A Flask extension that provides an application's client."""

from __future__ import annotations

from typing import Any, Final

from flask import Flask, current_app

from incidentkit.settings import Settings
from incidentkit.sync.client import SyncIncidentClient
from incidentkit.sync.joined import SyncJoinedIncidents

NAME: Final = "incidentkit"
"""The key of the extension in ``app.extensions``."""

_PREFIX: Final = "INCIDENTKIT_"


class IncidentKit:
    """Gives a Flask application a client, which opens when it is first used in each process.

    .. code-block:: python

        incidents = IncidentKit(app)
        incidents.client.create("Disk is full on db-1", source="monitoring")

    The settings come from the environment. Values in ``app.config`` whose names begin with
    ``INCIDENTKIT_`` override them. A ``.env`` file is read only if Flask has loaded it.

    Args:
        app: The application; None: call :meth:`init_app` later.
        client: A client of your own, for every application; None: make one from the settings.
    """

    def __init__(
        self, app: Flask | None = None, *, client: SyncIncidentClient | None = None
    ) -> None:
        self._given = client
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Register the extension, without connecting.

        Raises:
            InvalidSettings: With the setting and the rule that it breaks.
        """
        app.extensions[NAME] = self._given or _configured(app.config)

    @property
    def client(self) -> SyncIncidentClient:
        """The open client of the current application.

        Raises:
            RuntimeError: Outside of an application context, or without :meth:`init_app`.
        """
        client: SyncIncidentClient | None = current_app.extensions.get(NAME)
        if client is None:
            raise RuntimeError("The application has no incidentkit: call init_app(app) first")
        client.connect()
        return client

    def join(self, connection: Any) -> SyncJoinedIncidents:
        """Return the verbs in the transaction of a connection or a session, such as ``db.session``.

        Arguments and errors are those of :meth:`SyncIncidentClient.join`.
        """
        return self.client.join(connection)


def _configured(config: dict[str, Any]) -> SyncIncidentClient:
    overrides = {
        name: str(value)
        for name, value in config.items()
        if name.startswith(_PREFIX) and value is not None
    }
    return SyncIncidentClient.from_settings(Settings.from_env(None, overrides=overrides))

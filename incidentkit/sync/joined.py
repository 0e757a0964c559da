"""The verbs in a transaction of a synchronous application."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

import incidentkit.sync as lazily
from incidentkit.joined import JoinedIncidents
from incidentkit.sync.incidents import SyncIncidents

_T = TypeVar("_T")


class SyncJoinedIncidents(SyncIncidents):
    """The verbs in the application's transaction, as :meth:`SyncIncidentClient.join` returns them.

    Args:
        joined: The asynchronous verbs on a connection whose statements never suspend.
    """

    def __init__(self, joined: JoinedIncidents) -> None:
        self._joined = joined

    @property
    def _incidents(self) -> JoinedIncidents:
        return self._joined

    def _run(self, call: Coroutine[Any, Any, _T]) -> _T:
        return lazily.run_immediately(call)

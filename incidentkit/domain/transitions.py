"""The status graph: which changes of a status are allowed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final, TypeAlias

from incidentkit.domain.commands import StatusChange
from incidentkit.domain.errors import IllegalTransition, InvalidSettings, VersionConflict
from incidentkit.domain.values import Incident, IncidentStatus, has_version

Graph: TypeAlias = Mapping[Any, Collection[str]]
"""For each status, as a member or its value, the statuses that may follow it; a status that is not
listed is final."""


class Transitions:
    """The status graph of a client.

    Setting the status that an incident already has is always allowed, and changes nothing.

    Args:
        graph: For each status, as a member or its value, the statuses that may follow it. A status
            that is not listed is final. None allows every change.

    Raises:
        InvalidSettings: If the graph names an unknown status.
    """

    def __init__(self, graph: Graph | None = None) -> None:
        self._sources: dict[IncidentStatus, tuple[IncidentStatus, ...]] = {
            status: tuple(IncidentStatus) for status in IncidentStatus
        }
        if graph is not None:
            following = _read(graph)
            self._sources = {
                status: tuple(
                    source
                    for source in IncidentStatus
                    if source is status or status in following.get(source, ())
                )
                for status in IncidentStatus
            }

    def sources(self, status: IncidentStatus) -> tuple[IncidentStatus, ...]:
        """Return the statuses that a change to this one may start from."""
        return self._sources[status]

    def check(self, incident: Incident, change: StatusChange) -> bool:
        """Return whether the change, if allowed, alters the incident as it is now.

        Raises:
            VersionConflict: If the incident does not have the expected version.
            IllegalTransition: If the graph does not contain the change.
        """
        if not has_version(incident, change.expected_version):
            raise VersionConflict(incident)
        if incident.incident_type not in self.sources(change.status):
            raise IllegalTransition(incident, change.status)
        return incident.incident_type is not change.status


ANY_TRANSITION: Final = Transitions()


def _read(graph: object) -> dict[IncidentStatus, list[IncidentStatus]]:
    try:
        if not isinstance(graph, Mapping):
            raise TypeError  # noqa: TRY301
        return {
            IncidentStatus(status): [IncidentStatus(one) for one in _collection(following)]
            for status, following in graph.items()
        }
    except (TypeError, ValueError):
        reason = f"must map statuses to collections of statuses, of: {', '.join(IncidentStatus)}"
        raise InvalidSettings("transitions", reason) from None


def _collection(value: object) -> Collection[str]:
    if isinstance(value, str) or not isinstance(value, Collection):
        raise TypeError
    return value

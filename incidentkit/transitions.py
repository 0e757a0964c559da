"""Which changes of a status are allowed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from incidentkit.errors import IllegalTransition, InvalidSettings, VersionConflict
from incidentkit.models import IncidentStatus

if TYPE_CHECKING:
    from incidentkit.models import Incident, StatusChange

Graph: TypeAlias = Mapping[Any, Collection[str]]
"""For each status, member or value, those that may follow it; one that is missing is a last one."""


class Transitions:
    """The status graph of a client.

    To set the status that an incident has is no change, and always allowed.

    Args:
        graph: For each status, by value or member, those that may follow it. A status that is
            missing is a last one. None allows every change, as the origin does.

    Raises:
        InvalidSettings: If it names something that is no status.
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
        """Return the statuses from which this one may be set."""
        return self._sources[status]

    def check(self, incident: Incident, change: StatusChange) -> bool:
        """Return whether the change of the incident as it is changes anything, if it is allowed.

        Raises:
            VersionConflict: If the incident is not of the expected version.
            IllegalTransition: If the graph does not have it.
        """
        if change.expected_version not in (None, incident.version):
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

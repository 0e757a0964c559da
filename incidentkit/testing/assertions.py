"""Assert what was recorded.

Each function takes a synchronous or an asynchronous client. For an asynchronous one, it returns a
coroutine. A difference raises AssertionError, so the functions work in every test framework.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Final, TypeAlias, TypeVar, overload

from incidentkit.domain.errors import InvalidSettings
from incidentkit.domain.values import (
    MAX_LIMIT,
    EventKind,
    Incident,
    IncidentEvent,
    IncidentOrder,
    IncidentSource,
    IncidentStatus,
    SourceName,
    StatusName,
)
from incidentkit.incidents import Incidents
from incidentkit.sync.incidents import SyncIncidents
from incidentkit.testing.clients import check_verbs
from incidentkit.testing.matching import (
    DetailsMatcher,
    Expected,
    TextMatcher,
    check_history,
    check_none,
    check_opened,
)

IncidentList: TypeAlias = list[Incident]
EventList: TypeAlias = list[IncidentEvent]

_T = TypeVar("_T")

_ALL: Final[dict[str, Any]] = {
    "order": IncidentOrder.OLDEST,
    "batch": MAX_LIMIT,
    "details": True,
}


@overload
def all_incidents(incidents: SyncIncidents) -> IncidentList: ...


@overload
def all_incidents(incidents: Incidents) -> Coroutine[Any, Any, IncidentList]: ...


def all_incidents(
    incidents: SyncIncidents | Incidents,
) -> IncidentList | Coroutine[Any, Any, IncidentList]:
    """Return all incidents with their details, oldest first.

    Args:
        incidents: A client, or the verbs in a joined transaction. If they are asynchronous, await
            the result.
    """
    return _of_all(incidents, list, "all_incidents")


@overload
def assert_incident_opened(
    incidents: SyncIncidents,
    *,
    message: TextMatcher | None = None,
    source: IncidentSource | SourceName | None = None,
    dedup_key: TextMatcher | None = None,
    status: IncidentStatus | StatusName | None = None,
    occurrences: int | None = None,
    details: DetailsMatcher | None = None,
    count: int = 1,
) -> Incident: ...


@overload
def assert_incident_opened(
    incidents: Incidents,
    *,
    message: TextMatcher | None = None,
    source: IncidentSource | SourceName | None = None,
    dedup_key: TextMatcher | None = None,
    status: IncidentStatus | StatusName | None = None,
    occurrences: int | None = None,
    details: DetailsMatcher | None = None,
    count: int = 1,
) -> Coroutine[Any, Any, Incident]: ...


def assert_incident_opened(  # noqa: PLR0913
    incidents: SyncIncidents | Incidents,
    *,
    message: TextMatcher | None = None,
    source: IncidentSource | SourceName | None = None,
    dedup_key: TextMatcher | None = None,
    status: IncidentStatus | StatusName | None = None,
    occurrences: int | None = None,
    details: DetailsMatcher | None = None,
    count: int = 1,
) -> Incident | Coroutine[Any, Any, Incident]:
    """Assert that an incident with these fields exists, and return it.

    .. code-block:: python

        assert_incident_opened(incidents, message=re.compile("^Disk"), source="monitoring")

    Args:
        incidents: A client, or the verbs in a joined transaction. If they are asynchronous, await
            the result.
        message: The whole message, a pattern to find in it, or a function that accepts it. None:
            any message.
        source: Who reported it; None: anyone.
        dedup_key: The whole key, a pattern, or a function, which gets None for an incident without
            a key. None: any key, or none.
        status: Its current status; None: any status.
        occurrences: Number of reports; None: any number.
        details: Some of its details, each with its value, or a function, which gets None for an
            incident without details. None: any details, or none.
        count: Number of incidents that must match, at least 1.

    Returns:
        The oldest of them.

    Raises:
        AssertionError: If a different number of incidents match. It shows the nearest ones.
        InvalidIncident: If there is no such source or status.
        InvalidSettings: If ``count`` is below 1.
    """
    __tracebackhide__ = True
    if count < 1:
        raise InvalidSettings("count", "must be at least 1: use assert_no_incident to expect none")
    expected = Expected(message, source, dedup_key, status, occurrences, details)
    check = partial(check_opened, expected=expected, count=count)
    return _of_all(incidents, check, "assert_incident_opened")


@overload
def assert_no_incident(
    incidents: SyncIncidents,
    *,
    message: TextMatcher | None = None,
    source: IncidentSource | SourceName | None = None,
    dedup_key: TextMatcher | None = None,
    status: IncidentStatus | StatusName | None = None,
    occurrences: int | None = None,
    details: DetailsMatcher | None = None,
) -> None: ...


@overload
def assert_no_incident(
    incidents: Incidents,
    *,
    message: TextMatcher | None = None,
    source: IncidentSource | SourceName | None = None,
    dedup_key: TextMatcher | None = None,
    status: IncidentStatus | StatusName | None = None,
    occurrences: int | None = None,
    details: DetailsMatcher | None = None,
) -> Coroutine[Any, Any, None]: ...


def assert_no_incident(  # noqa: PLR0913
    incidents: SyncIncidents | Incidents,
    *,
    message: TextMatcher | None = None,
    source: IncidentSource | SourceName | None = None,
    dedup_key: TextMatcher | None = None,
    status: IncidentStatus | StatusName | None = None,
    occurrences: int | None = None,
    details: DetailsMatcher | None = None,
) -> Coroutine[Any, Any, None] | None:
    """Assert that no incident has these fields; without fields, that there are no incidents.

    The arguments are those of :func:`assert_incident_opened`.

    Raises:
        AssertionError: If an incident matches.
        InvalidIncident: If there is no such source or status.
    """
    __tracebackhide__ = True
    expected = Expected(message, source, dedup_key, status, occurrences, details)
    check = partial(check_none, expected=expected)
    return _of_all(incidents, check, "assert_no_incident")


@overload
def assert_history(
    incidents: SyncIncidents, incident: Incident | int, kinds: Sequence[EventKind | str]
) -> EventList: ...


@overload
def assert_history(
    incidents: Incidents, incident: Incident | int, kinds: Sequence[EventKind | str]
) -> Coroutine[Any, Any, EventList]: ...


def assert_history(
    incidents: SyncIncidents | Incidents,
    incident: Incident | int,
    kinds: Sequence[EventKind | str],
) -> EventList | Coroutine[Any, Any, EventList]:
    """Assert that the history of an incident has events of these kinds, and return them.

    .. code-block:: python

        assert_history(incidents, incident, ["created", "status_changed"])

    Args:
        incidents: A client, or the verbs in a joined transaction. If they are asynchronous, await
            the result.
        incident: The incident, or its id.
        kinds: The kinds of all its events, oldest first.

    Raises:
        AssertionError: If the history differs.
        IncidentNotFound: If there is no such incident.
    """
    __tracebackhide__ = True
    incident_id = incident.incident_id if isinstance(incident, Incident) else incident
    expected = [EventKind(kind).value for kind in kinds]
    check_verbs(incidents)

    def checked(events: EventList) -> EventList:
        __tracebackhide__ = True
        check_history(incident_id, events, expected)
        return events

    if isinstance(incidents, SyncIncidents):
        return checked(incidents.history(incident_id))

    async def awaited() -> EventList:
        __tracebackhide__ = True
        return checked(await incidents.history(incident_id))

    awaited.__qualname__ = "assert_history"
    return awaited()


def _of_all(
    incidents: SyncIncidents | Incidents, check: Callable[[IncidentList], _T], name: str
) -> _T | Coroutine[Any, Any, _T]:
    """Read all incidents and return the result of a check, or a coroutine that does so.

    Args:
        incidents: The verbs.
        check: Takes the incidents, oldest first.
        name: The name of the coroutine in Python's warning if it is never awaited.
    """
    __tracebackhide__ = True
    # For anything else, a synchronous test would get a coroutine, and pass.
    check_verbs(incidents)
    if isinstance(incidents, SyncIncidents):
        return check([*incidents.iterate(**_ALL)])

    async def awaited() -> _T:
        __tracebackhide__ = True
        return check([incident async for incident in incidents.iterate(**_ALL)])

    awaited.__qualname__ = name
    return awaited()

"""The types of the test kit's functions, and the calls that a type checker must reject."""
# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

import re
from typing import TYPE_CHECKING, assert_type

from incidentkit import Incident, IncidentClient, IncidentEvent, StoreUnavailable
from incidentkit.testing import (
    all_incidents,
    assert_history,
    assert_incident_opened,
    assert_no_incident,
    failing,
    recording,
)

if TYPE_CHECKING:
    from incidentkit import SyncIncidentClient, SyncJoinedIncidents


def synchronous(incidents: SyncIncidentClient, joined: SyncJoinedIncidents) -> None:
    """On synchronous verbs, a function returns its result."""
    incident = assert_incident_opened(incidents, message=re.compile("Disk"), source="partner")
    assert_type(incident, Incident)
    assert_type(assert_history(incidents, incident, ["created"]), list[IncidentEvent])
    assert_type(all_incidents(joined), list[Incident])
    assert_no_incident(joined, message=str.isascii, details={"disk": 1})
    assert_incident_opened(incidents, source="me")  # type: ignore[call-overload]
    assert_incident_opened(incidents, "Disk is full")  # type: ignore[call-overload]


async def asynchronous(async_incidents: IncidentClient) -> None:
    """On asynchronous verbs, a function is awaited, and a checker sees it if it is not."""
    incident = await assert_incident_opened(async_incidents, message="Disk is full")
    assert_type(incident, Incident)
    assert_type(await all_incidents(async_incidents), list[Incident])
    assert_type(await assert_history(async_incidents, 7, ["created"]), list[IncidentEvent])
    assert_no_incident(async_incidents)  # type: ignore[unused-coroutine]


def blocks(client: IncidentClient) -> None:
    """The blocks take any client."""
    with recording(client) as recorded, failing(client, StoreUnavailable, times=2) as failures:
        assert_type(recorded.list(), list[Incident])
        assert_type(failures.count, int)

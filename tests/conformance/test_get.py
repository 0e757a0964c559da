"""Reading one incident."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from incidentkit import IncidentNotFound
from tests.conformance.refusals import refused

if TYPE_CHECKING:
    from tests.conformance.embodiments import Verbs

NO_IDS = (0, -1, 2**63, 10**4000, True, "1", 1.0, None)


async def test_it_returns_the_current_incident(incidents: Verbs) -> None:
    """`get` returns the incident as the last change left it."""
    first = await incidents.create("Disk is full", source="monitoring", dedup_key="disk")
    second = await incidents.create("Line is down", source="partner")
    for change in (
        incidents.create("Disk is full", source="monitoring", dedup_key="disk"),
        incidents.update_status(first.incident_id, "failed"),
        incidents.update_status(first.incident_id, "new"),
    ):
        changed = await change
        assert await incidents.get(first.incident_id) == changed
    assert await incidents.get(second.incident_id) == second


async def test_an_unknown_id_is_not_found(incidents: Verbs) -> None:
    """An unknown id, even the largest, raises IncidentNotFound with that id."""
    for incident_id in (1, 2**63 - 1):
        with pytest.raises(IncidentNotFound, match=f"Incident {incident_id} not found") as caught:
            await incidents.get(incident_id)
        assert caught.value.incident_id == incident_id


async def test_invalid_ids_are_refused(incidents: Verbs) -> None:
    """An id is an integer from 1 to 2^63-1."""
    for wrong in NO_IDS:
        assert await refused(incidents.get(wrong)) == ["incident_id"]  # type: ignore[arg-type]

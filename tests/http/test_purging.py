"""An administrator removes old incidents over HTTP."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

from incidentkit import IncidentClient, IncidentSource, IncidentStatus, NewIncident, Scope
from incidentkit.http.authentication import TokenAuth
from incidentkit.http.purging import purge_for
from tests.http.conftest import MEMORY, service_on

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

LATER = "2100-01-01 00:00:00"


@pytest.fixture
async def incidents(migrated_sqlite_url: str) -> AsyncIterator[IncidentClient]:
    """A client with three incidents that have ended, and one that has not."""
    async with IncidentClient.open(migrated_sqlite_url) as client:
        for status in ("completed", "failed", "completed", "new"):
            await client.create("Disk is full", source="monitoring", incident_type=status)
        yield client


@pytest.fixture
async def api(incidents: IncidentClient) -> AsyncIterator[httpx2.AsyncClient]:
    """The service, called by an administrator."""
    app = service_on(incidents, authenticate=TokenAuth(incidents))
    created = await incidents.tokens.create("janitor", [Scope.ADMIN])
    headers = {"Authorization": f"Bearer {created.secret}"}
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(
        transport=transport, base_url="http://test", headers=headers
    ) as client:
        yield client


async def test_a_purge_removes_what_has_ended(
    api: httpx2.AsyncClient, incidents: IncidentClient
) -> None:
    """A dry run counts, a purge removes and names its actor, a second one finds nothing."""
    before = {"ended_before": LATER}
    counted = await api.post("/incident/purge", params={**before, "dry_run": "true"})
    assert counted.json() == {"purged": 0, "left": 3}
    assert len(await incidents.list()) == 4
    done = await api.post("/incident/purge", params=before)
    assert (done.status_code, done.json()) == (200, {"purged": 3, "left": 0})
    assert [incident.incident_id for incident in await incidents.list()] == [4]
    assert [event.actor for event in await incidents.history(1)] == ["janitor"]
    assert (await api.post("/incident/purge", params=before)).json() == {"purged": 0, "left": 0}


async def test_a_request_ends_in_time_and_says_what_is_left(incidents: IncidentClient) -> None:
    """A purge that takes longer stops after a batch, and the next request goes on."""
    ended = NewIncident("Disk is full", IncidentSource.PARTNER, IncidentStatus.FAILED)
    await incidents.create_many([ended] * 600)
    soon = datetime.now(UTC) + timedelta(days=1)
    first = await purge_for(incidents, soon, seconds=0)
    assert (first.purged, first.left) == (500, 103)
    second = await purge_for(incidents, soon)
    assert (second.purged, second.left) == (103, 0)


@pytest.mark.parametrize(
    ("query", "faulty"),
    [
        ({}, {"ended_before"}),
        ({"ended_before": "yesterday", "dry_run": "1"}, {"ended_before", "dry_run"}),
        ({"ended_before": LATER, "all": "true"}, {"all"}),
    ],
)
async def test_a_faulty_purge_removes_nothing(
    api: httpx2.AsyncClient, incidents: IncidentClient, query: dict[str, str], faulty: set[str]
) -> None:
    """A purge without a time, or with anything unknown, is refused with every fault."""
    refused = await api.post("/incident/purge", params=query)
    assert refused.status_code == 422
    assert {error["field"] for error in refused.json()["errors"]} == faulty
    assert len(await incidents.list()) == 4


async def test_a_service_that_checks_no_tokens_cannot_purge() -> None:
    """Without `authenticate`, there is no such path, in the OpenAPI document either."""
    transport = httpx2.ASGITransport(service_on(IncidentClient.open(MEMORY)))
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        answer: Any = await client.post("/incident/purge", params={"ended_before": LATER})
        assert (answer.status_code, answer.json()["code"]) == (404, "unknown_path")
        document = (await client.get("/openapi.json")).json()
    assert "/incident/purge" not in document["paths"]

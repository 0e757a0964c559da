"""The status graph of a client."""

from __future__ import annotations

import asyncio
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incidentkit import (
    IllegalTransition,
    IncidentClient,
    IncidentStatus,
    InvalidSettings,
    VersionConflict,
)
from incidentkit.domain.transitions import Transitions
from incidentkit.settings import Settings
from tests.strategies import statuses

if TYPE_CHECKING:
    from incidentkit.domain.transitions import Graph

ONE_WAY: Graph = {"new": {"completed", "failed"}, "failed": ["new"]}

graphs = st.dictionaries(statuses, st.sets(statuses))


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    """The URL of each database, migrated or about to be."""
    name = {"sqlite": "sqlite_url", "postgresql": "migrated_postgres_url"}[request.param]
    return str(request.getfixturevalue(name))


@given(graphs)
def test_a_status_is_reached_from_those_that_the_graph_names(
    graph: dict[IncidentStatus, set[IncidentStatus]],
) -> None:
    """A pair is allowed exactly if the graph has it, or both statuses are the same."""
    transitions = Transitions(graph)
    for before, after in product(IncidentStatus, repeat=2):
        allowed = before is after or after in graph.get(before, ())
        assert (before in transitions.sources(after)) == allowed


async def test_what_the_graph_lacks_is_refused(url: str) -> None:
    """An illegal change does nothing, and names both statuses; a legal one happens."""
    async with IncidentClient.open(url, transitions=ONE_WAY) as incidents:
        incident = await incidents.create("Disk is full", source="monitoring")
        done = await incidents.update_status(incident.incident_id, "completed")
        for status in ("new", "failed"):
            with pytest.raises(IllegalTransition) as caught:
                await incidents.update_status(incident.incident_id, status, note="Never mind")
            assert caught.value.incident == done
            assert caught.value.to_status == status
        assert await incidents.update_status(incident.incident_id, "completed") == done
        assert len(await incidents.history(incident.incident_id)) == 2
        other = await incidents.create("Line is down", source="partner", incident_type="failed")
        assert (await incidents.update_status(other.incident_id, "new")).version == 2


async def test_the_version_is_looked_at_first(url: str) -> None:
    """A wrong version is reported before a change that is not allowed."""
    async with IncidentClient.open(url, transitions={}) as incidents:
        incident = await incidents.create("Disk is full", source="monitoring")
        with pytest.raises(VersionConflict):
            await incidents.update_status(incident.incident_id, "failed", expected_version=9)


async def test_a_graph_is_the_clients_own(url: str) -> None:
    """Without a graph every change is allowed, as the origin allows it."""
    async with IncidentClient.open(url) as incidents:
        incident = await incidents.create("Disk is full", source="monitoring")
        for before, after in product(IncidentStatus, repeat=2):
            await incidents.update_status(incident.incident_id, before)
            changed = await incidents.update_status(incident.incident_id, after)
            assert changed.incident_type is after


async def test_racing_changes_keep_to_the_graph(url: str) -> None:
    """Concurrent changes take only steps of the graph."""
    async with IncidentClient.open(url, transitions=ONE_WAY) as incidents:
        incident = await incidents.create("Disk is full", source="monitoring")
        calls = [
            incidents.update_status(incident.incident_id, status)
            for status in ("failed", "new", "failed", "completed") * 5
        ]
        await asyncio.gather(*calls, return_exceptions=True)
        for event in (await incidents.history(incident.incident_id))[1:]:
            assert event.from_status is not None
            assert event.to_status in ONE_WAY[event.from_status]


@pytest.mark.parametrize(
    "graph",
    [
        {"new": {"done"}},
        {"open": {"new"}},
        {"new": "completed"},
        {"new": None},
        ["new"],
        "new",
        {1: ["new"]},
    ],
)
def test_a_faulty_graph_is_refused(graph: Any) -> None:
    """A graph maps statuses to collections of statuses."""
    with pytest.raises(InvalidSettings) as caught:
        IncidentClient.open("sqlite://", transitions=graph)
    assert caught.value.name == "transitions"


def test_the_environment_has_pairs() -> None:
    """INCIDENTKIT_TRANSITIONS lists the pairs that are allowed."""
    settings = Settings.from_mapping(
        {"INCIDENTKIT_TRANSITIONS": "new:completed, new:failed,failed:new"}
    )
    assert settings.transitions == {"new": ["completed", "failed"], "failed": ["new"]}
    assert Settings.from_mapping({}).transitions is None


@pytest.mark.parametrize("value", ["new", "new:done", "new>failed", ":", ",", "new:failed,"])
def test_faulty_pairs_are_refused(value: str) -> None:
    """The error names the variable and its rule."""
    with pytest.raises(InvalidSettings, match="must be pairs such as new:completed") as caught:
        Settings.from_mapping({"INCIDENTKIT_TRANSITIONS": value})
    assert caught.value.name == "INCIDENTKIT_TRANSITIONS"

"""The status graph of a client."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incidentkit import (
    IncidentClient,
    IncidentStatus,
    InvalidSettings,
)
from incidentkit.domain.transitions import Transitions
from incidentkit.settings import Settings
from tests.strategies import statuses

graphs = st.dictionaries(statuses, st.sets(statuses))


@given(graphs)
def test_a_status_is_reached_from_those_that_the_graph_names(
    graph: dict[IncidentStatus, set[IncidentStatus]],
) -> None:
    """A pair is allowed exactly when the graph has it or both statuses are the same."""
    transitions = Transitions(graph)
    for before, after in product(IncidentStatus, repeat=2):
        allowed = before is after or after in graph.get(before, ())
        assert (before in transitions.sources(after)) == allowed


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
    """A graph that does not map statuses to collections of statuses is refused."""
    with pytest.raises(InvalidSettings) as caught:
        IncidentClient.open("sqlite+aiosqlite:///:memory:", transitions=graph)
    assert caught.value.name == "transitions"


def test_the_environment_has_pairs() -> None:
    """INCIDENTKIT_TRANSITIONS lists the allowed pairs."""
    settings = Settings.from_mapping(
        {"INCIDENTKIT_TRANSITIONS": "new:completed, new:failed,failed:new"}
    )
    assert settings.transitions == {"new": ["completed", "failed"], "failed": ["new"]}
    assert Settings.from_mapping({}).transitions is None


@pytest.mark.parametrize("value", ["new", "new:done", "new>failed", ":", ",", "new:failed,"])
def test_faulty_pairs_are_refused(value: str) -> None:
    """The error names the variable and shows the expected form."""
    with pytest.raises(InvalidSettings, match="must be pairs such as new:completed") as caught:
        Settings.from_mapping({"INCIDENTKIT_TRANSITIONS": value})
    assert caught.value.name == "INCIDENTKIT_TRANSITIONS"

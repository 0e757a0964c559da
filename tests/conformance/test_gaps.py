"""The embodiments and their declared gaps."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import TYPE_CHECKING

import pytest

from incidentkit import IncidentClient
from tests import conformance
from tests.conformance.embodiments import EMBODIMENTS
from tests.conformance.gaps import GAPS, Need, gaps_of

if TYPE_CHECKING:
    from tests.conformance.embodiments import Verbs

COMMON = (
    "create",
    "create_many",
    "update_status",
    "note",
    "list",
    "get",
    "search",
    "iterate",
    "history",
)
"""The verbs that every embodiment has."""

FURTHER = {
    "list_json": Need.LIST_JSON,
    "changes": Need.CHANGES,
    "read_changes": Need.CHANGES,
    "purge": Need.PURGE,
    "purgeable": Need.PURGE,
}
"""The verbs that some embodiments lack."""


async def test_verbs_have_the_signatures_of_the_client(
    incidents: Verbs, request: pytest.FixtureRequest
) -> None:
    """Names, kinds and defaults of parameters are the same on each embodiment."""
    embodiment = request.node.callspec.params["embodiment"]
    lacking = {verb for verb, need in FURTHER.items() if gaps_of(embodiment, {need})}
    assert {verb for verb in (*COMMON, *FURTHER) if not hasattr(incidents, verb)} == lacking
    for verb in {*COMMON, *FURTHER} - lacking:
        expected = inspect.signature(getattr(IncidentClient, verb)).parameters.values()
        found = inspect.signature(getattr(incidents, verb)).parameters.values()
        assert [(one.name, one.kind, one.default) for one in found] == [
            (one.name, one.kind, one.default) for one in expected if one.name != "self"
        ], verb


def test_each_gap_is_tested() -> None:
    """Each declared gap names existing embodiments and a need that some test has."""
    needed: set[Need] = set()
    for module in pkgutil.iter_modules(conformance.__path__, "tests.conformance."):
        loaded = importlib.import_module(module.name)
        for part in (loaded, *vars(loaded).values()):
            marks = getattr(part, "pytestmark", [])
            for mark in marks if isinstance(marks, list) else [marks]:
                needed |= {*mark.args} if mark.name == "needs" else set()
    assert needed == {*Need}
    assert {gap.need for gap in GAPS} == needed
    assert {name for gap in GAPS for name in gap.embodiments} <= EMBODIMENTS.keys()

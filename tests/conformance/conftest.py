"""Fixtures of the conformance suite."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.conformance.embodiments import EMBODIMENTS
from tests.conformance.gaps import expected_failure, gaps_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.conformance.embodiments import Embodiment, Verbs


def pytest_itemcollected(item: pytest.Item) -> None:
    """Expect the test of a declared gap to fail with the declared error."""
    if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
        return
    needed = {need for mark in item.iter_markers("needs") for need in mark.args}
    gaps = gaps_of(str(item.callspec.params.get("embodiment")), needed)
    if gaps:
        item.add_marker(expected_failure(gaps))


@pytest.fixture(params=EMBODIMENTS)
def embodiment(request: pytest.FixtureRequest) -> Embodiment:
    """Each embodiment, on an empty database."""
    setup = EMBODIMENTS[request.param]
    return setup.embodiment(*map(request.getfixturevalue, setup.fixtures))


@pytest.fixture
async def incidents(embodiment: Embodiment) -> AsyncIterator[Verbs]:
    """The verbs on an empty database."""
    async with embodiment.open() as verbs:
        yield verbs


@pytest.fixture
async def other(incidents: Verbs, embodiment: Embodiment) -> AsyncIterator[Verbs]:  # noqa: ARG001
    """The verbs of a second client on the same database."""
    async with embodiment.open() as verbs:
        yield verbs

"""Calls that are refused for invalid arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from incidentkit import InvalidIncident

if TYPE_CHECKING:
    from collections.abc import Awaitable


async def refused(call: Awaitable[object]) -> list[str]:
    """Await a call that must be refused, and return the fields that its error names."""
    with pytest.raises(InvalidIncident) as caught:
        await call
    return [error.field for error in caught.value.errors]

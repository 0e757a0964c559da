"""Running calls concurrently."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable

_T = TypeVar("_T")


async def run_all(*calls: Awaitable[_T]) -> list[_T]:
    """Run calls concurrently to completion and return their results, or raise the first error.

    Unlike `asyncio.gather`, it leaves no call running after an error.
    """
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]

"""Retries after a commit whose response was lost, and after a cancellation."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from incidentkit import (
    IncidentClient,
    StoreUnavailable,
)


async def test_a_commit_whose_answer_was_lost_is_repeated_without_a_duplicate(
    migrated_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the connection dies after the commit, a retry returns the first attempt's incident."""
    async with IncidentClient.open(migrated_postgres_url) as incidents:
        store: Any = incidents.store
        executor = store._connections
        transact, lost = executor.transact, 0

        async def lose_the_answer(*arguments: Any, **options: Any) -> Any:
            nonlocal lost
            await transact(*arguments, **options)
            lost += 1
            raise StoreUnavailable("the connection was lost")

        with monkeypatch.context() as patch:
            patch.setattr(executor, "transact", lose_the_answer)
            with pytest.raises(StoreUnavailable):
                await incidents.create("Disk is full", source="monitoring", idempotency_key="k")
        assert lost == 1
        incident = await incidents.create("Disk is full", source="monitoring", idempotency_key="k")
        assert await incidents.list() == [incident]


async def test_a_cancelled_create_can_be_repeated(incidents: IncidentClient) -> None:
    """Wherever a create is cancelled, a retry with the same key leaves one incident."""
    for step in range(12):
        key = f"step {step}"
        task = asyncio.ensure_future(
            incidents.create("Disk is full", source="monitoring", idempotency_key=key)
        )
        for _ in range(step):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await incidents.create("Disk is full", source="monitoring", idempotency_key=key)
    assert len(await incidents.list(limit=100)) == 12

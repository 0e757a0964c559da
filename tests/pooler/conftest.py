"""Poolers in front of the PostgreSQL server of this run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.servers import PgBouncer

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZES = {"transaction": 2, "session": 50, "statement": 2}
"""Server connections in each mode. In session mode, each client connection needs one."""


def _pooler(mode: Any) -> Any:
    @pytest.fixture(scope="session", name=f"{mode}_pooler")
    def pooler(postgres_server_url: str) -> Iterator[PgBouncer]:
        with PgBouncer(postgres_server_url, mode=mode, size=SIZES[mode]) as started:
            yield started

    return pooler


transaction_pooler = _pooler("transaction")
session_pooler = _pooler("session")
statement_pooler = _pooler("statement")


@pytest.fixture(scope="session")
def renaming_pooler(postgres_server_url: str) -> Iterator[PgBouncer]:
    """A pooler in transaction mode that names prepared statements itself, if it can."""
    with PgBouncer(postgres_server_url, renames=True) as started:
        yield started


@pytest.fixture(params=["transaction", "session"])
def pooler(request: pytest.FixtureRequest) -> PgBouncer:
    """A pooler in each mode that works."""
    found: PgBouncer = request.getfixturevalue(f"{request.param}_pooler")
    return found


@pytest.fixture
def pooled_url(transaction_pooler: PgBouncer, migrated_postgres_url: str) -> str:
    """The URL of an empty database through a pooler in transaction mode."""
    return transaction_pooler.through(migrated_postgres_url)

"""Define the fixtures that pytest finds automatically.

pytest loads this module in every test run of a project that has incidentkit installed, so it
imports nothing but pytest. A fixture loads what it needs when a test asks for it.
"""

from __future__ import annotations

import pytest

import incidentkit.testing as kit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from incidentkit.client import IncidentClient
    from incidentkit.sync.client import SyncIncidentClient
    from incidentkit.testing.database import PrivateDatabase


@pytest.fixture
def _incidentkit_database() -> Iterator[PrivateDatabase]:
    """The database of the test, which its clients share."""
    with kit.PrivateDatabase() as database:
        yield database


@pytest.fixture
def incidents(_incidentkit_database: PrivateDatabase) -> Iterator[SyncIncidentClient]:
    """An open synchronous client on a private database in memory."""
    with kit.private_incidents(_incidentkit_database) as client:
        yield client


@pytest.fixture
def async_incidents(_incidentkit_database: PrivateDatabase) -> Iterator[IncidentClient]:
    """An asynchronous client on a private database in memory; it opens itself at the first call.

    It needs no plugin for asynchronous fixtures, and works on the event loop that first uses it.
    """
    with kit.private_async_incidents(_incidentkit_database) as client:
        yield client


@pytest.fixture
def incidentkit_url(tmp_path: Path) -> str:
    """The URL of a private SQLite file with the current schema, for programs that open clients."""
    return kit.private_url(tmp_path / "incidentkit.db")

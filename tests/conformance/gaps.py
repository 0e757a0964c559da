"""Gaps: everything that an embodiment cannot do, declared in one list with the reason.

The tests of a gap still run and must fail with the declared error. If a declared gap works, the
suite fails: remove its declaration.
"""

from __future__ import annotations

from enum import StrEnum, auto

import django.db
import psycopg
import pytest
from asyncpg import PostgresError
from attrs import frozen
from sqlalchemy.exc import DBAPIError, OperationalError

from incidentkit import InvalidIncident, NeedsDatabase, PartlyStored, StoreError, UnknownCursor
from tests.conformance.embodiments import EMBODIMENTS, ON_POSTGRES


class Need(StrEnum):
    """A capability that a test needs and that some embodiments lack."""

    LIST_JSON = auto()
    CHANGES = auto()
    PURGE = auto()
    TOKENS = auto()
    MANY = auto()
    """More than a thousand incidents in one transaction."""
    ONE_KEY = auto()
    """One idempotency key for all batches of `create_many` together."""
    BATCHES = auto()
    """Several transactions for one call of `create_many`."""
    OTHER_CLIENT = auto()
    """A second client that sees the first one's writes and writes concurrently."""
    OUTSIDE_SQL = auto()
    """Another program that reads and writes the tables."""
    GOING_ON = auto()
    """The ability to continue after the database has rejected a statement."""


def needs(*needs: Need) -> pytest.MarkDecorator:
    """Return the mark of a test that needs more than the common verbs."""
    return pytest.mark.needs(*needs)


@frozen
class Gap:
    """A capability that some embodiments lack.

    Attributes:
        embodiments: Their names.
        need: What they lack.
        raises: The error of a test that needs it.
        reason: Why they lack it.
    """

    embodiments: tuple[str, ...]
    need: Need
    raises: pytest.RaisesExc[Exception]
    reason: str


REMOTE = tuple(name for name in EMBODIMENTS if name.startswith("remote"))
JOINED = tuple(name for name in EMBODIMENTS if name.startswith("joined"))
JOINED_ON_POSTGRES = tuple(name for name in JOINED if name in ON_POSTGRES)


def _no_verb(*names: str) -> pytest.RaisesExc[Exception]:
    return pytest.RaisesExc(AttributeError, match=f"no attribute '({'|'.join(names)})'")


GAPS = (
    Gap(
        JOINED,
        Need.LIST_JSON,
        _no_verb("list_json"),
        "list_json serves cached pages, and a joined transaction never reads a cache",
    ),
    Gap(
        JOINED,
        Need.CHANGES,
        _no_verb("changes", "read_changes"),
        "a change gets its place in the feed at the commit",
    ),
    Gap(
        JOINED,
        Need.PURGE,
        _no_verb("purge", "purgeable"),
        "purge commits batch by batch, and only the host may commit",
    ),
    Gap(
        JOINED,
        Need.TOKENS,
        _no_verb("tokens"),
        "a token is for a service of its own, and is no part of a host's transaction",
    ),
    Gap(
        REMOTE,
        Need.TOKENS,
        pytest.RaisesExc(NeedsDatabase, match="no operation for tokens"),
        "whoever may use a service must not create tokens for it",
    ),
    Gap(
        REMOTE,
        Need.MANY,
        pytest.RaisesExc(InvalidIncident, match="must be at most 1000 in one request"),
        "a service bounds what one request may cost it",
    ),
    Gap(
        REMOTE,
        Need.ONE_KEY,
        pytest.RaisesExc(PartlyStored, match="was used with other parameters"),
        "a service gets one batch after the other, and compares each by itself",
    ),
    Gap(
        JOINED,
        Need.BATCHES,
        pytest.RaisesExc(InvalidIncident, match="batch must be None in a joined transaction"),
        "only the host may commit",
    ),
    Gap(
        JOINED,
        Need.OTHER_CLIENT,
        pytest.RaisesExc((AssertionError, StoreError)),
        "before the commit, another client sees nothing and waits for locks",
    ),
    Gap(
        ("sqlite-memory",),
        Need.OTHER_CLIENT,
        pytest.RaisesExc((AssertionError, UnknownCursor)),
        "each in-memory client has its own database",
    ),
    Gap(
        ("sqlite-memory",),
        Need.OUTSIDE_SQL,
        pytest.RaisesExc(OperationalError, match="no such table"),
        "no other program can open an in-memory database",
    ),
    Gap(
        JOINED_ON_POSTGRES,
        Need.GOING_ON,
        pytest.RaisesExc(
            (DBAPIError, PostgresError, psycopg.Error, django.db.Error),
            match="current transaction is aborted",
        ),
        "on PostgreSQL, a failed statement aborts the transaction",
    ),
)
"""All gaps."""


def gaps_of(embodiment: str, needed: set[Need]) -> list[Gap]:
    """Return the gaps that a test of an embodiment meets."""
    return [gap for gap in GAPS if embodiment in gap.embodiments and gap.need in needed]


def expected_failure(gaps: list[Gap]) -> pytest.MarkDecorator:
    """Return the mark of a test that must fail with the error of one of these gaps."""
    return pytest.mark.xfail(
        raises=pytest.RaisesExc(check=lambda error: any(gap.raises.matches(error) for gap in gaps)),
        reason=", and ".join(gap.reason for gap in gaps),
        strict=True,
    )

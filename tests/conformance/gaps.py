"""What an embodiment cannot do, declared once, with the reason.

A test of a declared gap runs all the same: it has to fail, with the error that is declared. A gap
that works fails the suite, until its declaration is removed.
"""

from __future__ import annotations

from enum import StrEnum, auto

import pytest
from asyncpg import PostgresError
from attrs import frozen
from sqlalchemy.exc import DBAPIError, OperationalError

from incidentkit import StoreError, UnknownCursor
from tests.conformance.embodiments import EMBODIMENTS


class Need(StrEnum):
    """What a test asks of an embodiment beyond the common verbs."""

    LIST_JSON = auto()
    CHANGES = auto()
    PURGE = auto()
    OTHER_CLIENT = auto()
    """A second client that sees what the first one does, and writes at the same time."""
    OUTSIDE_SQL = auto()
    """Another program that writes to the tables."""
    GOING_ON = auto()
    """To go on after the database has refused a statement."""


def needs(*needs: Need) -> pytest.MarkDecorator:
    """Return the mark of a test that asks for more than the common verbs."""
    return pytest.mark.needs(*needs)


@frozen
class Gap:
    """Something that embodiments cannot do.

    Attributes:
        embodiments: Their names.
        need: What they lack.
        raises: What happens if it is tried.
        reason: Why that is so.
    """

    embodiments: tuple[str, ...]
    need: Need
    raises: pytest.RaisesExc[Exception]
    reason: str


JOINED = tuple(name for name in EMBODIMENTS if name.startswith("joined"))
JOINED_ON_POSTGRES = tuple(name for name in JOINED if not name.startswith("joined-sqlite"))


def _no_verb(*names: str) -> pytest.RaisesExc[Exception]:
    return pytest.RaisesExc(AttributeError, match=f"no attribute '({'|'.join(names)})'")


GAPS = (
    Gap(
        JOINED,
        Need.LIST_JSON,
        _no_verb("list_json"),
        "it serves pages from the cache, and a transaction reads none",
    ),
    Gap(
        JOINED,
        Need.CHANGES,
        _no_verb("changes", "read_changes"),
        "a change has its place in the feed only once it is committed",
    ),
    Gap(
        JOINED,
        Need.PURGE,
        _no_verb("purge"),
        "it commits batch by batch, and the transaction is the host's",
    ),
    Gap(
        JOINED,
        Need.OTHER_CLIENT,
        pytest.RaisesExc((AssertionError, StoreError)),
        "another client sees nothing before the commit, and waits for its locks",
    ),
    Gap(
        ("sqlite-memory",),
        Need.OTHER_CLIENT,
        pytest.RaisesExc((AssertionError, UnknownCursor)),
        "another client has a database of its own",
    ),
    Gap(
        ("sqlite-memory",),
        Need.OUTSIDE_SQL,
        pytest.RaisesExc(OperationalError, match="no such table"),
        "no other program reaches the database",
    ),
    Gap(
        JOINED_ON_POSTGRES,
        Need.GOING_ON,
        pytest.RaisesExc((DBAPIError, PostgresError), match="current transaction is aborted"),
        "a statement that fails ends a transaction of PostgreSQL",
    ),
)
"""All gaps."""


def gaps_of(embodiment: str, needed: set[Need]) -> list[Gap]:
    """Return the gaps that a test of an embodiment meets."""
    return [gap for gap in GAPS if embodiment in gap.embodiments and gap.need in needed]


def expected_failure(gaps: list[Gap]) -> pytest.MarkDecorator:
    """Return the mark of a test that has to fail, with what one of these gaps raises."""
    return pytest.mark.xfail(
        raises=pytest.RaisesExc(check=lambda error: any(gap.raises.matches(error) for gap in gaps)),
        reason=", and ".join(gap.reason for gap in gaps),
        strict=True,
    )

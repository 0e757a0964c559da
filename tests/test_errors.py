"""The exception hierarchy, and the attributes of each error."""

from __future__ import annotations

import copy
import pickle
import re
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import incidentkit.domain.errors
from incidentkit import (
    AccessDenied,
    CacheUnavailable,
    ClientClosed,
    DuplicateOpenIncident,
    FieldError,
    IdempotencyKeyReused,
    IllegalTransition,
    Incident,
    IncidentConflict,
    IncidentKitError,
    IncidentNotFound,
    IncidentSource,
    IncidentStatus,
    InvalidIncident,
    InvalidSettings,
    ListQuery,
    MissingDependency,
    NeedsDatabase,
    NewIncident,
    NotInTransaction,
    PartlyStored,
    SchemaOutOfDate,
    StoreError,
    StoreUnavailable,
    TokenNotFound,
    UnknownCursor,
    VersionConflict,
    WrongEventLoop,
)
from incidentkit.domain.commands import StatusChange

TWO_FAULTS = (FieldError("page", "is wrong"), FieldError("limit", "is wrong, too"))

DISK = Incident(
    7,
    "Disk is full",
    IncidentStatus.COMPLETED,
    IncidentSource.MONITORING,
    datetime(2026, 3, 1, 9, 30, tzinfo=UTC),
    version=3,
)

ERRORS: list[tuple[IncidentKitError, str, dict[str, Any]]] = [
    (IncidentKitError("why"), "why", {}),
    (
        InvalidIncident(iter(TWO_FAULTS)),
        "page is wrong; limit is wrong, too",
        {"errors": TWO_FAULTS},
    ),
    (
        IdempotencyKeyReused("deploy-7"),
        "idempotency_key was used with other parameters",
        {
            "idempotency_key": "deploy-7",
            "errors": (FieldError("idempotency_key", "was used with other parameters"),),
        },
    ),
    (
        IncidentConflict(DISK),
        "Incident 7 does not allow this change",
        {"incident": DISK},
    ),
    (
        VersionConflict(DISK),
        "Incident 7 has moved on: it is at version 3",
        {"incident": DISK},
    ),
    (
        IllegalTransition(DISK, IncidentStatus.NEW),
        "Incident 7 cannot go from completed to new",
        {"incident": DISK, "to_status": IncidentStatus.NEW},
    ),
    (
        DuplicateOpenIncident(DISK),
        "Incident 7 cannot be reopened: another incident with its dedup_key is open",
        {"incident": DISK},
    ),
    (
        TokenNotFound("ci"),
        "No active token is named ci",
        {"name": "ci"},
    ),
    (
        UnknownCursor(),
        "The cursor is unknown in this database: start again without a cursor",
        {},
    ),
    (
        WrongEventLoop("The client was opened on another event loop"),
        "The client was opened on another event loop",
        {"reason": "The client was opened on another event loop"},
    ),
    (
        PartlyStored([DISK], 10, "The database is unavailable: it did not answer in time"),
        (
            "Only the first 1 of 10 incidents are known to be stored. The database is unavailable: "
            "it did not answer in time. Repeat the call with the same idempotency_key; "
            "without one, find out which are stored before you pass the rest"
        ),
        {
            "incidents": (DISK,),
            "given": 10,
            "reason": "The database is unavailable: it did not answer in time",
        },
    ),
    (
        NotInTransaction(),
        "The connection has no open transaction to join: begin one first",
        {},
    ),
    (
        NeedsDatabase("join"),
        "A service has no operation for join: open a client on the database itself",
        {"verb": "join"},
    ),
    (IncidentNotFound(7), "Incident 7 not found", {"incident_id": 7}),
    (
        ClientClosed(),
        "The client is not open: enter it with `async with` or `with`, or connect() it first",
        {},
    ),
    (
        InvalidSettings("DB_ECHO", "must be true or false"),
        "DB_ECHO must be true or false",
        {"name": "DB_ECHO", "reason": "must be true or false"},
    ),
    (
        MissingDependency("starlette", extra="server"),
        "starlette is not installed: pip install 'incidentkit[server]'",
        {"package": "starlette", "extra": "server"},
    ),
    (
        CacheUnavailable("it failed"),
        "The cache is unavailable: it failed",
        {"reason": "it failed"},
    ),
    (
        StoreError("SQLSTATE 23514"),
        "The database cannot be used: SQLSTATE 23514",
        {"reason": "SQLSTATE 23514"},
    ),
    (
        StoreUnavailable("it did not answer in time"),
        "The database is unavailable: it did not answer in time",
        {"reason": "it did not answer in time"},
    ),
    (
        StoreError("it failed", place="/data/x.db", sqlstate="SQLITE_MISUSE"),
        "The database /data/x.db cannot be used: it failed (SQLITE_MISUSE)",
        {"place": "/data/x.db", "sqlstate": "SQLITE_MISUSE", "retryable": False},
    ),
    (
        StoreUnavailable("its disk is full", place="db:5432/x", sqlstate="53100", retryable=False),
        "The database db:5432/x is unavailable: its disk is full (SQLSTATE 53100)",
        {"place": "db:5432/x", "sqlstate": "53100", "retryable": False},
    ),
    (
        SchemaOutOfDate(None, "9b3f6d20c7e8", place="db:5432/x", sqlstate="42P01"),
        (
            "The database db:5432/x has no incidentkit schema; this version of incidentkit needs "
            "revision 9b3f6d20c7e8: run `incidentkit db upgrade`"
        ),
        {"place": "db:5432/x", "sqlstate": "42P01", "retryable": False, "current": None},
    ),
    (
        SchemaOutOfDate(None, "9b3f6d20c7e8"),
        (
            "The database has no incidentkit schema; this version of incidentkit needs revision "
            "9b3f6d20c7e8: run `incidentkit db upgrade`"
        ),
        {"current": None, "expected": "9b3f6d20c7e8", "command": "incidentkit db upgrade"},
    ),
    (
        SchemaOutOfDate("dadc1db062ae", "9b3f6d20c7e8", command="make schema"),
        (
            "The database is at revision dadc1db062ae; this version of incidentkit needs revision "
            "9b3f6d20c7e8: run `make schema`"
        ),
        {"current": "dadc1db062ae", "expected": "9b3f6d20c7e8", "command": "make schema"},
    ),
    (
        SchemaOutOfDate(None, "", place="https://host"),
        (
            "The service https://host cannot be used: the schema of its database is out of date. "
            "Run `incidentkit db upgrade` where the service runs"
        ),
        {"current": None, "expected": "", "place": "https://host"},
    ),
    (
        AccessDenied("the token has expired", place="https://host"),
        "The service https://host denies access: the token has expired",
        {"reason": "the token has expired", "place": "https://host", "retryable": False},
    ),
]

each_error = pytest.mark.parametrize(
    ("error", "text", "fields"), ERRORS, ids=[type(error).__name__ for error, *_ in ERRORS]
)


def tree(error: type[Exception]) -> dict[str, Any]:
    """Return the names of an error's subclasses as a tree."""
    return {
        child.__name__: tree(child)
        for child in error.__subclasses__()
        if child.__module__ == incidentkit.domain.errors.__name__
    }


def names(branches: dict[str, Any]) -> list[str]:
    """Return the names in a tree, from the top."""
    return [name for branch, below in branches.items() for name in (branch, *names(below))]


def test_one_small_tree() -> None:
    """Catching a class of errors catches exactly the errors below it."""
    assert tree(IncidentKitError) == {
        "InvalidIncident": {"IdempotencyKeyReused": {}},
        "IncidentNotFound": {},
        "IncidentConflict": {
            "VersionConflict": {},
            "IllegalTransition": {},
            "DuplicateOpenIncident": {},
        },
        "UnknownCursor": {},
        "TokenNotFound": {},
        "PartlyStored": {},
        "NotInTransaction": {},
        "NeedsDatabase": {},
        "ClientClosed": {},
        "WrongEventLoop": {},
        "InvalidSettings": {},
        "MissingDependency": {},
        "CacheUnavailable": {},
        "StoreError": {"StoreUnavailable": {}, "SchemaOutOfDate": {}, "AccessDenied": {}},
    }


def test_tree_in_the_documentation_is_the_tree() -> None:
    """The tree in the module's docstring shows every error in its place."""
    picture = re.findall(
        r"^ {4}([│├└─ ]*)(\w+)", incidentkit.domain.errors.__doc__ or "", re.MULTILINE
    )
    drawn = [(len(branch) // 4, name) for branch, name in picture]

    def walk(branches: dict[str, Any], depth: int) -> list[tuple[int, str]]:
        return [
            line
            for name, below in branches.items()
            for line in ((depth, name), *walk(below, depth + 1))
        ]

    assert drawn == [(0, "IncidentKitError"), *walk(tree(IncidentKitError), 1)]


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (InvalidIncident, ValueError),
        (InvalidSettings, ValueError),
        (IncidentNotFound, LookupError),
        (UnknownCursor, LookupError),
        (TokenNotFound, LookupError),
        (MissingDependency, ImportError),
    ],
)
def test_errors_are_also_the_builtin_ones_that_they_refine(
    error: type[IncidentKitError], builtin: type[Exception]
) -> None:
    """Code that does not know incidentkit can catch the builtin class."""
    assert issubclass(error, builtin)


def test_examples_here_are_of_every_error() -> None:
    """The tests below cover every error."""
    tested = {type(error).__name__ for error, *_ in ERRORS}
    assert tested == {"IncidentKitError", *names(tree(IncidentKitError))}


@each_error
def test_error_says_what_is_wrong_and_carries_it(
    error: IncidentKitError, text: str, fields: dict[str, Any]
) -> None:
    """An error reads as one sentence, and its parts are attributes."""
    assert str(error) == text
    assert {name: getattr(error, name) for name in fields} == fields


@each_error
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_error_crosses_processes(
    error: IncidentKitError, text: str, fields: dict[str, Any], protocol: int
) -> None:
    """An error can be pickled with its attributes, as a process pool requires."""
    other = pickle.loads(pickle.dumps(error, protocol))
    assert type(other) is type(error)
    assert str(other) == text
    assert {name: getattr(other, name) for name in fields} == fields


@each_error
def test_error_can_be_copied(error: IncidentKitError, text: str, fields: dict[str, Any]) -> None:
    """A copy, shallow or deep, is the same error with the same attributes."""
    for other in (copy.copy(error), copy.deepcopy(error)):
        assert type(other) is type(error)
        assert str(other) == text
        assert {name: getattr(other, name) for name in fields} == fields


# Characters that appear in no error text, so that a leaked value is found.
secrets = st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), min_size=1, max_size=8)


@given(secrets, st.sampled_from(["{:.4}", "{}\x00", "{}\ud800", "{:0<1001}"]))
def test_error_repeats_nothing_of_the_message(secret: str, form: str) -> None:
    """The text of an error does not show the refused value."""
    value: Any = form.format(secret)
    not_text: Any = [value]
    for make in (
        lambda: NewIncident(value, value, value),
        lambda: NewIncident(not_text, not_text, not_text),
        lambda: ListQuery(value, value, value, value),
        lambda: StatusChange(value, value, value, value),
    ):
        with pytest.raises(InvalidIncident) as caught:
            make()
        shown = f"{caught.value}{caught.value!r}{caught.value.args}"
        assert not set(shown) & set(secret)

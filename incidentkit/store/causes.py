"""The causes of a database's failures: one reason for each."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from typing import Final

from attrs import evolve, field, frozen

from incidentkit.domain.errors import SchemaOutOfDate, StoreError, StoreUnavailable
from incidentkit.store.schema import SCHEMA_REVISION, WRITER_CHECK


def _compile(pattern: str | None) -> re.Pattern[str] | None:
    return None if pattern is None else re.compile(pattern)


@frozen
class Cause:
    """A cause of a failure.

    Attributes:
        reason: What is wrong, and after a semicolon what to do.
        error: The error that a caller sees.
        retryable: Whether the same call may succeed later although nothing is changed.
        codes: The SQLSTATEs of PostgreSQL or SQLite's names of errors, or the beginning of several.
        text: A pattern of the driver's message, for a failure without a code, or with one that
            several causes have.
    """

    reason: str
    error: type[StoreError] = StoreUnavailable
    retryable: bool = False
    codes: tuple[str, ...] = ()
    text: re.Pattern[str] | None = field(default=None, converter=_compile)

    def as_error(self, code: str | None = None) -> StoreError:
        """Return the error to raise from the driver's exception."""
        if self.error is SchemaOutOfDate:
            return SchemaOutOfDate(None, SCHEMA_REVISION, sqlstate=code)
        return self.error(self.reason, sqlstate=code, retryable=self.retryable)


POOL_EXHAUSTED: Final = Cause(
    "every connection of the pool stayed in use; enlarge the pool, or end what holds them",
    retryable=True,
)

TRANSACTION_FAILED: Final = Cause(
    "the transaction has failed before, or was ended; roll it back and begin another",
    StoreError,
    codes=("25P02",),
)

OLDER_WRITER: Final = Cause(
    "a newer version of incidentkit has upgraded the schema, which refuses writes of this version; "
    "restart this process with the newer version",
    StoreError,
    text=WRITER_CHECK,
)

KEPT_OUT: Final = Cause(
    "a trigger of the database suppresses or undoes the write; drop it, or let it pass the rows of "
    "incidentkit",
    StoreError,
    text="a trigger kept out rows",
)


OTHER_THREAD: Final = Cause(
    "the connection belongs to another thread; join it in the thread that opened it",
    StoreError,
    text="created in a thread can only be used in that same thread",
)


def named_constraint(cause: Cause, name: str | None) -> Cause:
    """Return the cause of a constraint that refuses values, with its name if there is one."""
    if not name:
        return cause
    return evolve(cause, reason=cause.reason.replace("a constraint", f"the constraint {name}", 1))


NO_ANSWER: Final = Cause("it did not answer in time", retryable=True)


def find_cause(
    causes: Iterable[Cause], code: str | None, message: str, *, ambiguous: Container[str] = ()
) -> Cause | None:
    """Return the cause of a failure; None if none of these is known to be it.

    Args:
        causes: The known causes.
        code: The SQLSTATE, or SQLite's name of the error; None if the failure has none.
        message: The driver's message.
        ambiguous: Codes that several causes have: a cause with a text needs it in the message.
    """
    by_text = code is None or code in ambiguous
    closest, longest = None, 0
    for cause in causes:
        if by_text and cause.text is not None:
            if cause.text.search(message):
                return cause
            continue
        common = max(
            (len(each) for each in cause.codes if (code or "").startswith(each)), default=0
        )
        if common > longest:
            closest, longest = cause, common
    return closest


def unknown_cause(
    error: BaseException, code: str | None = None, *, unavailable: bool = False
) -> StoreError:
    """Return the error for a failure with an unknown cause; it names the type of the exception."""
    kind = type(error)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    reason = f"it failed with {name}"
    return StoreUnavailable(reason) if unavailable else StoreError(reason, sqlstate=code)

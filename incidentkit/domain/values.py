"""The values that a store returns, the enums in them, and the limits of values."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from enum import StrEnum
from hashlib import blake2b
from typing import Any, Final, Literal, TypeAlias

from attrs import Factory, field, frozen

from incidentkit.domain.formats import schema
from incidentkit.domain.plain import Plain

MESSAGE_MIN_LENGTH: Final = 5
MESSAGE_MAX_LENGTH: Final = 1000
"""Limits of a message, in characters, without surrounding white space."""

FORBIDDEN_MESSAGES: Final = frozenset({"test", "none", "null"})

NAME_MAX_LENGTH: Final = 255
"""Maximum length of an actor, a deduplication key or an idempotency key, in characters."""

NOTE_MAX_LENGTH: Final = 1000
TEXT_MAX_LENGTH: Final = 200
"""Maximum length of the text of a search, in characters."""

TEXT_MAX_WORDS: Final = 32
"""Maximum number of different words and phrases of a search, not counting those that another one
includes."""

STORABLE: Final = r"^[^\x00]*$"
"""A text without NUL characters, which the databases cannot hold."""

DETAILS_MAX_SIZE: Final = 16 * 1024
"""Maximum size of details, in bytes as compact JSON in UTF-8, with numbers without exponents."""

DETAILS_MAX_DEPTH: Final = 5
"""Maximum levels of objects and arrays in details; the details themselves are the first."""

MAX_ID: Final = 2**63 - 1
TAG_PATTERN: Final = r"[1-9]\d{0,18}-[0-9a-f]{12}"
"""The pattern of the tag of an incident."""

DEFAULT_LIMIT: Final = 10
MAX_LIMIT: Final = 1000
MAX_OFFSET: Final = 2**63 - 1

DEEP: Final = 1000
"""``page`` times ``limit`` above which a page of the list is deep: reading it may take long."""

CHANGES_LIMIT: Final = 100
"""Default number of changes in one answer."""

MAX_MANY: Final = 100_000
"""Maximum number of incidents in one ``create_many``."""

ITEMS_PER_REQUEST: Final = 1000
BYTES_PER_REQUEST: Final = 2 * 1024 * 1024
"""Maximum number of incidents in one ``create_many`` over HTTP, and maximum bytes of its body."""

MAX_STALENESS: Final = 3600
"""Maximum seconds by which a list may be behind: the time that a page is cached."""

MAX_WAIT: Final = 30
"""Maximum seconds that a call waits for changes."""

STREAM_LIFETIME: Final = 3600
MIN_STREAM_LIFETIME: Final = 10
MAX_STREAM_LIFETIME: Final = 86_400
"""Seconds after which a stream of changes ends: by default, at least, and at most."""

REQUESTS_PER_TOKEN: Final = 20
READERS_PER_TOKEN: Final = 10
SEARCHES_PER_TOKEN: Final = 2
MAX_PER_TOKEN: Final = 10_000
"""What one token may do at a time in the REST service: by default, and at most."""

LATEST: Final = "latest"
"""Given in place of a cursor: start after the newest change."""

EARLIEST_TIME: Final = datetime(1, 1, 2, tzinfo=UTC)
LATEST_TIME: Final = datetime(9999, 12, 31, tzinfo=UTC)
"""Bounds of every time that an incident can have."""


class IncidentStatus(StrEnum):
    """The status of an incident."""

    NEW = "new"
    COMPLETED = "completed"
    FAILED = "failed"


OPEN: Final = IncidentStatus.NEW
"""The status of an open incident; an incident with any other status has ended."""


class IncidentSource(StrEnum):
    """Who reported an incident."""

    OPERATOR = "operator"
    MONITORING = "monitoring"
    PARTNER = "partner"


class EventKind(StrEnum):
    """What happened to an incident."""

    CREATED = "created"
    RECURRED = "recurred"
    STATUS_CHANGED = "status_changed"
    NOTED = "noted"
    PURGED = "purged"


class IncidentOrder(StrEnum):
    """The order of a search, by created_at and then by id."""

    NEWEST = "newest"
    OLDEST = "oldest"


StatusName: TypeAlias = Literal["new", "completed", "failed"]
"""The value of a status, accepted in place of the member."""

SourceName: TypeAlias = Literal["operator", "monitoring", "partner"]
"""The value of a source, accepted in place of the member."""

OrderName: TypeAlias = Literal["newest", "oldest"]
"""The value of an order, accepted in place of the member."""


def _whole_utc_second(value: datetime) -> datetime:
    # The form in which the databases return nearly every time.
    if value.tzinfo is UTC and not value.microsecond:
        return value
    if value.tzinfo is None:
        raise ValueError("a time must be an aware datetime")
    return value.astimezone(UTC).replace(microsecond=0)


def _whole_utc_second_or_none(value: datetime | None) -> datetime | None:
    return None if value is None else _whole_utc_second(value)


@frozen
class Incident(Plain):
    """An incident as it is stored.

    Attributes:
        incident_id: Assigned by the database, 1 to 2^63-1. The id of a removed incident is not
            assigned again. A database that has lost commits assigns the lost ids again.
        incident_message: What happened.
        incident_type: The status.
        source: Who reported it.
        created_at: When the database stored it: aware, in UTC, in whole seconds, the resolution of
            the wire format. The other times have the same form.
        version: 1 at creation, incremented by each change of a field.
        dedup_key: The key of the problem that it reports; None: it never counts repetitions.
        occurrences: Number of reports, at least 1.
        last_seen_at: When it was last reported.
        ended_at: When its status left ``new``; None while it is open, and if another program
            changed the status without recording the end.
        details: The details of the first report, as a JSON object; they never change. The order of
            keys is not kept. None: there are none, or the incident is from ``list``, or from a
            ``search`` without ``details=True``. Incidents that differ only in their details are
            equal.
    """

    incident_id: int = field(metadata=schema(minimum=1, maximum=MAX_ID))
    incident_message: str
    incident_type: IncidentStatus
    source: IncidentSource
    created_at: datetime = field(
        converter=_whole_utc_second, metadata=schema(description="When it was stored, in UTC.")
    )
    version: int = field(
        default=1, metadata=schema(minimum=1, description="Increases by one with each change.")
    )
    dedup_key: str | None = None
    occurrences: int = field(
        default=1, metadata=schema(minimum=1, description="How often it was reported.")
    )
    last_seen_at: datetime = field(
        default=Factory(lambda self: self.created_at, takes_self=True),
        converter=_whole_utc_second,
        metadata=schema(description="When it was last reported, in UTC."),
    )
    ended_at: datetime | None = field(
        default=None,
        converter=_whole_utc_second_or_none,
        metadata=schema(
            description="When its status left new, in UTC; null while it is open, or if the time "
            "is unknown."
        ),
    )
    # The last field, as in the rows that have it.
    details: dict[str, Any] | None = field(
        default=None,
        eq=False,
        metadata=schema(
            required=False,
            description="The details of the first report, with the order of keys left open. Absent "
            "if there are none, from lists, and from searches without details=true.",
        ),
    )

    @property
    def tag(self) -> str:
        """The version with a digest of all fields but ``details``, such as ``3-5f1c9a0e77d2``.

        Pass it as ``expected_version``. After a failover or a restore that lost commits, the
        database assigns ids and versions again. The tag of a lost incident matches no other one.
        """
        values = (
            self.incident_id,
            self.incident_message,
            self.incident_type.value,
            self.source.value,
            self.created_at.isoformat(),
            self.dedup_key,
            self.occurrences,
            self.last_seen_at.isoformat(),
            None if self.ended_at is None else self.ended_at.isoformat(),
        )
        return f"{self.version}-{blake2b(json.dumps(values).encode(), digest_size=6).hexdigest()}"


@frozen
class VersionMatch:
    """A condition on the version of an incident, as the headers of HTTP state one.

    A version is an integer, and the ``tag`` of an incident a string.

    Attributes:
        any_of: The incident must have one of these; none fits an empty tuple. None: any version.
        none_of: The incident must have none of these.
    """

    any_of: tuple[int | str, ...] | None = None
    none_of: tuple[int | str, ...] = ()

    def fits(self, incident: Incident) -> bool:
        """Return whether the incident meets the condition."""
        own = (incident.version, incident.tag)
        if self.any_of is not None and not any(each in own for each in self.any_of):
            return False
        return not any(each in own for each in self.none_of)


def has_version(incident: Incident, expected: int | str | VersionMatch | None) -> bool:
    """Return whether an incident has the expected version or tag; None is any version."""
    match expected:
        case None:
            return True
        case int():
            return incident.version == expected
        case str():
            return incident.tag == expected
    return expected.fits(incident)


@frozen
class IncidentEvent(Plain):
    """One change of an incident, recorded in the same transaction.

    It is a row of ``incident_event``.

    Attributes:
        cursor: Its place in the order of all events, for ``after=``.
        incident_id: The incident that changed.
        kind: What happened.
        from_status: The status before; None if the status did not change.
        to_status: The status after; None if the status did not change.
        actor: Who made the change; None if no actor was named.
        note: The note given with the change; None if there was none. For a recurrence, the
            message of the new report if it differs from the incident's.
        at: When the database recorded it: aware, in UTC, in whole seconds.
    """

    cursor: str = field(metadata=schema(description="Its position among all events, for after=."))
    incident_id: int = field(metadata=schema(minimum=1, maximum=MAX_ID))
    kind: EventKind
    from_status: IncidentStatus | None
    to_status: IncidentStatus | None
    actor: str | None = field(metadata=schema(description="Who did it; null if unknown."))
    note: str | None
    at: datetime = field(
        converter=_whole_utc_second, metadata=schema(description="When it was recorded, in UTC.")
    )


@frozen
class ChangePage(Plain):
    """Some changes, and the cursor to continue from.

    Attributes:
        changes: In the order of their commits; empty if there are none yet.
        next: The cursor for the next call. There always is one, even before the first change.
    """

    changes: list[IncidentEvent]
    next: str = field(metadata=schema(description="The after= to continue with."))


@frozen
class FeedBlocker:
    """The oldest open transaction of a PostgreSQL server, which holds up the change feed.

    Changes of younger transactions are delivered once it has ended.

    Attributes:
        since: When it began, or was prepared. If the client's account may not see that: when the
            oldest waiting change was recorded. Aware, in UTC, in whole seconds.
        pid: The server process that runs it; None for a prepared transaction, and if the server
            does not show it, as on a standby.
        prepared: The identifier of a prepared transaction; None for any other.
        database: Its database, which may differ from the client's. None if unknown; the same
            applies to the next three.
        user: The account that began it.
        application: The ``application_name`` of its connection; None if it has none.
        state: The state of its connection, such as ``active`` or ``idle in transaction``.
        waiting: Whether a committed change waits for its end.
    """

    since: datetime = field(converter=_whole_utc_second)
    pid: int | None
    prepared: str | None
    database: str | None
    user: str | None
    application: str | None
    state: str | None
    waiting: bool

    @property
    def holder(self) -> str:
        """The process or the prepared transaction, in words."""
        if self.pid is not None:
            return f"process {self.pid}"
        if self.prepared is not None:
            return f"the prepared transaction {self.prepared!r}"
        return "a transaction that the server does not show"


@frozen
class SearchPage(Plain):
    """One page of a search.

    Attributes:
        incidents: In the requested order.
        next: The cursor of the next page; None on the last page.
        total: Number of incidents on all pages together; None unless the search asked for it.
    """

    incidents: list[Incident]
    next: str | None = field(
        metadata=schema(description="The after= of the next page; null on the last one.")
    )
    total: int | None = field(
        metadata=schema(description="Matches on all pages; null unless requested.")
    )

"""The exceptions that incidentkit raises.

.. code-block:: text

    IncidentKitError
    ├── InvalidIncident      (also a ValueError)
    │   └── IdempotencyKeyReused
    ├── IncidentNotFound     (also a LookupError)
    ├── IncidentConflict
    │   ├── VersionConflict
    │   ├── IllegalTransition
    │   └── DuplicateOpenIncident
    ├── UnknownCursor        (also a LookupError)
    ├── TokenNotFound        (also a LookupError)
    ├── PartlyStored
    ├── NotInTransaction
    ├── NeedsDatabase
    ├── ClientClosed
    ├── WrongEventLoop
    ├── InvalidSettings      (also a ValueError)
    ├── MissingDependency    (also an ImportError)
    ├── CacheUnavailable
    └── StoreError
        ├── StoreUnavailable
        ├── SchemaOutOfDate
        └── AccessDenied

Exceptions of a database or cache driver are not raised to callers: they are the ``__cause__`` of
one of these.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from attrs import frozen

from incidentkit.domain.values import Incident, IncidentStatus


class IncidentKitError(Exception):
    """The base class of every error that incidentkit raises."""


@frozen
class FieldError:
    """One invalid field of an :class:`InvalidIncident`, and the rule that it breaks."""

    field: str
    reason: str


class InvalidIncident(IncidentKitError, ValueError):
    """A value given to incidentkit breaks a rule; nothing was read or written.

    Attributes:
        errors: Every faulty field with its reason, in the order of the fields; never empty.
    """

    def __init__(self, errors: Iterable[FieldError]) -> None:
        self.errors = tuple(errors)
        super().__init__(self.errors)

    def __str__(self) -> str:
        return "; ".join(f"{error.field} {error.reason}" for error in self.errors)


class IdempotencyKeyReused(InvalidIncident):
    """The idempotency key was used with other parameters in the last 24 hours.

    Attributes:
        errors: The fault of the field ``idempotency_key``.
        idempotency_key: The key.
    """

    def __init__(self, idempotency_key: str) -> None:
        super().__init__([FieldError("idempotency_key", "was used with other parameters")])
        self.idempotency_key = idempotency_key
        self.args = (idempotency_key,)


class IncidentNotFound(IncidentKitError, LookupError):
    """No incident has this id.

    Attributes:
        incident_id: The requested id.
    """

    def __init__(self, incident_id: int) -> None:
        self.incident_id = incident_id
        super().__init__(incident_id)

    def __str__(self) -> str:
        return f"Incident {self.incident_id} not found"


class IncidentConflict(IncidentKitError):
    """The current state of the incident does not allow the change; nothing was changed.

    Attributes:
        incident: The incident in its current state.
    """

    def __init__(self, incident: Incident) -> None:
        self.incident = incident
        super().__init__(incident)

    def __str__(self) -> str:
        return f"Incident {self.incident.incident_id} does not allow this change"


class VersionConflict(IncidentConflict):
    """The incident does not have the expected version: another change came first.

    Attributes:
        incident: The incident in its current state, with its version.
    """

    def __str__(self) -> str:
        return (
            f"Incident {self.incident.incident_id} has moved on: "
            f"it is at version {self.incident.version}"
        )


class IllegalTransition(IncidentConflict):
    """The client's transitions do not allow this change of the status.

    Attributes:
        incident: The incident in its current state, with its status.
        to_status: The status that was requested.
    """

    def __init__(self, incident: Incident, to_status: IncidentStatus) -> None:
        self.to_status = to_status
        super().__init__(incident)
        self.args = (incident, to_status)

    def __str__(self) -> str:
        return (
            f"Incident {self.incident.incident_id} cannot go "
            f"from {self.incident.incident_type} to {self.to_status}"
        )


class DuplicateOpenIncident(IncidentConflict):
    """The incident cannot be reopened: another one with its deduplication key is open.

    Attributes:
        incident: The incident that should be reopened, in its current state.
    """

    def __str__(self) -> str:
        return (
            f"Incident {self.incident.incident_id} cannot be reopened: "
            "another incident with its dedup_key is open"
        )


class UnknownCursor(IncidentKitError, LookupError):
    """The change that the cursor stands for never happened in this database.

    The cursor is from another database or from a copy, or this database was restored to a time
    before the change. The changes after it are unknown: start again with None.
    """

    def __str__(self) -> str:
        return "The cursor is unknown in this database: start again without a cursor"


class TokenNotFound(IncidentKitError, LookupError):
    """No active access token has this name.

    Attributes:
        name: The requested name.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(name)

    def __str__(self) -> str:
        return f"No active token is named {self.name}"


class PartlyStored(IncidentKitError):
    """``create_many`` with ``batch`` failed after it had committed some of the incidents.

    The failure is its ``__cause__``. After :class:`StoreUnavailable`, the batch that failed may be
    stored too; a retry with the idempotency key never stores it twice.

    Attributes:
        incidents: The incidents of the committed batches, the first of those given.
        given: Number of incidents given.
        reason: The text of the failure.
    """

    def __init__(self, incidents: Sequence[Incident], given: int, reason: str) -> None:
        self.incidents = tuple(incidents)
        self.given = given
        self.reason = reason
        super().__init__(self.incidents, given, reason)

    def __str__(self) -> str:
        return (
            f"Only the first {len(self.incidents)} of {self.given} incidents are known to be "
            f"stored. {self.reason}. Repeat the call with the same idempotency_key; without one, "
            "find out which are stored before you pass the rest"
        )


class NotInTransaction(IncidentKitError):
    """The connection to join has no open transaction."""

    def __str__(self) -> str:
        return "The connection has no open transaction to join: begin one first"


class NeedsDatabase(IncidentKitError):
    """The call needs a client on the database itself, but this is the client of a service.

    Attributes:
        verb: The method or property that the service has no operation for.
    """

    def __init__(self, verb: str) -> None:
        self.verb = verb
        super().__init__(verb)

    def __str__(self) -> str:
        return f"A service has no operation for {self.verb}: open a client on the database itself"


class ClientClosed(IncidentKitError):
    """The client was used before it was opened, or after it was closed."""

    def __str__(self) -> str:
        return "The client is not open: enter it with `async with` or `with`, or connect() it first"


class WrongEventLoop(IncidentKitError):
    """The client was opened on another event loop, in another thread, or before a fork.

    A synchronous client raises it in a thread with a running event loop. Nothing was read or
    written, and the client keeps working where it was opened.

    Attributes:
        reason: Where the client was opened, and what to do instead.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)

    def __str__(self) -> str:
        return self.reason


class InvalidSettings(IncidentKitError, ValueError):
    """A setting cannot be used.

    Attributes:
        name: The setting or environment variable.
        reason: The rule that it breaks; never its value, which may be a secret.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self.reason = reason
        super().__init__(name, reason)

    def __str__(self) -> str:
        return f"{self.name} {self.reason}"


class MissingDependency(IncidentKitError, ImportError):
    """An optional package is not installed.

    Attributes:
        package: The package that could not be imported.
        extra: The extra of incidentkit that installs it.
    """

    def __init__(self, package: str, extra: str) -> None:
        self.package = package
        self.extra = extra
        super().__init__(package, extra)

    def __str__(self) -> str:
        return f"{self.package} is not installed: pip install 'incidentkit[{self.extra}]'"


class CacheUnavailable(IncidentKitError):
    """The cache does not answer, and the client requires it.

    Attributes:
        reason: Which cache failed, and how; without user and password.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)

    def __str__(self) -> str:
        return f"The cache is unavailable: {self.reason}"


class StoreError(IncidentKitError):
    """The database or the service cannot be used: its state or the call must be changed first.

    Attributes:
        reason: The cause, and what to do about it; without credentials or stored values.
        place: The database: host, port and name, or the path of its file; or the URL of the
            service. Never a user, a password or a token. None: it is not known.
        sqlstate: The SQLSTATE of PostgreSQL, or the name of the error in SQLite, such as
            ``SQLITE_FULL``. None: the error does not come from the database itself.
        retryable: Whether the same call may succeed later without any other action.
    """

    def __init__(
        self,
        reason: str,
        *,
        place: str | None = None,
        sqlstate: str | None = None,
        retryable: bool = False,
    ) -> None:
        self.reason = reason
        self.place = place
        self.sqlstate = sqlstate
        self.retryable = retryable
        super().__init__(reason)

    def __str__(self) -> str:
        return f"{self._database} cannot be used: {self._cause}"

    @property
    def _database(self) -> str:
        if self.place is None:
            return "The database"
        is_service = self.place.startswith(("http://", "https://"))
        return f"The {'service' if is_service else 'database'} {self.place}"

    @property
    def _cause(self) -> str:
        if self.sqlstate is None:
            return self.reason
        code = self.sqlstate if self.sqlstate.startswith("SQLITE_") else f"SQLSTATE {self.sqlstate}"
        return f"{self.reason} ({code})"


class StoreUnavailable(StoreError):
    """The database cannot be reached, did not answer in time, or cannot do its work at present.

    A write that raises this may or may not be stored.

    Attributes:
        retryable: False if someone has to act first, for example because the disk is full or the
            password is wrong.
    """

    def __init__(
        self,
        reason: str,
        *,
        place: str | None = None,
        sqlstate: str | None = None,
        retryable: bool = True,
    ) -> None:
        super().__init__(reason, place=place, sqlstate=sqlstate, retryable=retryable)

    def __str__(self) -> str:
        return f"{self._database} is unavailable: {self._cause}"


class SchemaOutOfDate(StoreError):
    """The database's schema is not the one that this version of incidentkit needs.

    Attributes:
        current: The revision of the database; None: it has no incidentkit schema.
        expected: The revision that this version of incidentkit needs; empty: the service did not
            report the revisions of its database.
        command: The command to run.
        differences: Missing or changed parts of a schema that has the expected revision, as in
            ``the trigger incident_token_change is missing``.
    """

    def __init__(  # noqa: PLR0913
        self,
        current: str | None,
        expected: str,
        command: str = "incidentkit db upgrade",
        *,
        differences: Sequence[str] = (),
        place: str | None = None,
        sqlstate: str | None = None,
    ) -> None:
        self.current = current
        self.expected = expected
        self.command = command
        self.differences = tuple(differences)
        super().__init__("the schema is out of date", place=place, sqlstate=sqlstate)
        self.args = (current, expected, command)

    def __str__(self) -> str:
        if self.differences:
            return (
                f"{self._database} is at revision {self.current}, but {', '.join(self.differences)}"
                f": run `{self.command}`"
            )
        if not self.expected:
            return (
                f"{self._database} cannot be used: the schema of its database is out of date. Run "
                f"`{self.command}` where the service runs"
            )
        found = f"is at revision {self.current}" if self.current else "has no incidentkit schema"
        return (
            f"{self._database} {found}; this version of incidentkit needs revision "
            f"{self.expected}: run `{self.command}`"
        )


class AccessDenied(StoreError):
    """The service refuses the token of the client, or the token does not allow the call.

    Attributes:
        reason: Why, in the words of the service.
        place: The URL of the service.
    """

    def __str__(self) -> str:
        return f"{self._database} denies access: {self._cause}"

"""Everything that incidentkit raises on purpose.

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
    ├── NotInTransaction
    ├── ClientClosed
    ├── InvalidSettings      (also a ValueError)
    ├── MissingDependency    (also an ImportError)
    ├── CacheUnavailable
    └── StoreError
        ├── StoreUnavailable
        └── SchemaOutOfDate

Exceptions of a database or cache driver never escape: they are the ``__cause__`` of one of these.
"""

from __future__ import annotations

from collections.abc import Iterable

from attrs import frozen

from incidentkit.domain.values import Incident, IncidentStatus


class IncidentKitError(Exception):
    """The base class of every error that incidentkit raises."""


@frozen
class FieldError:
    """One faulty field of an :class:`InvalidIncident`: which one, and the rule that it breaks."""

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
        errors: What is wrong with the field ``idempotency_key``.
        idempotency_key: The key.
    """

    def __init__(self, idempotency_key: str) -> None:
        super().__init__([FieldError("idempotency_key", "was used with other parameters")])
        self.idempotency_key = idempotency_key
        self.args = (idempotency_key,)


class IncidentNotFound(IncidentKitError, LookupError):
    """No incident has this id.

    Attributes:
        incident_id: The id that was asked for.
    """

    def __init__(self, incident_id: int) -> None:
        self.incident_id = incident_id
        super().__init__(incident_id)

    def __str__(self) -> str:
        return f"Incident {self.incident_id} not found"


class IncidentConflict(IncidentKitError):
    """The incident as it is does not let the change happen; nothing was changed.

    Attributes:
        incident: The incident as it is.
    """

    def __init__(self, incident: Incident) -> None:
        self.incident = incident
        super().__init__(incident)

    def __str__(self) -> str:
        return f"Incident {self.incident.incident_id} does not allow this change"


class VersionConflict(IncidentConflict):
    """The incident is not of the expected version: somebody else has changed it.

    Attributes:
        incident: The incident as it is, with its version.
    """

    def __str__(self) -> str:
        return (
            f"Incident {self.incident.incident_id} has moved on: "
            f"it is at version {self.incident.version}"
        )


class IllegalTransition(IncidentConflict):
    """The client's transitions do not allow this change of the status.

    Attributes:
        incident: The incident as it is, with its status.
        to_status: The status that it was to get.
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
    """The incident cannot be opened again: another one with its deduplication key is open.

    Attributes:
        incident: The incident that was to be opened, as it is.
    """

    def __str__(self) -> str:
        return (
            f"Incident {self.incident.incident_id} cannot be opened again: "
            "another one with its dedup_key is open"
        )


class UnknownCursor(IncidentKitError, LookupError):
    """The change that the cursor stands for never happened in this database.

    The database is another one, a copy that went its own way, or was restored to a time before
    the change. What comes after it cannot be told.
    """

    def __str__(self) -> str:
        return "The cursor is not one of this database"


class NotInTransaction(IncidentKitError):
    """What was to be joined is not a transaction, or has ended."""

    def __str__(self) -> str:
        return "The connection is not in a transaction that can be joined"


class ClientClosed(IncidentKitError):
    """The client was used before it was opened, or after it was closed."""

    def __str__(self) -> str:
        return "The client is not open: use `async with client:`, or await client.connect() first"


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
        extra: The extra of incidentkit that brings it.
    """

    def __init__(self, package: str, extra: str) -> None:
        self.package = package
        self.extra = extra
        super().__init__(package, extra)

    def __str__(self) -> str:
        return f"{self.package} is not installed: pip install 'incidentkit[{self.extra}]'"


class CacheUnavailable(IncidentKitError):
    """The cache does not answer, and the settings say that it must.

    Attributes:
        reason: What failed, without addresses or credentials.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)

    def __str__(self) -> str:
        return f"The cache is unavailable: {self.reason}"


class StoreError(IncidentKitError):
    """The database cannot be used as it is; trying again will not mend it.

    Attributes:
        reason: What failed, without addresses, credentials or values.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)

    def __str__(self) -> str:
        return f"The database cannot be used: {self.reason}"


class StoreUnavailable(StoreError):
    """The database cannot be reached, or did not answer in time; trying again may succeed.

    A write that ends so may or may not have been stored.
    """

    def __str__(self) -> str:
        return f"The database is unavailable: {self.reason}"


class SchemaOutOfDate(StoreError):
    """The database's schema is not the one that this version of incidentkit works on.

    Attributes:
        current: The revision found, or None if the database has none of ours.
        expected: The revision that this version of incidentkit needs.
        command: The command that mends it.
    """

    def __init__(
        self, current: str | None, expected: str, command: str = "incidentkit db upgrade"
    ) -> None:
        self.current = current
        self.expected = expected
        self.command = command
        super().__init__("the schema is out of date")
        self.args = (current, expected, command)

    def __str__(self) -> str:
        found = f"at revision {self.current}" if self.current else "not there"
        return (
            f"The database's schema is {found}, this version of incidentkit needs "
            f"{self.expected}: run `{self.command}`"
        )

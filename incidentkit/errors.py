"""Everything that incidentkit raises on purpose.

.. code-block:: text

    IncidentKitError
    ├── InvalidIncident      (also a ValueError)
    ├── IncidentNotFound     (also a LookupError)
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

from typing import TYPE_CHECKING

from attrs import frozen

if TYPE_CHECKING:
    from collections.abc import Iterable


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

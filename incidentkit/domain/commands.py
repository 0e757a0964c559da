"""Commands: the changes that a caller requests, checked when they are made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, Final

from attrs import field, frozen

from incidentkit.domain import rules
from incidentkit.domain.errors import FieldError, InvalidIncident
from incidentkit.domain.formats import schema
from incidentkit.domain.plain import Plain
from incidentkit.domain.rules import check_names, collect, raise_faults
from incidentkit.domain.values import (
    FORBIDDEN_MESSAGES,
    MAX_MANY,
    MESSAGE_MAX_LENGTH,
    MESSAGE_MIN_LENGTH,
    NAME_MAX_LENGTH,
    OPEN,
    STORABLE,
    IncidentSource,
    IncidentStatus,
    VersionMatch,
)

MAX_FAULTS: Final = 10
"""Maximum number of invalid items listed in one error."""

_ENDED: Final = frozenset(IncidentStatus) - {OPEN}


def _needs_open(incident: NewIncident, _: object, __: str | None) -> None:
    if incident.incident_type in _ENDED:
        raise ValueError(f"needs the incident_type {OPEN}")


@frozen(field_transformer=collect)
class NewIncident(Plain):
    """An incident to create: its values are checked and normalized when it is made.

    Args:
        incident_message: What happened. Surrounding white space is removed; the rest has 5 to
            1000 code points, is none of ``test``, ``none`` and ``null`` (compared after Unicode
            NFKC and casefold), and contains neither a NUL nor a lone surrogate.
        source: Who reports it: an :class:`IncidentSource` or its string value.
        incident_type: The initial status: an :class:`IncidentStatus` or its string value.
        dedup_key: The problem that it is about, in 1 to 255 characters: while an incident with
            this key is open, a further report counts as an occurrence of it instead of creating a
            second one. Requires the initial status ``new``. None: every report creates an incident.

    Raises:
        InvalidIncident: With every faulty field.
    """

    incident_message: str = field(
        converter=rules.message,
        metadata=schema(
            minLength=MESSAGE_MIN_LENGTH,
            maxLength=MESSAGE_MAX_LENGTH,
            pattern=STORABLE,
            description="What happened. Surrounding white space is removed and does not count; the "
            f"rest must not be one of {', '.join(sorted(FORBIDDEN_MESSAGES))} in any letter case.",
        ),
    )
    source: IncidentSource = field(converter=rules.source)
    incident_type: IncidentStatus = field(default=IncidentStatus.NEW, converter=rules.status)
    dedup_key: str | None = field(
        default=None,
        converter=rules.optional_name,
        validator=_needs_open,
        metadata=schema(
            minLength=1,
            maxLength=NAME_MAX_LENGTH,
            pattern=STORABLE,
            description="The problem that it is about. While an incident with this key is open, a "
            "further report counts as an occurrence of it. Only for an incident that starts as "
            "new.",
        ),
    )

    __attrs_post_init__ = raise_faults

    @classmethod
    def from_mapping(cls, values: Mapping[Any, Any]) -> NewIncident:
        """Build one from a mapping of field names to values.

        Raises:
            InvalidIncident: With every faulty, unknown or missing field.
        """
        check_names(cls, values)
        return cls(**values)


@frozen(field_transformer=collect, eq=False, repr=False)
class NoteAddition:
    """A note, and the incident whose history it goes to.

    Args:
        incident_id: 1 to 2^63-1.
        note: Surrounding white space is removed; the rest has 1 to 1000 characters.
        expected_version: The version or the tag that the incident must have, or a condition on
            them; None: any version.

    Raises:
        InvalidIncident: With every faulty field.
    """

    incident_id: int = field(converter=rules.incident_id)
    note: str = field(converter=rules.note)
    expected_version: int | str | VersionMatch | None = field(
        default=None, converter=rules.optional_version
    )

    __attrs_post_init__ = raise_faults


@frozen(field_transformer=collect)
class StatusChange:
    """A change of an incident's status.

    Args:
        incident_id: 1 to 2^63-1.
        status: The new status.
        note: A note for the history, in 1 to 1000 characters; None: no note.
        expected_version: The version or the tag that the incident must have, or a condition on
            them; None: any version.

    Raises:
        InvalidIncident: With every faulty field.
    """

    incident_id: int = field(converter=rules.incident_id)
    status: IncidentStatus = field(converter=rules.status)
    note: str | None = field(default=None, converter=rules.optional_note)
    expected_version: int | str | VersionMatch | None = field(
        default=None, converter=rules.optional_version
    )

    __attrs_post_init__ = raise_faults


def check_many(incidents: Iterable[NewIncident]) -> list[NewIncident]:
    """Return the incidents to create together.

    Raises:
        InvalidIncident: If an item is not a :class:`NewIncident`, or there are more than
            :data:`MAX_MANY`.
    """
    # Read no more than needed: an iterator may be endless.
    checked = list(islice(incidents, MAX_MANY + 1))
    if len(checked) > MAX_MANY:
        raise InvalidIncident([FieldError("incidents", f"must be at most {MAX_MANY}")])
    given: list[object] = [*checked]
    wrong = [n for n, incident in enumerate(given) if not isinstance(incident, NewIncident)]
    if wrong:
        reason = "must be a NewIncident"
        raise InvalidIncident([FieldError(f"incidents[{n}]", reason) for n in wrong[:MAX_FAULTS]])
    return checked

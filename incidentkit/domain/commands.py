"""Commands: the changes that a caller requests, checked when they are made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, Final

from attrs import field, frozen
from attrs.converters import optional

from incidentkit.domain import rules
from incidentkit.domain.details import check_details, fit_details
from incidentkit.domain.errors import FieldError, InvalidIncident
from incidentkit.domain.fitting import fit_key, fit_message
from incidentkit.domain.formats import schema
from incidentkit.domain.plain import Plain
from incidentkit.domain.rules import MAX_FAULTS, check_names, collect, raise_faults
from incidentkit.domain.values import (
    DETAILS_MAX_DEPTH,
    DETAILS_MAX_SIZE,
    FORBIDDEN_MESSAGES,
    MAX_MANY,
    MESSAGE_MAX_LENGTH,
    MESSAGE_MIN_LENGTH,
    NAME_MAX_LENGTH,
    OPEN,
    STORABLE,
    IncidentSource,
    IncidentStatus,
    SourceName,
    StatusName,
    VersionMatch,
)

_ENDED: Final = frozenset(IncidentStatus) - {OPEN}


def _needs_open(incident: NewIncident, _: object, __: str | None) -> None:
    if incident.incident_type in _ENDED:
        raise ValueError(f"needs the incident_type {OPEN}")


@frozen(field_transformer=collect)
class NewIncident(Plain):
    """An incident to create; its values are checked and normalized.

    Args:
        incident_message: What happened. Surrounding white space is removed; the rest has 5 to
            1000 code points, is none of ``test``, ``none`` and ``null`` (compared after Unicode
            NFKC and casefold), and contains neither a NUL nor a lone surrogate.
        source: Who reports it: an :class:`IncidentSource` or its string value.
        incident_type: The initial status: an :class:`IncidentStatus` or its string value.
        dedup_key: A key for the problem that it reports, 1 to 255 characters: while an incident
            with this key is open, a further report counts as an occurrence of it instead of
            creating a second one. Requires the initial status ``new``. None: every report creates
            an incident.
        details: Further information, as a JSON object: at most 16 KiB as compact JSON in UTF-8 with
            numbers written without exponents, and at most 5 levels of objects and arrays. Keys are
            strings. Values are strings, booleans, None, finite floats, integers that have 64 bits
            or that a double holds exactly, lists and tuples, and dicts. Neither a NUL nor a lone
            surrogate is allowed in a string. The dict is copied. None: no details.

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
            description="A key for the problem that it reports. While an incident with this key is "
            "open, a further report counts as an occurrence of it. Only for an incident that "
            "starts as new.",
        ),
    )
    details: dict[str, Any] | None = field(
        default=None,
        converter=optional(check_details),
        hash=False,
        metadata=schema(
            description=f"Further information: at most {DETAILS_MAX_SIZE} bytes as compact JSON "
            f"with numbers without exponents, and {DETAILS_MAX_DEPTH} levels of objects and "
            "arrays. Integers have 64 bits, or are those that a double holds exactly; strings "
            "contain no NUL."
        ),
    )

    __attrs_post_init__ = raise_faults

    @classmethod
    def fitting(
        cls,
        incident_message: str,
        source: IncidentSource | SourceName,
        *,
        incident_type: IncidentStatus | StatusName = OPEN,
        dedup_key: str | None = None,
        details: dict[str, Any] | None = None,
    ) -> NewIncident:
        """Build one from texts of any length, such as those of an exception.

        Valid values are not changed. Others are made to fit:

        - a message that is too long is cut, and ends in an ellipsis;
        - a message that is too short, or is not allowed, gets the prefix ``Incident:``;
        - a deduplication key that is too long is cut, and ends in ``~`` and a hash of the whole
          key: equal keys stay equal, and different keys stay different; an empty key becomes None;
        - in details that are too large, the longest strings are cut until the details fit, and end
          in an ellipsis.

        .. code-block:: python

            except Exception as error:
                new = NewIncident.fitting(
                    f"{type(error).__name__}: {error}",
                    "monitoring",
                    dedup_key=f"{type(error).__name__} in {job}",
                    details={"traceback": traceback.format_exc()},
                )
                await incidents.create(new)

        Args:
            incident_message: What happened.
            source: Who reports it.
            incident_type: The initial status.
            dedup_key: A key for the problem; None: every report creates an incident.
            details: Further information; None: no details.

        Raises:
            InvalidIncident: With every field that is invalid for another reason, such as a NUL, an
                unknown source, or details that are too large even without their strings.
        """
        fields: dict[str, Any] = {"source": source, "incident_type": incident_type}
        return cls(
            fit_message(incident_message),
            dedup_key=fit_key(dedup_key),
            details=fit_details(details),
            **fields,
        )

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
    """A note to add to the history of an incident.

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


@frozen(field_transformer=collect)
class Resolution:
    """A change that ends the open incident with a deduplication key.

    Args:
        dedup_key: The key, in 1 to 255 characters.
        status: The new status: any but ``new``.
        note: A note for the history, in 1 to 1000 characters; None: no note.

    Raises:
        InvalidIncident: With every faulty field.
    """

    dedup_key: str = field(converter=rules.name)
    status: IncidentStatus = field(default=IncidentStatus.COMPLETED, converter=rules.last_status)
    note: str | None = field(default=None, converter=rules.optional_note)

    __attrs_post_init__ = raise_faults

    @classmethod
    def from_mapping(cls, values: Mapping[Any, Any]) -> Resolution:
        """Build one from a mapping of field names to values.

        Raises:
            InvalidIncident: With every faulty, unknown or missing field.
        """
        check_names(cls, values)
        return cls(**values)


@frozen(field_transformer=collect)
class Resolutions:
    """A change that ends the open incidents with several deduplication keys.

    Args:
        dedup_keys: At most 100,000 keys, each in 1 to 255 characters.
        status: The new status of each: any but ``new``.
        note: A note for the history of each, in 1 to 1000 characters; None: no note.

    Raises:
        InvalidIncident: With every faulty field; a faulty key is named by its place.
    """

    dedup_keys: tuple[str, ...] = field(converter=rules.names)
    status: IncidentStatus = field(default=IncidentStatus.COMPLETED, converter=rules.last_status)
    note: str | None = field(default=None, converter=rules.optional_note)

    __attrs_post_init__ = raise_faults

    @classmethod
    def from_mapping(cls, values: Mapping[Any, Any]) -> Resolutions:
        """Build one from a mapping of field names to values.

        Raises:
            InvalidIncident: With every faulty, unknown or missing field.
        """
        check_names(cls, values)
        return cls(**values)


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

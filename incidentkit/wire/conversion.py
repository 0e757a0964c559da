"""Convert models to JSON values and back, by the rules of the wire format."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from functools import cache
from typing import Any, TypeAlias, get_args

from attrs import field, fields, frozen
from cattrs import Converter
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn, override

from incidentkit.domain import rules
from incidentkit.domain.commands import NewIncident, Resolution, Resolutions
from incidentkit.domain.errors import FieldError, InvalidIncident
from incidentkit.domain.formats import REQUIRED, read_wire_time, wire_time
from incidentkit.domain.rules import check_names, collect, raise_faults
from incidentkit.domain.values import (
    EventKind,
    Incident,
    IncidentEvent,
    IncidentSource,
    IncidentStatus,
)
from incidentkit.wire.encoding import dump_json


@frozen(field_transformer=collect)
class NewNote:
    """The body of a request that adds a note.

    Args:
        note: Surrounding white space is removed; the rest has 1 to 1000 characters.

    Raises:
        InvalidIncident: If the note breaks this rule.
    """

    note: str = field(converter=rules.note)

    __attrs_post_init__ = raise_faults

    @classmethod
    def from_mapping(cls, values: Mapping[Any, Any]) -> NewNote:
        """Build one from a mapping of field names to values.

        Raises:
            InvalidIncident: With every faulty, unknown or missing field.
        """
        check_names(cls, values)
        return cls(**values)


def _time_from_wire(value: object, _: type[datetime]) -> datetime:
    if not isinstance(value, str):
        raise TypeError("not a string")
    return read_wire_time(value)


def _member_from_wire(value: object, enum: type[StrEnum]) -> StrEnum:
    if not isinstance(value, str):
        raise TypeError("not a string")
    return enum(value)


def _exactly(expected: type) -> Any:
    def structure(value: object, _: object) -> object:
        if type(value) is not expected:
            raise TypeError(f"not of type {expected.__name__}")
        return value

    return structure


_Given: TypeAlias = NewIncident | NewNote | Resolution | Resolutions


def _from_wire(value: object, model: type[_Given]) -> _Given:
    if not isinstance(value, (dict, Mapping)):
        raise InvalidIncident([FieldError("body", "must be a JSON object")])
    return model.from_mapping(value)


@cache
def wire_converter(*, complete: bool = True) -> Converter:
    """Return the converter between models and JSON values.

    Args:
        complete: Whether to refuse an incident or an event that lacks a field. Otherwise a missing
            field gets its default, as in an answer of an older service.

    The rules of the wire format:

    - a field has the same name in JSON, in Python and in the table;
    - a time is ``YYYY-MM-DD HH:MM:SS`` in UTC;
    - a status, a source and a kind are their plain values;
    - None is ``null``, and an answer has every field; only ``details`` are left out if there are
      none;
    - numbers and strings are not converted into each other: ``"7"`` is not an id;
    - a :class:`NewIncident`, a :class:`NewNote`, a :class:`Resolution` and :class:`Resolutions`
      are read strictly: an unknown or missing field is an error that names it.
    """
    converter = Converter(detailed_validation=False)
    converter.register_unstructure_hook(datetime, wire_time)
    converter.register_structure_hook(datetime, _time_from_wire)
    converter.register_structure_hook(int, _exactly(int))
    converter.register_structure_hook(str, _exactly(str))
    converter.register_structure_hook_func(lambda type_: type_ == dict[str, Any], _exactly(dict))
    for enum in (IncidentStatus, IncidentSource, EventKind):
        # Without a hook of their own, the hook for str would apply.
        converter.register_structure_hook(enum, _member_from_wire)
    for given in get_args(_Given):
        converter.register_structure_hook(given, _from_wire)
    for model in (Incident, IncidentEvent) if complete else ():
        converter.register_structure_hook(model, _complete(model, converter))
    omitted: Any = {
        each.name: override(omit_if_default=True)
        for each in fields(Incident)
        if not each.metadata.get(REQUIRED, True)
    }
    without_none = make_dict_unstructure_fn(Incident, converter, **omitted)
    converter.register_unstructure_hook(Incident, without_none)
    return converter


def _complete(model: type[Any], converter: Converter) -> Callable[[Any, Any], Any]:
    """Return a hook that reads a model and raises KeyError for a missing field."""
    structure = make_dict_structure_fn(model, converter)
    names = [each.name for each in fields(model) if each.metadata.get(REQUIRED, True)]

    def complete(value: Any, type_: Any) -> Any:
        for name in names:
            value[name]
        return structure(value, type_)

    return complete


def encode_events(events: Sequence[IncidentEvent]) -> bytes:
    """Return the events as a JSON array."""
    return dump_json(wire_converter().unstructure(events))


def encode_event(event: IncidentEvent) -> bytes:
    """Return the event as a JSON object."""
    return dump_json(wire_converter().unstructure(event))


def decode_event(data: bytes | str) -> IncidentEvent:
    """Read the output of :func:`encode_event`; unknown fields are ignored.

    Raises:
        ValueError: If it is not a JSON object of an event.
    """
    try:
        return wire_converter().structure(json.loads(data), IncidentEvent)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError("not a JSON object of an event") from error


def decode_incident(data: bytes | str) -> Incident:
    """Read the output of :func:`encode_incident`; unknown fields are ignored.

    Raises:
        ValueError: If it is not a JSON object of an incident.
    """
    try:
        return wire_converter().structure(json.loads(data), Incident)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError("not a JSON object of an incident") from error


def decode_optional(data: bytes | str) -> Incident | None:
    """Read the output of :func:`encode_optional`; unknown fields are ignored.

    Raises:
        ValueError: If it is neither ``null`` nor a JSON object of an incident.
    """
    return None if data in ("null", b"null") else decode_incident(data)


def decode_optionals(data: bytes | str) -> list[Incident | None]:
    """Read the output of :func:`encode_optionals`; unknown fields are ignored.

    Raises:
        ValueError: If it is not a JSON array of incidents and ``null``.
    """
    return _decode_array(data, Incident | None)


def decode_incidents(data: bytes | str) -> list[Incident]:
    """Read the output of :func:`encode_incidents`; unknown fields are ignored.

    Raises:
        ValueError: If it is not a JSON array of incidents.
    """
    return _decode_array(data, Incident)


def _decode_array(data: bytes | str, item: Any) -> list[Any]:
    try:
        value = json.loads(data)
        if not isinstance(value, list):
            raise TypeError("not an array")  # noqa: TRY301
        return wire_converter().structure(value, list[item])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError("not a JSON array of incidents") from error

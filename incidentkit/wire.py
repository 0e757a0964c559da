"""Convert models to JSON and back, the same over HTTP and in caches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache
from operator import attrgetter
from types import UnionType
from typing import Any, Final, get_args, get_type_hints

from attrs import field, fields_dict, frozen
from cattrs import Converter
from cattrs.gen import make_dict_structure_fn

from incidentkit.domain import rules
from incidentkit.domain.commands import NewIncident
from incidentkit.domain.errors import FieldError, InvalidIncident
from incidentkit.domain.rules import check_names, collect, raise_faults
from incidentkit.domain.values import (
    EventKind,
    Incident,
    IncidentEvent,
    IncidentSource,
    IncidentStatus,
)

_quote: Final = json.encoder.encode_basestring
_text_of: Final = datetime.__str__
_QUOTED: Final = {name.value: f'"{name.value}"' for name in (*IncidentStatus, *IncidentSource)}

TIME_FORMAT: Final = "%Y-%m-%d %H:%M:%S"


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


def _time_to_wire(value: datetime) -> str:
    # Not strftime(): on some platforms its %Y has no leading zeros.
    return value.astimezone(UTC).isoformat(sep=" ", timespec="seconds").removesuffix("+00:00")


def _time_from_wire(value: object, _: type[datetime]) -> datetime:
    if not isinstance(value, str):
        raise TypeError("not a string")
    return datetime.strptime(value, TIME_FORMAT).replace(tzinfo=UTC)


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


def _from_wire(value: object, model: type[NewIncident | NewNote]) -> NewIncident | NewNote:
    if not isinstance(value, (dict, Mapping)):
        raise InvalidIncident([FieldError("body", "must be a JSON object")])
    return model.from_mapping(value)


@cache
def wire_converter() -> Converter:
    """Return the converter between models and JSON values.

    The rules of the wire format:

    - a field has the same name in JSON, in Python and in the table;
    - a time is ``YYYY-MM-DD HH:MM:SS`` in UTC;
    - a status, a source and a kind are their plain values;
    - None is ``null``, and an answer has every field;
    - numbers and strings are not converted into each other: ``"7"`` is not an id;
    - a :class:`NewIncident` and a :class:`NewNote` are read strictly: an unknown or missing field
      is an error that names it.
    """
    converter = Converter(detailed_validation=False)
    converter.register_unstructure_hook(datetime, _time_to_wire)
    converter.register_structure_hook(datetime, _time_from_wire)
    converter.register_structure_hook(int, _exactly(int))
    converter.register_structure_hook(str, _exactly(str))
    for enum in (IncidentStatus, IncidentSource, EventKind):
        # Without a hook of their own, the hook for str would apply.
        converter.register_structure_hook(enum, _member_from_wire)
    converter.register_structure_hook(NewIncident, _from_wire)
    converter.register_structure_hook(NewNote, _from_wire)
    for model in (Incident, IncidentEvent):
        converter.register_structure_hook(model, _complete(model, converter))
    return converter


def _complete(model: type[Any], converter: Converter) -> Callable[[Any, Any], Any]:
    """Return a hook that reads a model and raises KeyError for a missing field."""
    structure = make_dict_structure_fn(model, converter)
    names = fields_dict(model)

    def complete(value: Any, type_: Any) -> Any:
        for name in names:
            value[name]
        return structure(value, type_)

    return complete


def dump_json(value: Any) -> bytes:
    """Return JSON values as compact UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def encode_incident(incident: Incident) -> bytes:
    """Return the incident as a JSON object."""
    return _incident_to_json(incident).encode()


def encode_incidents(incidents: Iterable[Incident]) -> bytes:
    """Return the incidents as a JSON array."""
    return f"[{','.join(map(_incident_to_json, incidents))}]".encode()


def encode_rows(rows: Iterable[Iterable[Any]]) -> bytes:
    """Return incidents, each given as the values of its fields, as a JSON array.

    A status and a source are strings, a time is an aware datetime, and a ``last_seen_at`` of None
    stands for ``created_at``.

    Raises:
        KeyError: For an unknown status or source.
        TypeError: For a value of another type than its field has.
        ValueError: For a naive time.
    """
    return f"[{','.join([_row_to_json(*row) for row in rows])}]".encode()


def _incident_to_json(incident: Incident) -> str:
    return _row_to_json(*_VALUES(incident))


def _second(value: datetime) -> str:
    if value.tzinfo is not UTC:
        # Some drivers return times in the time zone of the session.
        if value.tzinfo is None:
            raise ValueError("a time must be an aware datetime")
        value = value.astimezone(UTC)
    return _text_of(value)[:19]


def _compile_row_to_json() -> Callable[..., str]:
    """Return a function that takes the values of an incident's fields, and returns its JSON object.

    It does what the converter and :func:`dump_json` do, in a fraction of the time: compiled once
    from the fields and their types, as attrs compiles its methods, it is one f-string.
    """
    types = get_type_hints(Incident)
    members = ",".join(f'"{name}":{_json_source(name, types[name])}' for name in _FIELDS)
    source = f"lambda {', '.join(_FIELDS)}: f'''{{{{{members}}}}}'''"
    names = {"null": "null", "quote": _quote, "quoted": _QUOTED, "second": _second}
    function: Callable[..., str] = eval(source, names)  # noqa: S307
    return function


def _json_source(name: str, type_: Any) -> str:
    """Return the part of an f-string that writes the value of a field."""
    if name == "created_at":
        return '"{(created_at := second(created_at))}"'
    if name == "last_seen_at":
        # Null in a row until the incident was reported again.
        return '"{created_at if last_seen_at is None else second(last_seen_at)}"'
    if type_ is int:
        return f"{{{name}:d}}"
    given, *none = get_args(type_) if isinstance(type_, UnionType) else (type_,)
    source = f"quote({name})"
    if given is datetime:
        source = f"'\"' + second({name}) + '\"'"
    elif issubclass(given, StrEnum):
        source = f"quoted[{name}]"
    return f"{{null if {name} is None else {source}}}" if none else f"{{{source}}}"


_FIELDS: Final = tuple(fields_dict(Incident))
_VALUES: Final = attrgetter(*_FIELDS)
_row_to_json: Final = _compile_row_to_json()


def encode_events(events: Sequence[IncidentEvent]) -> bytes:
    """Return the events as a JSON array."""
    return dump_json(wire_converter().unstructure(events))


def encode_event(event: IncidentEvent) -> bytes:
    """Return the event as a JSON object."""
    return dump_json(wire_converter().unstructure(event))


def decode_incident(data: bytes | str) -> Incident:
    """Read the output of :func:`encode_incident`; unknown fields are ignored.

    Raises:
        ValueError: If it is not a JSON object of an incident.
    """
    try:
        return wire_converter().structure(json.loads(data), Incident)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError("not a JSON object of an incident") from error


def decode_incidents(data: bytes | str) -> list[Incident]:
    """Read the output of :func:`encode_incidents`; unknown fields are ignored.

    Raises:
        ValueError: If it is not a JSON array of incidents.
    """
    try:
        value = json.loads(data)
        if not isinstance(value, list):
            raise TypeError("not an array")  # noqa: TRY301
        return wire_converter().structure(value, list[Incident])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError("not a JSON array of incidents") from error

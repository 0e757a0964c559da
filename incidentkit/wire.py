"""The JSON form of incidents, the same over HTTP and in the cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from attrs import fields_dict

from incidentkit.domain.commands import NewIncident, NewNote
from incidentkit.domain.errors import FieldError, InvalidIncident
from incidentkit.domain.values import (
    EventKind,
    Incident,
    IncidentEvent,
    IncidentSource,
    IncidentStatus,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from enum import StrEnum

    from cattrs import Converter

_quote: Final = json.encoder.encode_basestring
_text_of: Final = datetime.__str__
_QUOTED: Final = {name.value: f'"{name.value}"' for name in (*IncidentStatus, *IncidentSource)}

TIME_FORMAT: Final = "%Y-%m-%d %H:%M:%S"


def _time_to_wire(value: datetime) -> str:
    # Not strftime, whose %Y has no leading zeros on some platforms.
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

    The rules of the wire:

    - a field has the name that it has in Python and in the table;
    - a time is ``YYYY-MM-DD HH:MM:SS`` in UTC;
    - a status, a source and a kind are their plain values;
    - None is ``null``, and no field of an answer is ever missing;
    - numbers and strings are taken only as what they are: ``"7"`` is no id;
    - a :class:`NewIncident` and a :class:`NewNote` are read strictly: an unknown field is refused,
      a missing one named.
    """
    from cattrs import Converter  # noqa: PLC0415

    converter = Converter(detailed_validation=False)
    converter.register_unstructure_hook(datetime, _time_to_wire)
    converter.register_structure_hook(datetime, _time_from_wire)
    converter.register_structure_hook(int, _exactly(int))
    converter.register_structure_hook(str, _exactly(str))
    for enum in (IncidentStatus, IncidentSource, EventKind):
        # Or the hook for str would be theirs, too.
        converter.register_structure_hook(enum, _member_from_wire)
    converter.register_structure_hook(NewIncident, _from_wire)
    converter.register_structure_hook(NewNote, _from_wire)
    for model in (Incident, IncidentEvent):
        converter.register_structure_hook(model, _complete(model, converter))
    return converter


def _complete(model: type[Any], converter: Converter) -> Callable[[Any, Any], Any]:
    """Return what reads a model without filling in what is missing."""
    from cattrs.gen import make_dict_structure_fn  # noqa: PLC0415

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
    """Return incidents, given as the values of their fields, as a JSON array.

    A status and a source are given as text, a time as an aware datetime; no ``last_seen_at`` is
    ``created_at``.

    Raises:
        KeyError: For a status or a source that is none.
        TypeError: For another value that no incident can have.
        ValueError: Likewise.
    """
    return f"[{','.join([_to_json(*row) for row in rows])}]".encode()


def _incident_to_json(incident: Incident) -> str:
    return _to_json(
        incident.incident_id,
        incident.incident_message,
        incident.incident_type.value,
        incident.source.value,
        incident.created_at,
        incident.version,
        incident.dedup_key,
        incident.occurrences,
        None if incident.last_seen_at == incident.created_at else incident.last_seen_at,
        incident.ended_at,
    )


def _to_json(  # noqa: PLR0913, PLR0917
    incident_id: int,
    incident_message: str,
    incident_type: str,
    source: str,
    created_at: datetime,
    version: int,
    dedup_key: str | None,
    occurrences: int,
    last_seen_at: datetime | None,
    ended_at: datetime | None,
) -> str:
    """Do what the converter and :func:`dump_json` do, in a fraction of the time."""
    created = _second(created_at)
    last_seen = created if last_seen_at is None else _second(last_seen_at)
    key = "null" if dedup_key is None else _quote(dedup_key)
    ended = "null" if ended_at is None else f'"{_second(ended_at)}"'
    return (
        f'{{"incident_id":{incident_id:d},"incident_message":{_quote(incident_message)},'
        f'"incident_type":{_QUOTED[incident_type]},"source":{_QUOTED[source]},'
        f'"created_at":"{created}","version":{version:d},"dedup_key":{key},'
        f'"occurrences":{occurrences:d},"last_seen_at":"{last_seen}","ended_at":{ended}}}'
    )


def _second(value: datetime) -> str:
    if value.tzinfo is not UTC:
        # As drivers return it that go by the time zone of a session.
        if value.tzinfo is None:
            raise ValueError("a time must be an aware datetime")
        value = value.astimezone(UTC)
    return _text_of(value)[:19]


def encode_events(events: Sequence[IncidentEvent]) -> bytes:
    """Return the events as a JSON array."""
    return dump_json(wire_converter().unstructure(events))


def encode_event(event: IncidentEvent) -> bytes:
    """Return the event as a JSON object."""
    return dump_json(wire_converter().unstructure(event))


def decode_incident(data: bytes | str) -> Incident:
    """Read what :func:`encode_incident` wrote; fields that are unknown are left out.

    Raises:
        ValueError: If it is no incident.
    """
    try:
        return wire_converter().structure(json.loads(data), Incident)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError("not a JSON object of an incident") from error


def decode_incidents(data: bytes | str) -> list[Incident]:
    """Read what :func:`encode_incidents` wrote; fields that are unknown are left out.

    Raises:
        ValueError: If it is no array of incidents.
    """
    try:
        value = json.loads(data)
        if not isinstance(value, list):
            raise TypeError("not an array")  # noqa: TRY301
        return wire_converter().structure(value, list[Incident])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError("not a JSON array of incidents") from error

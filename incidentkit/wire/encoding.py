"""Encode incidents as JSON, in a fraction of the time that a converter takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from operator import attrgetter
from types import UnionType
from typing import Any, Final, get_args, get_type_hints

from attrs import fields_dict

from incidentkit.domain.values import Incident, IncidentSource, IncidentStatus

_quote: Final = json.encoder.encode_basestring
_compact: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_text_of: Final = datetime.__str__
_QUOTED: Final = {name.value: f'"{name.value}"' for name in (*IncidentStatus, *IncidentSource)}


def dump_json(value: Any) -> bytes:
    """Return JSON values as compact UTF-8."""
    return _compact(value).encode()


def encode_incident(incident: Incident) -> bytes:
    """Return the incident as a JSON object, with ``details`` only if there are any."""
    return _to_json(incident).encode()


def encode_incidents(incidents: Iterable[Incident]) -> bytes:
    """Return the incidents as a JSON array of such objects."""
    return f"[{','.join(map(_to_json, incidents))}]".encode()


def encode_optional(incident: Incident | None) -> bytes:
    """Return the incident as a JSON object; None is ``null``."""
    return b"null" if incident is None else encode_incident(incident)


def encode_optionals(incidents: Iterable[Incident | None]) -> bytes:
    """Return the incidents as a JSON array, in which None is ``null``."""
    return b"[%b]" % b",".join(map(encode_optional, incidents))


def encode_object(name: str, value: bytes, others: Mapping[str, Any]) -> bytes:
    """Return a JSON object whose first member is JSON already.

    Args:
        name: The name of that member.
        value: Its value.
        others: The other members, at least one.
    """
    return b"{%b:%b,%b" % (dump_json(name), value, dump_json(others)[1:])


def encode_rows(rows: Iterable[Iterable[Any]]) -> bytes:
    """Return incidents, each given as the values of its fields except details, as a JSON array.

    A status and a source are strings, a time is an aware datetime, and a ``last_seen_at`` of None
    stands for ``created_at``.

    Raises:
        KeyError: For an unknown status or source.
        TypeError: For a value of another type than its field has.
        ValueError: For a naive time.
    """
    return f"[{','.join([_row_to_json(*row) for row in rows])}]".encode()


def _second(value: datetime) -> str:
    if value.tzinfo is not UTC:
        # Some drivers return times in the time zone of the session.
        if value.tzinfo is None:
            raise ValueError("a time must be an aware datetime")
        value = value.astimezone(UTC)
    return _text_of(value)[:19]


def _to_json(incident: Incident) -> str:
    text = _row_to_json(*_VALUES(incident))
    if incident.details is None:
        return text
    return f'{text[:-1]},"details":{_compact(incident.details)}}}'


def _compile_row_to_json(fields: Sequence[str]) -> Callable[..., str]:
    """Return a function that takes the values of some fields, and returns their JSON object.

    It does what the converter and :func:`dump_json` do, in a fraction of the time: compiled once
    from the fields and their types, as attrs compiles its methods, it is one f-string.
    """
    types = get_type_hints(Incident)
    members = ",".join(f'"{name}":{_json_source(name, types[name])}' for name in fields)
    source = f"lambda {', '.join(fields)}: f'''{{{{{members}}}}}'''"
    names = {
        "null": "null",
        "quote": _quote,
        "quoted": _QUOTED,
        "second": _second,
    }
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


_FIELDS: Final = tuple(name for name in fields_dict(Incident) if name != "details")
_VALUES: Final = attrgetter(*_FIELDS)
_row_to_json: Final = _compile_row_to_json(_FIELDS)

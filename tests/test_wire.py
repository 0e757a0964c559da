"""The wire format of incidents, over HTTP and in the cache."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from itertools import product
from typing import Any

import pytest
from attrs import evolve
from hypothesis import assume, example, given
from hypothesis import strategies as st

from incidentkit import FieldError, Incident, IncidentSource, IncidentStatus, InvalidIncident
from incidentkit.domain.commands import NewIncident
from incidentkit.domain.values import SearchPage
from incidentkit.wire import (
    decode_incidents,
    dump_json,
    encode_incident,
    encode_incidents,
    encode_object,
    encode_rows,
    wire_converter,
)
from tests.strategies import incidents

FIELDS = [
    "incident_id",
    "incident_message",
    "incident_type",
    "source",
    "created_at",
    "version",
    "dedup_key",
    "occurrences",
    "last_seen_at",
    "ended_at",
]
MAY_BE_NULL = {"dedup_key", "ended_at"}

DISK = Incident(
    7,
    'Диск "db-1" полон \U0001f525',
    IncidentStatus.NEW,
    IncidentSource.MONITORING,
    datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC),
    2,
    "disk-full:db-1",
    2,
    datetime(2025, 1, 2, 4, 0, 0, tzinfo=UTC),
)
DISK_ON_THE_WIRE = (
    '{"incident_id":7,"incident_message":"Диск \\"db-1\\" полон \U0001f525","incident_type":"new",'
    '"source":"monitoring","created_at":"2025-01-02 03:04:05","version":2,'
    '"dedup_key":"disk-full:db-1","occurrences":2,"last_seen_at":"2025-01-02 04:00:00",'
    '"ended_at":null}'
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), inner, max_size=5)
    ),
    max_leaves=12,
)

JSON_OF_NO_FIELD: list[object] = [None, True, 1.0, [], {}]


def on_the_wire(**changes: object) -> bytes:
    """Return an array of one incident with some changed values."""
    return dump_json([json.loads(DISK_ON_THE_WIRE) | changes])


# Encoding


def test_incident_on_the_wire() -> None:
    """A compact object without unnecessary escapes, and with details only if there are any."""
    details = {"path": "/var", "b": [1, 2.5, "磁", None]}
    end = ',"details":{"path":"/var","b":[1,2.5,"磁",null]}}'
    detailed = DISK_ON_THE_WIRE[:-1] + end
    assert encode_incident(DISK).decode() == DISK_ON_THE_WIRE
    assert encode_incident(evolve(DISK, details=details)).decode() == detailed
    both = encode_incidents([DISK, evolve(DISK, details=details)])
    assert both.decode() == f"[{DISK_ON_THE_WIRE},{detailed}]"
    assert [each.details for each in decode_incidents(both)] == [None, details]
    assert encode_incidents([DISK, DISK]).decode() == f"[{DISK_ON_THE_WIRE},{DISK_ON_THE_WIRE}]"
    assert encode_incidents([]) == b"[]"


@given(st.lists(incidents, max_size=5))
def test_what_other_programs_read(stored: list[Incident]) -> None:
    """Any JSON reader finds the plain values, in the order of the fields and of the incidents."""
    objects = json.loads(encode_incidents(stored))
    assert [list(item) for item in objects] == [FIELDS] * len(stored)
    for item, incident in zip(objects, stored, strict=True):
        assert item["incident_id"] == incident.incident_id
        assert item["incident_message"] == incident.incident_message
        assert item["incident_type"] == incident.incident_type.value
        assert item["source"] == incident.source.value
        assert item == json.loads(encode_incident(incident))


@given(st.lists(incidents, max_size=3), st.none() | st.text(), st.none() | st.integers(0))
def test_an_object_around_encoded_incidents_is_what_the_converter_makes(
    some: list[Incident], following: str | None, total: int | None
) -> None:
    """A page of a search is encoded as the converter does it."""
    members = {"next": following, "total": total}
    found = encode_object("incidents", encode_incidents(some), members)
    assert found == dump_json(wire_converter().unstructure(SearchPage(some, following, total)))


@given(incidents)
@example(
    Incident(
        1,
        "Disk",
        IncidentStatus.NEW,
        IncidentSource.PARTNER,
        datetime(33, 1, 1, 1, 30, tzinfo=timezone(timedelta(hours=3))),
    )
)
def test_time_on_the_wire_is_utc_with_leading_zeros(incident: Incident) -> None:
    """A time is `YYYY-MM-DD HH:MM:SS` in UTC, in every century."""
    text = json.loads(encode_incident(incident))["created_at"]
    assert re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}", text)
    assert datetime.fromisoformat(f"{text}+00:00") == incident.created_at


# Decoding


@given(st.lists(incidents, max_size=5))
def test_incidents_come_back_as_they_were(stored: list[Incident]) -> None:
    """Decoding encoded incidents gives equal incidents with values of the right types."""
    read = decode_incidents(encode_incidents(stored))
    assert read == stored
    for copy, incident in zip(read, stored, strict=True):
        assert type(copy) is Incident
        assert type(copy.incident_id) is int
        assert type(copy.incident_message) is str
        assert copy.incident_type is incident.incident_type
        assert copy.source is incident.source
        assert copy.created_at.tzinfo is UTC


@given(st.binary(max_size=100) | st.text('[]{}:,"0aE-+. \ttrufalsn\\').map(str.encode))
@example(b"")
@example(b"\xff\xfe")
@example(b"[" * 100_000)
@example(b'[{"a":' * 20_000)
@example(b"[" + b"9" * 5_000 + b"]")
@example(b"[NaN]")
@example(b"[1e999]")
def test_any_bytes_are_incidents_or_a_value_error(data: bytes) -> None:
    """Bytes that are not an array of incidents raise ValueError, and nothing else."""
    with suppress(ValueError):
        assert decode_incidents(data) == []


@given(json_values.filter(lambda value: value != []))
@example([[]])
@example([{}])
@example([None])
@example(["incident_id"])
@example({"incidents": []})
@example("[]")
def test_other_json_is_refused(value: Any) -> None:
    """JSON that is not an array of incidents raises ValueError."""
    with pytest.raises(ValueError, match="not a JSON array of incidents"):
        decode_incidents(json.dumps(value).encode())


@pytest.mark.parametrize("message", ["", "test", "x" * 1001, " padded "])
def test_stored_message_is_read_whatever_it_is(message: str) -> None:
    """The rules apply to new incidents only: any stored message is decoded."""
    read = decode_incidents(on_the_wire(incident_message=message))
    assert [incident.incident_message for incident in read] == [message]


@pytest.mark.parametrize("field", FIELDS)
def test_incident_without_a_field_is_refused(field: str) -> None:
    """A missing field is an error, not a default."""
    incident = json.loads(DISK_ON_THE_WIRE)
    del incident[field]
    with pytest.raises(ValueError, match="not a JSON array of incidents"):
        decode_incidents(dump_json([json.loads(DISK_ON_THE_WIRE), incident]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            (field, value)
            for field, value in product(FIELDS, JSON_OF_NO_FIELD)
            if value is not None or field not in MAY_BE_NULL
        ),
        ("details", []),
        ("details", "{}"),
        ("incident_id", ""),
        ("incident_id", "7"),
        ("incident_message", 7),
        ("incident_type", ""),
        ("incident_type", "NEW"),
        ("incident_type", "operator"),
        ("incident_type", 0),
        ("source", ""),
        ("source", "new"),
        ("source", 0),
        ("created_at", ""),
        ("created_at", 1735786800),
        ("created_at", "2025-01-02T03:04:05"),
        ("created_at", "2025-01-02 03:04:05Z"),
        ("created_at", "2025-01-02 03:04:05+00:00"),
        ("created_at", "2025-01-02 03:04:05.5"),
        ("created_at", "2025-01-02"),
        ("created_at", "2025-02-30 03:04:05"),
        ("created_at", "25-01-02 03:04:05"),
    ],
)
def test_incident_with_another_value_is_refused(field: str, value: object) -> None:
    """Numbers, strings, members and times are not converted into each other."""
    assert decode_incidents(on_the_wire()) == [DISK]
    with pytest.raises(ValueError, match="not a JSON array of incidents"):
        decode_incidents(on_the_wire(**{field: value}))


# New incidents


def test_new_incident_is_read_by_the_rules_of_new_incidents() -> None:
    """An object from the wire is normalized and completed like any new incident."""
    value = {"incident_message": " Disk is full ", "source": "operator"}
    assert wire_converter().structure(value, NewIncident) == NewIncident("Disk is full", "operator")


def test_faults_of_a_new_incident_from_the_wire_are_all_told() -> None:
    """Unknown, missing and faulty fields are reported in one typed error."""
    with pytest.raises(InvalidIncident) as caught:
        wire_converter().structure({"incident_type": "done", "status": "new"}, NewIncident)
    assert caught.value.errors == (
        FieldError("status", "is not a known field"),
        FieldError("incident_message", "is required"),
        FieldError("source", "is required"),
        FieldError("incident_type", "must be one of: new, completed, failed"),
    )


@pytest.mark.parametrize("value", [None, True, 1, "incident_message", [], [["source", "partner"]]])
def test_new_incident_is_an_object(value: object) -> None:
    """JSON that is not an object is a fault of the body."""
    with pytest.raises(InvalidIncident) as caught:
        wire_converter().structure(value, NewIncident)
    assert caught.value.errors == (FieldError("body", "must be a JSON object"),)


@given(incidents, st.integers(-14, 14))
def test_the_time_zone_of_a_row_does_not_matter(incident: Incident, hours: int) -> None:
    """Times in the time zone of a session become UTC on the wire."""
    zone = timezone(timedelta(hours=hours, minutes=30))
    assume(1 < incident.created_at.year < 9999)
    times = [incident.created_at, incident.last_seen_at, incident.ended_at]
    created, seen, ended = (time and time.astimezone(zone) for time in times)
    row = [
        *(incident.incident_id, incident.incident_message, incident.incident_type.value),
        *(incident.source.value, created, incident.version, incident.dedup_key),
        *(incident.occurrences, seen, ended),
    ]
    assert encode_rows([row]) == encode_incidents([incident])


def test_a_time_that_is_no_moment_is_refused() -> None:
    """A naive time, as drivers return for `infinity`, is an error."""
    naive = DISK.created_at.replace(tzinfo=None)
    row = [1, "Disk", "new", "partner", naive, 1, None, 1, None, None]
    with pytest.raises(ValueError, match="aware"):
        encode_rows([row])

"""Models become plain JSON values, and serve as fields, bodies and responses in Pydantic."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import given
from pydantic import BaseModel, TypeAdapter, ValidationError

from incidentkit import (
    ChangePage,
    EventKind,
    Incident,
    IncidentEvent,
    IncidentSource,
    IncidentStatus,
    NewIncident,
    SearchPage,
)
from incidentkit.http.openapi import document
from incidentkit.http.routes import OPERATIONS
from incidentkit.wire import encode_event, encode_incident
from tests.strategies import incidents

if TYPE_CHECKING:
    from incidentkit.domain.plain import Plain

WEST: Final = timezone(-timedelta(hours=5))
INCIDENT: Final = Incident(
    7,
    "Füße: disk full",
    IncidentStatus.FAILED,
    IncidentSource.PARTNER,
    datetime(2026, 11, 28, 9, 30, 15, 999, tzinfo=UTC),
    dedup_key="disk",
    details={"labels": ["db", None], "used": 0.98},
    ended_at=datetime(2026, 11, 28, 5, 0, tzinfo=WEST),
)
EVENT: Final = IncidentEvent(
    "c", 7, EventKind.STATUS_CHANGED, IncidentStatus.NEW, IncidentStatus.FAILED, None, "n",
    datetime(9, 1, 2, tzinfo=UTC),
)  # fmt: skip
MODELS: Final = (INCIDENT, EVENT, SearchPage([INCIDENT], None, 1), ChangePage([EVENT], "c"))


class Ticket(BaseModel):
    """A model of a host."""

    incident: Incident
    duplicate: Incident | None = None
    events: list[IncidentEvent] = []


def faults(model: Any, value: object) -> dict[str, str]:
    """Return the dotted place and the message of each fault that Pydantic reports."""
    with pytest.raises(ValidationError) as raised:
        TypeAdapter(model).validate_python(value)
    return {".".join(map(str, each["loc"])): each["msg"] for each in raised.value.errors()}


@given(incidents)
def test_json_is_that_of_the_service(incident: Incident) -> None:
    """`to_json` gives the bytes of the REST service, and so does Pydantic."""
    expected = encode_incident(incident).decode()
    assert incident.to_json() == expected
    assert TypeAdapter(Incident).dump_json(incident).decode() == expected
    assert TypeAdapter(Incident).validate_json(expected) == incident


@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
def test_every_model_becomes_plain_values(model: Plain) -> None:
    """`to_dict` has only values of JSON, and the caller may change them."""
    values = model.to_dict()
    assert json.loads(json.dumps(values)) == values == json.loads(model.to_json())
    assert "<" not in repr(values)
    values.clear()
    assert model.to_dict()
    assert MODELS[2].to_dict()["incidents"] == [INCIDENT.to_dict()]


def test_times_have_the_form_of_the_wire_or_of_rfc3339() -> None:
    """On request every time says that it is in UTC, also inside a page; the default stays."""
    assert INCIDENT.to_dict()["created_at"] == "2026-11-28 09:30:15"
    (listed,) = SearchPage([INCIDENT], None, None).to_dict(times="rfc3339")["incidents"]
    assert (listed["created_at"], listed["ended_at"]) == (
        "2026-11-28T09:30:15Z",
        "2026-11-28T10:00:00Z",
    )
    assert datetime.fromisoformat(listed["last_seen_at"]) == INCIDENT.last_seen_at
    assert '"at":"0009-01-02T00:00:00Z"' in EVENT.to_json(times="rfc3339")
    assert encode_event(EVENT).decode() == EVENT.to_json()
    times: Any = "iso"
    with pytest.raises(ValueError, match="times must be one of: wire, rfc3339"):
        INCIDENT.to_dict(times)


def test_a_model_is_a_field_of_pydantic() -> None:
    """A nested incident is dumped in Python values or as JSON, and each dump is read again."""
    ticket = Ticket(incident=INCIDENT, events=[EVENT])
    assert ticket.incident is INCIDENT
    python = ticket.model_dump()
    assert python["incident"]["created_at"] == INCIDENT.created_at
    assert python["duplicate"] is None
    plain = ticket.model_dump(mode="json")
    assert plain["incident"] == INCIDENT.to_dict()
    assert plain["events"] == [EVENT.to_dict()]
    assert ticket.model_dump(include={"incident": {"version"}}) == {"incident": {"version": 1}}
    for read in (
        Ticket.model_validate(python),
        Ticket.model_validate(plain),
        Ticket.model_validate_json(ticket.model_dump_json()),
    ):
        assert read == ticket


@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
def test_pydantic_reads_each_model_and_ignores_unknown_fields(model: Plain) -> None:
    """What a later version of the service adds does not disturb a reader."""
    values = {**model.to_dict(), "later": 1}
    assert TypeAdapter(type(model)).validate_python(values) == model


def test_pydantic_names_each_faulty_field() -> None:
    """A missing field, a number as text, another form of a time and an unknown name are faults."""
    values = INCIDENT.to_dict(times="rfc3339") | {"incident_id": "7", "source": "customer"}
    del values["version"]
    assert faults(Ticket, {"incident": values}) == {
        "incident.incident_id": "Input should be a valid integer",
        "incident.source": "Input should be 'operator', 'monitoring' or 'partner'",
        "incident.created_at": "Value error, must be YYYY-MM-DD HH:MM:SS in UTC",
        "incident.version": "Field required",
        "incident.last_seen_at": "Value error, must be YYYY-MM-DD HH:MM:SS in UTC",
        "incident.ended_at": "Value error, must be YYYY-MM-DD HH:MM:SS in UTC",
    }
    naive = INCIDENT.to_dict() | {"created_at": datetime(2026, 1, 1)}  # noqa: DTZ001
    assert [*faults(Incident, naive)] == ["created_at"]
    assert [*faults(Incident, 7)] == [""]


def test_pydantic_reads_a_new_incident_by_the_rules() -> None:
    """A body is read as strictly as by the service, with the reasons of the same rules."""
    read = TypeAdapter(NewIncident).validate_python
    body: dict[str, object] = {"incident_message": " Disk is full ", "source": "partner"}
    assert read(body) == NewIncident("Disk is full", "partner")
    assert read(new := NewIncident("Disk is full", "partner")) is new
    assert faults(NewIncident, {"incident_message": "none", "dedup_key": 7, "colour": 1}) == {
        "incident_message": "Value error, must not be one of: none, null, test",
        "source": "Field required",
        "dedup_key": "Value error, must be a string",
        "colour": "Extra inputs are not permitted",
    }
    assert faults(list[NewIncident], [{**body, "incident_type": "failed", "dedup_key": "k"}]) == {
        "0.dedup_key": "Value error, needs the incident_type new"
    }


def without_titles(schema: Any) -> Any:
    """Return a JSON Schema without the titles that Pydantic adds, and with OpenAPI's references."""
    if isinstance(schema, list):
        return [without_titles(each) for each in schema]
    if isinstance(schema, dict):
        return {
            name: without_titles(value)
            for name, value in schema.items()
            if name != "title" or isinstance(value, dict)
        }
    return schema.replace("#/$defs/", "#/components/schemas/") if type(schema) is str else schema


@pytest.mark.parametrize(
    "model",
    [Incident, IncidentEvent, SearchPage, ChangePage, NewIncident],
    ids=lambda m: m.__name__,
)
def test_the_json_schema_is_that_of_the_service(model: type[Plain]) -> None:
    """Pydantic describes each model, and each enum in it, as the OpenAPI document does."""
    expected = document(OPERATIONS)["components"]["schemas"]
    schema = without_titles(TypeAdapter(model).json_schema())
    own = {model.__name__: schema, **schema.pop("$defs")}
    for name, described in own.items():
        described.pop("description")
        assert described == {
            key: value for key, value in expected[name].items() if key != "description"
        }
        assert expected[name]["description"]

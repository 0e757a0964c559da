"""The OpenAPI document describes the service exactly."""

from __future__ import annotations

import json
from datetime import datetime
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any, cast

import httpx2
import pytest
from attrs import fields_dict
from jsonschema import ValidationError  # type: ignore[import-untyped]
from openapi_spec_validator import OpenAPIV31SpecValidator

from incidentkit import IncidentClient, InvalidIncident, NewIncident
from incidentkit.domain.commands import Resolution, Resolutions
from incidentkit.domain.cursor import encode_cursor
from incidentkit.domain.values import MESSAGE_MAX_LENGTH, MESSAGE_MIN_LENGTH
from incidentkit.http import create_app
from incidentkit.http.openapi import FIELDS, document
from incidentkit.http.operation import EntityTags, Parameter
from incidentkit.http.problems import TITLES
from incidentkit.http.routes import ADMINISTRATION, DOCS, OPERATIONS
from incidentkit.wire.kinds import Kind
from tests.http.conftest import DOCUMENT, INCIDENT, MEMORY, Serve, validate

if TYPE_CHECKING:
    from collections.abc import Callable
    from enum import StrEnum

SCHEMAS = document((*OPERATIONS, *ADMINISTRATION))["components"]["schemas"]


def operations() -> list[dict[str, Any]]:
    """Return every operation of the document."""
    return [operation for path in DOCUMENT["paths"].values() for operation in path.values()]


def test_the_document_is_openapi(api: httpx2.Client) -> None:
    """The service serves a valid OpenAPI 3.1 document, made from the table of operations."""
    served = api.get("/openapi.json")
    assert served.headers["Content-Type"] == "application/json"
    assert served.json() == DOCUMENT
    assert served.json()["openapi"].startswith("3.1.")
    OpenAPIV31SpecValidator(served.json()).validate()


def test_every_documented_route_is_there() -> None:
    """The document and the app have the routes of the table."""
    documented = {
        (method.upper(), path) for path, item in DOCUMENT["paths"].items() for method in item
    }
    assert documented == {
        ("POST", "/incident/create"),
        ("POST", "/incident/create-many"),
        ("GET", "/incident/get"),
        ("GET", "/incident/get/{incident_id}"),
        ("PATCH", "/incident/update-status"),
        ("POST", "/incident/resolve"),
        ("POST", "/incident/resolve-many"),
        ("GET", "/incident/search"),
        ("GET", "/incident/changes"),
        ("GET", "/incident/history/{incident_id}"),
        ("POST", "/incident/note/{incident_id}"),
        ("GET", "/health/live"),
        ("GET", "/health/ready"),
    }
    app = create_app(IncidentClient.open(MEMORY))
    assert [route.path for route in app.routes] == [  # type: ignore[attr-defined]
        operation.path for operation in (*OPERATIONS, *DOCS)
    ]


def test_operation_ids_are_names() -> None:
    """Each operation has a unique id that is valid as a function's name."""
    ids = [operation["operationId"] for operation in operations()]
    assert len(set(ids)) == len(ids)
    assert all(id_.isidentifier() for id_ in ids)


def test_every_answer_is_described_with_an_example() -> None:
    """Each answer has a schema, an example that matches it, and a request id."""
    for operation in operations():
        for status, answer in operation["responses"].items():
            described = answer
            if "$ref" in answer:
                described = DOCUMENT["components"]["responses"][answer["$ref"].split("/")[-1]]
            assert "X-Request-ID" in described["headers"]
            assert ("Retry-After" in described["headers"]) == (status in {"429", "503"})
            created = operation["operationId"] == "create_incident" and status in ("200", "201")
            assert ("Location" in described["headers"]) == created
            if status in {"204", "304"}:
                assert status == "204" or "ETag" in described["headers"]
                assert "content" not in described
                continue
            problem = int(status) >= 400
            (media_type, *others) = described["content"]
            assert media_type == ("application/problem+json" if problem else "application/json")
            streams = operation["operationId"] == "changes" and not problem
            assert others == (["text/event-stream"] if streams else [])
            for content in described["content"].values():
                validate(content["example"], content["schema"])
            content = described["content"][media_type]
            if problem:
                kind = Kind[content["example"]["code"].upper()]
                assert kind.status == int(status)
                assert content["example"]["title"] == kind.title
                assert described["description"].startswith(TITLES[int(status)])
                assert f"`{kind.code}`" in described["description"]


def test_the_example_of_a_body_is_an_incident() -> None:
    """The example body of create is a valid incident."""
    content = DOCUMENT["paths"]["/incident/create"]["post"]["requestBody"]["content"]
    example = content["application/json"]["example"]
    validate(example, content["application/json"]["schema"])
    assert NewIncident.from_mapping(example).incident_message == example["incident_message"]


@pytest.mark.parametrize(
    "body",
    [
        {"incident_message": "x" * MESSAGE_MIN_LENGTH, "source": "operator"},
        {"incident_message": "x" * MESSAGE_MAX_LENGTH, "source": "partner"},
        {"incident_message": "x" * 9, "source": "partner", "incident_type": "failed"},
        {"incident_message": "x" * (MESSAGE_MIN_LENGTH - 1), "source": "operator"},
        {"incident_message": "x" * (MESSAGE_MAX_LENGTH + 1), "source": "operator"},
        {"incident_message": 12345, "source": "operator"},
        {"incident_message": "x" * 9, "source": "OPERATOR"},
        {"incident_message": "x" * 9, "source": "partner", "incident_type": ""},
        {"incident_message": "x" * 9, "source": "partner", "severity": 1},
        {"incident_message": "x" * 9},
        {"source": "partner"},
        [],
    ],
)
def test_the_schema_of_a_body_is_the_rule(body: Any) -> None:
    """The schema of a body accepts what the model accepts."""
    try:
        NewIncident.from_mapping(body)
        taken = True
    except (InvalidIncident, AttributeError):
        taken = False
    try:
        validate(body, {"$ref": "#/components/schemas/NewIncident"})
        described = True
    except ValidationError:
        described = False
    assert taken is described


@pytest.mark.parametrize("model", [Resolution, Resolutions])
@pytest.mark.parametrize("key", ["x", "x" * 255, "", "x" * 256, "a\x00b", 7, None])
@pytest.mark.parametrize(
    "others",
    [
        {},
        {"status": "failed", "note": None},
        {"note": "x" * 1000},
        {"status": "new"},
        {"status": None},
        {"note": ""},
        {"note": "x" * 1001},
        {"key": "x"},
    ],
)
def test_the_schema_of_a_resolution_is_the_rule(
    model: type[Resolution | Resolutions], key: Any, others: dict[str, Any]
) -> None:
    """The schema of a resolution accepts what the model accepts."""
    given = {"dedup_key": key} if model is Resolution else {"dedup_keys": [key]}
    body = {**given, **others}
    try:
        model.from_mapping(body)
        taken = True
    except InvalidIncident:
        taken = False
    try:
        validate(body, {"$ref": f"#/components/schemas/{model.__name__}"})
        described = True
    except ValidationError:
        described = False
    assert taken is described


def _number(parameter: Parameter) -> list[tuple[str, bool]]:
    assert parameter.minimum is not None
    assert parameter.maximum is not None
    return [
        (str(parameter.minimum), True),
        (str(parameter.maximum), True),
        (str(parameter.minimum - 1), False),
        (str(parameter.maximum + 1), False),
        ("", False),
    ]


def _member(parameter: Parameter) -> list[tuple[str, bool]]:
    return [
        *((member.value, True) for member in cast("type[StrEnum]", parameter.type)),
        ("", parameter.may_be_empty),
        ("any", False),
    ]


def _text(parameter: Parameter) -> list[tuple[str, bool]]:
    if parameter.name in ("after", "last_event_id"):
        # Of the length in the document.
        long = parameter.pattern is not None and "43" in parameter.pattern
        cursor = encode_cursor(1, 1, *([1, 1] if long else [0]))
        return [("AAAA", False), (cursor, True), ("", parameter.may_be_empty)]
    assert parameter.minimum == 1
    assert parameter.maximum
    texts = [("x", True), ("x" * parameter.maximum, True), ("x" * (parameter.maximum + 1), False)]
    # No header with a NUL character arrives.
    return texts if parameter.where == "header" else [*texts, ("x\x00", False)]


def _tag(_: Parameter) -> list[tuple[str, bool]]:
    return [
        *((text, True) for text in ("*", '"1"', 'W/"1"', '"0"', '"a", W/"b" ,,"c-1"', ',"",')),
        *((text, False) for text in ("1", '"1" "2"', '*, "1"', 'w/"1"', '"a', ",", '"a b"')),
    ]


def _flag(_: Parameter) -> list[tuple[str, bool]]:
    return [("true", True), ("false", True), ("1", False), ("True", False), ("", False)]


def _moment(_: Parameter) -> list[tuple[str, bool]]:
    return [
        ("2026-01-01 00:00:00", True),
        ("2026-01-01T00:00:00Z", True),
        ("2026-01-01T00:00:00.5+03:00", True),
        ("2016-12-31t23:59:60z", True),
        ("2026-01-32 00:00:00", False),
        ("2026-13-01 00:00:00", False),
        ("2026-01-01 00:00:00Z!", False),
        ("", False),
    ]


_VALUES = {int: _number, str: _text, bool: _flag, datetime: _moment, EntityTags: _tag}


@pytest.mark.parametrize(
    ("path", "parameter", "text", "allowed"),
    [
        pytest.param(operation.path, parameter, text, allowed, id=f"{operation.name}-{text}")
        for operation in OPERATIONS
        for parameter in operation.parameters
        for text, allowed in _VALUES.get(parameter.type, _member)(parameter)
        if text or parameter.where == "query" or parameter.may_be_empty
    ],
)
def test_the_bounds_of_a_parameter_are_the_rule(
    api: httpx2.Client, path: str, parameter: Parameter, text: str, allowed: bool
) -> None:
    """A value is refused if and only if the document does not allow it."""
    (item,) = DOCUMENT["paths"][path].items()
    method, operation = item
    name = parameter.header or parameter.name
    if name == "Idempotency-Key":
        # A key belongs to one operation.
        place = [each.path for each in OPERATIONS].index(path)
        text = text.replace("x", ascii_lowercase[place])
    (described,) = (each for each in operation["parameters"] if each["name"] == name)
    assert described["in"] == parameter.where
    # With an incident there is a change, so that a poll need not wait.
    api.post("/incident/create", json=INCIDENT)
    body: Any = None
    if method == "post":
        body = operation["requestBody"]["content"]["application/json"]["example"]
    if parameter.where == "path":
        answer = api.request(method, path.replace("{incident_id}", text), json=body)
    else:
        # With one incident per page, every page is within bounds.
        others = {"patch": "incident_id=1&status=new", "get": "limit=1", "post": ""}[method]
        pages = any(each["name"] == "limit" for each in operation["parameters"])
        query, headers = httpx2.QueryParams(others if pages or method == "patch" else ""), {}
        if parameter.where == "query":
            query = query.set(parameter.name, text)
        else:
            headers[name] = text
        answer = api.request(
            method,
            path.replace("{incident_id}", "1"),
            params=query,
            headers=headers,
            json=body,
        )
    assert (answer.status_code != 422) is allowed
    if not text and parameter.where == "query":
        assert described.get("allowEmptyValue", False) is allowed
    else:
        assert is_valid(as_json(parameter, text), described["schema"]) is allowed


def as_json(parameter: Parameter, text: str) -> object:
    """Return the value that the text of a parameter stands for."""
    values: dict[Any, Callable[[str], object]] = {
        int: int,
        bool: lambda value: {"true": True, "false": False}.get(value, value),
    }
    value = values.get(parameter.type, str)(text)
    return [value] if parameter.many else value


def is_valid(value: object, schema: dict[str, Any]) -> bool:
    """Return whether the value matches the schema."""
    try:
        validate(value, schema)
    except ValidationError:
        return False
    return True


def test_the_default_of_a_parameter_is_what_happens(serve: Serve) -> None:
    """Missing parameters have the default values of the contract."""
    defaults = {
        parameter["name"]: parameter["schema"].get("default")
        for parameter in DOCUMENT["paths"]["/incident/get"]["get"]["parameters"]
    }
    assert defaults == {"page": 1, "limit": 10, "status": None, "source": None}
    api = serve(create_app(IncidentClient.open(MEMORY)))
    for _ in range(11):
        api.post("/incident/create", json=INCIDENT)
    listed = api.get("/incident/get").json()
    assert [incident["incident_id"] for incident in listed] == [*range(11, 1, -1)]


def test_every_described_field_exists() -> None:
    """Every description of a field belongs to a field of its model."""
    for model, name in FIELDS:
        assert name in fields_dict(model)
        assert name in SCHEMAS[model.__name__]["properties"]


def test_the_server_of_the_document_is_where_the_app_is() -> None:
    """The paths of the document start where the app is mounted."""
    assert document(OPERATIONS)["servers"] == [{"url": "/"}]
    assert document(OPERATIONS, "/ops")["servers"] == [{"url": "/ops"}]
    assert json.dumps(document(OPERATIONS)) == json.dumps(DOCUMENT)

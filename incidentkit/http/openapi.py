"""The OpenAPI document, made from the models and the description of the operations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from types import NoneType, UnionType
from typing import Any, Final, TypeAlias, get_args, get_origin, get_type_hints

from attrs import NOTHING, evolve, fields
from starlette.types import Scope

from incidentkit.domain.commands import NewIncident, Resolution, Resolutions
from incidentkit.domain.cursor import encode_cursor
from incidentkit.domain.errors import FieldError
from incidentkit.domain.formats import REQUIRED, SCHEMA, TIME_PATTERN
from incidentkit.domain.values import (
    MAX_ID,
    NAME_MAX_LENGTH,
    NOTE_MAX_LENGTH,
    OPEN,
    STORABLE,
    TAG_PATTERN,
    ChangePage,
    EventKind,
    Incident,
    IncidentEvent,
    IncidentOrder,
    IncidentSource,
    IncidentStatus,
    SearchPage,
)
from incidentkit.http.health import (
    BareReadiness,
    FeedHealth,
    Health,
    LogHealth,
    Readiness,
    RequestLogHealth,
    SchemaHealth,
    State,
)
from incidentkit.http.operation import MAX_BODY, MAX_ITEMS, EntityTags, Operation, Parameter
from incidentkit.http.principals import ACTOR_HEADER, CHALLENGE
from incidentkit.http.problems import (
    MEDIA_TYPE,
    PAGE,
    RETRY_AFTER,
    TITLES,
    Conflict,
    Problem,
    Refusal,
    problem_for,
)
from incidentkit.http.purging import Purge
from incidentkit.http.request_id import HEADER, NAME, PATTERN
from incidentkit.http.streams import MEDIA_TYPE as MEDIA_TYPE_OF_STREAMS
from incidentkit.store.schema import SCHEMA_REVISION
from incidentkit.version import API_VERSION, API_VERSION_HEADER, __version__
from incidentkit.wire import NewNote, wire_converter
from incidentkit.wire.kinds import Kind

Json: TypeAlias = dict[str, Any]

_KEY: Final[Json] = {"minLength": 1, "maxLength": NAME_MAX_LENGTH, "pattern": STORABLE}

_NOTE: Final[Json] = {
    "minLength": 1,
    "maxLength": NOTE_MAX_LENGTH,
    "pattern": STORABLE,
    "description": "Surrounding white space is removed and does not count.",
}

FIELDS: Final[dict[tuple[type[Any], str], Json]] = {
    (NewNote, "note"): _NOTE,
    (Resolution, "dedup_key"): {
        **_KEY,
        "description": "The problem that is over: the incident with this key ends, if one is open.",
    },
    (Resolutions, "dedup_keys"): {
        "items": {"type": "string", **_KEY},
        "maxItems": MAX_ITEMS,
        "description": "The problems that are over.",
    },
    **{
        (model, name): described
        for model in (Resolution, Resolutions)
        for name, described in {
            "status": {"enum": [each for each in IncidentStatus if each is not OPEN]},
            "note": _NOTE,
        }.items()
    },
    (Purge, "purged"): {"minimum": 0, "description": "Number of removed incidents."},
    (Purge, "left"): {
        "minimum": 0,
        "description": "Number of incidents still to remove.",
    },
    (Problem, "type"): {
        "format": "uri-reference",
        "pattern": f"{PAGE}#[a-z-]+$",
        "description": "Where a page of the service describes the kind of problem.",
    },
    (Problem, "code"): {
        "enum": [kind.code for kind in Kind],
        "description": "The kind of problem, for programs. A code never changes; a later version "
        "may have further ones.",
    },
    (Problem, "status"): {"minimum": 400, "maximum": 599},
    (Problem, "request_id"): {"pattern": f"^{PATTERN}$"},
    (FeedHealth, "since"): {
        "description": "When the transaction that holds up the feed began, in UTC; otherwise null."
    },
    (FeedHealth, "pid"): {"description": "The process of PostgreSQL that runs it, or null."},
    (FeedHealth, "prepared"): {"description": "The identifier of a prepared transaction, or null."},
    (FeedHealth, "waiting"): {"description": "Whether a change waits for it."},
    (RequestLogHealth, "dropped"): {"minimum": 0},
    (LogHealth, "dropped"): {"minimum": 0},
}
"""Rules and descriptions of fields, beyond their types. The domain's models have their own."""

DESCRIPTIONS: Final[dict[type[Any], str]] = {
    IncidentSource: "Who reported an incident.",
    IncidentStatus: "The status of an incident.",
    IncidentOrder: "The order of a search, by created_at and then by id.",
    EventKind: "What happened to an incident.",
    State: "The state of a part of the service.",
    NewIncident: "An incident to create.",
    Resolution: "The end of the open incident of a key.",
    Resolutions: "The end of the open incidents of some keys.",
    NewNote: "A note to add to the history of an incident.",
    Incident: "An incident as it is stored.",
    IncidentEvent: "One change of an incident, recorded in the same transaction.",
    ChangePage: "Some changes, and the cursor to continue from.",
    SearchPage: "One page of a search.",
    Purge: "The result of one purge request.",
    FieldError: "An invalid field, and the rule that it breaks.",
    Problem: "The content of an answer with an error.",
    Conflict: "The incident that does not allow a change.",
    Health: "The state of one part.",
    SchemaHealth: "The state of the database's schema.",
    FeedHealth: "Whether changes are delivered at once.",
    RequestLogHealth: "The state of the request log in the database.",
    LogHealth: "Whether the server can write its log.",
    Readiness: "Whether the service is ready, and the state of each part.",
    BareReadiness: "Whether the service is ready, for a caller without the scope read.",
}
"""What each schema describes; docstrings would be missing under ``python -OO``."""

CLOSED: Final = (NewIncident, NewNote, Resolution, Resolutions)
"""Models whose unknown fields are refused."""

_REQUEST_ID: Final = "0b5c2f6e4d7a4c1f9e3a8d6b7c5f4e21"
_SCOPE: Final[Scope] = {"headers": ((NAME, _REQUEST_ID.encode()),)}

_INCIDENT: Final = Incident(
    7,
    "Disk is full on db-1",
    IncidentStatus.NEW,
    IncidentSource.MONITORING,
    datetime(2026, 3, 1, 9, 30, tzinfo=UTC),
    dedup_key="disk-full:db-1",
    details={"volume": "/var", "used": 0.98},
)

_EVENT: Final = IncidentEvent(
    encode_cursor(4711, 12, 2600, 7),
    7,
    EventKind.STATUS_CHANGED,
    IncidentStatus.NEW,
    IncidentStatus.COMPLETED,
    "alice",
    "The old logs were removed",
    datetime(2026, 3, 1, 9, 45, tzinfo=UTC),
)

_MODELS: Final = {
    NewIncident: NewIncident(
        "Disk is full on db-1",
        IncidentSource.MONITORING,
        dedup_key="disk-full:db-1",
        details={"volume": "/var", "used": 0.98},
    ),
    NewNote: NewNote("The old logs were removed"),
    Resolution: Resolution("disk-full:db-1", note="The old logs were removed"),
    Resolutions: Resolutions(("disk-full:db-1", "disk-full:db-2")),
    Incident: _INCIDENT,
    Conflict: Conflict(_INCIDENT),
    IncidentEvent: _EVENT,
    ChangePage: ChangePage([_EVENT], _EVENT.cursor),
    SearchPage: SearchPage([_INCIDENT], None, 1),
    Health: Health(State.OK),
    Readiness: Readiness(
        ready=True,
        database=Health(State.OK),
        schema=SchemaHealth(State.OK, SCHEMA_REVISION, SCHEMA_REVISION),
        cache=Health(State.OK),
        feed=FeedHealth(State.OK, None, None, None, waiting=False),
        request_log=RequestLogHealth(State.OFF, 0),
        log=LogHealth(State.OK, 0),
    ),
    Purge: Purge(500, 1200),
}
"""An example of each model in a request or an answer."""

_FAULT: Final = FieldError("incident_id", f"must be an integer from 1 to {MAX_ID}")

_REFUSALS: Final = (
    Refusal(Kind.MALFORMED_BODY, "The body is not well-formed JSON (line 1, column 2)"),
    Refusal(Kind.UNAUTHENTICATED, "This operation needs a valid access token"),
    Refusal(Kind.INSUFFICIENT_SCOPE, "This operation needs a token with the scope write"),
    Refusal(Kind.INCIDENT_NOT_FOUND, "Incident not found"),
    Refusal(Kind.ILLEGAL_TRANSITION, "Incident 7 cannot go from completed to new"),
    Refusal(
        Kind.UNKNOWN_CURSOR, "The cursor is unknown in this database: start again without a cursor"
    ),
    Refusal(Kind.VERSION_CONFLICT, "Incident 7 has moved on: it is at version 1"),
    Refusal(Kind.BODY_TOO_LARGE, f"The body must be at most {MAX_BODY} bytes"),
    Refusal(Kind.UNSUPPORTED_MEDIA_TYPE, "The Content-Type must be application/json"),
    Refusal(Kind.INVALID_INCIDENT, f"{_FAULT.field} {_FAULT.reason}", (_FAULT,)),
    Refusal(
        Kind.TOO_MANY_REQUESTS,
        "Too many requests at a time, the maximum is 20: try again when one has ended",
    ),
    Refusal(Kind.INTERNAL_ERROR, "The server failed to answer the request"),
    Refusal(
        Kind.STORE_UNAVAILABLE,
        "The database is unavailable, or its schema does not match the service",
    ),
)
_EXAMPLES: Final = {refusal.kind.status: refusal for refusal in _REFUSALS}
"""An example of each problem, by its status."""

_PROBLEM_HEADERS: Final = {
    401: ("WWW-Authenticate",),
    409: ("ETag",),
    412: ("ETag",),
    429: ("Retry-After",),
    503: ("Retry-After",),
}

_CHECKED: Final = (401, 403, 429, 503)
"""The problems of the check of a request's sender."""


def document(
    operations: Iterable[Operation],
    root_path: str = "",
    schemes: Mapping[str, Mapping[str, Any]] | None = None,
) -> Json:
    """Return the OpenAPI 3.1 document.

    Args:
        operations: The operations of the app; those that are not documented are left out.
        root_path: The path at which the app is mounted, quoted for a URL.
        schemes: The security schemes by which the app authenticates, by name; None: it does not.
    """
    if schemes is not None:
        operations = [_checked(operation) for operation in operations]
    schemas: Json = {}
    paths: Json = {}
    problems: set[int] = set()
    for operation in operations:
        if operation.documented:
            item = paths.setdefault(operation.path, {})
            item[operation.method.lower()] = _operation(operation, schemas, schemes)
            problems.update(operation.problems)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Incident API",
            "version": __version__,
            "summary": "Records incidents, lists them and follows their status.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": root_path or "/"}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": {
                _problem_name(status): _problem(status, schemas) for status in sorted(problems)
            },
            "headers": _HEADERS,
            **({"securitySchemes": dict(schemes)} if schemes else {}),
        },
    }


def _checked(operation: Operation) -> Operation:
    """Return an operation as an app has it that authenticates."""
    if operation.scope is None:
        return operation
    problems = tuple(sorted({*operation.problems, *_CHECKED}))
    writes = operation.method not in ("GET", "HEAD")
    parameters = (*operation.parameters, *((_ACTOR,) if writes else ()))
    return evolve(operation, problems=problems, parameters=parameters)


def _security(operation: Operation, schemes: Iterable[str]) -> list[Json]:
    """Return what is enough to send a request: one scope, by one of the schemes."""
    if operation.scope is None:
        return []
    return [{scheme: [scope]} for scheme in schemes for scope in sorted(operation.scope)]


_ACTOR: Final = Parameter(
    "actor",
    "Who makes the change, in UTF-8, for the history: recorded after the name of the token and a "
    "slash. Only for a token with the scope `act-as`.",
    str,
    where="header",
    header=ACTOR_HEADER,
    minimum=1,
    maximum=NAME_MAX_LENGTH,
)


_HEADERS: Final[Json] = {
    HEADER: {
        "description": f"The id of the request: the one sent in {HEADER}, or a new one.",
        "required": True,
        "schema": {"type": "string", "pattern": f"^{PATTERN}$"},
        "example": _REQUEST_ID,
    },
    API_VERSION_HEADER: {
        "description": "The version of this API. Services with the same major version fit the same "
        "clients.",
        "required": True,
        "schema": {"type": "string", "pattern": r"^\d+\.\d+$"},
        "example": API_VERSION,
    },
    "ETag": {
        "description": "The version of the incident with a digest of its fields, for If-Match.",
        "required": True,
        "schema": {"type": "string", "pattern": f'^"{TAG_PATTERN}"$'},
        "example": '"1-5f1c9a0e77d2"',
    },
    "Location": {
        "description": "The path of the incident.",
        "required": True,
        "schema": {"type": "string", "format": "uri-reference"},
        "example": "/incident/get/7",
    },
    "Idempotent-Replayed": {
        "description": "The answer is that of an earlier request with the same Idempotency-Key.",
        "required": False,
        "schema": {"type": "string", "enum": ["true"]},
    },
    "WWW-Authenticate": {
        "description": "How to authenticate, and what was wrong with the token that was sent.",
        "required": True,
        "schema": {"type": "string"},
        "example": CHALLENGE,
    },
    "Retry-After": {
        "description": "Seconds to wait before trying again.",
        "required": True,
        "schema": {"type": "integer", "minimum": 1},
        "example": RETRY_AFTER,
    },
}


def _operation(operation: Operation, schemas: Json, schemes: Mapping[str, object] | None) -> Json:
    described: Json = {
        "operationId": operation.name,
        "summary": operation.summary,
        "tags": [operation.path.split("/")[1]],
    }
    if operation.description:
        described["description"] = operation.description
    if operation.parameters:
        described["parameters"] = [
            _parameter(parameter, operation, schemas) for parameter in operation.parameters
        ]
    if operation.fields:
        described["requestBody"] = _fields(operation, schemas)
    if operation.body is not None:
        content = _content(operation.body, schemas)
        if operation.max_items:
            content["schema"] = {
                "type": "array",
                "items": content["schema"],
                "maxItems": operation.max_items,
            }
            content["example"] = [content["example"]]
        described["requestBody"] = {"required": True, "content": {"application/json": content}}
    if schemes:
        described["security"] = _security(operation, schemes)
    bare = None if schemes is None else operation.bare
    keyed = any(parameter.header == "Idempotency-Key" for parameter in operation.parameters)
    repeats = ("Idempotent-Replayed",) if keyed else ()
    described["responses"] = {
        str(status): {
            "description": means,
            "headers": _headers(*operation.headers, *repeats),
            "content": {
                "application/json": _or_bare(_content(operation.returns, schemas), bare, schemas),
                **({} if operation.streams is None else _stream(operation.streams, schemas)),
            },
        }
        for status, means in {operation.status: operation.success, **operation.also}.items()
    }
    if operation.absent:
        described["responses"]["204"] = {
            "description": operation.absent,
            "headers": _headers(HEADER, *repeats),
        }
    if operation.unchanged:
        described["responses"]["304"] = {
            "description": "The client has the present state",
            "headers": _headers("ETag"),
        }
    for status in operation.problems:
        described["responses"][str(status)] = (
            _problem(status, schemas, operation.members[status], bare)
            if status in operation.members
            else {"$ref": f"#/components/responses/{_problem_name(status)}"}
        )
    return described


def _fields(operation: Operation, schemas: Json) -> Json:
    """Return the body of an operation whose parameters may stand there instead of the query."""
    given = [each for each in operation.parameters if each.name in operation.fields]
    schema = {
        "type": "object",
        "properties": {
            each.name: {"description": each.description, **_field(each, schemas)} for each in given
        },
        "additionalProperties": False,
    }
    example = {each.name: each.example for each in given if each.example is not None}
    return {
        "required": False,
        "content": {"application/json": {"schema": schema, "example": example}},
    }


def _field(parameter: Parameter, schemas: Json) -> Json:
    """Return the schema of a parameter in a body, where null stands for a missing one."""
    value = _value(parameter, schemas)
    return value if parameter.required else {"anyOf": [value, {"type": "null"}]}


def _value(parameter: Parameter, schemas: Json) -> Json:
    """Return the schema of a parameter's value."""
    # A query takes a time in more formats than an answer has.
    text = parameter.type in {datetime, EntityTags}
    schema = _schema(str if text else parameter.type, schemas)
    bounds = ("minLength", "maxLength") if parameter.type is str else ("minimum", "maximum")
    values = (parameter.minimum, parameter.maximum, parameter.pattern, parameter.default)
    for keyword, value in zip((*bounds, "pattern", "default"), values, strict=True):
        if value is not None:
            schema[keyword] = value
    if parameter.many:
        schema = {"type": "array", "items": schema, "minItems": 1}
    return schema


def _parameter(parameter: Parameter, operation: Operation, schemas: Json) -> Json:
    described: Json = {
        "name": parameter.header or parameter.name,
        "in": parameter.where,
        "description": parameter.description,
        "required": parameter.required and parameter.name not in operation.fields,
        "schema": _value(parameter, schemas),
    }
    if parameter.may_be_empty and parameter.where == "query":
        described["allowEmptyValue"] = True
    return described


def _stream(model: type[Any], schemas: Json) -> Json:
    """Return the content of a stream, as text: OpenAPI 3.1 cannot describe its events."""
    example = wire_converter().unstructure(_MODELS[model])
    _schema(model, schemas)
    lines = (
        f"id: {example['cursor']}",
        f"event: {example['kind']}",
        f"data: {json.dumps(example)}",
    )
    described = (
        f"Server-sent events; the data of each is {model.__name__} as JSON. Only the data of an "
        "event `problem`, which is the last one, is Problem."
    )
    return {
        MEDIA_TYPE_OF_STREAMS: {
            "schema": {"type": "string", "description": described},
            "example": "\n".join(lines) + "\n\n",
        }
    }


def _problem_name(status: int) -> str:
    return TITLES[status].replace(" ", "")


def _problem(
    status: int,
    schemas: Json,
    members: type[Any] | None = None,
    bare: type[Any] | None = None,
) -> Json:
    example = wire_converter().unstructure(problem_for(_EXAMPLES[status], _SCOPE))
    codes = ", ".join(f"`{kind.code}`" for kind in Kind if kind.status == status)
    schema = _schema(Problem, schemas)
    if members is not None:
        more = _or_bare({"schema": _schema(members, schemas)}, bare, schemas)["schema"]
        schema = {"allOf": [schema, more]}
        example |= wire_converter().unstructure(_MODELS[members])
    return {
        "description": f"{TITLES[status]}: {codes}",
        "headers": _headers(*_PROBLEM_HEADERS.get(status, ())),
        "content": {MEDIA_TYPE: {"schema": schema, "example": example}},
    }


def _headers(*names: str) -> Json:
    """Return the headers that every answer has, and those with these names."""
    every = (HEADER, API_VERSION_HEADER, *names)
    return {name: {"$ref": f"#/components/headers/{name}"} for name in every}


def _content(type_: Any, schemas: Json) -> Json:
    """Return the schema of a model, or of a list of models, with an example."""
    many = get_origin(type_) is list
    item = get_args(type_)[0] if many else type_
    if isinstance(item, UnionType):
        # Null, in place of an item, needs no example.
        item = get_args(item)[0]
    one = wire_converter().unstructure(_MODELS[item])
    for incident in [one] if many else one.get("incidents", ()):
        # Most answers with several incidents do not have them.
        incident.pop("details", None)
    return {"schema": _schema(type_, schemas), "example": [one] if many else one}


def _or_bare(content: Json, bare: type[Any] | None, schemas: Json) -> Json:
    """Return a content that may also be a model for callers without the scope ``read``."""
    if bare is None:
        return content
    return {**content, "schema": {"anyOf": [content["schema"], _schema(bare, schemas)]}}


def _schema(type_: Any, schemas: Json) -> Json:
    """Return the JSON Schema of a type, and add that of a model or an enum to the schemas."""
    if get_origin(type_) in (list, tuple):
        return {"type": "array", "items": _schema(get_args(type_)[0], schemas)}
    if get_origin(type_) is dict:
        return {"type": "object"}
    if isinstance(type_, UnionType):
        return {"anyOf": [_schema(member, schemas) for member in get_args(type_)]}
    if type_ in _PLAIN:
        return dict(_PLAIN[type_])
    name: str = type_.__name__
    if name not in schemas:
        schemas[name] = _enum(type_) if issubclass(type_, StrEnum) else _model(type_, schemas)
    return {"$ref": f"#/components/schemas/{name}"}


_PLAIN: Final[dict[Any, Json]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer", "format": "int64"},
    NoneType: {"type": "null"},
    datetime: {"type": "string", "pattern": TIME_PATTERN},
}


def _enum(type_: type[StrEnum]) -> Json:
    return {
        "type": "string",
        "description": DESCRIPTIONS[type_],
        "enum": [member.value for member in type_],
    }


def _model(type_: type[Any], schemas: Json) -> Json:
    types = get_type_hints(type_)
    properties: Json = {}
    required = []
    for attribute in fields(type_):
        name = attribute.name
        more: Json = attribute.metadata.get(SCHEMA, {})
        described = FIELDS.get((type_, name), more)
        if not attribute.metadata.get(REQUIRED, True):
            # Left out rather than null.
            present, _ = get_args(types[name])
            properties[name] = _schema(present, schemas) | described
            continue
        properties[name] = _schema(types[name], schemas) | described
        if attribute.default is NOTHING or type_ not in CLOSED:
            required.append(name)
        else:
            properties[name]["default"] = attribute.default
    return {
        "type": "object",
        "description": DESCRIPTIONS[type_],
        "required": required,
        "properties": properties,
        **({"additionalProperties": False} if type_ in CLOSED else {}),
    }

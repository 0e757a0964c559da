"""Read requests strictly: refuse everything unknown or malformed, and say why."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import chain
from types import MappingProxyType
from typing import Any, Final, NoReturn, TypeAlias, cast
from urllib.parse import parse_qsl

from attrs import fields_dict
from starlette.requests import ClientDisconnect, Request

from incidentkit.domain import rules
from incidentkit.domain.errors import FieldError, InvalidIncident
from incidentkit.domain.rules import MAX_FAULTS
from incidentkit.domain.values import TAG_PATTERN
from incidentkit.http.operation import FRAMING, EntityTags, EntityTagValue, Operation, Parameter
from incidentkit.http.problems import Refusal
from incidentkit.pacing import in_parts
from incidentkit.wire import wire_converter
from incidentkit.wire.kinds import Kind

MAX_DIGITS: Final = 19
"""The digits of 2^63-1, the largest integer of all parameters and fields but details."""

MAX_JSON_DIGITS: Final = 310
"""Maximum characters of an integer in a body that is read exactly: those of the largest double and
a sign."""

MAX_DOUBLE: Final = 2**53
"""Limit of the integers that a JSON number with a fraction or an exponent represents exactly."""

MAX_UNKNOWN: Final = 10
"""Maximum number of unknown names listed in one problem."""

MAX_NAME: Final = 64
"""Maximum characters of an unknown name in a problem."""

KNOWN_QUERIES: Final = 256
"""Size of the LRU cache of queries that were read before."""

MAX_KNOWN_QUERY: Final = 200
"""Maximum bytes of a query in that cache."""

MAX_EMPTY: Final = 64
"""Maximum bytes of a body that counts as empty, such as ``{}`` and white space."""

_BLANKS: Final = b" \t"
"""The white space around the value of a header, which is not a part of it."""

_ENTITY_TAGS: Final = re.compile(EntityTags.PATTERN)
_ENTITY_TAG: Final = re.compile(EntityTags.TAG)
_INCIDENT_TAG: Final = re.compile(
    # Some servers append the content coding to the tag.
    rf"({TAG_PATTERN}|[1-9]\d{{0,18}})(?:-{{1,2}}(?:gzip|br|deflate|zstd))?",
    re.ASCII,
)

Headers: TypeAlias = Mapping[bytes, Sequence[bytes]]
"""The values of some headers, by their names in lower case."""


async def read_arguments(request: Request, operation: Operation) -> Mapping[str, Any]:
    """Return the operation's parameters by name, and the model from its body as ``body``.

    Raises:
        Refusal: If the query or the body cannot be decoded.
        InvalidIncident: With every faulty parameter and every faulty field of the body.
        ClientDisconnect: If the connection ends before the body does.
    """
    scope = request.scope
    query = scope["query_string"]
    headers = _watched_headers(scope["headers"], operation)
    if operation.body is not None:
        values, faults = _read_parameters(operation, query, request, headers)
        try:
            values["body"] = await _read_model(request, operation)
        except InvalidIncident as error:
            faults = [*(faults or _broken_rules(operation, values)), *error.errors]
    else:
        body: Mapping[str, Any] = {}
        if headers or scope.get("http_version", "1") >= "2":
            body = await _read_fields(request, operation, headers)
        if not (operation.in_path or headers or body) and len(query) <= MAX_KNOWN_QUERY:
            return _read_known(operation, query)
        values, faults = _read_parameters(operation, query, request, headers, body)
    if faults:
        raise InvalidIncident(faults)
    return values


def _watched_headers(headers: Iterable[tuple[bytes, bytes]], operation: Operation) -> Headers:
    """Return the values of the headers that an operation looks at."""
    watched = operation.watched
    found: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        if name in watched:
            found.setdefault(name, []).append(value.strip(_BLANKS))
    return found


@lru_cache(KNOWN_QUERIES)
def _read_known(operation: Operation, query: bytes) -> Mapping[str, Any]:
    """Return the parameters of a request that has all of them in the query."""
    values, faults = _read_parameters(operation, query)
    if faults:
        raise InvalidIncident(faults)
    return MappingProxyType(values)


def _read_parameters(
    operation: Operation,
    query_string: bytes,
    request: Request | None = None,
    headers: Headers = MappingProxyType({}),
    body: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[dict[str, Any], list[FieldError]]:
    """Return the value of each parameter, and every fault if any parameter cannot be read.

    If all can be read, return no faults: the operation itself refuses a value that breaks a rule.
    """
    query = read_query(query_string) if query_string else {}
    path = {} if request is None else request.path_params
    values, faults = _read_each(query, operation.parameters, path, headers, body)
    unknown = [name for name in query if name not in operation.in_query]
    guards: list[str] = []
    fields: list[str] = []
    if headers:
        guards = [title for name, title in operation.unsupported.items() if name in headers]
    if body:
        fields = [name for name in body if name not in operation.fields]
    if faults or unknown or guards or fields:
        faulty = {fault.field for fault in faults}
        broken = _broken_rules(operation, values)
        faults += [fault for fault in broken if fault.field not in faulty]
        faults += _unknown(unknown, "query", "parameter")
        faults += _unknown(fields, "body", "field")
        faults += [FieldError(title, "cannot be honored by this operation") for title in guards]
    return values, faults


def _broken_rules(operation: Operation, values: Mapping[str, Any]) -> list[FieldError]:
    """Return the faults that the operation would find in its parameters."""
    try:
        if operation.check is not None:
            operation.check(**values)
    except InvalidIncident as error:
        return list(error.errors)
    return []


def _read_each(
    query: Mapping[str, Sequence[str]],
    parameters: Iterable[Parameter],
    path: Mapping[str, str],
    headers: Headers,
    body: Mapping[str, Any],
) -> tuple[dict[str, Any], list[FieldError]]:
    """Return a value for each parameter: its default if it is missing or repeated."""
    values: dict[str, Any] = {}
    faults: list[FieldError] = []
    repeated = body.repeated if isinstance(body, _Object) else ()
    for parameter in parameters:
        name = parameter.name
        values[name] = parameter.default
        if parameter.where == "header" and parameter.header_name not in headers:
            continue
        try:
            given = _given(parameter, query, path, headers)
            if name in body and parameter.where == "query":
                values[name] = _read_field(name, given, body, repeated)
            elif parameter.many:
                values[name] = [_read(parameter, text) for text in given] or None
            elif len(given) > 1:
                raise ValueError(_ONCE)  # noqa: TRY301
            elif given and (given[0] or not parameter.may_be_empty):
                values[name] = _read(parameter, given[0])
            elif parameter.required:
                raise ValueError("is required")  # noqa: TRY301
        except ValueError as error:
            faults.append(FieldError(name, str(error)))
    return values, faults


_ONCE: Final = "must be given only once"
_ONCE_EACH: Final = "must have each name in an object only once"


def _given(
    parameter: Parameter,
    query: Mapping[str, Sequence[str]],
    path: Mapping[str, str],
    headers: Headers,
) -> Sequence[str]:
    """Return the texts that are given for a parameter.

    Raises:
        ValueError: If a header cannot be decoded.
    """
    if parameter.where == "query":
        return query.get(parameter.name, ())
    if parameter.where == "path":
        return [path[parameter.name]]
    values = headers[parameter.header_name]
    if parameter.type is EntityTags:
        # Several lines are one list. A tag may have any bytes.
        return [b",".join(values).decode("latin-1")]
    try:
        return [value.decode() for value in values]
    except UnicodeDecodeError:
        raise ValueError("must be UTF-8") from None


def _read_field(
    name: str, given: Sequence[str], body: Mapping[str, Any], repeated: Container[str]
) -> Any:
    """Return the value of a parameter from the body.

    Raises:
        ValueError: If it is given more than once.
    """
    if given:
        raise ValueError("must be in the query or in the body, not in both")
    if name in repeated:
        raise ValueError(_ONCE)
    return body[name]


def _read(parameter: Parameter, text: str) -> Any:
    """Return the value of a parameter, or a text for the rules to refuse.

    Raises:
        ValueError: If the text is not such a value.
    """
    read = READERS.get(parameter.type)
    return text if read is None else read(text)


def read_query(query: bytes) -> dict[str, list[str]]:
    """Return the values of each name in a query, including empty values.

    Raises:
        Refusal: If the query is not percent-encoded UTF-8.
    """
    values: dict[str, list[str]] = {}
    try:
        text = query.decode("ascii")
        if "%" in text or "+" in text:
            pairs = parse_qsl(text, keep_blank_values=True, errors="strict")
        else:
            pairs = [
                (part.partition("=")[0], part.partition("=")[2]) for part in text.split("&") if part
            ]
    except UnicodeDecodeError:
        raise Refusal(Kind.MALFORMED_QUERY, "The query is not percent-encoded UTF-8") from None
    for name, value in pairs:
        values.setdefault(name, []).append(value)
    return values


def read_header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> list[str]:
    """Return the values of a header; its name is given in lower case, as ASGI has it."""
    return [value.strip(_BLANKS).decode("latin-1") for found, value in headers if found == name]


def accepts(headers: Iterable[tuple[bytes, bytes]], media_type: str, *, before: str) -> bool:
    """Return whether a client asks for a media type by its name, and prefers no other one.

    Args:
        headers: The headers of the request.
        media_type: The media type.
        before: The media type that the client gets otherwise. It may stand for a wildcard.
    """
    qualities: dict[str, float] = {}
    for part in ",".join(read_header(headers, b"accept")).split(","):
        media_range, *parameters = (piece.strip(" \t").lower() for piece in part.split(";"))
        quality = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip(" \t") == "q":
                quality = float(value) if _QUALITY.fullmatch(value.strip(" \t")) else 0.0
                break
        qualities[media_range] = max(quality, qualities.get(media_range, 0.0))
    wanted = qualities.get(media_type, 0.0)
    main_type = f"{before.partition('/')[0]}/*"
    ranges = (before, main_type, "*/*")
    other = next((qualities[each] for each in ranges if each in qualities), 0.0)
    return wanted > 0 and wanted >= other


_QUALITY: Final = re.compile(r"0(\.\d{0,3})?|1(\.0{0,3})?", re.ASCII)


def read_integer(text: str) -> int | str:
    """Return the integer if the text is up to 19 ASCII digits, else the text.

    The rule for the parameter refuses a text.
    """
    if text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS:
        return int(text)
    return text


def read_entity_tags(text: str) -> EntityTagValue:
    """Return the versions and the tags of incidents in a list of entity tags; or ``*``.

    Tags of other things are left out.

    Raises:
        ValueError: If the text is neither a list of entity tags nor ``*``.
    """
    if _ENTITY_TAGS.fullmatch(text) is None:
        raise ValueError('must be entity tags, such as "3-5f1c9a0e77d2", or *')
    if text == "*":
        return "*"
    opaque = (each.removeprefix("W/")[1:-1] for each in _ENTITY_TAG.findall(text))
    found = (_INCIDENT_TAG.fullmatch(each) for each in opaque)
    return tuple(_read_tag(each[1]) for each in found if each is not None)


def _read_tag(text: str) -> int | str:
    return text if "-" in text else int(text)


def read_flag(text: str) -> bool | str:
    """Return the flag for ``true`` or ``false``, else the text, for the rule to refuse."""
    return {"true": True, "false": False}.get(text, text)


READERS: Final[Mapping[type[Any], Callable[[str], Any]]] = {
    int: read_integer,
    bool: read_flag,
    datetime: rules.time_text,
    EntityTags: read_entity_tags,
}
"""The function that reads a parameter's text, by the parameter's type; others stay text."""


async def read_body(request: Request, limit: int) -> bytes:
    """Return the request's body.

    Raises:
        Refusal: If it has more bytes than the limit.
        ClientDisconnect: If the connection ends before the body does.
    """
    body = bytearray()
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > limit:
            raise Refusal(Kind.BODY_TOO_LARGE, f"The body must be at most {limit} bytes")
    return bytes(body)


def read_json(body: bytes) -> object:
    """Return the JSON value of a body.

    Raises:
        Refusal: If the body is not JSON.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise Refusal(Kind.MALFORMED_BODY, "The body is not UTF-8") from None
    if text.startswith("\ufeff"):
        detail = "The body is not JSON: it starts with a byte order mark"
        raise Refusal(Kind.MALFORMED_BODY, detail)
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        detail = f"The body is not well-formed JSON ({where})"
        raise Refusal(Kind.MALFORMED_BODY, detail) from None
    except RecursionError:
        raise Refusal(Kind.MALFORMED_BODY, "The body is nested too deeply") from None


async def _read_model(request: Request, operation: Operation) -> Any:
    """Return the model, or the list of models, that an operation takes as its body."""
    _check_headers(request.scope["headers"])
    value = read_json(await read_body(request, operation.max_body))
    model = cast("type[Any]", operation.body)
    if operation.max_items:
        return await structure_many(value, model, operation.max_items)
    return structure(value, model)


async def _read_fields(
    request: Request, operation: Operation, headers: Headers
) -> Mapping[str, Any]:
    """Return the fields of an optional body; none if the operation takes none.

    Only its bytes tell whether there is a body. An intermediary may announce one for a request
    without any, and a client may send an object without fields.

    Raises:
        Refusal: If the body has content that the operation does not take.
        InvalidIncident: If it is another JSON value than an object.
    """
    announced = any(headers.get(name, [b"0"])[0].strip(b"0") for name in FRAMING)
    # HTTP/1 announces every body.
    if not announced and request.scope.get("http_version", "1") < "2":
        return {}
    if not operation.fields:
        try:
            body = await read_body(request, MAX_EMPTY)
            empty = b"".join(body.split()) in (b"", b"{}")
        except Refusal:
            empty = False
        if not empty:
            raise Refusal(Kind.UNEXPECTED_BODY, "This operation takes no body")
        return {}
    body = await read_body(request, operation.max_body)
    if not body.strip():
        return {}
    _check_headers(request.scope["headers"])
    value = read_json(body)
    if not isinstance(value, _Object):
        raise InvalidIncident([FieldError("body", _NO_OBJECT)])
    return value


_NO_OBJECT: Final = "must be a JSON object"


def structure(value: object, model: type[Any]) -> Any:
    """Return the model for a JSON value from :func:`read_json`.

    Raises:
        InvalidIncident: With every faulty field.
    """
    repeated: list[FieldError] = []
    unknown: list[FieldError] = []
    names = fields_dict(model)
    if isinstance(value, _Object) and (value.repeated or not value.keys() <= names.keys()):
        repeated = [FieldError(name, _ONCE) for name in names if name in value.repeated]
        unknown = _unknown((name for name in value if name not in names), "body", "field")
        value = {name: value[name] for name in names if name in value}
    try:
        structured = wire_converter().structure(value, model)
    except InvalidIncident as error:
        raise InvalidIncident([*_merge(repeated, error), *unknown]) from None
    if not (repeated or unknown) and isinstance(value, dict):
        # The rules of the model have bounded the depth of its objects.
        inner = [name for name, each in value.items() if isinstance(each, _Object)]
        repeated = [FieldError(name, _ONCE_EACH) for name in inner if _repeats(value[name])]
    if repeated or unknown:
        raise InvalidIncident([*repeated, *unknown])
    return structured


def _repeats(value: object) -> bool:
    """Return whether an object in a value has a name more than once."""
    if isinstance(value, list):
        return any(map(_repeats, value))
    return isinstance(value, _Object) and (
        bool(value.repeated) or any(map(_repeats, value.values()))
    )


async def structure_many(value: object, model: type[Any], limit: int) -> list[Any]:
    """Return the models for a JSON array; other requests run in between.

    Raises:
        InvalidIncident: With every faulty field of the first faulty items; or if the array has
            more items than the limit.
    """
    if not isinstance(value, list):
        raise InvalidIncident([FieldError("body", "must be a JSON array")])
    if len(value) > limit:
        raise InvalidIncident([FieldError("body", f"must have at most {limit} items")])
    faults: dict[int, list[FieldError]] = {}

    def structure_part(items: Sequence[tuple[int, object]]) -> list[Any]:
        models = []
        for number, item in items:
            try:
                models.append(structure(item, model))
            except InvalidIncident as error:
                faults[number] = [_of_item(number, fault) for fault in error.errors]
                if len(faults) >= MAX_FAULTS:
                    break
        return models

    parts = await in_parts(structure_part, list(enumerate(value)))
    if faults:
        some = sorted(faults)[:MAX_FAULTS]
        raise InvalidIncident([fault for number in some for fault in faults[number]])
    return list(chain.from_iterable(parts))


def _of_item(number: int, fault: FieldError) -> FieldError:
    name = "" if fault.field == "body" else f".{fault.field}"
    return FieldError(f"incidents[{number}]{name}", fault.reason)


def _merge(faults: list[FieldError], error: InvalidIncident) -> list[FieldError]:
    """Return the faults, and the faults of other fields in the error."""
    faulty = {fault.field for fault in faults}
    return [*faults, *(fault for fault in error.errors if fault.field not in faulty)]


class _Object(dict[str, Any]):
    """A JSON object that remembers which names it was given more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated: set[str] = set()
        if len(self) < len(pairs):
            names: set[str] = set()
            for name, _ in pairs:
                (self.repeated if name in names else names).add(name)


def _check_headers(headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Refuse a body that is not declared to be uncompressed JSON in UTF-8."""
    declared = ", ".join(read_header(headers, b"content-type"))
    if declared != "application/json":
        media_type, *parameters = declared.split(";")
        if media_type.strip().lower() != "application/json":
            raise Refusal(Kind.UNSUPPORTED_MEDIA_TYPE, "The Content-Type must be application/json")
        for parameter in parameters:
            name, _, value = parameter.lower().partition("=")
            if name.strip() == "charset" and value.strip(' \t"') != "utf-8":
                raise Refusal(Kind.UNSUPPORTED_MEDIA_TYPE, "The charset of the body must be utf-8")
    for encoding in read_header(headers, b"content-encoding"):
        if encoding.strip().lower() != "identity":
            raise Refusal(
                Kind.UNSUPPORTED_ENCODING,
                "The body must not be compressed",
                headers={"Accept-Encoding": "identity"},
            )


def _read_json_integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_JSON_DIGITS else float(digits)


def _read_json_float(text: str) -> int | float:
    """Return an integer for a number such as 7.0, as JSON Schema does, unless it is too large.

    Doubles hold every integer below the bound.
    """
    number = float(text)
    return int(number) if number.is_integer() and abs(number) < MAX_DOUBLE else number


def _refuse_constant(_: str) -> NoReturn:
    raise Refusal(Kind.MALFORMED_BODY, "The body is not JSON: JSON has no NaN and no Infinity")


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_Object,
    parse_int=_read_json_integer,
    parse_float=_read_json_float,
    parse_constant=_refuse_constant,
)


def _unknown(names: Iterable[str], where: str, what: str) -> list[FieldError]:
    """Return a fault for each of the first names, and one fault for the rest."""
    names = list(names)
    faults = [
        # A name may hold lone surrogates, which UTF-8 cannot encode.
        FieldError(name[:MAX_NAME].encode(errors="replace").decode(), f"is not a known {what}")
        for name in names[:MAX_UNKNOWN]
    ]
    if len(names) > MAX_UNKNOWN:
        more = len(names) - MAX_UNKNOWN
        faults.append(FieldError(where, f"has {more} further unknown {what}s"))
    return faults

"""Read requests strictly: refuse everything unknown or malformed, and say why."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final, NoReturn
from urllib.parse import parse_qsl

from attrs import fields_dict
from starlette.requests import ClientDisconnect, Request

from incidentkit.domain.errors import FieldError, InvalidIncident
from incidentkit.http.operation import EntityTag, Operation, Parameter
from incidentkit.http.problems import Refusal
from incidentkit.wire import wire_converter

MAX_BODY: Final = 64 * 1024
"""Maximum bytes of a request's body."""

MAX_DIGITS: Final = 19
"""The digits of 2^63-1, the largest integer of all parameters and fields."""

MAX_UNKNOWN: Final = 10
"""Maximum number of unknown names listed in one problem."""

MAX_NAME: Final = 64
"""Maximum characters of an unknown name in a problem."""

KNOWN_QUERIES: Final = 256
"""Size of the LRU cache of queries that were read before."""

MAX_KNOWN_QUERY: Final = 200
"""Maximum bytes of a query in that cache."""

_ENTITY_TAG: Final = re.compile(EntityTag.PATTERN, re.ASCII)


async def read_arguments(request: Request, operation: Operation) -> Mapping[str, Any]:
    """Return the operation's parameters by name, and the model from its body as ``body``.

    Raises:
        Refusal: If the query or the body cannot be decoded.
        InvalidIncident: With every faulty parameter and every faulty field of the body.
        ClientDisconnect: If the connection ends before the body does.
    """
    query = request.scope["query_string"]
    if operation.body is None:
        _refuse_body(request.scope["headers"])
        if operation.only_queried and len(query) <= MAX_KNOWN_QUERY:
            return _read_known(operation, query)
        values, faults = _read_parameters(operation, query, request)
    else:
        values, faults = _read_parameters(operation, query, request)
        try:
            values["body"] = structure(await read_json(request), operation.body)
        except InvalidIncident as error:
            faults = [*(faults or _broken_rules(operation, values)), *error.errors]
    if faults:
        raise InvalidIncident(faults)
    return values


@lru_cache(KNOWN_QUERIES)
def _read_known(operation: Operation, query: bytes) -> Mapping[str, Any]:
    """Return the parameters of an operation whose parameters are all in the query."""
    values, faults = _read_parameters(operation, query)
    if faults:
        raise InvalidIncident(faults)
    return MappingProxyType(values)


def _read_parameters(
    operation: Operation, query_string: bytes, request: Request | None = None
) -> tuple[dict[str, Any], list[FieldError]]:
    """Return the value of each parameter, and every fault if any parameter cannot be read.

    If all can be read, return no faults: the operation itself refuses a value that breaks a rule.
    """
    query = read_query(query_string)
    values, faults = _read_each(query, operation.parameters, request)
    unknown = [name for name in query if name not in operation.in_query]
    if faults or unknown:
        faulty = {fault.field for fault in faults}
        broken = _broken_rules(operation, values)
        faults += [fault for fault in broken if fault.field not in faulty]
        faults += _unknown(unknown, "query", "parameter")
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
    query: dict[str, list[str]], parameters: Iterable[Parameter], request: Request | None
) -> tuple[dict[str, Any], list[FieldError]]:
    """Return a value for each parameter: its default if it is missing or repeated."""
    values: dict[str, Any] = {}
    faults: list[FieldError] = []
    for parameter in parameters:
        name = parameter.name
        given: Sequence[str] = ()
        if parameter.where == "query":
            given = query.get(name, ())
        elif request is not None:
            given = (
                [request.path_params[name]]
                if parameter.where == "path"
                else read_header(request.scope["headers"], parameter.header_name)
            )
        values[name] = parameter.default
        if parameter.many:
            values[name] = [_read(parameter, text) for text in given] or None
        elif len(given) > 1:
            faults.append(FieldError(name, "must be given only once"))
        elif given and (given[0] or not parameter.may_be_empty):
            try:
                values[name] = _read(parameter, given[0])
            except ValueError as error:
                faults.append(FieldError(name, str(error)))
        elif parameter.required:
            faults.append(FieldError(name, "is required"))
    return values, faults


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
        raise Refusal(400, "The query is not percent-encoded UTF-8") from None
    for name, value in pairs:
        values.setdefault(name, []).append(value)
    return values


def read_header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> list[str]:
    """Return the values of a header; its name is given in lower case, as ASGI has it."""
    return [value.decode("latin-1") for found, value in headers if found == name]


def read_integer(text: str) -> int | str:
    """Return the integer if the text is up to 19 ASCII digits, else the text.

    The rule for the parameter refuses a text.
    """
    if text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS:
        return int(text)
    return text


def read_version(text: str) -> int | str | None:
    """Return the tag or the version in an entity tag, or None for ``*``.

    Raises:
        ValueError: If the text is not one entity tag.
    """
    if _ENTITY_TAG.fullmatch(text) is None:
        raise ValueError("(If-Match) must be one ETag from an answer, or *")
    return None if text == "*" else read_integer(text.strip('"'))


def read_flag(text: str) -> bool | str:
    """Return the flag for ``true`` or ``false``, else the text, for the rule to refuse."""
    return {"true": True, "false": False}.get(text, text)


def read_time(text: str) -> datetime:
    """Return the time of an ISO 8601 text; without an offset it is in UTC.

    Raises:
        ValueError: If the text is in another format.
    """
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        reason = "must be YYYY-MM-DD HH:MM:SS in UTC, or ISO 8601 with an offset"
        raise ValueError(reason) from None
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


READERS: Final[Mapping[type[Any], Callable[[str], Any]]] = {
    int: read_integer,
    bool: read_flag,
    datetime: read_time,
    EntityTag: read_version,
}
"""The function that reads a parameter's text, by the parameter's type; others stay text."""


async def read_json(request: Request) -> object:
    """Return the JSON value that is the request's body.

    Raises:
        Refusal: If the body is not JSON, not declared to be JSON, or too large.
        ClientDisconnect: If the connection ends before the body does.
    """
    _check_headers(request.scope["headers"])
    body = b""
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY:
            raise Refusal(413, f"The body must be at most {MAX_BODY} bytes")
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise Refusal(400, "The body is not UTF-8") from None
    if text.startswith("\ufeff"):
        raise Refusal(400, "The body is not JSON: it starts with a byte order mark")
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise Refusal(400, f"The body is not well-formed JSON ({where})") from None
    except RecursionError:
        raise Refusal(400, "The body is nested too deeply") from None


def structure(value: object, model: type[Any]) -> Any:
    """Return the model for a JSON value from :func:`read_json`.

    Raises:
        InvalidIncident: With every faulty field.
    """
    repeated: list[FieldError] = []
    unknown: list[FieldError] = []
    names = fields_dict(model)
    if isinstance(value, _Object) and (value.repeated or not value.keys() <= names.keys()):
        repeated = [
            FieldError(name, "must be given only once") for name in names if name in value.repeated
        ]
        unknown = _unknown((name for name in value if name not in names), "body", "field")
        value = {name: value[name] for name in names if name in value}
    try:
        structured = wire_converter().structure(value, model)
    except InvalidIncident as error:
        raise InvalidIncident([*_merge(repeated, error), *unknown]) from None
    if repeated or unknown:
        raise InvalidIncident([*repeated, *unknown])
    return structured


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


def _refuse_body(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Refuse a body that the headers announce."""
    for name, value in headers:
        if name == b"transfer-encoding" or (name == b"content-length" and value.strip(b" \t0")):
            raise Refusal(400, "This operation takes no body")


def _check_headers(headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Refuse a body that is not declared to be uncompressed JSON in UTF-8."""
    declared = ", ".join(read_header(headers, b"content-type"))
    if declared != "application/json":
        media_type, *parameters = declared.split(";")
        if media_type.strip().lower() != "application/json":
            raise Refusal(415, "The Content-Type must be application/json")
        for parameter in parameters:
            name, _, value = parameter.lower().partition("=")
            if name.strip() == "charset" and value.strip(' \t"') != "utf-8":
                raise Refusal(415, "The charset of the body must be utf-8")
    for encoding in read_header(headers, b"content-encoding"):
        if encoding.strip().lower() != "identity":
            raise Refusal(
                415, "The body must not be compressed", headers={"Accept-Encoding": "identity"}
            )


def _read_json_integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_DIGITS else float(digits)


def _refuse_constant(_: str) -> NoReturn:
    raise Refusal(400, "The body is not JSON: JSON has no NaN and no Infinity")


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_Object, parse_int=_read_json_integer, parse_constant=_refuse_constant
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

"""Let Pydantic read, write and describe models in their wire format.

This module is loaded only when Pydantic asks a model for its schema.
"""

from __future__ import annotations

from datetime import datetime
from functools import cache
from types import UnionType
from typing import Annotated, Any, Final, NotRequired, Union, get_args, get_type_hints

from attrs import NOTHING, Attribute, fields
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    Strict,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, InitErrorDetails, ValidationError
from pydantic_core.core_schema import (
    no_info_wrap_validator_function,
    wrap_serializer_function_ser_schema,
)
from typing_extensions import TypedDict

from incidentkit.domain.formats import (
    REQUIRED,
    SCHEMA,
    TIME_PATTERN,
    left_out,
    read_wire_time,
    wire_time,
)


def model_schema(model: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
    """Return the schema of a model: an instance of it, or its JSON object.

    Pydantic's error names each faulty field. In Python, a time may also be an aware datetime, so
    that the output of ``model_dump()`` can be read again.
    """

    def read(value: object, members: ValidatorFunctionWrapHandler) -> Any:
        if isinstance(value, model):
            return value
        given = members(value)
        try:
            return model(**given)
        except ValueError as error:
            details = _details(error, given)
            if not details:
                raise
            raise ValidationError.from_exception_data(model.__name__, details) from error

    def write(value: Any, members: SerializerFunctionWrapHandler) -> Any:
        found = ((each, getattr(value, each.name)) for each in fields(model))
        return members({each.name: given for each, given in found if not left_out(each, given)})

    members = handler.generate_schema(_members(model))
    written = wrap_serializer_function_ser_schema(write, schema=members)
    return no_info_wrap_validator_function(read, members, serialization=written)


def _details(error: ValueError, given: dict[str, Any]) -> list[InitErrorDetails]:
    """Return Pydantic's description of each fault of an InvalidIncident; none of another error."""
    return [
        InitErrorDetails(
            type="value_error",
            loc=(fault.field,),
            input=given.get(fault.field),
            ctx={"error": fault.reason},
        )
        for fault in getattr(error, "errors", ())
    ]


@cache
def _members(model: Any) -> Any:
    """Return the members of a model's JSON object, as a type that Pydantic knows."""
    hints = get_type_hints(model)
    members = {each.name: _member(each, hints[each.name]) for each in fields(model)}
    make: Any = TypedDict
    described = make(model.__name__, members)
    described.__module__ = model.__module__
    described.__doc__ = model.__doc__ and model.__doc__.partition("\n")[0]
    checks = any(_rule(each) is not None for each in fields(model))
    described.__pydantic_config__ = ConfigDict(extra="forbid" if checks else "ignore")
    return described


def _member(attribute: Attribute[Any], hint: Any) -> Any:
    schema = dict(attribute.metadata.get(SCHEMA, {}))
    described = Field(description=schema.pop("description", None), json_schema_extra=schema)
    rule = _rule(attribute)
    if rule is None:
        if attribute.metadata.get(REQUIRED, True):
            return Annotated[_strict(hint), described]
        present, _ = get_args(hint)
        return NotRequired[Annotated[_strict(present), described]]
    checked: Any = Annotated[_strict(hint), BeforeValidator(rule), described]
    if attribute.default is NOTHING:
        return checked
    return NotRequired[Annotated[checked, Field(default=attribute.default)]]


def _rule(attribute: Attribute[Any]) -> Any:
    """Return the rule of a field that callers set; None for a field that the database sets."""
    return getattr(attribute.converter, "__wrapped__", None)


def _strict(hint: Any) -> Any:
    """Return a type that accepts only the JSON values of the wire format."""
    if isinstance(hint, UnionType):
        return Union[tuple(map(_strict, get_args(hint)))]  # noqa: UP007
    return _LEAVES.get(hint, hint)


def _time(value: object) -> datetime:
    if isinstance(value, datetime) and value.tzinfo is not None:
        return value
    try:
        return read_wire_time(value if isinstance(value, str) else "")
    except ValueError:
        raise ValueError("must be YYYY-MM-DD HH:MM:SS in UTC") from None


_LEAVES: Final[dict[Any, Any]] = {
    int: Annotated[int, Strict(), WithJsonSchema({"type": "integer", "format": "int64"})],
    str: Annotated[str, Strict()],
    dict[str, Any]: Annotated[dict[str, Any], WithJsonSchema({"type": "object"})],
    datetime: Annotated[
        datetime,
        BeforeValidator(_time),
        PlainSerializer(wire_time, when_used="json"),
        WithJsonSchema({"type": "string", "pattern": TIME_PATTERN}),
    ],
}

"""The form of times in JSON, and what a JSON Schema says about a field."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

if TYPE_CHECKING:
    from attrs import Attribute

TIME_FORMAT: Final = "%Y-%m-%d %H:%M:%S"
"""A time of the wire format, in UTC."""

TIME_PATTERN: Final = r"^\d{4}-\d{2}-\d{2} \d{2}:\d{2}:\d{2}$"
"""The regular expression of a time of the wire format, for JSON Schema."""

TimesName: TypeAlias = Literal["wire", "rfc3339"]
"""The forms of a time in JSON."""

SCHEMA: Final = "schema"
"""The metadata key of a field's JSON Schema, beyond its type."""


REQUIRED: Final = "required"
"""The metadata key that says whether every JSON object has the field, which is the default. A field
that is not required is left out if it is None."""


def schema(*, required: bool = True, **keywords: Any) -> dict[str, Any]:
    """Return the metadata of a field.

    Args:
        required: Whether every answer of the service has the field.
        keywords: Its description and its bounds, in terms of JSON Schema.
    """
    return {SCHEMA: keywords, REQUIRED: required}


def wire_time(value: datetime) -> str:
    """Return a time as ``YYYY-MM-DD HH:MM:SS`` in UTC."""
    # Not strftime(): on some platforms its %Y has no leading zeros.
    return value.astimezone(UTC).isoformat(sep=" ", timespec="seconds").removesuffix("+00:00")


def rfc3339_time(value: datetime) -> str:
    """Return a time as ``YYYY-MM-DDTHH:MM:SSZ``."""
    return f"{wire_time(value).replace(' ', 'T')}Z"


def read_wire_time(text: str) -> datetime:
    """Return the time of a text from :func:`wire_time`.

    Raises:
        ValueError: If the text has another form, or there is no such time.
    """
    return datetime.strptime(text, TIME_FORMAT).replace(tzinfo=UTC)


def left_out(field: Attribute[Any], value: object) -> bool:
    """Return whether the JSON of a model leaves out a field with this value."""
    return value is None and not field.metadata.get(REQUIRED, True)

"""Turn models into plain JSON values, and let Pydantic use them as fields."""

from __future__ import annotations

import json
from datetime import datetime
from enum import StrEnum
from types import NoneType
from typing import TYPE_CHECKING, Any, Final

from attrs import fields, has

from incidentkit.domain.formats import TimesName, left_out, rfc3339_time, wire_time

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema

_SCALARS: Final = frozenset({NoneType, bool, float, int, str})
_TIMES: Final = {"wire": wire_time, "rfc3339": rfc3339_time}


class Plain:
    """The base class of models: attrs classes that become JSON, and types for Pydantic."""

    __slots__ = ()

    def to_dict(self, times: TimesName = "wire") -> dict[str, Any]:
        """Return every field as a plain JSON value, under its name in the wire format.

        ``details`` are left out if they are None.

        Args:
            times: The form of each time. ``wire``: ``2026-11-28 09:30:00`` in UTC, as the REST
                service writes it. ``rfc3339``: ``2026-11-28T09:30:00Z``.

        Raises:
            ValueError: If ``times`` is something else.
        """
        if times not in _TIMES:
            raise ValueError(f"times must be one of: {', '.join(_TIMES)}")
        write = _TIMES[times]

        def plain(value: Any) -> Any:
            if type(value) in _SCALARS:
                return value
            if isinstance(value, StrEnum):
                return value.value
            if isinstance(value, datetime):
                return write(value)
            if isinstance(value, list):
                return [plain(each) for each in value]
            if isinstance(value, dict):
                return {name: plain(each) for name, each in value.items()}
            return members(value) if has(type(value)) else value

        def members(model: Any) -> dict[str, Any]:
            found = ((each, getattr(model, each.name)) for each in fields(type(model)))
            return {each.name: plain(value) for each, value in found if not left_out(each, value)}

        return members(self)

    def to_json(self, times: TimesName = "wire") -> str:
        """Return every field as a JSON object: with the default, as the REST service writes it.

        Args:
            times: As for :meth:`to_dict`.

        Raises:
            ValueError: As for :meth:`to_dict`.
        """
        return json.dumps(self.to_dict(times), ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def __get_pydantic_core_schema__(cls, _: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        from incidentkit.domain.pydantic import model_schema  # noqa: PLC0415

        return model_schema(cls, handler)

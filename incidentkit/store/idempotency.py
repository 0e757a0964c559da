"""Writes that happen once, however often they are repeated with the same key."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from attrs import AttrsInstance, fields, frozen

from incidentkit.domain import rules


@frozen
class Idempotency:
    """What makes a write happen once.

    Attributes:
        key: The key that a caller repeats.
        fingerprint: A digest of the verb and its parameters; equal only for equal parameters.
    """

    key: str
    fingerprint: str


def idempotency(
    idempotency_key: str, verb: str, parameters: AttrsInstance | Sequence[AttrsInstance]
) -> Idempotency:
    """Return what makes a write happen once.

    Raises:
        InvalidIncident: If the key does not have 1 to 255 characters.
    """
    key = rules.check("idempotency_key", rules.name, idempotency_key)
    said = (
        [_values(each) for each in parameters]
        if isinstance(parameters, Sequence)
        else _values(parameters)
    )
    text = json.dumps([verb, said], ensure_ascii=False, separators=(",", ":"))
    return Idempotency(key, sha256(text.encode()).hexdigest())


def _values(parameters: AttrsInstance) -> Mapping[str, Any]:
    return {field.name: getattr(parameters, field.name) for field in fields(type(parameters))}

"""What makes a write happen once: its key, and a fingerprint of all else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, TypeAlias

from attrs import fields, frozen

from incidentkit.domain.commands import NewIncident, StatusChange

Parameters: TypeAlias = NewIncident | StatusChange | Sequence[NewIncident]
"""What a write with an idempotency key is asked to do."""


@frozen
class Idempotency:
    """What makes a write happen once.

    Attributes:
        key: The key that a caller repeats.
        fingerprint: A digest of the verb and its parameters; equal only for equal parameters.
    """

    key: str
    fingerprint: str


def idempotency(key: str, verb: str, parameters: Parameters) -> Idempotency:
    """Return what makes a write happen once: its key, and a digest of all else."""
    given = (
        [_values(each) for each in parameters]
        if isinstance(parameters, Sequence)
        else _values(parameters)
    )
    text = json.dumps([verb, given], ensure_ascii=False, separators=(",", ":"))
    return Idempotency(key, sha256(text.encode()).hexdigest())


def _values(parameters: NewIncident | StatusChange) -> Mapping[str, Any]:
    return {field.name: getattr(parameters, field.name) for field in fields(type(parameters))}

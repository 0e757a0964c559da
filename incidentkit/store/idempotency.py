"""Identify a repeated write by its idempotency key and a fingerprint of its parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, TypeAlias

from attrs import fields, frozen

from incidentkit.domain.commands import NewIncident, StatusChange

Parameters: TypeAlias = NewIncident | StatusChange | Sequence[NewIncident]
"""The checked arguments of a write that takes an idempotency key."""


@frozen
class Idempotency:
    """The idempotency key of a write, with a fingerprint of its verb and parameters.

    Attributes:
        key: The key that a caller repeats.
        fingerprint: A digest of the verb and its parameters; equal only for equal parameters.
        actor: Who writes, since each actor has keys of its own; None: no actor is named.
    """

    key: str
    fingerprint: str
    actor: str | None = None

    @property
    def own_key(self) -> str:
        """The key under which the database keeps this one while another actor has it."""
        digest = sha256(f"{self.actor or ''}\0{self.key}".encode()).hexdigest()
        return f"actor {digest}"

    def part(self, number: int) -> Idempotency:
        """Return the key of one part of a write that several transactions share.

        The first part has the key itself, so that another write cannot use it.
        """
        if number == 0:
            return self
        digest = sha256(f"{number} {self.key}".encode()).hexdigest()
        return Idempotency(f"part {digest}", self.fingerprint, self.actor)


def idempotency(key: str, verb: str, parameters: Parameters) -> Idempotency:
    """Return the key, with a digest of the verb and its parameters as the fingerprint."""
    given = (
        [_values(each) for each in parameters]
        if isinstance(parameters, Sequence)
        else _values(parameters)
    )
    text = json.dumps([verb, given], ensure_ascii=False, separators=(",", ":"))
    return Idempotency(key, sha256(text.encode()).hexdigest())


def _values(parameters: NewIncident | StatusChange) -> Mapping[str, Any]:
    return {field.name: getattr(parameters, field.name) for field in fields(type(parameters))}

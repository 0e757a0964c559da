"""Identify a repeated write by its idempotency key and a fingerprint of its parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, TypeAlias

from attrs import asdict, evolve, field, fields, frozen

from incidentkit.domain.commands import (
    NewIncident,
    NoteAddition,
    Resolution,
    Resolutions,
    StatusChange,
)
from incidentkit.domain.replays import REPLAY, Replay

_Command: TypeAlias = NewIncident | NoteAddition | Resolution | Resolutions | StatusChange

Parameters: TypeAlias = _Command | Sequence[NewIncident]
"""The checked arguments of a write that takes an idempotency key."""


@frozen
class Idempotency:
    """The idempotency key of a write, with a fingerprint of its verb and parameters.

    Attributes:
        key: The key that a caller repeats.
        fingerprint: A digest of the verb and its parameters; equal only for equal parameters.
        actor: Who writes, since each actor has keys of its own; None: no actor is named.
        replay: Where to tell that the write was a replay; None: nothing watches for one.
    """

    key: str
    fingerprint: str
    actor: str | None = None
    replay: Replay | None = field(default=None, eq=False)

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
        return evolve(self, key=f"part {digest}")


def idempotency(key: str, verb: str, parameters: Parameters) -> Idempotency:
    """Return the key, with a digest of the verb and its parameters as the fingerprint.

    Without details, the digest is that of the versions before details.
    """
    given = (
        [_values(each) for each in parameters]
        if isinstance(parameters, Sequence)
        else _values(parameters)
    )
    text = json.dumps([verb, given], ensure_ascii=False, separators=(",", ":"), default=asdict)
    return Idempotency(key, sha256(text.encode()).hexdigest(), replay=REPLAY.get())


def _values(parameters: _Command) -> Mapping[str, Any]:
    values = {each.name: getattr(parameters, each.name) for each in fields(type(parameters))}
    details = values.pop("details", None)
    # As text: a retry may have their keys in another order.
    return values if details is None else {**values, "details": json.dumps(details, sort_keys=True)}

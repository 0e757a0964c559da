"""Make the message and the key of a report fit their length limits."""

from __future__ import annotations

from hashlib import sha256
from typing import Final

from incidentkit.domain import rules
from incidentkit.domain.values import MESSAGE_MAX_LENGTH, NAME_MAX_LENGTH

PREFIX: Final = "Incident: "
"""Put before a message that is too short, or not allowed by itself."""

NO_MESSAGE: Final = "no message"
"""Replaces an empty message, after the prefix."""


def fit_message(value: str) -> str:
    """Return a message cut at its end, or with a prefix; unchanged if it breaks another rule."""
    try:
        text = rules.storable(value).strip()
    except ValueError:
        return value
    if len(text) > MESSAGE_MAX_LENGTH:
        return f"{text[: MESSAGE_MAX_LENGTH - 1]}…"
    try:
        return rules.message(text)
    except ValueError:
        return PREFIX + (text or NO_MESSAGE)


def fit_key(value: str | None) -> str | None:
    """Return a deduplication key; if it is too long, a hash of the whole key replaces its end.

    An empty key, which names no problem, becomes None.
    """
    try:
        text = rules.storable(value)
    except ValueError:
        return value
    if len(text) <= NAME_MAX_LENGTH:
        return text or None
    digest = sha256(text.encode()).hexdigest()
    return f"{text[: NAME_MAX_LENGTH - len(digest) - 1]}~{digest}"

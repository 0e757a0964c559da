"""Give each request an id, which its answer, its problem and its log record share."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from typing import Final

from starlette.types import Scope

HEADER: Final = "X-Request-ID"
NAME: Final = b"x-request-id"
"""The header in lower case, as ASGI has it."""

PATTERN: Final = "[A-Za-z0-9._-]{1,64}"

_SCOPE_KEY: Final = "incidentkit.request_id"
_ID: Final = re.compile(PATTERN)

_TRACE: Final = re.compile(
    # Version ff and ids of zeros are invalid.
    "(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)


def request_id(scope: Scope) -> str:
    """Return the id in the request's ``X-Request-ID`` if it fits the pattern.

    Without that header, return the trace id in ``traceparent`` if it is valid; else a new id.
    """
    known: str | None = scope.get(_SCOPE_KEY)
    if known is None:
        # It must be unique, not secret.
        known = _given(scope["headers"]) or f"{random.getrandbits(128):032x}"
        scope[_SCOPE_KEY] = known
    return known


def _given(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    parent: str | None = None
    for name, value in headers:
        if name == NAME:
            given = value.decode("latin-1")
            return given if _ID.fullmatch(given) else None
        if name == b"traceparent":
            parent = value.decode("latin-1").strip(" \t")
    found = None if parent is None else _TRACE.fullmatch(parent)
    return found and found[1]

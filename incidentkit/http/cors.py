"""Let pages of other origins use the service in a browser (CORS)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware

from incidentkit.domain import rules
from incidentkit.domain.errors import InvalidSettings

METHODS: Final = ("GET", "HEAD", "PATCH", "POST")

TAKEN: Final = (
    "Authorization",
    "Content-Type",
    "Idempotency-Key",
    "If-Match",
    "If-None-Match",
    "Last-Event-ID",
    "X-Actor",
    "X-Request-ID",
)
"""The headers that a page may send."""

EXPOSED: Final = (
    "ETag",
    "Idempotent-Replayed",
    "Link",
    "Location",
    "Retry-After",
    "WWW-Authenticate",
    "X-Request-ID",
)
"""The headers that a page may read."""

MAX_AGE: Final = 600
"""Seconds for which a browser caches the answer to a preflight."""


def allow_origins(app: Starlette, origins: Sequence[str]) -> None:
    """Add middleware to the app that allows these origins, or any for ``*``.

    Raises:
        InvalidSettings: If one of them is not an origin.
    """
    try:
        allowed = [rules.origin(origin) for origin in origins]
    except ValueError as error:
        raise InvalidSettings("cors", str(error)) from None
    app.add_middleware(
        CORSMiddleware,
        allow_origins=allowed,
        allow_methods=METHODS,
        allow_headers=TAKEN,
        expose_headers=EXPOSED,
        max_age=MAX_AGE,
    )

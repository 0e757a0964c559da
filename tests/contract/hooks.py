"""Teach Schemathesis the rules that the OpenAPI document cannot express."""

from __future__ import annotations

import os
import re
from itertools import count
from typing import TYPE_CHECKING, Any

import schemathesis

if TYPE_CHECKING:
    from collections.abc import Mapping

    from schemathesis import Case, CheckContext, HookContext, Response

NUMBERS = count(1)
"""The addresses that requests come from. Hypothesis makes random numbers repeat themselves."""

STATES = frozenset(
    {
        "duplicate_open_incident",
        "idempotency_key_reused",
        "illegal_transition",
        "incident_not_found",
        "unknown_cursor",
        "version_conflict",
    }
)
"""The problems that depend on what is in the database."""

REFUSED = frozenset(
    () if "INCIDENTKIT_TEST_TOKEN" in os.environ else ("unauthenticated", "actor_not_allowed")
)
"""The problems of requests without a valid token."""

NO_TIME = "must be YYYY-MM-DD HH:MM:SS in UTC, or a time of RFC 3339"

RULES: Mapping[str, tuple[str, ...]] = {
    # A cursor belongs to one order, or to one incident.
    "after": ("is not a cursor", "is not a cursor of this incident", "is a cursor of the order "),
    "last_event_id": ("is not a cursor",),
    # Some days do not exist.
    "created_after": (NO_TIME,),
    "created_before": (NO_TIME,),
    "ended_before": (NO_TIME,),
    # The name of the token counts too.
    "actor": ("(X-Actor) must be given once, with 1 to ",),
    # Surrounding white space does not count.
    "incident_message": ("must have 5 to 1000 characters after ", "must not be one of: "),
    "note": ("must have 1 to 1000 characters after ",),
    # Unicode says what a letter is.
    "text": (
        "must have 1 to 200 characters, with at least one letter or digit",
        "must have at most 32 different words and phrases",
    ),
    # A schema is about characters, and a header has bytes.
    "idempotency_key": ("must be UTF-8",),
    # They are about the parts of any JSON object, and about the size of all of them.
    "details": (
        "is nested too deeply: ",
        "must be an integer from ",
        "must be at most ",
        "must not contain a NUL character",
        "must not contain a lone surrogate",
    ),
    # It is about two fields or parameters.
    "dedup_key": ("needs the incident_type new",),
    "page": ("times limit must be at most ",),
    # They may be in the query or in the body.
    "incident_id": ("is required",),
    "status": ("is required",),
}
"""The rules that no schema expresses, by field: how the reasons begin."""


@schemathesis.hook
def before_call(_: HookContext, case: Case[Any], __: dict[str, Any]) -> None:
    """Give a field in one place if it is in both: no schema says that this is refused.

    Each request has another address, since failed checks are counted for each.
    """
    case.headers["X-Forwarded-For"] = f"2001:db8:0:{next(NUMBERS):x}::1"
    if is_valid(case) and isinstance(case.body, dict):
        case.query = {name: case.query[name] for name in case.query if name not in case.body}


@schemathesis.check
def valid_requests_are_taken(_: CheckContext, response: Response, case: Case[Any]) -> None:
    """Fail if a request that matches the document is refused without such a rule."""
    # Another check is about the errors of the server.
    if not is_valid(case) or not 400 <= response.status_code < 500:
        return
    problem = response.json()
    if problem["code"] == "invalid_incident":
        unexpected = [fault for fault in problem["errors"] if not is_known(fault)]
    else:
        unexpected = [] if problem["code"] in STATES | REFUSED else [problem["code"]]
    if unexpected:
        raise AssertionError(f"A valid request is refused: {unexpected}")


def is_valid(case: Case[Any]) -> bool:
    """Return whether a request is meant to match the document, and does.

    In its coverage phase, Schemathesis makes headers of letters and digits alone. Where these
    cannot match a pattern, it sends another value in a request that it takes for a valid one.
    """
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return False
    schemas = {each.name: each.definition["schema"] for each in case.operation.headers}
    return all(
        re.search(schemas[name].get("pattern", ""), str(value))
        for name, value in case.headers.items()
        if name in schemas
    )


def is_known(fault: Mapping[str, str]) -> bool:
    """Return whether a field breaks a rule that no schema expresses."""
    field = re.sub(r"^incidents\[\d+\]\.", "", fault["field"])
    if field.startswith("details"):
        field = "details"
    return fault["reason"].startswith(RULES.get(field, ()))

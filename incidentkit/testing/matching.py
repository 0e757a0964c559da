"""Compare incidents with the expectations of a test, and explain the differences."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from heapq import nlargest
from typing import Any, Final, TypeAlias

from attrs import frozen

from incidentkit.domain import rules
from incidentkit.domain.values import (
    Incident,
    IncidentEvent,
    IncidentSource,
    IncidentStatus,
    SourceName,
    StatusName,
)

TextMatcher: TypeAlias = str | re.Pattern[str] | Callable[[Any], bool]
"""The whole text, a pattern to find in it, or a function that accepts it."""

DetailsMatcher: TypeAlias = Mapping[str, Any] | Callable[[Any], bool]
"""Some of the details, each with its value, or a function that accepts them."""

NEAREST: Final = 5
"""Maximum number of incidents that a failure shows."""

SHOWN: Final = 1200
"""Maximum number of characters of a value that a failure shows: any message, some details."""

FIELDS: Final[Mapping[str, Callable[[Incident], object]]] = {
    "message": lambda incident: incident.incident_message,
    "source": lambda incident: incident.source,
    "dedup_key": lambda incident: incident.dedup_key,
    "status": lambda incident: incident.incident_type,
    "occurrences": lambda incident: incident.occurrences,
    "details": lambda incident: incident.details,
}
"""The fields that a test can expect, with their values."""


@frozen
class Expected:
    """The expected fields of an incident; None: any value.

    Raises:
        InvalidIncident: If there is no such source or status.
    """

    message: TextMatcher | None
    source: IncidentSource | SourceName | None
    dedup_key: TextMatcher | None
    status: IncidentStatus | StatusName | None
    occurrences: int | None
    details: DetailsMatcher | None

    def __attrs_post_init__(self) -> None:
        rules.check("source", rules.optional_source, self.source)
        rules.check("status", rules.optional_status, self.status)

    @property
    def fields(self) -> dict[str, object]:
        """The expected fields, by name."""
        given = {name: getattr(self, name) for name in FIELDS}
        return {name: value for name, value in given.items() if value is not None}

    def differing(self, incident: Incident) -> frozenset[str]:
        """Return the names of the fields that differ."""
        return frozenset(
            name for name, value in self.fields.items() if not fits(value, FIELDS[name](incident))
        )

    def closeness(self, incident: Incident) -> tuple[int, float, int]:
        """Return how close an incident is, by matching fields, then similar message, then id."""
        alike = 0.0
        if isinstance(self.message, str):
            alike = SequenceMatcher(None, self.message, incident.incident_message).ratio()
        return -len(self.differing(incident)), alike, incident.incident_id


def fits(expected: object, actual: object) -> bool:
    """Return whether a value matches."""
    if isinstance(expected, re.Pattern):
        return isinstance(actual, str) and expected.search(actual) is not None
    if callable(expected):
        return bool(expected(actual))
    if isinstance(expected, Mapping):
        return isinstance(actual, Mapping) and expected.items() <= actual.items()
    return expected == actual


def check_opened(found: Sequence[Incident], expected: Expected, count: int) -> Incident:
    """Return the first matching incident.

    Raises:
        AssertionError: Unless the expected number of incidents match.
    """
    __tracebackhide__ = True
    matching = [incident for incident in found if not expected.differing(incident)]
    if len(matching) == count:
        return matching[0]
    raise AssertionError(
        "\n".join(
            [
                f"Expected {_incidents(count)}, found {len(matching)} among {len(found)}:",
                *_describe(expected),
                *_list(matching or nlargest(NEAREST, found, key=expected.closeness), expected),
            ]
        )
    )


def check_none(found: Sequence[Incident], expected: Expected) -> None:
    """Raise AssertionError if an incident matches."""
    __tracebackhide__ = True
    matching = [incident for incident in found if not expected.differing(incident)]
    if matching:
        lines = [f"Expected no incident, found {len(matching)}:", *_describe(expected)]
        raise AssertionError("\n".join([*lines, *_list(matching, expected)]))


def check_history(incident_id: int, events: Sequence[IncidentEvent], kinds: Sequence[str]) -> None:
    """Raise AssertionError unless the events are of these kinds, in this order."""
    __tracebackhide__ = True
    found = [event.kind.value for event in events]
    if found == [*kinds]:
        return
    lines = [
        f"Expected another history of incident {incident_id}:",
        f"    expected  {', '.join(kinds) or 'no event'}",
        f"    found     {', '.join(found) or 'no event'}",
    ]
    raise AssertionError("\n".join([*lines, *(f"  {_event(event)}" for event in events)]))


def _incidents(count: int) -> str:
    return "1 incident" if count == 1 else f"{count} incidents"


def _describe(expected: Expected) -> list[str]:
    shown = [f"    {name:<12} {_show(value)}" for name, value in expected.fields.items()]
    return shown or ["    (any)"]


def _show(value: object) -> str:
    if isinstance(value, re.Pattern):
        return f"found by {value.pattern!r}"
    if callable(value):
        return f"accepted by {getattr(value, '__name__', repr(value))}"
    shown = repr(str(value)) if isinstance(value, str) else repr(value)
    return shown if len(shown) <= SHOWN else f"{shown[: SHOWN - 1]}…"


def _list(incidents: Sequence[Incident], expected: Expected) -> list[str]:
    """Describe incidents, with a mark at each field that differs."""
    lines = ["Matching:" if incidents and not expected.differing(incidents[0]) else "Nearest:"]
    for incident in incidents[:NEAREST]:
        differing = expected.differing(incident)
        lines.append(f"  incident {incident.incident_id}")
        lines += [
            f"  {'!' if name in differing else ' '} {name:<12} {_show(value(incident))}"
            for name, value in FIELDS.items()
        ]
    return lines if incidents else ["There are no incidents."]


def _event(event: IncidentEvent) -> str:
    parts = [f"{event.at:%Y-%m-%d %H:%M:%S} {event.kind.value}"]
    parts += [] if event.to_status is None else [f"to {event.to_status.value}"]
    parts += [] if event.actor is None else [f"by {event.actor}"]
    parts += [] if event.note is None else [repr(event.note)]
    return " ".join(parts)

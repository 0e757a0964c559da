"""Format incidents and events as text for people; programs get the wire format."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from datetime import datetime
from typing import Final

from attrs import fields_dict

from incidentkit.domain.values import FeedBlocker, Incident, IncidentEvent
from incidentkit.wire import dump_json, wire_converter

COLUMNS: Final = ("incident_id", "created_at", "incident_type", "source", "incident_message")
LONG: Final = ("dedup_key", "details")
MORE: Final = (
    *(name for name in fields_dict(Incident) if name not in (*COLUMNS, *LONG)),
    *LONG,
)
"""The other fields of an incident, in order; those that may be long come last."""

EVENT_COLUMNS: Final = ("at", "kind", "from_status", "to_status", "actor", "note")
GAP: Final = "  "
ELLIPSIS: Final = "..."
MIN_MESSAGE_WIDTH: Final = 20


def harmless(text: str) -> str:
    """Return the text as one line that is harmless on a terminal.

    Control and format characters, line and paragraph separators, surrogates and unassigned code
    points become Python escapes: an escape sequence could move the cursor, a bidirectional override
    could reverse the line, and a zero-width character would be invisible.
    """
    return text if text.isprintable() else "".join(map(_visible, text))


def harmless_lines(text: str) -> str:
    """Return a text of several lines, such as a traceback, with each line made harmless."""
    return "\n".join(map(harmless, text.strip().split("\n")))


def _visible(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode("ascii")


def width(text: str) -> int:
    """Return the number of terminal columns that a harmless text takes."""
    return len(text) if text.isascii() else sum(map(_character_width, text))


def _character_width(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def shorten(text: str, columns: int) -> str:
    """Return the text, cut at its end and marked with an ellipsis if it is too wide."""
    if width(text) <= columns:
        return text
    room, end = columns - len(ELLIPSIS), 0
    while (room := room - _character_width(text[end])) >= 0:
        end += 1
    return text[:end] + ELLIPSIS


def table(incidents: Sequence[Incident], columns: int | None = None) -> str:
    """Return one line for each incident, under a line of headings.

    Args:
        incidents: The incidents, in the order of the lines.
        columns: Width of the terminal, to which messages are shortened; None: show them in full.
    """
    rows = [COLUMNS, *(_cells(incident, COLUMNS) for incident in incidents)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS) - 1)]
    room = None if columns is None else columns - sum(widths) - len(GAP) * len(widths)
    lines = []
    for *cells, message in rows:
        shown = message if room is None else shorten(message, max(room, MIN_MESSAGE_WIDTH))
        lines.append(GAP.join([*map(str.ljust, cells, widths), shown]))
    return "\n".join(lines)


def details(incident: Incident) -> str:
    """Return one line for each field that has a value, with the message in full."""
    names = (*COLUMNS[:-1], *MORE, COLUMNS[-1])
    longest = max(map(len, names))
    cells = zip(names, _cells(incident, names), strict=True)
    return "\n".join(f"{name:{longest}}{GAP}{value}" for name, value in cells if value)


def events(history: Sequence[IncidentEvent]) -> str:
    """Return one line for each event, under a line of headings."""
    rows = [EVENT_COLUMNS, *(_cells(event, EVENT_COLUMNS) for event in history)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(EVENT_COLUMNS))]
    return "\n".join(GAP.join(map(str.ljust, row, widths)).rstrip() for row in rows)


def change_line(change: IncidentEvent) -> str:
    """Return one line for a change, with the incident's id."""
    at, kind, before, after, actor, note = _cells(change, EVENT_COLUMNS)
    status = " -> ".join(filter(None, (before, after)))
    words = (at, str(change.incident_id), kind, status, actor and f"by {actor}", note)
    return GAP.join(filter(None, words))


def held_up(blocker: FeedBlocker) -> str:
    """Return one line that says what holds the feed up, and how to end it."""
    facts = (
        ("application", blocker.application),
        ("user", blocker.user),
        ("database", blocker.database),
        ("state", blocker.state),
    )
    known = ", ".join(f"{name} {value}" for name, value in facts if value is not None)
    since = wire_converter().unstructure(blocker.since)
    waiting = "changes wait" if blocker.waiting else "no change waits yet"
    return (
        f"the change feed has been held up since {since} UTC by {blocker.holder}"
        f"{f' ({known})' if known else ''}, {waiting}: {_remedy(blocker)}"
    )


def _remedy(blocker: FeedBlocker) -> str:
    if blocker.pid is not None:
        return f"end it with `SELECT pg_terminate_backend({blocker.pid})`"
    if blocker.prepared is not None:
        gid = "'" + blocker.prepared.replace("'", "''") + "'"
        return f"end it in this database with `COMMIT PREPARED {gid}` or `ROLLBACK PREPARED {gid}`"
    return "end it on the primary server"


def _cells(model: Incident | IncidentEvent, names: Sequence[str]) -> tuple[str, ...]:
    """Return the fields as harmless text; a field that is None is empty."""
    values = wire_converter().unstructure(model)
    if values.get("details") is not None:
        values["details"] = dump_json(values["details"]).decode()
    zones = {name: " UTC" for name in names if isinstance(getattr(model, name), datetime)}
    return tuple(
        "" if values.get(name) is None else harmless(f"{values[name]}{zones.get(name, '')}")
        for name in names
    )

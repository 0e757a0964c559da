"""Hypothesis strategies for messages, incidents and arbitrary values."""

from __future__ import annotations

from datetime import UTC, datetime

from hypothesis import strategies as st

from incidentkit import Incident, IncidentSource, IncidentStatus
from incidentkit.domain.values import MAX_ID, MESSAGE_MAX_LENGTH, MESSAGE_MIN_LENGTH

WHITE_SPACE = "".join(character for character in map(chr, range(0x3001)) if character.isspace())

characters = st.characters(exclude_categories=["Cs"], exclude_characters="\x00")
"""Every code point that a database can store."""

padding = st.text(WHITE_SPACE, max_size=5)

statuses = st.sampled_from(IncidentStatus)
sources = st.sampled_from(IncidentSource)


def stripped_messages(max_size: int = 60) -> st.SearchStrategy[str]:
    """Return a strategy for messages that are stored unchanged."""
    inner = st.text(
        characters,
        min_size=MESSAGE_MIN_LENGTH - 2,
        max_size=min(max_size, MESSAGE_MAX_LENGTH) - 2,
    )
    edge = characters.filter(lambda character: not character.isspace())
    return st.builds("{}{}{}".format, edge, inner, edge)


incidents = st.builds(
    Incident,
    incident_id=st.integers(1, MAX_ID),
    incident_message=stripped_messages(),
    incident_type=statuses,
    source=sources,
    created_at=st.datetimes(
        datetime(1, 1, 1),  # noqa: DTZ001
        datetime(9999, 12, 31, 23, 59, 59),  # noqa: DTZ001
        timezones=st.just(UTC),
    ),
)
"""Incidents as a database may hold them."""

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20)
)

strange_values = (
    scalars
    | st.lists(scalars, max_size=2)
    | st.dictionaries(st.text(max_size=3), scalars, max_size=2)
    | st.sets(st.integers(), max_size=2)
    | st.builds(object)
)
"""Anything that a careless caller might pass."""

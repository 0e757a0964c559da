"""Incidents on SQLite: a write takes several statements, in a transaction with no other writer."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Executable

import incidentkit.store.sqlite.statements as sql
from incidentkit.domain.commands import NewIncident, StatusChange
from incidentkit.domain.errors import DuplicateOpenIncident, IncidentNotFound
from incidentkit.domain.rules import words
from incidentkit.domain.transitions import Transitions
from incidentkit.domain.values import (
    OPEN,
    EventKind,
    FeedBlocker,
    Incident,
    IncidentEvent,
    IncidentStatus,
)
from incidentkit.store.dialect import PURGED_EVENTS
from incidentkit.store.executor import Fetch, Rows
from incidentkit.store.ports import IncidentList
from incidentkit.store.sql import definitions
from incidentkit.store.sql.rows import read_event, read_incident
from incidentkit.store.sql.statements import SELECT_CHANGES_BY_ID, SELECT_INCIDENT


class SqliteDialect:
    """The statements of SQLite."""

    claim_key: Executable = sql.CLAIM_KEY
    delete_expired_keys: Executable = sql.DELETE_EXPIRED_KEYS
    select_changes: Executable = SELECT_CHANGES_BY_ID
    words_match = sql.WORDS_MATCH
    indexes_pairs = False
    keeps_plans = False
    select_schema: Executable = definitions.SELECT_ON_SQLITE

    def read_schema(self, rows: Rows) -> definitions.Schema:
        """Return the schema of the rows."""
        return definitions.read_on_sqlite(rows)

    async def create(self, fetch: Fetch, incident: NewIncident, actor: str | None) -> Incident:
        """Insert the incident with its event, or count an occurrence of the open one."""
        rows = await fetch(
            sql.INSERT_INCIDENT[incident.dedup_key is not None],
            {
                "incident_message": incident.incident_message,
                "incident_type": incident.incident_type.value,
                "source": incident.source.value,
                "dedup_key": incident.dedup_key,
            },
        )
        stored = read_incident(rows[0])
        repeated = stored.occurrences > 1
        differs = repeated and incident.incident_message != stored.incident_message
        event = {
            "incident_id": stored.incident_id,
            "kind": EventKind.RECURRED.value if repeated else EventKind.CREATED.value,
            "from_status": None,
            "to_status": None if repeated else stored.incident_type.value,
            "actor": actor,
            "note": incident.incident_message if differs else None,
        }
        await fetch(sql.INSERT_EVENT, event)
        return stored

    async def create_many(
        self, fetch: Fetch, incidents: Sequence[NewIncident], actor: str | None
    ) -> IncidentList:
        """Insert incidents with their events, one after the other."""
        return [await self.create(fetch, incident, actor) for incident in incidents]

    async def update_status(
        self, fetch: Fetch, change: StatusChange, transitions: Transitions, actor: str | None
    ) -> Incident:
        """Change the status with its event, if the incident allows it."""
        incident = await _select_incident(fetch, change.incident_id)
        if not transitions.check(incident, change):
            if change.note is not None:
                await self.note(fetch, change.incident_id, change.note, actor)
            return incident
        if change.status is OPEN and await fetch(
            sql.SELECT_OPEN_DUPLICATE, {"dedup_key": incident.dedup_key}
        ):
            raise DuplicateOpenIncident(incident)
        status = {"id": change.incident_id, "status": change.status.value}
        rows = await fetch(sql.UPDATE_STATUS, status)
        event = {
            "incident_id": change.incident_id,
            "kind": EventKind.STATUS_CHANGED.value,
            "from_status": incident.incident_type.value,
            "to_status": change.status.value,
            "actor": actor,
            "note": change.note,
        }
        await fetch(sql.INSERT_EVENT, event)
        return read_incident(rows[0])

    async def note(
        self, fetch: Fetch, incident_id: int, note: str, actor: str | None
    ) -> IncidentEvent:
        """Insert a note and return its event."""
        await _select_incident(fetch, incident_id)
        event = {
            "incident_id": incident_id,
            "kind": EventKind.NOTED.value,
            "from_status": None,
            "to_status": None,
            "actor": actor,
            "note": note,
        }
        return read_event((await fetch(sql.INSERT_AND_RETURN_EVENT, event))[0])

    async def purge(
        self, fetch: Fetch, ended_before: datetime, limit: int, actor: str | None
    ) -> tuple[int, bool]:
        """Remove incidents with their events, and insert the events of their purge."""
        wanted = {"ended_before": ended_before, "limit": limit}
        rows = await fetch(sql.SELECT_PURGEABLE, wanted)
        statuses: dict[int, Any] = dict(rows)
        if not statuses:
            return 0, False
        some = {"incident_ids": list(statuses), "events": PURGED_EVENTS}
        await fetch(sql.INSERT_PLACES, some)
        await fetch(sql.DELETE_EVENTS, some)
        left = await fetch(sql.SELECT_WITH_EVENTS, {"incident_ids": list(statuses)})
        gone = sorted(statuses.keys() - {incident_id for (incident_id,) in left})
        await fetch(sql.DELETE_INCIDENTS, {"incident_ids": gone})
        for incident_id in gone:
            event = {
                "incident_id": incident_id,
                "kind": EventKind.PURGED.value,
                "from_status": IncidentStatus(statuses[incident_id]).value,
                "to_status": None,
                "actor": actor,
                "note": None,
            }
            await fetch(sql.INSERT_EVENT, event)
        return len(gone), len(statuses) == limit or len(gone) < len(statuses)

    async def check_order(self, fetch: Fetch) -> None:
        """Do nothing: with one writer at a time, events are in the order of their ids."""

    async def feed_blocker(
        self,
        fetch: Fetch,  # noqa: ARG002
        seconds: float,  # noqa: ARG002
    ) -> FeedBlocker | None:
        """Return None: with one writer at a time, no change waits for another one."""
        return None

    def words(self, text: str) -> str:
        """Return the words of the text for FTS5, each as the beginning of a word."""
        return " ".join(f'"{word}"*' for word in words(text))

    def lost_race(self, error: BaseException | None) -> bool:  # noqa: ARG002
        """Return False: there is one writer at a time."""
        return False

    def unstorable(self, error: BaseException | None) -> None:
        """Return None: every encoding of SQLite has all characters."""


async def _select_incident(fetch: Fetch, incident_id: int) -> Incident:
    rows = await fetch(SELECT_INCIDENT, {"incident_id": incident_id})
    if not rows:
        raise IncidentNotFound(incident_id)
    return read_incident(rows[0])

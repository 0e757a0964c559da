"""Incidents on SQLite: a write takes several statements, in a transaction with no other writer.

Creates that share a transaction share their statements, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Executable

import incidentkit.store.sqlite.statements as sql
from incidentkit.domain.commands import (
    NewIncident,
    NoteAddition,
    Resolution,
    Resolutions,
    StatusChange,
)
from incidentkit.domain.errors import DuplicateOpenIncident, IncidentNotFound, VersionConflict
from incidentkit.domain.transitions import Transitions
from incidentkit.domain.values import (
    OPEN,
    EventKind,
    FeedBlocker,
    Incident,
    IncidentEvent,
    IncidentStatus,
    has_version,
)
from incidentkit.domain.words import phrases
from incidentkit.store.causes import KEPT_OUT
from incidentkit.store.database import DatabaseKind
from incidentkit.store.dialect import PURGED_EVENTS
from incidentkit.store.executor import Fetch, Rows
from incidentkit.store.ports import IncidentList, OptionalIncidents
from incidentkit.store.sql import definitions
from incidentkit.store.sql.rows import details_as_text, read_detailed, read_event
from incidentkit.store.sql.statements import SELECT_CHANGES_BY_ID, SELECT_INCIDENT
from incidentkit.store.sqlite.words import triggers


class SqliteDialect:
    """The statements of SQLite."""

    claim_key: Executable = sql.CLAIM_KEY
    delete_expired_keys: Executable = sql.DELETE_EXPIRED_KEYS
    select_changes: Executable = SELECT_CHANGES_BY_ID
    select_waiting: Executable | None = None
    words_match = sql.WORDS_MATCH
    indexes_pairs = False
    keeps_plans = False
    system: DatabaseKind = "sqlite"
    schema: str | None = None
    select_schema: Executable = definitions.SELECT_ON_SQLITE

    def read_schema(self, rows: Rows) -> definitions.Schema:
        """Return the schema of the rows."""
        return definitions.read_on_sqlite(rows, triggers())

    async def create(self, fetch: Fetch, incident: NewIncident, actor: str | None) -> Incident:
        """Insert the incident with its event, or count an occurrence of the open one."""
        details = incident.details
        (row,) = await _written(
            fetch,
            sql.INSERT_INCIDENT[incident.dedup_key is not None],
            {
                "incident_message": incident.incident_message,
                "incident_type": incident.incident_type.value,
                "source": incident.source.value,
                "dedup_key": incident.dedup_key,
                "details": None if details is None else details_as_text(details),
            },
        )
        stored = read_detailed(row)
        repeated = stored.occurrences > 1
        differs = repeated and incident.incident_message != stored.incident_message
        event = {
            "incident_id": stored.incident_id,
            "kind": EventKind.RECURRED.value if repeated else EventKind.CREATED.value,
            "from_status": None,
            "actor": actor,
            "note": incident.incident_message if differs else None,
        }
        if repeated:
            await _written(fetch, sql.INSERT_EVENT, event)
            return stored
        rows = await fetch(sql.INSERT_STATUS_EVENT, event)
        if rows and rows[0][0] == stored.incident_type.value:
            return stored
        return await _as_changed(fetch, stored.incident_id, rows)

    async def create_together(
        self, fetch: Fetch, items: Sequence[tuple[NewIncident, str | None]]
    ) -> IncidentList:
        """Insert incidents without deduplication keys, and their events, with one statement each.

        Args:
            fetch: Runs the statements.
            items: Each incident with its actor.

        Raises:
            StoreError: If a trigger suppresses a row or changes a status, or the ids are not in the
                given order. The statements have to be undone, and :meth:`create` run for each.
        """
        values = [
            [
                incident.incident_message,
                incident.incident_type.value,
                incident.source.value,
                None if incident.details is None else details_as_text(incident.details),
            ]
            for incident, _ in items
        ]
        # SQLite returns rows in any order. Their ids follow that of the insert, which is the given
        # one unless SQLite chooses ids at random, so the columns of each row are compared.
        rows = sorted(await fetch(sql.INSERT_INCIDENTS, {"rows": json.dumps(values)}))
        if [[*row[1:4], row[-1]] for row in rows] != values:
            raise KEPT_OUT.as_error()
        events = [[row[0], actor] for row, (_, actor) in zip(rows, items, strict=True)]
        statuses = await fetch(sql.INSERT_CREATED_EVENTS, {"rows": json.dumps(events)})
        if dict(statuses) != {row[0]: row[2] for row in rows}:
            raise KEPT_OUT.as_error()
        return [read_detailed(row) for row in rows]

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
                await self.note(fetch, NoteAddition(change.incident_id, change.note), actor)
            return incident
        if change.status is OPEN and await fetch(
            sql.SELECT_OPEN_DUPLICATE, {"dedup_key": incident.dedup_key}
        ):
            raise DuplicateOpenIncident(incident)
        return await self._change(fetch, incident, change, actor)

    async def _change(
        self, fetch: Fetch, incident: Incident, change: StatusChange, actor: str | None
    ) -> Incident:
        """Change the status of an incident that allows it, and insert the event."""
        status = {"id": change.incident_id, "status": change.status.value}
        (row,) = await _written(fetch, sql.UPDATE_STATUS, status)
        event = {
            "incident_id": change.incident_id,
            "kind": EventKind.STATUS_CHANGED.value,
            "from_status": incident.incident_type.value,
            "actor": actor,
            "note": change.note,
        }
        rows = await fetch(sql.INSERT_STATUS_EVENT, event)
        changed = read_detailed(row)
        if not rows or rows[0][0] != changed.incident_type.value:
            changed = await _as_changed(fetch, change.incident_id, rows)
        if changed.incident_type is incident.incident_type:
            raise KEPT_OUT.as_error()
        return changed

    async def resolve(
        self, fetch: Fetch, resolution: Resolution, transitions: Transitions, actor: str | None
    ) -> Incident | None:
        """End the open incident with the key, and insert the event."""
        rows = await fetch(sql.SELECT_OPEN, {"dedup_key": resolution.dedup_key})
        if not rows:
            return None
        incident = read_detailed(rows[0])
        change = StatusChange(incident.incident_id, resolution.status, resolution.note)
        transitions.check(incident, change)
        return await self._change(fetch, incident, change, actor)

    async def resolve_many(
        self, fetch: Fetch, resolutions: Resolutions, transitions: Transitions, actor: str | None
    ) -> OptionalIncidents:
        """End open incidents with their events, one after the other."""
        ended: OptionalIncidents = []
        for key in resolutions.dedup_keys:
            resolution = Resolution(key, resolutions.status, resolutions.note)
            ended.append(await self.resolve(fetch, resolution, transitions, actor))
        return ended

    async def note(self, fetch: Fetch, addition: NoteAddition, actor: str | None) -> IncidentEvent:
        """Insert a note and return its event."""
        incident = await _select_incident(fetch, addition.incident_id)
        if not has_version(incident, addition.expected_version):
            raise VersionConflict(incident)
        event = {
            "incident_id": addition.incident_id,
            "kind": EventKind.NOTED.value,
            "from_status": None,
            "actor": actor,
            "note": addition.note,
        }
        (row,) = await _written(fetch, sql.INSERT_EVENT, event)
        return read_event(row)

    async def purge(
        self, fetch: Fetch, ended_before: datetime, limit: int, actor: str | None
    ) -> tuple[int, bool]:
        """Remove incidents with their events, and insert the events of their purge."""
        wanted = {"ended_before": ended_before, "limit": limit}
        rows = await fetch(sql.SELECT_PURGEABLE, wanted)
        statuses: dict[int, Any] = dict(rows)
        if not statuses:
            return 0, False
        some = {"incident_ids": json.dumps(list(statuses)), "events": PURGED_EVENTS}
        places = await fetch(sql.INSERT_PLACES, some)
        events = await fetch(sql.DELETE_EVENTS, some)
        left = await fetch(sql.SELECT_WITH_EVENTS, some)
        due = sorted(statuses.keys() - {incident_id for (incident_id,) in left})
        deleted = await fetch(sql.DELETE_INCIDENTS, {"incident_ids": json.dumps(due)})
        gone = sorted(incident_id for (incident_id,) in deleted)
        if gone != due or len(places) < len(events) or not (events or gone):
            raise KEPT_OUT.as_error()
        for incident_id in gone:
            event = {
                "incident_id": incident_id,
                "kind": EventKind.PURGED.value,
                "from_status": IncidentStatus(statuses[incident_id]).value,
                "actor": actor,
                "note": None,
            }
            await _written(fetch, sql.INSERT_EVENT, event)
        return len(gone), len(statuses) == limit or len(gone) < len(statuses)

    async def check_order(self, fetch: Fetch) -> bool:  # noqa: ARG002
        """Return False: events are in the order of their ids, and each session sees all of them."""
        return False

    async def feed_blocker(
        self,
        fetch: Fetch,  # noqa: ARG002
        seconds: float,  # noqa: ARG002
    ) -> FeedBlocker | None:
        """Return None: with one writer at a time, no change waits for another one."""
        return None

    def phrases(self, text: str) -> Mapping[str, Any]:
        """Return the phrases of the text for FTS5."""
        found = (f'"{each.words}"{"*" if each.begins else ""}' for each in phrases(text))
        return {"phrases": " ".join(found)}

    def lost_race(self, error: BaseException | None) -> bool:  # noqa: ARG002
        """Return False: there is one writer at a time."""
        return False

    def unstorable(self, error: BaseException | None) -> None:
        """Return None: every encoding of SQLite has all characters."""


async def _select_incident(fetch: Fetch, incident_id: int) -> Incident:
    rows = await fetch(SELECT_INCIDENT, {"incident_id": incident_id})
    if not rows:
        raise IncidentNotFound(incident_id)
    return read_detailed(rows[0])


async def _written(fetch: Fetch, statement: Executable, values: Mapping[str, Any]) -> Rows:
    """Run a statement that writes a row, and return the row.

    Raises:
        StoreError: If a trigger suppresses it.
    """
    rows = await fetch(statement, values)
    if not rows:
        raise KEPT_OUT.as_error()
    return rows


async def _as_changed(fetch: Fetch, incident_id: int, statuses: Rows) -> Incident:
    """Return an incident whose status a trigger has changed after it was written.

    Raises:
        StoreError: If a trigger has suppressed the event, whose status is in ``statuses``, or
            removed the incident.
    """
    if not statuses or statuses[0][0] is None:
        raise KEPT_OUT.as_error()
    return await _select_incident(fetch, incident_id)

"""Incidents on PostgreSQL: each write is one statement."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, TypeVar

from sqlalchemy import Executable

import incidentkit.store.postgresql.statements as sql
from incidentkit.domain.commands import (
    NewIncident,
    NoteAddition,
    Resolution,
    Resolutions,
    StatusChange,
)
from incidentkit.domain.errors import (
    DuplicateOpenIncident,
    IllegalTransition,
    IncidentNotFound,
    StoreUnavailable,
    VersionConflict,
)
from incidentkit.domain.transitions import Transitions
from incidentkit.domain.values import (
    OPEN,
    FeedBlocker,
    Incident,
    IncidentEvent,
    IncidentStatus,
    has_version,
)
from incidentkit.domain.words import phrases
from incidentkit.store.causes import KEPT_OUT
from incidentkit.store.database import DatabaseKind
from incidentkit.store.dialect import PURGED_EVENTS, CreateTogether
from incidentkit.store.executor import Fetch, Rows
from incidentkit.store.ports import IncidentList, OptionalIncidents
from incidentkit.store.postgresql.errors import lost_race, unstorable
from incidentkit.store.schema import copied, unordered
from incidentkit.store.sql import definitions
from incidentkit.store.sql.rows import details_as_text, read_detailed, read_event
from incidentkit.store.sql.statements import SELECT_CHANGES, SELECT_INCIDENT, SELECT_WAITING

_T = TypeVar("_T")

ROWS: Final = 2000
"""Maximum number of incidents that one statement stores."""

ATTEMPTS: Final = 10
"""Maximum number of tries of a change that other transactions overtake."""


class PostgresDialect:
    """The statements of PostgreSQL.

    Args:
        schema: The schema of the tables, which the executor adds to the statements; None: the
            search path decides.
    """

    claim_key: Executable = sql.CLAIM_KEY
    delete_expired_keys: Executable = sql.DELETE_EXPIRED_KEYS
    select_changes: Executable = SELECT_CHANGES
    select_waiting: Executable | None = SELECT_WAITING
    words_match = sql.WORDS_MATCH
    create_together: CreateTogether | None = None
    indexes_pairs = True
    keeps_plans = True
    system: DatabaseKind = "postgresql"
    select_schema: Executable = definitions.SELECT_ON_POSTGRESQL

    def __init__(self, schema: str | None = None) -> None:
        self.schema = schema

    def read_schema(self, rows: Rows) -> definitions.Schema:
        """Return the schema of the rows."""
        return definitions.read_on_postgresql(rows)

    async def create(self, fetch: Fetch, incident: NewIncident, actor: str | None) -> Incident:
        """Insert the incident with its event, or count an occurrence of the open one."""
        values = {
            "incident_message": incident.incident_message,
            "incident_type": incident.incident_type.value,
            "source": incident.source.value,
            "dedup_key": incident.dedup_key,
            "actor": actor,
            "details": _details([incident])[0],
        }
        statement = sql.INSERT_INCIDENT[incident.dedup_key is not None]
        rows = await self._insert(fetch, statement, values)
        return read_detailed(rows[0])

    async def create_many(
        self, fetch: Fetch, incidents: Sequence[NewIncident], actor: str | None
    ) -> IncidentList:
        """Insert incidents with their events, many with each statement."""
        stored: dict[int, Incident] = {}
        keyless = [n for n, incident in enumerate(incidents) if incident.dedup_key is None]
        for numbers in _chunks(keyless, ROWS):
            values = values_to_insert([(incidents[n], actor) for n in numbers])
            rows = await self._insert(fetch, sql.INSERT_INCIDENTS, values)
            stored.update(zip(numbers, map(read_detailed, rows), strict=True))
        while len(stored) < len(incidents):
            # Each key once; a later statement counts its repetitions.
            first: dict[str, int] = {}
            for n, incident in enumerate(incidents):
                if incident.dedup_key is not None and n not in stored:
                    first.setdefault(incident.dedup_key, n)
            for keys in _chunks(sorted(first), ROWS):
                values = {
                    "messages": [incidents[first[key]].incident_message for key in keys],
                    "sources": [incidents[first[key]].source.value for key in keys],
                    "dedup_keys": keys,
                    "actors": [actor] * len(keys),
                    "details": _details(incidents[first[key]] for key in keys),
                }
                rows = await self._insert(fetch, sql.INSERT_OR_COUNT, values)
                numbers = [first[key] for key in keys]
                stored.update(zip(numbers, map(read_detailed, rows), strict=True))
        return [stored[n] for n in range(len(incidents))]

    async def update_status(
        self, fetch: Fetch, change: StatusChange, transitions: Transitions, actor: str | None
    ) -> Incident:
        """Change the status with its event; if no row was changed, find out why."""
        values = {
            "incident_id": change.incident_id,
            "status": change.status.value,
            "from_statuses": [status.value for status in transitions.sources(change.status)],
            "expected_version": change.expected_version,
            "note": change.note,
            "actor": actor,
        }
        seen: set[Incident] = set()
        for _ in range(ATTEMPTS):
            if not isinstance(change.expected_version, int | None):
                # Only the client knows the tag: the statement compares the version that has it.
                tagged = await self._read(fetch, change.incident_id)
                transitions.check(tagged, change)
                values["expected_version"] = tagged.version
            rows = await fetch(sql.UPDATE_STATUS, values)
            if rows:
                return read_detailed(rows[0])
            incident = await self._read(fetch, change.incident_id)
            if not transitions.check(incident, change):
                if change.note is not None:
                    note = NoteAddition(change.incident_id, change.note, change.expected_version)
                    await self.note(fetch, note, actor)
                return incident
            # Either another incident with its key is open, or it has just been changed again.
            if change.status is OPEN and await fetch(
                sql.SELECT_OPEN_DUPLICATE, {"dedup_key": incident.dedup_key}
            ):
                raise DuplicateOpenIncident(incident)
            if incident in seen:
                await self.check_order(fetch)
            seen.add(incident)
        if len(seen) == 1:
            # No other transaction has changed it.
            raise KEPT_OUT.as_error()
        raise StoreUnavailable(f"other transactions overtook a change {ATTEMPTS} times; try again")

    async def _read(self, fetch: Fetch, incident_id: int) -> Incident:
        rows = await fetch(SELECT_INCIDENT, {"incident_id": incident_id})
        if not rows:
            raise IncidentNotFound(incident_id)
        return read_detailed(rows[0])

    async def resolve(
        self, fetch: Fetch, resolution: Resolution, transitions: Transitions, actor: str | None
    ) -> Incident | None:
        """End the open incident with the key, and insert the event."""
        keys, status = [resolution.dedup_key], resolution.status
        if OPEN not in transitions.sources(status):
            await self._refuse(fetch, keys, status)
            return None
        values = {
            "dedup_key": resolution.dedup_key,
            "status": status.value,
            "note": resolution.note,
            "actor": actor,
        }
        for row in await self._end(fetch, sql.RESOLVE, values):
            return read_detailed(row[:-2])
        return None

    async def resolve_many(
        self, fetch: Fetch, resolutions: Resolutions, transitions: Transitions, actor: str | None
    ) -> OptionalIncidents:
        """End open incidents with their events, many with each statement."""
        keys, status = resolutions.dedup_keys, resolutions.status
        if OPEN not in transitions.sources(status):
            await self._refuse(fetch, keys, status)
            return [None] * len(keys)
        ended: dict[str, Incident] = {}
        # In the order in which incidents are created too: no two transactions wait for each other.
        for part in _chunks(sorted(set(keys)), ROWS):
            values = {
                "dedup_keys": part,
                "status": status.value,
                "note": resolutions.note,
                "actor": actor,
            }
            rows = await self._end(fetch, sql.RESOLVE_MANY, values)
            ended.update((row[-2], read_detailed(row[:-2])) for row in rows)
        # A key given twice is open once.
        return [ended.pop(key, None) for key in keys]

    async def _end(self, fetch: Fetch, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement that ends incidents; if one is still open, find out why."""
        rows = await fetch(statement, values)
        if rows and rows[0][0] is None:
            await self.check_order(fetch)
            # The order may have just been repaired.
            rows = await fetch(statement, values)
        if rows and (rows[0][0] is None or len(rows) < rows[0][-1]):
            raise KEPT_OUT.as_error()
        return rows

    async def _refuse(self, fetch: Fetch, keys: Sequence[str], status: IncidentStatus) -> None:
        """Raise if an incident with one of the keys is open."""
        rows = await fetch(sql.SELECT_OPEN, {"dedup_keys": list(keys)})
        found = {incident.dedup_key: incident for incident in map(read_detailed, rows)}
        for key in keys:
            if key in found:
                raise IllegalTransition(found[key], status)

    async def note(self, fetch: Fetch, addition: NoteAddition, actor: str | None) -> IncidentEvent:
        """Insert a note and return its event; if no row was inserted, find out why."""
        values = {
            "incident_id": addition.incident_id,
            "expected_version": addition.expected_version,
            "note": addition.note,
            "actor": actor,
        }
        seen: list[int] = []
        for _ in range(ATTEMPTS):
            if not isinstance(addition.expected_version, int | None):
                values["expected_version"] = await self._expected(fetch, addition)
            rows = await fetch(sql.INSERT_NOTE, values)
            if rows:
                return read_event(rows[0])
            version = await self._expected(fetch, addition)
            if seen[-2:] == [version, version]:
                raise KEPT_OUT.as_error()
            if version in seen:
                await self.check_order(fetch)
            seen.append(version)
        raise StoreUnavailable(f"other transactions overtook a note {ATTEMPTS} times")

    async def _expected(self, fetch: Fetch, addition: NoteAddition) -> int:
        """Return the version of an incident.

        Raises:
            VersionConflict: If it is not the expected one.
        """
        incident = await self._read(fetch, addition.incident_id)
        if not has_version(incident, addition.expected_version):
            raise VersionConflict(incident)
        return incident.version

    async def _insert(self, fetch: Fetch, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement that inserts; if it inserts nothing, find out why."""
        rows = await fetch(statement, values)
        if not rows:
            await self.check_order(fetch)
            # The order may have just been repaired.
            rows = await fetch(statement, values)
        if not rows:
            raise KEPT_OUT.as_error()
        return rows

    async def purge(
        self, fetch: Fetch, ended_before: datetime, limit: int, actor: str | None
    ) -> tuple[int, bool]:
        """Remove incidents with their events, and insert the events of their purge."""
        await self.check_order(fetch)
        wanted = {"ended_before": ended_before, "limit": limit}
        ids = [incident_id for (incident_id,) in await fetch(sql.SELECT_PURGEABLE, wanted)]
        if not ids:
            return 0, False
        # Separate statements, which see everything committed before the rows were locked.
        some = {"incident_ids": ids, "events": PURGED_EVENTS}
        ((events, places),) = await fetch(sql.DELETE_EVENTS, some)
        ((count,),) = await fetch(sql.DELETE_INCIDENTS, {"incident_ids": ids, "actor": actor})
        if places < events or not (events or count):
            raise KEPT_OUT.as_error()
        return count, len(ids) == limit or count < len(ids)

    async def check_order(self, fetch: Fetch) -> bool:
        """Raise if a new event could come before an existing one; return if there are policies."""
        ((stranded, sequence, row_security),) = await fetch(sql.SELECT_DISORDER, {})
        if stranded:
            raise copied(self.schema)
        if sequence is not None:
            raise unordered(sequence, self.schema)
        return bool(row_security)

    async def feed_blocker(self, fetch: Fetch, seconds: float) -> FeedBlocker | None:
        """Return the oldest open transaction that has a number, if it is old enough."""
        for row in await fetch(sql.SELECT_FEED_BLOCKER, {"seconds": seconds}):
            return FeedBlocker(*row)
        return None

    def phrases(self, text: str) -> Mapping[str, Any]:
        """Return the phrases for the database, which compares them as its encoding allows."""
        found = phrases(text)
        return {
            "phrases": [each.words if each.given.isascii() else each.given for each in found],
            "begins": found[-1].begins,
        }

    def lost_race(self, error: BaseException | None) -> bool:
        """Return whether another incident with the same key was opened at the same time."""
        return lost_race(error)

    def unstorable(self, error: BaseException | None) -> str | None:
        """Return the character that the database's encoding does not have, if that is the cause."""
        return unstorable(error)


def values_to_insert(given: Sequence[tuple[NewIncident, str | None]]) -> dict[str, Any]:
    """Return the values for incidents without deduplication keys, each with its actor."""
    return {
        "messages": [incident.incident_message for incident, _ in given],
        "statuses": [incident.incident_type.value for incident, _ in given],
        "sources": [incident.source.value for incident, _ in given],
        "actors": [actor for _, actor in given],
        "details": _details(incident for incident, _ in given),
    }


def _details(incidents: Iterable[NewIncident]) -> list[str | None]:
    return [
        None if incident.details is None else details_as_text(incident.details)
        for incident in incidents
    ]


def _chunks(values: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    return (values[start : start + size] for start in range(0, len(values), size))

"""Every operation on incidents, over a dialect and an executor."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import UTC, datetime, timedelta
from functools import partial, wraps
from inspect import signature
from typing import Any, Final, Protocol, TypeVar, cast

from attrs import fields
from sqlalchemy import Executable

import incidentkit.wire as wire_format
from incidentkit.domain.commands import (
    NewIncident,
    NoteAddition,
    Resolution,
    Resolutions,
    StatusChange,
)
from incidentkit.domain.errors import (
    FieldError,
    IdempotencyKeyReused,
    InvalidIncident,
    SchemaOutOfDate,
    StoreError,
    StoreUnavailable,
    UnknownCursor,
)
from incidentkit.domain.queries import ListQuery, SearchQuery
from incidentkit.domain.rules import MAX_FAULTS, EventCursor
from incidentkit.domain.transitions import ANY_TRANSITION, Transitions
from incidentkit.domain.values import (
    MAX_ID,
    OPEN,
    FeedBlocker,
    Incident,
    IncidentEvent,
    SearchPage,
)
from incidentkit.store.bookmarks import Bookmarks
from incidentkit.store.causes import KEPT_OUT
from incidentkit.store.dialect import PURGED_EVENTS, Dialect
from incidentkit.store.executor import Executor, Fetch, Rows, SharedWork, Work
from incidentkit.store.idempotency import Idempotency
from incidentkit.store.page import Page
from incidentkit.store.ports import EventList, IncidentList, OptionalIncidents, Place
from incidentkit.store.schema import upgrade_command
from incidentkit.store.searching import SHORT, Search
from incidentkit.store.sql import statements
from incidentkit.store.sql.rows import (
    EVENT_COLUMNS,
    INCIDENT_COLUMNS,
    TOKEN,
    read_detailed,
    read_event,
    read_page,
    read_rows,
)
from incidentkit.store.turns import Key, Turns
from incidentkit.wire.encoding import encode_incident, encode_incidents

_Operation = TypeVar("_Operation", bound=Callable[..., Awaitable[Any]])
_T = TypeVar("_T")

PLACES_KEPT: Final = timedelta(days=30)
"""How long the cursor of a purged event stays valid."""

HELD_UP_AFTER: Final = 5.0
"""Seconds after which an open transaction counts as one that holds the feed up."""

EXPIRED_KEYS: Final = 10
"""Maximum number of expired idempotency keys that a write with a key removes."""

CLAIMS: Final = 10
"""Maximum number of attempts to claim an idempotency key that other transactions remove."""


class Sharing(Protocol):
    """Answers calls that wait at the same time from one statement.

    Each method returns None for a call that must run alone from the start. If the answer is None,
    nothing was read or written, and the call is tried alone.
    """

    def get(self, incident_id: int) -> Awaitable[tuple[Incident, ...] | None] | None:
        """Read one incident; an empty tuple if there is none with this id."""
        ...

    def list(self, query: ListQuery) -> Awaitable[Page | None] | None:
        """Read one page."""
        ...

    def create(self, incident: NewIncident, actor: str | None) -> Awaitable[Incident | None] | None:
        """Store one incident."""
        ...

    def update_status(
        self, change: StatusChange, transitions: Transitions, actor: str | None
    ) -> Awaitable[Incident | None] | None:
        """Change one status."""
        ...


def names_database(operation: _Operation) -> _Operation:
    """Make an operation name the database in its errors, and the field that it cannot store."""

    @wraps(operation)
    async def run(records: Records, /, *arguments: Any, **options: Any) -> Any:
        try:
            return await operation(records, *arguments, **options)
        except StoreError as error:
            given = signature(operation).bind(records, *arguments, **options).arguments
            records.explain(error, given)
            raise

    named: Any = run
    return cast("_Operation", named)


class Records:
    """The operations on incidents.

    Args:
        dialect: The statements of the database.
        executor: Runs them: on connections of its own, or on a host's connection.
        sharing: Lets calls share statements; None: each call runs its own.
        turns: Bounds the connections of calls that wait for locks; None: no bound.
        bookmarks: Where deep pages begin; None: deep pages are always read from the top.
    """

    def __init__(
        self,
        dialect: Dialect,
        executor: Executor,
        *,
        sharing: Sharing | None = None,
        turns: Turns | None = None,
        bookmarks: Bookmarks | None = None,
    ) -> None:
        self._dialect = dialect
        self._executor = executor
        self._sharing = sharing
        self._turns = turns
        self._bookmarks = bookmarks

    def explain(self, error: StoreError, given: Mapping[str, object]) -> None:
        """Name the database in an error, and its schema in the command to run.

        Raises:
            InvalidIncident: If the database cannot hold a character of the given values.
        """
        if error.place is None:
            error.place = self._executor.place
        if isinstance(error, SchemaOutOfDate) and error.command == upgrade_command(None):
            error.command = upgrade_command(self._dialect.schema)
            error.args = (*error.args[:2], error.command)
        character = self._dialect.unstorable(error.__cause__)
        if character is None:
            return
        names = [each for name, value in given.items() for each in _fields(name, value, character)]
        if names:
            encoding = "the encoding of the database or of its connection"
            reason = f"must not contain {character!r}, which {encoding} does not have"
            faults = [FieldError(name, reason) for name in names[:MAX_FAULTS]]
            raise InvalidIncident(faults) from error.__cause__

    @names_database
    async def create(
        self, incident: NewIncident, *, actor: str | None = None, once: Idempotency | None = None
    ) -> Incident:
        """Store the incident with its event, or count an occurrence of the open one."""
        if once is None and self._sharing is not None:
            shared = self._sharing.create(incident, actor)
            stored = None if shared is None else await shared
            if stored is not None:
                return stored
        work: Work[Incident] = partial(self._dialect.create, incident=incident, actor=actor)
        keys = [] if incident.dedup_key is None else [("dedup_key", incident.dedup_key)]
        async with self._turn(once, keys):
            if once is not None:
                return await self._write_once(
                    work, once, encode_incident, wire_format.decode_incident
                )
            together = self._dialect.create_together
            # With a key, an answer for several does not tell which of them counted an occurrence.
            if together is not None and incident.dedup_key is None:
                work = SharedWork((incident, actor), work, together)
            return await self._executor.write(work)

    @names_database
    async def create_many(
        self,
        incidents: Sequence[NewIncident],
        *,
        actor: str | None = None,
        once: Idempotency | None = None,
    ) -> IncidentList:
        """Store incidents, all or none, as :meth:`create` does for each in turn."""
        work = partial(self._dialect.create_many, incidents=incidents, actor=actor)
        # One turn for all: each of thousands of keys may have to wait.
        keyed = any(incident.dedup_key is not None for incident in incidents)
        async with self._turn(once, [("dedup_key", None)] if keyed else []):
            if once is not None:
                return await self._write_once(
                    work, once, encode_incidents, wire_format.decode_incidents
                )
            return await self._executor.transact(work)

    @names_database
    async def update_status(
        self,
        change: StatusChange,
        *,
        transitions: Transitions = ANY_TRANSITION,
        actor: str | None = None,
        once: Idempotency | None = None,
    ) -> Incident:
        """Change the status with its event, and return the incident."""
        if once is None and self._sharing is not None:
            shared = self._sharing.update_status(change, transitions, actor)
            incident = None if shared is None else await shared
            if incident is not None:
                return incident
        work = partial(
            self._dialect.update_status, change=change, transitions=transitions, actor=actor
        )

        async def update() -> Incident:
            if once is not None:
                return await self._write_once(
                    work, once, encode_incident, wire_format.decode_incident
                )
            # The database refuses to open an incident beside another one with its key, which would
            # end a host's transaction.
            if change.status is OPEN and self._executor.in_host_transaction:
                return await self._executor.transact(work)
            return await self._executor.write(work)

        async with self._turn(once, [("incident_id", change.incident_id)]):
            try:
                return await update()
            except StoreUnavailable as error:
                if not self._dialect.lost_race(error.__cause__):
                    raise
            # Nothing was changed, and the winner of the race is visible now.
            return await update()

    @names_database
    async def resolve(
        self,
        resolution: Resolution,
        *,
        transitions: Transitions = ANY_TRANSITION,
        actor: str | None = None,
        once: Idempotency | None = None,
    ) -> Incident | None:
        """End the open incident with a deduplication key, with its event."""
        work = partial(
            self._dialect.resolve, resolution=resolution, transitions=transitions, actor=actor
        )
        async with self._turn(once, [("dedup_key", resolution.dedup_key)]):
            if once is not None:
                return await self._write_once(
                    work, once, wire_format.encode_optional, wire_format.decode_optional
                )
            return await self._executor.write(work)

    @names_database
    async def resolve_many(
        self,
        resolutions: Resolutions,
        *,
        transitions: Transitions = ANY_TRANSITION,
        actor: str | None = None,
        once: Idempotency | None = None,
    ) -> OptionalIncidents:
        """End the open incidents with these deduplication keys, all or none."""
        work = partial(
            self._dialect.resolve_many,
            resolutions=resolutions,
            transitions=transitions,
            actor=actor,
        )
        # One turn for all: each of thousands of keys may have to wait.
        async with self._turn(once, [("dedup_key", None)]):
            if once is not None:
                return await self._write_once(
                    work, once, wire_format.encode_optionals, wire_format.decode_optionals
                )
            return await self._executor.transact(work)

    @names_database
    async def note(
        self, addition: NoteAddition, *, actor: str | None = None, once: Idempotency | None = None
    ) -> IncidentEvent:
        """Add a note to the history, and return its event."""
        work = partial(self._dialect.note, addition=addition, actor=actor)
        async with self._turn(once, [("incident_id", addition.incident_id)]):
            if once is not None:
                return await self._write_once(
                    work, once, wire_format.encode_event, wire_format.decode_event
                )
            return await self._executor.write(work)

    @names_database
    async def purge(
        self, ended_before: datetime, limit: int, *, actor: str | None = None
    ) -> tuple[int, bool]:
        """Remove incidents and insert the events of their purge, in one transaction."""

        async def work(fetch: Fetch) -> tuple[int, bool]:
            purged_before = datetime.now(UTC) - PLACES_KEPT
            old = {"purged_before": purged_before, "limit": 2 * PURGED_EVENTS}
            await fetch(statements.DELETE_OLD_PLACES, old)
            return await self._dialect.purge(fetch, ended_before, limit, actor)

        return await self._executor.transact(work)

    @names_database
    async def purgeable(self, ended_before: datetime) -> int:
        """Count the incidents that ended before a time."""
        values = {"ended_before": ended_before}
        ((count,),) = await self._scan(statements.COUNT_PURGEABLE, values)
        return int(count)

    def _turn(
        self, once: Idempotency | None, keys: Sequence[Key]
    ) -> AbstractAsyncContextManager[None]:
        """Return the turn of a write, which may wait for the locks of these keys."""
        if once is not None:
            keys = [("idempotency_key", once.key), *keys]
        return self._turns(keys) if keys and self._turns is not None else nullcontext()

    async def _write_once(
        self,
        write: Work[_T],
        once: Idempotency,
        encode: Callable[[_T], bytes],
        decode: Callable[[str], _T],
    ) -> _T:
        """Write, or return the answer of the first write with the same key."""

        async def work(fetch: Fetch) -> _T:
            await fetch(self._dialect.delete_expired_keys, {"limit": EXPIRED_KEYS})
            key, answer = await self._claim(fetch, once)
            if answer is not None:
                if once.replay is not None:
                    once.replay.happened = True
                return decode(answer)
            written = await write(fetch)
            values = {"key": key, "answer": encode(written).decode()}
            if not await fetch(statements.UPDATE_ANSWER, values):
                raise KEPT_OUT.as_error()
            return written

        return await self._executor.transact(work)

    async def _claim(self, fetch: Fetch, once: Idempotency) -> tuple[str, str | None]:
        """Take a key; return the key that stands for it, and the first answer if it was used.

        The first actor that uses a key has the key itself, as every write had before keys were
        kept per actor. Another actor has a digest of the key and its name.

        Raises:
            IdempotencyKeyReused: If the actor used the key with other parameters.
        """
        key, own_key, actor = once.key, once.own_key, once.actor or ""
        values = {"idempotency_key": key, "own_key": own_key}
        claim = {**values, "fingerprint": once.fingerprint, "actor": actor}
        for _ in range(CLAIMS):
            # Waits for another transaction that holds the key.
            if await fetch(self._dialect.claim_key, claim):
                return claim["idempotency_key"], None
            rows = await fetch(statements.SELECT_ANSWER, values)
            used = {row[0]: row[1:] for row in rows}
            found = used.get(own_key) or used.get(key)
            if found is None:
                # The key had expired, or another transaction has just removed it.
                continue
            fingerprint, answer, first_actor = found
            if own_key not in used and first_actor not in (None, actor):
                claim |= {"idempotency_key": own_key, "own_key": ""}
            elif fingerprint != once.fingerprint:
                raise IdempotencyKeyReused(key)
            else:
                return key, answer
        raise KEPT_OUT.as_error()

    @names_database
    async def get(self, incident_id: int) -> Incident | None:
        """Read one incident."""
        if self._sharing is not None:
            shared = self._sharing.get(incident_id)
            found = None if shared is None else await shared
            if found is not None:
                return found[0] if found else None
        values = {"incident_id": incident_id}
        rows = await self._executor.read(statements.SELECT_INCIDENT, values)
        return read_detailed(rows[0]) if rows else None

    @names_database
    async def list(self, query: ListQuery) -> Page:
        """Read one page and its token, from one snapshot."""
        if self._sharing is not None:
            shared = self._sharing.list(query)
            page = None if shared is None else await shared
            if page is not None:
                return page
        if query.deep:
            return await self._list_deep(query)
        near = self._dialect.keeps_plans and query.offset + query.limit <= statements.NEAR
        return read_page(await self._read_page(query, "near" if near else "any"), self._executor)

    async def _list_deep(self, query: ListQuery) -> Page:
        """Read a deep page, from a bookmark if one is valid."""
        if self._bookmarks is None:
            return read_page(await self._read_page(query, "deep"), self._executor)
        rows = await self._read_onward(self._bookmarks, query)
        if rows is None:
            rows = await self._read_page(query, "deep")
        incident_id = rows[0][INCIDENT_COLUMNS.index("incident_id")]
        if incident_id is not None:
            self._bookmarks.add(query, incident_id, rows[0][TOKEN])
        return read_page(rows, self._executor)

    async def _read_onward(self, bookmarks: Bookmarks, query: ListQuery) -> Rows | None:
        """Read a page from the nearest bookmark; None if there is none, or it is outdated."""
        nearest = bookmarks.before(query)
        if nearest is None:
            return None
        (offset, start_id), token = nearest
        start = {
            "start_id": start_id,
            "start_token": token,
            "offset": query.offset - offset,
        }
        rows = await self._read_page(query, "onward", start)
        return rows if rows[0][TOKEN] == token else None

    async def _read_page(
        self, query: ListQuery, kind: statements.PageKind, start: Mapping[str, Any] | None = None
    ) -> Rows:
        values = {**statements.page_values(query), **(start or {})}
        read = self._scan if query.deep else self._executor.read
        return await read(statements.page_statement(query, kind), values)

    async def _scan(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run one statement that may read or return very many rows."""
        return await self._executor.scan(lambda fetch: fetch(statement, values))

    @names_database
    async def token(self) -> str | None:
        """Read the token of the incidents."""
        ((token,),) = await self._executor.read(statements.SELECT_TOKEN, {})
        return token if token is None else str(token)

    @names_database
    async def search(self, query: SearchQuery) -> SearchPage:
        """Read one page of a search, and its total if the query asks for it."""
        search = Search(self._dialect, query)
        if search.short:
            return await search.run(self._executor.read)
        return await self._executor.scan(search.run)

    @names_database
    async def history(self, incident_id: int, *, after: int = 0, limit: int = MAX_ID) -> EventList:
        """Read events of an incident, oldest first, after the one with this event id."""
        values = {"incident_id": incident_id, "event_id": after, "limit": min(limit, SHORT)}
        rows = await self._executor.read(statements.SELECT_HISTORY, values)
        if limit > SHORT == len(rows):
            last = rows[-1][EVENT_COLUMNS.index("event_id")]
            values |= {"event_id": last, "limit": limit - SHORT}
            rows = [*rows, *await self._scan(statements.SELECT_HISTORY, values)]
        return await read_rows(read_event, rows)

    @names_database
    async def changes(self, after: Place, limit: int) -> EventList:
        """Read events of all incidents after a place, in the order of their commits."""
        transaction_id, event_id = after
        values = {"transaction_id": transaction_id, "event_id": event_id, "limit": limit}
        rows = await self._executor.read(self._dialect.select_changes, values)
        return await read_rows(read_event, rows)

    @names_database
    async def latest_change(self) -> IncidentEvent | None:
        """Read the last of all events that :meth:`changes` has."""
        rows = await self._executor.read(statements.SELECT_LATEST_CHANGE, {})
        return read_event(rows[0]) if rows else None

    @names_database
    async def waiting_changes(self, after: Place, limit: int) -> Sequence[tuple[int, int, int]]:
        """Read the places and nonces of committed events, also if others may still precede them."""
        if self._dialect.select_waiting is None:
            return []
        transaction_id, event_id = after
        values = {"transaction_id": transaction_id, "event_id": event_id, "limit": limit}
        rows = await self._executor.read(self._dialect.select_waiting, values)
        return [(row[0], row[1], row[2]) for row in rows]

    @names_database
    async def check_order(self) -> None:
        """Raise unless new events come after the existing ones."""
        await self._dialect.check_order(self._executor.read)

    @names_database
    async def feed_blocker(self) -> FeedBlocker | None:
        """Return the transaction that has held up the feed for a while, or None."""
        return await self._dialect.feed_blocker(self._executor.read, HELD_UP_AFTER)

    @names_database
    async def place(self, cursor: EventCursor) -> Place:
        """Return the place of the event that a cursor stands for.

        Raises:
            UnknownCursor: If this database never had this event.
        """
        values = {"event_id": cursor.event_id, "nonce": cursor.nonce}
        for transaction_id, event_id in await self._executor.read(statements.SELECT_PLACE, values):
            return transaction_id, event_id
        raise UnknownCursor


def _fields(name: str, value: object, character: str) -> Iterator[str]:
    """Yield the names of the fields whose texts contain a character."""
    if isinstance(value, dict):
        value = json.dumps(value, ensure_ascii=False)
    match value:
        case str():
            if character in value:
                yield name
        case Idempotency():
            yield from _fields("idempotency_key", value.key, character)
        case (
            NewIncident()
            | NoteAddition()
            | Resolution()
            | Resolutions()
            | StatusChange()
            | SearchQuery()
        ):
            for field in fields(type(value)):
                yield from _fields(field.name, getattr(value, field.name), character)
        case list() | tuple():
            for number, each in enumerate(value):
                for field in _fields("", each, character):
                    yield f"{name}[{number}].{field}".removesuffix(".")

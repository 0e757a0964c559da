"""What is done with incidents, on whatever connection: a store's own, or a host's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from attrs import evolve

from incidentkit.domain.errors import IdempotencyKeyReused, IncidentNotFound, UnknownCursor
from incidentkit.domain.transitions import ANY_TRANSITION
from incidentkit.domain.values import MAX_ID, MAX_LIMIT, IncidentOrder, SearchPage
from incidentkit.store import statements
from incidentkit.store.search_statements import (
    Shape,
    count_found,
    select_page,
    select_page_among_first,
    select_page_by_words,
)
from incidentkit.store.statements import read_event, read_incident, read_page
from incidentkit.wire import (
    decode_incident,
    decode_incidents,
    encode_incident,
    encode_incidents,
)

if TYPE_CHECKING:
    from sqlalchemy import Executable

    from incidentkit.domain.commands import NewIncident, StatusChange
    from incidentkit.domain.queries import ListQuery, SearchQuery
    from incidentkit.domain.transitions import Transitions
    from incidentkit.domain.values import Incident, IncidentEvent
    from incidentkit.store.base import Idempotency, Page, Place
    from incidentkit.store.bookmarks import Bookmarks
    from incidentkit.store.search_statements import WordsMatch
    from incidentkit.store.statements import PageKind

_T = TypeVar("_T")
Rows: TypeAlias = Sequence[Any]
Fetch: TypeAlias = Callable[["Executable", Mapping[str, Any]], Awaitable[Rows]]
"""Runs a statement with its values, and returns its rows."""

Events: TypeAlias = "list[IncidentEvent]"
"""An alias because inside the class ``list`` is the verb."""

Incidents: TypeAlias = "list[Incident]"

SCAN: Final = 500
"""Incidents whose messages are looked at one by one, before the index of words is asked."""

MOST: Final = (100, MAX_LIMIT + 1)
"""How many incidents a statement for a page says that there are at most: the plan for any limit
below is the same then."""

EVENTS: Final = 5_000
"""Events that a purge removes at a time, so that nobody waits for long."""

PLACES_KEPT: Final = timedelta(days=30)
"""For how long a cursor is good whose change went with its incident."""

EXPIRED_KEYS: Final = 10
"""Idempotency keys older than a day that a write with one removes."""


class Operations(ABC):
    """The reads that both databases take alike, and what a write that is repeated returns."""

    _claim_key: Executable
    _delete_expired_keys: Executable
    _words_match: WordsMatch
    _select_changes: Executable = statements.SELECT_CHANGES
    _looks_up_pairs = True
    """Whether the database finds a place by its time and its id in an index."""
    _plans_once = False
    """Whether a plan is kept for a statement, if its cost does not depend on the values."""
    _bookmarks: Bookmarks | None = None
    """Where deep pages begin, unless it is in a transaction of a host's."""

    @abstractmethod
    async def _read(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run one statement that only reads."""

    @abstractmethod
    async def _write(self, work: Callable[[Fetch], Awaitable[_T]], *, atomic: bool = False) -> _T:
        """Run work that writes, and commit it unless the transaction is a host's.

        Args:
            work: Given what runs a statement.
            atomic: Whether it may take more than one statement.
        """

    @abstractmethod
    async def _create(self, fetch: Fetch, incident: NewIncident, actor: str | None) -> Incident: ...

    @abstractmethod
    async def _update_status(
        self, fetch: Fetch, change: StatusChange, transitions: Transitions, actor: str | None
    ) -> Incident: ...

    @abstractmethod
    async def _note(
        self, fetch: Fetch, incident_id: int, note: str, actor: str | None
    ) -> IncidentEvent: ...

    @abstractmethod
    async def _purge(
        self, fetch: Fetch, ended_before: datetime, limit: int, actor: str | None
    ) -> tuple[int, bool]: ...

    async def purge(
        self, ended_before: datetime, limit: int, *, actor: str | None = None
    ) -> tuple[int, bool]:
        """Remove incidents, and leave the events that tell of it, in one transaction."""

        async def work(fetch: Fetch) -> tuple[int, bool]:
            purged_before = datetime.now(UTC) - PLACES_KEPT
            old = {"purged_before": purged_before, "limit": 2 * EVENTS}
            await fetch(statements.DELETE_OLD_PLACES, old)
            return await self._purge(fetch, ended_before, limit, actor)

        return await self._write(work, atomic=True)

    async def purgeable(self, ended_before: datetime) -> int:
        """Count the incidents that ended before then."""
        values = {"ended_before": ended_before}
        ((count,),) = await self._read(statements.COUNT_PURGEABLE, values)
        return int(count)

    async def create(
        self, incident: NewIncident, *, actor: str | None = None, once: Idempotency | None = None
    ) -> Incident:
        """Store the incident with its event, or count an occurrence of the one that is open."""

        async def work(fetch: Fetch) -> Incident:
            return await self._create(fetch, incident, actor)

        return await self._write_once(work, once, encode_incident, decode_incident)

    async def create_many(
        self,
        incidents: Sequence[NewIncident],
        *,
        actor: str | None = None,
        once: Idempotency | None = None,
    ) -> Incidents:
        """Store incidents, all or none, as :meth:`create` does one after the other."""

        async def work(fetch: Fetch) -> Incidents:
            return await self._create_many(fetch, incidents, actor)

        return await self._write_once(work, once, encode_incidents, decode_incidents, atomic=True)

    async def _create_many(
        self, fetch: Fetch, incidents: Sequence[NewIncident], actor: str | None
    ) -> Incidents:
        return [await self._create(fetch, incident, actor) for incident in incidents]

    async def update_status(
        self,
        change: StatusChange,
        *,
        transitions: Transitions = ANY_TRANSITION,
        actor: str | None = None,
        once: Idempotency | None = None,
    ) -> Incident:
        """Change the status, with an event, and return the incident."""

        async def work(fetch: Fetch) -> Incident:
            return await self._update_status(fetch, change, transitions, actor)

        return await self._write_once(work, once, encode_incident, decode_incident)

    async def note(self, incident_id: int, note: str, *, actor: str | None = None) -> IncidentEvent:
        """Add a note to the history, and return its event."""

        async def work(fetch: Fetch) -> IncidentEvent:
            return await self._note(fetch, incident_id, note, actor)

        return await self._write(work)

    async def _write_once(
        self,
        write: Callable[[Fetch], Awaitable[_T]],
        once: Idempotency | None,
        encode: Callable[[_T], bytes],
        decode: Callable[[str], _T],
        *,
        atomic: bool = False,
    ) -> _T:
        """Write, or return what the first write with the same key returned."""
        if once is None:
            return await self._write(write, atomic=atomic)

        async def work(fetch: Fetch) -> _T:
            key, fingerprint = once.key, once.fingerprint
            await fetch(self._delete_expired_keys, {"limit": EXPIRED_KEYS})
            # Waits for another transaction that has the key.
            claim = {"idempotency_key": key, "fingerprint": fingerprint}
            while not await fetch(self._claim_key, claim):
                rows = await fetch(statements.SELECT_ANSWER, {"idempotency_key": key})
                if rows and rows[0][0] != fingerprint:
                    raise IdempotencyKeyReused(key)
                if rows:
                    return decode(rows[0][1])
                # It was a day old, and another one has just removed it.
            written = await write(fetch)
            answer = encode(written).decode()
            await fetch(statements.UPDATE_ANSWER, {"key": key, "answer": answer})
            return written

        return await self._write(work, atomic=True)

    async def get(self, incident_id: int) -> Incident | None:
        """Read one incident in one statement."""
        rows = await self._read(statements.SELECT_INCIDENT, {"incident_id": incident_id})
        return read_incident(rows[0]) if rows else None

    async def list(self, query: ListQuery) -> Page:
        """Read one page and its token, from one snapshot."""
        values = {
            "status": query.status and query.status.value,
            "source": query.source and query.source.value,
            "limit": query.limit,
            "offset": query.offset,
        }
        last = query.offset + query.limit
        if last > statements.DEEP:
            return await self._list_deep(query, values)
        near = self._plans_once and last <= statements.NEAR
        return read_page(await self._read_page(query, "near" if near else "any", values))

    async def _list_deep(self, query: ListQuery, values: Mapping[str, Any]) -> Page:
        """Read a page from where one before it begins, if nothing has changed since then."""
        bookmarks = self._bookmarks
        if bookmarks is None:
            return read_page(await self._read_page(query, "deep", values))
        rows = await self._read_onward(bookmarks, query, values)
        if rows is None:
            rows = await self._read_page(query, "deep", values)
        page = read_page(rows)
        first_id = rows[0][0]
        if first_id is not None:
            bookmarks.add(query, first_id, page.token)
        return page

    async def _read_onward(
        self, bookmarks: Bookmarks, query: ListQuery, values: Mapping[str, Any]
    ) -> Rows | None:
        """Read a page from the nearest bookmark on; None if there is none that holds."""
        found = bookmarks.before(query)
        if found is None:
            return None
        (offset, start_id), token = found
        onward = {
            **values,
            "start_id": start_id,
            "start_token": token,
            "offset": query.offset - offset,
        }
        rows = await self._read_page(query, "onward", onward)
        return rows if read_page(rows).token == token else None

    async def _read_page(self, query: ListQuery, kind: PageKind, values: Mapping[str, Any]) -> Rows:
        key = (query.status is not None, query.source is not None, kind)
        return await self._read(statements.SELECT_PAGE[key], values)

    async def token(self) -> str | None:
        """Read the token in one statement."""
        ((token,),) = await self._read(statements.SELECT_TOKEN, {})
        return token if token is None else str(token)

    async def search(self, query: SearchQuery) -> SearchPage:
        """Read one page, in one statement, or two with words, and the total in one more."""
        shape = Shape(
            statuses=len(query.status or ()),
            sources=len(query.source or ()),
            oldest_first=query.order is IncidentOrder.OLDEST,
            words_match=None if query.text is None else self._words_match,
            pairs=self._looks_up_pairs,
            most=min(most for most in MOST if most > query.limit) if self._plans_once else None,
        )
        values: dict[str, Any] = {
            "words": query.text and self._words(query.text),
            # One more tells whether there is another page.
            "limit": query.limit + 1,
            "scan": SCAN,
            **{f"status_{n}": status.value for n, status in enumerate(query.status or ())},
            **{f"source_{n}": source.value for n, source in enumerate(query.source or ())},
        }
        # Ids are above 0, so that these are the bounds of the times alone.
        low, high = (query.created_after, 0), (query.created_before, 0)
        total = None
        if query.total:
            ((total,),) = await self._read(count_found(shape), values | _between(low, high))
        if query.after is not None and shape.oldest_first:
            low = max(low, query.after[:2])
        elif query.after is not None:
            high = min(high, query.after[:2])
        shape = evolve(shape, onward=not shape.pairs and query.after is not None and low < high)
        values |= _between(low, high)
        if query.text is None:
            rows = await self._read(select_page(shape), values)
        else:
            rows = await self._read(select_page_among_first(shape), values)
            if len(rows) <= query.limit:
                rows = await self._read(select_page_by_words(shape), values)
        incidents = [read_incident(row[:-1]) for row in rows[: query.limit]]
        following = None
        if len(rows) > query.limit:
            following = query.cursor(rows[query.limit - 1][-1], incidents[-1].incident_id)
        return SearchPage(incidents, following, total)

    @abstractmethod
    def _words(self, text: str) -> str:
        """Return a text as the index of words takes it."""

    async def history(self, incident_id: int, *, after: int = 0, limit: int = MAX_ID) -> Events:
        """Read events of an incident, oldest first, from past the one with this event id."""
        values = {"incident_id": incident_id, "event_id": after, "limit": limit}
        return [read_event(row) for row in await self._read(statements.SELECT_HISTORY, values)]

    async def changes(self, after: Place, limit: int) -> Events:
        """Read events of all incidents in the order of their commits, from past a place."""
        transaction_id, event_id = after
        values = {"transaction_id": transaction_id, "event_id": event_id, "limit": limit}
        return [read_event(row) for row in await self._read(self._select_changes, values)]

    async def latest_change(self) -> IncidentEvent | None:
        """Read the last event of all that :meth:`changes` has."""
        rows = await self._read(statements.SELECT_LATEST_CHANGE, {})
        return read_event(rows[0]) if rows else None

    @abstractmethod
    async def check_order(self) -> None:
        """Raise unless new events come after those that are there."""

    async def place(self, cursor: tuple[int, ...]) -> Place:
        """Return where an event stands.

        Raises:
            UnknownCursor: If there never was this event here.
        """
        _, event_id, nonce, _ = cursor
        rows = await self._read(statements.SELECT_PLACE, {"event_id": event_id, "nonce": nonce})
        if rows:
            return rows[0][0], rows[0][1]
        raise UnknownCursor


def _between(low: tuple[datetime, int], high: tuple[datetime, int]) -> dict[str, Any]:
    return {"low_at": low[0], "low_id": low[1], "high_at": high[0], "high_id": high[1]}


def found(incident_id: int, rows: Rows) -> Any:
    """Return the only row, if there is one.

    Raises:
        IncidentNotFound: If there is none.
    """
    if not rows:
        raise IncidentNotFound(incident_id)
    return rows[0]

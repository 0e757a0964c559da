"""The verbs: what an application does with incidents, in a transaction of its own or of ours."""

from __future__ import annotations

from abc import ABC, abstractmethod
from hashlib import sha256
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, overload

from incidentkit.domain import rules
from incidentkit.domain.actor import ACTOR
from incidentkit.domain.commands import NewIncident, NoteAddition, StatusChange, check_many
from incidentkit.domain.errors import IncidentNotFound
from incidentkit.domain.queries import HistoryQuery, SearchQuery
from incidentkit.domain.values import (
    DEFAULT_LIMIT,
    MAX_LIMIT,
    Incident,
    IncidentEvent,
    IncidentOrder,
    IncidentStatus,
    SearchPage,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
    from datetime import datetime

    from incidentkit.domain.transitions import Transitions
    from incidentkit.domain.values import IncidentSource
    from incidentkit.store.base import Idempotency, StoreOperations

Incidents: TypeAlias = list[Incident]
"""A page; an alias because inside the class ``list`` is the verb."""

Events: TypeAlias = list[IncidentEvent]

_T = TypeVar("_T")


class IncidentOperations(ABC):
    """What can be done with incidents.

    Every method raises :class:`~incidentkit.StoreUnavailable` if the database cannot be reached
    or does not answer in time. What changes an incident is recorded in its history, in the same
    transaction, with the actor that :func:`~incidentkit.acting_as` names.
    """

    _transitions: Transitions

    @abstractmethod
    def _store(self) -> StoreOperations:
        """Return where incidents are.

        Raises:
            ClientClosed: If the client is not open.
        """

    @abstractmethod
    async def _write(self, write: Coroutine[Any, Any, _T]) -> _T:
        """Run what changes an incident."""

    @overload
    async def create(
        self, incident_message: NewIncident, /, *, idempotency_key: str | None = None
    ) -> Incident: ...

    @overload
    async def create(
        self,
        incident_message: str,
        *,
        source: IncidentSource | str,
        incident_type: IncidentStatus | str = IncidentStatus.NEW,
        dedup_key: str | None = None,
        idempotency_key: str | None = None,
    ) -> Incident: ...

    async def create(
        self,
        incident_message: NewIncident | str,
        *,
        source: IncidentSource | str | None = None,
        incident_type: IncidentStatus | str = IncidentStatus.NEW,
        dedup_key: str | None = None,
        idempotency_key: str | None = None,
    ) -> Incident:
        """Store an incident and return it.

        Args:
            incident_message: What happened, by the rules of :class:`~incidentkit.NewIncident`;
                or a ready :class:`~incidentkit.NewIncident`, without the next three.
            source: Who reports it.
            incident_type: The status that it starts with.
            dedup_key: What it is about, in 1 to 255 characters. While an incident with this key is
                open, it is that one that is returned, with one more of its ``occurrences``. None
                means that it is always a new one.
            idempotency_key: 1 to 255 characters that a repeated call gives again: for 24 hours it
                changes nothing then, and returns what the first one returned. None means that each
                call counts.

        Raises:
            InvalidIncident: With every faulty field; nothing is stored.
            IdempotencyKeyReused: If the key was used for something else.
            TypeError: If a NewIncident comes with fields beside it.
        """
        if isinstance(incident_message, NewIncident):
            if (source, dedup_key) != (None, None) or incident_type is not IncidentStatus.NEW:
                raise TypeError("A NewIncident is created as it is, without further fields")
            incident = incident_message
        else:
            incident = NewIncident(incident_message, source, incident_type, dedup_key)  # type: ignore[arg-type]
        once = _once(idempotency_key, "create", incident)
        store = self._store()
        return await self._write(store.create(incident, actor=ACTOR.get(), once=once))

    async def create_many(
        self, incidents: Iterable[NewIncident], *, idempotency_key: str | None = None
    ) -> Incidents:
        """Store many incidents in one transaction, all or none, and return them in their order.

        It is as if each was created by itself, one after the other, also where several have the
        same ``dedup_key``. Each has its event in its history.

        Args:
            incidents: At most 100,000.
            idempotency_key: As for :meth:`create`, for all of them together.

        Raises:
            InvalidIncident: If one is no :class:`~incidentkit.NewIncident`, or there are too many.
            IdempotencyKeyReused: If the key was used for something else.
        """
        checked = check_many(incidents)
        once = _once(idempotency_key, "create_many", checked)
        store = self._store()
        if not checked:
            return []
        return await self._write(store.create_many(checked, actor=ACTOR.get(), once=once))

    async def update_status(
        self,
        incident_id: int,
        status: IncidentStatus | str,
        *,
        note: str | None = None,
        expected_version: int | None = None,
        idempotency_key: str | None = None,
    ) -> Incident:
        """Change the status and return the incident.

        Args:
            incident_id: 1 to 2^63-1.
            status: The status that it gets. If it has it already nothing changes, and only a note
                is recorded.
            note: What is said about it in the history, in 1 to 1000 characters; None means nothing.
            expected_version: The version that the incident has to have; None means any.
            idempotency_key: 1 to 255 characters that a repeated call gives again: for 24 hours it
                changes nothing then, and returns what the first one returned. None means that each
                call counts.

        Raises:
            IncidentNotFound: If there is none with this id.
            InvalidIncident: With every faulty argument.
            VersionConflict: If it is not of the expected version.
            IllegalTransition: If the client's transitions do not allow it.
            DuplicateOpenIncident: If it would be open beside another one with its ``dedup_key``.
            IdempotencyKeyReused: If the key was used for something else.
        """
        change = StatusChange(incident_id, status, note, expected_version)
        once = _once(idempotency_key, "update_status", change)
        store = self._store()
        return await self._write(
            store.update_status(change, transitions=self._transitions, actor=ACTOR.get(), once=once)
        )

    async def note(self, incident_id: int, note: str) -> IncidentEvent:
        """Add a note to the history of an incident, and return its event.

        Args:
            incident_id: 1 to 2^63-1.
            note: Surrounding white space is removed; the rest has 1 to 1000 characters.

        Raises:
            IncidentNotFound: If there is none with this id.
            InvalidIncident: With every faulty argument.
        """
        addition = NoteAddition(incident_id, note)
        store = self._store()
        return await self._write(store.note(addition.incident_id, addition.note, actor=ACTOR.get()))

    @abstractmethod
    async def list(
        self,
        page: int = 1,
        limit: int = DEFAULT_LIMIT,
        status: IncidentStatus | str | None = None,
        source: IncidentSource | str | None = None,
    ) -> Incidents:
        """Return one page of incidents: newest first, those of one second by id, newest first."""

    async def get(self, incident_id: int) -> Incident:
        """Return the incident, as the database has it.

        Args:
            incident_id: 1 to 2^63-1.

        Raises:
            IncidentNotFound: If there is none with this id.
            InvalidIncident: If it is not an id.
        """
        incident_id = rules.check("incident_id", rules.incident_id, incident_id)
        incident = await self._store().get(incident_id)
        if incident is None:
            raise IncidentNotFound(incident_id)
        return incident

    async def search(  # noqa: PLR0913
        self,
        *,
        status: Iterable[IncidentStatus | str] | IncidentStatus | str | None = None,
        source: Iterable[IncidentSource | str] | IncidentSource | str | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        text: str | None = None,
        order: IncidentOrder | str = IncidentOrder.NEWEST,
        limit: int = DEFAULT_LIMIT,
        after: str | None = None,
        total: bool = False,
    ) -> SearchPage:
        """Return one page of the incidents that match, as the database has them.

        A page begins behind the last incident of the page before it, by its time and id, so that
        incidents which are created or purged in between are no reason to miss or repeat another.

        Args:
            status: A status, or several, of which an incident has one; None means any.
            source: A source, or several, of which an incident has one; None means any.
            created_after: Aware; only incidents that were created then or later.
            created_before: Aware; only incidents that were created earlier.
            text: Words of which the message has each, as a word or as the beginning of one, in any
                letter case: 1 to 200 characters with at least one letter or digit.
            order: ``newest`` or ``oldest`` first, by ``created_at`` and then by id.
            limit: Incidents a page, 1 to 1000.
            after: The ``next`` of the page before; None means the first page. The filters may be
                others than then, the order may not.
            total: Whether to count the incidents of all pages, which takes time if there are many.

        Raises:
            InvalidIncident: With every faulty argument.
        """
        query = SearchQuery(
            status=status,
            source=source,
            created_after=created_after,
            created_before=created_before,
            text=text,
            order=order,
            limit=limit,
            after=after,
            total=total,
        )
        return await self._store().search(query)

    async def iterate(  # noqa: PLR0913
        self,
        *,
        status: Iterable[IncidentStatus | str] | IncidentStatus | str | None = None,
        source: Iterable[IncidentSource | str] | IncidentSource | str | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        text: str | None = None,
        order: IncidentOrder | str = IncidentOrder.NEWEST,
        batch: int = 100,
    ) -> AsyncIterator[Incident]:
        """Yield all incidents that match, page by page; see :meth:`search`.

        Args:
            status: A status, or several.
            source: A source, or several.
            created_after: Aware; only incidents that were created then or later.
            created_before: Aware; only incidents that were created earlier.
            text: Words of which the message has each.
            order: ``newest`` or ``oldest`` first.
            batch: Incidents that are read at a time, 1 to 1000.

        Raises:
            InvalidIncident: With every faulty argument.
        """
        after = None
        # An iterator could be read only once.
        status, source = _again(status), _again(source)
        while True:
            page = await self.search(
                status=status,
                source=source,
                created_after=created_after,
                created_before=created_before,
                text=text,
                order=order,
                limit=batch,
                after=after,
            )
            for incident in page.incidents:
                yield incident
            if page.next is None:
                return
            after = page.next

    async def history(
        self, incident_id: int, *, limit: int = MAX_LIMIT, after: str | None = None
    ) -> Events:
        """Return what happened to an incident, oldest first.

        It begins with the incident, or with the version of incidentkit that came to record
        histories. Of an incident that was purged it tells that alone.

        Args:
            incident_id: 1 to 2^63-1.
            limit: Events, 1 to 1000.
            after: The cursor of an event of this incident, to go on behind it; None means from the
                beginning.

        Raises:
            IncidentNotFound: If nothing is known of such an incident.
            InvalidIncident: With every faulty argument.
        """
        query = HistoryQuery(incident_id, limit, after)
        store = self._store()
        events = await store.history(query.incident_id, after=query.event_id, limit=query.limit)
        if not events and await store.get(query.incident_id) is None:
            raise IncidentNotFound(query.incident_id)
        return events


def _again(values: Iterable[_T] | str | None) -> Iterable[_T] | str | None:
    return values if values is None or isinstance(values, str) else list(values)


def _once(
    idempotency_key: str | None,
    verb: str,
    parameters: NewIncident | StatusChange | Sequence[NewIncident],
) -> Idempotency | None:
    """Return what makes a write happen once; None if it need not."""
    if idempotency_key is None:
        return None
    from incidentkit.store.base import Idempotency  # noqa: PLC0415
    from incidentkit.wire import dump_json, wire_converter  # noqa: PLC0415

    said = dump_json([verb, wire_converter().unstructure(parameters)])
    return Idempotency(
        rules.check("idempotency_key", rules.name, idempotency_key), sha256(said).hexdigest()
    )

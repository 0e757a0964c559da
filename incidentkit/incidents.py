"""The verbs: the operations on incidents, in transactions of the client or of a host."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Coroutine, Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar, overload

from attrs import evolve

from incidentkit.domain import rules
from incidentkit.domain.actor import ACTOR
from incidentkit.domain.commands import (
    NewIncident,
    NoteAddition,
    Resolution,
    Resolutions,
    StatusChange,
    check_many,
)
from incidentkit.domain.errors import (
    FieldError,
    IncidentKitError,
    IncidentNotFound,
    InvalidIncident,
    PartlyStored,
)
from incidentkit.domain.queries import HistoryQuery, SearchQuery
from incidentkit.domain.transitions import Transitions
from incidentkit.domain.values import (
    DEFAULT_LIMIT,
    MAX_LIMIT,
    Incident,
    IncidentEvent,
    IncidentOrder,
    IncidentSource,
    IncidentStatus,
    OrderName,
    SearchPage,
    SourceName,
    StatusName,
    VersionMatch,
)

if TYPE_CHECKING:
    # Only an open client needs these.
    from incidentkit.store.idempotency import Idempotency, Parameters
    from incidentkit.store.ports import StoreOperations

IncidentList: TypeAlias = list[Incident]
"""An alias, since ``list`` is a method inside the class."""

OptionalIncidents: TypeAlias = list[Incident | None]

EventList: TypeAlias = list[IncidentEvent]

_T = TypeVar("_T")


class Transactions(Protocol):
    """Where the verbs read and write.

    Every use raises :class:`~incidentkit.ClientClosed` if the client is not open.
    """

    @property
    def store(self) -> StoreOperations:
        """The operations on incidents."""
        ...

    @property
    def commits(self) -> bool:
        """Whether each write is committed when it returns."""
        ...

    async def write(self, write: Coroutine[Any, Any, _T]) -> _T:
        """Run an operation of the store that writes."""
        ...

    def once(self, idempotency_key: str, verb: str, parameters: Parameters, /) -> Idempotency:
        """Return the idempotency key of a write, with the fingerprint of its parameters."""
        ...


class Incidents(ABC):
    """The verbs of a client, and of a joined transaction.

    Every method raises :class:`~incidentkit.StoreUnavailable` if the database cannot be reached
    or does not answer in time. A change of an incident is recorded in its history in the same
    transaction, with the actor named by :func:`~incidentkit.acting_as`.
    """

    _transactions: Transactions
    _transitions: Transitions

    @overload
    async def create(
        self, incident_message: NewIncident, /, *, idempotency_key: str | None = None
    ) -> Incident: ...

    @overload
    async def create(
        self,
        incident_message: str,
        *,
        source: IncidentSource | SourceName,
        incident_type: IncidentStatus | StatusName = IncidentStatus.NEW,
        dedup_key: str | None = None,
        details: dict[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> Incident: ...

    async def create(  # noqa: PLR0913
        self,
        incident_message: NewIncident | str,
        *,
        source: IncidentSource | SourceName | None = None,
        incident_type: IncidentStatus | StatusName = IncidentStatus.NEW,
        dedup_key: str | None = None,
        details: dict[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> Incident:
        """Store an incident and return it.

        Args:
            incident_message: What happened, by the rules of :class:`~incidentkit.NewIncident`;
                or a :class:`~incidentkit.NewIncident`, without the next four arguments.
            source: Who reports it.
            incident_type: The initial status.
            dedup_key: A key for the problem that it reports, 1 to 255 characters. While an incident
                with this key is open, count one more of its ``occurrences`` and return that one.
                None: always create an incident.
            details: Further information, by the rules of :class:`~incidentkit.NewIncident`; an open
                incident that counts the report keeps its own. None: no details.
            idempotency_key: 1 to 255 characters; a retry passes the same key. For 24 hours, another
                call of the same actor with the key changes nothing and returns the first answer.
                None: every call takes effect.

        Raises:
            InvalidIncident: With every faulty field; nothing is stored.
            IdempotencyKeyReused: If the key was used with other parameters.
            TypeError: If a NewIncident is given together with fields.
        """
        if isinstance(incident_message, NewIncident):
            given = (source, dedup_key, details) != (None, None, None)
            if given or incident_type is not IncidentStatus.NEW:
                raise TypeError("A NewIncident is created as it is, without further fields")
            incident = incident_message
        else:
            fields: dict[str, Any] = {"source": source, "incident_type": incident_type}
            incident = NewIncident(incident_message, dedup_key=dedup_key, details=details, **fields)
        transactions = self._transactions
        once = None
        # Checked here too: most creates have no key, and none is called more often.
        if idempotency_key is not None:
            once = _once(transactions, idempotency_key, "create", incident)
        return await transactions.write(
            transactions.store.create(incident, actor=ACTOR.get(), once=once)
        )

    async def create_many(
        self,
        incidents: Iterable[NewIncident],
        *,
        batch: int | None = None,
        idempotency_key: str | None = None,
    ) -> IncidentList:
        """Store many incidents and return them in their order: all or none, unless in batches.

        The result is the same as that of calling :meth:`create` for each in turn, even if several
        incidents have the same ``dedup_key``. Each has its event in its history.

        Args:
            incidents: At most 100,000.
            batch: Number of incidents to commit at a time, 1 to 100,000, to keep each transaction
                short. If the caller is cancelled, committed batches stay stored. None: one
                transaction; in a joined transaction, it must be None.
            idempotency_key: As for :meth:`create`, for all of them together. A retry with the same
                incidents and the same ``batch`` continues after the committed batches.

        Raises:
            InvalidIncident: If an item is not a :class:`~incidentkit.NewIncident`, there are too
                many, or ``batch`` is invalid.
            IdempotencyKeyReused: If the key was used with other parameters.
            PartlyStored: If a batch fails after another was committed.
        """
        checked = check_many(incidents)
        batch = rules.check("batch", rules.optional_batch, batch)
        transactions = self._transactions
        if batch is not None and not transactions.commits:
            reason = "must be None in a joined transaction, which stores all or none"
            raise InvalidIncident([FieldError("batch", reason)])
        verb = "create_many" if batch is None else f"create_many in batches of {batch}"
        once = _once(transactions, idempotency_key, verb, checked)
        store = transactions.store
        if not checked:
            return []
        size = batch or len(checked)
        stored: IncidentList = []
        for number, start in enumerate(range(0, len(checked), size)):
            part = checked[start : start + size]
            try:
                stored += await transactions.write(
                    store.create_many(part, actor=ACTOR.get(), once=once and once.part(number))
                )
            except IncidentKitError as error:
                if not stored:
                    raise
                raise PartlyStored(stored, len(checked), str(error)) from error
        return stored

    async def update_status(
        self,
        incident_id: int,
        status: IncidentStatus | StatusName,
        *,
        note: str | None = None,
        expected_version: int | str | VersionMatch | None = None,
        idempotency_key: str | None = None,
    ) -> Incident:
        """Change the status and return the incident.

        Args:
            incident_id: 1 to 2^63-1.
            status: The new status. Setting the current status changes nothing, and only records
                the note.
            note: A note for the history, in 1 to 1000 characters; None: no note.
            expected_version: The version or the ``tag`` that the incident must have. Only the tag
                distinguishes it from an incident that got the same id and version after a failover
                that lost commits. A :class:`~incidentkit.VersionMatch` is a condition on several.
                None: any version.
            idempotency_key: 1 to 255 characters; a retry passes the same key. For 24 hours, another
                call of the same actor with the key changes nothing and returns the first answer.
                None: every call takes effect.

        Raises:
            IncidentNotFound: If there is none with this id.
            InvalidIncident: With every faulty argument.
            VersionConflict: If it does not have the expected version.
            IllegalTransition: If the client's transitions do not allow the change.
            DuplicateOpenIncident: If another incident with its ``dedup_key`` is open.
            IdempotencyKeyReused: If the key was used with other parameters.
        """
        change = StatusChange(incident_id, status, note, expected_version)
        transactions = self._transactions
        once = _once(transactions, idempotency_key, "update_status", change)
        return await transactions.write(
            transactions.store.update_status(
                change, transitions=self._transitions, actor=ACTOR.get(), once=once
            )
        )

    async def resolve(
        self,
        dedup_key: str,
        *,
        status: IncidentStatus | StatusName = IncidentStatus.COMPLETED,
        note: str | None = None,
        idempotency_key: str | None = None,
    ) -> Incident | None:
        """End the open incident that has this ``dedup_key``, and return it.

        A check that reports a problem with :meth:`create` can end it when the problem is gone,
        without knowing its id::

            await incidents.create("Disk is full", source="monitoring", dedup_key="disk/db-1")
            ended = await incidents.resolve("disk/db-1", note="Logs were rotated")

        Args:
            dedup_key: 1 to 255 characters.
            status: The new status: any but ``new``.
            note: A note for the history, in 1 to 1000 characters; None: no note.
            idempotency_key: 1 to 255 characters; a retry passes the same key. For 24 hours, another
                call of the same actor with the key changes nothing and returns the first answer,
                also if that was None. None: every call takes effect.

        Returns:
            The incident; None if no incident with the key is open.

        Raises:
            InvalidIncident: With every faulty argument.
            IllegalTransition: If the client's transitions do not allow the change.
            IdempotencyKeyReused: If the key was used with other parameters.
        """
        resolution = Resolution(dedup_key, status, note)
        transactions = self._transactions
        once = _once(transactions, idempotency_key, "resolve", resolution)
        return await transactions.write(
            transactions.store.resolve(
                resolution, transitions=self._transitions, actor=ACTOR.get(), once=once
            )
        )

    async def resolve_many(
        self,
        dedup_keys: Iterable[str],
        *,
        status: IncidentStatus | StatusName = IncidentStatus.COMPLETED,
        note: str | None = None,
        idempotency_key: str | None = None,
    ) -> OptionalIncidents:
        """End the open incidents that have these keys, all or none, in one transaction.

        The result is the same as that of calling :meth:`resolve` for each key in turn: for a key
        that is given twice, the second answer is None.

        Args:
            dedup_keys: At most 100,000, each in 1 to 255 characters.
            status: The new status of each: any but ``new``.
            note: As for :meth:`resolve`, for each of them.
            idempotency_key: As for :meth:`resolve`, for all of them together.

        Returns:
            The incidents in the order of the keys; None where no incident was open.

        Raises:
            InvalidIncident: With every faulty argument; nothing is changed.
            IllegalTransition: If the client's transitions do not allow the change.
            IdempotencyKeyReused: If the key was used with other parameters.
        """
        resolutions = Resolutions(dedup_keys, status, note)
        transactions = self._transactions
        once = _once(transactions, idempotency_key, "resolve_many", resolutions)
        if not resolutions.dedup_keys:
            return []
        return await transactions.write(
            transactions.store.resolve_many(
                resolutions, transitions=self._transitions, actor=ACTOR.get(), once=once
            )
        )

    async def note(
        self,
        incident_id: int,
        note: str,
        *,
        expected_version: int | str | VersionMatch | None = None,
        idempotency_key: str | None = None,
    ) -> IncidentEvent:
        """Add a note to the history of an incident, and return its event.

        Args:
            incident_id: 1 to 2^63-1.
            note: Surrounding white space is removed; the rest has 1 to 1000 characters.
            expected_version: As for :meth:`update_status`. A note leaves the version as it is.
            idempotency_key: 1 to 255 characters; a retry passes the same key. For 24 hours, another
                call with the key adds nothing and returns the first answer. None: every call takes
                effect.

        Raises:
            IncidentNotFound: If there is none with this id.
            InvalidIncident: With every faulty argument.
            VersionConflict: If it does not have the expected version.
            IdempotencyKeyReused: If the key was used with other parameters.
        """
        addition = NoteAddition(incident_id, note, expected_version)
        transactions = self._transactions
        once = _once(transactions, idempotency_key, "note", addition)
        return await transactions.write(
            transactions.store.note(addition, actor=ACTOR.get(), once=once)
        )

    @abstractmethod
    async def list(
        self,
        page: int = 1,
        limit: int = DEFAULT_LIMIT,
        status: IncidentStatus | StatusName | None = None,
        source: IncidentSource | SourceName | None = None,
    ) -> IncidentList:
        """Return one page of incidents: newest first, those of one second by id, newest first."""

    async def get(self, incident_id: int) -> Incident:
        """Return the incident in its current state, never from a cache.

        Args:
            incident_id: 1 to 2^63-1.

        Raises:
            IncidentNotFound: If there is none with this id.
            InvalidIncident: If the id is not an integer in this range.
        """
        incident_id = rules.check("incident_id", rules.incident_id, incident_id)
        incident = await self._transactions.store.get(incident_id)
        if incident is None:
            raise IncidentNotFound(incident_id)
        return incident

    async def search(  # noqa: PLR0913
        self,
        *,
        status: Iterable[IncidentStatus | StatusName] | IncidentStatus | StatusName | None = None,
        source: Iterable[IncidentSource | SourceName] | IncidentSource | SourceName | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        dedup_key: str | None = None,
        text: str | None = None,
        order: IncidentOrder | OrderName = IncidentOrder.NEWEST,
        limit: int = DEFAULT_LIMIT,
        after: str | None = None,
        total: bool = False,
        details: bool = False,
    ) -> SearchPage:
        """Return one page of the matching incidents, never from a cache.

        A page starts after the last incident of the page before, by its time and id: incidents
        that are created or purged in between never make it miss or repeat another.

        Args:
            status: One status or several; None: any status.
            source: One source or several; None: any source.
            created_after: Aware; only incidents created at this time or later.
            created_before: Aware; only incidents created before this time.
            dedup_key: Only incidents with this deduplication key; None: any, or none.
            text: Words that the message must contain, in any letter case. Words that are joined by
                punctuation, as in ``db-1``, or enclosed in quotation marks must follow each other
                directly. The last word, unless it is part of such a phrase, also matches the
                beginning of a word. 1 to 200 characters with at least one letter or digit, and at
                most 32 different words and phrases, not counting those that another one includes.
            order: ``newest`` or ``oldest`` first, by ``created_at`` and then by id.
            limit: Incidents per page, 1 to 1000.
            after: The ``next`` of the page before; None: the first page. The filters may change
                between pages, the order may not.
            total: Whether to count the incidents of all pages, which takes time if there are many.
            details: Whether to read the details of each incident, up to 16 KiB. False: the field
                ``details`` of each is None.

        Raises:
            InvalidIncident: With every faulty argument.
        """
        query = SearchQuery(
            status=status,
            source=source,
            created_after=created_after,
            created_before=created_before,
            dedup_key=dedup_key,
            text=text,
            order=order,
            limit=limit,
            after=after,
            total=total,
            details=details,
        )
        return await self._search_page(query)

    async def _search_page(self, query: SearchQuery) -> SearchPage:
        """Return one page of a search whose arguments are checked."""
        return await self._transactions.store.search(query)

    async def iterate(  # noqa: PLR0913
        self,
        *,
        status: Iterable[IncidentStatus | StatusName] | IncidentStatus | StatusName | None = None,
        source: Iterable[IncidentSource | SourceName] | IncidentSource | SourceName | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        dedup_key: str | None = None,
        text: str | None = None,
        order: IncidentOrder | OrderName = IncidentOrder.NEWEST,
        batch: int = 100,
        details: bool = False,
    ) -> AsyncIterator[Incident]:
        """Yield all matching incidents, page by page; the filters are those of :meth:`search`.

        Args:
            status: One status or several; None: any status.
            source: One source or several; None: any source.
            created_after: Aware; only incidents created at this time or later.
            created_before: Aware; only incidents created before this time.
            dedup_key: Only incidents with this deduplication key; None: any, or none.
            text: Words and phrases that the message must all contain.
            order: ``newest`` or ``oldest`` first.
            batch: Number of incidents read at a time, 1 to 1000.
            details: Whether to read the details of each incident.

        Raises:
            InvalidIncident: With every faulty argument.
        """
        query = SearchQuery(
            status=status,
            source=source,
            created_after=created_after,
            created_before=created_before,
            dedup_key=dedup_key,
            text=text,
            order=order,
            limit=batch,
            details=details,
        )
        while True:
            page = await self._search_page(query)
            for incident in page.incidents:
                yield incident
            if page.next is None:
                return
            query = evolve(query, after=page.next)

    async def history(
        self, incident_id: int, *, limit: int = MAX_LIMIT, after: str | None = None
    ) -> EventList:
        """Return the history of an incident, oldest event first.

        It begins with the creation of the incident, or with the first change after incidentkit
        began to record histories. For a purged incident, it consists of the purge alone.

        Args:
            incident_id: 1 to 2^63-1.
            limit: Maximum number of events, 1 to 1000.
            after: The cursor of an event of this incident; None: from the first event.

        Raises:
            IncidentNotFound: If there is neither an incident with this id nor an event.
            InvalidIncident: With every faulty argument.
        """
        query = HistoryQuery(incident_id, limit, after)
        store = self._transactions.store
        events = await store.history(query.incident_id, after=query.event_id, limit=query.limit)
        if not events and await store.get(query.incident_id) is None:
            raise IncidentNotFound(query.incident_id)
        return events


def _once(
    transactions: Transactions, idempotency_key: str | None, verb: str, parameters: Parameters
) -> Idempotency | None:
    """Check the idempotency key, and fingerprint the write; None without a key."""
    if idempotency_key is None:
        return None
    key = rules.check("idempotency_key", rules.name, idempotency_key)
    return evolve(transactions.once(key, verb, parameters), actor=ACTOR.get())

"""The verbs without ``await``: each runs the asynchronous verb and waits for its result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterable, Iterator
from datetime import datetime
from typing import Any, TypeVar, overload

from attrs import evolve

from incidentkit.domain.commands import NewIncident
from incidentkit.domain.queries import SearchQuery
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
from incidentkit.incidents import EventList, IncidentList, Incidents, OptionalIncidents

_T = TypeVar("_T")


class SyncIncidents(ABC):
    """The verbs of a synchronous client, and of a synchronous joined transaction.

    Each has the same arguments, result and errors as the verb of the same name in
    :class:`~incidentkit.IncidentClient`.
    """

    @property
    @abstractmethod
    def _incidents(self) -> Incidents:
        """The asynchronous verbs."""

    @abstractmethod
    def _run(self, call: Coroutine[Any, Any, _T]) -> _T:
        """Run a call to completion."""

    @overload
    def create(
        self, incident_message: NewIncident, /, *, idempotency_key: str | None = None
    ) -> Incident: ...

    @overload
    def create(
        self,
        incident_message: str,
        *,
        source: IncidentSource | SourceName,
        incident_type: IncidentStatus | StatusName = IncidentStatus.NEW,
        dedup_key: str | None = None,
        details: dict[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> Incident: ...

    def create(  # noqa: PLR0913
        self,
        incident_message: NewIncident | str,
        *,
        source: IncidentSource | SourceName | None = None,
        incident_type: IncidentStatus | StatusName = IncidentStatus.NEW,
        dedup_key: str | None = None,
        details: dict[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> Incident:
        """Store an incident and return it, as :meth:`IncidentClient.create` does."""
        given: Any = incident_message
        reported_by: Any = source
        return self._run(
            self._incidents.create(
                given,
                source=reported_by,
                incident_type=incident_type,
                dedup_key=dedup_key,
                details=details,
                idempotency_key=idempotency_key,
            )
        )

    def create_many(
        self,
        incidents: Iterable[NewIncident],
        *,
        batch: int | None = None,
        idempotency_key: str | None = None,
    ) -> IncidentList:
        """Store many incidents, as :meth:`IncidentClient.create_many` does."""
        return self._run(
            self._incidents.create_many(incidents, batch=batch, idempotency_key=idempotency_key)
        )

    def update_status(
        self,
        incident_id: int,
        status: IncidentStatus | StatusName,
        *,
        note: str | None = None,
        expected_version: int | str | VersionMatch | None = None,
        idempotency_key: str | None = None,
    ) -> Incident:
        """Change the status, as :meth:`IncidentClient.update_status` does."""
        return self._run(
            self._incidents.update_status(
                incident_id,
                status,
                note=note,
                expected_version=expected_version,
                idempotency_key=idempotency_key,
            )
        )

    def resolve(
        self,
        dedup_key: str,
        *,
        status: IncidentStatus | StatusName = IncidentStatus.COMPLETED,
        note: str | None = None,
        idempotency_key: str | None = None,
    ) -> Incident | None:
        """End the open incident with a key, as :meth:`IncidentClient.resolve` does."""
        return self._run(
            self._incidents.resolve(
                dedup_key, status=status, note=note, idempotency_key=idempotency_key
            )
        )

    def resolve_many(
        self,
        dedup_keys: Iterable[str],
        *,
        status: IncidentStatus | StatusName = IncidentStatus.COMPLETED,
        note: str | None = None,
        idempotency_key: str | None = None,
    ) -> OptionalIncidents:
        """End the open incidents with some keys, as :meth:`IncidentClient.resolve_many` does."""
        return self._run(
            self._incidents.resolve_many(
                dedup_keys, status=status, note=note, idempotency_key=idempotency_key
            )
        )

    def note(
        self,
        incident_id: int,
        note: str,
        *,
        expected_version: int | str | VersionMatch | None = None,
        idempotency_key: str | None = None,
    ) -> IncidentEvent:
        """Add a note to the history, as :meth:`IncidentClient.note` does."""
        return self._run(
            self._incidents.note(
                incident_id,
                note,
                expected_version=expected_version,
                idempotency_key=idempotency_key,
            )
        )

    def list(
        self,
        page: int = 1,
        limit: int = DEFAULT_LIMIT,
        status: IncidentStatus | StatusName | None = None,
        source: IncidentSource | SourceName | None = None,
    ) -> IncidentList:
        """Return one page of incidents, newest first, as :meth:`IncidentClient.list` does."""
        return self._run(self._incidents.list(page, limit, status, source))

    def get(self, incident_id: int) -> Incident:
        """Return the incident in its current state, as :meth:`IncidentClient.get` does."""
        return self._run(self._incidents.get(incident_id))

    def search(  # noqa: PLR0913
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
        """Return one page of the matching incidents, as :meth:`IncidentClient.search` does."""
        return self._run(
            self._incidents.search(
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
        )

    def iterate(  # noqa: PLR0913
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
    ) -> Iterator[Incident]:
        """Yield all matching incidents, page by page, as :meth:`IncidentClient.iterate` does."""
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
            page = self._run(self._incidents._search_page(query))  # noqa: SLF001
            yield from page.incidents
            if page.next is None:
                return
            query = evolve(query, after=page.next)

    def history(
        self, incident_id: int, *, limit: int = MAX_LIMIT, after: str | None = None
    ) -> EventList:
        """Return the history, oldest first, as :meth:`IncidentClient.history` does."""
        return self._run(self._incidents.history(incident_id, limit=limit, after=after))

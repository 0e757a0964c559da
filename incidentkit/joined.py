"""The verbs inside a transaction of the application's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from incidentkit.domain.queries import ListQuery
from incidentkit.domain.values import DEFAULT_LIMIT, Incident
from incidentkit.operations import IncidentOperations

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from incidentkit.domain.transitions import Transitions
    from incidentkit.domain.values import IncidentSource, IncidentStatus
    from incidentkit.store.base import StoreOperations

Incidents: TypeAlias = list[Incident]
"""A page; an alias because inside the class ``list`` is the verb."""

_T = TypeVar("_T")


class JoinedIncidents(IncidentOperations):
    """What :meth:`IncidentClient.join` returns; good until the transaction ends.

    Nothing that it writes is seen by anybody else before the transaction is committed, and nothing
    is left of it after a rollback. No cache is read or filled. A call that fails leaves nothing of
    what it wrote, one that is cancelled all of it or nothing. An error of the database may have
    ended the transaction, as it does for any other statement in it.

    Every method raises :class:`~incidentkit.NotInTransaction` once the transaction has ended.
    """

    def __init__(self, store: StoreOperations, transitions: Transitions) -> None:
        self._operations = store
        self._transitions = transitions

    async def list(
        self,
        page: int = 1,
        limit: int = DEFAULT_LIMIT,
        status: IncidentStatus | str | None = None,
        source: IncidentSource | str | None = None,
    ) -> Incidents:
        """Return one page of incidents as the transaction sees it, newest first.

        The arguments are those of :meth:`IncidentClient.list`.

        Raises:
            InvalidIncident: With every faulty argument.
        """
        query = ListQuery(page, limit, status, source)
        return (await self._operations.list(query)).incidents

    def _store(self) -> StoreOperations:
        return self._operations

    async def _write(self, write: Coroutine[Any, Any, _T]) -> _T:
        return await write

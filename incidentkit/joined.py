"""The verbs inside a transaction of the application's own."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

from attrs import frozen

from incidentkit.domain.queries import ListQuery
from incidentkit.domain.transitions import Transitions
from incidentkit.domain.values import DEFAULT_LIMIT, IncidentSource, IncidentStatus
from incidentkit.incidents import IncidentList, Incidents, Transactions
from incidentkit.store.ports import StoreOperations

_T = TypeVar("_T")


@frozen
class _HostTransaction:
    """Reads and writes in the transaction of a host's connection.

    Attributes:
        store: The operations on that connection.
    """

    store: StoreOperations

    async def write(self, write: Coroutine[Any, Any, _T]) -> _T:
        """Run an operation of the store that writes."""
        return await write


class JoinedIncidents(Incidents):
    """The verbs in the application's transaction, from :meth:`IncidentClient.join` until it ends.

    Writes become visible to others when the transaction is committed, and vanish if it is rolled
    back. No cache is read or filled. A call that fails leaves none of its writes behind; a call
    that is canceled leaves all of them or none. An error of the database may have ended the
    transaction, as after any other statement.

    Every method raises :class:`~incidentkit.NotInTransaction` once the transaction has ended.
    """

    def __init__(self, store: StoreOperations, transitions: Transitions) -> None:
        self._transactions: Transactions = _HostTransaction(store)
        self._transitions = transitions

    async def list(
        self,
        page: int = 1,
        limit: int = DEFAULT_LIMIT,
        status: IncidentStatus | str | None = None,
        source: IncidentSource | str | None = None,
    ) -> IncidentList:
        """Return one page of incidents as the transaction sees it, newest first.

        The arguments are those of :meth:`IncidentClient.list`.

        Raises:
            InvalidIncident: With every faulty argument.
        """
        query = ListQuery(page, limit, status, source)
        return (await self._transactions.store.list(query)).incidents

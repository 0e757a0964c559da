"""The verbs in a transaction of the application."""

from __future__ import annotations

from incidentkit.domain.queries import ListQuery
from incidentkit.domain.transitions import Transitions
from incidentkit.domain.values import (
    DEFAULT_LIMIT,
    IncidentSource,
    IncidentStatus,
    SourceName,
    StatusName,
)
from incidentkit.incidents import IncidentList, Incidents, Transactions


class JoinedIncidents(Incidents):
    """The verbs in the application's transaction, as :meth:`IncidentClient.join` returns them.

    Writes become visible to others when the transaction is committed, and vanish if it is rolled
    back. No cache is read or filled. A call that fails leaves none of its writes behind; a call
    that is cancelled leaves all of them or none. An error of the database may have ended the
    transaction, as after any other statement.

    Every method raises :class:`~incidentkit.NotInTransaction` once the transaction has ended.
    """

    def __init__(self, transaction: Transactions, transitions: Transitions) -> None:
        self._transactions = transaction
        self._transitions = transitions

    async def list(
        self,
        page: int = 1,
        limit: int = DEFAULT_LIMIT,
        status: IncidentStatus | StatusName | None = None,
        source: IncidentSource | SourceName | None = None,
    ) -> IncidentList:
        """Return one page of incidents as the transaction sees it, newest first.

        The arguments are those of :meth:`IncidentClient.list`.

        Raises:
            InvalidIncident: With every faulty argument.
        """
        query = ListQuery(page, limit, status, source)
        return (await self._transactions.store.list(query)).incidents

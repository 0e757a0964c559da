"""Statements that calls share on PostgreSQL while they wait for a connection.

Under row security, each session of a host's pool may see other rows, so calls share no statement.
If row security is enabled while the store is open, the next shared statement does nothing, and
each call runs alone from then on.

Calls that could wait for another transaction run alone, since they would keep the others waiting:
creates with a deduplication key, changes back to ``new``, and changes of a locked incident.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, Final, TypeAlias, TypeVar

from sqlalchemy import Executable

import incidentkit.store.postgresql.statements as sql
from incidentkit.affinity import Affinity, running_loop
from incidentkit.batching import Batcher
from incidentkit.domain.commands import NewIncident, StatusChange
from incidentkit.domain.errors import StoreError
from incidentkit.domain.queries import ListQuery
from incidentkit.domain.transitions import Transitions
from incidentkit.domain.values import OPEN, Incident
from incidentkit.store.executor import Executor, Fetch, Rows
from incidentkit.store.page import Page
from incidentkit.store.postgresql.dialect import PostgresDialect, values_to_insert
from incidentkit.store.postgresql.errors import refused
from incidentkit.store.sql.rows import INCIDENT_COLUMNS, PAGE, read_detailed, read_page
from incidentkit.store.sql.statements import (
    NEAR,
    SELECT_INCIDENT,
    page_statement,
    page_values,
)

Found: TypeAlias = "tuple[Incident, ...]"
"""One incident, or none."""

_I = TypeVar("_I")
_T = TypeVar("_T")

BATCH: Final = 100
"""Maximum number of calls that share a statement."""

SMALL: Final = 100
"""Maximum ``limit`` of a page that is read together with others: reading all rows of a statement
blocks the event loop."""

PAGES: Final = 32
"""Maximum number of pages that are read together."""

_ID: Final = INCIDENT_COLUMNS.index("incident_id")


class PostgresSharing:
    """Gathers calls that wait at the same time, and answers them from one statement.

    Args:
        dialect: Runs a call that is alone.
        executor: Runs the statements.
        in_transactions: Whether a shared write runs in a transaction although it is one statement:
            with a host's engine, a listener may fail after the statement. Uncommitted, its calls
            can then be tried one by one.
    """

    def __init__(
        self, dialect: PostgresDialect, executor: Executor, *, in_transactions: bool = False
    ) -> None:
        self._dialect = dialect
        self._executor = executor
        self._run = executor.transact if in_transactions else executor.write
        # Whether a shared statement has found row security.
        self._alone = False
        self._gets: Batcher[int, Found | None] = Batcher(self._get_all, size=BATCH)
        self._lists = Batcher(self._list_all, size=PAGES)
        self._creates = Batcher(self._create_all, size=BATCH)
        self._updates = Batcher(self._update_all, size=BATCH)
        self._affinity = Affinity()

    def get(self, incident_id: int) -> Awaitable[Found | None] | None:
        """Read one incident."""
        return None if self._alone else self._share(self._gets, incident_id)

    def list(self, query: ListQuery) -> Awaitable[Page | None] | None:
        """Read one page, unless it is too large, or lies too deep, to be read with others."""
        if self._alone or query.limit > SMALL or query.deep:
            return None
        return self._share(self._lists, query)

    def create(self, incident: NewIncident, actor: str | None) -> Awaitable[Incident | None] | None:
        """Store one incident, unless it has a deduplication key."""
        if self._alone or incident.dedup_key is not None:
            return None
        return self._share(self._creates, (incident, actor))

    def update_status(
        self, change: StatusChange, transitions: Transitions, actor: str | None
    ) -> Awaitable[Incident | None] | None:
        """Change one status, unless it is a change back to ``new``, or of a tagged incident."""
        by_version = isinstance(change.expected_version, int | None)
        if self._alone or change.status is OPEN or not by_version:
            return None
        return self._share(self._updates, (change, transitions, actor))

    def _share(self, batcher: Batcher[_I, _T], item: _I) -> Awaitable[_T]:
        if self._affinity.loop is not running_loop():
            raise self._affinity.error()
        return batcher(item)

    async def _get_all(self, ids: Sequence[int]) -> Sequence[Found | StoreError | None]:
        if len(ids) == 1:
            rows = await self._executor.read(SELECT_INCIDENT, {"incident_id": ids[0]})
        else:
            values = {"incident_ids": list(map(str, ids))}
            rows = await self._executor.read(sql.SELECT_INCIDENTS, values)
            if not rows:
                self._alone = True
                return [None] * len(ids)
        by_id = {row[_ID]: row for row in rows}
        return [_read_or_refuse(by_id.get(incident_id)) for incident_id in ids]

    async def _list_all(self, queries: Sequence[ListQuery]) -> Sequence[Page | None]:
        if len(queries) == 1:
            (query,) = queries
            near = query.offset + query.limit <= NEAR
            statement = page_statement(query, "near" if near else "any")
            rows = await self._executor.read(statement, page_values(query))
            page = read_page(rows, self._executor)
            if page.token is None:
                await self._look_for_row_security()
            return [None if self._alone else page]
        values = {
            "statuses": [query.status and query.status.value for query in queries],
            "sources": [query.source and query.source.value for query in queries],
            "limits": [str(query.limit) for query in queries],
            "offsets": [str(query.offset) for query in queries],
        }
        rows = await self._executor.read(sql.SELECT_PAGES, values)
        if not rows:
            self._alone = True
            return [None] * len(queries)
        return [
            read_page(list(page), self._executor) for _, page in groupby(rows, itemgetter(PAGE))
        ]

    async def _look_for_row_security(self) -> None:
        rows = await self._executor.read(sql.SELECT_WITHOUT_ROW_SECURITY, {})
        self._alone = not rows

    async def _create_all(
        self, given: Sequence[tuple[NewIncident, str | None]]
    ) -> Sequence[Incident | None]:
        if len(given) == 1:
            ((incident, actor),) = given

            async def work(fetch: Fetch) -> Incident:
                return await self._dialect.create(fetch, incident, actor)

            return [await self._executor.write(work)]
        rows = await self._write_all(sql.INSERT_FOR_SEVERAL, values_to_insert(given))
        if not rows:
            if rows is not None:
                await self._look_for_row_security()
            return [None] * len(given)
        return [read_detailed(row) for row in rows]

    async def _update_all(
        self, given: Sequence[tuple[StatusChange, Transitions, str | None]]
    ) -> Sequence[Incident | None]:
        # Of several changes of one incident, the first: they run one after the other.
        some = {each[0].incident_id: each for each in reversed(given)}
        changes = [change for change, _, _ in some.values()]
        values = {
            "incident_ids": list(map(str, some)),
            "statuses": [change.status.value for change in changes],
            "from_statuses": [
                " ".join(transitions.sources(change.status))
                for change, transitions, _ in some.values()
            ],
            "expected_versions": [
                None if change.expected_version is None else str(change.expected_version)
                for change in changes
            ],
            "notes": [change.note for change in changes],
            "actors": [actor for _, _, actor in some.values()],
        }
        rows = await self._write_all(sql.UPDATE_STATUSES, values)
        done = {row[_ID]: read_detailed(row) for row in rows or ()}
        return [
            done.get(each[0].incident_id) if some[each[0].incident_id] is each else None
            for each in given
        ]

    async def _write_all(self, statement: Executable, values: Mapping[str, Any]) -> Rows | None:
        """Run a statement that writes for several calls; None if the database refused it."""

        async def work(fetch: Fetch) -> Rows:
            return await fetch(statement, values)

        try:
            return await self._run(work)
        except StoreError as error:
            # One of the calls may be at fault: each is tried alone.
            if not refused(error):
                raise
            return None


def _read_or_refuse(row: Any) -> Found | StoreError:
    try:
        return () if row is None else (read_detailed(row),)
    except StoreError as error:
        return error

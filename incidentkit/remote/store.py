"""A store that keeps incidents in a service, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any, Final, NoReturn, TypeAlias, TypeVar, get_origin, overload
from uuid import uuid4

from incidentkit.affinity import Affinity
from incidentkit.domain.commands import (
    NewIncident,
    NoteAddition,
    Resolution,
    Resolutions,
    StatusChange,
)
from incidentkit.domain.cursor import encode_cursor
from incidentkit.domain.errors import (
    AccessDenied,
    FieldError,
    IncidentNotFound,
    InvalidIncident,
    NeedsDatabase,
    SchemaOutOfDate,
    StoreError,
)
from incidentkit.domain.queries import ListQuery, SearchQuery
from incidentkit.domain.rules import EventCursor
from incidentkit.domain.transitions import Transitions
from incidentkit.domain.values import (
    BYTES_PER_REQUEST,
    EARLIEST_TIME,
    ITEMS_PER_REQUEST,
    LATEST_TIME,
    MAX_LIMIT,
    ChangePage,
    FeedBlocker,
    Incident,
    IncidentEvent,
    SearchPage,
)
from incidentkit.remote.connection import Connection
from incidentkit.remote.feed import RemoteFeed
from incidentkit.remote.messages import JSON, Answer, Call, header_value, preconditions
from incidentkit.remote.options import RemoteOptions
from incidentkit.remote.problems import error_for, kind_of
from incidentkit.remote.url import check_token, service_url
from incidentkit.store.idempotency import Idempotency
from incidentkit.store.page import Page
from incidentkit.store.ports import (
    EventList,
    IncidentList,
    OptionalIncidents,
    Place,
    StoreOperations,
)
from incidentkit.version import API_VERSION, API_VERSION_HEADER
from incidentkit.wire import dump_json, wire_converter
from incidentkit.wire.kinds import Kind

_T = TypeVar("_T")

PURGE_PATIENCE: Final = 30.0
"""Seconds that a request to purge may take beyond the deadline; the service works for 20."""

_ANY_TRANSITION: Final = Transitions()

_Query: TypeAlias = tuple[tuple[str, str], ...]


class RemoteStore:
    """Incidents in a service: each write is committed when it returns.

    Every write but a purge has an idempotency key, so that repeating it after a failed connection
    has no further effect.

    Args:
        url: The URL of the service.
        token: The access token; None: none is sent.
        options: Time limits and connections.

    Attributes:
        has_token: False: only the service caches pages of the list, not its clients.

    Raises:
        InvalidSettings: If the URL or the token cannot be used.
    """

    has_token = False

    def __init__(
        self, url: str, token: str | None = None, options: RemoteOptions | None = None
    ) -> None:
        options = options or RemoteOptions()
        check_token(url, token, plain_http=options.plain_http)
        self._connection = Connection(service_url(url), token, options)
        # Where the store is open; None: it is closed.
        self._affinity: Affinity | None = None

    @property
    def url(self) -> str:
        """The URL of the service."""
        return self._connection.url

    async def open(self) -> None:
        """Get ready, and check the URL, the token and the version with one request."""
        await self._leave_ended_loop()
        self._affinity = Affinity()
        self._affinity.on_fork = self._connection.sever
        try:
            await self._connection.open()
            await self._check_access()
        except BaseException:
            # A failure to close must not replace the error.
            with suppress(Exception):
                await self.close()
            raise

    async def close(self) -> None:
        """End running reads, and close every connection; once closed, do nothing."""
        await self._leave_ended_loop()
        await self._connection.close()
        self._affinity = None

    def abandon(self) -> None:
        """Release every connection without the event loop, which has ended."""
        self._connection.abandon()
        self._affinity = None

    async def _leave_ended_loop(self) -> None:
        affinity = self._affinity
        if affinity is not None and not affinity.here:
            affinity.check_free()
            self.abandon()

    async def check(self) -> None:
        """Raise unless the service admits this client and its database is ready."""
        await self._check_access()
        answer = await self._connection.send(Call("GET", "/health/ready"))
        if answer.status == 200:  # noqa: PLR2004
            return
        error = error_for(answer, self.url, _NO_CALL)
        schema = self._schema(answer)
        if schema.get("state") == "out_of_date":
            current, expected = schema.get("revision"), str(schema.get("expected", ""))
            raise SchemaOutOfDate(current, expected, place=self.url) from error
        raise error

    async def _check_access(self) -> None:
        """Raise unless the service answers, has a compatible API, and accepts the token."""
        call = Call("GET", "/incident/get", (("limit", "1"),))
        answer = await self._connection.send(call)
        self._check_version(answer)
        try:
            self._expect(answer, call, list[Incident])
        except AccessDenied:
            # A token with only the scope report cannot read, but is valid.
            if kind_of(answer) is not Kind.INSUFFICIENT_SCOPE:
                raise

    def _check_version(self, answer: Answer) -> None:
        version = answer.headers.get(API_VERSION_HEADER.lower())
        if version is not None and version.partition(".")[0] != API_VERSION.partition(".")[0]:
            reason = (
                f"its API has version {version}, but this incidentkit needs version {API_VERSION}: "
                "use compatible versions of incidentkit"
            )
            raise StoreError(reason, place=self.url)

    def _schema(self, answer: Answer) -> dict[str, Any]:
        try:
            found = json.loads(answer.body)["schema"]
        except (KeyError, TypeError, ValueError):
            found = None
        return found if isinstance(found, dict) else {}

    async def create(
        self, incident: NewIncident, *, actor: str | None = None, once: Idempotency | None = None
    ) -> Incident:
        """Store the incident with its event and return it."""
        body = wire_converter().unstructure(incident)
        call = _write("POST", "/incident/create", body, actor, once)
        return await self._send(call, Incident, once)

    async def create_many(
        self,
        incidents: Sequence[NewIncident],
        *,
        actor: str | None = None,
        once: Idempotency | None = None,
    ) -> IncidentList:
        """Store incidents, all or none, and return them in the same order.

        Raises:
            InvalidIncident: If they are too many or too large for one request.
        """
        _check_number("incidents", len(incidents))
        body = wire_converter().unstructure(list(incidents))
        call = _write("POST", "/incident/create-many", body, actor, once)
        _check_size("incidents", call)
        return await self._send(call, list[Incident], once)

    async def update_status(
        self,
        change: StatusChange,
        *,
        transitions: Transitions = _ANY_TRANSITION,  # noqa: ARG002
        actor: str | None = None,
        once: Idempotency | None = None,
    ) -> Incident:
        """Change the status by the transitions of the service, and return the incident."""
        body = {"incident_id": change.incident_id, "status": change.status.value}
        call = _write(
            "PATCH",
            "/incident/update-status",
            body if change.note is None else {**body, "note": change.note},
            actor,
            once,
            headers=preconditions(change.expected_version),
            incident_id=change.incident_id,
            to_status=change.status,
        )
        return await self._send(call, Incident, once)

    async def resolve(
        self,
        resolution: Resolution,
        *,
        transitions: Transitions = _ANY_TRANSITION,  # noqa: ARG002
        actor: str | None = None,
        once: Idempotency | None = None,
    ) -> Incident | None:
        """End the open incident with a deduplication key by the transitions of the service."""
        body = wire_converter().unstructure(resolution)
        call = _write("POST", "/incident/resolve", body, actor, once, to_status=resolution.status)
        return await self._send(call, Incident, once, absent=True)

    async def resolve_many(
        self,
        resolutions: Resolutions,
        *,
        transitions: Transitions = _ANY_TRANSITION,  # noqa: ARG002
        actor: str | None = None,
        once: Idempotency | None = None,
    ) -> OptionalIncidents:
        """End open incidents, all or none, and return one answer for each deduplication key.

        Raises:
            InvalidIncident: If they are too many or too large for one request.
        """
        _check_number("dedup_keys", len(resolutions.dedup_keys))
        body = wire_converter().unstructure(resolutions)
        call = _write(
            "POST", "/incident/resolve-many", body, actor, once, to_status=resolutions.status
        )
        _check_size("dedup_keys", call)
        return await self._send(call, OptionalIncidents, once)

    async def note(
        self, addition: NoteAddition, *, actor: str | None = None, once: Idempotency | None = None
    ) -> IncidentEvent:
        """Add a note to the history and return its event."""
        call = _write(
            "POST",
            f"/incident/note/{addition.incident_id}",
            {"note": addition.note},
            actor,
            once,
            headers=preconditions(addition.expected_version),
            incident_id=addition.incident_id,
        )
        return await self._send(call, IncidentEvent, once)

    async def list(self, query: ListQuery) -> Page:
        """Return one page, without a token: the service does the caching."""
        parameters = [("page", str(query.page)), ("limit", str(query.limit))]
        if query.status is not None:
            parameters.append(("status", query.status.value))
        if query.source is not None:
            parameters.append(("source", query.source.value))
        call = Call("GET", "/incident/get", tuple(parameters))
        answer = await self._connection.send(call)
        body = self._json(answer, call)
        return Page(partial(self._structure, body, list[Incident]), None, body)

    async def token(self) -> str | None:
        """Return None: a client of a service cannot detect changes."""
        return None

    async def get(self, incident_id: int) -> Incident | None:
        """Return the incident, or None if there is none with this id."""
        call = Call("GET", f"/incident/get/{incident_id}", incident_id=incident_id)
        try:
            return await self._send(call, Incident)
        except IncidentNotFound:
            return None

    async def search(self, query: SearchQuery) -> SearchPage:
        """Return one page of a search, with the total if the query asks for it."""
        slow = query.text is not None or query.total or query.details
        call = Call("GET", "/incident/search", _parameters(query), slow=slow)
        return await self._send(call, SearchPage)

    async def history(
        self, incident_id: int, *, after: int = 0, limit: int = MAX_LIMIT
    ) -> EventList:
        """Return events of an incident, oldest first, after the one with this event id."""
        parameters = [("limit", str(limit))]
        if after:
            # Within the history of an incident, only the event id of a cursor counts.
            parameters.append(("after", encode_cursor(0, after, 0, incident_id)))
        path = f"/incident/history/{incident_id}"
        call = Call("GET", path, tuple(parameters), incident_id=incident_id)
        try:
            return await self._send(call, list[IncidentEvent])
        except IncidentNotFound:
            return []

    def feed(self) -> RemoteFeed:
        """Return a new feed of the changes at the service."""
        return RemoteFeed(self)

    async def read_changes(self, after: str | None, limit: int, seconds: int) -> ChangePage:
        """Return changes after a cursor, and wait for one for some seconds if there is none."""
        parameters = [("limit", str(limit))]
        if after is not None:
            parameters.append(("after", after))
        if seconds:
            parameters.append(("wait", str(seconds)))
        call = Call(
            "GET",
            "/incident/changes",
            tuple(parameters),
            patience=seconds,
            waits=seconds > 0,
        )
        return await self._send(call, ChangePage)

    def stop_waiting(self) -> None:
        """Make the reads that wait for changes raise :class:`~incidentkit.ClientClosed`."""
        self._connection.interrupt(waiting=True)

    async def purgeable(self, ended_before: datetime) -> int:
        """Return the number of incidents that ended before a time."""
        return (await self._purge(ended_before, None, dry_run=True))[1]

    async def purge(
        self,
        ended_before: datetime,
        limit: int,  # noqa: ARG002
        *,
        actor: str | None = None,
    ) -> tuple[int, bool]:
        """Remove as many incidents that ended before a time as the service does in one request."""
        purged, left = await self._purge(ended_before, actor, dry_run=False)
        return purged, purged > 0 and left > 0

    async def _purge(
        self, ended_before: datetime, actor: str | None, *, dry_run: bool
    ) -> tuple[int, int]:
        """Return the number of incidents that were removed, and the number still to remove."""
        parameters = [("ended_before", _time(ended_before))]
        if dry_run:
            parameters.append(("dry_run", "true"))
        call = Call(
            "POST",
            "/incident/purge",
            tuple(parameters),
            _actor(actor),
            patience=PURGE_PATIENCE,
            single=not dry_run,
        )
        numbers = await self._send(call, dict[str, int])
        try:
            return numbers["purged"], numbers["left"]
        except KeyError as error:
            raise self._unreadable() from error

    async def feed_blocker(self) -> FeedBlocker | None:
        """Raise, since a service does not tell clients which transaction holds up its feed."""
        raise NeedsDatabase("feed_blocker")

    def join(self, connection: object) -> StoreOperations:  # noqa: ARG002
        """Raise, since a transaction cannot extend over HTTP."""
        raise NeedsDatabase("join")

    def join_sync(self, connection: object) -> StoreOperations:  # noqa: ARG002
        """Raise, since a transaction cannot extend over HTTP."""
        raise NeedsDatabase("join")

    async def fetch(self, _: object, __: object) -> NoReturn:
        """Raise, since access tokens are managed only on the database."""
        raise NeedsDatabase("tokens")

    async def transact(self, _: object) -> NoReturn:
        """Raise, since access tokens are managed only on the database."""
        raise NeedsDatabase("tokens")

    async def changes(self, after: Place, limit: int) -> EventList:  # noqa: ARG002
        """Raise, since :meth:`feed` has changes by their cursors."""
        raise NeedsDatabase("changes by place")

    async def latest_change(self) -> IncidentEvent | None:
        """Raise, since :meth:`feed` has changes by their cursors."""
        raise NeedsDatabase("the latest change")

    async def waiting_changes(self, after: Place, limit: int) -> Sequence[tuple[int, int, int]]:  # noqa: ARG002
        """Raise, since :meth:`feed` has changes by their cursors."""
        raise NeedsDatabase("waiting changes")

    async def check_order(self) -> None:
        """Do nothing: the service checks the order."""

    async def place(self, cursor: EventCursor) -> Place:  # noqa: ARG002
        """Raise, since :meth:`feed` has changes by their cursors."""
        raise NeedsDatabase("the place of a cursor")

    @overload
    async def _send(self, call: Call, type_: type[_T], once: Idempotency | None = ...) -> _T: ...

    @overload
    async def _send(
        self, call: Call, type_: type[_T], once: Idempotency | None = ..., *, absent: bool
    ) -> _T | None: ...

    async def _send(
        self,
        call: Call,
        type_: type[_T],
        once: Idempotency | None = None,
        *,
        absent: bool = False,
    ) -> _T | None:
        """Send a request, and return the value of its answer.

        Args:
            call: The request.
            type_: The type of the value.
            once: The idempotency key of the caller; None: there is none.
            absent: Whether the answer may have no value, which is None then.
        """
        answer = await self._connection.send(call)
        nothing = absent and answer.status == 204  # noqa: PLR2004
        value = None if nothing else self._expect(answer, call, type_)
        replayed = answer.headers.get("idempotent-replayed") == "true"
        if replayed and answer.attempts == 1 and once is not None and once.replay is not None:
            once.replay.happened = True
        return value

    def _expect(self, answer: Answer, call: Call, type_: type[_T]) -> _T:
        return self._structure(self._json(answer, call), type_)

    def _json(self, answer: Answer, call: Call) -> bytes:
        """Return the JSON of a successful answer; for any other answer, raise its error."""
        if answer.status not in (200, 201):
            raise error_for(answer, self.url, call)
        if answer.media_type != JSON:
            raise self._unreadable()
        return answer.body

    def _structure(self, body: bytes, type_: type[_T]) -> _T:
        try:
            value = json.loads(body)
            # The converter would take an object for an empty array.
            if isinstance(value, list) != (get_origin(type_) is list):
                raise self._unreadable()
            return wire_converter(complete=False).structure(value, type_)
        # For a mapping of names to numbers, the converter calls items() on any value.
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise self._unreadable() from error

    def _unreadable(self) -> StoreError:
        reason = "its answer is not from incidentkit: check the URL, and the version behind it"
        return StoreError(reason, place=self.url)


_NO_CALL: Final = Call("GET", "")


def _write(  # noqa: PLR0913
    method: str,
    path: str,
    body: Any,
    actor: str | None,
    once: Idempotency | None,
    *,
    headers: dict[str, bytes] | None = None,
    **about: Any,
) -> Call:
    """Return the request of a write, with an idempotency key."""
    key = str(uuid4()) if once is None else once.key
    given = {"Idempotency-Key": header_value("idempotency_key", key)}
    return Call(
        method,
        path,
        headers={**given, **_actor(actor), **(headers or {})},
        body=dump_json(body),
        idempotency_key=key,
        **about,
    )


def _actor(actor: str | None) -> dict[str, bytes]:
    return {} if actor is None else {"X-Actor": header_value("actor", actor)}


def _parameters(query: SearchQuery) -> _Query:
    found = [("order", query.order.value), ("limit", str(query.limit))]
    found += [("status", each.value) for each in sorted(query.status or ())]
    found += [("source", each.value) for each in sorted(query.source or ())]
    if query.created_after != EARLIEST_TIME:
        found.append(("created_after", _time(query.created_after)))
    if query.created_before != LATEST_TIME:
        found.append(("created_before", _time(query.created_before)))
    if query.dedup_key is not None:
        found.append(("dedup_key", query.dedup_key))
    if query.text is not None:
        found.append(("text", query.text))
    if query.after is not None:
        found.append(("after", query.cursor(query.after.created_at, query.after.incident_id)))
    if query.details:
        found.append(("details", "true"))
    if query.total:
        found.append(("total", "true"))
    return tuple(found)


def _time(time: datetime) -> str:
    # Not strftime(): on some platforms its %Y has no leading zeros.
    return time.isoformat(sep=" ", timespec="seconds").removesuffix("+00:00")


def _check_number(name: str, number: int) -> None:
    """Raise InvalidIncident if there are more items than a service takes in one request."""
    if number > ITEMS_PER_REQUEST:
        raise _too_many(name, f"must be at most {ITEMS_PER_REQUEST}")


def _check_size(name: str, call: Call) -> None:
    """Raise InvalidIncident if a body has more bytes than a service takes."""
    if len(call.body or b"") > BYTES_PER_REQUEST:
        raise _too_many(name, f"must be at most {BYTES_PER_REQUEST} bytes")


def _too_many(name: str, limit: str) -> InvalidIncident:
    reason = f"{limit} in one request to a service: pass fewer, or a smaller batch"
    return InvalidIncident([FieldError(name, reason)])

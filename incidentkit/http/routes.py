"""The one table of what the service answers.

The routes, the strict reading of parameters and the OpenAPI document are all made from it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from datetime import datetime
from functools import cached_property, lru_cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias
from urllib.parse import parse_qsl, quote, urlencode

from attrs import evolve, field, frozen
from starlette.requests import Request
from starlette.responses import Response

from incidentkit.domain import rules
from incidentkit.domain.commands import NewIncident, NewNote, StatusChange
from incidentkit.domain.queries import ChangesQuery, HistoryQuery, ListQuery, SearchQuery
from incidentkit.domain.values import (
    CHANGES_LIMIT,
    DEFAULT_LIMIT,
    MAX_ID,
    MAX_LIMIT,
    MAX_OFFSET,
    MAX_WAIT,
    NAME_MAX_LENGTH,
    NOTE_MAX_LENGTH,
    TEXT_MAX_LENGTH,
    ChangePage,
    Incident,
    IncidentEvent,
    IncidentOrder,
    IncidentSource,
    IncidentStatus,
    SearchPage,
)
from incidentkit.http import docs, openapi
from incidentkit.http.health import Health, Readiness, State, readiness
from incidentkit.http.problems import RETRY_HEADERS, Conflict, Refusal, etag
from incidentkit.http.requests import KNOWN_QUERIES, READERS, read_version
from incidentkit.http.streams import BATCH, MEDIA_TYPE, ChangeStream
from incidentkit.wire import (
    dump_json,
    encode_event,
    encode_events,
    encode_incident,
    wire_converter,
)

if TYPE_CHECKING:
    from incidentkit.client import IncidentClient

Answer: TypeAlias = Callable[[Request, Mapping[str, Any]], Awaitable[Response]]


@frozen
class Parameter:
    """A parameter of a path or a query.

    Attributes:
        name: The name that it also has as an argument of the client.
        description: What it means.
        type: ``int``, ``bool``, ``datetime``, ``str``, or an enum of strings.
        where: Whether the path, the query or a header holds it.
        header: The name of that header.
        minimum: The smallest value of an integer, or the least characters of a text.
        maximum: The largest value of an integer, or the most characters of a text.
        pattern: What all of a text has to match.
        default: Its value where it is missing; None means none.
        many: Whether it may be given several times; its value is then a list.
        required: Whether it may not be missing.
        may_be_empty: Whether an empty value counts as missing.
    """

    name: str
    description: str
    type: type[Any]
    where: Literal["path", "query", "header"] = "query"
    header: str = ""
    minimum: int | None = None
    maximum: int | None = None
    pattern: str | None = None
    default: Any = None
    many: bool = False
    required: bool = False
    may_be_empty: bool = False

    @cached_property
    def header_name(self) -> bytes:
        """The name of the header as ASGI has it."""
        return self.header.lower().encode()

    def read(self, text: str) -> Any:
        """Return the value as the client's rules take it, or the text for them to refuse."""
        if self.header == "If-Match":
            return read_version(text)
        read = READERS.get(self.type)
        return text if read is None else read(text)


@frozen(eq=False)
class Operation:
    """A method of a path.

    Attributes:
        method: The HTTP method.
        path: The path's template.
        name: The route's name and the operation's id.
        summary: What it does.
        answer: Makes the answer from the request and its arguments.
        status: The status of an answer that is no error.
        returns: The model, or list of models, that this answer holds.
        answers: The same in words.
        headers: What the head of this answer has besides.
        also: Further statuses of such an answer, and what each of them means.
        parameters: What the path and the query may hold.
        check: Takes the parameters and raises :class:`~incidentkit.InvalidIncident` with each one
            that breaks a rule, as ``answer`` would. It is asked if there are other faults to tell
            of. None means that there are no rules.
        streams: The model of each event, if the answer can be a stream of server-sent events.
        body: The model that the body has to hold; None means that there is no body.
        problems: The statuses of its errors.
        members: By status, the model whose fields such a problem has besides its own.
        documented: Whether the OpenAPI document tells of it.
    """

    method: str
    path: str
    name: str
    summary: str
    answer: Answer
    status: int = 200
    returns: Any = None
    answers: str = ""
    headers: tuple[str, ...] = ()
    also: Mapping[int, str] = field(factory=dict)
    parameters: tuple[Parameter, ...] = ()
    check: Callable[..., object] | None = None
    streams: type[Any] | None = None
    body: type[Any] | None = None
    problems: tuple[int, ...] = (400, 422, 500)
    members: Mapping[int, type[Any]] = field(factory=dict)
    documented: bool = True

    @cached_property
    def in_query(self) -> frozenset[str]:
        """The names of the parameters that the query may hold."""
        return frozenset(one.name for one in self.parameters if one.where == "query")

    @cached_property
    def only_queried(self) -> bool:
        """Whether these are all the parameters."""
        return all(parameter.where == "query" for parameter in self.parameters)


def _client(request: Request) -> IncidentClient:
    client: IncidentClient = request.app.state.client
    return client


def _json(content: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(content, status, headers, "application/json")


def _root_path(request: Request) -> str:
    """Return where the app is mounted, as it stands in a URL; empty if it is not."""
    return quote(request.scope.get("root_path", "").rstrip("/"))


def _incident(
    incident: Incident, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return _json(encode_incident(incident), status, {"ETag": etag(incident), **(headers or {})})


async def _create(request: Request, arguments: Mapping[str, Any]) -> Response:
    incident = await _client(request).create(
        arguments["body"], idempotency_key=arguments["idempotency_key"]
    )
    location = f"{_root_path(request)}/incident/get/{incident.incident_id}"
    status = HTTPStatus.CREATED if incident.occurrences == 1 else HTTPStatus.OK
    return _incident(incident, status, {"Location": location})


async def _list(request: Request, arguments: Mapping[str, Any]) -> Response:
    return _json(await _client(request).list_json(_list_query(**arguments)))


async def _get(request: Request, arguments: Mapping[str, Any]) -> Response:
    return _incident(await _client(request).get(**arguments))


async def _update_status(request: Request, arguments: Mapping[str, Any]) -> Response:
    return _incident(await _client(request).update_status(**arguments))


_list_query: Final = lru_cache(KNOWN_QUERIES)(ListQuery)


def _next(request: Request, path: str, cursor: str | None) -> dict[str, str]:
    """Return the header that leads to the next page, by the same query with another cursor."""
    if cursor is None:
        return {}
    query = parse_qsl(request.scope["query_string"].decode("ascii"), keep_blank_values=True)
    pairs = [*((name, value) for name, value in query if name != "after"), ("after", cursor)]
    return {"Link": f'<{_root_path(request)}{path}?{urlencode(pairs)}>; rel="next"'}


async def _search(request: Request, arguments: Mapping[str, Any]) -> Response:
    page = await _client(request).search(**arguments)
    content = dump_json(wire_converter().unstructure(page))
    return _json(content, headers=_next(request, "/incident/search", page.next))


async def _history(request: Request, arguments: Mapping[str, Any]) -> Response:
    events = await _client(request).history(**arguments)
    cursor = events[-1].cursor if len(events) == arguments["limit"] else None
    path = f"/incident/history/{arguments['incident_id']}"
    return _json(encode_events(events), headers=_next(request, path, cursor))


async def _changes(request: Request, arguments: Mapping[str, Any]) -> Response:
    client, readers = _client(request), request.app.state.readers
    _check_changes(**arguments)
    after, limit, wait = (arguments[name] for name in ("after", "limit", "wait"))
    if arguments["last_event_id"] is not None:
        after = arguments["last_event_id"]
    accepted = ",".join(request.headers.getlist("accept"))
    if MEDIA_TYPE in accepted and request.method == "GET":
        with ExitStack() as place:
            place.enter_context(readers.place())
            first = await client.read_changes(after, limit=BATCH)
            return ChangeStream(client, readers, first, place.pop_all())
    page: ChangePage | None = None
    if wait:
        with readers.place():
            changes = client.read_changes(after, limit=limit, wait=wait)
            page = await readers.run(changes, request.receive)
    if page is None:
        page = await client.read_changes(after, limit=limit)
    return _json(
        dump_json(wire_converter().unstructure(page)), headers={"Cache-Control": "no-store"}
    )


async def _note(request: Request, arguments: Mapping[str, Any]) -> Response:
    note: NewNote = arguments["body"]
    return _json(
        encode_event(await _client(request).note(arguments["incident_id"], note.note)), 201
    )


async def _live(_: Request, __: Mapping[str, Any]) -> Response:
    return _json(dump_json(wire_converter().unstructure(Health(State.OK))))


async def _ready(request: Request, _: Mapping[str, Any]) -> Response:
    state = request.app.state
    found = await readiness(state.client, state.request_log, cache_required=state.cache_required)
    members = wire_converter().unstructure(found)
    if not found.ready:
        detail = "The service is not ready"
        raise Refusal(503, detail, headers=RETRY_HEADERS, members=members)
    return _json(dump_json(members))


async def _openapi(request: Request, _: Mapping[str, Any]) -> Response:
    return _json(dump_json(openapi.document(OPERATIONS, _root_path(request))))


async def _docs(_: Request, __: Mapping[str, Any]) -> Response:
    return docs.page()


async def _docs_asset(request: Request, arguments: Mapping[str, Any]) -> Response:
    known = ",".join(request.headers.getlist("if-none-match"))
    return docs.asset(arguments["asset"], known)


def _check_incident_id(incident_id: int) -> None:
    rules.check("incident_id", rules.incident_id, incident_id)


def _check_idempotency_key(idempotency_key: str | None) -> None:
    rules.check("idempotency_key", rules.optional_name, idempotency_key)


def _check_changes(last_event_id: str | None, **arguments: Any) -> None:
    ChangesQuery(**arguments)
    ChangesQuery(last_event_id)


def _check_status_change(idempotency_key: str | None, **arguments: Any) -> None:
    StatusChange(**arguments)
    _check_idempotency_key(idempotency_key)


_INCIDENT_ID: Final = Parameter(
    "incident_id", "The incident's id.", int, minimum=1, maximum=MAX_ID, required=True
)

_IDEMPOTENCY_KEY: Final = Parameter(
    "idempotency_key",
    "What a repeated request gives again: for 24 hours it changes nothing then, and gets the "
    "first answer.",
    str,
    where="header",
    header="Idempotency-Key",
    minimum=1,
    maximum=NAME_MAX_LENGTH,
)

OPERATIONS: Final = (
    Operation(
        "POST",
        "/incident/create",
        "create_incident",
        "Create an incident",
        _create,
        status=201,
        returns=Incident,
        answers="The incident as it is stored",
        headers=("Location", "ETag"),
        also={200: "The incident with this dedup_key that is open, which has occurred again"},
        parameters=(_IDEMPOTENCY_KEY,),
        check=_check_idempotency_key,
        body=NewIncident,
        problems=(400, 413, 415, 422, 500, 503),
    ),
    Operation(
        "GET",
        "/incident/get",
        "list_incidents",
        "List incidents, newest first",
        _list,
        returns=list[Incident],
        answers="One page of incidents; an empty one past the last page",
        parameters=(
            Parameter(
                "page", "1 is the newest page.", int, minimum=1, maximum=MAX_OFFSET, default=1
            ),
            Parameter(
                "limit",
                "Incidents a page.",
                int,
                minimum=1,
                maximum=MAX_LIMIT,
                default=DEFAULT_LIMIT,
            ),
            Parameter(
                "status",
                "Only incidents with this status; missing or empty means any.",
                IncidentStatus,
                may_be_empty=True,
            ),
            Parameter(
                "source",
                "Only incidents from this source; missing or empty means any.",
                IncidentSource,
                may_be_empty=True,
            ),
        ),
        check=ListQuery,
        problems=(400, 422, 500, 503),
    ),
    Operation(
        "GET",
        "/incident/get/{incident_id}",
        "get_incident",
        "Return one incident",
        _get,
        returns=Incident,
        answers="The incident",
        headers=("ETag",),
        parameters=(evolve(_INCIDENT_ID, where="path"),),
        check=_check_incident_id,
        problems=(400, 404, 422, 500, 503),
    ),
    Operation(
        "PATCH",
        "/incident/update-status",
        "update_incident_status",
        "Change the status of an incident",
        _update_status,
        returns=Incident,
        answers="The incident with its new status",
        headers=("ETag",),
        parameters=(
            _INCIDENT_ID,
            Parameter("status", "The status that it gets.", IncidentStatus, required=True),
            Parameter(
                "note", "What the history says of it.", str, minimum=1, maximum=NOTE_MAX_LENGTH
            ),
            Parameter(
                "expected_version",
                "The ETag that the incident has to have; `*` means any.",
                str,
                where="header",
                header="If-Match",
                pattern=r'^(\*|"[1-9]\d{0,18}")$',
            ),
            _IDEMPOTENCY_KEY,
        ),
        check=_check_status_change,
        problems=(400, 404, 409, 412, 422, 500, 503),
        members={409: Conflict, 412: Conflict},
    ),
    Operation(
        "GET",
        "/incident/search",
        "search_incidents",
        "Find incidents",
        _search,
        returns=SearchPage,
        answers="One page of the incidents that match; `Link` leads to the next one, if there is",
        parameters=(
            Parameter(
                "status",
                "Only incidents with one of these statuses; missing means any.",
                IncidentStatus,
                many=True,
            ),
            Parameter(
                "source",
                "Only incidents from one of these sources; missing means any.",
                IncidentSource,
                many=True,
            ),
            Parameter(
                "created_after",
                "Only incidents that were created then or later: `YYYY-MM-DD HH:MM:SS` in UTC, or "
                "ISO 8601 with an offset.",
                datetime,
            ),
            Parameter(
                "created_before",
                "Only incidents that were created earlier, in the same form.",
                datetime,
            ),
            Parameter(
                "text",
                "Words of which the message has each, as a word or as the beginning of one, in any "
                "letter case. Among them is a letter or a digit.",
                str,
                minimum=1,
                maximum=TEXT_MAX_LENGTH,
            ),
            Parameter("order", "By which end to begin.", IncidentOrder, default="newest"),
            Parameter(
                "limit",
                "Incidents a page.",
                int,
                minimum=1,
                maximum=MAX_LIMIT,
                default=DEFAULT_LIMIT,
            ),
            Parameter(
                "after",
                "The `next` of the page before; the order has to be the same.",
                str,
                pattern=r"^[A-Za-z0-9_-]{32}$",
            ),
            Parameter(
                "total",
                "Whether to count the incidents of all pages, which takes time if there are many.",
                bool,
                default=False,
            ),
        ),
        check=SearchQuery,
        problems=(400, 422, 500, 503),
    ),
    Operation(
        "GET",
        "/incident/history/{incident_id}",
        "incident_history",
        "Return what happened to an incident, oldest first",
        _history,
        returns=list[IncidentEvent],
        answers="Its events; an empty list past the last one",
        parameters=(
            evolve(_INCIDENT_ID, where="path"),
            Parameter("limit", "Events.", int, minimum=1, maximum=MAX_LIMIT, default=MAX_LIMIT),
            Parameter(
                "after",
                "The cursor of the event to go on behind.",
                str,
                pattern=r"^[A-Za-z0-9_-]{43}$",
            ),
        ),
        check=HistoryQuery,
        problems=(400, 404, 422, 500, 503),
    ),
    Operation(
        "GET",
        "/incident/changes",
        "changes",
        "Follow every change of every incident",
        _changes,
        returns=ChangePage,
        answers="Changes in the order of their commits; a stream of them if that is accepted",
        streams=IncidentEvent,
        parameters=(
            Parameter(
                "after",
                "The cursor of the change to go on behind; `latest` is the newest one. From the "
                "first change on if it is missing.",
                str,
                pattern=r"^([A-Za-z0-9_-]{43}|latest)$",
            ),
            Parameter(
                "limit",
                "Changes of an answer; a stream has no limit.",
                int,
                minimum=1,
                maximum=MAX_LIMIT,
                default=CHANGES_LIMIT,
            ),
            Parameter(
                "wait",
                "Seconds to wait for a change if there is none yet.",
                int,
                minimum=0,
                maximum=MAX_WAIT,
                default=0,
            ),
            Parameter(
                "last_event_id",
                "The same as `after`, and goes before it: what a browser sends to resume a stream.",
                str,
                where="header",
                header="Last-Event-ID",
                pattern=r"^([A-Za-z0-9_-]{43}|latest)$",
            ),
        ),
        check=_check_changes,
        problems=(400, 410, 422, 500, 503),
    ),
    Operation(
        "POST",
        "/incident/note/{incident_id}",
        "note_incident",
        "Add a note to the history of an incident",
        _note,
        status=201,
        returns=IncidentEvent,
        answers="The event in the history",
        parameters=(evolve(_INCIDENT_ID, where="path"),),
        check=_check_incident_id,
        body=NewNote,
        problems=(400, 404, 413, 415, 422, 500, 503),
    ),
    Operation(
        "GET",
        "/health/live",
        "live",
        "Tell whether the service runs",
        _live,
        returns=Health,
        answers="It does",
    ),
    Operation(
        "GET",
        "/health/ready",
        "ready",
        "Tell whether the service can do its work",
        _ready,
        returns=Readiness,
        answers="It can",
        problems=(400, 422, 500, 503),
        members={503: Readiness},
    ),
    Operation("GET", "/openapi.json", "openapi", "This document", _openapi, documented=False),
)
"""What the service answers, always."""

DOCS: Final = (
    Operation("GET", "/docs", "docs", "Swagger UI", _docs, documented=False),
    Operation(
        "GET",
        "/docs/{asset}",
        "docs_asset",
        "A file of Swagger UI",
        _docs_asset,
        parameters=(Parameter("asset", "Its name.", str, where="path", required=True),),
        documented=False,
    ),
)
"""What it answers besides if it has Swagger UI."""

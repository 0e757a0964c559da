"""Answer each operation: call the client, and make the response."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from http import HTTPStatus
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl, quote, urlencode

from starlette.requests import Request
from starlette.responses import Response

from incidentkit.domain.commands import NewIncident, Resolution, Resolutions
from incidentkit.domain.errors import FieldError, InvalidIncident, VersionConflict
from incidentkit.domain.queries import ListQuery
from incidentkit.domain.replays import Replay, watching_for_replay
from incidentkit.domain.values import ChangePage, Incident, has_version
from incidentkit.http import docs
from incidentkit.http.checks import check_changes, expected
from incidentkit.http.health import BareReadiness, Health, Readiness, State, readiness
from incidentkit.http.openapi import document
from incidentkit.http.operation import MAX_ITEMS
from incidentkit.http.principals import READ, check_again, sees_details, sender_of
from incidentkit.http.problems import RETRY_HEADERS, Refusal, etag
from incidentkit.http.purging import Purge, PurgeQuery, purge_for
from incidentkit.http.requests import KNOWN_QUERIES
from incidentkit.http.server_hooks import server_log
from incidentkit.http.service import Service
from incidentkit.http.streams import (
    run_until_disconnect,
    run_until_stop,
    stream_changes,
    wants_stream,
)
from incidentkit.pacing import in_parts
from incidentkit.wire import (
    NewNote,
    dump_json,
    encode_event,
    encode_events,
    encode_incident,
    encode_incidents,
    encode_object,
    encode_optionals,
    wire_converter,
)
from incidentkit.wire.kinds import Kind

_T = TypeVar("_T")

REVALIDATE: Final[Mapping[str, str]] = {"Cache-Control": "private, no-cache"}
"""Lets a browser store an answer and revalidate it each time."""

_list_query: Final = lru_cache(KNOWN_QUERIES)(ListQuery)


def _service(request: Request) -> Service:
    service: Service = request.scope["app"]
    return service


def _json(content: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(content, status, headers, "application/json")


async def encode_array(items: Sequence[_T], encode: Callable[[Sequence[_T]], bytes]) -> bytes:
    """Encode items as a JSON array, and let other requests run in between."""
    parts = await in_parts(encode, items)
    return parts[0] if len(parts) == 1 else b"[%b]" % b",".join(part[1:-1] for part in parts)


def _root_path(request: Request) -> str:
    """Return the path at which the app is mounted, quoted for a URL; empty if it is not."""
    return quote(request.scope.get("root_path", "").rstrip("/"))


def _incident(
    incident: Incident, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return _json(encode_incident(incident), status, {"ETag": etag(incident), **(headers or {})})


def _replayed(replay: Replay) -> dict[str, str]:
    return {"Idempotent-Replayed": "true"} if replay.happened else {}


def _link(request: Request, path: str, cursor: str | None) -> dict[str, str]:
    """Return the ``Link`` to the next page: the same query with another cursor."""
    if cursor is None:
        return {}
    query = parse_qsl(request.scope["query_string"].decode("ascii"), keep_blank_values=True)
    pairs = [*((name, value) for name, value in query if name != "after"), ("after", cursor)]
    return {"Link": f'<{_root_path(request)}{path}?{urlencode(pairs)}>; rel="next"'}


async def create(request: Request, arguments: Mapping[str, Any]) -> Response:
    """Create an incident, or count another occurrence of an open one."""
    new: NewIncident = arguments["body"]
    with watching_for_replay() as replay:
        incident = await _service(request).client.create(
            new, idempotency_key=arguments["idempotency_key"]
        )
    location = f"{_root_path(request)}/incident/get/{incident.incident_id}"
    status = HTTPStatus.CREATED if incident.occurrences == 1 else HTTPStatus.OK
    visible = _visible(request, new, incident)
    return _incident(visible, status, {"Location": location, **_replayed(replay)})


async def create_many(request: Request, arguments: Mapping[str, Any]) -> Response:
    """Create incidents, all or none, or count further occurrences of open ones."""
    new: list[NewIncident] = arguments["body"]
    with watching_for_replay() as replay:
        incidents = await _service(request).client.create_many(
            new, idempotency_key=arguments["idempotency_key"]
        )
    created = any(incident.occurrences == 1 for incident in incidents)
    status = HTTPStatus.CREATED if created else HTTPStatus.OK
    visible = [_visible(request, *pair) for pair in zip(new, incidents, strict=True)]
    content = await encode_array(visible, encode_incidents)
    return _json(content, status, _replayed(replay))


def _visible(request: Request, new: NewIncident, incident: Incident) -> Incident:
    """Return the incident with the fields that its reporter may see."""
    if incident.occurrences == 1 or sees_details(request.scope):
        return incident
    return _as_reported(new, incident)


def _as_reported(new: NewIncident, incident: Incident) -> Incident:
    """Return the open incident without anything that others reported."""
    return Incident(
        incident.incident_id,
        new.incident_message,
        new.incident_type,
        new.source,
        incident.last_seen_at,
        dedup_key=new.dedup_key,
        last_seen_at=incident.last_seen_at,
        details=new.details,
    )


async def list_(request: Request, arguments: Mapping[str, Any]) -> Response:
    """Answer with one page of the list."""
    query = _list_query(**arguments)
    page = _service(request).client.list_json(query)
    return _json(await (run_until_disconnect(page, request.receive) if query.deep else page))


async def get(request: Request, arguments: Mapping[str, Any]) -> Response:
    """Answer with one incident, or with 304 if the client has it.

    Raises:
        VersionConflict: If the client asks for another version.
    """
    incident = await _service(request).client.get(arguments["incident_id"])
    wanted, known = arguments["if_match"], arguments["if_none_match"]
    if wanted is not None and not has_version(incident, expected(wanted, None)):
        raise VersionConflict(incident)
    if known is not None and not has_version(incident, expected(None, known)):
        return Response(status_code=304, headers={"ETag": etag(incident), **REVALIDATE})
    return _incident(incident, headers=REVALIDATE)


async def update_status(request: Request, arguments: Mapping[str, Any]) -> Response:
    """Change the status of an incident."""
    with watching_for_replay() as replay:
        incident = await _service(request).client.update_status(**_with_expected(arguments))
    return _incident(incident, headers=_replayed(replay))


def _with_expected(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with the expected version in place of the preconditions."""
    others = dict(arguments)
    version = expected(others.pop("if_match"), others.pop("if_none_match"))
    return {**others, "expected_version": version}


async def resolve(request: Request, arguments: Mapping[str, Any]) -> Response:
    """End the open incident of a key; answer 204 if none is open."""
    body: Resolution = arguments["body"]
    with watching_for_replay() as replay:
        incident = await _service(request).client.resolve(
            body.dedup_key,
            status=body.status,
            note=body.note,
            idempotency_key=arguments["idempotency_key"],
        )
    if incident is None:
        return Response(status_code=204, headers=_replayed(replay))
    return _incident(incident, headers=_replayed(replay))


async def resolve_many(request: Request, arguments: Mapping[str, Any]) -> Response:
    """End the open incidents of many keys, all or none.

    Raises:
        InvalidIncident: If there are more keys than one request may have.
    """
    body: Resolutions = arguments["body"]
    if len(body.dedup_keys) > MAX_ITEMS:
        raise InvalidIncident([FieldError("dedup_keys", f"must be at most {MAX_ITEMS}")])
    with watching_for_replay() as replay:
        incidents = await _service(request).client.resolve_many(
            body.dedup_keys,
            status=body.status,
            note=body.note,
            idempotency_key=arguments["idempotency_key"],
        )
    return _json(await encode_array(incidents, encode_optionals), headers=_replayed(replay))


async def search(request: Request, arguments: Mapping[str, Any]) -> Response:
    """Answer with one page of a search, and the link to the next one."""
    service = _service(request)
    details = arguments["details"]
    slow = arguments["text"] is not None or arguments["total"] or details
    with service.searches.place(sender_of(request.scope) if slow else None):
        search = service.client.search(**arguments)
        page = await run_until_disconnect(search, request.receive)
    incidents = await encode_array(page.incidents, encode_incidents)
    content = encode_object("incidents", incidents, {"next": page.next, "total": page.total})
    return _json(content, headers=_link(request, "/incident/search", page.next))


async def history(request: Request, arguments: Mapping[str, Any]) -> Response:
    """Answer with the events of an incident, and the link to the next page of them."""
    history = _service(request).client.history(**arguments)
    events = await run_until_disconnect(history, request.receive)
    cursor = events[-1].cursor if len(events) == arguments["limit"] else None
    path = f"/incident/history/{arguments['incident_id']}"
    content = await encode_array(events, encode_events)
    return _json(content, headers=_link(request, path, cursor))


async def changes(request: Request, arguments: Mapping[str, Any]) -> Response:
    """Answer with changes of all incidents: as a stream, after a wait, or at once."""
    service = _service(request)
    client, readers = service.client, service.readers
    check_changes(**arguments)
    after, limit, wait = (arguments[name] for name in ("after", "limit", "wait"))
    if arguments["last_event_id"] is not None:
        after = arguments["last_event_id"]
    if wants_stream(request):
        return await stream_changes(request, client, readers, after)
    sender = sender_of(request.scope)
    with service.requests.place(sender):
        page: ChangePage | None = None
        if wait:
            with readers.place(sender):
                waiting = client.read_changes(after, limit=limit, wait=wait)
                page = await run_until_stop(waiting, request.scope, request.receive)
            await check_again(request.scope)
        if page is None:
            page = await client.read_changes(after, limit=limit)
        events = await encode_array(page.changes, encode_events)
    content = encode_object("changes", events, {"next": page.next})
    return _json(content, headers={"Cache-Control": "no-store"})


async def note(request: Request, arguments: Mapping[str, Any]) -> Response:
    """Add a note to the history of an incident."""
    options = _with_expected(arguments)
    body: NewNote = options.pop("body")
    with watching_for_replay() as replay:
        event = await _service(request).client.note(note=body.note, **options)
    return _json(encode_event(event), HTTPStatus.CREATED, _replayed(replay))


async def live(_: Request, __: Mapping[str, Any]) -> Response:
    """Answer that the service runs."""
    return _json(_alive())


@cache
def _alive() -> bytes:
    return dump_json(wire_converter().unstructure(Health(State.OK)))


async def ready(request: Request, _: Mapping[str, Any]) -> Response:
    """Answer with the state of each part of the service.

    Raises:
        Refusal: If the service is not ready, with the same states.
    """
    service = _service(request)
    log = server_log(request.scope)
    found: Readiness | BareReadiness = await readiness(
        service.client, service.request_log, log, cache_required=service.cache_required
    )
    if service.gate is not None and not await service.gate.knows(request.scope, READ):
        found = BareReadiness(found.ready)
    members = wire_converter().unstructure(found)
    if not found.ready:
        detail = "The service is not ready"
        raise Refusal(Kind.NOT_READY, detail, headers=RETRY_HEADERS, members=members)
    return _json(dump_json(members))


async def openapi(request: Request, _: Mapping[str, Any]) -> Response:
    """Answer with the OpenAPI document of the app."""
    service = _service(request)
    schemes = None if service.gate is None else service.gate.schemes
    return _json(dump_json(document(service.operations, _root_path(request), schemes)))


async def purge(request: Request, arguments: Mapping[str, Any]) -> Response:
    """Remove incidents that ended long ago, or count them."""
    query = PurgeQuery(**arguments)
    client = _service(request).client
    if query.dry_run:
        done = Purge(0, await client.purgeable(query.ended_before))
    else:
        done = await run_until_disconnect(purge_for(client, query.ended_before), request.receive)
    return _json(dump_json(wire_converter().unstructure(done)))


async def index(request: Request, _: Mapping[str, Any]) -> Response:
    """Redirect to Swagger UI."""
    # A relative URL also works behind a proxy that strips a prefix.
    below = request.scope["path"].endswith("/")
    location = "docs" if below else f"{_root_path(request)}/docs"
    return Response(status_code=307, headers={"Location": location})


async def docs_page(_: Request, __: Mapping[str, Any]) -> Response:
    """Answer with Swagger UI."""
    return docs.page()


async def problems_page(_: Request, __: Mapping[str, Any]) -> Response:
    """Answer with the page that describes every kind of problem."""
    return docs.problems_page()


async def docs_asset(request: Request, arguments: Mapping[str, Any]) -> Response:
    """Answer with a file of Swagger UI."""
    known, accepted = (
        ",".join(request.headers.getlist(name)) for name in ("if-none-match", "accept-encoding")
    )
    return docs.asset(arguments["asset"], known, accepted)

"""The one table of operations: routing, reading and the OpenAPI document are derived from it."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from attrs import evolve

from incidentkit.domain import rules
from incidentkit.domain.commands import NewIncident, Resolution, Resolutions
from incidentkit.domain.queries import HistoryQuery, ListQuery, SearchQuery
from incidentkit.domain.tokens import Scope
from incidentkit.domain.values import (
    CHANGES_LIMIT,
    DEFAULT_LIMIT,
    MAX_ID,
    MAX_LIMIT,
    MAX_OFFSET,
    MAX_WAIT,
    NAME_MAX_LENGTH,
    NOTE_MAX_LENGTH,
    STORABLE,
    TEXT_MAX_LENGTH,
    TEXT_MAX_WORDS,
    ChangePage,
    Incident,
    IncidentEvent,
    IncidentOrder,
    IncidentSource,
    IncidentStatus,
    SearchPage,
)
from incidentkit.http import answers
from incidentkit.http.checks import (
    check_changes,
    check_idempotency_key,
    check_incident,
    check_status_change,
)
from incidentkit.http.health import BareReadiness, Health, Readiness
from incidentkit.http.operation import (
    MAX_ITEMS,
    MAX_LARGE_BODY,
    EntityTags,
    Operation,
    Parameter,
)
from incidentkit.http.principals import READ
from incidentkit.http.problems import PAGE, Conflict
from incidentkit.http.purging import Purge, PurgeQuery
from incidentkit.wire import NewNote

_REPORT: Final = frozenset((Scope.REPORT, Scope.WRITE))
_WRITE: Final = frozenset((Scope.WRITE,))

_INCIDENT_ID: Final = Parameter(
    "incident_id", "The incident's id.", int, minimum=1, maximum=MAX_ID, required=True, example=7
)

_IDEMPOTENCY_KEY: Final = Parameter(
    "idempotency_key",
    "A key of your choice. A request that repeats the key within 24 hours changes nothing and gets "
    "the first answer again.",
    str,
    where="header",
    header="Idempotency-Key",
    minimum=1,
    maximum=NAME_MAX_LENGTH,
)

_IF_MATCH: Final = Parameter(
    "if_match",
    "The ETags, one of which the incident must have; a version in quotes is an ETag too. `*` means "
    "any.",
    EntityTags,
    where="header",
    header="If-Match",
    pattern=f"^({EntityTags.PATTERN})$",
)

_IF_NONE_MATCH: Final = Parameter(
    "if_none_match",
    "The ETags, none of which the incident may have; `*` stands for any.",
    EntityTags,
    where="header",
    header="If-None-Match",
    pattern=f"^({EntityTags.PATTERN})$",
)

OPERATIONS: Final = (
    Operation(
        "POST",
        "/incident/create",
        "create_incident",
        "Create an incident",
        answers.create,
        scope=_REPORT,
        status=201,
        returns=Incident,
        success="The incident as stored",
        headers=("Location", "ETag"),
        also={200: "The open incident with this dedup_key, with one more occurrence"},
        parameters=(_IDEMPOTENCY_KEY,),
        check=check_idempotency_key,
        body=NewIncident,
        problems=(400, 413, 415, 422, 500, 503),
    ),
    Operation(
        "POST",
        "/incident/create-many",
        "create_incidents",
        "Create many incidents, all or none",
        answers.create_many,
        scope=_REPORT,
        status=201,
        returns=list[Incident],
        success="The incidents as stored, in the given order",
        also={200: "Open incidents with these dedup_keys alone, with their further occurrences"},
        parameters=(_IDEMPOTENCY_KEY,),
        check=check_idempotency_key,
        body=NewIncident,
        max_items=MAX_ITEMS,
        max_body=MAX_LARGE_BODY,
        problems=(400, 413, 415, 422, 500, 503),
    ),
    Operation(
        "GET",
        "/incident/get",
        "list_incidents",
        "List incidents, newest first",
        answers.list_,
        scope=READ,
        returns=list[Incident],
        success="One page of incidents; an empty array past the last page",
        parameters=(
            Parameter(
                "page", "1 is the newest page.", int, minimum=1, maximum=MAX_OFFSET, default=1
            ),
            Parameter(
                "limit",
                "Incidents per page.",
                int,
                minimum=1,
                maximum=MAX_LIMIT,
                default=DEFAULT_LIMIT,
            ),
            Parameter(
                "status",
                "Only incidents with this status; any status if missing or empty.",
                IncidentStatus,
                may_be_empty=True,
            ),
            Parameter(
                "source",
                "Only incidents from this source; any source if missing or empty.",
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
        answers.get,
        scope=READ,
        returns=Incident,
        success="The incident",
        headers=("ETag",),
        parameters=(
            evolve(_INCIDENT_ID, where="path"),
            _IF_MATCH,
            evolve(
                _IF_NONE_MATCH,
                description="The ETags of the incident that the client has; if it is still one of "
                "them, the answer is 304.",
            ),
        ),
        unchanged=True,
        check=check_incident,
        problems=(400, 404, 412, 422, 500, 503),
        members={412: Conflict},
    ),
    Operation(
        "PATCH",
        "/incident/update-status",
        "update_incident_status",
        "Change the status of an incident",
        answers.update_status,
        description="`incident_id`, `status` and `note` may stand in the query or in a JSON body: "
        "each of them in one of the two. A URL ends up in the logs of proxies.",
        scope=_WRITE,
        returns=Incident,
        success="The incident with its new status",
        headers=("ETag",),
        parameters=(
            _INCIDENT_ID,
            Parameter(
                "status", "The new status.", IncidentStatus, required=True, example="completed"
            ),
            Parameter(
                "note",
                "A note for the history.",
                str,
                minimum=1,
                maximum=NOTE_MAX_LENGTH,
                pattern=STORABLE,
                example="The old logs were removed",
            ),
            _IF_MATCH,
            _IF_NONE_MATCH,
            _IDEMPOTENCY_KEY,
        ),
        check=check_status_change,
        fields=frozenset({"incident_id", "status", "note"}),
        problems=(400, 404, 409, 412, 413, 415, 422, 500, 503),
        members={409: Conflict, 412: Conflict},
    ),
    Operation(
        "POST",
        "/incident/resolve",
        "resolve_incident",
        "End the open incident of a deduplication key",
        answers.resolve,
        scope=_WRITE,
        returns=Incident,
        success="The incident with its new status",
        headers=("ETag",),
        absent="No incident with this dedup_key is open",
        parameters=(_IDEMPOTENCY_KEY,),
        check=check_idempotency_key,
        body=Resolution,
        problems=(400, 409, 413, 415, 422, 500, 503),
        members={409: Conflict},
    ),
    Operation(
        "POST",
        "/incident/resolve-many",
        "resolve_incidents",
        "End the open incidents of many deduplication keys, all or none",
        answers.resolve_many,
        scope=_WRITE,
        returns=list[Incident | None],
        success="The incidents in the order of the keys; null where none is open, or the key has "
        "stood before",
        parameters=(_IDEMPOTENCY_KEY,),
        check=check_idempotency_key,
        body=Resolutions,
        max_body=MAX_LARGE_BODY,
        problems=(400, 409, 413, 415, 422, 500, 503),
        members={409: Conflict},
    ),
    Operation(
        "GET",
        "/incident/search",
        "search_incidents",
        "Find incidents",
        answers.search,
        scope=READ,
        returns=SearchPage,
        success="One page of the matching incidents; `Link` leads to the next page, if any",
        parameters=(
            Parameter(
                "status",
                "Only incidents with one of these statuses; any status if missing.",
                IncidentStatus,
                many=True,
            ),
            Parameter(
                "source",
                "Only incidents from one of these sources; any source if missing.",
                IncidentSource,
                many=True,
            ),
            Parameter(
                "created_after",
                "Only incidents created at this time or later: `YYYY-MM-DD HH:MM:SS` in UTC, or a "
                "time of RFC 3339.",
                datetime,
                pattern=f"^{rules.TIME_PATTERN}$",
            ),
            Parameter(
                "created_before",
                "Only incidents created before this time, in the same format.",
                datetime,
                pattern=f"^{rules.TIME_PATTERN}$",
            ),
            Parameter(
                "dedup_key",
                "Only incidents with this deduplication key, open or ended.",
                str,
                minimum=1,
                maximum=NAME_MAX_LENGTH,
                pattern=STORABLE,
            ),
            Parameter(
                "text",
                "Words that the message must contain, in any letter case. Words that are joined "
                "by punctuation or enclosed in quotation marks must follow each other directly. "
                "The last word, unless it is part of such a phrase, also matches the beginning of "
                "a word. At least one letter or digit, and at most "
                f"{TEXT_MAX_WORDS} different words and phrases.",
                str,
                minimum=1,
                maximum=TEXT_MAX_LENGTH,
                pattern=STORABLE,
            ),
            Parameter("order", "Which incidents come first.", IncidentOrder, default="newest"),
            Parameter(
                "limit",
                "Incidents per page.",
                int,
                minimum=1,
                maximum=MAX_LIMIT,
                default=DEFAULT_LIMIT,
            ),
            Parameter(
                "after",
                "The `next` of the previous page, in the same order.",
                str,
                pattern=r"^[A-Za-z0-9_-]{32}$",
            ),
            Parameter(
                "total",
                "Whether to count the matches on all pages, which takes time if there are many.",
                bool,
                default=False,
            ),
            Parameter(
                "details",
                "Whether each incident has its `details`.",
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
        "Return the history of an incident, oldest event first",
        answers.history,
        scope=READ,
        returns=list[IncidentEvent],
        success="Its events; an empty array past the last one",
        parameters=(
            evolve(_INCIDENT_ID, where="path"),
            Parameter(
                "limit",
                "Maximum number of events.",
                int,
                minimum=1,
                maximum=MAX_LIMIT,
                default=MAX_LIMIT,
            ),
            Parameter(
                "after",
                "The cursor of the event to continue after.",
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
        answers.changes,
        scope=READ,
        returns=ChangePage,
        success="Changes in commit order; a stream of them if the request accepts one",
        streams=IncidentEvent,
        parameters=(
            Parameter(
                "after",
                "The cursor of the change to continue after; `latest` is the newest change. From "
                "the first change if missing.",
                str,
                pattern=r"^([A-Za-z0-9_-]{43}|latest)$",
            ),
            Parameter(
                "limit",
                "Maximum number of changes in the answer; a stream has no limit.",
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
                "The same as `after`, and takes precedence: a browser sends it to resume a stream.",
                str,
                where="header",
                header="Last-Event-ID",
                may_be_empty=True,
                pattern=r"^([A-Za-z0-9_-]{43}|latest)?$",
            ),
        ),
        check=check_changes,
        problems=(400, 410, 422, 429, 500, 503),
    ),
    Operation(
        "POST",
        "/incident/note/{incident_id}",
        "note_incident",
        "Add a note to the history of an incident",
        answers.note,
        scope=_WRITE,
        status=201,
        returns=IncidentEvent,
        success="The event in the history",
        parameters=(
            evolve(_INCIDENT_ID, where="path"),
            _IF_MATCH,
            _IF_NONE_MATCH,
            _IDEMPOTENCY_KEY,
        ),
        check=check_incident,
        body=NewNote,
        problems=(400, 404, 412, 413, 415, 422, 500, 503),
        members={412: Conflict},
    ),
    Operation(
        "GET",
        "/health/live",
        "live",
        "Tell whether the service is running",
        answers.live,
        scope=None,
        returns=Health,
        success="The service is running",
    ),
    Operation(
        "GET",
        "/health/ready",
        "ready",
        "Tell whether the service is ready for requests",
        answers.ready,
        scope=None,
        returns=Readiness,
        success="The service is ready",
        problems=(400, 422, 500, 503),
        members={503: Readiness},
        bare=BareReadiness,
    ),
    Operation(
        "GET",
        "/openapi.json",
        "openapi",
        "This document",
        answers.openapi,
        documented=False,
        scope=None,
    ),
)
"""The operations of every app."""

ADMINISTRATION: Final = (
    Operation(
        "POST",
        "/incident/purge",
        "purge_incidents",
        "Remove incidents that ended long ago, with their histories",
        answers.purge,
        description="A request ends after about 20 seconds. Repeat it while `left` is not 0 and it "
        "still removes incidents. One that another transaction is changing is left out.",
        scope=frozenset((Scope.ADMIN,)),
        returns=Purge,
        success="How many incidents were removed, and how many are left",
        parameters=(
            Parameter(
                "ended_before",
                "Incidents that ended before this time are removed.",
                datetime,
                required=True,
                pattern=f"^{rules.TIME_PATTERN}$",
                example="2026-09-01 00:00:00",
            ),
            Parameter(
                "dry_run",
                "Whether to remove nothing, and only count them as `left`.",
                bool,
                default=False,
            ),
        ),
        check=PurgeQuery,
        problems=(400, 422, 500, 503),
    ),
)
"""The operations of an app that checks who sends a request."""

DOCS: Final = (
    Operation(
        "GET", "/", "index", "Leads to Swagger UI", answers.index, documented=False, scope=None
    ),
    Operation(
        "GET", "/docs", "docs", "Swagger UI", answers.docs_page, documented=False, scope=None
    ),
    Operation(
        "GET",
        PAGE,
        "problems",
        "The kinds of problems",
        answers.problems_page,
        documented=False,
        scope=None,
    ),
    Operation(
        "GET",
        "/docs/{asset}",
        "docs_asset",
        "A file of Swagger UI",
        answers.docs_asset,
        scope=None,
        parameters=(Parameter("asset", "The name of the file.", str, where="path", required=True),),
        documented=False,
    ),
)
"""The operations of an app with Swagger UI."""

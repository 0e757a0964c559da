"""Log each answered request, and pass its record to the request log if the app has one."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from datetime import UTC, datetime
from http import HTTPMethod
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from incidentkit.http.client_address import client_address
from incidentkit.http.principals import ACTOR
from incidentkit.http.request_id import request_id
from incidentkit.http.request_log import RequestLog
from incidentkit.store.request_log import RequestRecord

logger = logging.getLogger("incidentkit.http")

NO_ROUTE: Final = "(none)"
"""Stands for the path's template in the record of a request that no route took."""

OTHER_METHOD: Final = "(other)"
"""Stands for a method that HTTP does not define."""

_METHODS: Final = frozenset(HTTPMethod)


def observe_answer(app: object, method: str, route: str, status: int, seconds: float) -> None:
    """Report an answer to the observer of an app's client, if it has one.

    Args:
        app: The app, also one that has no client.
        method: The method of the request.
        route: The path's template.
        status: The status of the answer.
        seconds: The time until the answer was ready.
    """
    observer = getattr(getattr(app, "client", None), "observer", None)
    if observer is not None:
        # A failing observer must not turn a stored incident into an error.
        with suppress(Exception):
            observer.request(method, route, status, seconds)


def log_answer(request: Request, route: str, response: Response, started: float) -> None:
    """Log an answered request at level INFO, and report it to the client's observer.

    The record has the attributes ``method``, ``route``, ``status``, ``duration_ms``,
    ``request_id``, ``actor`` and ``client_address``; the last two are None if they are unknown.

    Args:
        request: What was asked.
        route: The path's template.
        response: What is answered.
        started: When the request arrived, by ``time.perf_counter()``.
    """
    scope = request.scope
    method = scope["method"] if scope["method"] in _METHODS else OTHER_METHOD
    status = response.status_code
    duration_ms = round((time.perf_counter() - started) * 1000, 3)
    observe_answer(scope["app"], method, route, status, duration_ms / 1000)
    answered: dict[str, Any] = {
        "method": method,
        "route": route,
        "status": status,
        "duration_ms": duration_ms,
        "request_id": request_id(scope),
        "actor": scope.get(ACTOR),
        "client_address": client_address(scope),
    }
    if logger.isEnabledFor(logging.INFO):
        # A failing log handler must not turn a stored incident into an error.
        with suppress(Exception):
            _log(answered)
    request_log: RequestLog | None = scope["app"].request_log
    if request_log is not None:
        request_log.add(RequestRecord(datetime.now(UTC), **answered))


def _log(answered: dict[str, Any]) -> None:
    # Like logger.info(), without its search for the calling line.
    record = logging.getLogRecordFactory()(
        logger.name,
        logging.INFO,
        __file__,
        0,
        "%s %s %d %.1f ms",
        (answered["method"], answered["route"], answered["status"], answered["duration_ms"]),
        None,
        "log_answer",
    )
    vars(record).update(answered)
    logger.handle(record)

"""The service: a Starlette app with a client, and the layers of its middleware."""

from __future__ import annotations

import time
from collections.abc import Sequence
from http import HTTPStatus

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Lifespan

from incidentkit.client import IncidentClient
from incidentkit.http.bounds import Bounds, Places
from incidentkit.http.client_address import TrustedProxies
from incidentkit.http.dispatch import Dispatcher, Endpoint
from incidentkit.http.envelope import Envelope
from incidentkit.http.log import NO_ROUTE, log_answer
from incidentkit.http.operation import Operation
from incidentkit.http.principals import Gate
from incidentkit.http.problems import problem_response
from incidentkit.http.request_log import RequestLog
from incidentkit.http.streams import Readers


class Service(Starlette):
    """A Starlette app that answers operations.

    Attributes:
        client: Does what requests ask for.
        operations: The operations that it answers.
        request_log: Writes records of requests to the database; None: requests are only logged.
        cache_required: Whether the service is not ready while the cache is unavailable.
        gate: Checks the sender of each request; None: the host does.
        proxies: The proxies whose word for a client's address counts.
        requests: The requests of each sender that are being answered.
        searches: The searches of each sender that take time.
        readers: The readers that wait for changes.
        encoder: Encodes large arrays.
    """

    def __init__(  # noqa: PLR0913
        self,
        client: IncidentClient,
        operations: Sequence[Operation],
        *,
        request_log: RequestLog | None,
        cache_required: bool,
        gate: Gate | None,
        bounds: Bounds,
        proxies: TrustedProxies,
        lifespan: Lifespan[Starlette],
    ) -> None:
        self.client = client
        self.operations = operations
        self.request_log = request_log
        self.cache_required = cache_required
        self.gate = gate
        self.proxies = proxies
        self.requests = Places(bounds.requests, "requests")
        self.searches = Places(bounds.searches, "searches")
        self.readers = Readers(client, bounds.readers)
        self._endpoints = [Endpoint(operation, gate, self.requests) for operation in operations]
        super().__init__(
            routes=[endpoint.route for endpoint in self._endpoints],
            exception_handlers={HTTPException: _answer_unrouted},
            lifespan=lifespan,
        )
        self.router.redirect_slashes = False

    def build_middleware_stack(self) -> ASGIApp:
        """Return the layers of the app, with the operations inside all middleware of a host.

        Starlette's own stack would put the operations behind its router, which tries one route
        after another, and behind two layers that handle errors. An operation answers its errors
        itself; the outer one of these layers is there only if a host has a handler for it.
        """
        handlers = dict(self.exception_handlers)
        handler = handlers.pop(Exception, None)
        handler = handlers.pop(HTTPStatus.INTERNAL_SERVER_ERROR, handler)
        app: ASGIApp = ExceptionMiddleware(self.router, handlers, self.debug)
        app = Dispatcher(app, self._endpoints)
        for middleware, arguments, options in reversed(self.user_middleware):
            app = middleware(app, *arguments, **options)
        if handler is not None or self.debug:
            app = ServerErrorMiddleware(app, handler, self.debug)
        return Envelope(app, self.proxies)


async def _answer_unrouted(request: Request, error: Exception) -> Response:
    """Answer a request that no route takes; the errors of operations never get here."""
    started = time.perf_counter()
    response = problem_response(request, error)
    log_answer(request, NO_ROUTE, response, started)
    return response

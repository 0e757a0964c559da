"""The Starlette app around a client."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from incidentkit.domain.errors import InvalidSettings
from incidentkit.http.dispatch import Service
from incidentkit.http.docs import assets_folder
from incidentkit.http.log import NO_ROUTE, RequestLog, log_route
from incidentkit.http.problems import problem_response
from incidentkit.http.request_id import HEADER, RequestIdMiddleware, request_id
from incidentkit.http.routes import DOCS, OPERATIONS
from incidentkit.http.streams import Readers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from incidentkit.client import IncidentClient
    from incidentkit.settings import RequestLog as RequestLogSetting


def create_app(
    client: IncidentClient,
    *,
    request_log: RequestLogSetting = "log",
    cache_required: bool = False,
    docs: bool = True,
) -> Starlette:
    """Return the REST service on a client, to run alone or to mount in another app.

    Alone, it connects the client when it starts, and closes it when it stops. A client that is
    connected already is left open.

    Mounted, it needs a client that is connected, since a host does not pass its own start and
    stop on; :func:`lifespan` sees to both. In FastAPI, or Starlette, under any prefix::

        incidents = create_app(IncidentClient.from_env())
        host = FastAPI(lifespan=lambda _: lifespan(incidents))
        host.mount("/incidents", incidents)

    Args:
        client: What the service exposes; used from the event loop that runs the app.
        request_log: Where each request is recorded: ``log`` is the logger ``incidentkit.http``,
            ``database`` is that and the table ``request_log``.
        cache_required: Whether ``/health/ready`` says no while the cache is away.
        docs: Whether there is Swagger UI at ``/docs``.

    Raises:
        InvalidSettings: If ``request_log`` is something else.
        MissingDependency: If Swagger UI is wanted and not installed.
    """
    if request_log not in ("log", "database"):
        raise InvalidSettings("request_log", "must be one of: log, database")
    if docs:
        assets_folder()
    app = Service(
        (*OPERATIONS, *(DOCS if docs else ())),
        middleware=[Middleware(RequestIdMiddleware)],
        exception_handlers={HTTPException: _answer_unrouted, Exception: _answer_problem},
        lifespan=lifespan,
    )
    app.state.client = client
    app.state.readers = Readers()
    app.state.request_log = RequestLog(client.store) if request_log == "database" else None
    app.state.cache_required = cache_required
    return app


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Run an app of :func:`create_app`: connect its client, and at the end write the request log.

    A client that was connected already stays so; one that was not is closed at the end. A host
    that mounts the app runs this in its own lifespan.

    Raises:
        StoreUnavailable: If the database cannot be reached.
        SchemaOutOfDate: With the command that mends it.
        CacheUnavailable: If the cache does not answer, and is required.
    """
    client: IncidentClient = app.state.client
    request_log: RequestLog | None = app.state.request_log
    connects = not client.connected
    if connects:
        await client.connect()
    try:
        yield
    finally:
        if request_log is not None:
            await request_log.close()
        if connects:
            await client.close()


async def _answer_unrouted(request: Request, error: Exception) -> Response:
    """Answer for the router, which found no route; errors of a route never get here."""

    @log_route(NO_ROUTE)
    async def endpoint(_: Request) -> Response:
        raise error

    return await endpoint(request)


async def _answer_problem(request: Request, error: Exception) -> Response:
    response = problem_response(request, error)
    response.headers[HEADER] = request_id(request.scope)
    return response

"""Use incidents in a FastAPI application: open the client, inject it, and mount the service."""

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Annotated, Any, Final, TypeAlias

from fastapi import Depends, FastAPI, Request, Response
from starlette.applications import Starlette
from starlette.requests import HTTPConnection

from incidentkit.client import IncidentClient
from incidentkit.domain.errors import IncidentKitError, InvalidSettings
from incidentkit.http.app import create_app, lifespan
from incidentkit.http.problems import problem_response
from incidentkit.http.service import Service
from incidentkit.joined import JoinedIncidents

_CLIENT: Final = "incidentkit_client"
"""The attribute of ``app.state`` that holds the client."""


def install(
    app: FastAPI, incidents: IncidentClient | Starlette, *, path: str | None = None
) -> None:
    """Open a client when a FastAPI application starts, and close it when the application stops.

    The client opens before the application's own lifespan begins, and closes after it has ended.
    Routes get it from a parameter of the type :data:`Client`::

        app = FastAPI()
        install(app, IncidentClient.from_env(), path="/incidents")


        @app.get("/orders/{order}/incidents")
        async def found(order: int, incidents: Client) -> list[Incident]:
            return (await incidents.search(text=f"order-{order}")).incidents

    Args:
        app: The application.
        incidents: The client; or a service from :func:`~incidentkit.http.create_app`, to mount it
            with arguments of its own. A client that is already open is left open.
        path: The path to mount the REST service at, such as ``/incidents``. Errors of incidentkit
            in the application's own routes then get the same answers as in the service, unless the
            application has a handler for ``IncidentKitError``. FastAPI's dependencies do not
            protect a mounted service. None: do not mount it.

    Raises:
        InvalidSettings: If the application already has a client.
        TypeError: If ``incidents`` is something else.
    """
    service = create_app(incidents) if isinstance(incidents, IncidentClient) else incidents
    if not isinstance(service, Service):
        raise TypeError("install() needs an IncidentClient, or an app of create_app()")
    if hasattr(app.state, _CLIENT):
        raise InvalidSettings("app", "has an incident client already: call install() once")
    setattr(app.state, _CLIENT, service.client)
    app.router.lifespan_context = _around(service, app.router.lifespan_context)
    if path is not None:
        app.mount(path, service)
        app.exception_handlers.setdefault(IncidentKitError, _answering(path.rstrip("/")))


def _around(service: Service, own: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return an application's own lifespan, wrapped in the lifespan of the service."""

    @asynccontextmanager
    async def both(app: FastAPI) -> AsyncIterator[Any]:
        async with lifespan(service), own(app) as state:
            yield state

    return both


def _answering(path: str) -> Callable[[Request, Exception], Coroutine[Any, Any, Response]]:
    """Return the handler of errors in the routes beside a service that is mounted at a path."""

    async def answer(request: Request, error: Exception) -> Response:
        # The problem links to a page of the service.
        root_path = f"{request.scope.get('root_path', '')}{path}"
        return problem_response(Request({**request.scope, "root_path": root_path}), error)

    return answer


async def incident_client(connection: HTTPConnection) -> IncidentClient:
    """Return the client of the application that answers a request.

    This is the dependency of :data:`Client`. Replace it in a test with
    ``app.dependency_overrides``.

    Raises:
        InvalidSettings: If :func:`install` was not called for the application.
    """
    client = getattr(connection.app.state, _CLIENT, None)
    if not isinstance(client, IncidentClient):
        raise InvalidSettings("app", "has no incident client: call install(app, client)")
    return client


Client: TypeAlias = Annotated[IncidentClient, Depends(incident_client)]
"""The open client, as the type of a route's parameter."""


def joined(session: Callable[..., Any]) -> Callable[..., Coroutine[Any, Any, JoinedIncidents]]:
    """Return a dependency that provides the verbs in the transaction of the route's session.

    The route and the verbs share the session. Their writes are stored when it is committed::

        Session = Annotated[AsyncSession, Depends(get_session)]
        Joined = Annotated[JoinedIncidents, Depends(joined(get_session))]


        @app.post("/orders")
        async def place(session: Session, incidents: Joined) -> Incident:
            session.add(Order(item="piano"))
            incident = await incidents.create("Pack it by hand", source="operator")
            await session.commit()
            return incident

    Args:
        session: The dependency that provides the session or connection, of any kind that
            :meth:`~incidentkit.IncidentClient.join` takes.
    """

    async def dependency(
        client: Client, connection: Annotated[Any, Depends(session)]
    ) -> JoinedIncidents:
        return client.join(connection)

    return dependency

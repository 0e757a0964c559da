"""FastAPI applications use incidents: the client's life, the dependencies, and the service."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx2
import pytest
from fastapi import Body, Depends, FastAPI, Request
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from incidentkit import (
    Incident,
    IncidentClient,
    IncidentNotFound,
    InvalidSettings,
    JoinedIncidents,
    NewIncident,
    SearchPage,
)
from incidentkit.http import create_app
from incidentkit.http.openapi import document
from incidentkit.http.routes import OPERATIONS
from incidentkit.integrations.fastapi import Client, incident_client, install, joined
from tests.test_plain import without_titles

MEMORY = "sqlite+aiosqlite:///:memory:"


@asynccontextmanager
async def running(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    """Run the lifespan of an application, and yield a client that calls it."""
    transport = httpx2.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://shop") as api,
    ):
        yield api


def with_routes(app: FastAPI) -> FastAPI:
    """Add routes that create, return and search incidents."""

    @app.post("/reports")
    async def report(new: Annotated[NewIncident, Body()], incidents: Client) -> Incident:
        return await incidents.create(new)

    @app.get("/reports/{incident_id}")
    async def get(incident_id: int, incidents: Client) -> Incident:
        return await incidents.get(incident_id)

    @app.get("/reports")
    async def search(incidents: Client) -> SearchPage:
        return await incidents.search(total=True, details=True)

    return app


async def test_a_route_answers_as_the_service_does() -> None:
    """A route checks its body by the rules, and its answer has the same bytes as the service's."""
    app = with_routes(FastAPI())
    install(app, IncidentClient.open(MEMORY), path="/incidents")
    async with running(app) as api:
        body = {"incident_message": "Füße are cold", "source": "partner", "dedup_key": "k"}
        created = await api.post("/reports", json=body)
        assert created.status_code == 200, created.text
        service = await api.get("/incidents/incident/get/1")
        assert created.content == (await api.get("/reports/1")).content == service.content
        found = await api.get("/reports")
        assert (
            found.content
            == (await api.get("/incidents/incident/search?total=true&details=true")).content
        )
        refused = await api.post("/reports", json={"incident_message": "x", "source": "partner"})
        assert refused.status_code == 422
        (fault,) = refused.json()["detail"]
        assert fault["loc"] == ["body", "incident_message"]
        assert "5 to 1000 characters" in fault["msg"]


def as_fastapi_writes(schema: Any) -> Any:
    """Return a JSON Schema with each bound as a fraction, and without a default of null."""

    def without_null(members: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in members.items() if value is not None}

    return json.loads(json.dumps(schema), parse_int=float, object_hook=without_null)


async def test_the_document_of_the_app_describes_incidents() -> None:
    """FastAPI's OpenAPI document has the same models as the service's."""
    app = with_routes(FastAPI())
    schemas = app.openapi()["components"]["schemas"]
    expected = document(OPERATIONS)["components"]["schemas"]
    for name in ("Incident", "IncidentStatus", "IncidentSource", "NewIncident", "SearchPage"):
        own, described = without_titles(schemas[name]), {**expected[name]}
        assert own.pop("description")
        assert described.pop("description")
        assert as_fastapi_writes(own) == as_fastapi_writes(described)


async def test_the_client_lives_around_the_lifespan_of_the_app() -> None:
    """The app's own lifespan can use the open client, which is closed afterwards."""
    client = IncidentClient.open(MEMORY)
    seen: list[Any] = []

    @asynccontextmanager
    async def own(_: FastAPI) -> AsyncIterator[dict[str, int]]:
        await client.create("Shop opened", source="operator")
        yield {"rooms": 3}
        seen.append(len(await client.list()))

    app = FastAPI(lifespan=own)
    install(app, client)
    async with app.router.lifespan_context(app) as state:
        assert state == {"rooms": 3}
        seen.append(client.connected)
    seen.append(client.connected)
    async with client:
        async with app.router.lifespan_context(app):
            pass
        seen.append(client.connected)
    assert seen == [True, 1, False, 1, True]


async def test_errors_in_routes_are_problems_of_the_service() -> None:
    """A route that raises an error of incidentkit answers like the mounted service."""
    app = with_routes(FastAPI())
    install(app, IncidentClient.open(MEMORY), path="/incidents")
    async with running(app) as api:
        own, service = await api.get("/reports/7"), await api.get("/incidents/incident/get/7")
        assert own.status_code == service.status_code == 404
        assert own.headers["content-type"] == service.headers["content-type"]
        problem = own.json()
        assert {**problem, "request_id": ""} == {**service.json(), "request_id": ""}
        assert (await api.get(problem["type"])).status_code == 200


async def test_an_app_keeps_its_own_handler_of_errors() -> None:
    """`install` replaces no handler, and without a path it adds none."""
    app = with_routes(FastAPI())

    @app.exception_handler(IncidentNotFound)
    async def gone(*_: object) -> httpx2.Response:
        raise NotImplementedError

    handler = app.exception_handlers[IncidentNotFound]
    install(app, IncidentClient.open(MEMORY))
    assert app.exception_handlers[IncidentNotFound] is handler
    assert set(app.exception_handlers) - {IncidentNotFound} == set(FastAPI().exception_handlers)
    assert [route for route in app.routes if getattr(route, "path", "").startswith("/inc")] == []


async def get_session(request: Request) -> AsyncIterator[AsyncSession]:
    """Give a route a session on the engine of its application."""
    async with AsyncSession(request.app.state.engine) as session:
        yield session


Session = Annotated[AsyncSession, Depends(get_session)]
Joined = Annotated[JoinedIncidents, Depends(joined(get_session))]


async def test_joined_verbs_share_the_session_of_the_route(sqlite_url: str) -> None:
    """A route's rows and its incident are committed or rolled back together."""
    app = with_routes(FastAPI())
    app.state.engine = engine = create_async_engine(sqlite_url)
    install(app, IncidentClient.open(engine))

    @app.post("/orders")
    async def place(session: Session, incidents: Joined, *, paid: bool) -> int | None:
        await incidents.create("Pack it by hand", source="operator")
        seen: int | None = await session.scalar(text('SELECT count(*) FROM "Incident"'))
        if paid:
            await session.commit()
        return seen

    async with running(app) as api:
        assert (await api.post("/orders?paid=false")).json() == 1
        assert (await api.get("/reports")).json()["total"] == 0
        assert (await api.post("/orders?paid=true")).json() == 1
        assert (await api.get("/reports")).json()["total"] == 1
    await engine.dispose()


async def test_a_test_can_replace_the_client() -> None:
    """`dependency_overrides` gives the routes another client."""
    app = with_routes(FastAPI())
    install(app, IncidentClient.open(MEMORY))
    async with IncidentClient.open(MEMORY) as other, running(app) as api:
        await other.create("Disk is full", source="partner")
        app.dependency_overrides[incident_client] = lambda: other
        assert (await api.get("/reports")).json()["total"] == 1


async def test_a_wrong_installation_is_refused() -> None:
    """A second client, another kind of object, and a route without a client raise clear errors."""
    app = with_routes(FastAPI())
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://shop") as api:
        with pytest.raises(InvalidSettings, match=r"call install\(app, client\)"):
            await api.get("/reports")
    other: Any = FastAPI()
    with pytest.raises(TypeError, match="IncidentClient, or an app of create_app"):
        install(app, other)
    install(app, create_app(IncidentClient.open(MEMORY), docs=False), path="/incidents")
    with pytest.raises(InvalidSettings, match="already"):
        install(app, IncidentClient.open(MEMORY))

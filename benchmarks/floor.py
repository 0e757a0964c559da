"""The rival `floor`: the limit of driver and server with one statement per request.

A bare Starlette route, asyncpg and handwritten SQL: no validation, no history, no token, no cache,
no log. Its pool skips the query that resets a connection, which halves the round trips.
"""

from __future__ import annotations

import json
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import asyncpg
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

COLUMNS = "incident_id, incident_message, incident_type::text, source::text, created_at"

FIXED = json.dumps(
    [
        {
            "incident_id": number,
            "incident_message": f"Disk {number} is full",
            "incident_type": "new",
            "source": "monitoring",
            "created_at": "2026-01-01 00:00:00",
            "version": 1,
            "dedup_key": None,
            "occurrences": 1,
            "last_seen_at": "2026-01-01 00:00:00",
            "ended_at": None,
        }
        for number in range(100_000, 100_010)
    ],
    separators=(",", ":"),
).encode()
"""A response of the same size as a page of incidentkit."""


async def _keep_state(_: Any) -> None:
    """Skip the reset: the statements leave no state behind."""


def _wire(row: Any) -> dict[str, Any]:
    return {**row, "created_at": str(row["created_at"])[:19]}


def _json(value: Any, status: int = 200) -> Response:
    return Response(json.dumps(value), status, media_type="application/json")


async def fixed(_: Request) -> Response:
    """Return the same bytes to every request."""
    return Response(FIXED, media_type="application/json")


async def list_incidents(request: Request) -> Response:
    """Return one page, newest first."""
    query = request.query_params
    limit = int(query.get("limit", 10))
    values: list[Any] = [limit, (int(query.get("page", 1)) - 1) * limit]
    rules = []
    for name, column in (("status", "incident_type"), ("source", "source")):
        if query.get(name):
            values.append(query[name])
            rules.append(f"{column} = ${len(values)}::text::incident{name}")
    where = f"WHERE {' AND '.join(rules)} " if rules else ""
    rows = await request.app.state.pool.fetch(
        f'SELECT {COLUMNS} FROM "Incident" {where}'
        "ORDER BY created_at DESC, incident_id DESC LIMIT $1 OFFSET $2",
        *values,
    )
    return _json([_wire(row) for row in rows])


async def get(request: Request) -> Response:
    """Return one incident."""
    row = await request.app.state.pool.fetchrow(
        f'SELECT {COLUMNS} FROM "Incident" WHERE incident_id = $1',
        int(request.path_params["incident_id"]),
    )
    return _json(_wire(row))


async def create(request: Request) -> Response:
    """Create an incident."""
    body = json.loads(await request.body())
    row = await request.app.state.pool.fetchrow(
        'INSERT INTO "Incident" (incident_message, incident_type, source) '
        f"VALUES ($1, 'new', $2::text::incidentsource) RETURNING {COLUMNS}",
        body["incident_message"],
        body["source"],
    )
    return _json(_wire(row), 201)


async def update_status(request: Request) -> Response:
    """Change the status."""
    query = request.query_params
    row = await request.app.state.pool.fetchrow(
        'UPDATE "Incident" SET incident_type = $2::text::incidentstatus '
        f"WHERE incident_id = $1 RETURNING {COLUMNS}",
        int(query["incident_id"]),
        query["status"],
    )
    return _json(_wire(row))


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Open the pool."""
    database = os.environ["FLOOR_DATABASE"]
    async with asyncpg.create_pool(database, min_size=1, max_size=20, reset=_keep_state) as pool:
        app.state.pool = pool
        yield


app = Starlette(
    routes=[
        Route("/fixed", fixed),
        Route("/incident/get", list_incidents),
        Route("/incident/get/{incident_id}", get),
        Route("/incident/create", create, methods=["POST"]),
        Route("/incident/update-status", update_status, methods=["PATCH"]),
    ],
    lifespan=lifespan,
)

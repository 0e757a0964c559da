"""The rival `plain`: the origin's service, written today with common packages.

FastAPI, Pydantic, SQLAlchemy's ORM and redis-py, each used as its documentation shows. It keeps
the origin's contract and nothing beyond it: no history, no token, no shared rules. Its table has
incidentkit's indexes on the same columns; :mod:`benchmarks.databases` creates them.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query
from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator
from redis.asyncio import Redis
from sqlalchemy import BigInteger, DateTime, Enum, Integer, func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

CACHE_SECONDS = 3600

logger = logging.getLogger("plain")
logging.basicConfig(level=logging.INFO)


class Status(StrEnum):
    """The status of an incident."""

    NEW = "new"
    COMPLETED = "completed"
    FAILED = "failed"


class Source(StrEnum):
    """The source of an incident."""

    OPERATOR = "operator"
    MONITORING = "monitoring"
    PARTNER = "partner"


class Base(DeclarativeBase):
    """The mapped classes."""


def _values(enum: type[StrEnum]) -> list[str]:
    return [member.value for member in enum]


class IncidentRow(Base):
    """The table."""

    __tablename__ = "Incident"

    incident_id: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer(), "sqlite"), primary_key=True
    )
    incident_message: Mapped[str]
    incident_type: Mapped[Status] = mapped_column(
        Enum(Status, name="incidentstatus", values_callable=_values)
    )
    source: Mapped[Source] = mapped_column(
        Enum(Source, name="incidentsource", values_callable=_values)
    )
    created_at: Mapped[datetime] = mapped_column(
        DateTime(timezone=True), server_default=func.current_timestamp()
    )


class NewIncident(BaseModel):
    """The body of a create."""

    model_config = ConfigDict(str_strip_whitespace=True)

    incident_message: str = Field(min_length=5, max_length=1000)
    incident_type: Status = Status.NEW
    source: Source

    @field_validator("incident_message")
    @classmethod
    def _not_a_placeholder(cls, value: str) -> str:
        if value.lower() in ("test", "none", "null"):
            raise ValueError("must say something")
        return value


class Incident(BaseModel):
    """The body of an answer."""

    model_config = ConfigDict(from_attributes=True)

    incident_id: int
    incident_message: str
    incident_type: Status
    source: Source
    created_at: datetime

    @field_serializer("created_at")
    def _seconds(self, value: datetime) -> str:
        return value.strftime("%Y-%m-%d %H:%M:%S")


DATABASE = os.environ["PLAIN_DATABASE"]

engine = create_async_engine(
    DATABASE,
    pool_size=20,
    max_overflow=0,
    connect_args={"timeout": 30} if DATABASE.startswith("sqlite") else {},
)
new_session = async_sessionmaker(engine, expire_on_commit=False)
redis: Redis | None = (
    Redis.from_url(os.environ["PLAIN_REDIS"], decode_responses=True)
    if "PLAIN_REDIS" in os.environ
    else None
)
pages: dict[str, str] = {}
"""The cache when there is no Redis."""


async def session() -> AsyncIterator[AsyncSession]:
    """Lend a session to a request."""
    async with new_session() as lent:
        yield lent


Session = Annotated[AsyncSession, Depends(session)]


def log_route(endpoint: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Log each request with its duration."""

    @functools.wraps(endpoint)
    async def logged(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        answer = await endpoint(*arguments, **named)
        logger.info("%s %.1f ms", endpoint.__name__, (time.perf_counter() - started) * 1000)
        return answer

    return logged


async def cached(key: str) -> Any:
    """Return the page cached under the key, or None."""
    text = pages.get(key) if redis is None else await redis.get(key)
    return None if text is None else json.loads(text)


async def cache(key: str, page: list[dict[str, Any]]) -> None:
    """Cache a page."""
    if redis is None:
        pages[key] = json.dumps(page)
    else:
        await redis.set(key, json.dumps(page), ex=CACHE_SECONDS)


async def clear() -> None:
    """Drop every cached page, as the origin does."""
    if redis is None:
        pages.clear()
        return
    keys = await redis.keys("incidents:*")
    if keys:
        await redis.delete(*keys)


router = APIRouter(prefix="/incident")


@router.post("/create", status_code=201, response_model=Incident)
@log_route
async def create(incident: NewIncident, session: Session) -> IncidentRow:
    """Create an incident."""
    row = IncidentRow(**incident.model_dump(), created_at=datetime.now(UTC))
    session.add(row)
    await session.commit()
    await clear()
    return row


@router.get("/get", response_model=list[Incident])
@log_route
async def list_incidents(
    session: Session,
    page: Annotated[int, Query(ge=1)] = 1,
    limit: Annotated[int, Query(ge=1, le=1000)] = 10,
    status: Status | None = None,
    source: Source | None = None,
) -> Any:
    """Return one page, newest first."""
    key = f"incidents:{page}:{limit}:{status or 'any'}:{source or 'any'}"
    found = await cached(key)
    if found is not None:
        return found
    statement = select(IncidentRow)
    if status is not None:
        statement = statement.where(IncidentRow.incident_type == status)
    if source is not None:
        statement = statement.where(IncidentRow.source == source)
    statement = statement.order_by(IncidentRow.created_at.desc(), IncidentRow.incident_id.desc())
    rows = (await session.scalars(statement.limit(limit).offset((page - 1) * limit))).all()
    answer = [Incident.model_validate(row).model_dump(mode="json") for row in rows]
    await cache(key, answer)
    return answer


@router.get("/get/{incident_id}", response_model=Incident)
@log_route
async def get(incident_id: int, session: Session) -> IncidentRow:
    """Return one incident."""
    row = await session.get(IncidentRow, incident_id)
    if row is None:
        raise HTTPException(404, "Incident not found")
    return row


@router.patch("/update-status", response_model=Incident)
@log_route
async def update_status(incident_id: int, status: Status, session: Session) -> IncidentRow:
    """Change the status."""
    row = await session.get(IncidentRow, incident_id)
    if row is None:
        raise HTTPException(404, "Incident not found")
    row.incident_type = status
    await session.commit()
    await clear()
    return row


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Check that Redis answers, and close all connections at the end."""
    if redis is not None:
        await redis.ping()
    yield
    if redis is not None:
        await redis.aclose()
    await engine.dispose()


app = FastAPI(lifespan=lifespan)
app.include_router(router)
